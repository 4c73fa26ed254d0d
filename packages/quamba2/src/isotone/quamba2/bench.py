"""Speed and size beside the plain forms and beside torchao, on the same work, answers compared first."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isotone.quamba2 import naive, small, synthetic
from isotone.quamba2.clustering import sort_and_cluster
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.evaluate import evaluate
from isotone.quamba2.fake import FakeQuamba
from isotone.quamba2.forward import forward
from isotone.quamba2.gptq import GPTQ
from isotone.quamba2.hadamard import hadamard_matrix, hadamard_transform
from isotone.quamba2.plain import PlainMamba2
from isotone.quamba2.prepare import prepare
from isotone.quamba2.shapes import float16_weight_bytes, quantized_weight_bytes
from isotone.shared import device, progress
from isotone.shared.bench import compare, measure
from isotone.shared.claims import Ratio, Report
from isotone.shared.cli import Run
from isotone.shared.data import provenance, stdlib_text

ITSELF = "written out"
RECIPE = small.Recipe(steps=150)
BYTES = 1_000_000


def bench(run: Run, recipe: small.Recipe = RECIPE, rounds: int = 10, tokens: int = 256) -> Report:
    """The simulation beside the float model; clustering, GPTQ and the Hadamard transform beside their plain forms; size
    and KL beside torchao's at equal bits, where it is installed."""
    begin, where = time.perf_counter(), device.resolve(run.device)
    text = stdlib_text(BYTES)
    plan: list[Callable[[], list[Ratio]]] = [
        partial(simulation, where, rounds, tokens),
        partial(clustering, rounds),
        partial(layer_of_8b, rounds),
        partial(rounding, where, rounds),
        partial(transforms, where, rounds),
        partial(beside_torchao, recipe, text, where),
    ]
    ratios: list[Ratio] = []
    with progress.bar("quamba2 bench", len(plan), run.silent) as bar:
        for rows in plan:
            ratios += rows()
            bar.advance(1)
    return Report(
        "quamba2",
        "bench",
        "gpu" if where == "cuda" else "cpu",
        (),
        "torch",
        ratios=ratios,
        data=[provenance("Python's standard library, source", text.encode())],
        seconds=time.perf_counter() - begin,
    )


def simulation(where: str, rounds: int, tokens: int) -> list[Ratio]:
    """`FakeQuamba`, W4A8, beside the same forward pass in float32: at most 1.5 times as long is asked."""
    model = small.untrained(small.Recipe(hidden=512, layers=4, head_dim=64, state=64), 0).to(where).eval()
    ids = torch.randint(256, (2, tokens), generator=torch.Generator().manual_seed(0)).to(where)
    config = QuambaConfig(gptq=False, calib_samples=1, calib_len=tokens)
    fake = FakeQuamba(prepare(model, [ids[0].cpu()], config))
    assert bool(fake(ids).isfinite().all())
    timing = compare(lambda: fake(ids), lambda: forward(model, ids), rounds=rounds, warmup=2, device=where)
    work = f"2 prompts of {tokens} tokens through 4 blocks of width 512, the W4A8 simulation beside float32"
    return [_time("fake-quant", work, "FakeQuamba", "float32", f"torch {torch.__version__}", timing, 1 / 1.5)]


def clustering(rounds: int) -> list[Ratio]:
    """Sort-and-cluster of a layer with 64 heads."""
    stats = synthetic.magnitudes(synthetic.draw(0, synthetic.Sizes(heads=64)))
    values = stats.tolist()
    plan, (order, heads, dims) = sort_and_cluster(stats, 32, 4), naive.sort_and_cluster(values, 32, 4, 4, 4)
    assert (plan.channel_index.tolist(), plan.head_sizes.tolist(), plan.dim_sizes.tolist()) == (order, heads, dims)
    timing = compare(
        lambda: sort_and_cluster(stats, 32, 4),
        lambda: naive.sort_and_cluster(values, 32, 4, 4, 4),
        rounds=max(6, rounds // 2),
        warmup=2,
    )
    return [
        _time("clustering", "the plan of 64 heads of 32 channels", "sort_and_cluster", "loops", ITSELF, timing, 1.0)
    ]


def layer_of_8b(rounds: int) -> list[Ratio]:
    """Sort-and-cluster of a layer of the 8B shape: under 50 ms is asked."""
    stats = torch.randn(8192, generator=torch.Generator().manual_seed(0)).exp()
    ours, _ = measure(lambda: sort_and_cluster(stats, 64, 8), rounds=max(6, rounds), warmup=2)
    work = "the plan of a layer of the 8B shape, 128 heads of 64 channels in 8 groups"
    return [Ratio("clustering-8b", work, "sort_and_cluster", "what is asked", "section 9", ours, 0.05, "s", 1.0)]


def rounding(where: str, rounds: int) -> list[Ratio]:
    """GPTQ of a 512 x 512 weight beside the algorithm column by column."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(512, 512, generator=generator) / 512**0.5 + 0.5 * torch.eye(512)
    inputs = (torch.randn(2048, 512, generator=generator) @ mix).to(where)
    weight = torch.randn(512, 512, generator=generator).to(where)
    gathered = GPTQ(512, where)
    gathered.add(inputs)
    ours = gathered.quantize(weight).dequantize().double()
    theirs = naive.gptq(weight, gathered.hessian, 128)
    # sums in another order may round a number to its neighbour: equal losses, not equal codes, are the answer
    losses = [_loss(gathered.hessian, weight, found) for found in (ours, theirs)]
    assert abs(losses[0] / losses[1] - 1) < 0.02
    timing = compare(
        lambda: gathered.quantize(weight),
        lambda: naive.gptq(weight, gathered.hessian, 128),
        rounds=6,
        warmup=1,
        device=where,
    )
    found = [_time("gptq", "a weight of 512 x 512 in groups of 128", "GPTQ", "column by column", ITSELF, timing, 1.0)]
    if where == "cuda":  # pragma: no cover - needs a GPU
        large, wide = GPTQ(4096, where), torch.randn(18560, 4096, device=where)
        large.add(torch.randn(8192, 4096, device=where))
        seconds, _ = measure(lambda: large.quantize(wide), rounds=6, warmup=1, device=where)
        work = "a weight of 18560 x 4096 in groups of 128"
        found.append(Ratio("gptq-8b", work, "GPTQ", "what is asked", "section 9", seconds, 10.0, "s", 1.0))
    return found


def _loss(hessian: Tensor, wanted: Tensor, got: Tensor) -> float:
    error = wanted.double() - got.double()
    return float((error @ hessian.double() * error).sum())


def transforms(where: str, rounds: int) -> list[Ratio]:
    """The Hadamard transform of 64 rows beside butterflies in a loop and the dense product."""
    found = []
    for width in (4096, 5120):
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(where)
        matrix = hadamard_matrix(width, torch.float32, torch.device(where))
        peers: dict[str, Callable[[], Tensor]] = {"dense product": partial(torch.matmul, x, matrix)}
        if width & (width - 1) == 0:
            peers["butterflies"] = partial(naive.butterflies, x)
        for name, peer in peers.items():
            assert float((hadamard_transform(x) - peer()).abs().max()) < 1e-4
            timing = compare(partial(hadamard_transform, x), peer, rounds=rounds, warmup=2, device=where)
            work = f"the Hadamard transform of 64 rows of {width}"
            key = f"hadamard-{width}-{name.split()[0]}"
            found.append(_time(key, work, "hadamard_transform", name, ITSELF, timing, 1.0))
    return found


# --- torchao ----------------------------------------------------------------------------------------------


def beside_torchao(recipe: small.Recipe, text: str, where: str) -> list[Ratio]:
    """KL to the float model and bytes at equal bits of a byte-level Mamba2; nothing where torchao is away.

    The embedding stays in float16 on either side, since torchao quantises projections alone.
    """
    version = _torchao()
    if version is None:
        return []
    training, held_out = small.corpus(text)
    model = small.train(recipe, training, 0, 0.0, where)
    calibration = [row[0] for row in small.windows(training, 16, recipe.length)]
    scored = small.windows(held_out, 16, recipe.length)
    found = []
    for bits, mode, peer in (
        (4, "W4A16", "int4 weights in groups of 128"),
        (8, "W8A8", "int8 weights, dynamic int8 activations"),
    ):
        sizes = {"calib_samples": 16, "calib_len": recipe.length, "gptq_samples": 16, "gptq_len": recipe.length}
        chosen: dict[str, Any] = {"w_bits": bits, "a_bits": 16 if bits == 4 else 8, "embedding_bits": 16, **sizes}
        config = QuambaConfig(**chosen)
        fake = FakeQuamba(prepare(model, calibration, config))
        other = _with_torchao(model, bits)
        ours = _kl(partial(_on, fake, where), model, scored)
        theirs = _kl(partial(_on, partial(_without_gradient, other), where), model, scored)
        words = f"a byte-level Mamba2 of {recipe.layers} blocks, {mode}"
        what = f"torchao, {peer}"
        found += [
            Ratio(f"torchao-kl-{bits}", f"KL of {words}", "ours", what, version, ours, theirs, "nats", None),
            Ratio(
                f"torchao-bytes-{bits}",
                f"bytes of {words}",
                "ours",
                what,
                version,
                quantized_weight_bytes(model.config, config) / 1e6,
                _their_bytes(model, bits) / 1e6,
                "MB",
                None,
            ),
        ]
    return found


def _torchao() -> str | None:
    try:
        import torchao
    except ImportError:
        return None
    return str(torchao.__version__)


def _with_torchao(model: PlainMamba2, bits: int) -> PlainMamba2:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    made = copy.deepcopy(model)
    # the form that computes on any device; torchao's packed int4 has kernels for some alone
    int4: Any = getattr(torch, "int4")  # noqa: B009 - a type that torch's stubs leave out
    config: Any = IntxWeightOnlyConfig(int4, PerGroup(128)) if bits == 4 else Int8DynamicActivationInt8WeightConfig()
    quantize_(made, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return made


@torch.no_grad()
def _without_gradient(model: PlainMamba2, ids: Tensor) -> Tensor:
    return small.logits(model, ids)


def _on(model: Callable[[Tensor], Tensor], where: str, ids: Tensor) -> Tensor:
    return model(ids.to(where))


def _kl(logits: Callable[[Tensor], Tensor], model: PlainMamba2, scored: list[Tensor]) -> float:
    found = evaluate(logits, scored, lambda ids: forward(model, ids.to(model.lm_head.weight.device)))
    return float(found.kl or 0.0)


def _their_bytes(model: PlainMamba2, bits: int) -> float:
    """Of the model with packed weights: codes and a bfloat16 scale (and zero, for 4 bits) of each group or row; all
    else in float16."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    numbers = sum(weight.numel() for weight in linear)
    extra = numbers / 128 * 4 if bits == 4 else sum(len(weight) for weight in linear) * 2
    return float16_weight_bytes(model.config) - 2 * numbers + numbers * bits / 8 + extra


def _time(name: str, work: str, ours: str, peer: str, version: str, timing: Any, target: float) -> Ratio:
    return Ratio(name, work, ours, peer, version, timing.ours_seconds, timing.ours_seconds * timing.ratio, "s", target)
