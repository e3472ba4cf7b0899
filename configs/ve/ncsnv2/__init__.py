"""NCSNv2 with the discrete VE SDE."""
