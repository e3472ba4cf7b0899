"""Reference statistics of a run's data: where they are, and the mode `stats` that makes them."""

from __future__ import annotations

from pathlib import Path

import data_lib
import distributed
import evaluation_scales
import evaluation_stats
from evaluation_features import get_extractor
from files import remove_unfinished
from run_lib_checks import check_writable
from run_lib_journal import progress_bar
from run_lib_memory import remedy_for_memory, remedy_in_evaluation
from run_lib_state import complete_here, data_folder, data_name, fixed_subset

#: Images among which the largest distance is looked for, and the numbers that they may hold.
SUBSET, SUBSET_NUMBERS = 10000, 2**28


def statistics_path(config) -> Path:
    """Where the reference statistics are: `eval.stats`, or a name made of data, size and extractor
    in assets/stats, beside this file in a checkout, else in the current folder.

    Raises: ValueError where the file of that name is of another folder of the data's name.
    """
    e = config.eval
    if e.stats:
        path = Path(e.stats).expanduser()
        return path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    here = Path(__file__).resolve().parent
    root = here if (here / "assets").is_dir() else Path.cwd()
    name = f"{data_name(config)}_{config.data.image_size}_{e.extractor.lower()}.npz"
    path, folder = root / "assets" / "stats" / name, data_folder(config)
    if folder is not None:
        recorded = evaluation_stats.recorded_protocol(path).get("folder", str(folder))
        if recorded != str(folder):
            raise ValueError(
                f"{path}: expected statistics of the images in {folder}, got those of {recorded}, "
                "a folder of the same name; name another file by --config.eval.stats, or remove it"
            )
    return path


def statistics(config, workdir=None) -> Path:
    """Make the reference statistics of the training images that `config.data` names.

    All images, as the network is trained on them (size and crop), uint8, none flipped; see
    docs/evaluation.md. Says what the data advise for σ_max and the number of noise scales.

    Args:
      workdir: not needed; the statistics belong to the data.

    Returns: the path of the .npz.
    """
    del workdir
    with distributed.process_group():
        with distributed.together():
            config = complete_here(config)
            path = statistics_path(config)
            if distributed.is_main():
                check_writable(path.parent)
                remove_unfinished(path.parent, path.name)
        image_set, _ = distributed.in_turn(lambda: data_lib.get_image_sets(config))
        e = config.eval
        extractor = get_extractor(
            e.extractor, e.inception_path, config.device, e.download_inception
        )
        label = f"features by {extractor.name!r}"
        mine = len(distributed.share(len(image_set)))
        what = f"features of {e.batch_size} images at a time"
        remedy = remedy_for_memory(what, remedy_in_evaluation(e.batch_size))
        with progress_bar(mine, desc=label, unit="image", leave=False) as bar, remedy:
            made = evaluation_stats.dataset_statistics(
                image_set,
                extractor,
                batch_size=e.batch_size,
                keep_features=e.stats_features,
                dataset=data_name(config),
                progress=bar.update,
            )
        if (folder := data_folder(config)) is not None:
            made.protocol["folder"] = str(folder)
        with distributed.together():
            path = evaluation_stats.write_statistics(path, made)
            if distributed.is_main():
                print(f"statistics of {made.n:,} images of {image_set.name}: {path}")
                print(advice(config, image_set))
    return path


def advice(config, image_set) -> str:
    """NCSNv2's advice for σ_max and the number of scales, in units of the network's range."""
    numbers = image_set.shape[0] * image_set.shape[1] * image_set.shape[2]
    count = min(len(image_set), SUBSET, max(SUBSET_NUMBERS // numbers, 2))
    images = image_set.take(fixed_subset(len(image_set), count))
    largest = evaluation_scales.largest_pairwise_distance(images, levels=image_set.levels)
    sigma_max = largest * (2 if config.data.centered else 1)
    m = config.model
    try:
        scales = evaluation_scales.ncsnv2_num_scales(sigma_max, m.sigma_min, numbers)
    except ValueError as error:
        return f"largest distance of {count:,} training images: {sigma_max:.3g} ({error})"
    return (
        f"largest distance of {count:,} training images: {sigma_max:.3g} in the network's range, "
        f"NCSNv2's advice for model.sigma_max (now {m.sigma_max:g}); its rule for "
        f"model.num_scales from there to model.sigma_min={m.sigma_min:g}: {scales} (now "
        f"{m.num_scales})"
    )
