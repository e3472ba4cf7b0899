"""Configurations: defaults, validation and one file per published or example experiment."""

#: Of the library; setup.py reads it here, results and `main.py --version` name it.
__version__ = "0.1.0"
