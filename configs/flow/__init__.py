"""Experiments with rectified flow, by flow matching."""
