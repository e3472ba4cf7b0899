"""Normalisation layers by name."""

from __future__ import annotations

from torch import nn

_NORMS = {"GroupNorm": nn.GroupNorm, "InstanceNorm": nn.InstanceNorm2d}
_CONDITIONAL_NORMS: dict = {}


def get_normalization(config, conditional: bool = False):
    """The normalisation class named by `config.model.normalization`.

    Args:
      config: its `model.normalization` is the name (default GroupNorm).
      conditional: whether the layer also takes class labels, `layer(x, y)`.

    Raises:
      ValueError: no (conditional) normalisation has that name.
    """
    name = config.model.get("normalization", "GroupNorm")
    known = _CONDITIONAL_NORMS if conditional else _NORMS
    if name not in known:
        kind = "conditional normalisation" if conditional else "normalisation"
        raise ValueError(
            f"model.normalization needs the name of a {kind}, one of {sorted(known)}, "
            f"got {name!r}; see models/normalization.py"
        )
    return known[name]
