"""Experiments with the variance-preserving SDE."""
