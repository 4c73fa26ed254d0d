"""A training run as a checkpoint has it: weights, optimizer, generators, buffer, memo; and back.

`gfn` is a `GFlowNet`, whose module imports this one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

from torch import Tensor

from isotone.shared.errors import InputError


def weights(gfn: Any) -> dict[str, Tensor]:
    """The tensors of policy and log Z, by name, on the CPU."""
    found = {f"policy.{name}": tensor for name, tensor in gfn.policy.state_dict().items()}
    found |= {f"log_z.{name}": tensor for name, tensor in gfn.log_z.state_dict().items()}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def load_weights(gfn: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Put them back. Raises `InputError` where they are of another environment or policy."""
    for prefix, module in (("policy.", gfn.policy), ("log_z.", gfn.log_z)):
        part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise InputError(f"expected weights of this environment and policy in {where!r}: {said}") from None
    if gfn.config.ema:
        gfn.sampling_policy.load_state_dict(gfn.policy.state_dict())


def identity(gfn: Any) -> dict[str, Any]:
    """What a run is: settings, environment and the objectives' names, as JSON gives them back."""
    simple = (bool, int, float, str, tuple)
    env: dict[str, Any] = {name: value for name, value in vars(gfn.env).items() if isinstance(value, simple)}
    env["type"] = type(gfn.env).__name__
    if (vocabulary := getattr(gfn.env, "vocabulary", None)) is not None:
        env["vocabulary"] = [vocabulary.smiles, vocabulary.stems]
    env["objective_names"] = getattr(gfn.memo.objective, "names", None) if gfn.memo is not None else None
    env["objective"] = "an order" if gfn.memo is None else function_id(gfn.memo.objective)
    return json.loads(json.dumps({**gfn.get_params(), "env": env}))


def function_id(function: Any) -> str:
    """What a function is called and, of a Python one, a digest of what it does: another objective under the same name
    is another run. What it reads from elsewhere is not seen."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    code = getattr(inner, "__code__", None)
    if code is None:
        return name
    digest = hashlib.sha256()
    parts = [code]
    while parts:  # with the comprehensions and functions inside
        part = parts.pop()
        inside = [value for value in part.co_consts if inspect.iscode(value)]
        plain = [value for value in part.co_consts if isinstance(value, (int, float, str, bytes, tuple, type(None)))]
        digest.update(part.co_code + repr((part.co_names, plain)).encode())
        parts += inside
    return f"{name} {digest.hexdigest()[:12]}"


def snapshot(gfn: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and JSON state from which training goes on bit for bit."""
    arrays: dict[str, Any] = dict(weights(gfn))
    if gfn.config.ema:
        arrays |= {f"ema.{name}": tensor for name, tensor in gfn.sampling_policy.state_dict().items()}
    for number, values in gfn.optimizer.state_dict()["state"].items():
        arrays |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    arrays["generator"] = gfn.generator.get_state()
    arrays["shared_generator"] = gfn.shared_generator.get_state()
    state: dict[str, Any] = {"identity": identity(gfn), "step": gfn.step, "history": gfn.history}
    state["baseline"] = gfn._baseline
    more, state["buffer"] = gfn.buffer.state()
    arrays |= {f"buffer.{name}": array for name, array in more.items()}
    if gfn.memo is not None:
        more, state["memo"] = gfn.memo.state()
        arrays |= {f"memo.{name}": array for name, array in more.items()}
    return arrays, state


def restore(gfn: Any, arrays: dict[str, Any], state: dict[str, Any], where: str) -> None:
    """Put back what `snapshot` gave. Raises `InputError` where it is of another run."""
    saved, ours = state["identity"], identity(gfn)
    for part in ours:
        for key, value in ours[part].items():
            if saved.get(part, {}).get(key) != value:
                was = saved.get(part, {}).get(key)
                raise InputError(
                    f"expected to resume the run in {where!r} with its {key} {was}, got {value}; or start anew"
                )

    def under(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    load_weights(gfn, arrays, where)
    if gfn.config.ema:
        gfn.sampling_policy.load_state_dict(under("ema."))
    document = gfn.optimizer.state_dict()
    for name, value in under("optimizer.").items():
        number, key = name.split(".", 1)
        document["state"].setdefault(int(number), {})[key] = value
    gfn.optimizer.load_state_dict(document)
    gfn.generator.set_state(arrays["generator"])
    gfn.shared_generator.set_state(arrays["shared_generator"])
    gfn.history, gfn._baseline = list(state["history"]), state["baseline"]
    gfn.step = state["step"]
    gfn.buffer.restore(under("buffer."), state["buffer"])
    if gfn.memo is not None and "memo" in state:
        gfn.memo.restore(under("memo."), state["memo"])
