"""Real processes at 2, 3 and 4 ranks beside one: the equivalences of section 7, bitwise where it says so."""

from __future__ import annotations

import pytest
import torch
import workers

from isotone.distzo2 import Ranks, shard
from isotone.distzo2.distributed import check_backend, checksum, init_mesh
from isotone.shared.errors import InputError
from isotone.shared.testing import run_ranks

PRELOAD = ["torch", "transformers.models.opt.modeling_opt", "isotone.distzo2.training"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one(folder):
    found = {name: workers.run(case, folder) for name, case in workers.CASES[1].items()}
    return {**found, "precise": workers.precise()}


@pytest.fixture(scope="module")
def worlds(folder):
    """In this order: a checkpoint goes from 2 ranks to 3 to 4, and to one process."""
    return {world: run_ranks(workers.everything, world, folder, preload=PRELOAD) for world in (2, 3, 4)}


ALL = [(world, name) for world in (2, 3, 4) for name in workers.CASES[world]]


@pytest.mark.parametrize(("world", "name"), ALL)
def test_ranks_stay_the_same_and_send_few_bytes(worlds, world, name):
    """Section 7, items 5 and 12."""
    first, *others = [rank[name] for rank in worlds[world]]
    for other in others:
        assert other["grads"] == first["grads"] and torch.equal(other["theta"], first["theta"])
        assert other["loss"] == first["loss"]
    directions = 3 if name == "k3" else 1
    assert first["bytes"] == 8 * (2 * directions + 1) and (directions > 1 or first["bytes"] <= 32)


@pytest.mark.parametrize("name", ["pertp", "pertp-sliced", "pertp-whole", "pertp-disk"])
def test_pertp_is_one_process_bit_for_bit(worlds, one, name):
    for single in ("single", "offload"):
        assert worlds[2][0][name]["grads"] == one[single]["grads"]
        assert torch.equal(worlds[2][0][name]["theta"], one[single]["theta"])


def test_directions_over_ranks_are_one_process_bit_for_bit(worlds, one):
    assert worlds[3][0]["k3"]["grads"] == one["k3"]["grads"]
    assert torch.equal(worlds[3][0]["k3"]["theta"], one["k3"]["theta"])


@pytest.mark.parametrize(("world", "name"), [(2, "ddp"), (3, "ddp"), (4, "ddp"), (4, "2d")])
def test_shards_are_the_whole_batch(worlds, one, world, name):
    """Unequal shards, rows that ask for nothing: one step from the same weights, then in fp64 over all steps."""
    found, wanted = worlds[world][0][name], one["single"]
    assert found["grads"][0] == pytest.approx(wanted["grads"][0], rel=2e-4)  # fp32 forwards, l+ - l- cancels
    assert found["losses"][0] == pytest.approx(wanted["losses"][0], rel=1e-6)
    precise, alone = worlds[world][0]["precise"], one["precise"]
    assert precise["grads"] == pytest.approx(alone["grads"], rel=1e-9)
    torch.testing.assert_close(precise["theta"], alone["theta"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("world", "name"), [(2, "ddp"), (3, "ddp"), (4, "2d")])
def test_slices_change_nothing(worlds, world, name):
    """Section 7, item 6: sliced upload, update on the slice, gather: bitwise what whole blocks give."""
    whole, sliced = worlds[world][0][name], worlds[world][0][f"{name}-sliced"]
    assert sliced["grads"] == whole["grads"] and torch.equal(sliced["theta"], whole["theta"])
    assert sliced["loss"] == whole["loss"]


def test_one_sided_pairs(worlds, folder):
    alone = workers.run((1, 1, {"estimator": "one_sided"}), folder)
    assert worlds[2][0]["one-sided"]["grads"] == alone["grads"]


def test_a_loss_that_is_not_finite_skips_everyones_step(worlds):
    assert all(rank["not finite"] for rank in worlds[2])


def test_a_rank_that_fails_is_not_waited_for(worlds, one):
    """The step is nobody's; the ones after it are those of a run in which nothing failed."""
    first, second = (rank["failing"] for rank in worlds[2])
    assert "closure of rank 1" in second["words"] and "another rank failed" in first["words"]
    assert "closure of rank 1" in second["evaluated"] and "another rank failed" in first["evaluated"]
    assert first["grads"] == second["grads"] == [grad for (grad,) in worlds[2][0]["ddp"]["grads"][:3]]
    assert first["loss"] == second["loss"] == 1.0


def test_a_rank_that_fails_with_slices_stops_the_others(worlds):
    first, second = (rank["failing sliced"] for rank in worlds[2])
    assert "closure of rank 1" in second["words"] and "another rank" in first["words"]
    assert first["after"] and second["after"]


def test_ranks_that_find_other_checkpoints_say_so(worlds):
    assert all("same checkpoint" in rank["unequal"] for rank in worlds[2])


def test_no_more_than_four_blocks_are_there_with_slices(worlds):
    """Section 7, item 10: three, and one more while exchanging."""
    for rank in worlds[2]:
        there = {}
        for _, block, start, end in rank["places"]:
            low, high = there.get(block, (start, end))
            there[block] = min(low, start), max(high, end)
        assert len(there) == 8
        assert all(sum(low <= now < high for low, high in there.values()) <= 4 for now, _ in there.values())


def test_blocks_that_differ_are_named(worlds):
    for rank in worlds[2]:
        assert "model.decoder.layers.1" in rank["differ"] and "layers.2" not in rank["differ"]
        assert "model.decoder.layers.2" in rank["other"] and "layers.1" not in rank["other"]


def test_refusals_of_ranks(worlds):
    for rank in worlds[2]:
        assert "world" in rank["refused"] and "PertP" in rank["refused pertp"]
        assert "offload" in rank["odd"]
    assert all("PertP group of 2" in rank["pertp of three"] for rank in worlds[3])
    assert all("got 3" in rank["2d of three"] for rank in worlds[3])
    assert all(rank["named"] == 2 for rank in worlds[4])
    assert all("without PertP" in rank["one-sided over both"] for rank in worlds[4])
    assert all("n_directions of at least 2" in rank["few directions"] for rank in worlds[4])
    with pytest.raises(InputError, match="torchrun"):
        init_mesh()
    with pytest.raises(InputError, match="gloo"):
        check_backend("cuda:nccl", 2, 1)
    check_backend("gloo", 2, 1)


def test_a_run_goes_on_with_another_number_of_ranks(worlds, folder):
    """2 ranks to step 4, 3 to step 6, 4 to step 8, and one process all the way."""
    whole = workers.resumed(folder + "/alone", 8)
    for world, steps in ((2, 4), (3, 6), (4, 8)):
        for rank in worlds[world]:
            assert rank["resumed"]["steps"] == steps
            assert rank["resumed"]["losses"] == pytest.approx(whole["losses"][:steps], rel=1e-4)
    torch.testing.assert_close(worlds[4][0]["resumed"]["theta"], whole["theta"], rtol=1e-3, atol=1e-4)
    # a run that is there already does nothing more
    assert torch.equal(workers.resumed(folder + "/elastic", 8)["theta"], worlds[4][0]["resumed"]["theta"])


def test_a_killed_rank_ends_all_with_one_message(folder):
    from pathlib import Path

    with pytest.raises(RuntimeError, match="rank 1: ended"):
        run_ranks(workers.killed, 2, folder, timeout=30, preload=PRELOAD)
    words = Path(folder, "rank-0").read_text()
    assert "another rank ended or did not answer" in words and len(words) < 250 and "/" not in words


def test_checksums_of_slices_add_up_and_see_any_change():
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32, torch.float64):
        flat = torch.randn(1000).to(dtype)
        whole = checksum(flat)
        assert (checksum(flat[:300]) + checksum(flat[300:], 300) - whole) % (1 << 64) == 0
        for change in ("value", "exchange"):
            other = flat.clone()
            if change == "value":
                other[7] = torch.nextafter(other[7].float(), torch.tensor(9.0)).to(dtype) + 0.1
            else:
                other[[3, 4]] = other[[4, 3]]
            assert checksum(other) != whole


def test_shards_cover_the_batch():
    batch = {"x": torch.arange(7), "note": "kept"}
    parts = [shard(batch, Ranks(data=d, data_size=3)) for d in range(3)]
    assert torch.cat([part["x"] for part in parts]).tolist() == list(range(7))
    assert all(len(part["x"]) >= 2 and part["note"] == "kept" for part in parts)
    with pytest.raises(InputError, match="at least 2 rows"):
        shard({"x": torch.arange(1)}, Ranks(data_size=2))
    with pytest.raises(InputError, match="as many rows"):
        shard({"x": torch.arange(3), "y": torch.arange(2)}, Ranks())
