"""Door for code written for score_sde_pytorch: `data_lib` behind `get_dataset`.

Used from a checkout only; no module of this library imports it.
"""

from collections.abc import Iterator

import numpy as np
import torch

from configs.validation import complete
from data_lib import (
    Batch,
    ImageSet,
    eval_batches,
    get_data_inverse_scaler,
    get_data_scaler,
    get_image_sets,
    train_batches,
)
from data_lib import prepare as _prepare

__all__ = ["Dataset", "get_data_inverse_scaler", "get_data_scaler", "get_dataset"]


class Array(np.ndarray):
    """A NumPy array that also answers to ``_numpy()`` and ``numpy()``, as a TensorFlow one."""

    def _numpy(self) -> np.ndarray:
        return self.view(np.ndarray)

    numpy = _numpy


class Dataset:
    """Batches ``dict(image=..., label=...)`` of an image set; ``len`` counts those of one pass.

    ``image`` is float32 in [0, 1] of shape (b, H, W, C), ``label`` int64 of shape (b,) or None.
    With ``repeat`` the batches are shuffled, differently in each iterator, and never end;
    without it every image comes exactly once, in order, and the last batch may be smaller.
    """

    def __init__(self, image_set: ImageSet, config, *, repeat, flip, dequantize, stream):
        self.image_set = image_set
        self.batch_size = config.training.batch_size if repeat else config.eval.batch_size
        self.repeat, self.flip, self.dequantize = repeat, flip, dequantize
        self._config = config.copy_and_resolve_references()
        self._config.data.update(centered=False, logit_alpha=0.0)  # the caller scales
        self._seeds = np.random.SeedSequence((config.seed, stream))
        self._generator = torch.Generator().manual_seed(int(self._seeds.generate_state(1)[0]))

    def __len__(self) -> int:
        return -(-len(self.image_set) // self.batch_size)

    def __iter__(self) -> Iterator[dict]:
        if self.repeat:
            seed = int(self._seeds.spawn(1)[0].generate_state(1)[0])
            return map(self._convert, train_batches(self.image_set, self.batch_size, seed))
        return map(self._convert, eval_batches(self.image_set, self.batch_size))

    def _convert(self, batch: Batch) -> dict:
        images = _prepare(
            batch.images,
            self._config,
            flip=self.flip,
            dequantize=self.dequantize,
            generator=self._generator,
        )
        label = None if batch.labels is None else batch.labels.numpy().view(Array)
        image = images.permute(0, 2, 3, 1).contiguous().numpy().view(Array)
        return {"image": image, "label": label}


def get_dataset(
    config, uniform_dequantization: bool = False, evaluation: bool = False
) -> tuple[Dataset, Dataset, None]:
    """Return the training and the evaluation batches, and None for the original's builder.

    With ``evaluation`` both pass once over every image in batches of ``eval.batch_size``. Without
    it both are shuffled, repeat for ever in batches of ``training.batch_size``, and the training
    images (unlike the original, only these) are flipped where ``data.random_flip`` says so. Each
    pass draws fresh dequantisation noise.

    Raises FileNotFoundError and ValueError as ``data_lib.get_image_sets``.
    """
    config = complete(config)
    train, held_out = get_image_sets(config)
    if not isinstance(train, ImageSet) or not isinstance(held_out, ImageSet):
        raise ValueError(
            f"datasets.get_dataset gives images, and {config.data.dataset!r} is a set of points; "
            "use data_lib.get_image_sets"
        )

    def dataset(image_set: ImageSet, flip: bool, stream: int) -> Dataset:
        return Dataset(
            image_set,
            config,
            repeat=not evaluation,
            flip=flip,
            dequantize=uniform_dequantization,
            stream=stream,
        )

    flip = config.data.random_flip and not evaluation
    return dataset(train, flip, 0), dataset(held_out, False, 1), None
