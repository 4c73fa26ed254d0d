"""Apply the last step's update and give W + eps z and W - eps z, with W read once (sections 2.3 and 9).

The reference draws z four times and passes over the weights about ten times a step; this is one pass with two draws,
z_{t-1} for the update that was put off and z_t for both signs. Three forms with the same bits: eager torch here, C on a
CPU (native.py), Triton on a GPU (triton_kernels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.distzo2 import native, rng, triton_kernels
from isotone.distzo2.layout import Segment
from isotone.distzo2.rng import Noise

CHUNK = 1 << 22
"""Elements of a segment that the eager form works on at once: its temporaries are no larger."""


@dataclass(frozen=True)
class Update:
    """What a step does to the weights: W <- W - (sum_k coefficients[k] z(seeds[k]) + decay W).

    `coefficients`: lr g_k / K of its own step; `decay`: lr times lambda (section 2.2, item 4).
    """

    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]
    decay: float


def advance(
    weights: Float[Tensor, " n"],
    segments: Sequence[Segment],
    noise: Noise,
    update: Update | None = None,
    *,
    seed: int = 0,
    eps: float = 0.0,
    plus: Float[Tensor, " n"] | None = None,
    minus: Float[Tensor, " n"] | None = None,
    stochastic: bool = False,
) -> None:
    """Update `weights` in place, where there is an `update`, and write W + eps z(seed) and W - eps z(seed).

    `weights`: a flat buffer of the stored type; `plus` and `minus`: of the working type, either may be None. Sums are
    made in fp32 (fp64 for fp64 weights). The stored weights are rounded to the nearest or, `stochastic`, up or down
    at random so that the mean is right; what is perturbed is what is stored. Elements in no segment are left alone.
    """
    parts = list(segments)
    counter_based = isinstance(noise, rng.PhiloxNoise)
    if counter_based and native.takes(weights, plus, minus):
        updates = (update.seeds, update.coefficients, update.decay) if update else ((), (), 0.0)
        native.advance(weights, parts, updates, seed, eps, plus, minus)
    elif counter_based and not stochastic and triton_kernels.takes(weights, plus, minus):
        triton_kernels.advance(weights, parts, update, seed, eps, plus, minus)
    else:
        # a piece of a parameter has no generator of torch's own
        pieces = [piece for part in parts for piece in _chunks(part)] if counter_based else parts
        for piece in pieces:
            _advance(weights, piece, noise, update, seed, eps, plus, minus, stochastic)


def _chunks(segment: Segment) -> list[Segment]:
    return [
        replace(segment, first=segment.first + at, start=segment.start + at, length=min(CHUNK, segment.length - at))
        for at in range(0, segment.length, CHUNK)
    ]


def _advance(
    weights: Tensor,
    segment: Segment,
    noise: Noise,
    update: Update | None,
    seed: int,
    eps: float,
    plus: Tensor | None,
    minus: Tensor | None,
    stochastic: bool,
) -> None:
    stored = weights[segment.start : segment.start + segment.length]
    wide = torch.float64 if weights.dtype == torch.float64 else torch.float32
    w = stored.to(wide)
    if update is not None:
        total: Tensor | None = None
        for number, coefficient in zip(update.seeds, update.coefficients, strict=True):
            term = fill(segment, number, noise, weights.device, wide) * coefficient
            total = term if total is None else total + term
        assert total is not None
        w = w - (total + w * (update.decay if segment.decays else 0.0))
        u = _rounding_noise(update.seeds[0], segment, weights.device) if stochastic else None
        stored.copy_(round_to(w, weights.dtype, u))
        w = stored.to(wide)
    if plus is None and minus is None:
        return
    moved = fill(segment, seed, noise, weights.device, wide) * eps
    for out, value in ((plus, w + moved), (minus, w - moved)):
        if out is not None:
            out[segment.start : segment.start + segment.length] = value.to(out.dtype)


def _rounding_noise(seed: int, segment: Segment, device: torch.device) -> Tensor:
    return rng.uniform(seed, segment.parameter, segment.first, segment.length, device)


def round_to(
    values: Float[Tensor, " n"], dtype: torch.dtype, u: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " n"]:
    """`values` (fp32 or fp64) in `dtype`: the nearest, or with `u` of (0, 1) the next above with the probability that
    makes the mean right, else the next below."""
    if u is None or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    info = torch.finfo(dtype)
    mantissa, exponent = torch.frexp(values)
    # the spacing of dtype's numbers at `values`, that of the smallest normal one below it
    lowest = torch.frexp(torch.tensor(info.tiny)).exponent
    unit = torch.ldexp(torch.full_like(values, info.eps), torch.maximum(exponent, lowest.to(exponent.device)) - 1)
    scaled = values / unit
    below = torch.floor(scaled)
    return ((below + ((scaled - below) > u)) * unit).to(dtype)


def lost_updates(before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> float:
    """The share of elements that an update left as they were: rounding swallowed it (section 7, first pitfall)."""
    return float((before == after).float().mean())


def fill(segment: Segment, seed: int, noise: Noise, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """z of one segment, by the fastest form there is."""
    if isinstance(noise, rng.PhiloxNoise) and device.type == "cpu" and native.library() is not None:
        out = torch.empty(segment.length)
        native.normal(out, seed, segment)
        return out.to(dtype)
    return noise.fill(seed, segment, device, dtype)
