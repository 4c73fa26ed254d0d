"""Every Triton kernel beside the plain form: in Triton's interpreter, in a process of its own, and on a GPU.

The interpreter is chosen before triton's functions are made. The process prints, as JSON, how far the two are apart in
each case: `equal` for codes and sums that must be the same, `codes` for the largest difference of int8 codes and the
part of them that differs, `off` for floats, relative to the largest number.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isotone.quamba2 import gated_norm, hadamard, linear, packing, ssd, triton_kernels, triton_linear


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def int8(*shape, seed=0):
    return torch.randint(-127, 128, shape, generator=seeded(seed), dtype=torch.int8)


def off(found, wanted):
    return {"off": float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())}


def codes(found, wanted):
    apart = (found.int() - wanted.int()).abs()
    assert int(wanted.abs().max()) > 20
    return {"codes": int(apart.max()), "part": float((apart > 0).float().mean())}


class Both:
    """Runs a public function on `device` and, with the kernels switched off, on the CPU."""

    def __init__(self, device):
        self.device = device

    def move(self, value):
        if isinstance(value, ssd.ScanScales):
            return ssd.ScanScales(**{name: self.move(kept) for name, kept in vars(value).items()})
        return value.to(self.device, copy=True) if isinstance(value, torch.Tensor) else value

    def __call__(self, function, *args, **options):
        found = function(*map(self.move, args), **{name: self.move(value) for name, value in options.items()})
        modules = (gated_norm, hadamard, linear, ssd)
        originals = [module.takes for module in modules]
        try:
            for module in modules:
                module.takes = lambda *_: False
            wanted = function(*args, **options)
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.takes = original
        found = found if isinstance(found, tuple) else (found,)
        return [value.cpu() for value in found], wanted if isinstance(wanted, tuple) else (wanted,)


def norms(both):
    hidden, residual, weight = normal(3, 100).half(), 4 * normal(3, 100, seed=1), normal(100, seed=2)
    found, wanted = both(gated_norm.add_rms_norm, hidden, residual, weight, scale=torch.tensor(0.02))
    yield "norm codes", codes(found[0], wanted[0])
    yield "norm sum", {"equal": torch.equal(found[1], wanted[1])}
    found, wanted = both(gated_norm.add_rms_norm, hidden, None, None)
    yield "norm alone", off(found[0], wanted[0])
    weight, wide = normal(96, seed=2), int8(2, 3, 200)
    for groups in (1, 3, 8):
        y = normal(2, 3, 96, seed=groups)
        for name, z, scale in (
            ("codes", wide[..., 50:146], torch.tensor(0.03)),
            ("floats", 0.03 * wide[..., :96], None),
        ):
            found, wanted = both(gated_norm.gated_rms_norm, y, z, weight, groups, z_scale=scale)
            yield f"gated norm {groups} {name}", off(found[0], wanted[0])
    found, wanted = both(gated_norm.gated_rms_norm, y.half(), y.half().flip(0), weight.half(), 2)
    yield "half gated norm", off(found[0], wanted[0])


def convolutions(both):
    width = 70
    w, scale, steps = int8(width, 4, seed=1), torch.linspace(1e-5, 1e-3, width), torch.linspace(0.005, 0.1, width)
    bias, wide = normal(width), int8(2, 40, 2 * width, seed=2)
    past = int8(2, 3, width, seed=3)
    for length in (1, 2, 3, 4, 17, 40):
        x = wide[:, :length, 30 : 30 + width]
        for state in (None, past):
            name = f"{length} {state is not None}"
            found, wanted = both(gated_norm.conv1d_silu, x, w, scale, bias, steps, state)
            yield f"conv {name}", codes(found[0], wanted[0])
            yield f"conv state {name}", {"equal": torch.equal(found[1], wanted[1])}
        found, wanted = both(gated_norm.conv1d_silu, x, w, scale)
        yield f"conv without requantisation {length}", off(found[0], wanted[0])
        values = (0.02 * x, 0.02 * w, bias, 0.02 * past)
        found, wanted = both(gated_norm.conv1d_silu_float, *values)
        yield f"float conv {length}", off(found[0], wanted[0])
        yield f"float conv state {length}", {"equal": torch.equal(found[1], wanted[1])}
        found, wanted = both(gated_norm.conv1d_silu_float, *(v.half() for v in values[:3]))
        yield f"half conv {length}", off(found[0], wanted[0])


def transforms(both):
    for n in (16, 256, 192, 768, 640, 2560):
        for transpose in (False, True):
            x = normal(3, n, seed=n).to(torch.float16 if transpose else torch.float32)
            found, wanted = both(hadamard.hadamard_quantize, x, torch.tensor(0.03), transpose=transpose)
            yield f"hadamard {n} {transpose}", codes(found[0], wanted[0])
            found, wanted = both(hadamard.hadamard_transform, x, transpose=transpose)
            yield f"{x.dtype} transform {n} {transpose}", off(found[0], wanted[0])


def products(both):
    for out, columns, group in ((40, 256, 128), (70, 192, 96), (33, 64, 32)):
        w = normal(out, columns)
        scales = packing.group_scales(w, group, torch.float16)
        four = packing.quantize_groups(w, scales)
        packed, bias = packing.pack_int4(four), normal(out, seed=1)
        relative, rows = packing.relative_scales(four, scales)
        levels = packing.expand_levels(four, relative)
        for count in (1, 5, 70):
            name = f"{out} {columns} {count}"
            x = normal(count, columns, seed=2)
            found, wanted = both(linear.matmul_w4a16, x, packed, scales, bias)
            yield f"w4a16 {name}", off(found[0], wanted[0])
            found, wanted = both(linear.matmul_w4a16, x.half(), packed, scales)
            yield f"half w4a16 {name}", off(found[0], wanted[0])
            q = int8(count, columns, seed=3)
            for dtype in (torch.float32, torch.int8):
                size = 2e-2 if dtype == torch.int8 else 1e-3
                found, wanted = both(linear.matmul_w4a8, q, packed, relative, rows * size, bias, dtype)
                yield f"w4a8 {name} {dtype}", {"equal": torch.equal(found[0], wanted[0])}
                found, wanted = both(linear.matmul_w8a8, q, levels, rows * size, None, dtype)
                yield f"w8a8 {name} {dtype}", {"equal": torch.equal(found[0], wanted[0])}
    try:
        # several reads of a row, the last of them past its end
        kept, triton_linear.ROW_WORDS = triton_linear.ROW_WORDS, 16
        w = normal(20, 320)
        scales = packing.group_scales(w, 64, torch.float16)
        four = packing.quantize_groups(w, scales)
        packed, (relative, rows) = packing.pack_int4(four), packing.relative_scales(four, scales)
        found, wanted = both(linear.matmul_w4a16, normal(1, 320, seed=2), packed, scales)
        yield "w4a16 in parts", off(found[0], wanted[0])
        found, wanted = both(linear.matmul_w4a8, int8(1, 320, seed=3), packed, relative, rows)
        yield "w4a8 in parts", {"equal": torch.equal(found[0], wanted[0])}
    finally:
        triton_linear.ROW_WORDS = kept
    levels = torch.full((4, 8), 15, dtype=torch.uint8)
    levels[1:3] = torch.tensor([[0], [12]])
    ratio, one = torch.tensor([[30.0], [20.0], [0.625], [127.0]]).half(), torch.ones(4)
    for count in (1, 2):
        found, wanted = both(linear.matmul_w4a8, int8(count, 32), packing.pack_int4(levels.repeat(1, 4)), ratio, one)
        yield f"w4a8 with levels clamped {count}", {"equal": torch.equal(found[0], wanted[0])}
    x, w = int8(3, 50), int8(20, 50, seed=1)
    found, wanted = both(linear.matmul_w8a8, x, w, torch.full((20,), 1e-3))
    yield "w8a8 of 50 columns", {"equal": torch.equal(found[0], wanted[0])}


def scan_case(length, h=4, p=20, groups=2, n=24):
    x, B, C = int8(2, length, h, p), int8(2, length, groups, n, seed=1), int8(2, length, groups, n, seed=2)
    dt = int8(2, length, h, seed=3)
    A, D = -torch.exp(normal(h)), normal(h, p)
    labels = torch.arange(p).div(5, rounding_mode="floor").expand(h, p) + 4 * (torch.arange(h)[:, None] // 2)
    steps = 0.01 * torch.exp(normal(8, seed=4))
    state_steps = 0.005 * torch.exp(0.3 * normal(8, n, seed=5))
    one = torch.full((1,), 0.02)
    scales = ssd.ScanScales(labels, steps, 0.02 * one.expand(groups) * 2, one, torch.full((h,), 0.03), state_steps)
    return x, dt, A, B, C, scales, D, normal(h, seed=6) - 3


def scans(both):
    for length in (1, 50, 150):
        x, dt, A, B, C, scales, D, bias = scan_case(length)
        initial = int8(2, 4, 20, 24, seed=7)
        found, wanted = both(
            ssd.ssd_chunk_scan_int8, x, dt, A, B, C, scales, D, bias, (0.01, 0.3), initial_state=initial
        )
        yield f"int8 scan {length}", off(found[0], wanted[0])
        yield f"int8 scan state {length}", codes(found[1], wanted[1])
        plain = ssd.ScanScales(scales.labels, scales.x, scales.B, scales.C, scales.dt[:1])
        found, wanted = both(ssd.ssd_chunk_scan_int8, x, dt, A, B, C, plain)
        yield f"int8 scan float state {length}", off(found[1], wanted[1])
        joined = torch.cat([v.flatten(2) for v in (x, B, C)], -1).split([80, 48, 48], -1)
        x, B, C = (v.unflatten(-1, (k, -1)) for v, k in zip(joined, (4, 2, 2), strict=True))
        found, wanted = both(ssd.ssd_chunk_scan_int8, x, dt, A, B, C, scales, D[:, 0], bias)
        yield f"int8 scan of views {length}", off(found[0], wanted[0])
        delta, values = torch.nn.functional.softplus(dt * 0.03 + bias), x * 0.01
        for kind in (torch.float32, torch.float16):
            given = [v.to(kind) for v in (values, delta, B * 0.02, C * 0.02)]
            found, wanted = both(ssd.ssd_chunk_scan, *given[:2], A, *given[2:], D[:, 0], initial_state=initial * 0.01)
            yield f"{kind} scan {length}", off(found[0], wanted[0])
            yield f"{kind} scan state {length}", off(found[1], wanted[1])


def steps(both):
    x, dt, A, B, C, scales, D, bias = scan_case(1)
    x, dt, B, C = x[:, 0], dt[:, 0], B[:, 0], C[:, 0]
    state = int8(2, 4, 20, 24, seed=7)
    args = (x, dt, A, B, C, scales, D, bias)
    found, wanted = both(ssd.ssd_step_int8, state, *args)
    yield "int8 step", off(found[0], wanted[0])
    yield "int8 step state", codes(found[1], wanted[1])
    one = ssd.ScanScales(scales.labels, scales.x, scales.B, scales.C, scales.dt, scales.state[:, :1])
    found, wanted = both(ssd.ssd_step_int8, state, *args[:5], one, None, bias, (0.01, 0.3))
    yield "int8 step state of a scale a group", codes(found[1], wanted[1])
    # small time steps keep their digits through softplus
    slow = (x, torch.full_like(dt, -127), A, B, C, scales, None, bias - 8)
    found, wanted = both(ssd.ssd_step_int8, torch.zeros_like(state), *slow)
    yield "int8 slow step", off(found[0], wanted[0])
    delta = torch.nn.functional.softplus(dt * 0.03 + bias)
    for kind in (torch.float32, torch.float16):
        given = [v.to(kind) for v in (state * 0.01, x * 0.01, delta, B * 0.02, C * 0.02)]
        for inplace in (False, True):
            found, wanted = both(ssd.ssd_step, given[0].clone(), *given[1:3], A, *given[3:], D, inplace=inplace)
            yield f"{kind} step {inplace}", off(found[0], wanted[0])
            yield f"{kind} step state {inplace}", off(found[1], wanted[1])


def shapes(both):
    """Heads and groups alike, one of each, widths below a block, one scale for all."""
    one = torch.full((1,), 0.03)
    for b, h, p, groups, n in ((1, 1, 3, 1, 5), (3, 4, 16, 4, 32), (1, 6, 70, 1, 16)):
        x, B, C = int8(b, 5, h, p), int8(b, 5, groups, n, seed=1), int8(b, 5, groups, n, seed=2)
        dt, A, D = int8(b, 5, h, seed=3), -torch.exp(normal(h)), normal(h, seed=4)
        scales = ssd.ScanScales(torch.zeros(h, p, dtype=torch.int64), one, one, one, one, 3 * one[:, None])
        found, wanted = both(ssd.ssd_chunk_scan_int8, x, dt, A, B, C, scales, D)
        name = f"{b} {h} {p} {groups} {n}"
        yield f"scan {name}", off(found[0], wanted[0])
        yield f"scan state {name}", codes(found[1], wanted[1])
        state = found[1]
        found, wanted = both(ssd.ssd_step_int8, state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], scales, D)
        yield f"step {name}", off(found[0], wanted[0])
        yield f"step state {name}", codes(found[1], wanted[1])


GROUPS = {
    "norms": norms,
    "convolutions": convolutions,
    "shapes": shapes,
    "transforms": transforms,
    "products": products,
    "scans": scans,
    "steps": steps,
}


def check(found):
    assert found
    for name, values in found.items():
        half = "half" in name or "float16" in name or name == "norm alone"
        assert values.get("equal", True), name
        assert values.get("codes", 0) <= 1 and values.get("part", 0) < 0.01, (name, values)
        assert values.get("off", 0) < (2e-3 if half else 1e-5), (name, values)


@functools.cache
def interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not triton_kernels.HAVE_TRITON, reason="no triton on this platform")
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_do_what_the_plain_forms_do(group):
    check(interpreted()[group])


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu(group):  # pragma: no cover - needs a GPU
    check(dict(GROUPS[group](Both("cuda"))))


@pytest.mark.slow
@pytest.mark.skipif(not triton_kernels.HAVE_TRITON, reason="no triton on this platform")
def test_every_kernel_compiles_for_a_gpu_that_is_not_there():
    """For Hopper, within its 227 KiB of shared memory."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    kernels = "_add_rms_norm _gated_rms_norm _conv_silu _transform _w4a16_row _w4a16 _w4a8_row _int8 _chunk_scan _step"
    assert {name for name, _ in made} == set(kernels.split())
    assert max(shared for _, shared in made) <= 227 * 1024


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():  # pragma: no cover - needs a GPU
    """Places beyond an int32's reach: the last rows are as the last rows alone."""
    w = normal(65536, 32)
    scales = packing.group_scales(w, 32, torch.float16)
    four = packing.quantize_groups(w, scales)
    packed, (relative, rows) = packing.pack_int4(four).cuda(), packing.relative_scales(four, scales)
    q = int8(33000, 32).cuda()
    found = linear.matmul_w4a8(q, packed, relative.cuda(), 0.01 * rows.cuda(), None, torch.int8)
    assert found.numel() > 2**31
    assert torch.equal(
        found[-3:], linear.matmul_w4a8(q[-3:], packed, relative.cuda(), 0.01 * rows.cuda(), None, torch.int8)
    )
    del found
    x = torch.zeros(2**18 + 8, 8192, dtype=torch.float16, device="cuda")
    x[-3:] = normal(3, 8192).cuda()
    step = torch.tensor(0.03, device="cuda")
    assert torch.equal(hadamard.hadamard_quantize(x, step)[-3:], hadamard.hadamard_quantize(x[-3:], step))
    assert torch.equal(gated_norm.add_rms_norm(x)[0][-3:], gated_norm.add_rms_norm(x[-3:])[0])
    del x
    state = torch.zeros(2200, 128, 64, 128, dtype=torch.int8, device="cuda")
    state[-1] = int8(128, 64, 128).cuda()
    one = torch.ones(1, device="cuda")
    steps = ssd.ScanScales(
        torch.zeros(128, 64, dtype=torch.int64, device="cuda"), *[0.03 * one] * 4, 0.03 * one[:, None]
    )
    given = [int8(2200, 128, 64), int8(2200, 128), int8(2200, 8, 128), int8(2200, 8, 128)]
    x, dt, B, C = (values.cuda() for values in given)
    y, following = ssd.ssd_step_int8(state, x, dt, -torch.ones(128, device="cuda"), B, C, steps)
    alone = ssd.ssd_step_int8(state[-1:], x[-1:], dt[-1:], -torch.ones(128, device="cuda"), B[-1:], C[-1:], steps)
    assert torch.equal(y[-1:], alone[0]) and torch.equal(following[-1:], alone[1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_launch_is_on_the_tensors_gpu():  # pragma: no cover - needs two GPUs
    with torch.cuda.device(0):
        check(dict(norms(Both("cuda:1"))))


def test_what_the_kernels_take():
    x = torch.zeros(2, 4)
    assert not triton_kernels.takes(x), "a CPU's tensors take the plain path"
    assert [triton_kernels.power_of_two(n) for n in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
    assert interpreted()["taken"] == [True, False, False, True]


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = {group: dict(cases(Both("cpu"))) for group, cases in GROUPS.items()}
    x = torch.zeros(2)
    grown = torch.zeros(2, requires_grad=True)
    said["taken"] = [triton_kernels.takes(v) for v in (x, x.double(), grown)]
    with torch.no_grad():
        said["taken"].append(triton_kernels.takes(grown, None))
    print(json.dumps(said))
