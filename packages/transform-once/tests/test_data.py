"""Fields from files of every form, and from the solvers; exported models."""

import json
import subprocess
import sys

import numpy as np
import pytest

from isotone.shared.errors import InputError
from isotone.transform_once import FNOConfig, T1Config, data, make_model
from isotone.transform_once.export import export_model, load_exported


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_npz_with_and_without_channels(tmp_path):
    x = random(5, 12, 10)
    np.savez(tmp_path / "a.npz", x=x, y=2 * x)
    found = data.load(tmp_path / "a.npz")
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


def test_real_files_where_they_are_at_hand():
    from isotone.shared.data import local

    path = local("operators/darcy_train_16.npz")
    if path is None:
        pytest.skip("needs operators/darcy_train_16.npz in ISOTONE_DATA_DIR")
    found = data.load(path)
    assert found.inputs.shape == found.targets.shape == (1000, 16, 16, 1)


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


def test_torch_files_are_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(random(3, 9, 9)).float()
    torch.save({"x": x, "y": x + 1}, tmp_path / "a.pt")
    found = data.load(tmp_path / "a.pt")
    assert np.allclose(found.targets - found.inputs, 1)
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
