"""The quantised model: int8 and int4 storage, int8 products, int8 caches (section 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.blocks import QuantBlock, within
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.fake import head_bits
from isotone.quamba2.forward import Cache, check_ids, padding_mask
from isotone.quamba2.gated_norm import add_rms_norm
from isotone.quamba2.modules import Holder, QuantEmbedding, QuantLinear
from isotone.quamba2.sampling import generate
from isotone.shared.errors import InputError


@dataclass
class QuambaOutput:
    """`logits` (b, n, vocab), and the `cache` that was given."""

    logits: Tensor
    cache: Cache | None = None


class QuambaForCausalLM(Holder):
    """A quantised Mamba or Mamba2 with its head (section 8). Made by `quantize` or `from_pretrained`.

    `source`: the Hugging Face config of the float model. `tensors`: of `layout`. Not to be trained, nor cast: `to`
    moves it to a device. Saved and loaded by `saving`, which also checks what it reads.
    """

    def __init__(self, source: Any, config: QuambaConfig, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        arch = Architecture.of(source)
        self.source, self.arch, self.config = source, arch, config
        self.block_bits = config.block_bits(arch.layers)
        self.embedding = QuantEmbedding(within(tensors, "embedding"))
        self.blocks = nn.ModuleList(
            QuantBlock(arch, config, within(tensors, f"blocks.{number}"), bits)
            for number, bits in enumerate(self.block_bits)
        )
        head = within(tensors, "lm_head")
        self.register_buffer("input_scale", head.pop("input_scale", None))
        self.lm_head = QuantLinear(head, [arch.vocab])
        self.names = list(tensors)
        self._set_head()
        self.eval()

    @property
    def device(self) -> torch.device:
        first: Any = self.blocks[0]
        device: torch.device = first.labels.device
        return device

    def new_cache(self) -> Cache:
        """An empty cache for `forward`."""
        return Cache(self.arch.layers)

    def set_precision(self, block_bits: Sequence[int]) -> QuambaForCausalLM:
        """Give each block activations of 8 or 16 bits; the weights stay. Returns the model.

        Raises `InputError` on another length, other bits, or a model that was not quantised with a_bits "mixed".
        """
        if len(block_bits) != self.arch.layers or set(block_bits) - {8, 16}:
            raise InputError(f"expected 8 or 16 for each of {self.arch.layers} blocks, got {list(block_bits)}")
        blocks: Any = self.blocks
        for block, bits in zip(blocks, block_bits, strict=True):
            if block.bits != bits:
                block.set_bits(bits)
        self.block_bits = tuple(block_bits)
        self._set_head()
        return self

    def _set_head(self) -> None:
        self.head_bits = head_bits(self.block_bits, self.lm_head.bits)
        self.lm_head.prepare_int8(self.head_bits == 8)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> QuambaOutput:
        """The logits (b, l, vocab), or of the last token alone, (b, 1, vocab), with `last_only`.

        `cache`: of the tokens before, updated in place. `attention_mask` (b, l): 0 for padding, on the left. Raises
        `InputError` on ids outside the vocabulary, or none.
        """
        check_ids(input_ids, self.arch.vocab)
        mask = padding_mask(attention_mask, input_ids)
        return QuambaOutput(self.run(input_ids, cache, mask, last_only), cache)

    def run(self, input_ids: Tensor, cache: Cache | None, mask: Tensor | None, last_only: bool) -> Tensor:
        """`forward` without its checks, which wait for the device: what a CUDA graph records. Returns the logits."""
        hidden = self.embedding(input_ids)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, cache, number, mask)
        if cache is not None:
            cache.length += input_ids.shape[1]
        hidden = hidden[:, -1:] if last_only else hidden
        if self.head_bits == 16:
            return self.lm_head(add_rms_norm(hidden, eps=self.arch.eps)[0])
        codes, _ = add_rms_norm(hidden, eps=self.arch.eps, scale=self.input_scale.reshape(()))
        epilogue = self.lm_head.epilogue(self.input_scale)
        return self.lm_head.int8(codes, epilogue, torch.float32)

    def generate(self, input_ids: Int[Tensor, "b l"], **options: Any) -> Int[Tensor, "b n"]:
        """The prompts and what follows them; options are those of `sampling.generate`."""
        return generate(self, input_ids, **options)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of `layout` by its name there."""
        state = {}
        for name, values in self.state_dict().items():
            for inner, outer in ((".kept.", "."), ("_proj_int8.", "_proj."), ("_proj_float.", "_proj.")):
                name = name.replace(inner, outer, 1)
            state["lm_head.input_scale" if name == "input_scale" else name] = values
        return {name: state[name] for name in self.names}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write model.safetensors and config.json into `folder`; returns it."""
        from isotone.quamba2.saving import save

        return save(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QuambaForCausalLM:
        """The model that `save_pretrained` wrote, with the same logits bit by bit. Raises `InputError` on any other."""
        from isotone.quamba2.saving import read

        return cls(*read(folder))
