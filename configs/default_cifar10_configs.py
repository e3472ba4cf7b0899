"""Defaults of the CIFAR-10 experiments."""

from configs.families import published


def get_default_configs():
    """Return every key, with the values that the CIFAR-10 experiments share."""
    return published()
