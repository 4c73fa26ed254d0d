"""The tensors of a quantised model: their names, shapes and types, and how they are made of what `prepare` gives.

The model computes with these tensors and saves them as they are: a saved model gives the same logits bit by bit.
Per block: in_proj and out_proj (4 bits: `packed`, eight codes an int32, and float16 `scales`; 8 bits: int8 `codes` and
float32 `scales`, one for each segment of rows), `dt_bias` and `norm` in float32. Blocks of 8-bit activations have their
static `scales` and the convolution, A_log and D in int8; blocks of 16 bits have those in float32; mixed models both.
An embedding or a head of 16 bits is float16, and computed with in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.calibrate import groupings, groups_of
from isotone.quamba2.clustering import Plan
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.forward import HEAD
from isotone.quamba2.observers import Grouping
from isotone.quamba2.packing import pack_int4, quantize_embedding
from isotone.quamba2.prepare import Prepared, Weight
from isotone.quamba2.weights import GroupedWeight, int8_scale

Spec = tuple[tuple[int, ...], torch.dtype]


def tensors_of(prepared: Prepared) -> dict[str, Tensor]:
    """Every tensor of the quantised model by name, on the CPU."""
    arch, config, model = prepared.arch, prepared.config, prepared.model
    found = _embedding(model.backbone.embeddings.weight.detach(), int(config.embedding_bits or 16))
    for number, layer in enumerate(model.backbone.layers):
        block = _block(prepared, layer.mixer, number)
        found |= {f"blocks.{number}.{name}": values for name, values in block.items()}
    head = prepared.weights.get((HEAD, "lm_head"))
    if head is None:
        found["lm_head.weight"] = model.lm_head.weight.detach().half()
    else:
        found |= _linear("lm_head", head, [arch.vocab])
    if 8 in _precisions(config) and config.lm_head_bits != 16:
        found["lm_head.input_scale"] = prepared.scales[HEAD, "lm_head"]
    # a copy of each: some are views of one storage, which a file holds once
    return {name: values.detach().to("cpu", copy=True).contiguous() for name, values in found.items()}


def _embedding(weight: Tensor, bits: int) -> dict[str, Tensor]:
    if bits == 16:
        return {"embedding.weight": weight.half()}
    codes, scales = quantize_embedding(weight, bits)
    return {f"embedding.{'packed' if bits == 4 else 'codes'}": codes, "embedding.scales": scales}


def _linear(name: str, weight: Weight, segments: list[int], bias: Tensor | None = None) -> dict[str, Tensor]:
    if isinstance(weight, GroupedWeight):
        found = {f"{name}.packed": pack_int4(weight.codes), f"{name}.scales": weight.scales}
    else:
        starts = torch.tensor([0, *segments[:-1]]).cumsum(0)
        found = {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales[starts.to(weight.scales.device)]}
    return found if bias is None else {**found, f"{name}.bias": bias.float()}


def _block(prepared: Prepared, mixer: Any, number: int) -> dict[str, Tensor]:
    arch, config = prepared.arch, prepared.config
    found: dict[str, Tensor] = {}
    for name, sizes in (("in_proj", list(arch.segments.values())), ("out_proj", [arch.hidden])):
        found |= _linear(name, prepared.weights[number, name], sizes, getattr(mixer, name).bias)
    if arch.kind == "mamba2":
        found |= {"dt_bias": mixer.dt_bias.float(), "norm": mixer.norm.weight.float()}
    else:
        found["dt_bias"] = mixer.dt_proj.bias.float()
    if 8 in _precisions(config):
        found |= _int8_parts(prepared, mixer, number)
    if 16 in _precisions(config):
        found |= {"conv.weight": mixer.conv1d.weight[:, 0].float(), "A_log": mixer.A_log.float(), "D": mixer.D.float()}
        if mixer.conv1d.bias is not None:
            found["conv.bias"] = mixer.conv1d.bias.float()
        if arch.kind == "mamba":
            found |= {"x_proj.weight": mixer.x_proj.weight.float(), "dt_proj.weight": mixer.dt_proj.weight.float()}
    plan = prepared.plans[number] if prepared.plans else None
    if plan is not None:
        found |= {"head_ends": plan.head_ends, "dim_ends": plan.dim_ends}
    for name in _sites(arch, config, groups_of(plan)):
        found[f"scales.{name}"] = prepared.scales[number, name]
    return found


def _int8_parts(prepared: Prepared, mixer: Any, number: int) -> dict[str, Tensor]:
    arch = prepared.arch
    sizes = list(arch.conv_segments.values())
    parts = {"conv.codes": (mixer.conv1d.weight[:, 0], sizes), "A_log_codes": (mixer.A_log, [len(mixer.A_log)])}
    parts["D_codes"] = (mixer.D, [len(mixer.D)])
    if mixer.conv1d.bias is not None:
        parts["conv.bias_codes"] = (mixer.conv1d.bias, sizes)
    found = {}
    for name, (values, rows) in parts.items():
        pieces = values.float().split(rows)
        scales = [int8_scale(piece) for piece in pieces]
        codes = [torch.round(p / s).clamp(-128, 127).to(torch.int8) for p, s in zip(pieces, scales, strict=True)]
        found[name] = torch.cat(codes)
        found[name.replace("codes", "code_scales")] = torch.stack(scales)
    if arch.kind == "mamba":
        found |= _linear("x_proj", prepared.weights[number, "x_proj"], [arch.dt_rank + 2 * arch.state])
        found |= _linear("dt_proj", prepared.weights[number, "dt_proj"], [arch.inner])
    return found


def _precisions(config: QuambaConfig) -> set[int]:
    """The activations' bits that the tensors of every block serve."""
    return {8, 16} if config.a_bits == "mixed" else {int(config.a_bits)}


def _sites(arch: Architecture, config: QuambaConfig, x_groups: Grouping | None) -> dict[str, Grouping]:
    """The sites of a block whose scales are kept."""
    kept = groupings(arch, config, x_groups)
    names = set(kept) if 8 in _precisions(config) else {"state"}
    return {name: kept[name] for name in kept if name in names and (name != "state" or config.state_bits == 8)}


def plan_of(arch: Architecture, head_ends: Tensor, dim_ends: Tensor) -> Plan:
    """The plan whose ends are saved, as the channels stand: no order is left to change."""
    heads, dims = head_ends.cpu().long(), dim_ends.cpu().long()
    head_sizes = heads.diff(dim=-1, prepend=torch.zeros_like(heads[..., :1]))
    dim_sizes = dims.diff(dim=-1, prepend=torch.zeros_like(dims[..., :1]))
    return Plan(torch.arange(arch.inner), torch.arange(arch.heads), head_sizes, dim_sizes)


def expected(arch: Architecture, config: QuambaConfig, biases: bool, conv_bias: bool, d_size: int) -> dict[str, Spec]:
    """Name, shape and type of every tensor, from the options alone: what a file must hold.

    `biases`: of in_proj and out_proj; `conv_bias`: of the convolution; `d_size`: numbers of D.
    """
    float32, int8, int32 = torch.float32, torch.int8, torch.int32

    def linear(name: str, rows: int, columns: int, bits: int, segments: int) -> dict[str, Spec]:
        if bits == 4:
            group = config.group_size or columns
            return {
                f"{name}.packed": ((rows, columns // 8), int32),
                f"{name}.scales": ((rows, columns // group), torch.float16),
            }
        if bits == 16:
            return {f"{name}.weight": ((rows, columns), float32)}
        return {f"{name}.codes": ((rows, columns), int8), f"{name}.scales": ((segments,), float32)}

    rows = {4: ("packed", (arch.vocab, arch.hidden // 8), int32), 8: ("codes", (arch.vocab, arch.hidden), int8)}
    kind, shape, dtype = rows.get(
        int(config.embedding_bits or 16), ("weight", (arch.vocab, arch.hidden), torch.float16)
    )
    found: dict[str, Spec] = {f"embedding.{kind}": (shape, dtype)}
    if kind != "weight":
        found["embedding.scales"] = ((arch.vocab,), float32)
    found |= linear("lm_head", arch.vocab, arch.hidden, int(config.lm_head_bits or 16), 1)
    if config.lm_head_bits == 16:
        found["lm_head.weight"] = ((arch.vocab, arch.hidden), torch.float16)
    if 8 in _precisions(config) and config.lm_head_bits != 16:
        found["lm_head.input_scale"] = ((1, 1), float32)
    width = sum(arch.segments.values())
    block = linear("in_proj", width, arch.hidden, config.w_bits, len(arch.segments))
    block |= linear("out_proj", arch.hidden, arch.inner, config.w_bits, 1)
    if biases:
        block |= {"in_proj.bias": ((width,), float32), "out_proj.bias": ((arch.hidden,), float32)}
    mamba2 = arch.kind == "mamba2"
    a_shape = (arch.heads,) if mamba2 else (arch.inner, arch.state)
    block["dt_bias"] = ((arch.heads if mamba2 else arch.inner,), float32)
    if mamba2:
        block["norm"] = ((arch.inner,), float32)
    parts, window = len(arch.conv_segments), (arch.conv_width, arch.conv_kernel)
    if 8 in _precisions(config):
        block |= {"conv.codes": (window, int8), "conv.code_scales": ((parts,), float32)}
        for name, one in (("A_log", a_shape), ("D", (d_size,))):
            block |= {f"{name}_codes": (one, int8), f"{name}_code_scales": ((1,), float32)}
        if conv_bias:
            block |= {"conv.bias_codes": ((arch.conv_width,), int8), "conv.bias_code_scales": ((parts,), float32)}
    if 16 in _precisions(config):
        block |= {
            "conv.weight": (window, float32),
            "A_log": (a_shape, float32),
            "D": ((d_size,), float32),
        }
        if conv_bias:
            block["conv.bias"] = ((arch.conv_width,), float32)
    if not mamba2:
        for bits in _precisions(config):
            block |= linear("x_proj", arch.dt_rank + 2 * arch.state, arch.inner, bits, 1)
            block |= linear("dt_proj", arch.inner, arch.dt_rank, bits, 1)
    x_groups = None
    if config.reorders and (mamba2 or config.group_channels):
        m = min(config.head_groups if mamba2 else 1, arch.heads // arch.groups)
        n = min(config.dim_groups, arch.head_dim)
        block |= {"head_ends": ((arch.groups, m), int32), "dim_ends": ((arch.groups, m, n), int32)}
        x_groups = Grouping(torch.zeros(arch.inner, dtype=torch.int64), arch.groups * m * n)
    for name, kept in _sites(arch, config, x_groups).items():
        block[f"scales.{name}"] = ((kept.count, kept.states), float32)
    for number in range(arch.layers):
        found |= {f"blocks.{number}.{name}": spec for name, spec in block.items()}
    return found
