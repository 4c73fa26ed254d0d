"""Masked training, models, data sets, augmentation."""

import dataclasses
import gzip
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from isotone.concrete_tickets import (
    Recipe,
    Ticket,
    Trainer,
    accuracy,
    load_images,
    magnitude,
    make_model,
    mask_optimizer,
    masked_apply,
    train,
)
from isotone.concrete_tickets.images import augment_crop_flip
from isotone.concrete_tickets.layout import named_weights
from isotone.shared.errors import InputError

PARAMS, DATA = toy.params(), toy.data()


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.05, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9)),
    ],
)
def test_pruned_weights_are_exactly_zero_and_the_others_never_see_them(tx):
    ticket = magnitude(PARAMS, 0.4)
    masked_tx = mask_optimizer(tx, ticket)

    @jax.jit
    def step(params, state, seed):
        noise = jax.random.normal(jax.random.key(seed), (103,))
        gradient = jax.tree.map(lambda x: jnp.sin(3 * x) + noise[: x.size].reshape(x.shape), params)
        updates, state = masked_tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, gradient

    params, state = PARAMS, masked_tx.init(PARAMS)
    # the network in which only the kept weights exist: a flat vector of them
    kept = jax.tree.map(lambda w, m: w[m], PARAMS, ticket.tree(PARAMS))
    small_state = tx.init(kept)
    for seed in range(6):
        params, state, gradient = step(params, state, seed)
        small_gradient = jax.tree.map(lambda g, m: g[m], gradient, ticket.tree(PARAMS))
        updates, small_state = tx.update(small_gradient, small_state, kept)
        kept = optax.apply_updates(kept, updates)
    for name, mask in ticket.masks.items():
        weight = named_weights(params)[name]
        assert (np.asarray(weight)[~np.asarray(mask)] == 0).all()
    ours = jax.tree.map(lambda w, m: w[m], params, ticket.tree(PARAMS))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(kept), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="params"):
        masked_tx.update(PARAMS, state)
    sparse = masked_apply(toy.apply, ticket)(PARAMS, DATA[0])
    assert np.array_equal(sparse, toy.apply(ticket.apply(PARAMS), DATA[0]))


def test_spans_add_up_and_the_loss_falls():
    whole = train(toy.TRAINER, PARAMS, DATA)
    first = train(toy.TRAINER, PARAMS, DATA, last=2)
    second = train(toy.TRAINER, first.params, DATA, first=2, optimizer=first.optimizer)
    assert np.allclose(whole.params["l0"]["kernel"], second.params["l0"]["kernel"], atol=1e-6)
    assert whole.losses[-1] < whole.losses[0] and len(second.losses) == 2
    none = train(toy.TRAINER, PARAMS, DATA, last=0)
    assert np.array_equal(none.params["l0"]["kernel"], PARAMS["l0"]["kernel"]) and len(none.losses) == 0
    mean = dataclasses.replace(toy.RECIPE, reduction="mean", clip=None, warmup=2)
    assert train(Trainer(toy.apply, mean), PARAMS, DATA).losses[-1] < whole.losses[0]
    assert float(mean.rate(0)) == pytest.approx(0.05) and float(mean.rate(3)) == pytest.approx(0.001)


def test_four_devices_are_one():
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    one = train(toy.TRAINER, PARAMS, DATA)
    four = train(dataclasses.replace(toy.TRAINER, mesh=jax.make_mesh((4,), ("data",))), PARAMS, DATA)
    assert np.allclose(one.losses, four.losses, rtol=1e-4)
    assert np.allclose(one.params["l1"]["kernel"], four.params["l1"]["kernel"], atol=1e-4)


def shaken(key, x):
    return x * jax.random.uniform(key, (len(x), 1), minval=0.5)


def test_augmentation_does_not_see_the_devices():
    """What is drawn for a batch is drawn for the whole of it."""
    if jax.device_count() < 4:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=4")
    trainer = dataclasses.replace(toy.TRAINER, augment=shaken)
    one = train(trainer, PARAMS, DATA, last=2)
    four = train(dataclasses.replace(trainer, mesh=jax.make_mesh((4,), ("data",))), PARAMS, DATA, last=2)
    assert np.allclose(one.params["l1"]["kernel"], four.params["l1"]["kernel"], atol=1e-5)
    mesh = jax.make_mesh((4,), ("data",))
    with pytest.raises(InputError, match="batch statistics over the mesh"):
        train(Trainer(lambda p, x: toy.apply(p, x - x.mean(0)), toy.RECIPE, mesh=mesh), PARAMS, DATA)
    with pytest.raises(InputError, match="labels from 0 to 2"):
        train(Trainer(toy.apply, toy.RECIPE, mesh=mesh), PARAMS, (DATA[0], np.full(len(DATA[1]), 3)))


def test_trainings_of_functions_of_one_name_are_told_apart(tmp_path):
    def scaled(by):
        return lambda key, x: by * x

    first, second = (dataclasses.replace(toy.TRAINER, augment=scaled(by)) for by in (1.0, 2.0))
    train(first, PARAMS, DATA, last=1, checkpoint=tmp_path)
    with pytest.raises(InputError, match="other network or functions"):
        train(second, PARAMS, DATA, last=1, checkpoint=tmp_path)


def test_resumed_training_is_the_uninterrupted_one(tmp_path, monkeypatch):
    import isotone.concrete_tickets.training as module

    ticket = magnitude(PARAMS, 0.5)
    whole = train(toy.TRAINER, PARAMS, DATA, ticket=ticket, checkpoint=tmp_path / "a", checkpoint_every=1)
    inner, calls = module._run, []

    def killed(*args):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return inner(*args)  # its text is taken, it is not run
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(module, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        train(toy.TRAINER, PARAMS, DATA, ticket=ticket, checkpoint=tmp_path / "b", checkpoint_every=1)
    again = train(toy.TRAINER, PARAMS, DATA, ticket=ticket, checkpoint=tmp_path / "b", checkpoint_every=1)
    assert len(calls) == 5
    leaves = zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves) and np.array_equal(whole.losses, again.losses)
    with pytest.raises(InputError, match="other weights, ticket"):
        train(toy.TRAINER, PARAMS, DATA, checkpoint=tmp_path / "b")
    with pytest.raises(InputError, match="other weights, ticket, optimizer"):
        other = jax.tree.map(jnp.ones_like, whole.optimizer)
        train(toy.TRAINER, PARAMS, DATA, ticket=ticket, optimizer=other, checkpoint=tmp_path / "b")
    fresh = train(toy.TRAINER, PARAMS, DATA, checkpoint=tmp_path / "b", resume=False)
    assert not np.array_equal(fresh.params["l0"]["kernel"], whole.params["l0"]["kernel"])


@pytest.mark.parametrize(
    "values",
    [
        *({"epochs": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"clip": 0.0}, {"reduction": "max"}),
        *({"milestones": (0.9, 0.1)}, {"momentum": -1.0}),
    ],
)
def test_bad_recipes(values):
    with pytest.raises(InputError):
        Recipe(**values)


def test_bad_trainings():
    with pytest.raises(InputError, match="within 0 to 4"):
        train(toy.TRAINER, PARAMS, DATA, first=3, last=9)
    with pytest.raises(InputError, match="finite loss"):
        train(toy.TRAINER, jax.tree.map(lambda x: x * jnp.nan, PARAMS), DATA)
    with pytest.raises(InputError, match="l0/kernel"):
        train(toy.TRAINER, PARAMS, DATA, ticket=Ticket.dense(toy.params(sizes=(7, 8, 5, 3))))


@pytest.mark.parametrize(
    ("name", "shape", "prunable"),
    [
        ("mlp", (8, 8, 1), 50_200),
        ("lenet", (28, 28, 1), 6 * 25 + 16 * 6 * 25 + 784 * 120 + 120 * 84 + 840),
        ("resnet20", (32, 32, 3), 291_376),
        ("vgg16", (32, 32, 3), 14_710_464),
    ],
)
def test_models_have_the_papers_weights(name, shape, prunable):
    model = make_model(name, shape, 10)
    params = model.shapes
    assert sum(w.size for w in named_weights(params, model.where).values()) == prunable
    assert make_model(name, shape, 10) is model
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    logits, features = jax.eval_shape(model.features, params, x)
    assert logits.shape == jax.eval_shape(model.apply, params, x).shape == (2, 10)
    assert len(features) == {"mlp": 2, "lenet": 4, "resnet20": 19, "vgg16": 13}[name]
    assert jax.eval_shape(model.linear, params, x).shape == (2, 10)


def test_models_run_and_normalise_by_the_batch():
    model = make_model("resnet20", (8, 8, 3), 10, "bfloat16")
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    assert jax.eval_shape(model.apply, model.shapes, x).dtype == jnp.float32
    lenet = make_model("lenet", (8, 8, 1), 10)
    params = lenet.init(jax.random.key(0))
    grey = x[..., :1]
    assert np.allclose(lenet.apply(params, grey), lenet.apply(params, 5 * grey), atol=1e-2), "scale-free: batch norm"
    assert not np.allclose(lenet.linear(params, grey), lenet.linear(params, 5 * grey), atol=1e-2)
    with pytest.raises(InputError, match="resnet9"):
        make_model("resnet9", (8, 8, 3), 10)
    with pytest.raises(InputError, match="4 x 4"):
        make_model("lenet", (13,), 10)


@pytest.mark.slow  # two deep networks to compile
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_deep_models_run(name):
    model = make_model(name, (8, 8, 3), 10)
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    logits, features = jax.jit(model.features)(params, x)
    assert bool(jnp.isfinite(logits).all()) and all(bool((f >= 0).all()) for f in features)


def test_digits():
    digits = load_images("digits")
    assert len(digits.train[1]) == 1297 and len(digits.test[1]) == 500 and digits.shape == (8, 8, 1)
    assert abs(float(digits.train[0].mean())) < 1e-4 and digits.sha256 == load_images("digits").sha256


@pytest.mark.slow  # scikit-learn takes seconds to import
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, theirs = load_images("digits"), load_digits()
    order = np.random.RandomState(0).permutation(1797)
    assert np.array_equal(digits.test[1], theirs.target[order][1297:])
    assert np.corrcoef(digits.test[0].reshape(-1), theirs.images[order][1297:].reshape(-1))[0, 1] > 1 - 1e-6


def write_idx(path, array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()) if path.suffix == ".gz" else head + array.tobytes())


def test_files_of_the_user(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", grey)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 10)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", grey[:5])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(5, dtype=np.uint8))
    mnist = load_images(f"mnist:{tmp_path}")
    assert mnist.train[0].shape == (20, 28, 28, 1) and len(mnist.test[1]) == 5
    assert mnist.prepare(mnist.train[0]).dtype == jnp.float32
    for classes, labels, names in (
        (10, 1, [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]),
        (100, 2, ["train.bin", "test.bin"]),
    ):
        rows = rng.integers(0, 10, (3, 3072 + labels), dtype=np.uint8)
        rows[:, labels:] = np.arange(3072) % 251
        for name in names:
            (tmp_path / name).write_bytes(rows.tobytes())
        cifar = load_images(f"cifar{classes}:{tmp_path}")
        assert cifar.classes == classes and cifar.shape == (32, 32, 3)
        assert cifar.train[0][0, 1, 2, 1] == (1024 + 32 + 2) % 251, "planes of colour, rows of pixels"
        assert cifar.train[1][0] == rows[0, labels - 1]
        assert cifar.augment(jax.random.key(0), cifar.prepare(cifar.test[0])).shape == (3, 32, 32, 3)
    np.savez(tmp_path / "mine.npz", x=rng.normal(size=(20, 7)), y=np.arange(20) % 4)
    mine = load_images(f"npz:{tmp_path / 'mine.npz'}")
    assert mine.classes == 4 and len(mine.train[1]) == 16 and len(mine.test[1]) == 4


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2, 28, 28) + b"short")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(2, dtype=np.uint8))
    np.savez(tmp_path / "nan.npz", x=np.full((20, 2), np.nan), y=np.zeros(20, int))
    np.savez(tmp_path / "float.npz", x=np.ones((20, 2)), y=np.zeros(20))
    np.savez(tmp_path / "names.npz", a=np.ones(3))
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "objects.npz", x=np.array([{}] * 20, object), y=np.zeros(20, int))
    np.savez(tmp_path / "words.npz", x=np.array(["a"] * 20), y=np.zeros(20, int))
    np.savez(tmp_path / "label.npz", x=np.ones((20, 2)), y=np.r_[np.zeros(19, int), 10**9])
    np.savez(tmp_path / "empty.npz", x=np.ones((20, 0)), y=np.zeros(20, int))
    np.savez(tmp_path / "scalar.npz", x=1.0, y=2)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 100)
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(b"x" * 3073)
    for source, words in [
        ("mnist", "mnist:FOLDER"),
        ("svhn:x", "svhn:x"),
        (f"mnist:{tmp_path}", "1568 bytes"),
        (f"mnist:{tmp_path / 'no'}", "t10k"),
        (f"cifar10:{tmp_path}", "records of 3073"),
        (f"cifar100:{tmp_path}", "train.bin"),
        (f"npz:{tmp_path / 'nan.npz'}", "NaN"),
        (f"npz:{tmp_path / 'label.npz'}", "1000000000 of 20"),
        (f"npz:{tmp_path / 'empty.npz'}", r"\(20, 0\)"),
        (f"npz:{tmp_path / 'scalar.npz'}", "shapes"),
        (f"npz:{tmp_path / 'float.npz'}", "whole numbers"),
        (f"npz:{tmp_path / 'names.npz'}", "x and y"),
        (f"npz:{tmp_path / 'torn.npz'}", "torn"),
        (f"npz:{tmp_path / 'text.npz'}", "plain arrays"),
        (f"npz:{tmp_path / 'one.npy'}", "plain arrays"),
        (f"npz:{tmp_path / 'objects.npz'}", "plain arrays"),
        (f"npz:{tmp_path / 'words.npz'}", "numbers as x"),
        (f"npz:{tmp_path / 'missing.npz'}", "missing.npz"),
    ]:
        with pytest.raises(InputError, match=words):
            load_images(source)


def test_mnist_at_hand():
    folder = Path(os.environ.get("ISOTONE_DATA_DIR", "none"), "mnist")
    if not (folder / "t10k-images-idx3-ubyte.gz").exists():
        pytest.skip("needs mnist/t10k-images-idx3-ubyte.gz in ISOTONE_DATA_DIR")
    mnist = load_images(f"mnist:{folder}")
    assert len(mnist.train[1]) == 8000 and len(mnist.test[1]) == 2000


def test_augmentation_crops_and_flips():
    images = jnp.arange(2 * 8 * 8, dtype=jnp.float32).reshape(2, 8, 8, 1)
    seen = set()
    for seed in range(12):
        out = np.asarray(augment_crop_flip(jax.random.key(seed), images, pad=1))
        padded = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        for i in range(2):
            windows = {(a, b, f): padded[i, a : a + 8, b : b + 8][:, :: (-1 if f else 1)]
                       for a in range(3) for b in range(3) for f in (0, 1)}  # fmt: skip
            found = [place for place, window in windows.items() if np.array_equal(window, out[i])]
            assert found, "every image is a flipped or plain window of its reflection"
            seen |= set(found)
    assert {f for *_, f in seen} == {0, 1} and len({(a, b) for a, b, _ in seen}) >= 5


def test_training_on_images_inside_jit():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    model = make_model("lenet", (8, 8, 3), 4)
    trainer = Trainer(model.apply, Recipe(epochs=1, batch_size=16), lambda x: x.astype(jnp.float32) / 255,
                      lambda key, x: augment_crop_flip(key, x, pad=2))  # fmt: skip
    labels = rng.integers(0, 4, 32).astype(np.int32)
    params = train(trainer, model.init(jax.random.key(0)), (images, labels)).params
    assert 0 <= accuracy(model.apply, params, (images, labels), trainer.prepare, batch_size=16) <= 1


def test_masks_of_other_parameters_are_refused():
    ticket = magnitude(PARAMS, 0.3)
    for call in (
        lambda: mask_optimizer(optax.sgd(0.1), ticket).init({"params": PARAMS}),
        lambda: masked_apply(lambda p, x: toy.apply(p["params"], x), ticket)({"params": PARAMS}, DATA[0]),
    ):
        with pytest.raises(InputError, match="expected a leaf 'l0/kernel'"):
            call()
