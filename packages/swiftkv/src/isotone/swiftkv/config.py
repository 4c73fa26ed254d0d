"""Which layers keep their own keys and values, and which share: the one place where l and g are checked.

Symbols of the paper: L `num_hidden_layers`, l `num_key_value_layers`, g `key_value_group_size`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

from transformers import DeepseekV2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from isotone.shared.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "deepseek_v2")
_MOVING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class SwiftKVConfig:
    """SingleInputKV and AcrossKV of a model with `num_hidden_layers` layers.

    The first `num_key_value_layers` layers keep their own keys and values. Those of the layers after are computed from
    the input of the first of them (SingleInputKV), once for each `key_value_group_size` consecutive layers (AcrossKV).
    l = L leaves the model as it is. Raises `InputError` where l is not 1 to L or g does not divide L - l.
    """

    num_hidden_layers: int
    num_key_value_layers: int
    key_value_group_size: int = 1

    def __post_init__(self) -> None:
        layers, kept, group = self.num_hidden_layers, self.num_key_value_layers, self.key_value_group_size
        for name, value in (("num_key_value_layers", kept), ("key_value_group_size", group)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"expected {name} to be a whole number, got {value!r}")
        if not 1 <= kept <= layers:
            raise InputError(f"expected num_key_value_layers from 1 to the model's {layers} layers, got {kept}")
        if group < 1 or (layers - kept) % group:
            raise InputError(
                f"expected key_value_group_size to divide the {layers - kept} layers that keep no keys and values "
                f"({layers} - {kept}), got {group}"
            )

    @classmethod
    def of(cls, config: Any) -> SwiftKVConfig:
        """The split that a Hugging Face config of this package holds; of any other config, l = L."""
        layers = config.num_hidden_layers
        kept = getattr(config, "num_key_value_layers", None) or layers
        return cls(layers, kept, getattr(config, "key_value_group_size", None) or 1)

    @property
    def upper(self) -> range:
        """The layers that have no keys and values of their own input."""
        return range(self.num_key_value_layers, self.num_hidden_layers)

    @property
    def owners(self) -> range:
        """The first layer of each group: it holds the group's key and value projections."""
        return range(self.num_key_value_layers, self.num_hidden_layers, self.key_value_group_size)

    @property
    def slots(self) -> int:
        """How many keys-and-values a token leaves in the cache: l + (L - l) / g."""
        return self.num_key_value_layers + len(self.owners)

    def slot(self, layer: int) -> int:
        """The slot of the cache that `layer` attends to."""
        if layer < self.num_key_value_layers:
            return layer
        return self.num_key_value_layers + (layer - self.num_key_value_layers) // self.key_value_group_size

    def owner(self, layer: int) -> int:
        """The layer whose projections fill the slot of `layer`."""
        if layer < self.num_key_value_layers:
            return layer
        return layer - (layer - self.num_key_value_layers) % self.key_value_group_size


def check_family(config: Any) -> None:
    """Raise `InputError` where a model of `config`, converted or not, is not one whose layers this package computes.

    "dynamic" and "longrope" RoPE change with the length, so that cached keys would not fit later ones.
    """
    name = str(getattr(config, "model_type", None)).removesuffix("_swiftkv")
    if name not in FAMILIES:
        raise InputError(f"expected a model of type {', '.join(FAMILIES)}, got {name!r}")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in _MOVING_ROPE:
        raise InputError(
            f"expected RoPE that is the same at every length, got rope_type {kind!r}: its rotations change with the "
            "length, so that cached keys would not fit later ones"
        )


# The fields are those of the authors' checkpoints, but for two defaults: theirs is swiftkv=False, which silently runs
# the teacher, and theirs has no teacher_weights (whether the replaced projections of the upper layers are there too).
# transformers makes a dataclass of each, whose `__init__` takes more than its fields: not to be checked by its fields.


@no_type_check
class LlamaSwiftKVConfig(LlamaConfig):
    """Llama's config with l, g and the switch; `model_type` and keys are those of the authors' checkpoints."""

    model_type = "llama_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    teacher_weights: bool = False


@no_type_check
class MistralSwiftKVConfig(MistralConfig):
    """Mistral's config with l, g and the switch."""

    model_type = "mistral_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    teacher_weights: bool = False


@no_type_check
class Qwen2SwiftKVConfig(Qwen2Config):
    """Qwen2's config with l, g and the switch."""

    model_type = "qwen2_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    teacher_weights: bool = False


@no_type_check
class Qwen3SwiftKVConfig(Qwen3Config):
    """Qwen3's config with l, g and the switch."""

    model_type = "qwen3_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    teacher_weights: bool = False


@no_type_check
class DeepseekV2SwiftKVConfig(DeepseekV2Config):
    """DeepSeek-V2's config with l, g and the switch."""

    model_type = "deepseek_v2_swiftkv"
    swiftkv: bool = True
    num_key_value_layers: int | None = None
    key_value_group_size: int | None = 1
    teacher_weights: bool = False
