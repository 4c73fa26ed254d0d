"""One quantised block (section 2, "Precision map" and "decode step").

A block of 8 bits carries int8 codes from the norm to the scan, and from the Hadamard matrix to out_proj; the gated norm
between them is in float32, as are the sums. A block of 16 bits multiplies float inputs with the same 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import Cache, causal_conv, masked, scan_heads, time_steps
from isotone.quamba2.gated_norm import add_rms_norm, conv1d_silu, gated_rms_norm
from isotone.quamba2.hadamard import hadamard_quantize, hadamard_transform
from isotone.quamba2.layout import plan_of
from isotone.quamba2.modules import Holder, Part, QuantLinear
from isotone.quamba2.packing import dequantize, quantize_symmetric
from isotone.quamba2.ssd import (
    ScanScales,
    dequantize_state,
    quantize_state,
    selective_scan,
    ssd_chunk_scan_int8,
    ssd_step_int8,
)
from isotone.shared.errors import InputError


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, by the rest of their names."""
    return {name[len(prefix) + 1 :]: values for name, values in tensors.items() if name.startswith(prefix + ".")}


Epilogue = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Steps:
    """What an 8-bit block derives from its tensors, once for a device.

    `in_proj`, `out_proj`: their epilogues; `conv`: the step of every product in the convolution; `conv_out`: of its
    output; `bias`: of the convolution; `A`, `D`: of the scan; `scan`: the steps that the scan reads and writes.
    """

    in_proj: Epilogue
    out_proj: Epilogue
    conv: Tensor
    conv_out: Tensor
    bias: Tensor | None
    A: Tensor
    D: Tensor
    scan: ScanScales


class QuantBlock(Holder):
    """One block over its tensors of `layout`; `bits`: of its activations, 8 or 16."""

    def __init__(self, arch: Architecture, config: QuambaConfig, tensors: Mapping[str, Tensor], bits: int) -> None:
        super().__init__()
        self.arch, self.config = arch, config
        self.in_proj = QuantLinear(within(tensors, "in_proj"), list(arch.segments.values()))
        self.out_proj = QuantLinear(within(tensors, "out_proj"), [arch.hidden])
        own: tuple[str, ...] = ("in_proj", "out_proj")
        if arch.kind == "mamba":
            own = (*own, "x_proj", "dt_proj")
            for name, rows in (("x_proj", arch.dt_rank + 2 * arch.state), ("dt_proj", arch.inner)):
                # mixed models hold both forms of the small projections
                members = within(tensors, name)
                forms = {"float": {"weight"}, "int8": {"codes", "scales"}}
                for form, keys in forms.items():
                    if keys <= set(members):
                        self.add_module(f"{name}_{form}", QuantLinear({key: members[key] for key in keys}, [rows]))
        self.kept = Part({name: values for name, values in tensors.items() if name.partition(".")[0] not in own})
        heads, dims = self.kept.get("head_ends"), self.kept.get("dim_ends")
        labels = torch.zeros(arch.inner, dtype=torch.int64)
        if heads is not None and dims is not None:
            labels = plan_of(arch, heads, dims).labels
        self.register_buffer("labels", labels.unflatten(0, arch.state_shape[:2]), persistent=False)
        self._steps: _Steps | None = None
        self._scan: ScanScales | None = None
        self.set_bits(bits)

    def _apply(self, *arguments: Any, **options: Any) -> QuantBlock:
        self._steps = self._scan = None  # another device's
        return super()._apply(*arguments, **options)

    def set_bits(self, bits: int) -> None:
        """Activations of 8 or 16 bits from now on. Raises `InputError` where the tensors of that form are not there."""
        if (self.kept.get("A_log_codes") if bits == 8 else self.kept.get("A_log")) is None:
            raise InputError(f"expected a model quantised with a_bits 'mixed' to run a block in {bits} bits")
        self.bits = bits
        self.int8_state = self.config.keeps_int8_state(bits)
        self._steps = self._scan = None
        for name, linear in self.named_children():
            if isinstance(linear, QuantLinear) and not name.endswith("_float"):
                linear.prepare_int8(bits == 8)

    def forward(self, hidden: Tensor, cache: Cache | None, number: int, mask: Tensor | None) -> Tensor:
        """(b, l, hidden) with its residual, in and out."""
        online = self.config.hadamard != "none"
        if self.bits == 16:
            normed, _ = add_rms_norm(hidden, eps=self.arch.eps)
            mixed = self._float(masked(normed, mask), cache, number, mask)
            return hidden + self.out_proj(hadamard_transform(mixed) if online else mixed)
        scales = self.kept.scales
        codes, _ = add_rms_norm(hidden, eps=self.arch.eps, scale=scales.in_proj.reshape(()))
        mixed = self._int8(masked(codes, mask), cache, number, mask)
        step = scales.out_proj.reshape(())
        codes = hadamard_quantize(mixed, step) if online else quantize_symmetric(mixed, step)
        return hidden + self.out_proj.int8(codes, self.steps.out_proj, torch.float32)

    def _float(self, normed: Tensor, cache: Cache | None, number: int, mask: Tensor | None) -> Tensor:
        arch, kept = self.arch, self.kept
        parts = self._named(self.in_proj(normed))
        given = torch.cat([parts[name] for name in arch.conv_segments], -1)
        past = None if cache is None else cache.conv[number]
        mixed, window = causal_conv(given, kept.conv.weight[:, None], kept.conv.get("bias"), past)
        conv = masked(F.silu(mixed), mask)
        state = None if cache is None else cache.state[number]
        if state is not None and self.int8_state:
            state = dequantize_state(state, self._state_steps())
        A, D = -kept.A_log.exp(), kept.D
        if arch.kind == "mamba":
            low, B, C = self.x_proj_float(conv).split([arch.dt_rank, arch.state, arch.state], -1)
            y, state = self._mamba_scan(conv, self.dt_proj_float(low), A, B, C, D, state)
            y = y * F.silu(parts["z"])
        else:
            x, B, C = conv.split(list(arch.conv_segments.values()), -1)
            dt = time_steps(parts["dt"], kept.dt_bias, arch.dt_limit)
            y, state = scan_heads(arch, x, dt, A, B, C, D, state, inplace=True)
            y = gated_rms_norm(y, parts["z"], kept.norm, arch.groups, arch.eps)
        if cache is not None:
            cache.conv[number] = window
            cache.state[number] = quantize_state(state, self._state_steps()) if self.int8_state else state
        return y

    def _int8(self, codes: Tensor, cache: Cache | None, number: int, mask: Tensor | None) -> Tensor:
        arch, kept, steps = self.arch, self.kept, self.steps
        parts = self._named(self.in_proj.int8(codes, steps.in_proj, torch.int8))
        given = torch.cat([parts[name] for name in arch.conv_segments], -1)
        past = None if cache is None else cache.conv[number]
        conv, window = conv1d_silu(given, kept.conv.codes, steps.conv, steps.bias, steps.conv_out, past)
        conv = masked(conv, mask)
        state = None if cache is None else cache.state[number]
        z_step = kept.scales.z.reshape(())
        if arch.kind == "mamba":
            y, state = self._int8_mamba(conv, state)
            y = y * F.silu(dequantize(parts["z"], z_step))
        else:
            y, state = self._int8_heads(conv, parts["dt"], state)
            y = gated_rms_norm(y, parts["z"], kept.norm, arch.groups, arch.eps, z_step)
        if cache is not None:
            cache.conv[number], cache.state[number] = window.clone(), state
        return y

    def _int8_heads(self, conv: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        arch, steps = self.arch, self.steps
        x, B, C = conv.split(list(arch.conv_segments.values()), -1)
        x = x.unflatten(-1, (arch.heads, arch.head_dim))
        B, C = (values.unflatten(-1, (arch.groups, arch.state)) for values in (B, C))
        D = steps.D.reshape(arch.heads, -1) if len(steps.D) == arch.inner else steps.D
        options = {"D": D, "dt_bias": self.kept.dt_bias, "dt_limit": arch.dt_limit}
        if state is not None and x.shape[1] == 1:
            codes = x[:, 0], dt[:, 0], steps.A, B[:, 0], C[:, 0]
            y, last = ssd_step_int8(state, *codes, steps.scan, **options, inplace=True)
            return y.flatten(-2)[:, None], last
        y, last = ssd_chunk_scan_int8(
            x, dt, steps.A, B, C, steps.scan, chunk=arch.chunk, initial_state=state, **options
        )
        return y.flatten(-2), last

    def _int8_mamba(self, conv: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        arch, scales, steps = self.arch, self.kept.scales, self.steps
        x = dequantize(conv, steps.conv_out)
        if len(scales.conv_x) == 1:
            mixed = self.x_proj_int8.int8(conv, self.x_proj_int8.epilogue(scales.conv_x), torch.float32)
        else:
            # channels with steps of their own have no common factor to take out of an integer product
            mixed = self.x_proj_int8(x)
        low, B, C = mixed.split([arch.dt_rank, arch.state, arch.state], -1)
        B, C = (dequantize(quantize_symmetric(v, s), s) for v, s in ((B, scales.B), (C, scales.C)))
        codes = quantize_symmetric(low, scales.dt_low)
        raw = self.dt_proj_int8.int8(codes, self.dt_proj_int8.epilogue(scales.dt_low), torch.float32)
        if state is not None:
            state = dequantize_state(state, steps.scan)
        y, last = self._mamba_scan(x, raw, steps.A, B, C, steps.D, state)
        return y, quantize_state(last, steps.scan)

    def _mamba_scan(
        self, x: Tensor, raw: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dt = time_steps(raw, self.kept.dt_bias, self.arch.dt_limit)
        y, last = selective_scan(x, dt, A, B, C, D, None if state is None else state[:, 0])
        return y, last[:, None]

    @property
    def steps(self) -> _Steps:
        """Derived at the first use on a device."""
        if self._steps is None:
            self._steps = self._derived()
        return self._steps

    def _derived(self) -> _Steps:
        arch, kept, conv = self.arch, self.kept, self.kept.conv
        parts = torch.tensor(list(arch.conv_segments.values()), device=self.labels.device)
        given = torch.cat([self._channel_steps(name) for name in arch.conv_segments])
        bias = conv.get("bias_codes")
        rows = torch.cat([self._channel_steps(name) for name in arch.segments])
        return _Steps(
            in_proj=self.in_proj.epilogue(kept.scales.in_proj, rows),
            out_proj=self.out_proj.epilogue(kept.scales.out_proj),
            conv=given * conv.code_scales.repeat_interleave(parts),
            conv_out=torch.cat([self._channel_steps(f"conv_{name}") for name in arch.conv_segments]),
            bias=None if bias is None else bias * conv.bias_code_scales.repeat_interleave(parts),
            A=-(kept.A_log_codes * kept.A_log_code_scales).exp(),
            D=kept.D_codes * kept.D_code_scales,
            scan=self._state_steps(),
        )

    def _channel_steps(self, site: str) -> Tensor:
        """The step (width,) of every channel at `site`."""
        steps = getattr(self.kept.scales, site)[:, 0]
        if site == "conv_x":
            return steps[self.labels.flatten()]
        return steps.repeat_interleave(self.arch.segments[site.removeprefix("conv_")] // len(steps))

    def _state_steps(self) -> ScanScales:
        """The steps of the scan, made once; in a block of 16 bits those of the state alone have a use."""
        if self._scan is not None:
            return self._scan
        scales = self.kept.scales
        none = torch.ones(int(self.labels.max()) + 1, device=self.labels.device)

        def steps(site: str) -> Tensor:
            kept = scales.get(site)
            return none if kept is None else kept[:, 0]

        state = scales.state if self.int8_state else None
        x, B, C, dt = (steps(site) for site in ("conv_x", "conv_B", "conv_C", "dt"))
        self._scan = ScanScales(self.labels, x, B, C, dt, state)
        return self._scan

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        sizes = self.arch.segments
        return dict(zip(sizes, values.split(list(sizes.values()), -1), strict=True))
