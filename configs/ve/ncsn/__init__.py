"""NCSN with the discrete VE SDE."""
