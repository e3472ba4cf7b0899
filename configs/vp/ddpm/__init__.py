"""DDPM's network and its experiments with the VP SDE."""
