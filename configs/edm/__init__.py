"""Experiments in the way of Karras et al. 2022 (EDM)."""
