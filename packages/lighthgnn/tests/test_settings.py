"""Splits and settings, the topology-aware score, planted noise: section 7, 14 and 15."""

import pytest
import reference
import torch
from problem import EDGES, MADE, QUICK, same, small_student

from isotone.lighthgnn import (
    DistillConfig,
    Hypergraph,
    distill,
    make_synthetic,
    make_teacher,
    observed_hypergraph,
    predict_proba,
    production_split,
    reliable_hyperedge_scores,
    topology_score,
    train_teacher,
    transductive_split,
)
from isotone.lighthgnn.settings import local_ids
from isotone.lighthgnn.training import seeded
from isotone.shared.errors import InputError


def test_splits():
    split = transductive_split(MADE.y, 10, 20, 3)
    assert all((MADE.y[split.train] == c).sum() == 10 and (MADE.y[split.val] == c).sum() == 20 for c in range(3))
    assert len(split.train) + len(split.val) + len(split.test) == 240 and len(split.test_ind) == 0
    assert torch.equal(split.train, transductive_split(MADE.y, 10, 20, 3).train)
    assert not torch.equal(split.train, transductive_split(MADE.y, 10, 20, 4).train)
    unknown = MADE.y.clone()
    unknown[:30] = -1
    assert not set(range(30)) & set(transductive_split(unknown, 10, 20).test.tolist())
    production = production_split(MADE.y, 10, 20, 0.9, 3)
    assert len(production.test_ind) == round(0.9 * len(production.test))
    assert torch.equal(production.observed[local_ids(production, production.val)], production.val)


def test_unseen_rows_never_reach_the_parameters():
    split = production_split(MADE.y, 10, 20, 0.5)
    results = []
    for fill in (None, float("nan")):
        X = MADE.X.clone()
        if fill is not None:
            X[split.test_ind] = fill
        hg = observed_hypergraph(MADE.hypergraph, split)
        assert len(hg.isolated()) == 0 and hg.num_vertices == len(split.observed)
        seen, y = X[split.observed], MADE.y[split.observed]
        ids = (local_ids(split, split.train), local_ids(split, split.val))
        with seeded(0):
            teacher = make_teacher("hgnn", 12, 3, hidden=8)
        train_teacher(teacher, seen, hg, y, *ids, QUICK)
        rho = reliable_hyperedge_scores(teacher, seen, hg, generator=torch.Generator().manual_seed(0))
        student = small_student()
        soft = predict_proba(teacher, seen, hg)
        distill(student, seen, y, *ids, DistillConfig(train=QUICK), teacher=soft, hypergraph=hg, rho=rho)
        results.append((teacher, student))
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_topology_score():
    hg = Hypergraph(7, EDGES)
    x = torch.randn(7, 3)
    assert abs(topology_score(x, hg).item() - reference.topology(x, EDGES)) < 1e-5
    torch.testing.assert_close(topology_score(3 * x, hg), 3 * topology_score(x, hg))
    torch.testing.assert_close(topology_score(3 * x, hg, True), topology_score(x, hg, True))
    assert topology_score(torch.ones(7, 2), hg) == 0


def test_planted_noise_is_known():
    made = make_synthetic(num_vertices=500, num_edges=300, noise=0.5, p_in=1.0, seed=2)
    purity = [len(set(made.y[e].tolist())) == 1 for e in made.hypergraph.edges()]
    real = made.planted & ~made.is_noise
    assert all(pure for pure, true in zip(purity, real.tolist(), strict=True) if true)
    large = torch.tensor([len(edge) > 15 for edge in made.hypergraph.edges()])
    noisy = (made.is_noise & large).tolist()
    assert any(noisy) and not any(pure for pure, noise in zip(purity, noisy, strict=True) if noise)
    assert len(made.hypergraph.isolated()) == 0 and abs(made.is_noise[made.planted].float().mean() - 0.5) < 0.15
    with pytest.raises(InputError, match="ascending"):
        make_synthetic(sizes=(5, 3))
