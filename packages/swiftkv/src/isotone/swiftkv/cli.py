"""`isotone swiftkv ...`: convert, distil, evaluate, generate, benchmark, flops, export, suggest, reproduce, bench."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from isotone.shared import device, progress
from isotone.shared.claims import Report, figure
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("swiftkv", framework="torch")
Opt, Arg = typer.Option, typer.Argument
Model = Annotated[Path, Arg(help="a Hugging Face model folder")]
Text = Annotated[Path, Opt(help="a text file, or .jsonl lines of prompt and completion, or of messages")]


@verb(app)
def convert(
    run: Run,
    model: Model,
    num_key_value_layers: Annotated[int, Opt(help="l: the first layers, which keep their own keys and values")],
    key_value_group_size: Annotated[int, Opt(help="g: layers after l that share one cache")] = 1,
    export: Annotated[str, Opt(help="dual (teacher kept, can be distilled) or swift")] = "dual",
) -> dict:
    """Make a swift model of a Hugging Face model, written to OUT/model."""
    from isotone.swiftkv.convert import convert as make

    _check_export(export)
    target = _target(model, run)
    swift = make(_load(model, run), num_key_value_layers, key_value_group_size)
    return {"model": str(_save(swift, model, target, export)), **_facts(swift)}


@verb(app)
def distill(
    run: Run,
    model: Model,
    text: Text,
    steps: Annotated[int, Opt(help="steps")] = 150,
    batch: Annotated[int, Opt(help="windows a step")] = 8,
    context: Annotated[int, Opt(help="tokens a window")] = 128,
    lr: Annotated[float, Opt(help="learning rate")] = 2e-4,
    temperature: Annotated[float, Opt(help="of the distillation loss")] = 2.0,
    hidden_loss_mult: Annotated[float, Opt(help="weight of the hidden states' squared error")] = 1.0,
    loss: Annotated[str, Opt(help="kd (distillation) or lm (next token)")] = "kd",
    train: Annotated[str, Opt(help="qkv, norms or full")] = "qkv",
    gradient_checkpointing: Annotated[bool, Opt(help="less memory, more time")] = False,
    compute_dtype: Annotated[str, Opt(help="of the forward passes: model or bf16; trained weights are fp32")] = "model",
    fuse_positions_prob: Annotated[
        float, Opt(help="chance that a packed .jsonl row counts its positions through")
    ] = 0.0,
    checkpoint_every: Annotated[int, Opt(help="steps between checkpoints")] = 50,
    export: Annotated[str, Opt(help="swift or dual")] = "swift",
) -> dict:
    """Distil a swift model against the model inside it; resumes where it was killed."""
    from isotone.swiftkv import texts
    from isotone.swiftkv.distill import DistillConfig
    from isotone.swiftkv.distill import distill as train_model

    for name, value, least in (
        ("checkpoint-every", checkpoint_every, 1),
        ("batch", batch, 1),
        ("context", context, 2),
    ):
        if value < least:
            raise InputError(f"expected --{name} to be at least {least}, got {value}")
    settings = DistillConfig(
        steps=steps,
        lr=lr,
        temperature=temperature,
        hidden_loss_mult=hidden_loss_mult,
        loss=loss,
        train=train,
        gradient_checkpointing=gradient_checkpointing,
        compute_dtype=compute_dtype,
    )
    _check_export(export)
    if export == "dual" and train != "qkv":
        raise InputError(
            f"expected --export swift with --train {train}: its teacher's weights are trained, and dropped"
        )
    seed = _one_seed(run)
    target = _target(model, run)
    swift = _load(model, run)
    if not hasattr(swift, "teacher"):
        raise InputError(f"expected a swift model in {str(model)!r}, got a {swift.config.model_type}; convert it first")
    training, held_out, data_id = texts.batches_of(text, model, swift, batch, context, seed, fuse_positions_prob)
    with progress.bar("distil", steps, run.silent) as bar:
        history = train_model(
            swift,
            training,
            settings,
            folder=run.out / "checkpoints",
            checkpoint_every=checkpoint_every,
            resume=run.resume,
            data_id=data_id,
            evaluate=_scores(swift, held_out, train),
            on_step=lambda step, value: bar.advance(1, loss=round(value, 4)),
        )
    _save(swift, model, target, export if swift.config.teacher_weights else "swift")
    (run.out / "history.json").write_text(json.dumps(dataclasses.asdict(history), indent=1), encoding="utf-8")
    drawing, axes = figure("Distillation", "step", "loss")
    axes.plot(range(1, len(history.losses) + 1), history.losses)
    axes.set_yscale("log")
    drawing.savefig(run.out / "loss.png", dpi=120)
    found = {f"{key} {when}": round(score[key], 4) for when, score in _ends(history.scores) for key in score}
    return {"model": str(target), "steps": len(history.losses), "seconds": round(history.seconds, 1), **found}


@verb(app)
def evaluate(
    run: Run,
    model: Model,
    text: Text,
    base: Annotated[Path | None, Opt(help="the model to compare with; default: the teacher inside")] = None,
    batches: Annotated[int, Opt(help="batches of 8 windows")] = 8,
    context: Annotated[int, Opt(help="tokens a window")] = 128,
) -> dict:
    """Cross-entropy, KL to the base and top-1 agreement on a text."""
    from isotone.swiftkv import texts
    from isotone.swiftkv.data import Windows, pack
    from isotone.swiftkv.evaluate import fidelity, student_logits, teacher_logits

    if batches < 1 or context < 2:
        raise InputError(f"expected --batches of 1 and --context of 2 or more, got {batches} and {context}")
    swift = _load(model, run)
    if base is not None:
        other = _load(base, run)
        if other.config.vocab_size != swift.config.vocab_size:
            raise InputError(
                f"expected --base of the model's vocabulary, {swift.config.vocab_size} tokens, got "
                f"{other.config.vocab_size}"
            )
        theirs = student_logits(other)
    elif getattr(swift.config, "teacher_weights", False):
        theirs = teacher_logits(swift)
    else:
        raise InputError("expected --base FOLDER: this model has no teacher inside")
    held: list[Any]
    if text.suffix == ".jsonl":
        held = [row.to(swift.device) for row in pack(texts.examples_of(text, model, swift), context)[: 8 * batches]]
    else:
        windows = Windows(texts.tokens_of(text, model, swift), context, 8, 7)
        held = [windows(step).input_ids.to(swift.device) for step in range(batches)]
    found = fidelity(student_logits(swift), theirs, held)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "evaluation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return {key: round(value, 5) for key, value in found.items()}


@verb(app)
def generate(
    run: Run,
    model: Model,
    prompt: Annotated[str | None, Opt(help="the prompt's text")] = None,
    prompt_file: Annotated[Path | None, Opt(help="a file that holds the prompt")] = None,
    max_new_tokens: Annotated[int, Opt(help="tokens to generate")] = 64,
    temperature: Annotated[float, Opt(help="0 takes the likeliest token")] = 0.0,
    kv_dtype: Annotated[str, Opt(help="model, fp32, fp16, bf16, fp8, int8 or int4")] = "model",
    prefill_chunk: Annotated[int | None, Opt(help="prompt tokens at a time")] = None,
    decode_mode: Annotated[str, Opt(help="eager, compile or cudagraph")] = "eager",
    lookup: Annotated[int | None, Opt(help="draft so many tokens from the prompt and verify them at once")] = None,
) -> dict:
    """Go on with a prompt, whose tokens stop after layer l."""
    from isotone.shared.seeding import seed_everything
    from isotone.swiftkv import texts
    from isotone.swiftkv.tokens import encode

    if (prompt is None) == (prompt_file is None):
        raise InputError("expected one of --prompt and --prompt-file")
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise InputError(f"expected at least 1 token and a finite temperature, got {max_new_tokens} and {temperature}")
    said = prompt if prompt is not None else texts.read(prompt_file)  # type: ignore[arg-type]
    swift = _load(model, run)
    if not hasattr(swift, "teacher"):
        raise InputError(f"expected a swift model in {str(model)!r}, got a {swift.config.model_type}; convert it first")
    ids = encode(said, model, swift.config.vocab_size)
    if not len(ids):
        raise InputError("expected at least one token in the prompt, got none")
    seed_everything(_one_seed(run))
    options: dict[str, Any] = {"do_sample": temperature > 0, "prompt_lookup_num_tokens": lookup}
    if temperature > 0:
        options["temperature"] = temperature
    out = swift.generate(
        ids[None].to(swift.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=swift.device),
        max_new_tokens=max_new_tokens,
        kv_dtype=kv_dtype,
        prefill_chunk=prefill_chunk,
        decode_mode=decode_mode,
        pad_token_id=swift.generation_config.pad_token_id or 0,
        **{key: value for key, value in options.items() if value is not None},
    )[0, len(ids) :]
    found = {"prompt tokens": len(ids), "new tokens": len(out), "text": _decode(out, model)}
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "generation.json").write_text(json.dumps({**found, "ids": out.tolist()}, indent=1), encoding="utf-8")
    return found


@verb(app)
def benchmark(
    run: Run,
    model: Model,
    lengths: Annotated[str, Opt(help="prompt lengths")] = "256,512,1024",
    num_key_value_layers: Annotated[
        int | None, Opt(help="l, of a model that is not converted yet; default L/2")
    ] = None,
    kv_dtype: Annotated[
        str, Opt(help="of the swift model's cache: model, fp32, fp16, bf16, fp8, int8 or int4")
    ] = "model",
) -> dict:
    """TTFT, TPOT and cache of a model with and without skipping, against the prompt's length; a plot in OUT."""
    from isotone.swiftkv.convert import convert as make
    from isotone.swiftkv.profiling import benchmark as measure

    try:
        points = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        points = ()
    if not points or min(points) < 1:
        raise InputError(f"expected --lengths as numbers such as 256,512, got {lengths!r}")
    swift = _load(model, run)
    if not hasattr(swift, "teacher"):
        half = max(1, swift.config.num_hidden_layers // 2)
        swift = make(swift, half if num_key_value_layers is None else num_key_value_layers, 1)
    elif num_key_value_layers is not None:
        raise InputError(
            f"expected no --num-key-value-layers of a swift model, which has its own "
            f"{swift.config.num_key_value_layers}, got {num_key_value_layers}"
        )
    found = measure(swift, points, kv_dtype=kv_dtype)
    run.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([dataclasses.asdict(point) for point in found], indent=1)
    (run.out / "benchmark.json").write_text(text, encoding="utf-8")
    drawing, axes = figure("Time to the first token", "prompt, tokens", "seconds")
    axes.plot(points, [point.base_ttft for point in found], "o-", label="base")
    axes.plot(points, [point.ttft for point in found], "o-", label="swift")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    drawing.savefig(run.out / "prefill.png", dpi=120)
    return {
        f"n = {point.n}": f"TTFT {point.ttft:.4f} s, {point.ttft_ratio:.2f} x (bound {point.bound:.2f}); "
        f"TPOT {1000 * point.tpot:.2f} ms, {point.tpot_ratio:.2f} x; "
        f"cache {point.cache_bytes:,} bytes of {point.base_cache_bytes:,}"
        for point in found
    }


@verb(app)
def flops(
    run: Run,
    model: Annotated[Path, Arg(help="a Hugging Face model folder, or its config.json alone")],
    n: Annotated[int, Opt(help="prompt tokens")] = 8192,
    num_key_value_layers: Annotated[int | None, Opt(help="l; default: the model's own, or L/2")] = None,
    key_value_group_size: Annotated[int | None, Opt(help="g; default: the model's own, or 1")] = None,
    kv_dtype: Annotated[str, Opt(help="fp32, fp16, bf16, fp8, int8 or int4")] = "bf16",
) -> dict:
    """FLOPs of a prefill and bytes of the cache, with and without SwiftKV, from the config alone."""
    from isotone.swiftkv import accounting
    from isotone.swiftkv.config import check_family
    from isotone.swiftkv.loading import config_of

    if model.is_file() and model.name != "config.json":
        raise InputError(f"expected a model folder or its config.json, got {str(model)!r}")
    config = config_of(model.parent if model.is_file() else model)
    check_family(config)
    kept, group = num_key_value_layers, key_value_group_size
    if kept is None:
        kept = getattr(config, "num_key_value_layers", None) or max(1, config.num_hidden_layers // 2)
    if group is None:
        group = getattr(config, "key_value_group_size", None) or 1
    whole, part = accounting.flops(config, n), accounting.flops(config, n, kept, group)
    before = accounting.kv_bytes(config, n, kv_dtype=kv_dtype)
    after = accounting.kv_bytes(config, n, kept, group, kv_dtype=kv_dtype)
    found = {
        "l, g": f"{kept} of {config.num_hidden_layers}, {group}",
        "prefill FLOPs": f"{whole.total:.4g} -> {part.total:.4g}",
        "speed-up bound": round(whole.total / part.total, 3),
        "KV bytes": f"{before:,} -> {after:,}",
        "KV bytes kept": f"{100 * after / before:g} %",
    }
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "flops.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


@verb(app)
def export(
    run: Run,
    model: Model,
    format: Annotated[str, Opt(help="arctic (ArcticInference), swift or dual (Hugging Face)")] = "arctic",
) -> dict:
    """Write a swift model for another program: OUT/model."""
    from isotone.swiftkv.export import export_arctic

    if format not in ("arctic", "swift", "dual"):
        raise InputError(f"expected --format to be arctic, swift or dual, got {format!r}")
    target = _target(model, run)
    swift = _load(model, run)
    if not hasattr(swift, "teacher"):
        raise InputError(f"expected a swift model in {str(model)!r}, got a {swift.config.model_type}; convert it first")
    if format == "dual" and not swift.config.teacher_weights:
        raise InputError(f"expected a model with its teacher's weights for --format dual, {str(model)!r} has none")
    if format == "arctic":
        export_arctic(swift, target)
        _copy_tokenizer(model, target)
    else:
        _save(swift, model, target, format)
    return {"model": str(target), "format": format}


@verb(app)
def suggest(
    run: Run,
    model: Model,
    text: Annotated[Path, Opt(help="a text file")],
    batches: Annotated[int, Opt(help="batches of 4 windows")] = 10,
    context: Annotated[int, Opt(help="tokens a window")] = 128,
) -> dict:
    """Which l to take: similarity of the layers' inputs, and the KL of conversion without training at every l."""
    from isotone.swiftkv import texts
    from isotone.swiftkv.choose import suggest_l
    from isotone.swiftkv.data import Windows

    if batches < 1 or context < 2:
        raise InputError(f"expected --batches of 1 and --context of 2 or more, got {batches} and {context}")
    if text.suffix == ".jsonl":
        raise InputError(f"expected a text file for suggest, got {text.name!r}: lines are for distill and evaluate")
    base = _load(model, run)
    windows = Windows(texts.tokens_of(text, model, base), context, 4, 7)
    found = suggest_l(base, [windows(step).input_ids.to(base.device) for step in range(batches)])
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "suggestion.json").write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
    drawing, axes = figure(
        "Conversion without training", "l, layers that keep their keys and values", "KL, nats a token"
    )
    axes.plot(range(1, len(found.kl) + 1), found.kl, "o-")
    axes.axvline(found.num_key_value_layers, color="#D55E00", linestyle=":", label="suggested")
    axes.legend(frameon=False)
    drawing.savefig(run.out / "suggestion.png", dpi=120)
    return {"num_key_value_layers": found.num_key_value_layers, "knee": found.knee, "layers": len(found.kl) + 1}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    text: Annotated[Path | None, Opt(help="a text file; default: tiny Shakespeare, or Python's library source")] = None,
    model: Annotated[Path | None, Opt(help="a model folder to convert; default: a Llama is trained")] = None,
) -> Report:
    """Measure the paper's claims again, on a Llama trained here or a given model."""
    from isotone.swiftkv.reproduce import reproduce as measure

    return measure(scale, run, text, model)


@verb(app)
def bench(run: Run, size: Annotated[str, Opt(help="auto, cpu, gpu or tiny")] = "auto") -> Report:
    """Prefill, decoding, memory and a distillation step beside transformers and the engine without skipping."""
    from isotone.swiftkv.bench import bench as measure

    return measure(run, size)


def _load(folder: Path, run: Run) -> Any:
    from transformers.utils import logging

    from isotone.swiftkv.loading import load

    # its own bars and remarks would stand between ours
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load(folder, dtype="auto").to(device.resolve(run.device))


def _check_export(export: str) -> None:
    """Before any work is done."""
    if export not in ("swift", "dual"):
        raise InputError(f"expected --export to be swift or dual, got {export!r}")


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


def _save(model: Any, source: Path, target: Path, export: str) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target, export=export)
    _copy_tokenizer(source, target)
    return target


_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not source.is_dir():
        from isotone.swiftkv.tokens import tokenizer_of

        tokenizer_of(source).save_pretrained(target)
    for pattern in _TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, target / path.name)


def _facts(model: Any) -> dict[str, Any]:
    split = model.split
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "family": model.config.model_type,
        "l, g": f"{split.num_key_value_layers} of {split.num_hidden_layers}, {split.key_value_group_size}",
        "cache slots": f"{split.slots} of {split.num_hidden_layers}",
        "new parameters": f"{trained:,}",
    }


def _ends(scores: list[dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    return [("before", scores[0]), ("after", scores[-1])] if scores else []


def _decode(ids: torch.Tensor, folder: Path) -> str:
    from isotone.swiftkv.tokens import tokenizer_of

    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        return str(tokenizer.decode(ids))
    return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")


def _scores(model: Any, held_out: list[Any], train: str) -> Any:
    """What the trained model is scored with: against the teacher inside, or where that is trained, as it is now."""
    from isotone.swiftkv.convert import teacher_of
    from isotone.swiftkv.evaluate import fidelity, student_logits, teacher_logits

    theirs = teacher_logits(model) if train == "qkv" else student_logits(teacher_of(model))
    return lambda trained: fidelity(student_logits(trained), theirs, held_out)


def main() -> NoReturn:
    """Entry point of `isotone-swiftkv`."""
    run_main(app, "swiftkv")
