"""What the claims are measured from."""

import numpy as np
import pytest
import toy

from isotone.concrete_tickets import Recipe, Ticket, baselines, reproduce
from isotone.concrete_tickets.arms import Arm, Experiment, Start
from isotone.concrete_tickets.claims import TARGET, measure
from isotone.concrete_tickets.images import Images
from isotone.concrete_tickets.layout import default_kernels
from isotone.concrete_tickets.models import Model


def row(arm, kl):
    facts = {"accuracy": 50.0, "ticket_seconds": 1.0, "train_seconds": 1.0, "kept": 1, "expected_count": 1}
    return {"arm": arm, "density": TARGET, "seed": 0, **facts, "collapsed": [], "values": {"kl": kl, "loss": 2 * kl}}


def test_values_are_held_against_saliency_and_the_lagrangian():
    """Section 2.8: the lowest of all masks, the objective's own saliency once and in rounds among them."""
    rows = [row("cts", 0.2), row("cts:loss", 0.3), row("magnitude", 4.0), row("random", 3.0)]

    def measured(*more):
        return {m.claim.id: m.measured for m in measure([*rows, *more], [], [], [90.0])}

    assert measured()["value-kl"] == pytest.approx(0.2 / 3)
    assert measured(row("saliency:kl", 0.8), row("saliency:loss", 0.1))["value-kl"] == pytest.approx(0.2 / 0.8)
    assert measured(row("saliency:loss+100", 0.6), row("saliency:kl+100", 9.0))["value-loss"] == pytest.approx(0.5)
    found = measured(row("cts:kl+lagrangian", 0.4), row("cts:loss+lagrangian", 0.1))
    assert (found["value-kl-lagrangian"], found["value-loss-lagrangian"]) == pytest.approx((0.5, 3.0))
    for scale in ("cpu", "gpu", "paper"):
        assert {"saliency:kl", "saliency:kl+100", "cts:kl+lagrangian"} <= set(reproduce.SCALES[scale].arms)


def test_the_rounds_of_a_saliency_arm(monkeypatch):
    data = tuple(map(np.asarray, toy.data()))
    model = Model("toy", toy.apply, toy.features, toy.apply, default_kernels, None)
    experiment = Experiment(Images("toy", data, data, 3, None, None, ""), model, Recipe(epochs=4))
    start, seen = Start(toy.params(), toy.params(), toy.jax.random.key(0)), []

    def saliency(apply_fn, params, batch, density, objective, rounds, where, features_fn):
        seen.append((objective, rounds))
        return Ticket.dense(params)

    monkeypatch.setattr(baselines, "saliency", saliency)
    for arm in ("saliency", "saliency:kl", "saliency:kl+100"):
        experiment._ticket(Arm.parse(arm), 0.1, 0, start, None)
    assert seen == [("loss", 1), ("kl", 1), ("kl", 100)]
