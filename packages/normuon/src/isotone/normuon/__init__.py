"""NorMuon (arXiv 2510.05491): Muon with neuron-wise second-moment normalisation.

Muon replaces the momentum of a weight matrix by its orthogonal polar factor. NorMuon then divides each row (one
output neuron) by a running root mean square of its own and rescales the matrix, so that no neuron's step is larger
than another's. `NorMuon` and `Muon` are torch optimizers on one engine, exact under FSDP2, HSDP and data parallelism.
"""

from isotone.normuon.layout import split_params
from isotone.normuon.normalize import convert_lr, row_normalize
from isotone.normuon.optimizer import Muon, NorMuon
from isotone.normuon.orthogonalize import zeropower
from isotone.normuon.stats import matrix_stats, update_stats

__version__ = "0.1.0"
__all__ = [
    "Muon",
    "NorMuon",
    "convert_lr",
    "matrix_stats",
    "row_normalize",
    "split_params",
    "update_stats",
    "zeropower",
]
