"""Rotations that spread outliers over all channels, fused into the weights (section 2, steps 1, 2 and 5).

With T(v) = v H for an orthonormal Hadamard matrix H, T(a).T(b) = a.b. So the residual stream may run rotated: T on the
rows of the embedding and on the input side of in_proj and lm_head, T on the output side of out_proj. RMSNorm without
weights commutes with T; its weights are fused into the layer after it first. out_proj's own input is rotated online.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.config import HADAMARD
from isotone.quamba2.hadamard import hadamard_transform, supports
from isotone.shared.errors import InputError


@torch.no_grad()
def fuse_norms(model: Any) -> Any:
    """Fuse every RMSNorm's weight into the layer after it, in float64; the norms keep ones (step 1). Returns `model`.

    `model`: a Hugging Face Mamba or Mamba2. A head that is tied to the embedding is untied first, so that norm_f does
    not scale the embedding. The gated norm inside a Mamba2 block stays.
    """
    untie(model)
    for layer in model.backbone.layers:
        _fuse(layer.norm, layer.mixer.in_proj)
    _fuse(model.backbone.norm_f, model.lm_head)
    return model


@torch.no_grad()
def untie(model: Any) -> Any:
    """Give the head weights of its own where it shares the embedding's. Returns `model`."""
    if model.lm_head.weight is model.backbone.embeddings.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@torch.no_grad()
def rotate_residual(model: Any) -> Any:
    """Rotate the residual stream: embedding, head, in_proj's input, out_proj's output and its bias (step 2).

    Needs `fuse_norms` first. The model computes what it did. Returns `model`. Raises `InputError` where the hidden size
    has no Hadamard matrix.
    """
    hidden = Architecture.of(model.config).hidden
    check_width(hidden)
    if not all(bool((layer.norm.weight == 1).all()) for layer in model.backbone.layers):
        raise InputError("expected norms without weights before the residual stream is rotated: fuse_norms first")
    _rotate(model.backbone.embeddings.weight, -1)
    _rotate(model.lm_head.weight, -1)
    for layer in model.backbone.layers:
        _rotate(layer.mixer.in_proj.weight, -1)
        _rotate(layer.mixer.out_proj.weight, 0)
        if layer.mixer.out_proj.bias is not None:
            _rotate(layer.mixer.out_proj.bias, 0)
    return model


@torch.no_grad()
def rotate_outputs(model: Any) -> Any:
    """Rotate the input side of every out_proj (step 5): its input must then be rotated online. Returns `model`.

    Do it after `reorder`. Raises `InputError` where the inner size has no Hadamard matrix.
    """
    check_width(Architecture.of(model.config).inner)
    for layer in model.backbone.layers:
        _rotate(layer.mixer.out_proj.weight, -1)
    return model


def apply_hadamard(model: Any, hadamard: str = "all") -> Any:
    """Fuse norms and rotations of kind "all", "out" or "none" (section 2) into `model`, in place; returns it.

    But for "none", `model` then computes what it did only where out_proj's input is rotated online, as
    `forward.forward(..., online=True)` does. Raises `InputError` on another kind or a width without a Hadamard matrix.
    """
    if hadamard not in HADAMARD:
        raise InputError(f"expected hadamard to be one of {', '.join(HADAMARD)}, got {hadamard!r}")
    arch = Architecture.of(model.config)
    for width in {"none": (), "out": (arch.inner,), "all": (arch.inner, arch.hidden)}[hadamard]:
        check_width(width)
    fuse_norms(model)
    if hadamard == "all":
        rotate_residual(model)
    return model if hadamard == "none" else rotate_outputs(model)


def check_width(width: int) -> None:
    """Raise `InputError` where there is no Hadamard matrix of `width`."""
    if not supports(width):
        raise InputError(f"expected a width of 2^k, 12 * 2^k or 40 * 2^k for a Hadamard matrix, got {width}")


def _fuse(norm: Any, linear: Any) -> None:
    linear.weight.copy_(linear.weight.double() * norm.weight.double())
    norm.weight.fill_(1)


def _rotate(parameter: Tensor, dim: int) -> None:
    wide = parameter.double().movedim(dim, -1).contiguous()
    parameter.copy_(hadamard_transform(wide).movedim(-1, dim))
