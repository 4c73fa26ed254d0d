"""`isotone quamba2 ...`: quantize, evaluate, generate, search, profile, export, reproduce, bench."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from isotone.quamba2.config import QuambaConfig
from isotone.shared import device, progress
from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("quamba2", framework="torch")
Opt, Arg = typer.Option, typer.Argument
FloatModel = Annotated[Path, Arg(help="a Hugging Face folder of a Mamba or Mamba2, or of a mamba_ssm checkpoint")]
Quantized = Annotated[Path, Arg(help="a folder that quantize wrote")]
Text = Annotated[Path, Opt(help="a text file")]
MODES: dict[str, tuple[int, int | str]] = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a16": (4, 16), "w4ax": (4, "mixed")}


@verb(app)
def quantize(
    run: Run,
    model: FloatModel,
    text: Annotated[Path | None, Opt(help="a text file to calibrate on; w4a16 with --no-gptq needs none")] = None,
    mode: Annotated[str, Opt(help="w8a8, w4a8, w4a16 or w4ax (mixed, to be searched)")] = "w4a8",
    group_size: Annotated[int, Opt(help="inputs that share a 4-bit scale; 0: all of a row")] = 128,
    sort_and_cluster: Annotated[bool, Opt(help="a scale for each cluster of x's channels")] = True,
    head_groups: Annotated[int, Opt(help="m: clusters of heads in an SSM group")] = 4,
    dim_groups: Annotated[int, Opt(help="n: clusters of channels in a cluster of heads")] = 4,
    clustering: Annotated[str, Opt(help="kmeans or dp")] = "kmeans",
    stat: Annotated[str, Opt(help="absmax or meanabs, what orders the channels")] = "absmax",
    group_channels: Annotated[bool, Opt(help="cluster the channels of a Mamba too")] = False,
    per_state_group: Annotated[bool, Opt(help="a scale of B and C for each SSM group")] = True,
    hadamard: Annotated[str, Opt(help="all, out or none")] = "all",
    gptq: Annotated[bool, Opt(help="GPTQ for 4-bit weights, else rounding")] = True,
    embedding_bits: Annotated[int | None, Opt(help="4, 8 or 16; default: the weights'")] = None,
    lm_head_bits: Annotated[int | None, Opt(help="4, 8 or 16; default: the weights'")] = None,
    state_bits: Annotated[int | None, Opt(help="8 or 16; default: the activations'")] = None,
    x_percentile: Annotated[float | None, Opt(help="the part of |x| that its scale covers")] = None,
    dt_scales: Annotated[str, Opt(help="tensor or head")] = "tensor",
    calib_samples: Annotated[int, Opt(help="samples for the scales")] = 512,
    calib_len: Annotated[int, Opt(help="tokens of each")] = 512,
    gptq_samples: Annotated[int, Opt(help="samples for GPTQ")] = 128,
    gptq_len: Annotated[int, Opt(help="tokens of each")] = 1024,
) -> dict:
    """Quantise a model, written to OUT/model with a report; calibration resumes where it was killed."""
    from isotone.quamba2 import plots, texts
    from isotone.quamba2.quantize import quantize as make
    from isotone.quamba2.report import report

    if mode not in MODES:
        raise InputError(f"expected --mode to be one of {', '.join(MODES)}, got {mode!r}")
    w_bits, a_bits = MODES[mode]
    config = QuambaConfig(
        w_bits=w_bits,
        a_bits=a_bits,
        group_size=group_size or None,
        sort_and_cluster=sort_and_cluster,
        head_groups=head_groups,
        dim_groups=dim_groups,
        clustering=clustering,
        stat=stat,
        group_channels=group_channels,
        per_state_group=per_state_group,
        hadamard=hadamard,
        gptq=gptq,
        embedding_bits=embedding_bits,
        lm_head_bits=lm_head_bits,
        state_bits=state_bits,
        x_percentile=x_percentile,
        dt_scales=dt_scales,
        calib_samples=calib_samples,
        calib_len=calib_len,
        gptq_samples=gptq_samples,
        gptq_len=gptq_len,
    )
    target = _target(model, run)
    said = None if text is None else texts.read(text)
    source = _float(model, run)
    data = held_out = None
    if said is not None:
        ids = texts.encode(said, model, source.config.vocab_size)
        count, length = max(calib_samples, gptq_samples), max(calib_len, gptq_len)
        data = texts.samples(ids, count, length)
        held_out = ids[-min(len(ids), calib_len) :]
    checkpoints = run.out / "checkpoints"
    if not run.resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    with progress.bar("quantize", quiet=run.silent) as bar:

        def show(step: str, done: int, total: int) -> None:
            bar.advance(1, step=f"{step} {done} of {total}")

        made = make(source, data, config, folder=checkpoints, on_progress=show)
    _save(made, model, target)
    found = report(made, source, None if held_out is None else held_out[None].to(source.lm_head.weight.device))
    _write(run.out / "report.json", dataclasses.asdict(found))
    if held_out is not None:
        plots.blocks(found, run.out / "blocks.png")
        _channels(source, held_out[None], config, run.out / "channels.png")
    worst = min((one.sqnr for one in found.blocks if one.sqnr is not None), default=None)
    return {
        "model": str(target),
        "bytes": f"{found.total_bytes:,} of {found.float16_bytes:,} in float16 "
        f"({found.float16_bytes / found.total_bytes:.2f} x less)",
        "state bytes a sequence": f"{found.state_bytes:,}",
        "worst block, dB": None if worst is None else round(worst, 1),
    }


@verb(app)
def evaluate(
    run: Run,
    model: Quantized,
    text: Text,
    base: Annotated[Path | None, Opt(help="the float model to compare with")] = None,
    samples: Annotated[int, Opt(help="windows of the text")] = 16,
    length: Annotated[int, Opt(help="tokens of each")] = 256,
) -> dict:
    """Cross-entropy and perplexity on a text; with --base the KL to the float model too."""
    from isotone.quamba2 import texts
    from isotone.quamba2.evaluate import evaluate as score

    if samples < 1 or length < 2:
        raise InputError(f"expected --samples of 1 and --length of 2 or more, got {samples} and {length}")
    said = texts.read(text)
    made = _quantized(model, run)
    windows = texts.samples(texts.encode(said, model, made.arch.vocab), samples, length)
    reference = None if base is None else _logits(_float(base, run), made.arch.vocab)
    found = score(lambda ids: made(ids.to(made.device)).logits, [ids[None] for ids in windows], reference)
    _write(run.out / "evaluation.json", dataclasses.asdict(found))
    return {key: value for key, value in dataclasses.asdict(found).items() if value is not None}


@verb(app)
def generate(
    run: Run,
    model: Quantized,
    prompt: Annotated[str, Opt(help="the prompt's text")],
    max_new_tokens: Annotated[int, Opt(help="tokens to generate")] = 64,
    temperature: Annotated[float, Opt(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int | None, Opt(help="draw from so many of the likeliest tokens")] = None,
    top_p: Annotated[float, Opt(help="draw from the fewest tokens that hold this much")] = 1.0,
) -> dict:
    """Go on with a prompt."""
    import torch

    from isotone.quamba2 import texts

    if not 0 <= temperature < float("inf"):
        raise InputError(f"expected a finite --temperature of at least 0, got {temperature}")
    made = _quantized(model, run)
    ids = texts.encode(prompt, model, made.arch.vocab)
    if not len(ids):
        raise InputError("expected at least one token in --prompt, got none")
    out = made.generate(
        ids[None].to(made.device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator(made.device).manual_seed(_one_seed(run)),
    )[0, len(ids) :]
    found = {"prompt tokens": len(ids), "new tokens": len(out), "text": texts.decode(out, model)}
    _write(run.out / "generation.json", {**found, "ids": out.tolist()})
    return found


@verb(app)
def search(
    run: Run,
    model: Annotated[Path, Arg(help="a folder that quantize --mode w4ax wrote")],
    text: Text,
    n_high: Annotated[int, Opt(help="blocks that keep 16-bit activations")] = 14,
    base: Annotated[Path | None, Opt(help="the float model to stay near to; default: the next token's loss")] = None,
    population: Annotated[int, Opt(help="sets at the start")] = 40,
    generations: Annotated[int, Opt(help="generations")] = 5,
    mutations: Annotated[int, Opt(help="mutants a generation")] = 10,
    crossovers: Annotated[int, Opt(help="crosses a generation")] = 10,
    samples: Annotated[int, Opt(help="windows of the text")] = 16,
    length: Annotated[int, Opt(help="tokens of each")] = 256,
) -> dict:
    """Choose the blocks that keep 16-bit activations; the model set so is written to OUT/model."""
    from isotone.quamba2 import plots, texts
    from isotone.quamba2.search import search_mixed_precision

    if samples < 1 or length < 2:
        raise InputError(f"expected --samples of 1 and --length of 2 or more, got {samples} and {length}")
    target = _target(model, run)
    said = texts.read(text)
    made = _quantized(model, run)
    windows = texts.samples(texts.encode(said, model, made.arch.vocab), samples, length)
    best: list[float] = []
    with progress.bar("search", generations, run.silent) as bar:

        def show(_: int, loss: float) -> None:
            best.append(loss)
            bar.advance(1, loss=round(loss, 5))

        found = search_mixed_precision(
            made,
            windows,
            n_high,
            population,
            generations,
            mutations=mutations,
            crossovers=crossovers,
            seed=_one_seed(run),
            teacher=None if base is None else _logits(_float(base, run), made.arch.vocab),
            samples=samples,
            on_generation=show,
        )
    _save(made, model, target)
    _write(run.out / "precision.json", found)
    plots.search(best, run.out / "search.png")
    kept = [number for number, bits in enumerate(made.block_bits) if bits == 16]
    return {"model": str(target), "blocks of 16 bits": ", ".join(map(str, kept)), "loss": best[-1]}


@verb(app)
def profile(
    run: Run,
    model: Quantized,
    batch: Annotated[int, Opt(help="sequences at once")] = 1,
    prompt: Annotated[int, Opt(help="tokens of the prompt")] = 1024,
    rounds: Annotated[int, Opt(help="timings to take the median of")] = 20,
) -> dict:
    """Time to the first token, time per token and bytes."""
    from isotone.quamba2.profiling import profile as measure

    found = dataclasses.asdict(measure(_quantized(model, run), batch, prompt, rounds))
    _write(run.out / "profile.json", found)
    return found


@verb(app)
def export(run: Run, model: Quantized) -> dict:
    """Write the quantised weights as an ordinary Hugging Face model, for other programs: OUT/model."""
    from isotone.quamba2.export import save_dequantized

    target = _target(model, run)
    save_dequantized(_quantized(model, run), target)
    _copy_tokenizer(model, target)
    return {"model": str(target)}


@verb(app)
def reproduce(run: Run, scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke") -> Report:
    """Measure the paper's claims again."""
    from isotone.quamba2.reproduce import SCALES
    from isotone.quamba2.reproduce import reproduce as measure

    if scale not in SCALES:
        raise InputError(f"expected --scale to be one of {', '.join(SCALES)}, got {scale!r}")
    return measure(scale, run)


@verb(app)
def bench(run: Run) -> Report:
    """Time it beside its peers."""
    from isotone.quamba2.bench import bench as measure

    return measure(run)


def _float(folder: Path, run: Run) -> Any:
    from transformers.utils import logging

    from isotone.quamba2.loading import load

    # its own bars and remarks would stand between ours
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load(folder).to(device.resolve(run.device))


def _quantized(folder: Path, run: Run) -> Any:
    from isotone.quamba2.modeling import QuambaForCausalLM

    return QuambaForCausalLM.from_pretrained(folder).to(device.resolve(run.device))


def _channels(source: Any, ids: Any, config: QuambaConfig, path: Path) -> None:
    """Draw the channels of the middle layer of a Mamba2 on a sample, before and after they are clustered."""
    from isotone.quamba2 import plots
    from isotone.quamba2.architecture import Architecture
    from isotone.quamba2.calibrate import channel_statistics

    arch = Architecture.of(source.config)
    if arch.kind == "mamba2" and config.reorders:
        stats = channel_statistics(source, [ids], config.stat)[arch.layers // 2]
        chosen = config.head_groups, config.dim_groups, config.clustering
        plots.save(plots.profiles(stats, arch.head_dim, arch.groups, *chosen), path)


def _logits(base: Any, vocab: int) -> Any:
    """The float model as a function from ids to logits."""
    from isotone.quamba2.forward import forward

    if base.config.vocab_size != vocab:
        raise InputError(f"expected --base of the model's vocabulary, {vocab} tokens, got {base.config.vocab_size}")
    return lambda ids: forward(base, ids.to(base.lm_head.weight.device))


def _one_seed(run: Run) -> int:
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed, got --seeds {','.join(map(str, seeds))}")
    return seeds[0]


def _target(source: Path, run: Run) -> Path:
    """Where a model is written. Raises `InputError` where that is the one which is read."""
    target = run.out / "model"
    if target.resolve() == source.resolve():
        raise InputError(f"expected another --out: {str(target)!r} is the model that is read, it would be overwritten")
    return target


def _save(made: Any, source: Path, target: Path) -> None:
    made.save_pretrained(target)
    _copy_tokenizer(source, target)


def _copy_tokenizer(source: Path, target: Path) -> None:
    from isotone.quamba2.texts import TOKENIZER

    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, target / path.name)


def _write(path: Path, facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> NoReturn:
    """Entry point of `isotone-quamba2`."""
    run_main(app, "quamba2")
