"""LightHGNN (arXiv 2402.04296): hypergraph neural networks distilled into MLPs that answer from features alone.

A teacher learns on a hypergraph; a student MLP learns the teacher's soft labels, and for LightHGNN+ also its mean
predictions on hyperedges whose entropy stays put under feature noise. Then the hypergraph is thrown away.
`LightHGNN(...).fit(X, hyperedges, y).predict(X_new)` is the whole of it; the parts are modules of their own.
"""

from typing import TYPE_CHECKING, Any

from isotone.lighthgnn.blocks import Incidences, StoredHypergraph, predict_in_blocks, train_teacher_in_blocks
from isotone.lighthgnn.dataset import Dataset, digits_knn, known_dataset, load_dataset
from isotone.lighthgnn.distill import DistillConfig, distill, train_teacher
from isotone.lighthgnn.export import export_onnx, export_torch, load_student, save_student, with_int8_weights
from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.losses import HighOrderConstraint, kd_loss
from isotone.lighthgnn.readers import (
    from_hypernetx,
    from_xgi,
    read_edge_list,
    read_hif,
    read_hypergcn,
    read_planetoid,
    write_hif,
)
from isotone.lighthgnn.reliability import reliable_hyperedge_scores, sample_hyperedges
from isotone.lighthgnn.settings import Split, observed_hypergraph, production_split, transductive_split
from isotone.lighthgnn.sparse import SparseMatrix
from isotone.lighthgnn.stacked import train_teachers_together
from isotone.lighthgnn.student import CompiledStudent, LightMLP
from isotone.lighthgnn.synthetic import SyntheticConfig, make_synthetic
from isotone.lighthgnn.teachers import (
    GAT,
    GCN,
    HGNN,
    HGNNP,
    HNHN,
    UniGAT,
    UniGCN,
    UniGIN,
    UniSAGE,
    calibrated_temperature,
    make_teacher,
    predict_proba,
)
from isotone.lighthgnn.topology import topology_score
from isotone.lighthgnn.training import TrainConfig

if TYPE_CHECKING:
    from isotone.lighthgnn.estimator import LightHGNN, LightHGNNClassifier

__version__ = "0.1.0"
__all__ = [
    "CompiledStudent",
    "Dataset",
    "DistillConfig",
    "GAT",
    "GCN",
    "Graph",
    "HGNN",
    "HGNNP",
    "HNHN",
    "HighOrderConstraint",
    "Hypergraph",
    "Incidences",
    "LightHGNN",
    "LightHGNNClassifier",
    "LightMLP",
    "SparseMatrix",
    "Split",
    "StoredHypergraph",
    "SyntheticConfig",
    "TrainConfig",
    "UniGAT",
    "UniGCN",
    "UniGIN",
    "UniSAGE",
    "calibrated_temperature",
    "digits_knn",
    "distill",
    "export_onnx",
    "export_torch",
    "from_hypernetx",
    "from_xgi",
    "kd_loss",
    "known_dataset",
    "load_dataset",
    "load_student",
    "make_synthetic",
    "make_teacher",
    "observed_hypergraph",
    "predict_in_blocks",
    "predict_proba",
    "production_split",
    "read_edge_list",
    "read_hif",
    "read_hypergcn",
    "read_planetoid",
    "reliable_hyperedge_scores",
    "sample_hyperedges",
    "save_student",
    "topology_score",
    "train_teacher",
    "train_teacher_in_blocks",
    "train_teachers_together",
    "transductive_split",
    "with_int8_weights",
    "write_hif",
]


def __getattr__(name: str) -> Any:
    # scikit-learn takes a second to import, and only the estimators need it
    if name in ("LightHGNN", "LightHGNNClassifier"):
        from isotone.lighthgnn import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
