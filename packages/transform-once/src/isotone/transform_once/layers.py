"""Layers on a spectrum: channel mixing per mode, mixing along each frequency axis; and the dense ones around them.

Inside, a block of modes is mode-major, (m1, .., md, B, C): channel mixing is then one batched matrix product over the
modes, which is what XLA runs well on CPU and GPU alike. Weights are (M, C_in, C_out) with M = m1 .. md, and (C, m, m)
for each axis; complex ones carry a last axis of 2, so that an optimizer sees real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Inexact

from isotone.shared.errors import InputError
from isotone.transform_once.initializers import mixing_scale, normal, uniform
from isotone.transform_once.transforms import unpack


def activation(name: str) -> Callable[[Array], Array]:
    """By name; on complex numbers it acts on real and imaginary parts apart."""
    known: dict[str, Callable[[Array], Array]] = {
        "gelu": jax.nn.gelu,
        "sin": jnp.sin,
        "relu": jax.nn.relu,
        "identity": lambda x: x,
    }
    function = known[name]

    def act(x: Array) -> Array:
        return jax.lax.complex(function(x.real), function(x.imag)) if jnp.iscomplexobj(x) else function(x)

    return act


class Weight(nnx.Module):
    """An array of normal numbers of a deviation, real or complex."""

    def __init__(self, shape: tuple[int, ...], deviation: float, complex_weights: bool, rngs: nnx.Rngs) -> None:
        self.complex_weights = complex_weights
        self.value = nnx.Param(normal(rngs.params(), (*shape, 2) if complex_weights else shape, deviation))

    def __call__(self, dtype: jnp.dtype) -> Array:
        """The array in a computing type; complex ones stay complex64 or wider."""
        value = self.value[...]
        return unpack(value) if self.complex_weights else value.astype(dtype)


class T1Layer(nnx.Module):
    """One layer of T1 on a block of modes (section 2.3, step 3): per-mode channel mixing, activation, a dense mixing
    along each frequency axis, and the residual. There is no activation after the frequency mixing.

    `block`: the modes of each axis (m1, .., md). `n_total`: points of the grid, for "vp". Raises `InputError` on a
    residual between different widths.
    """

    def __init__(
        self,
        block: tuple[int, ...],
        in_width: int,
        out_width: int,
        *,
        rngs: nnx.Rngs,
        n_total: int,
        init: str = "vp",
        act: str = "gelu",
        residual: bool = True,
        complex_weights: bool = False,
    ) -> None:
        if residual and in_width != out_width:
            raise InputError(f"expected equal widths with residual, got {in_width} and {out_width}")
        m_total = math.prod(block)
        # each mode of the real FFT that is kept stands for two
        stands = min(2 * m_total if complex_weights else m_total, n_total)
        deviation = mixing_scale(init, in_width, out_width, n_total, stands, complex_weights)
        self.residual, self.act = residual, act
        self.mixing = Weight((m_total, in_width, out_width), deviation, complex_weights, rngs)
        # frequency mixing is always the Kaiming form with fan-in m
        self.frequency = nnx.List(
            [
                Weight((out_width, m, m), 1 / math.sqrt(2 * m if complex_weights else m), complex_weights, rngs)
                for m in block
            ]
        )

    def __call__(self, r: Inexact[Array, "... B C"]) -> Inexact[Array, "... B D"]:
        """The block after the layer, mode-major in and out."""
        block, (batch, channels) = r.shape[:-2], r.shape[-2:]
        q = jnp.matmul(r.reshape(-1, batch, channels), self.mixing(r.dtype))
        q = activation(self.act)(q).reshape(*block, batch, -1)
        for axis, weight in enumerate(self.frequency):
            q = mix_axis(q, weight(r.dtype), axis)
        return q + r if self.residual else q


def mix_axis(q: Inexact[Array, "... B C"], weight: Inexact[Array, "C m k"], axis: int) -> Inexact[Array, "... B C"]:
    """q[.., o, .., b, c] = sum_x q[.., x, .., b, c] S[c, x, o] along one frequency axis."""
    before, after = math.prod(q.shape[:axis]), math.prod(q.shape[axis + 1 : -1])
    shaped = q.reshape(before, q.shape[axis], after, q.shape[-1])
    mixed = jnp.einsum("pxac,cxo->poac", shaped, weight)
    return mixed.reshape(*q.shape[:axis], weight.shape[-1], *q.shape[axis + 1 :])


class Dense(nnx.Module):
    """x W + b over the last axis; `deviation` of the weights, uniform as torch's where it is None."""

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, bias: bool = True, deviation: float | None = None
    ) -> None:
        limit = 1 / math.sqrt(inputs)
        if deviation is None:
            kernel = uniform(rngs.params(), (inputs, outputs), limit)
        else:
            kernel = normal(rngs.params(), (inputs, outputs), deviation)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(uniform(rngs.params(), (outputs,), limit)) if bias else None

    def __call__(self, x: Inexact[Array, "... inputs"]) -> Inexact[Array, "... outputs"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Head(nnx.Module):
    """sin(z Fc1) Fc2 at each mode, no biases (section 2.3, step 4): a mode that is 0 stays 0, so that the block alone
    is computed."""

    def __init__(self, width: int, hidden: int, outputs: int, scale: float, *, rngs: nnx.Rngs) -> None:
        self.first = Dense(width, hidden, rngs=rngs, bias=False, deviation=scale)
        self.second = Dense(hidden, outputs, rngs=rngs, bias=False, deviation=scale)

    def __call__(self, z: Float[Array, "... W"] | Inexact[Array, "... W"]) -> Inexact[Array, "... out"]:
        return self.second(activation("sin")(self.first(z)))
