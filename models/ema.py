"""Moving averages of a network's parameters: the original's, and several at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from . import ema_posthoc


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

    def _step_size(self) -> float:
        """1 − d of the update that `num_updates` already counts."""
        if self.num_updates is None:
            return 1.0 - self.decay
        return 1.0 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self, parameters: Iterable) -> None:
        """Move the average towards the present parameters."""
        params = self._match(parameters)
        if self.num_updates is not None:
            self.num_updates += 1
        if params:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                self.shadow_params, params, self._step_size()
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
    def average_parameters(self, parameters: Iterable, **which):
        """Within this context `parameters` hold the average that `copy_to(**which)` copies."""
        params = list(parameters)
        self.store(params)
        try:
            self.copy_to(params, **which)
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
        shadow = self._checked(state_dict)
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

    def _checked(self, state_dict: dict) -> list[torch.Tensor]:
        shadow = list(state_dict["shadow_params"])
        if [s.shape for s in shadow] != [s.shape for s in self.shadow_params]:
            raise ValueError(
                f"the saved average has {len(shadow)} parameters, this network "
                f"{len(self.shadow_params)}, or their shapes or order differ"
            )
        return shadow


class PowerFunctionAverage(ExponentialMovingAverage):
    """The average (γ + 1)/t^{γ+1} ∫_0^t τ^γ θ(τ) dτ of all parameters so far, after t updates.

        β_t = (1 − 1/t)^{γ+1},   σ_rel² = (γ + 1)/((γ + 2)²(γ + 3))

    Its width stays the same share σ_rel of the training's length (Karras et al. 2024, "Analyzing
    and Improving the Training Dynamics of Diffusion Models", section 3). With θ constant between
    updates the recursion is the integral exactly: the products of β telescope.

    Args:
      parameters: the network's parameters.
      sigma_rel: relative width in (0, 1/√12); 0.05 and 0.10 are the paper's.
    """

    def __init__(self, parameters: Iterable, sigma_rel: float):
        self.gamma = ema_posthoc.gamma_of(sigma_rel)
        super().__init__(parameters, decay=1.0)

    def _step_size(self) -> float:
        return ema_posthoc.step_size(self.gamma, self.num_updates or 0)


class Averages(ExponentialMovingAverage):
    """The average of `ExponentialMovingAverage`, and others kept up beside it.

    It behaves as the original's where nobody asks for the others: `copy_to(parameters)` copies the
    main average, and `state_dict` only gains the keys 'rates' and 'profiles', each
    {number: state}, where there are any.

    Args:
      parameters: the network's parameters.
      decay: of the main average.
      rates: decays of further averages, with the same warm-up.
      profiles: σ_rel of power-function averages.
      snapshot_freq: updates between the snapshots of `snapshot_if_due`; 0 = none.

    Raises:
      ValueError: a number stands twice, or is out of range, or snapshots are wanted of no profile.
    """

    def __init__(
        self,
        parameters: Iterable,
        decay: float,
        rates: Sequence[float] = (),
        profiles: Sequence[float] = (),
        snapshot_freq: int = 0,
    ):
        parameters = list(parameters)
        super().__init__(parameters, decay)
        names = [decay, *rates, *profiles]
        if len(set(names)) < len(names):
            raise ValueError(
                f"expected model.ema_rate, ema_rates and ema_profiles that differ, got {names}; "
                "each names one average"
            )
        if snapshot_freq and not profiles:
            raise ValueError(
                f"training.posthoc_freq={snapshot_freq} needs model.ema_profiles, got none; "
                "use (0.05, 0.1)"
            )
        self.rates = {rate: ExponentialMovingAverage(parameters, rate) for rate in rates}
        self.profiles = {s: PowerFunctionAverage(parameters, s) for s in profiles}
        self.snapshot_freq = snapshot_freq

    @property
    def others(self) -> dict[float, ExponentialMovingAverage]:
        """The averages beside the main one, by their decay or σ_rel."""
        return {**self.rates, **self.profiles}

    def update(self, parameters: Iterable) -> None:
        """Move every average towards the present parameters."""
        parameters = list(parameters)
        super().update(parameters)
        for average in self.others.values():
            average.update(parameters)

    def copy_to(
        self, parameters: Iterable, *, which: float | Sequence[torch.Tensor] | None = None
    ) -> None:
        """Copy an average into `parameters`.

        `which` is None for the main one, the decay or σ_rel of another, or tensors in the order of
        the averaged parameters, such as `posthoc_ema` gives.

        Raises: ValueError for a number that names no average, or parameters of another network.
        """
        if which is None or which == self.decay:
            return super().copy_to(parameters)
        if not isinstance(which, float | int):
            params, tensors = self._match(parameters), self._checked({"shadow_params": which})
            with torch.no_grad():
                for param, tensor in zip(params, tensors, strict=True):
                    param.copy_(tensor)
            return None
        if which not in self.others:
            raise ValueError(
                f"no average has the decay or width {which}; expected one of "
                f"{[self.decay, *self.others]}; add it to model.ema_rates or model.ema_profiles "
                "before training"
            )
        return self.others[which].copy_to(parameters)

    def state_dict(self) -> dict:
        """The original's keys, then 'rates' and 'profiles' where there are any."""
        others = {"rates": self.rates, "profiles": self.profiles}
        return super().state_dict() | {
            key: {name: average.state_dict() for name, average in averages.items()}
            for key, averages in others.items()
            if averages
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over saved averages; those that the file lacks begin again at its main one.

        Warns of these, and of averages in the file that nobody asked for here.
        """
        saved = {**state_dict.get("rates", {}), **state_dict.get("profiles", {})}
        for name in self.others.keys() & saved.keys():
            self._checked(saved[name])  # before anything is taken over
        super().load_state_dict(state_dict)
        for name, average in self.others.items():
            begun = average.state_dict() | {"shadow_params": state_dict["shadow_params"]}
            average.load_state_dict(saved.get(name, begun | {"num_updates": 0}))
        for what, names in (
            ("not in the file, begun again", self.others.keys() - saved.keys()),
            ("in the file only, left out", saved.keys() - self.others.keys()),
        ):
            if names:
                warnings.warn(f"averages {what}: {sorted(names)}", stacklevel=2)

    def save_snapshot(
        self, folder: str | os.PathLike, step: int, *, dtype: torch.dtype = torch.float32
    ) -> Path:
        """Write the power-function averages to `folder`, for `posthoc_ema`; returns the file.

        `dtype` torch.float16 halves the file, at a relative error of 5e-4 in each weight.
        """
        if not self.profiles:
            raise ValueError("a snapshot needs model.ema_profiles, got none; use (0.05, 0.1)")
        if not all(average.num_updates for average in self.profiles.values()):
            raise ValueError("a snapshot needs at least one update, got none; train first")
        snapshots = [
            ema_posthoc.Snapshot(average.num_updates or 0, average.gamma, average.shadow_params)
            for average in self.profiles.values()
        ]
        return ema_posthoc.write(Path(folder), step, snapshots, dtype)

    def snapshot_if_due(self, folder: str | os.PathLike, step: int) -> Path | None:
        """`save_snapshot` where `step` is a multiple of `snapshot_freq`; one process calls it."""
        due = self.snapshot_freq > 0 and step > 0 and step % self.snapshot_freq == 0
        return self.save_snapshot(folder, step) if due else None


def from_config(config, parameters: Iterable) -> Averages:
    """The averages that a configuration asks for.

    The main one decays by `model.ema_rate`; beside it `model.ema_rates` and `model.ema_profiles`
    (widths σ_rel), whose snapshots are due every `training.posthoc_freq` steps.
    """
    model, training = config.model, config.get("training", {})
    return Averages(
        parameters,
        decay=model.ema_rate,
        rates=model.get("ema_rates", ()),
        profiles=model.get("ema_profiles", ()),
        snapshot_freq=training.get("posthoc_freq", 0),
    )


posthoc_ema = ema_posthoc.posthoc_ema
