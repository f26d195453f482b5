"""ktmerge: fine-tune fully, blend back with the base, score upstream and downstream."""

__version__ = "0.1.0"
