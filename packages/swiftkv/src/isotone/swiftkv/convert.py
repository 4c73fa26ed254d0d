"""A Hugging Face model into a swift one: new parameters, their initialisation, and what may be trained.

The new parameters start as the authors' code starts them: norm_swiftkv is layer l's input_layernorm, Q' each
layer's Q, and K', V' the mean of K, V over the layers of their group. At l = L - 1 the converted model is then
exactly the base.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from isotone.shared.errors import InputError
from isotone.swiftkv.config import FAMILIES, SwiftKVConfig, check_family
from isotone.swiftkv.families import KEY_VALUE_MODULES, QUERY_MODULES, SWIFT, present
from isotone.swiftkv.loading import check_finite
from isotone.swiftkv.modeling import MODELS, drop_replaced

TRAINABLE = ("qkv", "norms", "full")


def convert(model: Any, num_key_value_layers: int, key_value_group_size: int = 1) -> Any:
    """The swift model of `model` (Llama, Mistral, Qwen2, Qwen3 or DeepSeek-V2), in eval mode, teacher included.

    The weights are taken over, not copied: `model` shares them with the result, and like the result is in eval mode and
    frozen afterwards (but for the new weights, which only the result has). It computes what it computed, and may be
    converted again. Settings are apart: attention implementation and generation config of one do not change the other.
    Raises `InputError` on l or g that do not fit, a family that is not supported, a model that is converted already,
    quantised, with adapters, or on several devices, biases that only some layers of a group have, RoPE that depends on
    the length, and weights that are not finite.
    """
    base = model.config
    name = str(base.model_type)
    if name.endswith("_swiftkv"):
        raise InputError(f"expected a model that is not converted yet, got one of type {name!r}")
    if name not in FAMILIES:
        raise InputError(f"expected a model of type {', '.join(FAMILIES)}, got {name!r}")
    if not hasattr(model, "lm_head"):
        raise InputError(f"expected a causal language model with lm_head, got {type(model).__name__}")
    split = SwiftKVConfig(base.num_hidden_layers, num_key_value_layers, key_value_group_size)
    _check(model, split)
    kind: Any = MODELS[name]
    values = base.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    config = kind.config_class.from_dict(
        {
            **values,
            "num_key_value_layers": num_key_value_layers,
            "key_value_group_size": key_value_group_size,
            "teacher_weights": True,
            "swiftkv": True,
        }
    )
    config._attn_implementation = base._attn_implementation
    with torch.device("meta"):
        converted = kind(config)
    converted.model.embed_tokens = model.model.embed_tokens
    converted.model.layers = nn.ModuleList(_thin_layer(layer, config) for layer in model.model.layers)
    converted.model.norm = model.model.norm
    converted.model.rotary_emb = model.model.rotary_emb
    converted.lm_head = model.lm_head
    converted.generation_config = copy.deepcopy(model.generation_config)
    if len(split.upper):
        converted.model.attach()
        initialize(converted)
    freeze(converted, "qkv")
    model.eval()
    return converted.eval()


@torch.no_grad()
def initialize(model: Any) -> None:
    """Set the new parameters from the teacher's."""
    split = SwiftKVConfig.of(model.config)
    layers = model.model.layers
    model.model.norm_swiftkv.weight.copy_(layers[split.num_key_value_layers].input_layernorm.weight)
    for number in split.upper:
        attention = layers[number].self_attn
        for name in present(attention, QUERY_MODULES):
            for target, source in zip(
                getattr(attention, name + SWIFT).parameters(), getattr(attention, name).parameters(), strict=True
            ):
                target.copy_(source)
    for first in split.owners:
        group = [layers[first + i].self_attn for i in range(split.key_value_group_size)]
        for name in present(group[0], KEY_VALUE_MODULES):
            sources = zip(*(getattr(attention, name).parameters() for attention in group), strict=True)
            for target, shared in zip(getattr(group[0], name + SWIFT).parameters(), sources, strict=True):
                # the mean in fp32: half precision would lose bits to the sum
                target.copy_(shared[0] if len(shared) == 1 else torch.stack([s.float() for s in shared]).mean(0))


def freeze(model: Any, train: str) -> list[nn.Parameter]:
    """Let gradients reach the parameters that `train` names, and no other; returns them.

    "qkv": the paper's, Q', K', V' and norm_swiftkv. "norms": the norms of the layers from l on too. "full": every
    weight of those layers. Raises `InputError` on another name.
    """
    if train not in TRAINABLE:
        raise InputError(f"expected train to be one of {', '.join(TRAINABLE)}, got {train!r}")
    split = SwiftKVConfig.of(model.config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen: dict[int, nn.Parameter] = {}

    def choose(parameters: Any) -> None:
        for parameter in parameters:
            chosen.setdefault(id(parameter), parameter.requires_grad_(True))

    if len(split.upper):
        choose(model.model.norm_swiftkv.parameters())
    for number in split.upper:
        layer = model.model.layers[number]
        choose(p for key, p in layer.named_parameters() if SWIFT in key)
        if train == "norms":
            choose(layer.input_layernorm.parameters())
            choose(layer.post_attention_layernorm.parameters())
        if train == "full":
            replaced = present(layer.self_attn, QUERY_MODULES + KEY_VALUE_MODULES)
            teacher = {f"self_attn.{name}" for name in replaced}
            choose(p for key, p in layer.named_parameters() if key.rpartition(".")[0] not in teacher)
    return list(chosen.values())


def drop_teacher(model: Any) -> Any:
    """Take the teacher's projections out of the upper layers: the model is the student alone, and as small as one.

    Returns the model. The model it was converted from, and others converted from that one, keep theirs.
    """
    split = SwiftKVConfig.of(model.config)
    for number in split.upper:
        drop_replaced(model.model.layers[number].self_attn)
    model.config.teacher_weights = False
    model.config.swiftkv = True
    return model


def teacher_of(model: Any) -> Any:
    """A second model of the same weights, switched off: the teacher of `model` as it is now, also while `distill`
    trains what the teacher shares (it trains copies of the layers then)."""
    made = thin(model)
    made.config = copy.deepcopy(model.config)
    made.model = thin(model.model)
    made.model.config = made.config
    made.model.layers = nn.ModuleList(_thin_layer(layer, made.config) for layer in model.model.layers)
    return made.swiftkv(False)


def _thin_layer(layer: nn.Module, config: Any) -> nn.Module:
    """A layer and an attention of their own, so that projections may come and go, around the same parameters; the
    attention looks at `config`, that of the model which the layer is for."""
    made = thin(layer)
    made.self_attn = thin(layer.self_attn)  # type: ignore[arg-type]
    made.self_attn.config = config
    return made


def thin(module: nn.Module) -> Any:
    """A module of its own around the same parameters and submodules: what is put in one is not in the other."""
    made = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):  # parameters, buffers, modules and hooks
            made.__dict__[name] = copy.copy(value)
    return made


def _check(model: Any, split: SwiftKVConfig) -> None:
    check_family(model.config)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1:
        raise InputError(f"expected a model on one device, got parts on {', '.join(places)}")
    check_finite(model)
    layers = model.model.layers
    for number in split.upper:
        attention, owner = layers[number].self_attn, layers[split.owner(number)].self_attn
        for name in present(attention, QUERY_MODULES + KEY_VALUE_MODULES):
            module, first = getattr(attention, name), getattr(owner, name)
            if isinstance(first, nn.Linear) != isinstance(module, nn.Linear) or (
                name.endswith(("_proj", "_with_mqa")) and type(module) is not nn.Linear
            ):
                raise InputError(
                    f"expected plain linear weights (merge adapters, load unquantised), got {type(module).__name__} in "
                    f"layer {number}: {name}"
                )
            if (getattr(module, "bias", None) is None) != (getattr(first, "bias", None) is None):
                raise InputError(
                    f"expected {name} of the layers of a group to have a bias or none, got both in layers "
                    f"{split.owner(number)} and {number}"
                )
