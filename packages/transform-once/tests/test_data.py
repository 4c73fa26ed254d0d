"""Fields from files of every form, and from the solvers; exported models."""

import json
import subprocess
import sys

import numpy as np
import pytest

from isotone.shared.claims import Claim, Measurement, Report
from isotone.shared.errors import InputError
from isotone.transform_once import FNOConfig, T1Config, data, make_model, reproduce
from isotone.transform_once.export import export_model, load_exported


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_npz_with_and_without_channels(tmp_path):
    x = random(5, 12, 10)
    np.savez(tmp_path / "a.npz", x=x, y=2 * x)
    found = data.load(tmp_path / "a.npz", channels=False)
    assert found.inputs.shape == (5, 12, 10, 1) and np.allclose(found.targets, 2 * found.inputs)
    np.savez(tmp_path / "b.npz", inputs=random(5, 12, 10, 3), targets=random(5, 12, 10, 2))
    found = data.load(tmp_path / "b.npz")
    assert found.inputs.shape == (5, 12, 10, 3) and found.targets.shape == (5, 12, 10, 2)
    assert found.inputs.dtype == np.float32 and len(found.sha256) == 64 and found.sizes == (12, 10)
    # neuraloperator's Darcy (a mask of two phases) and Burgers (all frames of the target)
    np.savez(tmp_path / "darcy.npz", x=random(4, 9, 9) > 0, y=random(4, 9, 9))
    assert set(np.unique(data.load(tmp_path / "darcy.npz").inputs)) == {0.0, 1.0}
    y = random(4, 7, 16)
    np.savez(tmp_path / "burgers.npz", x=random(4, 16), y=y, visc=np.ones((1, 1)))
    assert np.allclose(data.load(tmp_path / "burgers.npz").targets[..., 0], y[:, -1], atol=1e-6)


def both(tmp_path, first, second, **given):
    np.savez(tmp_path / "pair.npz", inputs=random(*first), targets=random(*second))
    found = data.load(tmp_path / "pair.npz", **given)
    return found.inputs.shape, found.targets.shape


@pytest.mark.parametrize(
    "first, second, wanted",
    [
        ((3, 16, 16), (3, 16, 16, 3), ((3, 16, 16, 1), (3, 16, 16, 3))),
        ((3, 16, 12, 2), (3, 16, 12), ((3, 16, 12, 2), (3, 16, 12, 1))),
        ((3, 16), (3, 16, 1), ((3, 16, 1), (3, 16, 1))),
        ((3, 16), (3, 16), ((3, 16, 1), (3, 16, 1))),
        ((3, 16), (3, 16, 16), ((3, 16, 1), (3, 16, 1))),  # 16 frames, as Burgers' files
        ((3, 16, 12), (3, 16, 5), ((3, 16, 12), (3, 16, 5))),
        ((3, 16, 12, 1), (3, 16, 12, 1), ((3, 16, 12, 1), (3, 16, 12, 1))),
        ((3, 8, 8), (3, 8, 8), ((3, 8, 8, 1), (3, 8, 8, 1))),
        ((3, 4, 5, 6, 2), (3, 4, 5, 6, 2), ((3, 4, 5, 6, 2), (3, 4, 5, 6, 2))),
    ],
)
def test_shapes_that_can_be_one_thing_alone(first, second, wanted, tmp_path):
    assert both(tmp_path, first, second) == wanted


@pytest.mark.parametrize("shape", [(3, 64, 64, 10), (6, 16, 8), (4, 8, 8, 6)])
def test_shapes_that_can_be_two_things_are_asked_about(shape, tmp_path):
    with pytest.raises(InputError, match="--channels or --no-channels"):
        both(tmp_path, shape, shape)
    assert both(tmp_path, shape, shape, channels=True) == (shape, shape)
    assert both(tmp_path, shape, shape, channels=False) == ((*shape, 1), (*shape, 1))
    frames = random(2, *shape)
    np.savez(tmp_path / "t.npz", trajectories=frames)
    with pytest.raises(InputError, match="--channels or --no-channels"):
        data.load(tmp_path / "t.npz")
    assert data.load(tmp_path / "t.npz", channels=True).sizes == shape[1:-1]
    assert data.load(tmp_path / "t.npz", channels=False).sizes == shape[1:]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    x = random(4, 8, 8, 6).astype(np.float32)
    data.Fields(x, x[..., :3], frames=2, step=3, trajectory=np.array([7, 7, 9, 9])).save(tmp_path / "a.npz")
    found = data.load(tmp_path / "a.npz")
    assert np.array_equal(found.inputs, x) and np.array_equal(found.targets, x[..., :3])
    assert (found.frames, found.step, found.trajectory.tolist()) == (2, 3, [7, 7, 9, 9])
    data.Fields(x, x).save(tmp_path / "b.npz")
    assert data.load(tmp_path / "b.npz").sizes == (8, 8) and data.load(tmp_path / "b.npz").trajectory is None
    with pytest.raises(InputError, match="expected --channels"):
        data.load(tmp_path / "b.npz", channels=False)


def test_no_trajectory_is_on_both_sides_of_a_split(tmp_path):
    np.savez(tmp_path / "t.npz", trajectories=random(5, 9, 8, 8))
    whole = data.load(tmp_path / "t.npz", context=2)
    # sample s of trajectory p is row s * 5 + p
    assert whole.inputs.shape == (35, 8, 8, 2) and np.array_equal(whole.trajectory, np.arange(35) % 5)
    whole.save(tmp_path / "windows.npz")
    for fields in (whole, data.load(tmp_path / "windows.npz"), whole.coarser(4)):
        training, testing = fields.split(0.2)
        assert set(training.trajectory) == {0, 1, 2, 3} and set(testing.trajectory) == {4} and len(testing) == 7
    training, testing = whole.split(2, seed=3)
    assert not set(training.trajectory) & set(testing.trajectory) and len(set(testing.trajectory)) == 2
    for wrong in (5, 0, 0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="5 trajectories"):
            whole.split(wrong)


def test_increments_and_what_follows(tmp_path):
    x = random(3, 7, 8, 8)
    np.savez(tmp_path / "t.npz", trajectories=x)
    whole, x = data.load(tmp_path / "t.npz", context=2), x.astype(np.float32)
    by_hand = [x[:, 2], x[:, 2] - x[:, 1], x[:, 2] - 2 * x[:, 1] + x[:, 0]]
    for order in (0, 1, 2):
        made = whole.increments(order)
        assert np.allclose(made.targets[:3, ..., 0], by_hand[order], atol=1e-5)
        assert np.allclose(made.targets + whole.base(order), whole.targets, atol=1e-5)
    rows, truth = whole.following(1, 9)
    assert np.array_equal(whole.inputs[rows], np.moveaxis(x[:, 1:3], 1, -1))
    assert np.array_equal(truth[..., 0], x[:, 3:])
    rows, truth = data.load(tmp_path / "t.npz", step=2).following(0, 2)
    assert np.array_equal(truth[..., 0], x[:, 2:5:2])
    # in another order, or of no trajectory, samples are pairs
    assert whole.take(np.arange(len(whole))[::-1]).following(0, 1) is None
    assert data.Fields(x, x).following(0, 1) is None
    with pytest.raises(InputError, match="start of 0 to 4"):
        whole.following(5, 1)
    with pytest.raises(InputError, match="2 or more frames"):
        data.load(tmp_path / "t.npz").increments(2)
    with pytest.raises(InputError, match="step of 1"):
        data.load(tmp_path / "t.npz", context=2, step=2).increments(2)


def test_real_files_where_they_are_at_hand():
    from isotone.shared.data import local

    path = local("operators/darcy_train_16.npz")
    if path is None:
        pytest.skip("needs operators/darcy_train_16.npz in ISOTONE_DATA_DIR")
    found = data.load(path)
    assert found.inputs.shape == found.targets.shape == (1000, 16, 16, 1)


def test_files_of_one_problem_are_one_set(tmp_path, monkeypatch):
    """Training and test files one after the other, with a digest that a report takes."""
    (tmp_path / "operators").mkdir()
    parts = {name: number + random(2, 4, 4) for number, name in enumerate(reproduce.FILES["darcy"])}
    for name, part in parts.items():
        np.savez(tmp_path / "operators" / name, x=part, y=2 * part)
    monkeypatch.setenv("ISOTONE_DATA_DIR", str(tmp_path))
    found = reproduce._at_hand(*reproduce.FILES["darcy"])
    assert found.inputs.shape == (4, 4, 4, 1)
    assert np.allclose(found.targets[2:, ..., 0], 2 * parts["darcy_test_16.npz"], atol=1e-6)
    measured = Measurement(Claim("a", "b", "c", "d", None, None, "min"), 1.0)
    entry = {"name": "darcy", "sha256": found.sha256}
    Report("transform-once", "reproduce", "smoke", (0,), "jax", measurements=[measured], data=[entry]).save(tmp_path)
    assert reproduce._at_hand("none.npz") is None


def test_pdebench_and_matlab_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    tensor = random(3, 6, 8, 8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["tensor"] = tensor
    found = data.load(tmp_path / "a.h5", context=2, step=3)
    assert found.inputs.shape == (6, 8, 8, 2) and found.frames == 2
    # windows of one time lie together
    assert np.allclose(found.inputs[3], np.moveaxis(tensor[0, 1:3], 0, -1), atol=1e-6)
    assert np.allclose(found.targets[3, ..., 0], tensor[0, 5], atol=1e-6)
    with pytest.raises(InputError, match="8 frames"):
        data.load(tmp_path / "a.h5", context=5, step=3)
    with h5py.File(tmp_path / "darcy.hdf5", "w") as file:
        file["nu"], file["tensor"] = random(3, 8, 8), tensor[:, :1]
    found = data.load(tmp_path / "darcy.hdf5")
    assert np.allclose(found.targets[..., 0], tensor[:, 0], atol=1e-6)
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        for number in range(2):
            file[f"{number:04d}/data"] = random(4, 8, 8, 2)
    assert data.load(tmp_path / "groups.h5").inputs.shape == (6, 8, 8, 2)
    a, u = random(3, 8, 9), random(3, 8, 9, 5)
    with h5py.File(tmp_path / "ns.mat", "w") as file:  # as MATLAB writes: axes reversed
        file["a"], file["u"] = a.transpose(2, 1, 0), u.transpose(3, 2, 1, 0)
    found = data.load(tmp_path / "ns.mat")
    assert np.allclose(found.inputs[..., 0], a, atol=1e-6) and np.allclose(found.targets[..., 0], u[..., -1], atol=1e-6)


def test_pdebench_flows(tmp_path):
    h5py = pytest.importorskip("h5py")
    for axes in (1, 2, 3):
        names = ["density", "pressure", "Vx", "Vy", "Vz"][: 2 + axes]
        parts = {name: random(2, 5, *(4, 6, 3)[:axes]) + number for number, name in enumerate(names)}
        with h5py.File(tmp_path / f"{axes}.hdf5", "w") as file:
            for name, part in parts.items():
                file[name] = part
            file["x-coordinate"], file["t-coordinate"] = np.arange(4.0), np.arange(6.0)
        found = data.load(tmp_path / f"{axes}.hdf5", context=2)
        assert found.inputs.shape == (6, *(4, 6, 3)[:axes], 2 * len(names)) and found.frames == 2
        wanted = np.stack([part[:, 2] for part in parts.values()], -1)
        assert np.allclose(found.targets[:2], wanted, atol=1e-6) and found.trajectory.tolist() == [0, 1] * 3
    with h5py.File(tmp_path / "2.hdf5", "a") as file:
        del file["Vy"]
    with pytest.raises(InputError, match="no Vy"):
        data.load(tmp_path / "2.hdf5")
    with h5py.File(tmp_path / "1.hdf5", "a") as file:
        del file["Vx"]
        file["Vx"] = random(2, 5, 3)
    with pytest.raises(InputError, match="one shape"):
        data.load(tmp_path / "1.hdf5")
    velocity, particles, force = random(2, 5, 4, 6, 2), random(2, 5, 4, 6, 1), random(2, 4, 6, 2)
    with h5py.File(tmp_path / "ns.h5", "w") as file:
        file["velocity"], file["particles"], file["force"], file["t"] = velocity, particles, force, np.ones((2, 5))
    found = data.load(tmp_path / "ns.h5")
    assert found.inputs.shape == (8, 4, 6, 5)
    assert np.allclose(found.targets[2:4], np.concatenate([velocity[:, 2], particles[:, 2], force], -1), atol=1e-6)


def test_both_forms_of_matlab_files(tmp_path):
    from scipy.io import savemat

    a, u = random(3, 8, 9), random(3, 8, 9, 5)
    line = random(4, 16)
    savemat(tmp_path / "ns.mat", {"a": a, "u": u, "t": np.arange(5.0)})
    found = data.load(tmp_path / "ns.mat")
    assert np.allclose(found.inputs[..., 0], a, atol=1e-6) and np.allclose(found.targets[..., 0], u[..., -1], atol=1e-6)
    savemat(tmp_path / "burgers.mat", {"a": line, "u": 2 * line})
    savemat(tmp_path / "darcy.mat", {"coeff": a, "sol": a + 1, "Kcoeff": a})
    assert np.allclose(data.load(tmp_path / "darcy.mat").targets[..., 0], a + 1, atol=1e-6)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "burgers73.mat", "w") as file:
        file["a"], file["u"] = line.T, 2 * line.T
    for name in ("burgers", "burgers73"):
        found = data.load(tmp_path / f"{name}.mat")
        assert np.allclose(found.inputs[..., 0], line, atol=1e-6) and found.sizes == (16,)
        assert np.allclose(found.targets, 2 * found.inputs, atol=1e-6)
    whole = (tmp_path / "ns.mat").read_bytes()
    (tmp_path / "torn.mat").write_bytes(whole[:300])
    with pytest.raises(InputError, match=r"torn\.mat"):
        data.load(tmp_path / "torn.mat")
    savemat(tmp_path / "complex.mat", {"a": line + 1j, "u": line})
    with pytest.raises(InputError, match="complex128"):
        data.load(tmp_path / "complex.mat")


def test_arrays_that_are_no_fields(tmp_path):
    """One sentence each, that names the file."""
    x, path = random(4, 8, 8), tmp_path / "bad.npz"
    about = {"about": np.array("{")}
    for arrays, words in (
        ({"x": x[:0], "y": x[:0]}, r"shape \(0, 8, 8\)"),
        ({"x": x[:, :0], "y": x[:, :0]}, r"shape \(4, 0, 8\)"),
        ({"x": random(2), "y": random(2)}, r"shape \(2,\)"),
        ({"x": random(2, 2, 2, 2, 2, 2), "y": random(2, 2, 2, 2, 2, 2)}, "1 to 3 axes"),
        ({"x": x, "y": x[:3]}, "one grid"),
        ({"x": x + 1j, "y": x}, "complex128"),
        ({"x": x * 1e300, "y": x}, "finite inputs"),
        ({"x": x.astype(str), "y": x}, "<U"),
        ({"x": x, "y": x, **about}, "JSON"),
        ({"x": x, "y": x, "about": np.array("[1]")}, "list"),
        ({"x": x, "y": x, "about": np.array('{"context": "two"}')}, "two"),
        ({"x": x, "y": x, "about": np.array('{"channels": 1}')}, "channels"),
        ({"x": x, "y": x, "trajectory": np.arange(3)}, "trajectory"),
        ({"trajectories": x[:0]}, r"shape \(0, 8, 8\)"),
        ({"trajectories": random(2, 5)}, r"shape \(2, 5\)"),
        ({"trajectories": random(2, 5, 0)}, r"shape \(2, 5, 0\)"),
        ({"trajectories": random(2, 3, 2, 2, 2, 2, 1)}, "trajectories"),
        ({"trajectories": x + 1j}, "complex128"),
        ({"trajectories": x * np.inf}, "finite trajectories"),
        ({"trajectories": x.astype(int)}, "int64"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=words) as caught:
            data.load(path)
        assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)
    np.savez(path, x=x, y=x)
    for name in ("context", "step"):
        with pytest.raises(InputError, match=f"no --{name}"):
            data.load(path, **{name: 1})


def test_a_flipped_byte_is_one_sentence_or_nothing(tmp_path):
    """At any place of a file; a container without checksums may still give numbers."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    x = random(4, 8, 8)
    np.savez_compressed(tmp_path / "whole.npz", x=x, y=x)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_dataset("tensor", data=random(3, 4, 8), compression="gzip")
    refused = 0
    for suffix in (".npz", ".h5"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        for place in rng.integers(0, len(whole), 150):
            flipped = bytearray(whole)
            flipped[place] ^= 0xFF
            (tmp_path / f"flipped{suffix}").write_bytes(flipped)
            try:
                data.load(tmp_path / f"flipped{suffix}")
            except InputError as error:
                refused += 1
                assert "flipped" in str(error)
    assert refused > 100
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["tensor"] = np.array([[b"a", b"b"]])
    with pytest.raises(InputError, match="tensor|trajectories"):
        data.load(tmp_path / "text.h5")


def test_torch_files_are_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(random(3, 9, 9)).float()
    torch.save({"x": x, "y": x + 1}, tmp_path / "a.pt")
    found = data.load(tmp_path / "a.pt")
    assert np.allclose(found.targets - found.inputs, 1)
    # what NumPy does not know by itself, and what has no numbers to give
    torch.save({"x": x.requires_grad_(), "y": x.detach().bfloat16()}, tmp_path / "b.pt")
    assert np.allclose(*(getattr(data.load(tmp_path / "b.pt"), name) for name in ("inputs", "targets")), atol=0.02)
    x = x.detach()
    for odd, words in ((x.to_sparse(), "sparse"), (x.to("meta"), "meta"), (x + 1j, "complex"), (x.int(), "int32")):
        torch.save({"x": odd, "y": x}, tmp_path / "odd.pt")
        with pytest.raises(InputError, match=words):
            data.load(tmp_path / "odd.pt")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="tensors alone"):
        data.load(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()
    torch.save([x], tmp_path / "list.pt")
    with pytest.raises(InputError, match="dict"):
        data.load(tmp_path / "list.pt")
    (tmp_path / "torn.pt").write_bytes(b"\x80\x04junk")
    with pytest.raises(InputError, match=r"torn\.pt"):
        data.load(tmp_path / "torn.pt")


class Evil:
    """What a pickle can do and a restricted reader must not."""

    def __reduce__(self):
        return eval, ("1 + 1",)


def test_splits_and_coarser_grids():
    made = data.generate("joukowski", 10, 16, seed=3)
    training, testing = made.split(0.3)
    assert len(training) == 7 and np.array_equal(testing.inputs, made.inputs[7:])
    shuffled, _ = made.split(3, seed=1)
    assert not np.array_equal(shuffled.inputs, training.inputs)
    assert np.array_equal(made.coarser(8).inputs, made.inputs[:, ::2, ::2])
    for call, words in (
        (lambda: made.split(10), "10"),
        (lambda: made.split(0.0), "0.0"),
        (lambda: made.coarser(5), "divides"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_generated_fields_survive_a_file(tmp_path):
    made = data.generate("plume", 2, 8, seed=1, frames=4)
    assert made.inputs.shape == (4, 16, 8, 2) and made.targets.shape == (4, 16, 8, 1) and made.frames == 2
    # the second context frame of one window is the first of the next
    assert np.array_equal(made.inputs[0, ..., 1], made.inputs[2, ..., 0])
    assert np.array_equal(made.targets[0, ..., 0], made.inputs[2, ..., 1])
    made.save(tmp_path / "deep" / "fields.npz")
    again = data.load(tmp_path / "deep" / "fields.npz")
    assert np.array_equal(again.inputs, made.inputs) and again.frames == 2 and again.about["problem"] == "plume"
    again = data.generate("navier-stokes", 2, 8, seed=1, t_final=0.1)
    assert np.array_equal(again.targets, data.generate("navier-stokes", 2, 8, seed=1, t_final=0.1).targets)


@pytest.mark.parametrize(
    "config",
    [
        T1Config(modes=(4, 4), width=3, depth=1, sizes=(8, 8), head_scale=0.1),
        pytest.param(FNOConfig(modes=(3, 3), width=3, depth=1, head_width=4), marks=pytest.mark.slow),
    ],
    ids=["t1", "fno"],
)
def test_exported_models_run_alone(config, tmp_path):
    """In a process that never imports this package: the same fields, for any number of samples."""
    model = make_model(config)
    path = export_model(model, (8, 8), tmp_path / "m.jax")
    x = random(3, 8, 8, 1).astype(np.float32)
    wanted = model.predict(x)
    assert np.allclose(load_exported(path)(x[:2]), wanted[:2], atol=1e-6)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, json, numpy as np\nfrom jax import export\n"
        f"made = export.deserialize(bytearray(open({str(path)!r}, 'rb').read()))\n"
        f"x = np.load({str(tmp_path / 'x.npy')!r})\n"
        "assert not any(name.startswith('isotone') for name in sys.modules)\n"
        "print(json.dumps(np.asarray(made.call(x)).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert np.allclose(np.array(json.loads(done.stdout)), wanted, atol=1e-6)


def test_refused_exports(tmp_path):
    model = make_model(T1Config(modes=(4, 4), width=3, depth=1, sizes=(8, 8)))
    with pytest.raises(InputError, match="2 sizes"):
        export_model(model, (8,), tmp_path / "m.jax")
    with pytest.raises(InputError, match="found no file"):
        load_exported(tmp_path / "m.jax")
    (tmp_path / "m.jax").write_bytes(b"not a model")
    with pytest.raises(InputError, match="whole exported model"):
        load_exported(tmp_path / "m.jax")
