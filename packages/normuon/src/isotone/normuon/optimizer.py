"""NorMuon and Muon on one engine: momentum, orthogonalisation, row statistics, rescaling, update.

arXiv 2510.05491, algorithm 1, and section 2.8 for parameters that are sharded. Same-shape matrices go through as
one batch; on several ranks the result does not depend on how many there are, since the Frobenius norms are
all-reduced and not taken over local rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.optimizer import Optimizer

from isotone.normuon import distributed as ranks
from isotone.normuon.kernels import apply_update
from isotone.normuon.layout import AXES, Layout, layout_of, warn_of_embeddings
from isotone.normuon.normalize import check_scale, inverse_root, shape_factor, step_factor
from isotone.normuon.orthogonalize import Method, check_method, zeropower

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
KINDS = ("matrix", "adamw")


@dataclass
class _Matrix:
    """One parameter of a matrix group, as the engine sees it: local parts, two-dimensional."""

    parameter: Tensor
    layout: Layout
    placement: ranks.Placement
    index: int
    gradient: Tensor
    weight: Tensor

    @property
    def key(self) -> tuple:
        """What a bucket has in common; the order of the buckets is the same on every rank."""
        where = (-1 if self.placement.dim is None else self.placement.dim, self.placement.members)
        kind = (str(self.weight.dtype), str(self.weight.device))
        return (self.layout.shape, self.layout.blocks, self.layout.axis, *where, *kind)


@dataclass
class _Bucket:
    """Matrices of one shape and placement, and what is known of them on the way through a step."""

    matrices: list[_Matrix]
    exchange: ranks.Exchange
    orthogonal: Tensor
    sums: Tensor
    norms: Tensor

    @property
    def layout(self) -> Layout:
        return self.matrices[0].layout

    @property
    def placement(self) -> ranks.Placement:
        return self.matrices[0].placement


class Muon(Optimizer):
    """Muon: momentum, orthogonalised, with decoupled weight decay; the engine of `NorMuon` without its v.

    `params`: parameters, (name, parameter) pairs or groups. A group has `kind` "matrix" (the default; two
    dimensions or more) or "adamw" (embeddings, heads, norms, biases: `adamw` holds their settings), and may
    override any setting, and set `split_sizes` (fused QKV: rows of each part), `num_heads`, `axis`.

    - `lr`, `weight_decay`: W <- W - lr weight_decay W - lr f O (decoupled, with the base rate).
    - `momentum`, `nesterov`: M <- lerp(M, G, 1 - momentum); U = lerp(G, M, momentum) with Nesterov, M without.
    - `scale`: "rms" (RMS of the step 0.2 lr), "original", "spectral", "match_rms_adamw" or None (1); rates of
      different modes differ tenfold: `convert_lr`.
    - `orthogonalize`, `ns_steps`, `ns_dtype`, `compile`: see `zeropower`.
    - `cautious`: decay only where update and weight agree in sign.
    - `mesh`: for parameters that are not DTensors, the 1-D mesh or process group of data-parallel ranks;
      `strategy` "round_robin" (gradients are averaged already, as DDP does; each rank orthogonalises its share)
      or "reduce_scatter" (they are not: ZeRO-2, momentum only on the owner). DTensors (FSDP2, HSDP) bring theirs.
    - `wire_dtype`: what crosses between ranks (None: the parameter's own).
    - `foreach`: matrices of one shape as one batch.

    `p.grad` is never written. Raises `ValueError` on settings out of range, fewer than two dimensions in a
    matrix group, sparse or complex gradients, and placements that cannot be served.
    """

    normalise = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        eps: float = 1e-8,
        scale: str | None = "rms",
        orthogonalize: Method = "polar_express",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        cautious: bool = False,
        adamw: Mapping[str, Any] | None = None,
        mesh: Any = None,
        strategy: str = "round_robin",
        wire_dtype: torch.dtype | None = None,
        foreach: bool = True,
        compile: bool = False,
        flatten_conv: bool = True,
        **more: Any,
    ) -> None:
        if strategy not in ranks.STRATEGIES:
            raise ValueError(f"expected strategy to be one of {', '.join(ranks.STRATEGIES)}, got {strategy!r}")
        unknown = set(adamw or {}) - set(ADAMW)
        if unknown:
            raise ValueError(f"expected adamw settings among {', '.join(ADAMW)}, got {sorted(unknown)[0]!r}")
        self._adamw = {**ADAMW, **(adamw or {})}
        self._mesh, self._strategy, self._foreach, self._compile = mesh, strategy, foreach, compile
        self._wire, self._ns_dtype, self._orthogonalize = wire_dtype, ns_dtype, orthogonalize
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        defaults |= dict(eps=eps, scale=scale, ns_steps=ns_steps, cautious=cautious, flatten_conv=flatten_conv)
        defaults |= {"kind": "matrix", "axis": "row", "split_sizes": None, "num_heads": None, "betas": None, **more}
        super().__init__(params, defaults)

    # --- configuration ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; an "adamw" one takes what it does not set from the optimizer's `adamw`."""
        group = dict(param_group)
        kind = group.setdefault("kind", "matrix")
        if kind not in KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "adamw":
            group = {**self._adamw, **group}
        super().add_param_group(group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """All validation of settings, in one place."""
        rate = float(group["lr"])
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"expected a finite lr of at least 0, got {rate}")
        if not (math.isfinite(group["weight_decay"]) and group["weight_decay"] >= 0):
            raise ValueError(f"expected a finite weight_decay of at least 0, got {group['weight_decay']}")
        betas = group["betas"] if group["kind"] == "adamw" else (group["momentum"], group.get("beta2", 0.0))
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"expected momentum and betas in [0, 1), got {betas}")
        if not group["eps"] > 0:
            raise ValueError(f"expected eps above 0, got {group['eps']}")
        if group["kind"] == "adamw":
            return
        check_scale(group["scale"])
        check_method(self._orthogonalize, group["ns_steps"])
        if group["axis"] not in AXES:
            raise ValueError(f"expected axis to be one of {', '.join(AXES)}, got {group['axis']!r}")
        names = group.get("param_names") or [""] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.is_complex():
                raise ValueError(f"expected real parameters, got {parameter.dtype}")
            layout = layout_of(parameter.shape, group, name or "a parameter")
            ranks.placement_of(parameter, layout, self._mesh, name or "a parameter")
        warn_of_embeddings(zip(names, group["params"], strict=True))
        if group["scale"] in ("rms", "match_rms_adamw") and rate > 0.01:
            warnings.warn(
                f"lr {rate} is large for scale {group['scale']!r}, where rates are near AdamW's (1e-3); "
                "convert_lr carries a rate from one scale mode to another",
                stacklevel=4,
            )

    # --- the step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; parameters without a gradient are left alone. Returns the closure's value, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            alive = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw":
                self._step_adamw(group, alive)
            else:
                matrices = [self._matrix(p, group, index + i) for i, p in enumerate(alive)]
                self._step_matrices(group, matrices)
            index += len(group["params"])
        return loss

    def _matrix(self, parameter: Tensor, group: dict[str, Any], index: int) -> _Matrix:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise ValueError(f"expected dense gradients, got {gradient.layout}")
        layout = layout_of(parameter.shape, group)
        placement = ranks.placement_of(parameter, layout, self._mesh)
        columns = layout.shape[1]
        if placement.dim == 1:
            columns = max(0, min(placement.chunk, columns - placement.offset))

        def carrier(tensor: Tensor) -> Tensor:
            part = ranks.local(tensor)
            rows = part.numel() // columns if columns else layout.shape[0]
            return part.reshape(rows, columns)

        weight = carrier(parameter)
        return _Matrix(parameter, layout, placement, index, carrier(gradient).to(weight.dtype), weight)

    def _step_matrices(self, group: dict[str, Any], matrices: list[_Matrix]) -> None:
        buckets: dict[tuple, list[_Matrix]] = {}
        for matrix in matrices:
            key = matrix.key if self._foreach else (*matrix.key, matrix.index)
            buckets.setdefault(key, []).append(matrix)
        ordered = [buckets[key] for key in sorted(buckets)]
        zero2 = self._strategy == "reduce_scatter"
        for members in [m for m in ordered if zero2 and m[0].placement.dim is None and m[0].placement.world > 1]:
            self._step_scattered(group, members)
            ordered.remove(members)
        self._update(group, self._orthogonalized(group, ordered))

    def _orthogonalized(self, group: dict[str, Any], ordered: list[list[_Matrix]]) -> list[_Bucket]:
        """Steps 1 to 3 of section 2.9; the shards of the next bucket travel while this one is orthogonalised."""
        exchanges = []
        for members in ordered:
            updates = self._momentum(group, members)
            exchanges.append(ranks.Exchange(updates, members[0].layout, members[0].placement, self._wire))
        for number, exchange in enumerate(exchanges):
            if number == 0:
                exchange.start()
            if number + 1 < len(exchanges):
                exchanges[number + 1].start()
            exchange.send(self._polar(group, exchange.matrices(), exchange.layout))
        empty = torch.empty(0)
        return [
            _Bucket(members, exchange, exchange.collect(), empty, empty)
            for members, exchange in zip(ordered, exchanges, strict=True)
        ]

    def _momentum(self, group: dict[str, Any], members: list[_Matrix]) -> list[Tensor]:
        """M <- lerp(M, G, 1 - beta1), and what is orthogonalised (algorithm 1, lines 2 and 3)."""
        buffers, gradients = [], [m.gradient for m in members]
        for m in members:
            state = self.state[m.parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(m.parameter, memory_format=torch.contiguous_format)
            buffers.append(ranks.local(state["momentum_buffer"]).view(m.weight.shape))
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            return list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        return buffers

    def _polar(self, group: dict[str, Any], batch: Tensor, layout: Layout) -> Tensor:
        """Orthogonalise every block of rows; blocks of one size as one batch."""

        def polar(x: Tensor) -> Tensor:
            return zeropower(x, self._orthogonalize, group["ns_steps"], self._ns_dtype, self._compile)

        sizes = set(layout.blocks)
        if len(sizes) == 1:
            return polar(batch.unflatten(1, (len(layout.blocks), layout.blocks[0]))).flatten(1, 2)
        parts = list(batch.split(list(layout.blocks), dim=1))
        for size in sorted(sizes):
            chosen = [i for i, rows in enumerate(layout.blocks) if rows == size]
            for i, part in zip(chosen, polar(torch.stack([parts[i] for i in chosen])), strict=True):
                parts[i] = part
        return torch.cat(parts, dim=1)

    # --- statistics and update (section 2.9, steps 4 to 7) --------------------------------------------------

    def _update(self, group: dict[str, Any], buckets: list[_Bucket]) -> None:
        measured = self.normalise or group["scale"] == "rms"
        if measured:
            for b in buckets:
                b.sums = _square_sums(b.orthogonal, b.layout, b.placement)
            across = {"row": 1, "column": 0}  # the sharding that cuts through a statistic
            cut = [b for b in buckets if b.placement.dim == across[b.layout.axis]]
            ranks.sum_over_ranks([(b.sums, b.placement.group) for b in cut])
        inverses = [self._second_moments(group, b) if self.normalise else None for b in buckets]
        if measured:
            for b, inverse in zip(buckets, inverses, strict=True):
                b.norms = _norms(b.sums, inverse, b.layout, b.placement)
            along = {"row": 0, "column": 1}
            partial = [b for b in buckets if b.placement.dim == along[b.layout.axis]]
            ranks.sum_over_ranks([(b.norms, b.placement.group) for b in partial])
        for b, inverse in zip(buckets, inverses, strict=True):
            self._apply(group, b, inverse)

    def _second_moments(self, group: dict[str, Any], b: _Bucket) -> Tensor:
        """v <- lerp(v, mean square, 1 - beta2), 1 / (sqrt(v) + eps) (lines 4 and 5); v is float32 or better."""
        means = b.sums / _counts(b.layout, b.sums)
        inverses = []
        for m, mean in zip(b.matrices, means, strict=True):
            state = self.state[m.parameter]
            if "second_moment" not in state:
                zero = torch.zeros_like(mean)
                state["second_moment"] = ranks.like_parameter(zero, m.parameter, m.layout, m.placement)
            second_moment = ranks.local(state["second_moment"])
            second_moment.lerp_(mean.view_as(second_moment), 1 - group["beta2"])
            inverses.append(inverse_root(second_moment, group["eps"]).view_as(mean))
        return torch.stack(inverses)

    def _apply(self, group: dict[str, Any], b: _Bucket, inverse: Tensor | None) -> None:
        """W <- (1 - lr decay) W - lr f r O (line 7), one factor f a block."""
        rate = float(group["lr"])
        factors = [shape_factor(group["scale"], *matrix) for matrix in b.layout.matrices]
        factor = torch.tensor(factors, dtype=torch.float64, device=b.orthogonal.device)
        if b.norms.numel():
            scaled = step_factor(group["scale"], factor.to(b.norms.dtype), b.norms[0], b.norms[1])
        else:
            scaled = factor.expand(len(b.matrices), -1)
        scaled = rate * scaled
        if inverse is None:
            inverse = torch.ones_like(b.sums) if b.sums.numel() else None
        spans = _local_spans(b.layout, b.placement, b.orthogonal.shape[1])
        decay = rate * group["weight_decay"]
        for i, m in enumerate(b.matrices):
            whole = m.weight
            if b.layout.axis == "row" or inverse is None:
                rows = torch.cat([scaled[i, p].expand(stop - start) for p, start, stop in spans] or [scaled[i, :0]])
                rows = (rows if inverse is None else rows * inverse[i])[:, None]
                apply_update(whole, b.orthogonal[i], rows, decay, group["cautious"])
            else:
                for p, start, stop in spans:
                    columns = (scaled[i, p] * inverse[i, p])[None]
                    part = b.orthogonal[i, start:stop]
                    apply_update(whole[start:stop], part, columns, decay, group["cautious"])
            if whole.untyped_storage().data_ptr() != ranks.local(m.parameter).untyped_storage().data_ptr():
                ranks.local(m.parameter).copy_(whole.view(ranks.local(m.parameter).shape))

    # --- replicated parameters, ZeRO-2 ----------------------------------------------------------------------

    def _step_scattered(self, group: dict[str, Any], members: list[_Matrix]) -> None:
        """Gradients are averaged by a reduce-scatter; the owner updates, and weights are gathered."""
        process_group = members[0].placement.group
        gradients, first = ranks.mean_scatter([m.gradient for m in members], process_group)
        own = [
            _Matrix(m.parameter, m.layout, ranks.Placement(), m.index, gradient, m.weight)
            for m, gradient in zip(members[first:], gradients, strict=False)
        ]
        if own:
            self._update(group, self._orthogonalized(group, [own]))
        weights = members[0].weight.new_zeros(gradients.shape)
        for slot, m in zip(weights, own, strict=False):
            slot.copy_(m.weight)
        for m, weight in zip(members, ranks.gather_weights(weights, len(members), process_group), strict=True):
            m.parameter.copy_(weight.view(m.parameter.shape))

    # --- AdamW -----------------------------------------------------------------------------------------------

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._strategy == "reduce_scatter" and self._mesh is not None:
            process_group = ranks.group_of(self._mesh)
            gradients = [g.clone() for g in gradients]
            ranks.sum_over_ranks([(g, process_group) for g in gradients])
            torch._foreach_div_(gradients, ranks.Placement(group=process_group).world)
        averages, squares, steps = [], [], []
        for parameter in parameters:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            averages.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
            steps.append(state["step"])
        functional_adamw(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            foreach=self._foreach,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, but v keeps its own precision beside low-precision parameters."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            saved = state_dict["state"].get(number, {})
            if "second_moment" in saved:
                exact = saved["second_moment"].to(parameter.device).clone()
                self.state[parameter]["second_moment"] = exact


class NorMuon(Muon):
    """Muon whose rows are divided by a running second moment of their own (arXiv 2510.05491, algorithm 1).

    `beta2`: of the row statistics (no bias correction). `axis`: "row" (one statistic an output neuron, the
    paper's), "column" (weights stored transposed, as GPT-2's Conv1D), or "auto" (rows of tall matrices, columns
    of wide ones); a group may override it. The other settings are `Muon`'s. One number a row is kept besides
    the momentum.
    """

    normalise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        eps: float = 1e-8,
        scale: str | None = "rms",
        axis: str = "row",
        orthogonalize: Method = "polar_express",
        **more: Any,
    ) -> None:
        super().__init__(
            *(params, lr, momentum, weight_decay, nesterov, eps, scale, orthogonalize), beta2=beta2, axis=axis, **more
        )


def _local_spans(layout: Layout, placement: ranks.Placement, held: int) -> list[tuple[int, int, int]]:
    """(block, first local row, past its last) of the blocks that this rank's rows touch."""
    offset = placement.offset if placement.dim == 0 else 0
    spans, start = [], 0
    for block, rows in enumerate(layout.blocks):
        first, last = max(start - offset, 0), min(start + rows - offset, held)
        if first < last:
            spans.append((block, first, last))
        start += rows
    return spans


def _square_sums(orthogonal: Tensor, layout: Layout, placement: ranks.Placement) -> Tensor:
    """Sums of squares, float32 or better: (K, local rows), or (K, blocks, local columns) for axis "column"."""
    dtype = torch.promote_types(orthogonal.dtype, torch.float32)
    if layout.axis == "row":
        return torch.linalg.vector_norm(orthogonal, dim=2, dtype=dtype).square_()
    sums = torch.zeros(
        *(orthogonal.shape[0], len(layout.blocks), orthogonal.shape[2]), dtype=dtype, device=orthogonal.device
    )
    for block, start, stop in _local_spans(layout, placement, orthogonal.shape[1]):
        sums[:, block] = torch.linalg.vector_norm(orthogonal[:, start:stop], dim=1, dtype=dtype).square_()
    return sums


def _counts(layout: Layout, sums: Tensor) -> Tensor | float:
    """How many entries each sum is over."""
    if layout.axis == "row":
        return float(layout.shape[1])
    return torch.tensor(layout.blocks, dtype=sums.dtype, device=sums.device)[:, None]


def _norms(sums: Tensor, inverse: Tensor | None, layout: Layout, placement: ranks.Placement) -> Tensor:
    """(2, K, blocks): ||O||² and ||O^||² from the row statistics alone (section 2.9, step 5)."""
    after = sums if inverse is None else sums * inverse.square()
    both = torch.stack([sums, after])
    if layout.axis == "column":
        return both.sum(-1)
    out = both.new_zeros(2, sums.shape[0], len(layout.blocks))
    for block, start, stop in _local_spans(layout, placement, sums.shape[1]):
        out[:, :, block] = both[:, :, start:stop].sum(-1)
    return out
