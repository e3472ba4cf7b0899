"""Experiments in the way of Huang, Lim & Courville 2021 (sdeflow)."""
