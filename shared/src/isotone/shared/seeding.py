"""One seed for every source of randomness in a process, and their states in and out as JSON."""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Mapping
from typing import Any

from isotone.shared.errors import InputError


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy's global generator and, where it is imported, torch on every device.

    JAX has no global generator: make its key from the same number, `jax.random.key(seed)`.
    """
    import numpy as np

    if not 0 <= seed < 2**32:
        raise InputError(f"expected a seed from 0 to 2**32 - 1, got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of the generators that `seed_everything` seeds, as JSON can say them."""
    import numpy as np

    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    if torch := sys.modules.get("torch"):
        state["torch"] = _encode(torch.get_rng_state())
        if torch.cuda.is_available():  # pragma: no cover - needs a GPU
            state["cuda"] = [_encode(device) for device in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` gave; torch is imported where the state holds its part.

    Raises `InputError` for anything else. CUDA states are put back on as many devices as there are.
    """
    import numpy as np

    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
        if "torch" in state:
            import torch

            torch.set_rng_state(_decode(state["torch"]))
            cuda = state.get("cuda", [])[: torch.cuda.device_count()]
            for device, text in enumerate(cuda):  # pragma: no cover - needs a GPU
                torch.cuda.set_rng_state(_decode(text), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"expected a state that rng_state gave, got another ({error})") from None


def _encode(state: Any) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
