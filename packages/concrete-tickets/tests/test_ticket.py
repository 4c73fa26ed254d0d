"""Masks over pytrees, exact counts, what tickets can do, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.concrete_tickets import LayerCollapse, Ticket, prunable, search
from isotone.concrete_tickets.layout import Layout, default_kernels, kept_count, leaf_name, masked, top_k
from isotone.concrete_tickets.ticket import random_reinitialise
from isotone.shared.errors import InputError


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), min_size=8, max_size=8), st.integers(1, 8))
def test_top_k_is_exact_and_breaks_ties_by_index(scores, k):
    assert top_k(jnp.array(scores), k).tolist() == reference.top_k(scores, k)


def test_counts_are_exact():
    assert kept_count(0.8**22, 291_376) == 2149
    assert kept_count(0.29, 100) == 29, "floor(0.29 * 100) in floating point is 28"
    total = 2**24 + 3
    assert kept_count(1.0, total) == total
    for density in (0.0, -0.1, 1.01, float("nan"), float("inf")):
        with pytest.raises(InputError, match="density"):
            kept_count(density, 100)
    with pytest.raises(InputError, match="keeps a weight"):
        kept_count(0.001, 100)


def test_equal_scores_still_give_exactly_k():
    scores = {"a": jnp.zeros((7, 3)), "b": jnp.zeros((5, 4))}
    for density in (0.1, 0.5, 0.99, 1.0):
        assert Ticket.from_scores(scores, density, warn=False).kept == kept_count(density, 41)


def test_what_is_prunable():
    params = {
        "embed": {"embedding": jnp.ones((4, 3))},
        "patch_embed": {"kernel": jnp.ones((2, 2, 3, 4))},
        "norm": {"scale": jnp.ones((2, 2))},
        "layers": [{"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "steps": jnp.ones((2, 2), int)}],
    }
    flags = prunable(params)
    assert flags["layers"][0] == {"kernel": True, "bias": False, "steps": False}
    assert flags["patch_embed"]["kernel"]
    assert not flags["embed"]["embedding"] and not flags["norm"]["scale"]
    with pytest.raises(InputError, match="none among"):
        prunable({"bias": jnp.ones(3)})


def test_structured_masks():
    params = toy.params()
    scores = {name: jax.random.normal(jax.random.key(1), w.shape) for name, w in _kernels(params).items()}
    two_four = Ticket.from_scores({"k": scores["l1/kernel"]}, None, "2:4")
    blocks = np.asarray(two_four.masks["k"]).reshape(2, 4, 5).sum(1)
    assert (blocks == 2).all() and two_four.density == 0.5
    value = np.asarray(scores["l1/kernel"]).reshape(2, 4, 5)
    assert (np.asarray(two_four.masks["k"]).reshape(2, 4, 5) == (value >= np.sort(value, 1)[:, 2:3])).all()
    columns = Ticket.from_scores(scores, 0.5, "output", warn=False)
    for mask in columns.masks.values():
        assert set(np.asarray(mask).mean(0).tolist()) <= {0.0, 1.0}
    assert 0 < columns.kept <= 0.5 * columns.total
    rows = Ticket.from_scores(scores, 0.5, "input", warn=False)
    for mask in rows.masks.values():
        assert set(np.asarray(mask).mean(1).tolist()) <= {0.0, 1.0}
    with pytest.raises(InputError, match="divisible by 4"):
        Layout.of(params, structure="2:4")
    with pytest.raises(InputError, match="structure"):
        Layout.of(params, structure="4:2")
    with pytest.raises(InputError, match="0.5"):
        Ticket.from_scores({"k": scores["l1/kernel"]}, 0.3, "2:4")
    with pytest.raises(InputError, match="group of"):
        Ticket.from_scores({"k": jnp.ones((40, 2))}, 0.1, "output")


def test_expand_and_flatten_are_inverse():
    params = toy.params()
    for structure in ("weight", "input", "output"):
        layout = Layout.of(params, structure=structure)
        flat = jnp.arange(layout.groups, dtype=jnp.float32)
        back = layout.flatten(layout.expand(flat)) / layout.sizes()
        assert np.allclose(back, flat) and layout.sizes().sum() == layout.total


def test_apply_shuffle_invert():
    params = toy.params()
    scores = {name: jax.random.normal(jax.random.key(2), w.shape) for name, w in _kernels(params).items()}
    ticket = Ticket.from_scores(scores, 0.3)
    sparse = ticket.apply(params)
    assert int(sum(jnp.sum(w != 0) for w in _kernels(sparse).values())) == ticket.kept
    assert np.array_equal(sparse["l0"]["bias"], params["l0"]["bias"])
    shuffled = ticket.shuffle_layers(jax.random.key(3))
    assert shuffled.layer_densities() == ticket.layer_densities() and shuffled.kept == ticket.kept
    assert any(not np.array_equal(shuffled.masks[n], ticket.masks[n]) for n in ticket.masks)
    inverted = ticket.invert(scores)
    assert inverted.kept == ticket.kept
    assert not any(bool(jnp.any(inverted.masks[n] & ticket.masks[n])) for n in ticket.masks), "disjoint: 2k <= d"
    assert np.allclose(masked(params, ticket.masks)["l1"]["kernel"], sparse["l1"]["kernel"])
    assert np.array_equal(ticket.tree(params)["l0"]["kernel"], ticket.masks["l0/kernel"])
    for name, sparse_leaf in ticket.to_bcoo(params).items():
        assert np.array_equal(sparse_leaf.todense(), _kernels(sparse)[name])
        assert sparse_leaf.nse == int(ticket.masks[name].sum())
    drawn = random_reinitialise(params, ticket.masks, jax.random.key(5))
    assert np.array_equal(drawn["l0"]["bias"], params["l0"]["bias"])
    assert not np.array_equal(drawn["l0"]["kernel"], params["l0"]["kernel"])


@pytest.mark.parametrize("structure", ["input", "output", "2:4"])
def test_structure_outlives_shuffles_and_files(structure, tmp_path):
    """Groups stay whole, each four keep two, and a file knows what it holds; one of before says "weight"."""
    scores = {n: np.random.default_rng(0).random((8, 8)) for n in ("a", "b")}
    ticket = Ticket.from_scores(scores, None if ":" in structure else 0.5, structure)
    shuffled = ticket.shuffle_layers(jax.random.key(1))
    assert shuffled.layer_densities() == ticket.layer_densities() and shuffled.structure == structure
    assert any(not np.array_equal(shuffled.masks[n], ticket.masks[n]) for n in scores)
    inverted = ticket.invert(scores)
    assert inverted.kept == ticket.kept
    assert not any((inverted.masks[n] & ticket.masks[n]).any() for n in scores), "half of all, the other half"
    for mask in map(np.asarray, [*shuffled.masks.values(), *inverted.masks.values()]):
        if structure == "2:4":
            assert (mask.reshape(2, 4, 8).sum(1) == 2).all()
        else:
            assert set(mask.mean({"input": 1, "output": 0}[structure])) <= {0.0, 1.0}
    again = Ticket.load(ticket.save(tmp_path / "t.safetensors"))
    assert again.structure == structure and all(np.array_equal(again.masks[n], ticket.masks[n]) for n in scores)


def test_groups_too_large_for_the_density_are_passed_over():
    scores = {"large": np.full((8, 8), 9.0), "small": np.arange(8.0).reshape(2, 4)}
    ticket = Ticket.from_scores(scores, 5 / 72, "output", warn=False)
    assert ticket.kept == 4 and np.asarray(ticket.masks["small"])[:, 2:].all()
    with pytest.raises(InputError, match="group of 2 weights, got room for 1"):
        Ticket.from_scores(scores, 0.02, "output")


def test_a_ticket_that_does_not_fit_is_refused():
    ticket = Ticket.dense(toy.params())
    with pytest.raises(InputError, match=r"l0/kernel of shape \(6, 8\), got \(7, 8\)"):
        ticket.apply(toy.params(sizes=(7, 8, 5, 3)))
    with pytest.raises(InputError, match="l2/kernel"):
        ticket.apply(toy.params(sizes=(6, 8, 5)))
    with pytest.raises(InputError, match="NaN"):
        Ticket.from_scores({"a": jnp.array([[1.0, jnp.nan]])}, 0.5)


def test_layer_collapse_is_named():
    scores = {"first/kernel": jnp.ones((4, 4)), "second/kernel": jnp.zeros((4, 4))}
    with pytest.warns(LayerCollapse, match="second/kernel"):
        assert Ticket.from_scores(scores, 0.25).collapsed() == ["second/kernel"]
    assert Ticket.dense(toy.params()).density == 1


def test_files_round_trip(tmp_path):
    scores = {"a/kernel": jax.random.normal(jax.random.key(0), (7, 3)), "b": jnp.ones((2, 3, 5))}
    ticket = Ticket.from_scores(scores, 0.3)
    path = ticket.save(tmp_path / "ticket.safetensors")
    back = Ticket.load(path)
    assert list(back.masks) and all(np.array_equal(back.masks[n], m) for n, m in ticket.masks.items())
    assert len({ticket.save(path).read_bytes() for _ in range(12)}) == 1, "the same ticket is the same file"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="torn"):
        Ticket.load(path)
    with pytest.raises(InputError, match="missing"):
        Ticket.load(tmp_path / "missing")
    from safetensors.numpy import save_file

    # a file of before structures were kept
    facts = {"format": "isotone-ticket-1", "shapes": '{"a": [2, 3]}'}
    save_file({"a": np.packbits([True, False, True, True, False, False])}, tmp_path / "old", facts)
    old = Ticket.load(tmp_path / "old")
    assert old.structure == "weight" and old.masks["a"].tolist() == [[True, False, True], [True, False, False]]
    save_file({"a": np.ones(3)}, tmp_path / "other")
    with pytest.raises(InputError, match="another file"):
        Ticket.load(tmp_path / "other")


def test_density_one_is_the_dense_ticket():
    assert search(toy.apply, toy.params(), toy.data(), 1.0, epochs=1, batch_size=16).ticket.density == 1


def _kernels(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_name(p): w for p, w in leaves if default_kernels(leaf_name(p), w)}


def test_scores_and_places_that_do_not_fit(tmp_path):
    ticket = Ticket.from_scores({"a": np.arange(6.0).reshape(2, 3)}, 0.5)
    with pytest.raises(InputError, match=r"a of shape \(2, 3\)"):
        ticket.invert({"a": np.ones((3, 3))})
    file = ticket.save(tmp_path / "new" / "t.safetensors")
    assert Ticket.load(file).kept == 3
    with pytest.raises(InputError, match="expected to write a ticket"):
        ticket.save(file / "t.safetensors")
