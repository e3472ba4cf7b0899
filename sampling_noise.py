"""Where samplers' noise comes from: torch's global state, a generator, or per-sample seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import arguments
import sde_lib


class NoiseSource:
    """Where a sampler's noise comes from: torch's global state, one generator, or per-sample seeds.

    With `seeds`, sample i depends on seeds[i] alone, at any batch size.
    """

    def __init__(
        self, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ):
        if generator is not None and seeds is not None:
            raise ValueError("expected generator= or seeds=, got both; give one")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise arguments.WrongTypeError(
                f"generator: expected a torch.Generator, got {generator!r} of type "
                f"{type(generator).__name__}; for numbers use seeds="
            )
        self.generator = generator
        self.seeds = None if seeds is None else [int(s) for s in seeds]
        self._per_sample: list[torch.Generator] = []

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers of x's shape, dtype and device.

        They are drawn in float32 whatever x's dtype, so that it changes no picture; those of a
        generator on its own device, so that one of the CPU gives the same picture on every device,
        and sends each step's over.
        """
        options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        if self.generator is not None:
            options["device"] = self.generator.device
        if self.seeds is None:
            return torch.randn(x.shape, generator=self.generator, **options).to(x.device, x.dtype)
        if not self._per_sample:
            self._per_sample = [torch.Generator(x.device).manual_seed(s) for s in self.seeds]
        drawn = [torch.randn(x.shape[1:], generator=g, **options) for g in self._per_sample]
        return torch.stack(drawn).to(x.dtype)

    def prior(self, sde, shape) -> torch.Tensor:
        """`sde.prior_sampling(shape)` under this source; any process, as written."""
        if self.seeds is not None:
            free = sde_lib.unbound(sde)  # an observation has one row per sample
            x = torch.cat([self._seeded_prior(free, (1, *shape[1:]), seed) for seed in self.seeds])
            y = sde_lib.origin(sde, x)
            return x if y is None else x + y
        if self.generator is not None:
            g = self.generator
            seed = torch.randint(2**62, (), generator=g, device=g.device)
            return self._seeded_prior(sde, shape, int(seed))
        return sde.prior_sampling(shape)

    @staticmethod
    def _seeded_prior(sde, shape, seed: int) -> torch.Tensor:
        # On the CPU's global generator alone: torch.manual_seed would reseed every GPU too.
        kept = torch.get_rng_state()
        try:
            # Another stream than `randn_like` of the same seed.
            torch.default_generator.manual_seed(seed ^ 0x5DEECE66D)
            with torch.device("cpu"):  # whatever torch.set_default_device says
                return sde.prior_sampling(shape)
        finally:
            torch.set_rng_state(kept)


class Stepper:
    """What predictors and correctors share: their source of noise."""

    noise: NoiseSource | None = None

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Noise of x's shape; use this, not torch.randn_like, to obey `seeds=`."""
        if self.noise is None:
            return torch.randn_like(x, dtype=torch.float32).to(x.dtype)
        return self.noise.randn_like(x)


class own_noise_refused:
    """Refuse a step that draws from torch's global state, which per-sample `seeds` cannot govern.

    On a GPU asking for the state synchronises, so that only step 0 is watched there.
    """

    def __init__(self, seeds, device: torch.device, step: int = 0):
        self.active = seeds is not None and (step == 0 or device.type == "cpu")
        self.device = device

    def _state(self):
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def __enter__(self):
        self.before = self._state() if self.active else []

    def __exit__(self, kind, *_):
        if kind is None and self.active:
            for a, b in zip(self.before, self._state(), strict=True):
                if not torch.equal(a, b):
                    raise ValueError(
                        "a predictor, corrector or network draws its own noise, so seeds= cannot "
                        "govern it; draw by self.randn_like(x), or use generator="
                    )
