"""What a swift model is saved as: Hugging Face's format, and the one that ArcticInference's loader takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from isotone.shared.checkpoint import atomic_write
from isotone.shared.errors import InputError
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import KEY_VALUE_MODULES, QUERY_MODULES

EXPORTS = ("swift", "dual")


def student_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, a state dict of `model`, without the teacher's projections of the upper layers."""
    split = SwiftKVConfig.of(model.config)
    replaced = {
        f"model.layers.{number}.self_attn.{name}."
        for number in split.upper
        for name in QUERY_MODULES + KEY_VALUE_MODULES
    }
    return {key: value for key, value in state.items() if f"{key.rpartition('.')[0]}." not in replaced}


@contextmanager
def saved_state(model: Any, export: str, state: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """The part of `state` (default: the model's own) to save, the model's config describing it inside the block.

    Raises `InputError` on another `export`.
    """
    if export not in EXPORTS:
        raise InputError(f"expected export to be one of {', '.join(EXPORTS)}, got {export!r}")
    config = model.config
    before = config.swiftkv, config.teacher_weights
    config.swiftkv = True
    config.teacher_weights = bool(config.teacher_weights) and export == "dual"
    try:
        whole = model.state_dict() if state is None else state
        yield whole if config.teacher_weights else student_state(model, whole)
    finally:
        config.swiftkv, config.teacher_weights = before


def arctic_config(model: Any) -> dict[str, Any]:
    """config.json as ArcticInference's LlamaSwiftKVForCausalLM reads it. Raises `InputError` where it would not load.

    Its loader is for Llama, with one key and value a layer (it gave up AcrossKV), and reads RoPE from rope_theta and
    rope_scaling, which transformers 5 keeps in rope_parameters.
    """
    config = model.config
    split = SwiftKVConfig.of(config)
    if config.model_type != "llama_swiftkv":
        raise InputError(
            f"expected a Llama: ArcticInference loads swift models of no other family, got {config.model_type}"
        )
    if config.attention_bias:
        raise InputError("expected attention_bias=False: ArcticInference drops the bias of o_proj in the upper layers")
    if split.key_value_group_size != 1:
        raise InputError(
            f"expected key_value_group_size 1: ArcticInference does not serve AcrossKV, got "
            f"{split.key_value_group_size}"
        )
    if not len(split.upper):
        raise InputError(f"expected fewer key-value layers than {split.num_hidden_layers}: there is nothing to skip")
    with saved_state(model, "swift"):
        document = config.to_dict()
    rope = dict(document.pop("rope_parameters", None) or {})
    document.pop("teacher_weights")
    document |= {
        "architectures": ["LlamaSwiftKVForCausalLM"],
        "model_type": "llama_swiftkv",
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
    }
    document.pop("dtype", None)
    return document


def export_arctic(model: Any, folder: str | Path) -> Path:
    """Write `model` into `folder` as ArcticInference loads it: its key names, and its config. Returns the folder."""
    document = arctic_config(model)
    folder = Path(folder)
    model.save_pretrained(folder, export="swift")
    atomic_write(folder / "config.json", (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
    return folder
