"""Points in the plane: a minute on two cores each."""
