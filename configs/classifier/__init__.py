"""Noise-conditional classifiers, for class-conditional sampling with unconditional networks."""
