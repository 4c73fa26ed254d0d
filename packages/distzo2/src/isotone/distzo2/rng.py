"""Directions z ~ N(0, I) that are never stored: a counter-based generator, so that any slice is made alone.

Philox4x32-10 (Salmon et al., SC 2011) with key (seed, parameter id) and counter (group, 0, stream, 0), where group i
holds elements 4 i to 4 i + 3 of the parameter; Box-Muller turns its four words into four normals. Logarithm, sine and
cosine are short series of IEEE additions, products, one division and one square root, each correctly rounded and never
contracted: the same bits from this file, from philox.c and from the Triton kernel, on every device.

The radius has 23 random bits, so that |z| < 5.77, which a normal exceeds with probability 8e-9.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.distzo2.layout import Segment
from isotone.shared.errors import InputError

RNG_VERSION = "philox4x32-10/box-muller/1"
SEEDS = 1_000_000_000
"""Seeds of steps are uniform below this, as in the reference (section 2.2)."""
NORMAL, ROUNDING, STEP = 0, 1, 2
"""What a stream of the counter is for: directions, stochastic rounding, the seeds of the steps."""
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counters (four int64 tensors of one shape, each word below 2**32) under one key."""
    return _rounds(*counter, *key)


def _rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> Any:
    """The ten rounds, on tensors or on Python's integers."""
    for _ in range(_ROUNDS):
        # products wrap at 64 bits; their low and high words are still those of the unsigned product
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(
    seed: int, parameter: int, start: int, count: int, stream: int = NORMAL, device: torch.device | str = "cpu"
) -> Int[Tensor, "groups 4"]:
    """The random words of the groups that elements `start` to `start + count - 1` lie in."""
    first, last = start // 4, -(-(start + count) // 4)
    group = torch.arange(first, last, device=device)
    zero = torch.zeros_like(group)
    return torch.stack(philox((group & _MASK, group >> 32, zero + stream, zero), (seed, parameter)), -1)


def normal(
    seed: int, parameter: int, start: int, count: int, device: torch.device | str = "cpu"
) -> Float[Tensor, " count"]:
    """Elements `start` to `start + count - 1` of the direction of one parameter, fp32."""
    drawn = words(seed, parameter, start, count, NORMAL, device)
    pairs = (_box_muller(drawn[:, 0], drawn[:, 1]), _box_muller(drawn[:, 2], drawn[:, 3]))
    z = torch.stack([part for pair in pairs for part in pair], -1).reshape(-1)
    return z[start % 4 : start % 4 + count]


def uniform(
    seed: int, parameter: int, start: int, count: int, device: torch.device | str = "cpu"
) -> Float[Tensor, " count"]:
    """Numbers in (0, 1) for stochastic rounding, of a stream apart from the directions', fp32."""
    u = _open_unit(words(seed, parameter, start, count, ROUNDING, device) >> 9).reshape(-1)
    return u[start % 4 : start % 4 + count]


def step_seed(seed: int, step: int, direction: int = 0) -> int:
    """s_t of section 2.2: the seed of direction `direction` of step `step`, a function of the run's own `seed`.

    No state travels: every rank and every resumed run computes the same one.
    """
    high, low, *_ = _rounds(step & _MASK, direction, STEP, step >> 32, seed & _MASK, seed >> 32)
    return ((high << 32) | low) % SEEDS


def _open_unit(bits: Tensor) -> Tensor:
    """(2 k + 1) / 2**24 of 23 bits k: exact, never 0 or 1."""
    return (bits * 2 + 1).to(torch.float32) * 2.0**-24


def _log(u: Tensor) -> Tensor:
    """ln u, by 2 artanh((m - 1) / (m + 1)) of the mantissa m in [sqrt(1/2), sqrt(2))."""
    bits = u.view(torch.int32)
    exponent = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).view(torch.float32)
    small = m < 0.70710677
    exponent = exponent - small.to(torch.int32)
    m = torch.where(small, m + m, m)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = q * (1.0 / 9.0) + 1.0 / 7.0
    for coefficient in (1.0 / 5.0, 1.0 / 3.0):
        series = series * q + coefficient
    log_m = s + s * (series * q)
    return (log_m + log_m) + exponent.to(torch.float32) * 0.693147182


def _sine_cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of t pi / 2 for t in [-1/2, 1/2], by their Taylor series."""
    x = t * 1.57079637
    y = x * x
    sine = y * (1.0 / 362880.0) - 1.0 / 5040.0
    for coefficient in (1.0 / 120.0, -1.0 / 6.0):
        sine = sine * y + coefficient
    cosine = y * (-1.0 / 3628800.0) + 1.0 / 40320.0
    for coefficient in (-1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0):
        cosine = cosine * y + coefficient
    return x + x * (sine * y), cosine


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals of two words: r cos and r sin of a uniform angle."""
    # torch's fp32 root is not correctly rounded on every machine; the fp64 one, rounded, is
    r = torch.sqrt((_log(_open_unit(radius_word >> 9)) * -2.0).double()).float()
    quadrant = angle_word >> 30
    sine, cosine = _sine_cosine(_open_unit((angle_word & 0x3FFFFFFF) >> 7) - 0.5)
    turned = (quadrant & 1).bool()
    a, b = torch.where(turned, sine, cosine), torch.where(turned, cosine, sine)
    a = torch.where((quadrant == 1) | (quadrant == 2), -a, a)
    b = torch.where((quadrant & 2).bool(), -b, b)
    return r * a, r * b


@runtime_checkable
class Noise(Protocol):
    """Where directions come from. `segments`: which elements of which parameters a flat buffer holds."""

    def fill(self, seed: int, segment: Segment, device: torch.device, dtype: torch.dtype) -> Tensor:
        """z of the elements of `segment`, of shape (segment.length,)."""
        ...


class PhiloxNoise:
    """The counter-based directions: stateless, any slice alone."""

    def fill(self, seed: int, segment: Segment, device: torch.device, dtype: torch.dtype) -> Tensor:
        """z of the elements of `segment`, of shape (segment.length,)."""
        return normal(seed, segment.parameter, segment.first, segment.length, device).to(dtype)


class TorchNoise:
    """MeZO's own directions: `torch.manual_seed(s_t)`, then one `torch.normal` a parameter in order.

    A parameter's z needs all that were drawn before it. The generator's state at each parameter is kept for the two
    seeds in use, this step's and the pending one's (section 2.3 d), and found by drawing once in order. Whole
    parameters only: there are no slices.
    """

    def __init__(self, sizes: list[int], dtypes: list[torch.dtype], device: torch.device, keep: int = 2) -> None:
        self._sizes, self._dtypes, self._device, self._keep = sizes, dtypes, device, keep
        self._states: dict[int, list[Tensor]] = {}

    def fill(self, seed: int, segment: Segment, device: torch.device, dtype: torch.dtype) -> Tensor:
        """z of the whole parameter of `segment`. Raises `InputError` for a part of one."""
        if segment.first or segment.length != self._sizes[segment.parameter]:
            raise InputError('expected whole parameters for rng="torch", got a slice; take rng="philox"')
        generator = torch.Generator(self._device)
        generator.set_state(self._states_of(seed)[segment.parameter])
        return self._draw(generator, segment.parameter).to(device=device, dtype=dtype)

    def _draw(self, generator: torch.Generator, parameter: int) -> Tensor:
        size, dtype = self._sizes[parameter], self._dtypes[parameter]
        return torch.normal(0.0, 1.0, (size,), generator=generator, device=self._device, dtype=dtype)

    def _states_of(self, seed: int) -> list[Tensor]:
        if seed not in self._states:
            generator = torch.Generator(self._device).manual_seed(seed)
            states = []
            for parameter in range(len(self._sizes)):
                states.append(generator.get_state())
                self._draw(generator, parameter)
            while len(self._states) >= self._keep:
                del self._states[next(iter(self._states))]
            self._states[seed] = states
        return self._states[seed]
