"""The fused write, in Triton's interpreter, against loops and against the plain path."""

import json
import os
import subprocess
import sys

import pytest
import reference
import torch
import workers

from isotone.swiftkv import kernels
from isotone.swiftkv.cache import SwiftKVCache


def test_cpu_tensors_take_the_plain_path():
    cache = workers.cache("model")
    assert not kernels.can_write(torch.zeros(1, 4), (torch.zeros(1), torch.zeros(1)), cache, None)


def test_plain_path_equals_the_loops():
    projected, cos, sin, rows, positions = workers.tokens()
    cache = workers.cache("fp32")
    keys, values = workers.plain(cache, projected, cos, sin, rows, positions)
    wanted = reference.rope_write(projected, cos, sin, rows, positions, 3, 2, 8, 2, 10)
    torch.testing.assert_close(keys[1:], wanted[0])
    torch.testing.assert_close(values[1:], wanted[1])


@pytest.mark.skipif(not kernels.HAVE_TRITON, reason="no triton on this platform")
def test_triton_writes_what_the_plain_path_writes():
    """One process of its own: the interpreter is chosen before triton's functions are made."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, workers.__file__], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"model", "fp32", "bf16", "fp16", "fp8", "int8"}
    assert found["fp32"] < 1e-6 and found["model"] < 1e-6
    # the last bit of the stored type, where fp32 sums round apart
    assert found["bf16"] < 2**-6 and found["fp16"] < 2**-9 and found["fp8"] < 0.02 and found["int8"] < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["model", "bf16", "fp8", "int8"])
def test_on_a_gpu(kv_dtype):  # pragma: no cover - needs a GPU
    assert workers.difference(kv_dtype, "cuda") < 0.3


def test_a_cache_is_a_cache():
    assert isinstance(workers.cache("int8"), SwiftKVCache)
