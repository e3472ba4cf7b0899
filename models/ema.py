"""Exponential moving average of a network's parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import contextmanager

import torch


class ExponentialMovingAverage:
    """A moving average of parameters, with score_sde's warm-up.

        shadow ← shadow + (1 − d)(parameter − shadow),   d = min(decay, (1 + n)/(10 + n))

    after n updates. Only parameters with requires_grad are averaged, in their order.

    Args:
      parameters: the network's parameters.
      decay: d in [0, 1].
      use_num_updates: whether the warm-up is used.
    """

    def __init__(self, parameters: Iterable, decay: float, use_num_updates: bool = True):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"expected 0 <= decay <= 1, got {decay}")
        self.decay = decay
        self.num_updates: int | None = 0 if use_num_updates else None
        self.shadow_params = [p.detach().clone() for p in parameters if p.requires_grad]
        self.collected_params: list[torch.Tensor] = []

    def _match(self, parameters: Iterable) -> list[torch.Tensor]:
        params = [p for p in parameters if p.requires_grad]
        if [p.shape for p in params] != [s.shape for s in self.shadow_params]:
            raise ValueError(
                f"the average holds {len(self.shadow_params)} parameters and got {len(params)}, "
                "or their shapes or order differ; give the parameters of the same network"
            )
        return params

    @torch.no_grad()
    def update(self, parameters: Iterable) -> None:
        """Move the average towards the present parameters."""
        params = self._match(parameters)
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        if params:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                self.shadow_params, params, 1.0 - decay
            )

    @torch.no_grad()
    def copy_to(self, parameters: Iterable) -> None:
        """Copy the average into `parameters`."""
        for shadow, param in zip(self.shadow_params, self._match(parameters), strict=True):
            param.copy_(shadow)

    def store(self, parameters: Iterable) -> None:
        """Keep the present parameters, for `restore`."""
        self.collected_params = [p.detach().clone() for p in self._match(parameters)]

    @torch.no_grad()
    def restore(self, parameters: Iterable) -> None:
        """Put back what `store` kept, and let go of it."""
        if not self.collected_params and self.shadow_params:
            raise RuntimeError("restore() without store(): nothing is kept")
        for kept, param in zip(self.collected_params, self._match(parameters), strict=True):
            param.copy_(kept)
        self.collected_params = []

    @contextmanager
    def average_parameters(self, parameters: Iterable):
        """Within this context `parameters` hold the average."""
        params = list(parameters)
        self.store(params)
        self.copy_to(params)
        try:
            yield
        finally:
            self.restore(params)

    def state_dict(self) -> dict:
        """decay, num_updates and the list shadow_params, as score_sde_pytorch writes them."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": self.shadow_params,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a saved average; its shapes must be this network's."""
        shadow = list(state_dict["shadow_params"])
        if [s.shape for s in shadow] != [s.shape for s in self.shadow_params]:
            raise ValueError(
                f"the saved average has {len(shadow)} parameters, this network "
                f"{len(self.shadow_params)}, or their shapes or order differ"
            )
        if state_dict["decay"] != self.decay:
            warnings.warn(
                f"the saved average has decay {state_dict['decay']}, the configuration "
                f"{self.decay}; the saved one is used",
                stacklevel=2,
            )
        self.decay = state_dict["decay"]
        self.num_updates = state_dict["num_updates"]
        for mine, saved in zip(self.shadow_params, shadow, strict=True):
            mine.copy_(saved)
