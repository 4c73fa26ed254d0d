"""FILL: the paper's idea in a paragraph, and what this package gives."""

from isotone.quamba2.method import method

__version__ = "0.1.0"
__all__ = ["method"]
