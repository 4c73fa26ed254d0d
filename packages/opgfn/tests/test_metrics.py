"""Pareto tools and metrics against their definitions and against pymoo's (section 7, invariant 12)."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import reference
import torch
from pymoo.indicators.gd_plus import GDPlus
from pymoo.indicators.hv import HV
from pymoo.indicators.igd_plus import IGDPlus
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from pymoo.util.ref_dirs import get_reference_directions

from isotone.opgfn import metrics
from isotone.opgfn.pareto import ParetoArchive, dominance_matrix, nd_rank, non_dominated_mask
from isotone.opgfn.volume import hypervolume


def front(n: int, d: int, seed: int, levels: int | None = None) -> np.ndarray:
    """Random points, on a coarse lattice where `levels` is given, so that ties and duplicates occur."""
    generator = np.random.default_rng(seed)
    if levels:
        return generator.integers(0, levels, (n, d)) / levels
    return generator.random((n, d))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("levels", [None, 3, 8])
def test_dominance_against_definition_and_pymoo(d: int, levels: int | None) -> None:
    for seed in range(5):
        u = front(40, d, seed, levels)
        tensor = torch.from_numpy(u)
        mask = non_dominated_mask(tensor).tolist()
        assert mask == reference.non_dominated(u)
        ranks = nd_rank(tensor).tolist()
        assert ranks == reference.nd_rank(u)
        assert mask == [rank == 0 for rank in ranks]
        fronts = NonDominatedSorting().do(-u)
        for number, members in enumerate(fronts):
            assert all(ranks[i] == number for i in members)
        matrix = dominance_matrix(tensor)
        assert matrix.any(0).logical_not().tolist() == mask


def test_duplicates_do_not_dominate_each_other() -> None:
    u = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.5, 2.0], [2.0, 1.0]])
    assert non_dominated_mask(u).tolist() == [True, True, False, True]
    assert non_dominated_mask(u[:, :1]).tolist() == [False, False, False, True]
    valid = torch.tensor([False, True, True, True])
    assert non_dominated_mask(u, valid).tolist() == [False, True, False, True]
    assert nd_rank(u, valid).tolist() == [2, 0, 1, 0]
    assert non_dominated_mask(torch.zeros(0, 2)).tolist() == []


def test_mask_is_fast_enough() -> None:
    u = torch.rand(4096, 4, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mask = non_dominated_mask(u)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.25, "the target is 0.05 s; five times that is a regression"
    assert mask.tolist() == (nd_rank(u) == 0).tolist()


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("levels", [None, 4])
def test_hypervolume_against_definition_and_pymoo(d: int, levels: int | None) -> None:
    for seed in range(8):
        few = front(7, d, seed, levels)
        assert hypervolume(few) == pytest.approx(reference.hypervolume(few), abs=1e-12)
        many = front(120, d, seed, levels)
        expected = HV(ref_point=np.zeros(d))(-many) if d > 1 else many.max()
        assert hypervolume(many) == pytest.approx(float(expected), abs=1e-9)
        sphere = many / np.maximum(np.linalg.norm(many, axis=1, keepdims=True), 1e-9)
        expected = HV(ref_point=np.full(d, -0.1))(-sphere) if d > 1 else sphere.max() - 0.1
        assert hypervolume(sphere, 0.1) == pytest.approx(float(expected), abs=1e-9)


def test_hypervolume_of_plain_shapes() -> None:
    for d in (1, 2, 3, 4):
        assert hypervolume(np.ones((1, d))) == 1.0
        assert hypervolume(np.ones((3, d))) == 1.0
        assert hypervolume(np.zeros((2, d))) == 0.0
        assert hypervolume(-np.ones((2, d)), -2.0) == pytest.approx(1.0)
    assert hypervolume(torch.tensor([[0.5, 1.0], [1.0, 0.5]])) == pytest.approx(0.75)


def test_hypervolume_above_a_reference_point() -> None:
    u = np.array([[0.5, 1.0], [1.0, 0.5], [0.4, 0.9], [2.0, 0.1]])
    # (0.4, 0.9) is dominated; (2, 0.1) is not above the reference in its second objective
    assert hypervolume(u, np.array([0.25, 0.1])) == pytest.approx(0.25 * 0.9 + 0.5 * 0.4)
    assert hypervolume(u[:2], np.array([0.25, 0.1])) == hypervolume(u, np.array([0.25, 0.1]))
    assert hypervolume(u, 3.0) == 0.0
    for point in (np.zeros(3), np.array([0.0, np.inf])):
        with pytest.raises(ValueError, match="one finite number or of 2"):
            hypervolume(u, point)


def test_hypervolume_of_many_objectives_is_approximate() -> None:
    with pytest.raises(ValueError, match="got 7: use approx=True"):
        hypervolume(np.ones((2, 7)))
    corner = np.ones((2, 7))
    corner[0, 0] = corner[1, 1] = 0.5
    found = hypervolume(corner, approx=True, samples=20_000)
    assert found == hypervolume(corner, approx=True, samples=20_000)
    spread = np.std([hypervolume(corner, approx=True, samples=20_000, seed=s) for s in range(1, 9)], ddof=1)
    # 0.75 of the unit box; six standard errors estimated from eight others, false alarm about 5e-4
    assert abs(found - 0.75) < 6 * spread and spread < 0.05
    with pytest.raises(ValueError, match="at least 1 sample"):
        hypervolume(corner, approx=True, samples=0)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_distances_against_pymoo(d: int) -> None:
    for seed in range(5):
        found, true = front(30, d, seed), front(50, d, seed + 100)
        assert metrics.igd_plus(found, true) == pytest.approx(IGDPlus(-true)(-found), abs=1e-9)
        assert metrics.gd_plus(found, true) == pytest.approx(GDPlus(-true)(-found), abs=1e-9)
        assert metrics.igd_plus(found, true) == pytest.approx(reference.igd_plus(found, true), abs=1e-12)
        assert metrics.igd_plus(true, true) == metrics.gd_plus(true, true) == 0.0
        both = (metrics.gd_plus(found, true), metrics.igd_plus(found, true))
        assert metrics.avg_hausdorff(found, true) == max(both)


@pytest.mark.parametrize("d", [2, 3])
def test_r2_in_both_normalisations(d: int) -> None:
    found = front(20, d, 0)
    weights = metrics.simplex_lattice(d, 10)
    directions = get_reference_directions("das-dennis", d, n_partitions=10)
    assert sorted(map(tuple, weights.round(9))) == sorted(map(tuple, directions.round(9)))
    assert len(weights) == math.comb(10 + d - 1, d - 1) and np.allclose(weights.sum(1), 1)
    total = reference.r2(found, weights, np.ones(d))
    assert metrics.r2(found) == pytest.approx(total / len(weights), abs=1e-12)
    assert metrics.r2(found, normalisation="frobenius") == pytest.approx(total / np.linalg.norm(weights), abs=1e-12)
    assert metrics.r2(np.ones((1, d))) == 0.0


def test_pc_entropy() -> None:
    true = front(9, 2, 0)
    assert metrics.pc_entropy(true, true) == pytest.approx(math.log(9))
    assert metrics.pc_entropy(true[[0] * 5], true) == 0.0
    assert metrics.pc_entropy(true[[0, 0, 0, 1]], true) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
    assert metrics.pc_entropy(front(500, 2, 1), true) <= math.log(9)


def test_extreme_faces_and_small_measures() -> None:
    faces = metrics.extreme_faces(2)
    assert len(faces) == 19 and (faces.max(1) == 1).all()
    assert len(metrics.extreme_faces(3)) == 10**3 - 9**3
    assert metrics.top_k_mean(np.arange(10.0), 2) == 8.5 and metrics.top_k_mean(np.array([1.0]), 100) == 1.0
    assert metrics.modes_found(["a", "b", "b"], ["b", "c"]) == 1
    assert metrics.tanimoto_diversity(["CCO", "CCO"]) == 0.0 and metrics.tanimoto_diversity(["C"]) == 0.0
    assert 0.5 < metrics.tanimoto_diversity(["CCO", "c1ccccc1", "CC(=O)N"]) <= 1.0
    with pytest.raises(ValueError, match="'not a molecule'"):
        metrics.tanimoto_diversity(["not a molecule"])


def test_metrics_refuse_what_means_nothing() -> None:
    good = np.ones((2, 2))
    for call, words in [
        (lambda: hypervolume(np.array([[np.nan, 1.0]])), "nan for object 0"),
        (lambda: metrics.igd_plus(good, np.ones((2, 3))), "the reference's 3"),
        (lambda: metrics.igd_plus(np.ones((0, 2)), good), "at least one point"),
        (lambda: metrics.r2(good, normalisation="sum"), "'sum'"),
        (lambda: metrics.top_k_mean(np.ones(0)), "at least one value"),
        (lambda: non_dominated_mask(torch.ones(3)), "(batch, objectives)"),
        (lambda: metrics.simplex_lattice(2, 0), "1 division"),
        (lambda: metrics.extreme_faces(0), "1 objective"),
        (lambda: ParetoArchive(0), "got 0"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)


def test_archive_is_the_front_of_everything_seen() -> None:
    u, payload = front(300, 2, 0, 30), np.arange(300)[:, None]
    archive = ParetoArchive(1000)
    for start in range(0, 300, 37):
        archive.add(u[start : start + 37], payload[start : start + 37])
        archive.add(u[start : start + 37], payload[start : start + 37])  # a payload enters once
    assert archive.payload[:, 0].tolist() == np.flatnonzero(reference.non_dominated(u)).tolist()
    with pytest.raises(ValueError, match="2 objectives"):
        archive.add(np.ones((1, 3)), payload[:1])
    with pytest.raises(ValueError, match="as many payloads"):
        archive.add(u, payload[:1])


def test_a_full_archive_keeps_ends_and_spread() -> None:
    angle = np.linspace(0, np.pi / 2, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    archive = ParetoArchive(9)
    archive.add(circle, np.arange(200)[:, None])
    kept = np.sort(archive.payload[:, 0])
    assert len(kept) == 9 and kept[0] == 0 and kept[-1] == 199
    assert np.diff(kept).max() <= 2 * np.diff(kept).min() + 1
    single = ParetoArchive(5)
    single.add(np.arange(20.0)[:, None], np.arange(20)[:, None])
    assert sorted(single.payload[:, 0]) == [15, 16, 17, 18, 19]


def test_the_diverse_best_are_unlike_each_other() -> None:
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    smiles = ["C" * n + end for n in range(2, 9) for end in ("O", "N", "c1ccccc1")]
    values = np.random.default_rng(0).random(len(smiles))
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]
    chosen = metrics.diverse_top_k(smiles, values, 6, threshold=0.5)
    expected: list[int] = []
    for i in sorted(range(len(smiles)), key=lambda i: -values[i]):
        alike = [DataStructs.TanimotoSimilarity(prints[i], prints[j]) for j in expected]
        if len(expected) < 6 and all(value <= 0.5 for value in alike):
            expected.append(i)
    assert chosen == expected and len(chosen) < len(smiles)
    everything = metrics.diverse_top_k(smiles, values, 5, threshold=1.0)
    assert everything == np.argsort(-values)[:5].tolist()
    for arguments in ((["C"], np.ones(2)), (["C"], np.ones(1), 0), (["C"], np.array([np.nan])), (["x"], np.ones(1))):
        with pytest.raises(ValueError):
            metrics.diverse_top_k(*arguments)
