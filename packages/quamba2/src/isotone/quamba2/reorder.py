"""The new order of heads and channels put into the weights: the output stays what it was (section 2, "Reorder").

The scan treats every channel alike and the plan keeps a channel in its head and a head in its SSM group, so that what
in_proj writes in the new order, out_proj reads in the new order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.clustering import Plan
from isotone.shared.errors import InputError


@torch.no_grad()
def reorder(model: Any, plans: Sequence[Plan]) -> Any:
    """Put `plans`, one for each layer, into the weights of `model`, a Hugging Face Mamba or Mamba2; returns it.

    Do it before a Hadamard matrix is fused into out_proj's input: a permutation and a rotation do not commute. Raises
    `InputError` where a plan is no permutation, takes a head into another SSM group or a channel into another head;
    then no weight has changed.
    """
    arch = Architecture.of(model.config)
    if len(plans) != arch.layers:
        raise InputError(f"expected a plan for each of {arch.layers} layers, got {len(plans)}")
    for number, plan in enumerate(plans):
        check_plan(plan, arch, number)
    for layer, plan in zip(model.backbone.layers, plans, strict=True):
        permute(layer.mixer, arch, plan)
    return model


def check_plan(plan: Plan, arch: Architecture, layer: int = 0) -> None:
    """Raise `InputError` where `plan` would change what a layer of `arch` computes."""
    channels, heads = plan.channel_index.cpu(), plan.head_index.cpu()
    if not torch.equal(channels.sort().values, torch.arange(arch.inner)):
        raise InputError(f"expected a permutation of {arch.inner} channels in the plan of layer {layer}, got another")
    if not torch.equal(heads.sort().values, torch.arange(arch.heads)):
        raise InputError(f"expected a permutation of {arch.heads} heads in the plan of layer {layer}, got another")
    size = arch.heads // arch.groups
    places = torch.arange(arch.heads) // size
    if bool((heads // size != places).any()):
        moved = int((heads // size != places).nonzero()[0])
        raise InputError(
            f"expected heads to stay in their SSM group, got head {int(heads[moved])} in group {int(places[moved])} "
            f"in the plan of layer {layer}"
        )
    if bool((channels // arch.head_dim != heads.repeat_interleave(arch.head_dim)).any()):
        raise InputError(f"expected channels to stay in their head, the plan of layer {layer} moves one")


@torch.no_grad()
def permute(mixer: Any, arch: Architecture, plan: Plan) -> None:
    """Put `plan` into one mixer's weights, unchecked."""
    device = mixer.in_proj.weight.device
    channels, heads = plan.channel_index.to(device), plan.head_index.to(device)
    rows = {"x": channels, "z": channels, "dt": heads}
    start, parts = 0, []
    for name, size in arch.segments.items():
        parts.append(start + rows.get(name, torch.arange(size, device=device)))
        start += size
    _take(mixer.in_proj.weight, torch.cat(parts), 0)
    _take(mixer.in_proj.bias, torch.cat(parts), 0)
    rest = torch.arange(arch.inner, arch.conv_width, device=device)
    _take(mixer.conv1d.weight, torch.cat([channels, rest]), 0)
    _take(mixer.conv1d.bias, torch.cat([channels, rest]), 0)
    _take(mixer.out_proj.weight, channels, 1)
    _take(mixer.D, channels if mixer.D.shape[0] == arch.inner else heads, 0)
    if arch.kind == "mamba2":
        _take(mixer.norm.weight, channels, 0)
        _take(mixer.A_log, heads, 0)
        _take(mixer.dt_bias, heads, 0)
    else:
        # an extension: in Mamba x_proj mixes the channels, which its columns can undo
        _take(mixer.x_proj.weight, channels, 1)
        _take(mixer.dt_proj.weight, channels, 0)
        _take(mixer.dt_proj.bias, channels, 0)
        _take(mixer.A_log, channels, 0)


def _take(parameter: Any, index: torch.Tensor, dim: int) -> None:
    if parameter is not None:
        parameter.copy_(parameter.index_select(dim, index))
