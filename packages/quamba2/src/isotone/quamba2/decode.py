"""A token at a time out of buffers that stay where they are, recorded once as a CUDA graph (section 9).

At batch 1 a step is hundreds of small kernels, whose launches from Python take longer than they run. A graph launches
them as one. Without a GPU the same step runs as it is, or compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isotone.quamba2.forward import Cache, check_ids
from isotone.shared.errors import InputError

WARM_UP = 3


class Decoder:
    """Decoding of `batch` sequences with `model`, a `QuambaForCausalLM` or `half.HalfMamba2`.

    `prefill` takes the prompts, `step` a token of each. `graph`: record the step as a CUDA graph, by default where the
    model is on a GPU. `compiled`: give the step to torch.compile first. Raises `InputError` on a graph without a GPU.
    """

    def __init__(self, model: Any, batch: int = 1, graph: bool | None = None, compiled: bool = False) -> None:
        on_gpu = model.device.type == "cuda"
        if graph and not on_gpu:
            raise InputError(f"expected a model on a GPU for a CUDA graph, got one on {model.device}")
        self.model, self.batch = model, batch
        self.graph = on_gpu if graph is None else graph
        self.cache: Cache = model.new_cache()
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._work = torch.compile(self._step, dynamic=False) if compiled else self._step
        self._recorded: Any = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def prefill(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b vocab"]:
        """The logits after the prompts, which start anew. Raises `InputError` on another number of them."""
        if len(input_ids) != self.batch:
            raise InputError(f"expected {self.batch} prompts, got {len(input_ids)}")
        fresh = self.model.new_cache()
        logits = self.model(input_ids, fresh, last_only=True).logits[:, -1]
        if self.cache.length == 0:
            # views of a whole prompt's values would keep it alive
            fresh.conv, fresh.state = ([values.clone() for values in kept] for kept in (fresh.conv, fresh.state))
            self.cache = fresh
        else:
            _copy(self.cache, fresh)
            self.cache.length = fresh.length
        return logits

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """The logits after one more token of each sequence; valid until the next call. Raises `InputError` before
        `prefill`, and on a token outside the vocabulary where no graph is recorded."""
        if self.cache.length == 0:
            raise InputError("expected a prompt before the first step, got none")
        self.tokens.copy_(tokens[:, None])
        if not self.graph:
            check_ids(self.tokens, self.model.arch.vocab)
            logits = self._work()
        else:  # pragma: no cover - needs a GPU
            if self._recorded is None:
                self._record()
            self._recorded.replay()
            assert self._logits is not None
            logits = self._logits
        self.cache.length += 1
        return logits

    def _step(self) -> Tensor:
        """One step over the buffers: the state is written in place, the convolution's window copied back."""
        passing = Cache(self.model.arch.layers)
        passing.conv, passing.state = list(self.cache.conv), list(self.cache.state)
        logits = self.model.run(self.tokens, passing, None, True)[:, -1]
        _copy(self.cache, passing)
        return logits

    def _record(self) -> None:  # pragma: no cover - needs a GPU
        kept = [
            [values.clone() for values in part if values is not None] for part in (self.cache.conv, self.cache.state)
        ]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._work()
        torch.cuda.current_stream().wait_stream(stream)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._recorded):
            self._logits = self._work()
        # the steps that warmed up have changed the buffers
        for part, saved in zip((self.cache.conv, self.cache.state), kept, strict=True):
            for values, before in zip(part, saved, strict=True):
                if values is not None:
                    values.copy_(before)


def _copy(into: Cache, given: Cache) -> None:
    """Write `given`'s values into the buffers of `into`; those that are the same tensor are there already."""
    for own, others in ((into.conv, given.conv), (into.state, given.state)):
        for kept, values in zip(own, others, strict=True):
            if kept is not None and values is not None and kept is not values:
                kept.copy_(values)
