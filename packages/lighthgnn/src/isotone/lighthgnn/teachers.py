"""The teachers (section 2.2): networks of convolutions over a hypergraph or, for GCN and GAT, a graph.

Defaults are the paper's: two layers, hidden width 32, dropout 0.5, no batch norm; attention with 4 heads of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.lighthgnn import convolutions as conv
from isotone.lighthgnn.features import Features, dropout
from isotone.lighthgnn.graph import Graph
from isotone.lighthgnn.hypergraph import Hypergraph
from isotone.lighthgnn.outputs import fit_temperature, probabilities
from isotone.shared.errors import InputError


class Teacher(nn.Module):
    """A stack of one kind of convolution: `in_channels` to `hidden`, ..., to `num_classes` logits.

    `forward(X, structure)` takes N x in features, dense or sparse, and a `Hypergraph` or, of a sampled
    neighbourhood, a list with one `Block` for each layer. Any other module with this call can teach as well.
    `multilabel`: its logits are of labels that a vertex may have any number of (`outputs.py`).
    """

    convolution: type[conv.Convolution]
    on_graph = False
    """Whether it takes a `Graph`; it then makes the clique expansion of a `Hypergraph` that it is given."""

    def __init__(
        self,
        in_channels: int,
        hidden: int = 32,
        num_classes: int = 2,
        *,
        layers: int = 2,
        dropout: float = 0.5,
        batch_norm: bool = False,
        multilabel: bool = False,
        **more: Any,
    ) -> None:
        super().__init__()
        if layers < 1 or min(in_channels, hidden, num_classes) < 1:
            raise InputError(f"expected sizes of at least 1, got {(in_channels, hidden, num_classes)}, {layers} layers")
        self.multilabel = multilabel
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "hidden": hidden,
            "num_classes": num_classes,
            "layers": layers,
            "dropout": dropout,
            "batch_norm": batch_norm,
            "multilabel": multilabel,
            **more,
        }
        widths = [in_channels, *[hidden] * (layers - 1), num_classes]
        self.layers = nn.ModuleList(self._stack(widths, dropout=dropout, batch_norm=batch_norm, **more))
        self._expanded: tuple[Hypergraph, Graph] | None = None

    def _stack(self, widths: list[int], *, batch_norm: bool, **options: Any) -> list[conv.Convolution]:
        hidden = [self.convolution(a, b, batch_norm=batch_norm, **options) for a, b in pairwise(widths[:-1])]
        return [*hidden, self.convolution(*widths[-2:], last=True, **options)]

    def structures(self, structure: Any) -> Sequence[Any]:
        """One structure a layer, from what `forward` was given."""
        if isinstance(structure, (list, tuple)):
            if len(structure) != len(self.layers):
                raise ValueError(f"expected {len(self.layers)} blocks, one a layer, got {len(structure)}")
            return structure
        if self.on_graph and isinstance(structure, Hypergraph):
            if self._expanded is None or self._expanded[0] is not structure:
                self._expanded = structure, Graph.clique_expansion(structure)
            structure = self._expanded[1]
        return [structure] * len(self.layers)

    def embed(self, X: Features, structure: Any) -> Float[Tensor, "N hidden"]:
        """The hidden layer before the last convolution: what the topology-aware score looks at.

        Raises `InputError` on another number of features.
        """
        if X.shape[1] != self.config["in_channels"]:
            raise InputError(f"expected {self.config['in_channels']} features, the teacher's own, got {X.shape[1]}")
        hidden: Any = X
        for layer, part in zip(self.layers[:-1], self.structures(structure), strict=False):
            hidden = layer(hidden, part)
        return hidden

    def forward(self, X: Features, structure: Any) -> Float[Tensor, "T num_classes"]:
        """Logits of the target vertices."""
        return self.layers[-1](self.embed(X, structure), self.structures(structure)[-1])


class HGNN(Teacher):
    """Hypergraph neural network: symmetric smoothing."""

    convolution = conv.HGNNConv


class HGNNP(Teacher):
    """HGNN+: row-stochastic smoothing."""

    convolution = conv.HGNNPConv


class HNHN(Teacher):
    """Hypergraph networks with hyperedge neurons."""

    convolution = conv.HNHNConv


class UniGCN(Teacher):
    """UniGNN's GCN."""

    convolution = conv.UniGCNConv


class UniSAGE(Teacher):
    """UniGNN's SAGE."""

    convolution = conv.UniSAGEConv


class UniGIN(Teacher):
    """UniGNN's GIN, eps = 0."""

    convolution = conv.UniGINConv


class GCN(Teacher):
    """Graph convolutional network on the graph, or on a hypergraph's clique expansion."""

    convolution = conv.GCNConv
    on_graph = True


class UniGAT(Teacher):
    """UniGNN's attention: `heads` heads of hidden / heads channels, then one head of the classes.

    Dropout of the input and of the hidden layer; ELU also after the last layer, as in dhg.
    """

    convolution: Any = conv.UniGATConv

    def __init__(
        self, in_channels: int, hidden: int = 32, num_classes: int = 2, *, heads: int = 4, **options: Any
    ) -> None:
        layers = options.get("layers", 2)
        if layers < 2 or hidden % heads:
            raise InputError(
                f"expected hidden divisible by heads and 2 layers or more, got {hidden}, {heads}, {layers}"
            )
        super().__init__(in_channels, hidden, num_classes, heads=heads, **options)
        self.dropout = options.get("dropout", 0.5)

    def _stack(self, widths: list[int], *, batch_norm: bool, heads: int = 4, **options: Any) -> list[conv.Convolution]:
        attention = [
            self.convolution(a, b // heads, heads=heads, batch_norm=batch_norm, **options)
            for a, b in pairwise(widths[:-1])
        ]
        return [*attention, self.convolution(*widths[-2:], **options)]

    def embed(self, X: Features, structure: Any) -> Float[Tensor, "N hidden"]:
        """The hidden layer, its dropout included."""
        hidden = X
        for layer, part in zip(self.layers[:-1], self.structures(structure), strict=False):
            hidden = layer(dropout(hidden, self.dropout, self.training), part)
        return dropout(hidden, self.dropout, self.training)  # type: ignore[return-value]


class GAT(UniGAT):
    """Graph attention network on the graph, or on a hypergraph's clique expansion."""

    convolution = conv.GATConv
    on_graph = True


TEACHERS: dict[str, type[Teacher]] = {
    "hgnn": HGNN,
    "hgnnp": HGNNP,
    "hnhn": HNHN,
    "unigcn": UniGCN,
    "unigat": UniGAT,
    "unisage": UniSAGE,
    "unigin": UniGIN,
    "gcn": GCN,
    "gat": GAT,
}


def make_teacher(name: str, in_channels: int, num_classes: int, **options: Any) -> Teacher:
    """The teacher `name`, a key of `TEACHERS`, with the options of its class; `InputError` on another name."""
    if name not in TEACHERS:
        raise InputError(f"expected a teacher of {', '.join(TEACHERS)}, got {name!r}")
    return TEACHERS[name](in_channels, num_classes=num_classes, **options)


@torch.no_grad()
def predict_proba(
    teacher: nn.Module, X: Features, structure: Any, multilabel: bool | None = None, temperature: float = 1.0
) -> Float[Tensor, "N C"]:
    """Probabilities of any teacher in eval mode; its mode is put back. Raises `InputError` on temperature <= 0.

    `multilabel`: a sigmoid each instead of a softmax; if not given, what the teacher says of itself.
    """
    if not 0 < temperature < float("inf"):
        raise InputError(f"expected a finite temperature above 0, got {temperature}")
    training = teacher.training
    teacher.eval()
    logits = teacher(X, structure)
    teacher.train(training)
    return probabilities(logits / temperature, is_multilabel(teacher) if multilabel is None else multilabel)


def calibrated_temperature(
    teacher: nn.Module, X: Features, structure: Any, y: Int[Tensor, " N *C"], val: Int[Tensor, " b"]
) -> float:
    """The temperature at which a teacher's probabilities fit the labels of `val` best (`outputs.fit_temperature`)."""
    training = teacher.training
    teacher.eval()
    with torch.no_grad():
        logits = teacher(X, structure)[val]
    teacher.train(training)
    return fit_temperature(logits, y[val])


def is_multilabel(teacher: nn.Module) -> bool:
    """What a teacher says of its outputs; a module without `multilabel` has one class a vertex."""
    return bool(getattr(teacher, "multilabel", False))
