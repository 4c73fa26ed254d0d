"""The audit, and the measures of what was recovered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isotone.shared.errors import InputError
from isotone.sketching import audit as audit_module
from isotone.sketching import recovery
from isotone.sketching.attack import AttackConfig, Reconstruction
from isotone.sketching.audit import AuditConfig, audit, audit_networks, inverse_roots
from isotone.sketching.data import digits
from isotone.sketching.models import make_model
from isotone.sketching.sketches import make_sketch
from isotone.sketching.training import run_keys

SOURCE = digits()
MODEL = make_model("mlp", (8, 8, 1), 10, 16)
PARAMS = MODEL.init(jax.random.key(0))
POOL = (SOURCE.test_x[:100], SOURCE.test_y[:100])


def test_errors_by_hand():
    a, b = np.zeros((2, 2)), np.array([[0.1, 0.1], [0.1, 0.1]])
    assert np.isclose(recovery.mse(a, b), 0.01) and np.isclose(recovery.psnr(a, b), 20) and recovery.psnr(a, a) == 100
    pool = SOURCE.test_x[:50]
    assert recovery.identified(pool[7] + 0.01, pool, 7) and not recovery.identified(pool[8], pool, 7)
    assert np.array_equal(recovery.matched(pool[[2, 0, 1]], pool[:3]), pool[:3])
    # of none of n the upper end is 1 - (level / 2)^(1 / n)
    assert np.allclose(recovery.interval(0, 20), (0, 1 - 0.025 ** (1 / 20)))
    assert np.allclose(recovery.interval(3, 9), (0.07485, 0.70070), atol=1e-5)
    assert np.isclose(recovery.at_least(2, 3, 0.1), 3 * 0.01 * 0.9 + 0.001) and recovery.at_least(0, 3, 0.1) == 1
    with pytest.raises(InputError, match="3 of 2"):
        recovery.interval(3, 2)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 12, 3), (5, 9), (30,)])
def test_ssim_is_its_definition(shape):
    """Windows of 7 x 7 one by one."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=shape), rng.uniform(size=shape)
    x, y = (v.reshape(shape[0], shape[1] if len(shape) > 1 else 1, -1) for v in (a, b))
    height, width = (min(7, side) for side in x.shape[:2])
    found = []
    for c in range(x.shape[2]):
        for i in range(x.shape[0] - height + 1):
            for j in range(x.shape[1] - width + 1):
                p, q = (v[i : i + height, j : j + width, c].ravel() for v in (x, y))
                both = np.cov(p, q)
                top = (2 * p.mean() * q.mean() + 1e-4) * (2 * both[0, 1] + 9e-4)
                found.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (both[0, 0] + both[1, 1] + 9e-4)))
    assert np.isclose(recovery.ssim(a, b), np.mean(found), atol=1e-10) and np.isclose(recovery.ssim(a, a), 1)


def test_the_audit_tells_leaks_from_noise():
    """The gradient gives examples away; noise that drowns it makes the attack the guess, and a whisper of noise does
    not. An attack that fails is called one that does not in at most 1 of 10 draws of noise; this is one."""
    config = AuditConfig(
        *((), (), ()),
        noises=(1e-3, 50.0),
        private_sizes=(None,),
        private_messages=12,
        private_attack=AttackConfig(steps=100, restarts=2),
    )
    report = audit(MODEL, PARAMS, *POOL, config, known=(SOURCE.x, SOURCE.y))
    whisper, drowned = report.leaks
    assert not whisper.failed and whisper.mse < 0.5 * whisper.guess and whisper.by_likelihood == 12
    assert whisper.p_likelihood < 1e-20 and drowned.p_likelihood > 0.05
    # who is the likeliest too often is told, whatever is reconstructed
    told = dataclasses.replace(drowned, by_likelihood=4, p_likelihood=0.01)
    assert not told.failed
    assert drowned.failed and abs(drowned.mse / drowned.guess - 1) < 0.01 and drowned.by_likelihood < 4
    assert 0.01 <= drowned.chance <= 0.15
    assert list(report.pictures["private"]) == ["truth", "class mean", "noise 0.001", "noise 50"]
    rows = report.to_json()
    assert rows[-1]["failed"] and rows[0]["pool"] == 100 and rows[0]["s"] is None


def test_batches_of_several_networks():
    """Batches are told apart up to their order, messages of two networks counted together, K steps unrolled."""
    config = AuditConfig((None,), (2,), (2,), 2, attack=AttackConfig(steps=600, restarts=2))
    networks = [PARAMS, MODEL.init(jax.random.key(1))]
    leak = audit_networks(MODEL, networks, *POOL, config, seeds=(0, 1)).leaks[0]
    assert leak.tried == 8 and leak.local_steps == 2 and leak.batch == 2 and leak.psnr > 30
    assert leak.found == 8 and not leak.failed and leak.low > 0.6
    assert len(leak.psnrs) == len(leak.medians) == 2 and np.isclose(np.mean(leak.psnrs), leak.psnr)


@pytest.mark.parametrize("kind,s", [("srht", 12), ("countsketch", 12), ("srht", 21)])
def test_noise_through_a_sketch_is_made_white(kind, s):
    """Of vectors that are padded R R^T is no multiple of the identity; where R has rows of nothing they stay so."""
    with jax.enable_x64(True):
        sketch = make_sketch(kind, 21, s)
        roots = np.asarray(inverse_roots(sketch, jnp.arange(3)))
        for t, root in enumerate(roots):
            matrix = np.asarray(jax.jit(sketch.matrix)(t), np.float64)
            gram = matrix @ matrix.T
            assert np.abs(gram - gram[0, 0] * np.eye(s)).max() > 0.1
            rank = np.linalg.matrix_rank(gram)
            white = root @ gram @ root.T
            assert np.allclose(white @ white, white, atol=1e-8) and np.isclose(np.trace(white), rank)
            assert s == 21 or kind == "countsketch" or rank == s


def test_attacks_on_noise_in_a_sketch_are_on_what_the_roots_leave(monkeypatch):
    """Roots that are 0 leave nothing of messages that hardly any noise hides, and every guess is the pool's first."""
    roots, targets = [], []

    def nothing(*given):
        roots.append(0 * inverse_roots(*given))
        return roots[0]

    def invert(message, heard, shape, keys, **options):
        targets.append(np.asarray(heard))
        return [Reconstruction(np.zeros((1, *shape)), np.zeros(1, int), 0.0, np.zeros(1)) for _ in heard]

    monkeypatch.setattr(audit_module, "inverse_roots", nothing)
    monkeypatch.setattr(audit_module.attack, "invert_many", invert)
    config = AuditConfig((), (), (), noises=(1e-3,), private_sizes=(12,), private_messages=4)
    (leak,) = audit(MODEL, PARAMS, *POOL, config, known=(SOURCE.x, SOURCE.y)).leaks
    assert roots[0].shape == (4, 12, 12) and targets[0].shape == (4, 12) and not targets[0].any()
    assert leak.by_likelihood == 0 and leak.s == 12


def test_keys_of_attacks_are_not_those_of_weights():
    """The attacker's starts, the clients' noise and the first weights of a seed share no key."""
    pool = audit_module._Pool(MODEL, [PARAMS], *POOL, {}, {}, (3,))
    own = {bytes(np.asarray(jax.random.key_data(key))) for key in audit_module._keys(pool, 4, 1)}
    base = jax.random.key(3)
    others = [*jax.random.split(base, 8), *jax.random.split(run_keys(3)[0], 8), *jax.random.split(run_keys(3)[1], 8)]
    others += [key for i in range(4) for key in jax.random.split(jax.random.fold_in(base, i), 4)]
    assert not own & {bytes(np.asarray(jax.random.key_data(key))) for key in others}


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: AuditConfig(batches=(0,)), "batches"),
        (lambda: AuditConfig(noises=(-1.0,)), "noise"),
        (lambda: AuditConfig(rate=0.0), "rate"),
        (lambda: AuditConfig(messages=0), "messages"),
        (lambda: audit(MODEL, PARAMS, POOL[0][:4], POOL[1][:4]), "8 examples"),
        (lambda: audit(MODEL, PARAMS, *POOL, known=(POOL[0][:1], POOL[1][:1])), "every class"),
        (lambda: audit(MODEL, PARAMS, POOL[0] * np.float32(np.nan), POOL[1]), "NaN"),
        (lambda: audit(MODEL, PARAMS, *POOL, AuditConfig((100_000,), (1,), (1,), 1)), "100000"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_one_message_is_no_evidence():
    config = AuditConfig((16,), (1,), (1,), 1, attack=AttackConfig(steps=100))
    report = audit(MODEL, PARAMS, *POOL, config)
    leak = report.leaks[0]
    assert leak.p_below == 1.0 and leak.gap_error == 0.0 and leak.s == 16 and leak.psnr < 25
    assert list(report.pictures["batch 1"]) == ["truth", "s = 16"]
