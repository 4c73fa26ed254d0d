"""The cache: l + (L - l) / g slots of keys and values, allocated once, shared by the layers of a group.

Layout: every plane is one tensor (slots, batch, heads, length, width), so that the slots of all upper layers are
written in one pass. Row i of the batch holds `lengths[i]` tokens, from position 0 on; rows need not be equally long.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import CacheSpec
from isotone.swiftkv.quantize import Codec


class SwiftKVCache:
    """Keys and values of `batch` rows of up to `max_length` tokens.

    `config`: a model's Hugging Face config (l and g are read from it; l = L where it has none), or with `split` given,
    that split. `kv_dtype`: "model" (that of the model), "fp32", "fp16", "bf16", "fp8", "int8" or "int4". `key_scale`
    and `value_scale`, (slots,): the fixed scales of fp8. Raises `InputError` on an unknown dtype or an empty cache.
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        max_length: int,
        *,
        kv_dtype: str = "model",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        split: SwiftKVConfig | None = None,
        key_scale: Float[Tensor, " slots"] | None = None,
        value_scale: Float[Tensor, " slots"] | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise InputError(f"expected a cache of at least 1 row and 1 token, got {batch} and {max_length}")
        self.split = split or SwiftKVConfig.of(config)
        self.spec = CacheSpec.of(config)
        self.batch, self.max_length, self.kv_dtype, self.dtype = batch, max_length, kv_dtype, dtype
        self.key_codec = Codec(kv_dtype, self.spec.key_dim, dtype)
        self.value_codec = Codec(kv_dtype, self.spec.value_dim, dtype)
        shape = (self.split.slots, batch, self.spec.heads, max_length)
        self.keys = [torch.zeros(*shape, p.width, dtype=p.dtype, device=device) for p in self.key_codec.planes]
        self.values = [torch.zeros(*shape, p.width, dtype=p.dtype, device=device) for p in self.value_codec.planes]
        ones = torch.ones(self.split.slots, device=device)
        self.key_scale = ones if key_scale is None else key_scale.to(device=device, dtype=torch.float32)
        self.value_scale = ones.clone() if value_scale is None else value_scale.to(device=device, dtype=torch.float32)
        for scale in (self.key_scale, self.value_scale):
            if scale.shape != (self.split.slots,) or not bool((scale > 0).all()):
                raise InputError(f"expected {self.split.slots} scales above 0, one a slot, got {scale.tolist()}")
        self.lengths: list[int] = [0] * batch

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys[0].device

    @property
    def bytes(self) -> int:
        """Bytes allocated for keys and values, scales that are stored with them included."""
        return sum(plane.untyped_storage().nbytes() for plane in (*self.keys, *self.values))

    def slot(self, layer: int) -> int:
        """The slot of `layer`."""
        return self.split.slot(layer)

    def key_storage(self, layer: int) -> Tensor:
        """The codes of the keys that `layer` attends to, (batch, heads, max_length, width): a view, no copy."""
        return self.keys[0][self.slot(layer)]

    def write(
        self,
        slots: slice | int,
        rows: Int[Tensor, " t"],
        positions: Int[Tensor, " t"],
        keys: Float[Tensor, ...],
        values: Float[Tensor, ...],
    ) -> None:
        """Put the keys and values of t tokens, (t, heads, width), or (t, slots, heads, width) for a slice of slots."""
        key_scale, value_scale = self.key_scale[slots], self.value_scale[slots]
        if isinstance(slots, slice):
            key_scale, value_scale = key_scale[:, None, None], value_scale[:, None, None]
        for stored, planes in (
            (self.keys, self.key_codec.encode(keys, key_scale)),
            (self.values, self.value_codec.encode(values, value_scale)),
        ):
            for whole, plane in zip(stored, planes, strict=True):
                if isinstance(slots, slice):
                    # (slots, batch, heads, length, width) seen as (batch, length, slots, heads, width)
                    whole[slots].permute(1, 3, 0, 2, 4).index_put_((rows, positions), plane)
                else:
                    whole[slots].transpose(1, 2).index_put_((rows, positions), plane)

    def read(self, layer: int, length: int, rows: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens that `layer` attends to, (rows, heads, length, width)."""
        slot = self.slot(layer)
        keys = [plane[slot, rows, :, :length] for plane in self.keys]
        values = [plane[slot, rows, :, :length] for plane in self.values]
        return (
            self.key_codec.decode(keys, self.dtype, self.key_scale[slot]),
            self.value_codec.decode(values, self.dtype, self.value_scale[slot]),
        )

    def crop(self, row: int, length: int) -> None:
        """Forget what row `row` holds after its first `length` tokens."""
        if not 0 <= length <= self.lengths[row]:
            raise InputError(f"expected a length from 0 to {self.lengths[row]}, got {length}")
        self.lengths[row] = length

    def reset(self) -> None:
        """Forget all rows; the memory stays."""
        self.lengths = [0] * self.batch

    def room(self, row: int, tokens: int) -> None:
        """Raise `InputError` where `tokens` more do not fit into row `row`."""
        if self.lengths[row] + tokens > self.max_length:
            raise InputError(
                f"expected at most {self.max_length - self.lengths[row]} more tokens in row {row} of a cache of "
                f"{self.max_length}, got {tokens}"
            )
