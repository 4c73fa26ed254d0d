"""The selective scans of Mamba2 (SSD) and Mamba, whole sequences in chunks and token by token (section 2).

SSD: H_t = exp(dt_t A) H_{t-1} + dt_t x_t (outer) B_t for each head, y_t = H_t C_t + D x_t. Mamba: the same for each
channel and state by itself, with A of its own. The int8 forms read int8 codes, compute in float32, and read and write
int8 states. No form passes gradients on. On a GPU, SSD is a Triton kernel, float64 excepted.

Dimensions: b batch, l length, h heads, p head_dim, G groups (B and C are those of a head's group), N state,
K scales of x and the state, d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from isotone.quamba2 import triton_ssd
from isotone.quamba2.packing import ScanScales
from isotone.quamba2.triton_kernels import takes
from isotone.shared.errors import InputError

CPU_CHUNK = 64  # within a chunk the work grows with its square: on a CPU longer ones are slower
_SCAN_NUMBERS = 1 << 18  # of a buffer of `selective_scan`: it stays in the cache


def ssd_sequential(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    initial_state: Float[Tensor, "b h p N"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p N"]]:
    """The recurrence token by token: y, and the state after the last token. What the chunk scan is held to.

    `dt` is the final one, after softplus; `A` is negative. Raises `InputError` as `ssd_chunk_scan`.
    """
    _check(x.shape, B.shape)
    state = _zeros(x, B) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        y, state = _step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def ssd_chunk_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l G N"],
    C: Float[Tensor, "b l G N"],
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    chunk: int = 256,
    initial_state: Float[Tensor, "b h p N"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p N"]]:
    """`ssd_sequential` as products of matrices within chunks, the state carried from one to the next, for any l >= 1.

    `dt` is the final one, after softplus; `A` is negative. `chunk`: tokens at once, at most; a CPU takes at most 64,
    a GPU 64. Computed in float32, or float64 for a float64 `x`; y has `x`'s dtype, the state the dtype computed in.
    Raises `InputError` on no tokens, a chunk below 1, and groups that do not divide the heads.
    """
    _check(x.shape, B.shape, chunk)
    if takes(x, dt, A, B, C, D, initial_state):
        return triton_ssd.chunk_scan(x, dt, A, B, C, D, initial_state)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def load(start: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = (values[:, start:end].to(wide) for values in (x, dt, B, C))
        return tuple(given)  # type: ignore[return-value]

    state = None if initial_state is None else initial_state.to(wide)
    return _scan(load, x.shape[1], chunk, A.to(wide), D, state, torch.empty_like(x))


def ssd_step(
    state: Float[Tensor, "b h p N"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b G N"],
    C: Float[Tensor, "b G N"],
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p N"]]:
    """One token: y in `x`'s dtype, and the next state in `state`'s, written over it with `inplace`.

    Raises `InputError` on groups that do not divide the heads.
    """
    _check((x.shape[0], 1, *x.shape[1:]), (B.shape[0], 1, *B.shape[1:]))
    if takes(state, x, dt, A, B, C, D):
        return triton_ssd.step(state, x, dt, A, B, C, D, inplace)
    y, following = _step(state, x, dt, A, B, C, D)
    return y, state.copy_(following) if inplace else following.to(state.dtype)


def ssd_chunk_scan_int8(
    x: Int8[Tensor, "b l h p"],
    dt: Int8[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Int8[Tensor, "b l G N"],
    C: Int8[Tensor, "b l G N"],
    scales: ScanScales,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    dt_bias: Float[Tensor, " h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = 256,
    initial_state: Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"]]:
    """`ssd_chunk_scan` of int8 codes with `scales`; softplus(dt + `dt_bias`), clamped to `dt_limit`, is taken here.

    Returns y in float32, and the last state: int8 where `scales.state` is given, else float32. `initial_state` is of
    that kind. Raises `InputError` as `ssd_chunk_scan`, and on an initial state of the other kind.
    """
    _check(x.shape, B.shape, chunk)
    _check_state(initial_state, scales)
    if takes(x, dt, A, B, C, D, initial_state):
        return triton_ssd.chunk_scan(x, dt, A, B, C, D, initial_state, scales, dt_bias, dt_limit)
    steps = scales.x[scales.labels]

    def load(start: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = slice(start, end)
        return (
            x[:, part].to(torch.float32) * steps,
            _time_steps(dt[:, part], scales.dt, dt_bias, dt_limit),
            B[:, part].to(torch.float32) * scales.B[:, None],
            C[:, part].to(torch.float32) * scales.C[:, None],
        )

    state = None if initial_state is None else dequantize_state(initial_state, scales)
    y, last = _scan(load, x.shape[1], chunk, A.to(torch.float32), D, state, torch.empty(x.shape, device=x.device))
    return y, quantize_state(last, scales)


def ssd_step_int8(
    state: Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"],
    x: Int8[Tensor, "b h p"],
    dt: Int8[Tensor, "b h"],
    A: Float[Tensor, " h"],
    B: Int8[Tensor, "b G N"],
    C: Int8[Tensor, "b G N"],
    scales: ScanScales,
    D: Float[Tensor, " h"] | Float[Tensor, "h p"] | None = None,
    dt_bias: Float[Tensor, " h"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    inplace: bool = False,
) -> tuple[Float[Tensor, "b h p"], Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"]]:
    """One token of `ssd_chunk_scan_int8`: y in float32, of the state before it is rounded, and the next state.

    Raises `InputError` on groups that do not divide the heads, and a state of the other kind than `scales.state` says.
    """
    _check((x.shape[0], 1, *x.shape[1:]), (B.shape[0], 1, *B.shape[1:]))
    _check_state(state, scales)
    if takes(state, x, dt, A, B, C, D):
        return triton_ssd.step(state, x, dt, A, B, C, D, inplace, scales, dt_bias, dt_limit)
    y, following = _step(
        dequantize_state(state, scales),
        x.to(torch.float32) * scales.x[scales.labels],
        _time_steps(dt, scales.dt, dt_bias, dt_limit),
        A,
        B.to(torch.float32) * scales.B[:, None],
        C.to(torch.float32) * scales.C[:, None],
        D,
    )
    rounded = quantize_state(following, scales)
    return y, state.copy_(rounded) if inplace else rounded


def quantize_state(
    state: Float[Tensor, "b h p N"], scales: ScanScales
) -> Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"]:
    """int8 codes of a state with the (K, N) steps of `scales`; `state` itself where there are none."""
    if scales.state is None:
        return state
    return (state / scales.state[scales.labels]).round_().clamp_(-128, 127).to(torch.int8)


def dequantize_state(
    state: Int8[Tensor, "b h p N"] | Float[Tensor, "b h p N"], scales: ScanScales
) -> Float[Tensor, "b h p N"]:
    """The float32 state of int8 codes; `state` itself where `scales` has no steps for it."""
    if scales.state is None:
        return state
    return state.to(torch.float32).mul_(scales.state[scales.labels])


def selective_scan(
    x: Float[Tensor, "b l d"],
    dt: Float[Tensor, "b l d"],
    A: Float[Tensor, "d N"],
    B: Float[Tensor, "b l N"],
    C: Float[Tensor, "b l N"],
    D: Float[Tensor, " d"] | None = None,
    initial_state: Float[Tensor, "b d N"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d N"]]:
    """Mamba's scan (section 2, "Mamba1"): y in `x`'s dtype, and the last state.

    Decays and inputs of many tokens are made at once; a token is then one multiply-add of d N numbers. Computed in
    float32, or float64 for a float64 `x`. Raises `InputError` on no tokens.
    """
    if not x.shape[1]:
        raise InputError("expected at least one token to scan, got none")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, _ = x.shape
    rates = A.to(wide)
    state = x.new_zeros(batch, *A.shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    y = torch.empty_like(x)
    tokens = max(1, _SCAN_NUMBERS // max(1, state.numel()))
    for start in range(0, length, tokens):
        part = slice(start, start + tokens)
        x_part, dt_part, B_part, C_part = (values[:, part].to(wide).transpose(0, 1) for values in (x, dt, B, C))
        decay = (dt_part[..., None] * rates).exp_()
        states = (dt_part * x_part)[..., None] * B_part[..., None, :]
        for t in range(len(states)):
            state = states[t].addcmul_(decay[t], state)
        y[:, part] = torch.matmul(states, C_part[..., None])[..., 0].transpose(0, 1).to(y.dtype)
        state = state.clone()  # a part of `states` no longer
    return (y if D is None else y.addcmul_(x, D.to(y.dtype))), state


def selective_step(
    state: Float[Tensor, "b d N"],
    x: Float[Tensor, "b d"],
    dt: Float[Tensor, "b d"],
    A: Float[Tensor, "d N"],
    B: Float[Tensor, "b N"],
    C: Float[Tensor, "b N"],
    D: Float[Tensor, " d"] | None = None,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d N"]]:
    """One token of `selective_scan`."""
    y, last = selective_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, state)
    return y[:, 0], last


Load = Callable[[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def _scan(
    load: Load, length: int, chunk: int, A: Tensor, D: Tensor | None, state: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan of `load(start, end)` = (x, dt, B, C), chunk by chunk, into `y`; returns it and the last state."""
    chunk = min(chunk, CPU_CHUNK, length)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=y.device).triu(1)
    skip = None if D is None else (D[:, None] if D.ndim == 1 else D).to(A.dtype)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        x, dt, B, C = load(start, end)
        out, state = _chunk(x, dt, A, B, C, state, later[: end - start, : end - start])
        y[:, start:end] = out if skip is None else out.addcmul(x, skip)
    assert state is not None
    return y, state


def _chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, later: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of q tokens ("Mamba2 fp reference" of section 2): y (b, q, h, p) without D, and the state after it."""
    b, q, h, p = x.shape
    G, N = B.shape[2:]
    # From before the chunk to each token, (b, q, h). Differences of long sums would lose the digits of a float32: the
    # part that its rounding cuts off, `rest`, is put back as factors of rows and columns.
    log_decay = (dt.double() * A.double()).cumsum(1)
    rounded = log_decay.to(x.dtype)
    rest = (log_decay - rounded).to(x.dtype)
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    by_head = rounded.transpose(1, 2)
    # (C B^T) * L, with L_ij the decay from token j to token i
    weights = by_head[..., :, None] - by_head[..., None, :]
    weights.masked_fill_(later, -math.inf).exp_()
    weights.view(b, G, h // G, q, q).mul_((C @ B.transpose(-1, -2))[:, :, None])
    inner = x * (dt * (-rest).exp_())[..., None]
    y = (weights @ inner.transpose(1, 2)).transpose(1, 2) * rest.exp_()[..., None]
    left = (log_decay[:, -1:] - log_decay).exp_().to(x.dtype)  # the decay from each token to the end
    entered = (x * (dt * left)[..., None]).reshape(b, q, G, -1).permute(0, 2, 3, 1) @ B
    entered = entered.view(b, h, p, N)
    if state is None:
        return y, entered
    decay = log_decay.exp_().to(x.dtype)
    carried = (C @ state.reshape(b, G, -1, N).transpose(-1, -2)).transpose(1, 2).reshape(b, q, h, p)
    return y.addcmul_(carried, decay[..., None]), entered.addcmul_(state, decay[:, -1, :, None, None])


def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, h, p = x.shape
    G, N = B.shape[1:]
    dt, wide_x = dt.to(wide), x.to(wide)
    entering = (wide_x * dt[..., None]).reshape(b * G, -1, 1)
    decayed = state.to(wide) * (dt * A.to(wide)).exp_()[..., None, None]
    following = torch.baddbmm(decayed.view(b * G, -1, N), entering, B.to(wide).reshape(b * G, 1, N))
    y = torch.bmm(following, C.to(wide).reshape(b * G, N, 1)).view(b, h, p)
    if D is not None:
        y = y + wide_x * (D[:, None] if D.ndim == 1 else D)
    return y.to(x.dtype), following.view(b, h, p, N)


def _time_steps(dt: Tensor, scale: Tensor, bias: Tensor | None, limit: tuple[float, float]) -> Tensor:
    """softplus(dt scale + bias), clamped; small integers times a scale, so float16 never enters."""
    raw = dt.to(torch.float32) * scale
    return F.softplus(raw if bias is None else raw + bias).clamp_(*limit)


def _zeros(x: Tensor, B: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])


def _check(x: tuple[int, ...], B: tuple[int, ...], chunk: int = 1) -> None:
    if not x[1]:
        raise InputError("expected at least one token to scan, got none")
    if chunk < 1:
        raise InputError(f"expected a chunk of at least one token, got {chunk}")
    if not B[2] or x[2] % B[2]:
        raise InputError(f"expected groups that divide {x[2]} heads, got {B[2]}")


def _check_state(state: Tensor | None, scales: ScanScales) -> None:
    wanted = "int8" if scales.state is not None else "floating point"
    if state is not None and (state.dtype == torch.int8) != (scales.state is not None):
        raise InputError(f"expected a state of {wanted} numbers by its scales, got {state.dtype}")
