"""The scan's ladder: the generator, the arms, and the order that sort-and-cluster claims (sections 5 and 6, A1)."""

import statistics

import pytest
import reference
import torch

from isotone.quamba2 import claims, synthetic
from isotone.quamba2.clustering import sort_and_cluster
from isotone.quamba2.observers import Grouping
from isotone.quamba2.synthetic import Sizes, draw, groupings_of_x, in_old_order, ladder, magnitudes, rounded

SMALL = Sizes(groups=2, heads=4, head_dim=8, state=4, tokens=12)


def test_the_generator_is_the_sheet_s():
    drawn = draw(0)
    assert drawn.x.shape == (4, 96, 512) and drawn.dt.shape == (4, 96, 16) and drawn.B.shape == (4, 96, 64)
    assert (drawn.A <= -1).all() and (drawn.A >= -16).all() and (drawn.D == 1).all() and (drawn.dt > 0).all()
    assert torch.equal(draw(0).x, drawn.x) and not torch.equal(draw(1).x, drawn.x)
    # each head's sorted amplitudes are one of four profiles but for a factor
    long = draw(0, Sizes(tokens=1500)).x.abs().mean((0, 1))
    shapes = long.reshape(16, 32).sort(-1).values.log()
    shapes -= shapes.mean(-1, keepdim=True)
    alike = torch.cdist(shapes, shapes) < 0.5
    kinds = alike.unique(dim=0)
    assert 2 <= len(kinds) <= 4 and (kinds.sum(0) == 1).all(), "alike is an equivalence, of four classes at most"


def test_the_error_is_that_of_the_recurrence():
    drawn = draw(3, SMALL)
    grouping = Grouping.even(32, 4)
    got = rounded(drawn.x, grouping)
    largest = drawn.x[:-1].abs().amax((0, 1)).reshape(4, 8).amax(-1)
    for channel in (0, 9, 31):
        plain = [reference.rounded(float(v), float(largest[channel // 8])) for v in drawn.x[-1, :, channel]]
        assert got[:, channel].tolist() == pytest.approx(plain, rel=1e-5)
    outputs = []
    for x in (drawn.x[-1], got):
        y = []
        for head in range(4):
            part, group = slice(8 * head, 8 * head + 8), slice(4 * (head // 2), 4 * (head // 2) + 4)
            y.append(
                reference.ssd(
                    x[:, part].tolist(),
                    drawn.dt[-1, :, head].tolist(),
                    float(drawn.A[head]),
                    drawn.B[-1, :, group].tolist(),
                    drawn.C[-1, :, group].tolist(),
                    1.0,
                )
            )
        outputs.append([sum((one[t] for one in y), []) for t in range(12)])
    wanted = statistics.median_low(reference.channel_errors(*outputs))
    assert synthetic.channel_error(drawn.scan(), drawn.scan(x=got)) == pytest.approx(wanted, rel=1e-6)


def test_scales_in_the_old_order_are_those_after_reordering():
    """Invariants 5 and 8: quantising reordered channels with the plan's scales is the same numbers, moved."""
    drawn = draw(1)
    plan = sort_and_cluster(magnitudes(drawn), 32, 4)
    moved = rounded(drawn.x[..., plan.channel_index], Grouping(plan.labels, plan.count))
    assert torch.equal(moved, rounded(drawn.x, in_old_order(plan))[..., plan.channel_index])


def test_arms_have_the_scales_that_they_say():
    counts = {name: one.labels.unique().numel() for name, one in groupings_of_x(draw(0)).items()}
    assert counts["tensor"] == counts["percentile"] == 1 and counts["channel"] == 512 and counts["snc 1 1"] == 4
    assert counts["snc 4 4"] == counts["unsorted"] == counts["one cluster"] == counts["heads as they lie"] == 64


def test_more_scales_cost_the_scan_less():
    row = ladder(0)
    steps = ["tensor", "snc 1 1", "snc 2 2", "snc 4 4", "snc 4 8", "channel"]
    errors = [row[name] for name in steps]
    assert errors == sorted(errors, reverse=True) and row["BC group"] < row["BC tensor"]
    assert row["unsorted"] > row["snc 4 4"] and row["one cluster"] > row["snc 4 4"]
    low, high = claims.RANGES["snc 4 4"]
    assert 0.5 * low < row["snc 4 4"] < 2 * high


def test_claims_of_the_scan_follow_the_worst_seed():
    base = {name: 0.02 for name in claims.WORDS} | {"tensor whole": 1.0, "percentile whole": 2.0}
    rows = [base | {"tensor": 0.5}, base | {"tensor": 0.25}]
    found = {one.claim.id: one for one in claims.scan(rows, rows, True)}
    worst, mean = found["scan-under-per-tensor-worst-seed"], found["scan-under-per-tensor"]
    assert worst.measured == pytest.approx(12.5) and worst.held is False
    assert mean.measured == pytest.approx(18.75) and mean.spread == pytest.approx(25 / 2**1.5) and mean.held is None
    assert found["scan-over-per-channel-worst-seed"].held is True
    assert found["scan-ranges"].held is False and found["scan-ranges"].measured < 9
    assert len(found) == len(claims.scan(rows, rows, True)), "ids are different"
    assert all(one.held is None for one in claims.scan(rows, rows, False))
