"""Invariants 7, 8 and 13: the chunk scan is the recurrence, channels keep their order, int8 states do not blow up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from isotone.quamba2.packing import quantize_symmetric
from isotone.quamba2.ssd import (
    ScanScales,
    dequantize_state,
    quantize_state,
    selective_scan,
    selective_step,
    ssd_chunk_scan,
    ssd_chunk_scan_int8,
    ssd_sequential,
    ssd_step,
    ssd_step_int8,
)
from isotone.shared.errors import InputError


def sample(b=2, length=11, h=6, p=4, groups=3, n=5, dtype=torch.float64, seed=0):
    """x, dt, A, B, C, D and a state, with decays from slow to fast."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, length, h, p, generator=g)
    dt = torch.nn.functional.softplus(torch.randn(b, length, h, generator=g) * 2 - 2)
    A = -torch.exp(torch.rand(h, generator=g) * 2.77)
    B, C = torch.randn(2, b, length, groups, n, generator=g)
    D = torch.randn(h, generator=g)
    state = torch.randn(b, h, p, n, generator=g)
    return tuple(values.to(dtype) for values in (x, dt, A, B, C, D, state))


def loops(x, dt, A, B, C, D, state):
    """The recurrence of section 2, number by number."""
    b, length, h, p = x.shape
    y, state = torch.zeros_like(x), state.clone()
    for i in range(b):
        for t in range(length):
            for k in range(h):
                group = k // (h // B.shape[2])
                decay = torch.exp(dt[i, t, k] * A[k])
                for c in range(p):
                    state[i, k, c] = decay * state[i, k, c] + dt[i, t, k] * x[i, t, k, c] * B[i, t, group]
                    skip = D[k] if D.ndim == 1 else D[k, c]
                    y[i, t, k, c] = (state[i, k, c] * C[i, t, group]).sum() + skip * x[i, t, k, c]
    return y, state


@pytest.mark.parametrize("wide_D", [False, True])
def test_the_sequential_form_is_the_recurrence(wide_D):
    x, dt, A, B, C, D, state = sample(b=1, length=5, h=4, groups=2)
    D = D[:, None] * torch.arange(1.0, 5, dtype=D.dtype) if wide_D else D
    wanted = loops(x, dt, A, B, C, D, state)
    torch.testing.assert_close(ssd_sequential(x, dt, A, B, C, D, state), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ssd_chunk_scan(x, dt, A, B, C, D, chunk=2, initial_state=state), wanted, rtol=0, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3), (3, 3)]),
    st.booleans(),
    st.booleans(),
)
def test_chunks_are_the_recurrence(seed, length, chunk, heads, with_state, with_D):
    """Any length, chunk and groups: equal in float64 to 1e-10, in float32 to 1e-4."""
    h, groups = heads
    x, dt, A, B, C, D, state = sample(2, length, h, 3, groups, 4, seed=seed)
    D, state = (D if with_D else None), (state if with_state else None)
    wanted = ssd_sequential(x, dt, A, B, C, D, state)
    found = ssd_chunk_scan(x, dt, A, B, C, D, chunk=chunk, initial_state=state)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    single = [None if v is None else v.float() for v in (x, dt, A, B, C, D, state)]
    found = ssd_chunk_scan(*single[:6], chunk=chunk, initial_state=single[6])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_long_sequences_and_fast_decays():
    x, dt, A, B, C, D, _ = sample(1, 300, 4, 8, 1, 16)
    dt[:, 100:140] = 30  # a decay of exp(-30 A) in one step: all before it is forgotten, without overflow
    wanted = ssd_sequential(x, dt, A, B, C, D)
    found = ssd_chunk_scan(*(v.float() for v in (x, dt, A, B, C, D)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("length, chunk", [(1, 8), (7, 8), (8, 8), (29, 8), (70, 256)])
def test_hugging_face_computes_the_same(length, chunk):
    x, dt, A, B, C, D, state = sample(2, length, 6, 8, 3, 16, torch.float32)
    y, last = modeling_mamba2.mamba2_chunk_scan(
        x, dt, A, B, C, chunk, D=D, initial_states=state, return_final_states=True
    )
    found = ssd_chunk_scan(x, dt, A, B, C, D, chunk=chunk, initial_state=state)
    torch.testing.assert_close(found, (y, last), rtol=1e-4, atol=1e-4)
    kept = state.clone()
    wide = dt[:, 0, :, None].expand(2, 6, 8), A[:, None, None].expand(6, 8, 16)
    y = modeling_mamba2.mamba2_selective_state_update(kept, x[:, 0], *wide, B[:, 0], C[:, 0], D[:, None].expand(6, 8))
    torch.testing.assert_close(
        ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D), (y, kept), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_inside(dtype):
    x, dt, A, B, C, D, state = sample(dtype=torch.float32)
    half = [v.to(dtype) for v in (x, dt, B, C)]
    wanted, last = ssd_chunk_scan(half[0].float(), half[1].float(), A, half[2].float(), half[3].float(), D, chunk=4)
    found, state = ssd_chunk_scan(half[0], half[1], A, half[2], half[3], D, chunk=4)
    assert found.dtype == dtype and state.dtype == torch.float32
    assert torch.equal(found, wanted.to(dtype)) and torch.equal(state, last)


def test_prefill_and_steps_are_one_prefill():
    x, dt, A, B, C, D, state = sample(length=13)
    whole, last = ssd_chunk_scan(x, dt, A, B, C, D, chunk=4, initial_state=state)
    first, now = ssd_chunk_scan(x[:, :8], dt[:, :8], A, B[:, :8], C[:, :8], D, chunk=4, initial_state=state)
    pieces = [first]
    for t in range(8, 13):
        y, now = ssd_step(now, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, inplace=t % 2 == 0)
        pieces.append(y[:, None])
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(now, last, rtol=0, atol=1e-12)


def test_inplace_writes_over_the_state_and_else_it_stays():
    x, dt, A, B, C, D, state = sample(dtype=torch.float32)
    before = state.clone()
    args = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D
    y, following = ssd_step(state, *args)
    assert torch.equal(state, before) and not torch.equal(following, before)
    again, same = ssd_step(state, *args, inplace=True)
    assert same is state and torch.equal(state, following) and torch.equal(again, y)


def test_channels_keep_their_order():
    """Invariant 8: SSD of permuted heads and channels is the permuted SSD; across groups it is not."""
    x, dt, A, B, C, D, state = sample(h=6, groups=3)
    g = torch.Generator().manual_seed(3)
    heads = torch.cat([2 * i + torch.randperm(2, generator=g) for i in range(3)])
    channels = torch.stack([torch.randperm(4, generator=g) for _ in range(6)])

    def of_x(values, heads):  # (b, l, h, p)
        return values[:, :, heads[:, None], channels]

    def of_state(values, heads):  # (b, h, p, N)
        return values[:, heads[:, None], channels]

    def scan(heads):
        return ssd_chunk_scan(
            of_x(x, heads), dt[:, :, heads], A[heads], B, C, D[heads], chunk=4, initial_state=of_state(state, heads)
        )

    y, last = ssd_chunk_scan(x, dt, A, B, C, D, chunk=4, initial_state=state)
    found, kept = scan(heads)
    torch.testing.assert_close(found, of_x(y, heads), rtol=0, atol=1e-12)
    torch.testing.assert_close(kept, of_state(last, heads), rtol=0, atol=1e-12)
    across = heads.flip(0)
    assert (scan(across)[0] - of_x(y, across)).abs().max() > 0.1


def test_views_of_a_wider_tensor_are_read_where_they_are():
    """x, B and C are parts of one convolution's output."""
    x, dt, A, B, C, D, _ = sample()
    joined = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], -1)
    parts = joined.split([24, 15, 15], -1)
    views = parts[0].unflatten(-1, (6, 4)), parts[1].unflatten(-1, (3, 5)), parts[2].unflatten(-1, (3, 5))
    assert not views[0].is_contiguous()
    found = ssd_chunk_scan(views[0], dt, A, views[1], views[2], D, chunk=4)
    torch.testing.assert_close(found, ssd_chunk_scan(x, dt, A, B, C, D, chunk=4), rtol=0, atol=1e-12)


def int8_case(seed=0, length=14, states="table", per_head=True):
    """Codes, scales with two labels a head, and the float32 numbers that they stand for."""
    x, dt, A, B, C, D, state = sample(length=length, dtype=torch.float32, seed=seed)
    raw = torch.log(torch.expm1(dt.clamp_min(1e-4)))
    bias = torch.linspace(-3, 0, 6)
    labels = torch.stack([torch.tensor([0, 0, 1, 1]) + 2 * (h // 2) for h in range(6)])
    x = x * torch.tensor([0.1, 0.2, 4.0, 8.0])
    peaks = torch.zeros(6).index_reduce_(0, labels.flatten(), x.abs().amax((0, 1)).flatten(), "amax")
    dt_scale = (raw - bias).abs().amax((0, 1)) / 127 if per_head else ((raw - bias).abs().amax() / 127).reshape(1)
    B_scale, C_scale = (v.abs().amax((0, 1, 3)) / 127 for v in (B, C))
    # of the states after every token: a state that has grown beyond its codes is clipped
    peak = torch.stack(
        [ssd_chunk_scan(x[:, :t], dt[:, :t], A, B[:, :t], C[:, :t], D)[1].abs() for t in range(1, length + 1)]
    )
    table = torch.stack([peak.amax(0).permute(1, 2, 0, 3)[labels == k].amax((0, 1)) for k in range(6)]) / 100
    table = {"table": table, "tensor": table.amax(1, keepdim=True), None: None}[states]
    scales = ScanScales(labels, peaks / 127, B_scale, C_scale, dt_scale, table)
    codes = (
        quantize_symmetric(x, scales.x[labels]),
        quantize_symmetric(raw - bias, dt_scale),
        quantize_symmetric(B, B_scale[:, None]),
        quantize_symmetric(C, C_scale[:, None]),
    )
    numbers = (
        codes[0] * scales.x[labels],
        torch.nn.functional.softplus(codes[1] * dt_scale + bias),
        codes[2] * B_scale[:, None],
        codes[3] * C_scale[:, None],
    )
    return codes, scales, numbers, A, D, bias


@pytest.mark.parametrize("states", ["table", "tensor", None])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_int8_scan_is_the_scan_of_what_the_codes_stand_for(states, per_head):
    (x, dt, B, C), scales, numbers, A, D, bias = int8_case(states=states, per_head=per_head)
    wanted, last = ssd_sequential(*(v.double() for v in (numbers[0], numbers[1], A, numbers[2], numbers[3], D)))
    y, state = ssd_chunk_scan_int8(x, dt, A, B, C, scales, D, bias, chunk=4)
    assert y.dtype == torch.float32 and state.dtype == (torch.float32 if states is None else torch.int8)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    back = dequantize_state(state, scales).double()
    if states is None:
        torch.testing.assert_close(back, last, rtol=1e-4, atol=1e-4)
    else:
        assert ((back - last).abs() <= scales.state[scales.labels] / 2 + 1e-4).all()
        assert int(state.abs().max()) > 50


def test_the_int8_step_goes_on_where_the_int8_scan_ends():
    """One step is exactly the float step between the states' codes; prefill and steps are one prefill within noise."""
    (x, dt, B, C), scales, numbers, A, D, bias = int8_case()
    whole, end = ssd_chunk_scan_int8(x, dt, A, B, C, scales, D, bias)
    first, state = ssd_chunk_scan_int8(x[:, :9], dt[:, :9], A, B[:, :9], C[:, :9], scales, D, bias)
    pieces = [first]
    for t in range(9, 14):
        start = dequantize_state(state, scales)
        at = [v[:, t] for v in numbers]
        wanted, following = ssd_step(start, at[0], at[1], A, at[2], at[3], D)
        y, state = ssd_step_int8(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], scales, D, bias, inplace=t % 2 == 0)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        assert (state.int() - quantize_state(following, scales).int()).abs().max() <= 1
        pieces.append(y[:, None])
    found = torch.cat(pieces, 1)
    assert (found - whole).norm() / whole.norm() < 0.02
    drift = (dequantize_state(state, scales) - dequantize_state(end, scales)).abs()
    assert (drift <= 6 * scales.state[scales.labels]).all()


def test_an_int8_prompt_in_two_parts():
    (x, dt, B, C), scales, _, A, D, bias = int8_case()
    whole, _ = ssd_chunk_scan_int8(x, dt, A, B, C, scales, D, bias)
    _, state = ssd_chunk_scan_int8(x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5], scales, D, bias)
    later, _ = ssd_chunk_scan_int8(x[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], scales, D, bias, initial_state=state)
    assert 0 < (later - whole[:, 5:]).norm() / whole[:, 5:].norm() < 0.02


def test_time_step_limits():
    (x, dt, B, C), scales, numbers, A, D, bias = int8_case(states=None)
    limited = numbers[1].clamp(0.05, 0.2)
    assert not torch.equal(limited, numbers[1])
    wanted = ssd_chunk_scan(numbers[0], limited, A, numbers[2], numbers[3], D)
    found = ssd_chunk_scan_int8(x, dt, A, B, C, scales, D, bias, dt_limit=(0.05, 0.2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 3.0))
def test_an_int8_state_stays_within_its_bound(seed, rate):
    """Invariant 13: |error| <= s / 2 / (1 - a) for each state, after any number of steps with decay a."""
    g = torch.Generator().manual_seed(seed)
    b, h, p, n, steps = 2, 3, 4, 5, 200
    A = -rate * torch.linspace(0.5, 1.5, h)
    scales = ScanScales(torch.zeros(h, p, dtype=torch.int64), *(torch.ones(1),) * 4, torch.full((1, n), 0.5))
    exact = torch.zeros(b, h, p, n, dtype=torch.float64)
    state = torch.zeros(b, h, p, n, dtype=torch.int8)
    a = torch.zeros(h, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randint(-2, 3, (b, h, p), generator=g, dtype=torch.int8)
        B, C = torch.randint(-2, 3, (2, b, 1, n), generator=g, dtype=torch.int8)
        dt = torch.randint(-3, 1, (b, h), generator=g, dtype=torch.int8)
        delta = torch.nn.functional.softplus(dt.double())
        a = torch.maximum(a, torch.exp(delta * A.double()).amax(0))
        _, exact = ssd_step(exact, x.double(), delta, A.double(), B.double(), C.double())
        _, state = ssd_step_int8(state, x, dt, A, B, C, scales)
        within = exact.abs() < 60  # no code is clamped
        error = (state.double() * 0.5 - exact).abs()
        bound = 0.25 / (1 - a)[:, None, None] * (1 + 1e-4)
        assert within.all() and (error <= bound).all()
    assert error.max() > 0.01


@pytest.mark.parametrize("length", [1, 2, 33])
def test_mamba_s_scan_is_hugging_face_s(length):
    g = torch.Generator().manual_seed(0)
    b, d, n = 2, 12, 5
    x, raw = torch.randn(2, b, length, d, generator=g)
    dt = torch.nn.functional.softplus(raw - 1)
    A = -torch.exp(torch.randn(d, n, generator=g))
    B, C = torch.randn(2, b, length, n, generator=g)
    D, state = torch.randn(d, generator=g), torch.randn(b, d, n, generator=g)
    y, last = modeling_mamba.mamba_selective_scan(
        x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D, return_last_state=True
    )
    torch.testing.assert_close(selective_scan(x, dt, A, B, C, D), (y.transpose(1, 2), last), rtol=1e-5, atol=1e-5)
    kept = state.clone()
    y = modeling_mamba.mamba_selective_state_update(kept, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    found = selective_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
    torch.testing.assert_close(found, (y, kept), rtol=1e-5, atol=1e-5)


def test_mamba_s_scan_in_parts(monkeypatch):
    """However many tokens are made at once, and prefill then step, it is one scan; the input's state stays."""
    g = torch.Generator().manual_seed(1)
    x, raw = torch.randn(2, 2, 17, 6, generator=g, dtype=torch.float64)
    dt, A = raw.exp(), -torch.rand(6, 3, generator=g, dtype=torch.float64)
    B, C = torch.randn(2, 2, 17, 3, generator=g, dtype=torch.float64)
    state = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    before = state.clone()
    whole = selective_scan(x, dt, A, B, C, None, state)
    monkeypatch.setattr("isotone.quamba2.ssd._SCAN_NUMBERS", 5 * state.numel())
    torch.testing.assert_close(selective_scan(x, dt, A, B, C, None, state), whole, rtol=0, atol=1e-12)
    first, now = selective_scan(x[:, :16], dt[:, :16], A, B[:, :16], C[:, :16], None, state)
    y, now = selective_step(now, x[:, 16], dt[:, 16], A, B[:, 16], C[:, 16])
    torch.testing.assert_close((torch.cat([first, y[:, None]], 1), now), whole, rtol=0, atol=1e-12)
    assert torch.equal(state, before)


def test_refusals():
    x, dt, A, B, C, D, state = sample(dtype=torch.float32)
    with pytest.raises(InputError, match="at least one token"):
        ssd_chunk_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])
    with pytest.raises(InputError, match="at least one token"):
        selective_scan(x[:, :0, 0], dt[:, :0, :4], A[:4, None], B[:, :0, 0, :1], C[:, :0, 0, :1])
    with pytest.raises(InputError, match="chunk of at least one token, got 0"):
        ssd_chunk_scan(x, dt, A, B, C, chunk=0)
    with pytest.raises(InputError, match="groups that divide 5 heads, got 3"):
        ssd_chunk_scan(x[:, :, :5], dt[..., :5], A[:5], B, C)
    (codes, dt, B, C), scales, _, A, D, bias = int8_case()
    with pytest.raises(InputError, match="state of int8 numbers by its scales, got torch.float32"):
        ssd_step_int8(state, codes[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], scales)
    with pytest.raises(InputError, match="labels below the 2 scales, got 5"):
        ScanScales(scales.labels, torch.ones(2), scales.B, scales.C, scales.dt)
