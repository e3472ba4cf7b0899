"""Experiments in the way of Song, Durkan, Murray & Ermon 2021 (ScoreFlow)."""
