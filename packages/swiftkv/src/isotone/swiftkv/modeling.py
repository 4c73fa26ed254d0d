"""Swift models as Hugging Face classes: teacher and student in one model, with a switch (`teacher()`).

`forward` is the whole student: every token runs every layer, which is what distillation and log-likelihoods need.
`generate` and `prefill` skip (engine.py) and give the same logits for the tokens they return. Teacher and lower half
are transformers' own layers, called as they are, so that with the switch off a model is bit for bit the one it came
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils.generic import can_return_tuple

from isotone.shared.errors import InputError
from isotone.swiftkv import config as configs
from isotone.swiftkv import engine
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import (
    KEY_VALUE_MODULES,
    QUERY_MODULES,
    SWIFT,
    expand_latent,
    keys_values,
    present,
    queries,
    rotate,
    window_of,
)
from isotone.swiftkv.generation import GenerationSettings, left_mask, sample, settings_of
from isotone.swiftkv.prompts import check_batch

_NO_TEACHER = (
    "expected a model with its teacher's weights to run the teacher, they were dropped; config.swiftkv = True runs the "
    "student, as SwiftKVForCausalLM.from_pretrained sets it"
)


_SETTINGS: ContextVar[GenerationSettings | None] = ContextVar("swiftkv_generation_settings", default=None)


class _SwiftKVModel:
    """What a family's base model gains: `norm_swiftkv`, the swift projections, and the student's forward."""

    config: Any
    layers: Any
    output_class: Any = BaseModelOutputWithPast

    def attach(self) -> None:
        """Add `norm_swiftkv` and the swift projections; without the teacher's weights, take the replaced ones out."""
        split = SwiftKVConfig.of(self.config)
        if not len(split.upper):
            return
        self.norm_swiftkv = _like(self.layers[split.num_key_value_layers].input_layernorm)
        for number in split.upper:
            attention = self.layers[number].self_attn
            replaced = present(attention, QUERY_MODULES)
            replaced += present(attention, KEY_VALUE_MODULES) if number in split.owners else []
            for name in replaced:
                setattr(attention, name + SWIFT, _like(getattr(attention, name)))
            if not self.config.teacher_weights:
                drop_replaced(attention)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model with the switch off, else the student; the same arguments and outputs as the base model's."""
        split = SwiftKVConfig.of(self.config)
        if not self.config.swiftkv or not len(split.upper):
            if len(split.upper) and not self.config.teacher_weights:
                raise InputError(_NO_TEACHER)
            wanted = {} if output_hidden_states is None else {"output_hidden_states": output_hidden_states}
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **wanted,
                **kwargs,
            )
        if kwargs.get("output_attentions"):
            raise InputError("expected output_attentions=False of a swift model: its upper layers return no weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("expected exactly one of input_ids and inputs_embeds")
        if isinstance(past_key_values, SwiftKVCache):
            raise InputError("expected a transformers cache in forward; a SwiftKVCache belongs to prefill and decode")
        if any(getattr(layer, "is_sliding", False) for layer in getattr(past_key_values, "layers", ())):
            # its layers are those of the base; ours are slots, shared by layers of both kinds
            raise InputError("expected DynamicCache() without a config: a cache with sliding layers forgets keys here")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        model: Any = self
        embeds = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cached = self.config.use_cache if use_cache is None else use_cache
        if cached and past_key_values is None and not (model.gradient_checkpointing and model.training):
            past_key_values = DynamicCache()
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen).unsqueeze(0)
        masks = self.masks(embeds, attention_mask, past_key_values, position_ids)
        rope = model.rotary_emb(embeds, position_ids=position_ids)
        hidden = embeds
        states = [hidden]
        for number in range(split.num_key_value_layers):
            hidden = self.layers[number](
                hidden,
                attention_mask=masks[number],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=bool(cached),
                position_embeddings=rope,
            )
            states.append(hidden)
        states += self.student_upper(hidden, masks, rope, past_key_values)
        last = model.norm(states[-1])
        return self.output_class(
            last_hidden_state=last,
            past_key_values=past_key_values if cached else None,
            hidden_states=(*states[:-1], last) if output_hidden_states else None,  # type: ignore[arg-type]
        )

    def masks(self, embeds: Tensor, attention_mask: Tensor | None, past: Any, position_ids: Tensor) -> list[Any]:
        """transformers' attention mask of each layer."""
        return layer_masks(self.config, embeds, attention_mask, past, position_ids)

    def upper_keys_values(self, hidden: Tensor, rope: Any) -> list[tuple[Tensor, Tensor]]:
        """SingleInputKV: each group's cached keys (b, K, n, key_dim), rotated, and values, all from h_l (b, n, d)."""
        model: Any = self
        states = model.norm_swiftkv(hidden)
        made = []
        for number in SwiftKVConfig.of(self.config).owners:
            keys, values = keys_values(self.layers[number].self_attn, states, SWIFT)
            made.append((rotate(keys, rope).transpose(1, 2), values.transpose(1, 2)))
        return made

    def student_upper(
        self, hidden: Tensor, masks: list[Any], rope: Any, past: Any = None, checkpointed: bool = False
    ) -> list[Tensor]:
        """The outputs of the layers from l on, (b, n, d) each, of h_l, every token running every layer.

        `checkpointed`: keep each layer's input alone for the backward pass.
        """
        model: Any = self
        split = SwiftKVConfig.of(self.config)
        made = self.upper_keys_values(hidden, rope)
        if past is not None:
            # once a group, in the group's slot: a transformers cache then holds l + (L - l) / g layers as ours does
            made = [past.update(*self._cached(pair), split.num_key_value_layers + i) for i, pair in enumerate(made)]
            made = [self._uncached(pair) for pair in made]
        outputs = []
        checkpointed = checkpointed or (model.gradient_checkpointing and model.training)
        for number in split.upper:
            keys, values = made[split.slot(number) - split.num_key_value_layers]
            if checkpointed:
                hidden = torch.utils.checkpoint.checkpoint(
                    self.student_layer, number, hidden, keys, values, masks[number], rope, use_reentrant=False
                )
            else:
                hidden = self.student_layer(number, hidden, keys, values, masks[number], rope)
            outputs.append(hidden)
        return outputs

    def student_layer(self, number: int, hidden: Tensor, keys: Tensor, values: Tensor, mask: Any, rope: Any) -> Tensor:
        """Layer `number` of the student: its own query, the group's keys and values, the original o_proj and MLP."""
        layer = self.layers[number]
        attention = layer.self_attn
        query = rotate(queries(attention, layer.input_layernorm(hidden), SWIFT), rope).transpose(1, 2)
        if hasattr(attention, "kv_lora_rank"):
            owner = self.layers[SwiftKVConfig.of(self.config).owner(number)].self_attn
            keys, values = expand_latent(attention, keys, owner.kv_b_proj_swiftkv)
        attended = attention_outputs(attention, query, keys, values, mask, window_of(self.config, number))
        hidden = hidden + attention.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _cached(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """MLA's cached key as transformers' caches hold it: latent and rotary part apart."""
        if getattr(self.config, "kv_lora_rank", None) is None:
            return pair
        latent, rotary = pair[0].split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return latent, rotary

    def _uncached(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if getattr(self.config, "kv_lora_rank", None) is None:
            return pair
        return torch.cat(pair, -1), pair[0][..., :0]


class _SwiftKVForCausalLM:
    """What a family's language model gains: the switch, skipping prefill and decode, and `generate` on top of them."""

    config: Any
    generation_config: Any
    model_class: type

    def __init__(self, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.model: Any = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    @property
    def split(self) -> SwiftKVConfig:
        """l and g of this model."""
        return SwiftKVConfig.of(self.config)

    def swiftkv(self, on: bool = True) -> Any:
        """Turn the student on or, with `on` false, off; returns the model. Raises `InputError` without a teacher."""
        if not on and len(self.split.upper) and not self.config.teacher_weights:
            raise InputError(_NO_TEACHER)
        self.config.swiftkv = on
        return self

    @contextmanager
    def teacher(self) -> Iterator[Any]:
        """Inside, the model is the one it was converted from."""
        before = self.config.swiftkv
        try:
            yield self.swiftkv(False)
        finally:
            self.config.swiftkv = before

    def make_cache(self, batch: int, max_length: int, kv_dtype: str = "model", **scales: Tensor) -> SwiftKVCache:
        """A cache for `batch` rows of up to `max_length` tokens (engine.make_cache)."""
        return engine.make_cache(self, batch, max_length, kv_dtype, **scales)

    def prefill(self, input_ids: Tensor, cache: SwiftKVCache, **options: Any) -> Tensor:
        """Take the prompts (b, n) into `cache` and return the logits (b, V) of each one's last token (engine.prefill).

        Options: attention_mask, position_ids, chunk.
        """
        return engine.prefill(self, input_ids, cache, **options)

    def decode(self, tokens: Tensor, cache: SwiftKVCache) -> Tensor:
        """One more token (b,) for every row; the logits (b, V) after it (engine.decode)."""
        return engine.decode(self, tokens, cache)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate` with the prompt's tokens stopping after layer l.

        Beyond transformers' arguments: `prefill_chunk` (tokens at a time), `kv_dtype` ("model", "fp32", "fp16", "bf16",
        "fp8", "int8", "int4"), `decode_mode` ("eager", "compile", "cudagraph"), `draft_length` (tokens a draft, with
        `assistant_model` or `prompt_lookup_num_tokens`). Greedy search, sampling with every logits processor, stopping
        criteria, streamers and several return sequences are supported; beams, and outputs that skipped tokens do not
        have (hidden states, attentions), raise `InputError`.
        """
        settings, rest = settings_of(self, generation_config, kwargs)
        ids = inputs if inputs is not None else rest.get("input_ids")
        if isinstance(ids, Tensor):
            check_batch(ids)
        if rest.get("attention_mask") is None and isinstance(ids, Tensor):
            rest["attention_mask"] = left_mask(
                ids, rest.get("pad_token_id"), generation_config or self.generation_config
            )
        token = _SETTINGS.set(settings)  # of this call alone, whatever runs beside it
        try:
            return super().generate(inputs=inputs, generation_config=generation_config, **rest)  # type: ignore[misc]
        finally:
            _SETTINGS.reset(token)

    def _sample(self, input_ids: Tensor, **prepared: Any) -> Any:
        """What transformers' `generate` calls once it has prepared processors, criteria and lengths."""
        return sample(self, input_ids, _SETTINGS.get() or GenerationSettings(), **prepared)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        export: str = "dual",
        **kwargs: Any,
    ) -> None:
        """Save in Hugging Face format, with its arguments; `export` "swift" leaves the teacher's projections out,
        "dual" keeps all. `state_dict`: weights to save in place of the model's own, as sharded training gathers them.

        Either way the saved config has the switch on, so that a loaded model is the student.
        """
        from isotone.swiftkv.export import saved_state

        with saved_state(self, export, state_dict) as state:
            super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)  # type: ignore[misc]


def layer_masks(
    config: Any, embeds: Tensor, attention_mask: Tensor | None, past: Any, position_ids: Tensor
) -> list[Any]:
    """transformers' attention mask of each layer of a model of `config`."""
    arguments: dict[str, Any] = dict(
        config=config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        past_key_values=past,
        position_ids=position_ids,
    )
    windows = [window_of(config, number) for number in range(config.num_hidden_layers)]
    whole = create_causal_mask(**arguments) if None in windows else None
    sliding = create_sliding_window_causal_mask(**arguments) if any(w is not None for w in windows) else None
    return [whole if window is None else sliding for window in windows]


def attention_outputs(
    attention: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, window: int | None
) -> Tensor:
    """transformers' own attention on given (b, H, n, e), (b, K, m, e), (b, K, m, v): (b, n, H * v)."""
    name = attention.config._attn_implementation
    function = _EAGER if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    extra: dict[str, Any] = {} if window is None else {"sliding_window": window}
    dropout = attention.attention_dropout if attention.training else 0.0
    output, _ = function(attention, query, keys, values, mask, dropout=dropout, scaling=attention.scaling, **extra)
    return output.flatten(2)


_EAGER = modeling_llama.eager_attention_forward


def drop_replaced(attention: nn.Module) -> None:
    """Take the projections out of an upper layer that its swift ones stand for (MLA's kv_b_proj too)."""
    for name in present(attention, QUERY_MODULES + KEY_VALUE_MODULES):
        setattr(attention, name, None)


def _like(module: Any) -> Any:
    """A new module of the same shape, type and device; its values are set by whoever asked for it."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        made: Any = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device=weight.device, dtype=weight.dtype
        )
        return made
    with torch.device(weight.device):
        return type(module)(weight.shape[0], eps=module.variance_epsilon).to(weight.dtype)


class LlamaSwiftKVModel(_SwiftKVModel, modeling_llama.LlamaModel):
    """Llama's layers with SwiftKV."""

    config_class = configs.LlamaSwiftKVConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attach()


class MistralSwiftKVModel(_SwiftKVModel, modeling_mistral.MistralModel):
    """Mistral's layers with SwiftKV."""

    config_class = configs.MistralSwiftKVConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attach()


class Qwen2SwiftKVModel(_SwiftKVModel, modeling_qwen2.Qwen2Model):
    """Qwen2's layers with SwiftKV."""

    config_class = configs.Qwen2SwiftKVConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attach()


class Qwen3SwiftKVModel(_SwiftKVModel, modeling_qwen3.Qwen3Model):
    """Qwen3's layers with SwiftKV."""

    config_class = configs.Qwen3SwiftKVConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attach()


class DeepseekV2SwiftKVModel(_SwiftKVModel, modeling_deepseek_v2.DeepseekV2Model):
    """DeepSeek-V2's layers with SwiftKV."""

    output_class = MoeModelOutputWithPast
    config_class = configs.DeepseekV2SwiftKVConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.attach()


class LlamaSwiftKVForCausalLM(_SwiftKVForCausalLM, modeling_llama.LlamaForCausalLM):  # type: ignore[misc]
    """A Llama with SwiftKV."""

    config_class = configs.LlamaSwiftKVConfig
    model_class = LlamaSwiftKVModel


class MistralSwiftKVForCausalLM(_SwiftKVForCausalLM, modeling_mistral.MistralForCausalLM):  # type: ignore[misc]
    """A Mistral with SwiftKV."""

    config_class = configs.MistralSwiftKVConfig
    model_class = MistralSwiftKVModel


class Qwen2SwiftKVForCausalLM(_SwiftKVForCausalLM, modeling_qwen2.Qwen2ForCausalLM):  # type: ignore[misc]
    """A Qwen2 with SwiftKV."""

    config_class = configs.Qwen2SwiftKVConfig
    model_class = Qwen2SwiftKVModel


class Qwen3SwiftKVForCausalLM(_SwiftKVForCausalLM, modeling_qwen3.Qwen3ForCausalLM):  # type: ignore[misc]
    """A Qwen3 with SwiftKV."""

    config_class = configs.Qwen3SwiftKVConfig
    model_class = Qwen3SwiftKVModel


class DeepseekV2SwiftKVForCausalLM(_SwiftKVForCausalLM, modeling_deepseek_v2.DeepseekV2ForCausalLM):  # type: ignore[misc]
    """A DeepSeek-V2 with SwiftKV."""

    config_class = configs.DeepseekV2SwiftKVConfig
    model_class = DeepseekV2SwiftKVModel


MODELS: dict[str, type] = {
    "llama": LlamaSwiftKVForCausalLM,
    "mistral": MistralSwiftKVForCausalLM,
    "qwen2": Qwen2SwiftKVForCausalLM,
    "qwen3": Qwen3SwiftKVForCausalLM,
    "deepseek_v2": DeepseekV2SwiftKVForCausalLM,
}


def _register() -> None:
    for name, kind in MODELS.items():
        AutoConfig.register(f"{name}_swiftkv", kind.config_class, exist_ok=True)  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)  # type: ignore[attr-defined]
        AutoModel.register(kind.config_class, kind.model_class, exist_ok=True)  # type: ignore[attr-defined]


_register()
