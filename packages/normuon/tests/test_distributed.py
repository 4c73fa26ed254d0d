"""Invariants 9 and 10: real gloo processes give the weights of one process, whatever the layout."""

import pytest
import torch
import workers

from isotone.shared.testing import run_ranks


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks(workers.all_cases, 4, str(tmp_path_factory.mktemp("dcp")))[0]


def close(got, expected, tolerance=1e-6):
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True)) < tolerance


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_layout_equals_one_process(size, four_ranks):
    found = {key[1:]: weights for key, weights in four_ranks.items() if key[0] == size}
    alone = {case: workers.single(settings) for case, settings in workers.CASES.items()}
    averaged = {
        case: workers.single(workers.CASES[case], grads=lambda step: workers.mean_gradients(step, size))
        for case in ("plain", "muon", "column")
    }
    for (layout, case), weights in found.items():
        expected = (averaged if layout in ("round_robin", "reduce_scatter") else alone)[case.replace("bf16", "plain")]
        # ten steps move a weight by some 5e-3, of which bfloat16 on the wire is a few per cent at most
        assert close(weights, expected, 2e-4 if case == "bf16" else 1e-6), (layout, case)
    assert len(found) == {1: 10, 2: 22, 3: 16, 4: 23}[size]


def test_refusals(four_ranks):
    texts = four_ranks["refusals"]
    assert "Shard(1)" in texts[0] and "placements" in texts[1] and "mesh" in texts[2] and "1-D mesh" in texts[3]


def test_dcp_saved_on_two_ranks_loads_on_four(four_ranks):
    saved, ended = four_ranks["saved"]
    loaded, resumed = four_ranks["loaded"]
    assert len(saved) == len(loaded) > 10
    assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True)), "the round trip is bit exact"
    assert close(ended, workers.uninterrupted())
    assert close(resumed, ended)
