"""A byte-level Mamba2 trained on real text, what its channels' order is like, and every row of the ablation (A2).

Tiny models lack the outliers of large ones. `plant` multiplies the rows of x, B and C in in_proj and their convolution
by exp(sigma randn) before training (section 5); everything is measured with and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.calibrate import batches
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.evaluate import Evaluation, evaluate
from isotone.quamba2.fake import FakeQuamba
from isotone.quamba2.forward import Probe, forward, rms_norm, time_steps
from isotone.quamba2.plain import PlainConfig, PlainMamba2
from isotone.quamba2.prepare import prepare
from isotone.quamba2.shapes import float16_weight_bytes, quantized_weight_bytes
from isotone.quamba2.texts import samples

SIGMA = 1.5


@dataclass(frozen=True)
class Recipe:
    """The model's sizes and its training: `steps` of AdamW on `batch` windows of `length` bytes, the rate warmed up
    over a tenth and then cosine to nothing."""

    hidden: int = 128
    layers: int = 4
    head_dim: int = 32
    state: int = 32
    groups: int = 2
    expand: int = 2
    steps: int = 500
    batch: int = 8
    length: int = 128
    rate: float = 4e-3


def untrained(recipe: Recipe, seed: int, sigma: float = 0.0) -> PlainMamba2:
    """The model at its start; `sigma` of the planted gains, 0 for none."""
    heads = recipe.hidden * recipe.expand // recipe.head_dim
    sizes = recipe.hidden, recipe.layers, heads, recipe.head_dim, recipe.state, recipe.groups, 256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlainMamba2(PlainConfig(*sizes, expand=recipe.expand, chunk_size=64))
        if sigma:
            plant(model, sigma)
    return model


@torch.no_grad()
def plant(model: Any, sigma: float) -> Any:
    """Multiply the rows of x, B and C in every in_proj, and their convolution, by exp(sigma randn); returns `model`."""
    arch = Architecture.of(model.config)
    for layer in model.backbone.layers:
        gains = (sigma * torch.randn(arch.conv_width)).exp()
        # in_proj's rows are z, x, B, C, dt
        layer.mixer.in_proj.weight[arch.inner : arch.inner + arch.conv_width] *= gains[:, None]
        layer.mixer.conv1d.weight *= gains[:, None, None]
    return model


def logits(model: Any, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l vocab"]:
    """`forward.forward` of a Mamba2 with a gradient: the scan is one product over all pairs of tokens."""
    arch = Architecture.of(model.config)
    hidden = model.backbone.embeddings(input_ids)
    for layer in model.backbone.layers:
        hidden = hidden + _mixer(layer.mixer, arch, rms_norm(hidden, arch.eps, layer.norm.weight))
    return model.lm_head(rms_norm(hidden, arch.eps, model.backbone.norm_f.weight))


def _mixer(mixer: Any, arch: Architecture, hidden: Tensor) -> Tensor:
    z, mixed, raw = mixer.in_proj(hidden).split([arch.inner, arch.conv_width, arch.heads], -1)
    padded = F.pad(mixed.transpose(1, 2), (arch.conv_kernel - 1, 0))
    mixed = F.silu(F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=arch.conv_width)).transpose(1, 2)
    wide = arch.groups * arch.state
    x, B, C = mixed.split([arch.inner, wide, wide], -1)
    x = x.unflatten(-1, (arch.heads, arch.head_dim)).transpose(1, 2)
    B, C = (values.unflatten(-1, (arch.groups, arch.state)).transpose(1, 2) for values in (B, C))
    dt = time_steps(raw, mixer.dt_bias, arch.dt_limit).transpose(1, 2)
    log_decay = (dt * -mixer.A_log.exp()[:, None]).cumsum(-1)
    later = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).triu(1)
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(later, -math.inf).exp()
    pairs = (C @ B.transpose(-1, -2)).repeat_interleave(arch.heads // arch.groups, 1)
    y = (pairs * decay) @ (x * dt[..., None]) + mixer.D[:, None, None] * x
    gated = (y.transpose(1, 2).flatten(2) * F.silu(z)).unflatten(-1, (arch.groups, -1))
    gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + arch.eps)
    return mixer.out_proj(gated.flatten(2) * mixer.norm.weight)


def train(
    recipe: Recipe,
    ids: Int[Tensor, " n"],
    seed: int,
    sigma: float = 0.0,
    device: str = "cpu",
    advance: Callable[[float], None] | None = None,
) -> Any:
    """The model trained on the bytes `ids`, in eval mode. `advance`: called with the loss after each step."""
    model = untrained(recipe, seed, sigma).to(device).train()
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, recipe.steps // 10)

    def share(step: int) -> float:
        rest = (step - warm) / max(1, recipe.steps - warm)
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _ in range(recipe.steps):
        starts = torch.randint(len(ids) - recipe.length - 1, (recipe.batch,), generator=generator)
        rows = torch.stack([ids[start : start + recipe.length + 1] for start in starts.tolist()]).to(device)
        loss = F.cross_entropy(logits(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if advance:
            advance(float(loss.detach()))
    return model.eval()


# --- the premise: the order of channels and heads persists --------------------------------------------------


class _Maxima(Probe):
    """For each layer max |x| after the convolution, (2 b, d): of each half of each sample's tokens, halves first."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def site(self, layer: int, name: str, values: Tensor) -> Tensor:
        if name == "conv_x":
            halves = values.abs().tensor_split(2, 1)
            self.found.setdefault(layer, []).append(torch.stack([half.amax(1) for half in halves]))
        return values


def spearman(first: Float[Tensor, "*rows n"], second: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """The rank correlation along the last dimension, of values without ties."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (first, second)]
    one, other = (r - r.mean(-1, keepdim=True) for r in ranks)
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1)).clamp_min(1e-12)


def persistence(model: Any, rows: Sequence[Int[Tensor, "1 l"]]) -> dict[str, float]:
    """How far orders by max |x| persist: the mean rank correlation over layers, heads and pairs.

    "channels over samples" and "heads over samples": of one sample with the next; "... over positions": of the first
    half of a sample's tokens with the second. Channels are those of one head, a head's magnitude is its largest.
    """
    arch, probe = Architecture.of(model.config), _Maxima()
    for ids in batches(rows):
        forward(model, ids.to(model.lm_head.weight.device), probe, last_only=True)
    found: dict[str, list[Tensor]] = {}
    for seen in probe.found.values():
        halves = torch.cat(seen, 1).unflatten(-1, (arch.heads, arch.head_dim))  # (2, samples, h, p)
        whole = halves.amax(0)
        for name, part in (("channels", slice(None)), ("heads", None)):
            kept, parts = (v if part is not None else v.amax(-1) for v in (whole, halves))
            found.setdefault(f"{name} over samples", []).append(spearman(kept[:-1], kept[1:]).mean())
            found.setdefault(f"{name} over positions", []).append(spearman(parts[0], parts[1]).mean())
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


# --- the ablation ladder -----------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {"embedding_bits": 16, "lm_head_bits": 16}
_NOTHING: dict[str, Any] = {
    **_PLAIN,
    "hadamard": "none",
    "gptq": False,
    "per_state_group": False,
    "sort_and_cluster": False,
}
LADDER: dict[str, dict[str, Any]] = {
    "W4A8 per group": _NOTHING,
    "+ Hadamard": {**_NOTHING, "hadamard": "all"},
    "+ GPTQ": {**_NOTHING, "hadamard": "all", "gptq": True},
    "+ PerSG": {**_PLAIN, "sort_and_cluster": False},
    "+ SnC": _PLAIN,
}
"""The five steps of the paper's W4A8 ablation, each with what the ones before have; embedding and head are float."""
OTHERS: dict[str, dict[str, Any]] = {
    "W4A16 per group": {**_NOTHING, "a_bits": 16},
    "W4A16 + Hadamard": {**_NOTHING, "a_bits": 16, "hadamard": "all"},
    "W4A16 + GPTQ": {**_NOTHING, "a_bits": 16, "gptq": True},
    "W4A16 + Hadamard + GPTQ": {**_PLAIN, "a_bits": 16},
    "W8A8 Quamba (v1)": {**_NOTHING, "w_bits": 8, "hadamard": "out", "x_percentile": 0.9995},
    "W8A8": {**_PLAIN, "w_bits": 8},
    "W4A8, dynamic programming": {**_PLAIN, "clustering": "dp"},
    "W4A8, a scale of dt a head": {**_PLAIN, "dt_scales": "head"},
    "W4A8, head 4 bits": {"embedding_bits": 16},
    "W4A8, embedding 4 bits": {"lm_head_bits": 16},
    "W4A8, both 4 bits": {},
    "W4A16, both 4 bits": {"a_bits": 16},
}
"""Rows beside the ladder: 16-bit activations, the earlier paper's method, extensions, and head-to-toe bits."""


def rows_of(
    model: Any,
    names: Sequence[str],
    calibration: Sequence[Int[Tensor, " l"]],
    held_out: Sequence[Int[Tensor, "1 l"]],
    seed: int = 0,
    advance: Callable[[str], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Perplexity and mean KL to `model` of each row in `names` on `held_out`, and "float", the model itself."""
    device = model.lm_head.weight.device

    def reference(ids: Tensor) -> Tensor:
        return forward(model, ids.to(device))

    found = {"float": {"perplexity": evaluate(reference, held_out).perplexity, "kl": 0.0}}
    count, length = len(calibration), len(calibration[0])
    for name in names:
        sizes = {"calib_samples": count, "calib_len": length, "gptq_samples": count, "gptq_len": length, "seed": seed}
        config = QuambaConfig(**{**sizes, **(LADDER | OTHERS)[name]})
        fake = FakeQuamba(prepare(model, list(calibration), config))
        scored: Evaluation = evaluate(partial(_on, fake, device), held_out, reference)
        found[name] = {"perplexity": scored.perplexity, "kl": float(scored.kl or 0.0)}
        if advance:
            advance(name)
    return found


def _on(model: Callable[[Tensor], Tensor], device: torch.device, ids: Tensor) -> Tensor:
    return model(ids.to(device))


def bytes_of(model: Any, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the weights of each row in `names`, as they are saved, and of "float" in float16."""
    found = {"float": float16_weight_bytes(model.config)}
    return found | {
        name: quantized_weight_bytes(model.config, QuambaConfig(**(LADDER | OTHERS)[name])) for name in names
    }


def corpus(text: str) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """The bytes of `text`: nine tenths to train and calibrate on, the last tenth to score."""
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def windows(ids: Int[Tensor, " n"], count: int, length: int) -> list[Int[Tensor, "1 l"]]:
    """`texts.samples`, each a batch of one."""
    return [row[None] for row in samples(ids, count, length)]
