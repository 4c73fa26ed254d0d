"""What is a matrix: every parameter is a carrier of rows, cut into blocks that are orthogonalised apart.

A Linear weight (m, n) is one block; a convolution (out, in, kh, kw) is (out, in kh kw); experts (E, m, n) are E
blocks of (E m, n), unless a group says that its weights of three dimensions are 1-D convolutions (out, in, k); a
fused QKV and attention heads are blocks of rows of one weight (section 2.5).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AXES = ("row", "column", "auto")
_SUSPICIOUS_ASPECT = 8


@dataclass(frozen=True)
class Layout:
    """`shape`: the carrier's (rows, columns). `blocks`: how many rows each matrix has. `axis`: "row" or "column".

    `experts`: whether the parameter's first dimension counts matrices.
    """

    shape: tuple[int, int]
    blocks: tuple[int, ...]
    axis: str
    experts: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of each matrix."""
        return [(rows, self.shape[1]) for rows in self.blocks]


def layout_of(shape: Sequence[int], options: Mapping[str, Any], name: str = "parameter") -> Layout:
    """The layout of a parameter of `shape` under a group's options (`split_sizes`, `num_heads`, `axis`, `experts`).

    Raises `ValueError` on fewer than two dimensions, on sizes that do not sum to the rows, and on heads that do
    not divide them.
    """
    if len(shape) < 2:
        raise ValueError(f"expected {name} of a matrix group to have 2 dimensions or more, got shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"expected {name} of a matrix group to have entries, got shape {tuple(shape)}")
    experts = len(shape) == 3 and bool(options.get("experts", True))
    if experts:
        carrier, blocks = (shape[0] * shape[1], shape[2]), (shape[1],) * shape[0]
    elif len(shape) == 2:
        carrier, blocks = (shape[0], shape[1]), (shape[0],)
    elif options.get("flatten_conv", True):
        carrier = (shape[0], int(torch.Size(shape[1:]).numel()))
        blocks = (shape[0],)
    else:
        raise ValueError(f"expected flatten_conv for {name} of shape {tuple(shape)}, got flatten_conv=False")
    split, heads = options.get("split_sizes"), options.get("num_heads")
    if (split is not None or heads is not None) and experts:
        raise ValueError(f"expected split_sizes and num_heads for a weight of rows, got shape {tuple(shape)}")
    if split is not None:
        if not split or sum(split) != shape[0] or min(split) < 1:
            raise ValueError(f"expected split_sizes of {name} to sum to {shape[0]}, got {tuple(split)}")
        blocks = tuple(split)
    if heads is not None:
        counts = (heads,) * len(blocks) if isinstance(heads, int) else tuple(heads)
        if len(counts) != len(blocks) or any(h < 1 or rows % h for h, rows in zip(counts, blocks, strict=False)):
            raise ValueError(f"expected num_heads to divide the rows {blocks} of {name}, got {heads}")
        blocks = tuple(rows // h for h, rows in zip(counts, blocks, strict=True) for _ in range(h))
    axis = options.get("axis", "row")
    if axis == "auto":  # the author's speedrun variant (section 2.6): rows of tall matrices, columns of wide ones
        axis = "row" if max(blocks) >= carrier[1] else "column"
    return Layout(carrier, blocks, axis, experts)


def split_params(
    model: nn.Module, embed: Iterable[nn.Module] = (), head: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """The parameters of `model` in groups: kind "matrix" for hidden weights, "adamw" for all else.

    By module type (section 2.5): weights of two dimensions or more of Linear, convolution and unknown modules
    are matrices (those of `nn.Conv1d` in a group of their own, with `experts` off); embeddings, what is tied to
    one, the modules named in `embed` and `head`, norms, biases and scalars are not. An output layer that is neither
    tied nor named in `head` is found by its size: more than 8 times as many rows as columns draws a warning and
    stays a matrix.
    """
    apart = {id(p) for module in (*embed, *head) for p in module.parameters()}
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *norms)):
            apart |= {id(p) for p in module.parameters(recurse=False)}
    conv1d = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    matrices: list[tuple[str, nn.Parameter]] = []
    convolutions: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and id(parameter) not in apart
        chosen = others if not is_matrix else convolutions if id(parameter) in conv1d else matrices
        chosen.append((name, parameter))
    warn_of_embeddings(matrices)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "kind": "matrix"},
        {"params": convolutions, "kind": "matrix", "experts": False},
        {"params": others, "kind": "adamw"},
    ]
    return [group for group in groups if group["params"]]


_NOT_HIDDEN = {"embed", "embedding", "embeddings", "wte", "wpe", "head", "unembed", "cls"}


def warn_of_embeddings(named: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of matrices that look like an embedding or an output head: by name, or by aspect ratio."""
    for name, parameter in named:
        by_name = set(name.lower().replace("_", ".").split(".")) & _NOT_HIDDEN
        sides = sorted(parameter.shape)
        if by_name or (parameter.ndim == 2 and sides[1] > _SUSPICIOUS_ASPECT * sides[0]):
            warnings.warn(
                f"{name or 'a parameter'} of shape {tuple(parameter.shape)} is in a matrix group and looks like an "
                "embedding or an output head; those belong to a group of kind 'adamw'",
                stacklevel=3,
            )
