"""The Triton kernels, in Triton's interpreter on a CPU, against the plain forms."""

import os
import subprocess
import sys

import pytest
import torch

from isotone.normuon import kernels

CODE = """
import torch
from isotone.normuon import kernels
torch.manual_seed(0)
x, a = torch.randn(2, 45, 70), torch.randn(2, 45, 45)
a = a + a.mT
assert kernels.use_triton(x)
assert torch.allclose(kernels.symmetric_product(x), x @ x.mT, atol=1e-4)
assert torch.allclose(kernels.symmetric_product(x.mT[:, :40]), x.mT[:, :40] @ x.mT[:, :40].mT, atol=1e-4)
both = kernels.symmetric_product(x, alpha=0.5, add=a, beta=2.0)
assert torch.allclose(both, 0.5 * x @ x.mT + 2 * a, atol=1e-4)
for cautious in (False, True):
    w, o, s = torch.randn(33, 70), torch.randn(33, 70), torch.rand(33, 1)
    kept = torch.where(o * w > 0, 0.9 * w, w) if cautious else 0.9 * w
    expected = kept - s * o
    kernels.apply_update([w], o[None], s[None], 0.1, cautious)
    assert torch.allclose(w, expected, atol=1e-6)
print("agrees")
"""


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed on this system")
def test_triton_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "agrees", done.stderr


@pytest.mark.parametrize("rows", [7, 600])
def test_plain_symmetric_product(rows):
    x = torch.randn(2, rows, 90, dtype=torch.float64)
    add = x @ x.mT
    assert torch.allclose(kernels.symmetric_product(x), add)
    assert torch.allclose(kernels.symmetric_product(x, 0.5), 0.5 * add)
    assert torch.allclose(kernels.symmetric_product(x, 2.0, add, 3.0), 5 * add)


@pytest.mark.gpu
def test_triton_kernels_on_a_gpu():
    x = torch.randn(3, 300, 700, device="cuda", dtype=torch.bfloat16)
    expected = (x.float() @ x.float().mT).bfloat16()
    assert (kernels.symmetric_product(x) - expected).abs().max() / expected.abs().max() < 2e-2
    both = kernels.symmetric_product(x, alpha=0.5, add=expected, beta=2.0)
    assert (both - 2.5 * expected).abs().max() / expected.abs().max() < 5e-2
    w, o, s = (torch.randn(3, 300, n, device="cuda") for n in (700, 700, 1))
    plain = w.clone()
    kernels.apply_update(list(w), o, s.abs(), 0.1, True)
    for i in range(3):
        kernels._plain_update(plain[i], o[i], s[i].abs(), 0.1, True)
    assert torch.allclose(w, plain, atol=1e-5)


@pytest.mark.gpu
def test_a_step_on_a_gpu_equals_one_on_a_cpu():
    from isotone.normuon import NorMuon

    torch.manual_seed(0)
    weights, gradients = torch.randn(4, 96, 64), torch.randn(4, 96, 64)
    results = []
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(w.to(device)) for w in weights]
        optimizer = NorMuon(parameters, ns_dtype=torch.float32)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.to(device)
            optimizer.step()
        results.append(torch.stack([p.detach().cpu() for p in parameters]))
    assert (results[0] - results[1]).abs().max() < 1e-5
