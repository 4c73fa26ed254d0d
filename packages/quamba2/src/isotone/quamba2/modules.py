"""The quantised projections and embedding, over the tensors of `layout`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from isotone.quamba2.linear import matmul_w4a8, matmul_w4a16, matmul_w8a8
from isotone.quamba2.packing import dequantize_groups, embedding_rows, relative_scales, unpack_int4


class Holder(nn.Module):
    """A module whose members have been given by name."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Part(Holder):
    """Tensors by name as buffers; a dot in a name opens an inner part."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, values in tensors.items():
            head, dot, rest = name.partition(".")
            if dot:
                inner.setdefault(head, {})[rest] = values
            else:
                self.register_buffer(head, values)
        for name, members in inner.items():
            self.add_module(name, Part(members))

    def get(self, name: str) -> Tensor | None:
        """The tensor called `name`, None where there is none."""
        return self._buffers.get(name)


class QuantLinear(Holder):
    """A projection of 4-bit, 8-bit or float weights, for int8 codes (`int8`) or float inputs (`forward`).

    `segments`: the sizes of the runs of rows that share a scale, of 8-bit weights and of int8 outputs.
    """

    def __init__(self, tensors: Mapping[str, Tensor], segments: list[int]) -> None:
        super().__init__()
        self.kept = Part(tensors)
        self.segments = segments
        # the second level of 4-bit weights, two bytes a group, and the scale of each row: derived, never saved
        self.register_buffer("relative", None, persistent=False)
        self.register_buffer("rows", None, persistent=False)

    @property
    def bits(self) -> int:
        return 4 if self.kept.get("packed") is not None else 8 if self.kept.get("codes") is not None else 16

    def prepare_int8(self, wanted: bool) -> None:
        """Hold what `int8` needs ready, the second level of 4-bit weights and rows' scales, or let go of it."""
        self.relative = self.rows = None
        if wanted and self.bits == 8:
            self.rows = self._row_scales()
        if wanted and self.bits == 4:
            self.relative, self.rows = relative_scales(unpack_int4(self.kept.packed), self.kept.scales)

    def _row_scales(self) -> Tensor:
        sizes = torch.tensor(self.segments, device=self.kept.scales.device)
        return self.kept.scales.repeat_interleave(sizes)

    def epilogue(self, scale: Tensor, steps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the integer sums are multiplied with, and what is added, for codes of static `scale`.

        `steps` (rows,): of an int8 output, into which both are folded (s_X / s_Y of section 2).
        """
        held: Any = self.rows
        rows = held * scale.reshape(())
        bias = self.kept.get("bias")
        if steps is None:
            return rows, bias
        return rows / steps, None if bias is None else bias / steps

    def int8(
        self, codes: Int8[Tensor, "b l columns"], epilogue: tuple[Tensor, Tensor | None], dtype: torch.dtype
    ) -> Float[Tensor, "b l rows"] | Int8[Tensor, "b l rows"]:
        """The product with `codes`, and its `epilogue`, as float32 or, where that folds the output's steps, int8."""
        if self.bits == 4:
            second: Any = self.relative
            return matmul_w4a8(codes, self.kept.packed, second, *epilogue, dtype)
        return matmul_w8a8(codes, self.kept.codes, *epilogue, dtype)

    def forward(self, values: Float[Tensor, "b l columns"]) -> Float[Tensor, "b l rows"]:
        """The product with float `values`."""
        bias = self.kept.get("bias")
        if self.bits == 4:
            return matmul_w4a16(values, self.kept.packed, self.kept.scales, bias)
        return F.linear(values, self.weight(), bias)

    def weight(self) -> Float[Tensor, "rows columns"]:
        """The dequantised weight."""
        if self.bits == 4:
            return dequantize_groups(unpack_int4(self.kept.packed), self.kept.scales)
        return self.kept.codes.float() * self._row_scales()[:, None] if self.bits == 8 else self.kept.weight.float()


class QuantEmbedding(Holder):
    """Rows of 4, 8 or 16 bits with a scale a row."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kept = Part(tensors)

    def forward(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l hidden"]:
        """The dequantised rows of `input_ids`."""
        weight, packed = self.kept.get("weight"), self.kept.get("packed")
        if weight is not None:
            return weight[input_ids].float()
        return embedding_rows(input_ids, self.kept.codes if packed is None else packed, self.kept.scales)
