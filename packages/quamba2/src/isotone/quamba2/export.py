"""A quantised model's weights as an ordinary Hugging Face model, which other programs load and run.

The rotation of the residual stream stays in the weights; that of out_proj's input, which runs online here, is undone in
them. What is lost is the storage in few bits, and the rounding of activations and states.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from isotone.quamba2.hadamard import hadamard_transform


@torch.no_grad()
def dequantized(model: Any) -> Any:
    """The Hugging Face model, in float32 on the CPU, whose weights are those of `model`, a `QuambaForCausalLM`."""
    made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.source)).float()
    every = torch.arange(model.arch.vocab, device=model.device)[None]
    made.backbone.embeddings.weight.copy_(model.embedding(every)[0])
    made.lm_head.weight.copy_(model.lm_head.weight())
    made.backbone.norm_f.weight.fill_(1)
    for kept, layer in zip(model.blocks, made.backbone.layers, strict=True):
        layer.norm.weight.fill_(1)
        _fill(kept, layer.mixer, model.config.hadamard != "none")
    return made.eval()


def save_dequantized(model: Any, folder: str | Path) -> Path:
    """Write `dequantized(model)` into `folder` in Hugging Face's format; returns it."""
    dequantized(model).save_pretrained(folder)
    return Path(folder)


def _fill(kept: Any, mixer: Any, online: bool) -> None:
    arch, tensors = kept.arch, kept.kept
    mixer.in_proj.weight.copy_(kept.in_proj.weight())
    out = kept.out_proj.weight()
    mixer.out_proj.weight.copy_(hadamard_transform(out, transpose=True) if online else out)
    for name in ("in_proj", "out_proj"):
        bias = getattr(kept, name).kept.get("bias")
        if bias is not None:
            getattr(mixer, name).bias.copy_(bias)
    whole = tensors.get("A_log") is not None
    sizes = torch.tensor(list(arch.conv_segments.values()), device=kept.labels.device)

    def small(codes: Tensor, scales: Tensor) -> Tensor:
        return codes * scales if len(scales) == 1 else codes * scales.repeat_interleave(sizes)

    conv = tensors.conv
    rows = conv.weight if whole else small(conv.codes.T, conv.code_scales).T
    mixer.conv1d.weight.copy_(rows[:, None])
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.copy_(conv.bias if whole else small(conv.bias_codes, conv.bias_code_scales))
    mixer.A_log.copy_(tensors.A_log if whole else small(tensors.A_log_codes, tensors.A_log_code_scales))
    skip = tensors.D if whole else small(tensors.D_codes, tensors.D_code_scales)
    mixer.D = torch.nn.Parameter(skip.float().cpu().clone())
    if arch.kind == "mamba2":
        mixer.norm.weight.copy_(tensors.norm)
        mixer.dt_bias.copy_(tensors.dt_bias)
        return
    mixer.dt_proj.bias.copy_(tensors.dt_bias)
    form = "float" if whole else "int8"
    for name in ("x_proj", "dt_proj"):
        getattr(mixer, name).weight.copy_(getattr(kept, f"{name}_{form}").weight())
