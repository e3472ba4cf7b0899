"""Defaults of the CIFAR-10 experiments."""

import ml_collections

from configs.families import published


def get_default_configs() -> ml_collections.ConfigDict:
    """Return every key, with the values that the CIFAR-10 experiments share."""
    return published()
