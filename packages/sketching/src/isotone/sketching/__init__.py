"""Sketched first-order methods: rounds of federated learning through R_t and back, attacks on what is sent, privacy.

A sketch R_t of s rows stands between clients and server; averages of R_t^T R_t x are unbiased, and what a round costs
follows from one number, alpha.
"""

from isotone.sketching.federated import FedAlgorithm, FedConfig, FedState, fed_algorithm
from isotone.sketching.sketches import Sketch, make_sketch
from isotone.sketching.transform import sketch_compress, sketched
from isotone.sketching.trees import TreeSketch, tree_sketch

__version__ = "0.1.0"
__all__ = [
    "FedAlgorithm",
    "FedConfig",
    "FedState",
    "Sketch",
    "TreeSketch",
    "fed_algorithm",
    "make_sketch",
    "sketch_compress",
    "sketched",
    "tree_sketch",
]
