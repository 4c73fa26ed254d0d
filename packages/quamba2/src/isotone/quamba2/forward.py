"""Mamba and Mamba2 as this package computes them: one forward pass whose inner values can be watched or replaced.

At each of the sites below a `Probe` sees the value and gives the one to go on with: itself (`Probe`), what calibration
records, or the quantised and dequantised value of a simulation. The weights are those of a Hugging Face model; its own
forward pass can not be watched where the scan begins. Computed in float32, or in float64 for a float64 model.

Sites of a block, in order: in_proj (its input), the segments of its output (z, x, B, C, dt of Mamba2; x, z of Mamba),
conv_x, conv_B, conv_C (after convolution and SiLU; Mamba has conv_x alone), then in Mamba dt_low, B, C (out of x_proj),
state (what the cache keeps), out_proj (its input, rotated where it is online). After the blocks: lm_head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.gated_norm import gated_rms_norm
from isotone.quamba2.hadamard import hadamard_transform
from isotone.quamba2.ssd import selective_scan, ssd_chunk_scan, ssd_step
from isotone.shared.errors import InputError

HEAD = -1  # the layer's number of the site lm_head


class Probe:
    """Leaves every value as it is; the base of those that watch or replace them."""

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        """The value to go on with at site `name` of `layer` (HEAD for lm_head), whose own is `values` (..., width)."""
        return values


class Cache:
    """What a sequence leaves behind: for each layer the last inputs of the convolution (b, k - 1, width), and the SSM
    state (b, h, p, N). `length`: tokens seen."""

    def __init__(self, layers: int) -> None:
        self.conv: list[Tensor | None] = [None] * layers
        self.state: list[Tensor | None] = [None] * layers
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """Keep `rows` of the batch, in that order."""
        for kept in (self.conv, self.state):
            kept[:] = [None if values is None else values.index_select(0, rows) for values in kept]

    @property
    def bytes(self) -> int:
        """Of all tensors kept."""
        return sum(values.nbytes for values in [*self.conv, *self.state] if values is not None)


@torch.no_grad()
def forward(
    model: Any,
    input_ids: Int[Tensor, "b l"],
    probe: Probe | None = None,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    online: bool = False,
    last_only: bool = False,
) -> Float[Tensor, "b n vocab"]:
    """The logits of `model` (a Hugging Face Mamba or Mamba2) for `input_ids`, n = l, or n = 1 with `last_only`.

    `cache`: of the tokens before, updated in place. `attention_mask` (b, l): 0 for padding, which must be on the left.
    `online`: rotate out_proj's input, as `rotate.rotate_outputs` asks. Raises `InputError` on ids outside the
    vocabulary, or none.
    """
    arch, probe = Architecture.of(model.config), probe or Probe()
    check_ids(input_ids, arch.vocab)
    mask = padding_mask(attention_mask, input_ids)
    hidden = compute(model.backbone.embeddings(input_ids))
    for number, layer in enumerate(model.backbone.layers):
        hidden = block(layer, arch, hidden, number, probe, cache, mask, online)
    if cache is not None:
        cache.length += input_ids.shape[1]
    hidden = hidden[:, -1:] if last_only else hidden
    normed = probe.site(HEAD, "lm_head", rms_norm(hidden, arch.eps, model.backbone.norm_f.weight))
    return linear(normed, model.lm_head)


def check_ids(input_ids: Tensor, vocab: int) -> None:
    """Raise `InputError` where there are no ids, or one outside the vocabulary."""
    if input_ids.ndim != 2 or not input_ids.numel():
        raise InputError(f"expected token ids of shape (batch, length), at least one, got {tuple(input_ids.shape)}")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= vocab:
        raise InputError(f"expected token ids from 0 to {vocab - 1}, got {low if low < 0 else high}")


def padding_mask(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """`mask` (b, l) as zeros and ones, None where all are ones. Raises `InputError` on padding right of a token."""
    if mask is None or mask.shape[1] != input_ids.shape[1]:
        if mask is not None and not bool((mask[:, -input_ids.shape[1] :] == 1).all()):
            raise InputError(f"expected an attention_mask of shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        return None
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise InputError("expected padding on the left of each row: a state can not skip what follows it")
    return None if bool((mask == 1).all()) else mask


def block(
    layer: Any,
    arch: Architecture,
    hidden: Tensor,
    number: int,
    probe: Probe,
    cache: Cache | None,
    mask: Tensor | None,
    online: bool,
) -> Tensor:
    """One block with its residual, (b, l, hidden) in and out."""
    normed = masked(rms_norm(hidden, arch.eps, layer.norm.weight), mask)

    def site(name: str, values: Tensor) -> Tensor:
        return probe.site(number, name, values)

    mixed = mixer(layer.mixer, arch, site("in_proj", normed), number, site, cache, mask)
    if online:
        mixed = hadamard_transform(mixed)
    return hidden + linear(site("out_proj", mixed), layer.mixer.out_proj)


def mixer(
    weights: Any,
    arch: Architecture,
    hidden: Tensor,
    number: int,
    site: Callable[[str, Tensor], Tensor],
    cache: Cache | None,
    mask: Tensor | None,
) -> Tensor:
    """From in_proj's input to out_proj's, not rotated yet: (b, l, d)."""
    parts = dict(
        zip(
            arch.segments,
            linear(hidden, weights.in_proj).split(list(arch.segments.values()), -1),
            strict=True,
        )
    )
    parts = {name: site(name, values) for name, values in parts.items()}
    given = torch.cat([parts[name] for name in arch.conv_segments], -1)
    past = None if cache is None else cache.conv[number]
    mixed, window = causal_conv(given, compute(weights.conv1d.weight), compute_or_none(weights.conv1d.bias), past)
    mixed = masked(F.silu(mixed), mask)
    names = list(arch.conv_segments)
    conv = dict(zip(names, mixed.split(list(arch.conv_segments.values()), -1), strict=True))
    conv = {name: site(f"conv_{name}", values) for name, values in conv.items()}
    state = None if cache is None else cache.state[number]
    A, D = -compute(weights.A_log).exp(), compute(weights.D)
    if arch.kind == "mamba":
        y, state = _scan_mamba(weights, arch, conv["x"], A, D, state, site)
        y = y * F.silu(parts["z"])
    else:
        dt = time_steps(parts["dt"], compute(weights.dt_bias), arch.dt_limit)
        y, state = scan_heads(arch, conv["x"], dt, A, conv["B"], conv["C"], D, state)
        y = gated_rms_norm(y, parts["z"], compute(weights.norm.weight), arch.groups, arch.eps)
    if cache is not None:
        cache.conv[number] = window
        cache.state[number] = site("state", state)
    return y


def _scan_mamba(
    weights: Any,
    arch: Architecture,
    x: Tensor,
    A: Tensor,
    D: Tensor,
    state: Tensor | None,
    site: Callable[[str, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    low, B, C = linear(x, weights.x_proj).split([arch.dt_rank, arch.state, arch.state], -1)
    low, B, C = site("dt_low", low), site("B", B), site("C", C)
    dt = time_steps(site("dt", low @ compute(weights.dt_proj.weight).T), compute(weights.dt_proj.bias), arch.dt_limit)
    y, last = selective_scan(x, dt, A, B, C, D, None if state is None else state[:, 0])
    return y, last[:, None]


def scan_heads(
    arch: Architecture,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba2's scan of x (b, l, d), dt (b, l, h), B and C (b, l, G N): y (b, l, d) and the last state (b, h, p, N).

    `inplace`: a single token's state is written over `state`.
    """
    x = x.unflatten(-1, (arch.heads, arch.head_dim))
    B, C = (values.unflatten(-1, (arch.groups, arch.state)) for values in (B, C))
    D = D.reshape(arch.heads, -1) if D.shape[0] == arch.inner else D
    if x.shape[1] == 1 and state is not None:
        y, last = ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, inplace)
        return y.flatten(-2)[:, None], last
    y, last = ssd_chunk_scan(x, dt, A, B, C, D, chunk=arch.chunk, initial_state=state)
    return y.flatten(-2), last


def time_steps(raw: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """dt = softplus(raw + bias), clamped to `limit`, in decoding too (where Hugging Face leaves the limit out)."""
    return F.softplus(raw + bias).clamp(*limit)


def causal_conv(
    given: Float[Tensor, "b l width"],
    weight: Float[Tensor, "width 1 k"],
    bias: Float[Tensor, " width"] | None,
    past: Float[Tensor, "b k1 width"] | None,
) -> tuple[Float[Tensor, "b l width"], Float[Tensor, "b k1 width"]]:
    """Depthwise convolution of `given` after `past`, the k - 1 inputs before it (zeros if None); and the last k - 1."""
    kept = weight.shape[-1] - 1
    if past is None:
        past = given.new_zeros(given.shape[0], kept, given.shape[2])
    whole = torch.cat([past, given], 1)
    out = F.conv1d(whole.transpose(1, 2), weight, bias, groups=weight.shape[0]).transpose(1, 2)
    return out, whole[:, whole.shape[1] - kept :].clone()


def rms_norm(hidden: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """hidden / RMS over the last dimension, times `weight`."""
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * compute(weight)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` (b, l, width) with zeros where `mask` (b, l) is 0."""
    return values if mask is None else values * mask[..., None].to(values.dtype)


def compute(values: Tensor) -> Tensor:
    """`values` in the dtype computed in: float64 stays, all others become float32."""
    return values if values.dtype == torch.float64 else values.float()


def compute_or_none(values: Tensor | None) -> Tensor | None:
    """`compute`, for a bias that may be missing."""
    return None if values is None else compute(values)


def linear(values: Tensor, layer: Any) -> Tensor:
    """`layer`'s product and bias, in the dtype computed in."""
    return F.linear(values, compute(layer.weight), compute_or_none(layer.bias))
