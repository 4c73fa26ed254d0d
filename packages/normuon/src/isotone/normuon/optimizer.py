"""NorMuon and Muon on one engine: momentum, orthogonalisation, row statistics, rescaling, update.

arXiv 2510.05491, algorithm 1, and section 2.8 for parameters that are sharded. Same-shape matrices go through as
one batch; on several ranks the result does not depend on how many there are, since the Frobenius norms are
all-reduced and not taken over local rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.optimizer import Optimizer

from isotone.normuon import distributed as ranks
from isotone.normuon.bucket import Bucket, make_buckets
from isotone.normuon.kernels import apply_update
from isotone.normuon.layout import AXES, Layout, layout_of, warn_of_embeddings
from isotone.normuon.normalize import check_scale, inverse_root, step_factor
from isotone.normuon.orthogonalize import Method, check_method, zeropower

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
KINDS = ("matrix", "adamw")
# what holds for the whole optimizer and not for a group
_SETTINGS = ("_adamw", "_mesh", "_strategy", "_foreach", "_compile", "_wire_dtype", "_ns_dtype", "_orthogonalize")


class Muon(Optimizer):
    """Muon: momentum, orthogonalised, with decoupled weight decay; the engine of `NorMuon` without its v.

    `params`: parameters, (name, parameter) pairs or groups. A group has `kind` "matrix" (the default; two
    dimensions or more) or "adamw" (embeddings, heads, norms, biases: `adamw` holds their settings). It may override
    `lr`, `momentum`, `beta2`, `weight_decay`, `nesterov`, `eps`, `scale`, `ns_steps`, `cautious`, `flatten_conv`, and
    set `split_sizes` (fused QKV: rows of each part), `num_heads`, `axis`, and `experts` (whether three dimensions
    are a batch of matrices, as by default, or a 1-D convolution).

    - `lr`, `weight_decay`: W <- W - lr weight_decay W - lr f O (decoupled, with the base rate).
    - `momentum`, `nesterov`: M <- lerp(M, G, 1 - momentum); U = lerp(G, M, momentum) with Nesterov, M without.
    - `scale`: "rms" (RMS of the step 0.2 lr), "original", "spectral", "match_rms_adamw" or None (1); rates of
      different modes differ tenfold: `convert_lr`.
    - `orthogonalize`, `ns_steps`, `ns_dtype`, `compile`: see `zeropower`.
    - `cautious`: decay only where update and weight agree in sign.
    - `mesh`: for parameters that are not DTensors, the 1-D mesh or process group of data-parallel ranks;
      `strategy` "round_robin" (gradients are averaged already, as DDP does; each rank orthogonalises its share)
      or "reduce_scatter" (they are not: ZeRO-2; the state of a matrix only on its owner, AdamW's on all; the same
      parameters must have gradients on every rank). DTensors (FSDP2, HSDP) bring theirs.
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
        if unexpected := set(more) - ({"beta2", "axis"} if self.normalise else set()):
            raise TypeError(f"expected settings of {type(self).__name__}, got {sorted(unexpected)[0]!r}")
        if strategy not in ranks.STRATEGIES:
            raise ValueError(f"expected strategy to be one of {', '.join(ranks.STRATEGIES)}, got {strategy!r}")
        unknown = set(adamw or {}) - set(ADAMW)
        if unknown:
            raise ValueError(f"expected adamw settings among {', '.join(ADAMW)}, got {sorted(unknown)[0]!r}")
        self._adamw = {**ADAMW, **(adamw or {})}
        self._mesh, self._strategy, self._foreach, self._compile = mesh, strategy, foreach, compile
        self._wire_dtype, self._ns_dtype, self._orthogonalize = wire_dtype, ns_dtype, orthogonalize
        self._plans: dict[int, tuple[tuple, list[Bucket]]] = {}
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        defaults |= dict(eps=eps, scale=scale, ns_steps=ns_steps, cautious=cautious, flatten_conv=flatten_conv)
        defaults |= {"kind": "matrix", "axis": "row", "split_sizes": None, "num_heads": None, "experts": True}
        defaults |= more
        super().__init__(params, defaults)

    # --- configuration ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along; `Optimizer`'s own leaves our settings out."""
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _SETTINGS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:  # a checkpoint of Muon has no beta2, one of an older version not all settings
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; an "adamw" one takes what it does not set from the optimizer's `adamw`."""
        group = dict(param_group)
        if whole := sorted({name.removeprefix("_") for name in _SETTINGS} & set(group)):
            raise ValueError(f"expected {whole[0]} for the whole optimizer, got it in a group")
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
        for number, group in enumerate(self.param_groups):
            alive = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "adamw":
                self._step_adamw(group, alive)
            else:
                self._step_matrices(group, self._buckets(number, group, alive))
        return loss

    def _buckets(self, number: int, group: dict[str, Any], alive: list[Tensor]) -> list[Bucket]:
        """The group's buckets, made anew only where its parameters or their layout are others than before."""
        named = ("axis", "split_sizes", "num_heads", "experts", "flatten_conv")
        options = tuple(repr(group[name]) for name in named)
        key = (*options, *((id(p), p.dtype, p.device) for p in alive))
        known = self._plans.get(number)
        if known is None or known[0] != key:
            buckets = make_buckets(alive, group, self._mesh, self._strategy, self._foreach)
            self._plans[number] = known = (key, buckets)
        return known[1]

    def _step_matrices(self, group: dict[str, Any], buckets: list[Bucket]) -> None:
        scattered = [
            b
            for b in buckets
            if self._strategy == "reduce_scatter" and b.placement.dim is None and b.placement.world > 1
        ]
        for bucket in scattered:
            self._step_scattered(group, bucket)
        rest = [b for b in buckets if b not in scattered]
        self._update(group, rest, self._orthogonalized(group, [(b, b.gradients()) for b in rest]))

    def _orthogonalized(self, group: dict[str, Any], pairs: list[tuple[Bucket, Tensor]]) -> list[Tensor]:
        """Steps 1 to 3 of section 2.9; the shards of the next bucket travel while this one is orthogonalised."""
        exchanges = [
            ranks.Exchange(
                self._momentum(group, bucket, gradients),
                bucket.layout,
                bucket.placement,
                self._wire_dtype,
                bucket.first,
            )
            for bucket, gradients in pairs
        ]
        for number, exchange in enumerate(exchanges):
            if number == 0:
                exchange.start()
            if number + 1 < len(exchanges):
                exchanges[number + 1].start()
            exchange.send(self._polar(group, exchange.matrices(), exchange.layout))
        return [exchange.collect() for exchange in exchanges]

    def _momentum(self, group: dict[str, Any], bucket: Bucket, gradients: Tensor) -> Tensor:
        """M <- lerp(M, G, 1 - beta1), and what is orthogonalised (algorithm 1, lines 2 and 3)."""
        momentum = bucket.momentum(self.state)
        momentum.lerp_(gradients, 1 - group["momentum"])
        return gradients.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum

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

    def _update(self, group: dict[str, Any], buckets: list[Bucket], orthogonal: list[Tensor]) -> None:
        sums: list[Tensor | None] = [None] * len(buckets)
        norms: list[Tensor | None] = [None] * len(buckets)
        inverses: list[Tensor | None] = [None] * len(buckets)
        if self.normalise or group["scale"] == "rms":
            measured = [b.square_sums(o) for b, o in zip(buckets, orthogonal, strict=True)]
            across = {"row": 1, "column": 0}  # the sharding that cuts through a statistic
            _sum_where(measured, buckets, across)
            if self.normalise:
                inverses = [self._second_moments(group, b, s) for b, s in zip(buckets, measured, strict=True)]
            totals = [b.norms(s, i) for b, s, i in zip(buckets, measured, inverses, strict=True)]
            along = {"row": 0, "column": 1}
            _sum_where(totals, buckets, along)
            sums, norms = [*measured], [*totals]
        for parts in zip(buckets, orthogonal, sums, norms, inverses, strict=True):
            self._apply(group, *parts)

    def _second_moments(self, group: dict[str, Any], bucket: Bucket, sums: Tensor) -> Tensor:
        """v <- lerp(v, mean square, 1 - beta2), 1 / (sqrt(v) + eps) (lines 4 and 5); v is float32 or better."""
        second = bucket.second_moments(self.state, sums)
        second.lerp_(bucket.means(sums), 1 - group["beta2"])
        return inverse_root(second, group["eps"])

    def _apply(
        self,
        group: dict[str, Any],
        bucket: Bucket,
        orthogonal: Tensor,
        sums: Tensor | None,
        norms: Tensor | None,
        inverse: Tensor | None,
    ) -> None:
        """W <- (1 - lr decay) W - lr f r O (line 7), one factor f a block."""
        rate = float(group["lr"])
        dtype = torch.promote_types(orthogonal.dtype, torch.float32) if norms is None else norms.dtype
        factor = bucket.shape_factors(group["scale"], dtype)
        if norms is None:
            scaled = factor.expand(len(orthogonal), -1)
        else:
            scaled = step_factor(group["scale"], factor, norms[0], norms[1])
        scaled = rate * scaled
        if inverse is not None and bucket.layout.axis == "column":
            each = scaled[..., None] * inverse
            orthogonal = torch.cat(
                [orthogonal[:, start:stop] * each[:, block, None] for block, start, stop in bucket.spans]
                or [orthogonal],
                dim=1,
            )
            rows = torch.ones_like(scaled[:, :1]).expand(-1, orthogonal.shape[1])
        else:
            rows = scaled[:, bucket.block_of_row]
            rows = rows if inverse is None else rows * inverse
        weights = bucket.weights()
        apply_update(weights, orthogonal, rows[..., None], rate * group["weight_decay"], group["cautious"])
        bucket.write_back(weights)

    # --- replicated parameters, ZeRO-2 ----------------------------------------------------------------------

    def _step_scattered(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Gradients are averaged by a reduce-scatter; the owner updates, and weights are gathered."""
        process_group = bucket.placement.group
        gradients = ranks.mean_scatter(bucket.gradients(), process_group, bucket.first)
        weights = torch.zeros_like(gradients)
        if bucket.owned is not None:
            own = gradients[: len(bucket.owned.parameters)]
            self._update(group, [bucket.owned], self._orthogonalized(group, [(bucket.owned, own)]))
            for slot, weight in zip(weights, bucket.owned.weights(), strict=False):
                slot.copy_(weight)
        whole = ranks.gather_weights(weights, len(bucket.parameters), process_group, bucket.first)
        for parameter, weight in zip(bucket.parameters, whole, strict=True):
            parameter.copy_(weight.view(parameter.shape))

    # --- AdamW -----------------------------------------------------------------------------------------------

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if sparse := [g for g in gradients if g.layout != torch.strided]:
            raise ValueError(f"expected dense gradients, got {sparse[0].layout}")
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


def _sum_where(tensors: list[Tensor], buckets: list[Bucket], dims: Mapping[str, int]) -> None:
    """All-reduce, in one call a group, the tensors of the buckets that are sharded along `dims[axis]`."""
    pairs = zip(tensors, buckets, strict=True)
    ranks.sum_over_ranks([(t, b.placement.group) for t, b in pairs if b.placement.dim == dims[b.layout.axis]])
