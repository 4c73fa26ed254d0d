"""SNIP, GraSP, SynFlow and the others against their definitions; LTR, IMP, gradual pruning, sanity checks."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from isotone.concrete_tickets import (
    LayerCollapse,
    Ticket,
    accuracy,
    balanced_batch,
    erk,
    gradual_magnitude,
    grasp,
    imp,
    magnitude,
    random_ticket,
    saliency,
    sanity_check,
    snip,
    synflow,
    train,
)
from isotone.concrete_tickets.baselines import GRASP_TEMPERATURE, erk_counts, scores
from isotone.concrete_tickets.layout import kept_count
from isotone.concrete_tickets.lottery import Gradual, prune_magnitude, round_densities, round_seconds, rounds_to
from isotone.concrete_tickets.objectives import Batch
from isotone.shared.errors import InputError

PARAMS, DATA = toy.params(), toy.data()
KERNELS = {f"l{i}/kernel": PARAMS[f"l{i}"]["kernel"] for i in range(3)}
BATCH = Batch(*DATA)


def cross_entropy(params, temperature=1.0):
    log = jax.nn.log_softmax(toy.apply(params, DATA[0]) / temperature)
    return -jnp.mean(log[jnp.arange(64), DATA[1]])


def linear(params, x):
    for i in range(3):
        x = x @ params[f"l{i}"]["kernel"]
    return x


def test_snip_is_its_definition():
    gradient = jax.grad(cross_entropy)(PARAMS)
    found = scores("snip", toy.apply, PARAMS, BATCH)
    for i in range(3):
        expected = jnp.abs(PARAMS[f"l{i}"]["kernel"] * gradient[f"l{i}"]["kernel"])
        assert np.allclose(found[f"l{i}/kernel"], expected, atol=1e-6)
    assert snip(toy.apply, PARAMS, BATCH, 0.2).kept == kept_count(0.2, 103)


def test_grasp_is_the_signed_hessian_product():
    """-theta * (H g), with H written out; what is kept has the smallest."""
    names = list(KERNELS)
    sizes = [w.size for w in KERNELS.values()]

    def loss(flat):
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        params = {f"l{i}": {**PARAMS[f"l{i}"], "kernel": p.reshape(KERNELS[n].shape)}
                  for i, (n, p) in enumerate(zip(names, parts, strict=True))}  # fmt: skip
        return cross_entropy(params, GRASP_TEMPERATURE)

    flat = jnp.concatenate([w.reshape(-1) for w in KERNELS.values()])
    removal = -flat * jax.jit(lambda w: jax.hessian(loss)(w) @ jax.grad(loss)(w))(flat)
    found = jnp.concatenate([s.reshape(-1) for s in scores("grasp", toy.apply, PARAMS, BATCH).values()])
    assert np.allclose(found, -removal, rtol=1e-3, atol=1e-5 * float(jnp.abs(removal).max()))
    ticket = grasp(toy.apply, PARAMS, BATCH, 0.3)
    kept = jnp.concatenate([ticket.masks[n].reshape(-1) for n in names])
    assert float(removal[kept].max()) <= float(removal[~kept].min()) + 1e-9


def test_synflow_conserves_its_flow_and_keeps_the_signs():
    found = scores("synflow", linear, PARAMS, Batch(jnp.ones((1, 6)), jnp.zeros(1, jnp.int32)))
    totals = [float(s.sum()) for s in found.values()]
    assert np.allclose(totals, 1.0, rtol=1e-4), "each layer carries the whole flow (of log R: 1)"
    hidden_in, hidden_out = found["l0/kernel"].sum(0), found["l1/kernel"].sum(1)
    assert np.allclose(hidden_in, hidden_out, rtol=1e-4, atol=1e-6), "what goes into a unit comes out"
    before = jax.tree.map(lambda x: x.copy(), PARAMS)
    ticket = synflow(linear, PARAMS, DATA[0], 0.1)
    assert ticket.kept == kept_count(0.1, 103) and not ticket.collapsed()
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(PARAMS), strict=True))


def test_rounds_are_nested_and_differ_from_one_shot():
    once, often = (snip(toy.apply, PARAMS, BATCH, 0.1, rounds=r) for r in (1, 20))
    assert once.kept == often.kept
    assert any(not np.array_equal(once.masks[n], often.masks[n]) for n in once.masks)
    assert grasp(toy.apply, PARAMS, BATCH, 0.1, rounds=5).kept == once.kept
    with pytest.raises(InputError, match="rounds"):
        snip(toy.apply, PARAMS, BATCH, 0.1, rounds=0)
    with pytest.raises(InputError, match="finite scores"):
        snip(toy.apply, jax.tree.map(lambda x: x * jnp.nan, PARAMS), BATCH, 0.1)


@pytest.mark.parametrize("objective", ["kl", "loss", "feature_mse"])
def test_saliency_of_objectives(objective):
    ticket = saliency(toy.apply, PARAMS, BATCH, 0.2, objective, rounds=3, features_fn=toy.features)
    assert ticket.kept == kept_count(0.2, 103)


def test_magnitude_random_and_erk():
    ticket = magnitude(PARAMS, 0.3)
    flat = jnp.concatenate([jnp.abs(w).reshape(-1) for w in KERNELS.values()])
    kept = jnp.concatenate([m.reshape(-1) for m in ticket.masks.values()])
    assert float(flat[kept].min()) >= float(flat[~kept].max())
    assert random_ticket(PARAMS, 0.3, jax.random.key(0)).kept == ticket.kept
    same = random_ticket(PARAMS, 0.3, jax.random.key(0), ticket.layer_densities())
    assert same.layer_densities() == ticket.layer_densities()
    with pytest.raises(InputError, match="l2/kernel"):
        random_ticket(PARAMS, 0.3, jax.random.key(0), {"l0/kernel": 0.1, "l1/kernel": 0.1})
    for density in (0.05, 0.3, 0.8, 1.0):
        counts = erk_counts(PARAMS, density)
        assert sum(counts.values()) == kept_count(density, 103)
        assert all(0 <= counts[n] <= w.size for n, w in KERNELS.items())
        assert erk(PARAMS, density, jax.random.key(0)).kept == kept_count(density, 103)
    counts = erk_counts(PARAMS, 0.2)
    free = [n for n, w in KERNELS.items() if counts[n] < w.size]
    ratios = [counts[n] / sum(KERNELS[n].shape) for n in free]
    assert max(ratios) - min(ratios) < 0.1, "counts go with the sum of the dimensions"


def test_balanced_batch():
    batch = balanced_batch((np.ones((60, 2)), np.repeat([0, 1, 2], [30, 20, 10])), 10)
    assert np.bincount(batch.labels).tolist() == [10, 10, 10]
    with pytest.raises(InputError, match="class 2"):
        balanced_batch((np.ones((60, 2)), np.repeat([0, 1, 2], [30, 25, 5])), 10)


def trained(params, ticket):
    return train(toy.TRAINER, params, DATA, ticket=ticket).params


def test_imp_rewinds_prunes_and_resumes(tmp_path):
    assert rounds_to(0.8**22) == 22 and rounds_to(0.007, 0.5) == 8
    assert round_densities(0.5, 0.8)[-1] == 0.5
    seen = []

    def watched(params, ticket):
        seen.append(ticket.kept)
        assert params is PARAMS, "every round starts from the rewind weights"
        return trained(params, ticket)

    tickets = imp(watched, PARAMS, 0.3, keep=0.6, folder=tmp_path)
    assert [t.kept for t in tickets] == [kept_count(d, 103) for d in (0.6, 0.36, 0.3)] and seen == [103, 61, 37]
    for before, after in zip(tickets, tickets[1:], strict=False):
        assert all(bool(jnp.all(before.masks[n] | ~after.masks[n])) for n in before.masks), "nested"
    (tmp_path / "round-003.safetensors").unlink()
    again = imp(watched, PARAMS, 0.3, keep=0.6, folder=tmp_path)
    assert len(seen) == 4 and all(np.array_equal(again[-1].masks[n], m) for n, m in tickets[-1].masks.items())
    assert len(imp(watched, PARAMS, 0.3, keep=0.6, stop=lambda done: done == 1)) == 1
    with pytest.raises(InputError, match="keep"):
        imp(watched, PARAMS, 0.3, keep=1.0)
    with pytest.raises(InputError, match="NaN"):
        prune_magnitude(jax.tree.map(lambda x: x * jnp.nan, PARAMS), tickets[0], 0.2)
    with pytest.raises(InputError, match="other weights"):
        imp(watched, toy.params(5), 0.3, keep=0.6, folder=tmp_path)
    with pytest.raises(InputError, match="other leaves"):
        imp(watched, PARAMS, 0.3, keep=0.6, folder=tmp_path, where=lambda name, leaf: name == "l0/kernel")
    with pytest.raises(InputError, match="other training"):
        imp(watched, PARAMS, 0.3, keep=0.6, folder=tmp_path, identity={"epochs": 9})


def test_rounds_that_were_run_earlier_keep_their_seconds(tmp_path):
    def slow(params, ticket):
        time.sleep(0.05)
        return trained(params, ticket)

    imp(slow, PARAMS, 0.3, keep=0.6, folder=tmp_path, stop=lambda done: done == 2)
    assert round_seconds(tmp_path) >= 0.1
    (tmp_path / "round-001.json").unlink()
    imp(slow, PARAMS, 0.3, keep=0.6, folder=tmp_path)
    assert round_seconds(tmp_path) >= 0.15


def test_random_layers_that_are_cut_are_named():
    params = {"wide": {"kernel": jnp.ones((40, 40))}, "narrow": {"kernel": jnp.ones((2, 2))}}
    with pytest.warns(LayerCollapse, match="narrow"):
        erk(params, 0.0007, jax.random.key(0))
    with pytest.warns(LayerCollapse, match="wide"):
        random_ticket(params, 0.5, jax.random.key(0), {"wide/kernel": 0.0, "narrow/kernel": 1.0})


def test_gradual_pruning_ends_at_the_density():
    schedule = Gradual(0.0, 0.5)
    assert schedule.density(0.1, 0, 10) == 1.0 and abs(schedule.density(0.1, 5, 10) - 0.1) < 1e-9
    state, ticket = gradual_magnitude(toy.TRAINER, PARAMS, DATA, 0.2, schedule=schedule)
    assert ticket.kept == kept_count(0.2, 103)
    assert all(np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(ticket.apply(state.params)), strict=True))  # fmt: skip
    assert 0 <= accuracy(toy.apply, state.params, DATA) <= 1


def test_sanity_checks_report_what_hurts():
    ticket = magnitude(PARAMS, 0.4)
    marks = iter([0.5, 0.3, 0.95, 0.9])
    calls = []

    def evaluate(params, t):
        calls.append((params, t))
        return next(marks)

    values = {n: jnp.abs(w) for n, w in KERNELS.items()}
    report = sanity_check(ticket, PARAMS, evaluate, key=jax.random.key(0), scores=values)
    assert report.accuracy == 0.9 and report.changed == {"shuffled": 0.5, "inverted": 0.3, "reinitialised": 0.95}
    assert report.passed() == {"shuffled": True, "inverted": True, "reinitialised": False}
    assert report.passed(0.5) == {"shuffled": False, "inverted": True, "reinitialised": False}
    assert report.tickets["shuffled"].layer_densities() == ticket.layer_densities()
    assert not np.array_equal(calls[2][0]["l0"]["kernel"], PARAMS["l0"]["kernel"])
    with pytest.raises(InputError, match="l0/kernel"):
        sanity_check(ticket, toy.params(sizes=(7, 8, 5, 3)), evaluate, key=jax.random.key(0))
    assert isinstance(report.tickets["inverted"], Ticket)


@pytest.mark.parametrize("epochs", [1, 2])
def test_gradual_pruning_reaches_the_density_in_few_epochs(epochs):
    trainer = toy.Trainer(toy.apply, toy.Recipe(epochs=epochs, batch_size=16))
    _, ticket = gradual_magnitude(trainer, PARAMS, DATA, 0.2)
    assert ticket.kept == kept_count(0.2, ticket.total)


def test_what_does_not_fit_is_refused():
    key = jax.random.key(0)
    with pytest.raises(InputError, match="of l0/kernel, got 1.5"):
        random_ticket(PARAMS, 0.1, key, {"l0/kernel": 1.5, "l1/kernel": 0.1, "l2/kernel": 0.1})
    with pytest.raises(InputError, match="got none"):
        accuracy(toy.apply, PARAMS, (DATA[0][:0], DATA[1][:0]))
    with pytest.raises(InputError, match="labels from 0 to 2"):
        train(toy.TRAINER, PARAMS, (DATA[0], DATA[1] + 1))
