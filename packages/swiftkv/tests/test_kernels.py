"""The fused write, in Triton's interpreter, against loops and against the plain path."""

import compiled
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
    found = compiled.found()["kernel"]
    assert set(found) == {"model", "fp32", "bf16", "fp16", "fp8", "int8"}
    assert found["fp32"] < 1e-6 and found["model"] < 1e-6
    # the last bit of the stored type, where fp32 sums round apart
    assert found["bf16"] < 2**-6 and found["fp16"] < 2**-9 and found["int8"] < 0.03
    # the interpreter's cast is not a GPU's: what differs is where it is known to round otherwise, and only there
    assert found["fp8"]["unexplained"] == 0 < found["fp8"]["different"]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["model", "bf16", "fp8", "int8"])
def test_on_a_gpu(kv_dtype):  # pragma: no cover - needs a GPU
    assert workers.difference(kv_dtype, "cuda") < 0.3


def test_a_cache_is_a_cache():
    assert isinstance(workers.cache("int8"), SwiftKVCache)
