"""What every model offers a user: fields in, `fit`, `predict`, `rollout`, and a folder that opens again.

A model is a flax nnx module; `Operator` adds what does not depend on which. Fields are (samples, N1, .., Nd, channels),
floats, channels last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError, check_count
from isotone.transform_once.config import OperatorConfig, from_dict


class Unit(nnx.Variable):
    """Shift and scale of channels: set by data, never by an optimizer."""


class Operator(nnx.Module):
    """Base of T1, T1U, MLP, FNO, FFNO and UNet."""

    config: OperatorConfig

    def _begin(self, config: OperatorConfig) -> None:
        """Shifts 0 and scales 1 of the channels: the model sees fields as they are."""
        self.config = config
        self.in_shift, self.in_scale = Unit(jnp.zeros(config.in_channels)), Unit(jnp.ones(config.in_channels))
        self.out_shift, self.out_scale = Unit(jnp.zeros(config.out_channels)), Unit(jnp.ones(config.out_channels))

    def __call__(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        """Fields to fields, on any grid that holds the modes."""
        self.check_fields(fields)
        return self.restored(self.apply(self.standardized(fields)))

    def apply(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... D"]:
        """The network: standardised fields in and out."""
        raise NotImplementedError

    def set_units(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Standardise from now on: each channel of inputs and targets by its mean and deviation in these fields.

        T1's sine of large coefficients saturates (section 2.6), so that data in other units than about 1 need it. A
        channel that is constant keeps its scale.
        """
        for shift, scale, fields in (
            (self.in_shift, self.in_scale, inputs),
            (self.out_shift, self.out_scale, targets),
        ):
            flat = np.asarray(fields, np.float64).reshape(-1, np.shape(fields)[-1])
            deviation = flat.std(0)
            shift[...] = jnp.asarray(flat.mean(0), jnp.float32)
            scale[...] = jnp.asarray(np.where(deviation > 0, deviation, 1.0), jnp.float32)

    def standardized(self, fields: Array) -> Array:
        """Inputs as the network sees them."""
        return (fields - self.in_shift[...].astype(fields.dtype)) / self.in_scale[...].astype(fields.dtype)

    def restored(self, fields: Array) -> Array:
        """The network's fields in the targets' units."""
        return fields * self.out_scale[...].astype(fields.dtype) + self.out_shift[...].astype(fields.dtype)

    def check_fields(self, fields: Any, what: str = "inputs", channels: int | None = None) -> None:
        """Raises `InputError` on anything but floating fields (B, N1, .., Nd, C) with the right d and C."""
        config = self.config
        wanted = config.in_channels if channels is None else channels
        if fields.ndim != config.dims + 2 or fields.shape[-1] != wanted:
            shape = f"(samples, {', '.join(f'N{a + 1}' for a in range(config.dims))}, {wanted})"
            raise InputError(f"expected {what} of shape {shape}, got {tuple(fields.shape)}")
        if not jnp.issubdtype(fields.dtype, jnp.floating):
            raise InputError(f"expected {what} of real floating-point numbers, got {fields.dtype}")

    def with_coordinates(self, fields: Float[Array, "B ... C"]) -> Float[Array, "B ... E"]:
        """The fields with d coordinate channels behind them."""
        from isotone.transform_once.t1 import coordinates

        channels = jnp.asarray(coordinates(fields.shape[1:-1], self.config.grid), fields.dtype)
        return jnp.concatenate([fields, jnp.broadcast_to(channels, (fields.shape[0], *channels.shape))], -1)

    def parameters(self) -> int:
        """How many real numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def fit(self, inputs: np.ndarray, targets: np.ndarray, **settings: Any) -> Any:
        """Train in place on fields; `settings` as `training.fit`. Gives its `History`."""
        from isotone.transform_once.training import fit

        return fit(self, inputs, targets, **settings)

    def predict(self, inputs: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """Fields of the targets' shape, in batches. Raises `InputError` on fields that do not fit or are not finite."""
        check_count("batch_size", batch_size)
        inputs = np.asarray(inputs)
        self.check_fields(inputs)
        check_finite("inputs", inputs)
        graph, state = nnx.split(self.evaluating())
        found = []
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            whole = np.concatenate([batch, np.repeat(batch[:1], min(batch_size, len(inputs)) - len(batch), 0)])
            found.append(np.asarray(_predict(graph, state, jnp.asarray(whole)))[: len(batch)])
        return np.concatenate(found) if found else np.zeros((0, *inputs.shape[1:-1], self.config.out_channels))

    def rollout(self, frames: np.ndarray, steps: int, order: int = 0, domain: str = "auto") -> np.ndarray:
        """`steps` frames after the context `frames` (B, context, N1, .., Nd, channels); see `rollout.rollout`."""
        from isotone.transform_once.rollout import rollout

        return rollout(self, frames, steps, order, domain)

    def evaluating(self) -> Operator:
        """A copy of the module with running statistics and no dropout; the module itself stays as it is."""
        copy = nnx.clone(self)
        copy.eval()
        return copy

    def save(self, folder: str | Path) -> None:
        """`model.safetensors` and `config.json`, each written whole before it takes the old one's place."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.asarray(value) for name, value in flat_state(self).items()}
        atomic_write(folder / "model.safetensors", save(arrays))
        atomic_write(folder / "config.json", (json.dumps(self.config.to_dict(), indent=2) + "\n").encode())

    @staticmethod
    def load(folder: str | Path) -> Operator:
        """The model that `save` wrote. Raises `InputError` on files that are missing, torn, or of another model."""
        from isotone.transform_once.models import make_model

        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"expected {name} in {str(folder)!r}, found none")
        try:
            config = json.loads((folder / "config.json").read_text())
            arrays = load_file(folder / "model.safetensors")
        except (ValueError, SafetensorError) as error:
            raise InputError(f"expected a whole model in {str(folder)!r}: {error}") from None
        if not isinstance(config, dict):
            raise InputError(f"expected an object in config.json of {str(folder)!r}, got {type(config).__name__}")
        try:
            model = make_model(from_dict(config))
        except InputError as error:
            raise InputError(f"{error}, in config.json of {str(folder)!r}") from None
        set_flat_state(model, arrays)
        return model


@nnx.jit(static_argnums=0)
def _predict(graph: Any, state: Any, fields: Array) -> Array:
    return nnx.merge(graph, state)(fields)


def flat_state(model: nnx.Module) -> dict[str, Array]:
    """Every variable of a module by its dotted path."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def set_flat_state(model: nnx.Module, arrays: dict[str, Any]) -> None:
    """Put `flat_state`'s arrays back. Raises `InputError` where names or shapes are not the model's."""
    own = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    if own.keys() != arrays.keys():
        odd = sorted(own.keys() ^ arrays.keys())
        raise InputError(f"expected the model's own weights, got a difference in {', '.join(odd[:3])}")
    for name, leaf in own.items():
        if leaf[...].shape != arrays[name].shape:
            raise InputError(f"expected {name} of shape {leaf[...].shape}, got {arrays[name].shape}")
        leaf[...] = jnp.asarray(arrays[name])


def check_finite(what: str, values: np.ndarray) -> None:
    """Raises `InputError` on NaN or infinity, naming the first sample that has one."""
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise InputError(f"expected finite {what}, got NaN or infinity in sample {int(np.argmin(finite))}")
