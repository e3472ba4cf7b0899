"""Score networks, their registry and the functions that turn a network into a score."""
