"""Our FNO beside neuraloperator's: the same numbers of modes, and of one layer the same arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from isotone.transform_once import peers, speed
from isotone.transform_once.fno import SpectralConv
from isotone.transform_once.training import TrainConfig

pytest.importorskip("neuralop")


@pytest.mark.slow
@pytest.mark.parametrize("sizes,modes", [((8, 8), (2, 3)), ((16,), (5,))])
def test_a_spectral_convolution_is_neuraloperators(sizes, modes):
    import torch
    from neuralop.layers.spectral_convolution import SpectralConv as Theirs

    ours = SpectralConv(modes, 3, 4, init="kaiming", n_total=64, fft="fft", rngs=nnx.Rngs(0))
    theirs = Theirs(3, 4, (*(2 * m for m in modes[:-1]), 2 * modes[-1] - 1), bias=False, fft_norm="ortho")
    weight = np.asarray(ours.mixing.value[...])
    block = (weight[..., 0] + 1j * weight[..., 1]).reshape(*(2 * m for m in modes[:-1]), modes[-1], 3, 4)
    # theirs is ordered by frequency, from the most negative on
    for axis, m in enumerate(modes[:-1]):
        block = np.roll(block, m, axis)
    wanted = np.moveaxis(block, (-2, -1), (0, 1))
    own = theirs.weight.to_tensor() if hasattr(theirs.weight, "to_tensor") else theirs.weight
    assert tuple(own.shape) == wanted.shape
    with torch.no_grad():
        theirs.weight.tensor.copy_(torch.from_numpy(np.ascontiguousarray(wanted)))
    x = np.random.default_rng(0).standard_normal((2, *sizes, 3)).astype(np.float32)
    found = theirs(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))).detach().numpy()
    assert np.abs(np.moveaxis(found, 1, -1) - np.asarray(ours(jnp.asarray(x)))).max() < 1e-5


@pytest.mark.slow
def test_a_trainer_has_our_modes():
    x, y = speed.fields(8, 4)
    made = peers.NeuralopTrainer(x, y, TrainConfig(batch_size=4), modes=(2, 3), width=5, depth=1)
    shapes = [tuple(p.shape) for p in made.model.parameters() if p.is_complex()]
    assert shapes == [(5, 5, 4, 3)]
