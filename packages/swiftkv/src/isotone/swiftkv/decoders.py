"""Decoding with no overhead a token: eager, compiled whole, or replayed as a CUDA graph, all of one step function."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.shared.errors import InputError
from isotone.swiftkv import engine
from isotone.swiftkv.cache import SwiftKVCache
from isotone.swiftkv.prompts import check_cache, check_tokens

DECODE_MODES = ("eager", "compile", "cudagraph")


class Decoder:
    """Decodes into one static cache. `mode` "eager" looks at as many cached tokens as there are; the others at the
    whole cache, so that every step has the same shapes and is compiled or captured once; they keep a copy of the upper
    layers' key and value projections as they are now, so that a decoder is made anew after the weights were changed.

    `backend`: what `torch.compile` uses. Raises `InputError` on an unknown mode, or "cudagraph" without a GPU.
    """

    def __init__(self, model: Any, cache: SwiftKVCache, mode: str = "eager", backend: str = "inductor") -> None:
        if mode not in DECODE_MODES:
            raise InputError(f"expected decode_mode to be one of {', '.join(DECODE_MODES)}, got {mode!r}")
        if mode == "cudagraph" and cache.device.type != "cuda":
            raise InputError(f"expected a GPU for decode_mode cudagraph, the model is on {cache.device.type}")
        self.model, self.cache, self.mode = model, cache, mode
        check_cache(model, cache)
        # stacked once, outside of what is compiled
        upper = mode != "eager" and len(cache.split.upper) > 0
        self.projection = engine.KeyValueProjection(model, stacked=True) if upper else None
        if mode == "compile":
            options: Any = {"mode": "reduce-overhead"} if cache.device.type == "cuda" and backend == "inductor" else {}
            self._step = torch.compile(engine.decode_step, fullgraph=True, backend=backend, **options)
            for plane in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(plane)
        elif mode == "cudagraph":  # pragma: no cover - needs a GPU
            self._graph = _Graph(model, cache, self.projection)

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """The logits after one more token for every row."""
        if self.mode == "eager":
            return engine.decode(self.model, tokens, self.cache)
        check_tokens(tokens, self.cache)
        positions = torch.tensor(self.cache.lengths, device=self.cache.device)
        if self.mode == "compile":
            logits = self._step(
                self.model, tokens, positions, self.cache, self.cache.max_length, False, self.projection
            )
        else:  # pragma: no cover - needs a GPU
            logits = self._graph(tokens, positions)
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return logits


class _Graph:  # pragma: no cover - needs a GPU
    """`decode_step` captured on fixed buffers."""

    def __init__(self, model: Any, cache: SwiftKVCache, projection: Any) -> None:
        device = cache.device
        self.tokens = torch.zeros(cache.batch, dtype=torch.long, device=device)
        # warming up writes a key and value at these positions: the next ones, which the first real step overwrites
        self.positions = torch.tensor(cache.lengths, device=device).clamp_max(cache.max_length - 1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                engine.decode_step(model, self.tokens, self.positions, cache, cache.max_length, False, projection)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.logits = engine.decode_step(
                model, self.tokens, self.positions, cache, cache.max_length, False, projection
            )

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits.clone()
