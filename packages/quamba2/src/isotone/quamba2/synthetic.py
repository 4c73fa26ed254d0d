"""A scan with planted outliers, and what the scales of x, B and C cost it (the ladder of section 6, A1).

Heads have one of four profiles, shuffled over their channels and scaled as a whole: so the order of channels persists
over tokens and samples, the premise of sort-and-cluster. Three samples calibrate, the fourth is scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isotone.quamba2.clustering import Plan, sort_and_cluster
from isotone.quamba2.fake import round_trip
from isotone.quamba2.observers import Grouping, Observer
from isotone.quamba2.ssd import ssd_chunk_scan

SAMPLES = 4
PERCENTILE = 0.9995


@dataclass(frozen=True)
class Sizes:
    """`groups` G, `heads` h, `head_dim` p, `state` N, `tokens` T of a sample; the defaults are the sheet's."""

    groups: int = 4
    heads: int = 16
    head_dim: int = 32
    state: int = 16
    tokens: int = 96


@dataclass(frozen=True)
class Drawn:
    """A layer, `A` and `D` (h,), and its samples: x (n, T, d), dt (n, T, h), B and C (n, T, G N), in float64."""

    sizes: Sizes
    A: Float[Tensor, " h"]
    D: Float[Tensor, " h"]
    x: Float[Tensor, "n T d"]
    dt: Float[Tensor, "n T h"]
    B: Float[Tensor, "n T wide"]
    C: Float[Tensor, "n T wide"]

    def scan(self, **changes: Tensor) -> Float[Tensor, "T d"]:
        """The exact scan of the last sample, x, B or C (T, width) replaced by those in `changes`."""
        one = {name: changes.get(name, getattr(self, name)[-1]) for name in ("x", "B", "C")}
        x = one["x"].unflatten(-1, (self.sizes.heads, self.sizes.head_dim))
        B, C = (one[name].unflatten(-1, (self.sizes.groups, self.sizes.state)) for name in ("B", "C"))
        y, _ = ssd_chunk_scan(x[None], self.dt[-1:], self.A, B[None], C[None], self.D)
        return y[0].flatten(1)


def draw(seed: int, sizes: Sizes | None = None) -> Drawn:
    """The layer and the samples of `seed` (section 5, "Synthetic SSD generator")."""
    sizes = sizes or Sizes()
    G, h, p, N, T = sizes.groups, sizes.heads, sizes.head_dim, sizes.state, sizes.tokens
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    profiles = normal(4, p).exp().sort(-1).values
    kinds = torch.randint(4, (h,), generator=generator)
    rows = [profiles[int(kind)][torch.randperm(p, generator=generator)] for kind in kinds]
    amplitude = torch.stack(rows) * normal(h, 1).exp()
    gain_B, gain_C = normal(G).exp(), normal(G).exp()
    A = -(uniform(h) * math.log(16)).exp()
    step = (uniform(h) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).exp()
    bias = step + (-(-step).expm1()).log()  # the inverse of softplus
    return Drawn(
        sizes,
        A,
        torch.ones(h, dtype=torch.float64),
        F.silu(2 * normal(SAMPLES, T, h * p)) * amplitude.flatten(),
        F.softplus(0.5 * normal(SAMPLES, T, h) + bias),
        F.silu(2 * normal(SAMPLES, T, G * N)) * gain_B.repeat_interleave(N),
        F.silu(2 * normal(SAMPLES, T, G * N)) * gain_C.repeat_interleave(N),
    )


def rounded(samples: Float[Tensor, "n T width"], grouping: Grouping) -> Float[Tensor, "T width"]:
    """The last sample in int8, with static scales from the others."""
    observer = Observer(grouping)
    observer.update(samples[:-1, ..., None])
    return round_trip(samples[-1], observer.scales()[grouping.labels, 0].double())


def channel_error(wanted: Float[Tensor, "T d"], got: Float[Tensor, "T d"]) -> float:
    """The median over channels of ||y_q - y|| / ||y||."""
    return float(((got - wanted).norm(dim=0) / wanted.norm(dim=0)).median())


def whole_error(wanted: Float[Tensor, "T d"], got: Float[Tensor, "T d"]) -> float:
    """||y_q - y|| / ||y|| of the whole tensor."""
    return float((got - wanted).norm() / wanted.norm())


def in_old_order(plan: Plan) -> Grouping:
    """The groups of `plan` for channels that were not reordered: the same channels share a scale."""
    labels = torch.empty_like(plan.labels)
    labels[plan.channel_index] = plan.labels
    return Grouping(labels, plan.count)


def magnitudes(drawn: Drawn) -> Float[Tensor, " d"]:
    """The largest |x| of each channel over the samples that calibrate."""
    return drawn.x[:-1].abs().amax((0, 1))


def groupings_of_x(drawn: Drawn) -> dict[str, Grouping]:
    """Arms by name; "snc m n" has m n scales an SSM group.

    Those with the 16 scales of "snc 4 4" but without a part of it: "unsorted", where runs of heads and channels as they
    lie share a scale; "one cluster", channels sorted and all heads of a group in one cluster, 16 channel groups;
    "heads as they lie", channels sorted and the heads cut into four runs without clustering.
    """
    sizes = drawn.sizes
    width, stats = sizes.heads * sizes.head_dim, magnitudes(drawn)
    arms = {"tensor": Grouping.tensor(width), "percentile": Grouping.tensor(width, PERCENTILE)}
    for m, n in ((1, 1), (2, 2), (4, 4), (4, 8)):
        arms[f"snc {m} {n}"] = in_old_order(sort_and_cluster(stats, sizes.head_dim, sizes.groups, m, n))
    arms["snc 4 4 dp"] = in_old_order(sort_and_cluster(stats, sizes.head_dim, sizes.groups, 4, 4, "dp"))
    arms["one cluster"] = in_old_order(sort_and_cluster(stats, sizes.head_dim, sizes.groups, 1, 16))
    arms["unsorted"] = _runs(sizes)
    # every run of heads is a group of its own, so that Ward has nothing to choose
    arms["heads as they lie"] = in_old_order(sort_and_cluster(stats, sizes.head_dim, sizes.groups * 4, 1, 4))
    arms["channel"] = Grouping.even(width, width)
    return arms


def _runs(sizes: Sizes) -> Grouping:
    heads = Grouping.even(sizes.heads, sizes.groups * 4).labels
    return Grouping((heads[:, None] * 4 + Grouping.even(sizes.head_dim, 4).labels).flatten(), sizes.groups * 16)


def ladder(seed: int, heads: int = 16) -> dict[str, float]:
    """The error of y by arm with x in int8, "percentile whole" and "tensor whole" of the whole tensor, and with B and C
    in int8, by "BC tensor" and "BC group"."""
    drawn = draw(seed, replace(Sizes(), heads=heads))
    wanted, found = drawn.scan(), {}
    for name, grouping in groupings_of_x(drawn).items():
        got = drawn.scan(x=rounded(drawn.x, grouping))
        found[name] = channel_error(wanted, got)
        if name in ("tensor", "percentile"):
            found[f"{name} whole"] = whole_error(wanted, got)
    wide = drawn.sizes.groups * drawn.sizes.state
    for name, grouping in (("tensor", Grouping.tensor(wide)), ("group", Grouping.even(wide, drawn.sizes.groups))):
        got = drawn.scan(B=rounded(drawn.B, grouping), C=rounded(drawn.C, grouping))
        found[f"BC {name}"] = channel_error(wanted, got)
    return found
