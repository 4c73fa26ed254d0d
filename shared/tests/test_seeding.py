"""The generators go back to where they were, bit for bit, through JSON."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from isotone.shared.errors import InputError
from isotone.shared.seeding import rng_state, seed_everything, set_rng_state


def draw() -> list:
    """Draws that also use the normal that Python's and NumPy's generators keep back."""
    python = [random.random(), random.gauss(0, 1), random.getrandbits(64)]
    return [*python, np.random.normal(size=3).tolist(), np.random.rand(), torch.randn(3).tolist()]


@pytest.mark.parametrize("odd", [0, 1])
def test_state_round_trip(odd: int) -> None:
    seed_everything(11)
    draw()
    for _ in range(odd):
        random.gauss(0, 1), np.random.normal()
    state = json.dumps(rng_state(), allow_nan=False)
    expected = [draw() for _ in range(3)]
    seed_everything(12)
    assert draw() != expected[0]
    set_rng_state(json.loads(state))
    assert json.dumps(rng_state()) == state
    assert [draw() for _ in range(3)] == expected


def test_one_seed_for_all() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match="expected a seed"):
            seed_everything(seed)


def test_a_spoilt_state_is_refused() -> None:
    good = rng_state()
    for spoilt in ({}, {**good, "python": [3, [1, 2], None]}, {**good, "numpy": None}, {**good, "torch": "AAAA"}):
        with pytest.raises(InputError, match="rng_state"):
            set_rng_state(spoilt)


def test_torch_is_not_imported_for_it() -> None:
    code = (
        "import sys\nfrom isotone.shared import seeding\nseeding.seed_everything(1)\n"
        "state = seeding.rng_state()\nseeding.set_rng_state(state)\n"
        "assert 'torch' not in sys.modules and set(state) == {'python', 'numpy'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
