"""Configurations: defaults, validation and one file per published or example experiment."""
