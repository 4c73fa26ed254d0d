"""The unquantised Mamba2 in half precision, with this package's own kernels: what the quantised one is timed beside.

The stand-in for mamba_ssm, whose kernels are another package's: products are the library's, the norm, the scan and the
step of the state are the Triton kernels that the quantised blocks use, here on float16 numbers and states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.forward import Cache, causal_conv, check_ids, scan_heads, time_steps
from isotone.quamba2.gated_norm import add_rms_norm, gated_rms_norm
from isotone.quamba2.modeling import QuambaOutput
from isotone.shared.errors import InputError


class HalfMamba2(nn.Module):
    """A Mamba2 of the sizes in a Hugging Face config, `dtype` its weights', activations' and states'.

    It has the interface of `QuambaForCausalLM` that decoding and profiling need. Raises `InputError` on a Mamba.
    """

    def __init__(self, config: Any, device: str = "cpu", dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.arch, self.dtype = Architecture.of(config), dtype
        if self.arch.kind != "mamba2":
            raise InputError(f"expected a Mamba2 in half precision, got {self.arch.kind}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        arch, bias = self.arch, bool(config.use_bias)
        self.embedding = nn.Embedding(arch.vocab, arch.hidden, **made)
        self.blocks = nn.ModuleList(_Block(arch, bias, bool(config.use_conv_bias), made) for _ in range(arch.layers))
        self.norm_f = nn.Parameter(torch.ones(arch.hidden, **made))
        self.lm_head = nn.Linear(arch.hidden, arch.vocab, bias=False, **made)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: Any, device: str = "cpu", dtype: torch.dtype = torch.float16) -> HalfMamba2:
        """With the weights of `model`, a Hugging Face Mamba2."""
        made = cls(model.config, device, dtype)
        made.embedding.weight.copy_(model.backbone.embeddings.weight)
        made.lm_head.weight.copy_(model.lm_head.weight)
        made.norm_f.copy_(model.backbone.norm_f.weight)
        blocks: Any = made.blocks
        for own, layer in zip(blocks, model.backbone.layers, strict=True):
            mixer = layer.mixer
            own.norm.copy_(layer.norm.weight)
            own.conv.copy_(mixer.conv1d.weight)
            own.gated.copy_(mixer.norm.weight)
            for name in ("A_log", "D", "dt_bias"):
                getattr(own, name).copy_(getattr(mixer, name))
            for name in ("in_proj", "out_proj"):
                getattr(own, name).load_state_dict(getattr(mixer, name).state_dict())
            if own.conv_bias is not None:
                own.conv_bias.copy_(mixer.conv1d.bias)
        return made

    @property
    def device(self) -> torch.device:
        return self.norm_f.device

    @property
    def bytes(self) -> int:
        """Of all weights; a tied head is counted once."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def new_cache(self) -> Cache:
        """An empty cache for `forward`."""
        return Cache(self.arch.layers)

    @torch.no_grad()
    def forward(
        self, input_ids: Int[Tensor, "b l"], cache: Cache | None = None, mask: None = None, last_only: bool = False
    ) -> QuambaOutput:
        """The logits (b, l, vocab), or of the last token alone, with `last_only`; `cache` is updated in place."""
        check_ids(input_ids, self.arch.vocab)
        return QuambaOutput(self.run(input_ids, cache, mask, last_only), cache)

    def run(self, input_ids: Tensor, cache: Cache | None, mask: None, last_only: bool) -> Float[Tensor, "b n vocab"]:
        """`forward` without its checks."""
        hidden = self.embedding(input_ids)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, cache, number)
        if cache is not None:
            cache.length += input_ids.shape[1]
        hidden = hidden[:, -1:] if last_only else hidden
        return self.lm_head(add_rms_norm(hidden, weight=self.norm_f, eps=self.arch.eps)[0])


class _Block(nn.Module):
    def __init__(self, arch: Architecture, bias: bool, conv_bias: bool, made: dict[str, Any]) -> None:
        super().__init__()
        self.arch = arch
        single: dict[str, Any] = {**made, "dtype": torch.float32}
        self.norm = nn.Parameter(torch.ones(arch.hidden, **made))
        self.in_proj = nn.Linear(arch.hidden, sum(arch.segments.values()), bias=bias, **made)
        self.conv = nn.Parameter(0.1 * torch.ones(arch.conv_width, 1, arch.conv_kernel, **made))
        self.conv_bias = nn.Parameter(torch.zeros(arch.conv_width, **made)) if conv_bias else None
        self.A_log = nn.Parameter(torch.zeros(arch.heads, **single))
        self.D = nn.Parameter(torch.ones(arch.heads, **single))
        self.dt_bias = nn.Parameter(torch.full((arch.heads,), -4.0, **single))
        self.gated = nn.Parameter(torch.ones(arch.inner, **made))
        self.out_proj = nn.Linear(arch.inner, arch.hidden, bias=bias, **made)

    def forward(self, hidden: Tensor, cache: Cache | None, number: int) -> Tensor:
        arch = self.arch
        normed, _ = add_rms_norm(hidden, weight=self.norm, eps=arch.eps)
        z, given, raw = self.in_proj(normed).split([arch.inner, arch.conv_width, arch.heads], -1)
        past = None if cache is None else cache.conv[number]
        mixed, window = causal_conv(given, self.conv, self.conv_bias, past)
        x, B, C = F.silu(mixed).split(list(arch.conv_segments.values()), -1)
        dt = time_steps(raw.float(), self.dt_bias, arch.dt_limit)
        state = None if cache is None else cache.state[number]
        A = -self.A_log.exp()
        y, state = scan_heads(arch, x, dt, A, B, C, self.D, state, inplace=True)
        if cache is not None:
            cache.conv[number], cache.state[number] = window, state.to(hidden.dtype)
        return hidden + self.out_proj(gated_rms_norm(y, z, self.gated, arch.groups, arch.eps))
