"""Order-Preserving GFlowNets."""

__version__ = "0.1.0"
