"""`isotone distzo2 ...`: train, evaluate, replay, plan, reproduce, bench. `torchrun` gives train its ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError, check_count

app = paper_app("distzo2", framework="torch")
Opt, Arg = typer.Option, typer.Argument
_JUDGED = 64  # batches that are held out, at most, while a model trains
Model = Annotated[Path, Arg(help="a Hugging Face model folder")]
Text = Annotated[Path, Opt(help="a text file, or .jsonl lines of prompt and completion, or of text and label")]
Batch = Annotated[int, Opt(help="rows a batch, over all ranks")]
Words = Annotated[
    str, Opt(help="a causal model's words for classes 0, 1, ..., with commas, for lines of text and label")
]
Lora = Annotated[int, Opt(help="rank of LoRA factors that are trained alone; 0 trains the model")]
Offload = Annotated[str, Opt(help="where blocks rest: none, cpu or disk (in OUT/blocks)")]
Context = Annotated[int, Opt(help="tokens a row at most")]


@verb(app)
def train(
    run: Run,
    model: Model,
    text: Text,
    steps: Annotated[int, Opt(help="steps")] = 1000,
    batch: Batch = 16,
    context: Context = 128,
    lr: Annotated[float, Opt(help="learning rate")] = 1e-6,
    eps: Annotated[float, Opt(help="scale of the perturbation")] = 1e-3,
    weight_decay: Annotated[float, Opt(help="not on biases and norms")] = 0.0,
    directions: Annotated[int, Opt(help="directions a step")] = 1,
    estimator: Annotated[str, Opt(help="two_sided or one_sided")] = "two_sided",
    schedule: Annotated[str, Opt(help="constant or linear")] = "constant",
    offload: Offload = "none",
    offload_dtype: Annotated[str, Opt(help="of blocks at rest: model, fp16, bf16 or fp32")] = "model",
    stochastic_rounding: Annotated[bool, Opt(help="of updates that are stored in half precision")] = False,
    parallel: Annotated[str, Opt(help="over torchrun's ranks: none, pertp, ddp or 2d")] = "none",
    check_every: Annotated[int, Opt(help="steps between comparisons of the ranks' weights; 0 for none")] = 0,
    direction_ranks: Annotated[int, Opt(help="ranks that share the directions of a step")] = 1,
    lora: Lora = 0,
    label_words: Words = "",
    checkpoint_every: Annotated[int, Opt(help="steps between checkpoints")] = 500,
) -> dict | None:
    """Fine-tune a model with two forward passes a step, on into OUT/model; resumes where it was killed."""
    from isotone.distzo2.config import ZOConfig
    from isotone.distzo2.engine import ZOEngine
    from isotone.distzo2.loading import load_model
    from isotone.distzo2.texts import corpus_of
    from isotone.distzo2.training import Schedule
    from isotone.distzo2.training import train as train_engine

    check_count("--batch", batch)
    check_count("--context", context, 2)
    check_count("--steps", steps)
    check_count("--checkpoint-every", checkpoint_every)
    config = ZOConfig(
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        n_directions=directions,
        estimator=estimator,
        offload=offload,
        disk_folder=run.out / "blocks",
        offload_dtype=_dtype(offload_dtype),
        stochastic_rounding=stochastic_rounding,
        parallel=parallel,
        check_every=check_every,
        seed=_one_seed(run),
    )
    target = _target(model, run)
    with _ranks(parallel, device.resolve(run.device)) as where:
        made = load_model(model)
        corpus = corpus_of(text, model, made, batch, context, config.seed, _words(label_words))
        made = _lora(made, lora, config.seed, model) if lora else made
        made = made if offload != "none" else made.to(where)
        mesh = _mesh(parallel, direction_ranks, where)
        engine = ZOEngine(made, config, mesh, objective=corpus.objective, device=where)
        first = engine.ranks.rank == 0

        def held_out(engine: ZOEngine) -> float:
            return corpus.judge(engine.model, engine.run, where, _JUDGED)["loss"]

        with progress.bar("train", steps, run.silent or not first) as bar:
            history = train_engine(
                engine,
                corpus.train,
                steps,
                schedule=Schedule(lr, steps, schedule),
                folder=run.out / "checkpoints",
                checkpoint_every=checkpoint_every,
                resume=run.resume,
                data_id=corpus.data_id,
                evaluate=held_out,
                evaluate_every=max(1, steps // 5),
                on_step=lambda step: bar.advance(1, loss=round(step.loss, 4)),
            )
        state = engine.state_dict(rank0_only=True)
        if not first:
            return None  # one rank speaks
        _write_run(run, made, state, model, target, engine, history)
        last = max(history.scores) if history.scores else None
        found = {"steps": engine.steps, "loss": history.losses[-1], "seconds": round(history.seconds, 1)}
        found |= {"held-out loss": history.scores[last]} if last is not None else {}
        return {"model": str(target), **found, "skipped": engine.skipped, "scalar bytes": engine.scalar_bytes}


@verb(app)
def evaluate(
    run: Run,
    model: Model,
    text: Text,
    batch: Batch = 16,
    context: Context = 128,
    offload: Offload = "none",
    label_words: Words = "",
) -> dict:
    """Mean loss of a model on the last tenth of a file, which train holds out, and accuracy where it has classes."""
    import torch

    from isotone.distzo2.config import ZOConfig
    from isotone.distzo2.engine import ZOEngine
    from isotone.distzo2.loading import load_model
    from isotone.distzo2.texts import corpus_of

    check_count("--batch", batch)
    check_count("--context", context, 2)
    where = device.resolve(run.device)
    config = ZOConfig(offload=offload, disk_folder=run.out / "blocks")
    made = load_model(model)
    corpus = corpus_of(text, model, made, batch, context, _one_seed(run), _words(label_words))
    if offload == "none":
        made.to(where)
        with torch.no_grad():
            found = corpus.judge(made, lambda function: function(), where)
    else:
        found = corpus.judge(made, ZOEngine(made, config, device=where).run, where)
    _write(run.out / "evaluation.json", found)
    return found


@verb(app)
def replay(
    run: Run,
    model: Model,
    trajectory: Annotated[Path, Opt(help="a trajectory.safetensors that train wrote")],
    lora: Lora = 0,
) -> dict:
    """Bring a base model to where a trajectory ends, bit for bit, and write it to OUT/model; --lora and --seeds as in
    train."""
    from isotone.distzo2.loading import load_model, save_model
    from isotone.distzo2.trajectory import load_trajectory
    from isotone.distzo2.trajectory import replay as bring

    target = _target(model, run)
    steps = load_trajectory(trajectory)
    made = load_model(model)
    made = _lora(made, lora, _one_seed(run), model) if lora else made
    with progress.bar("replay", None, run.silent) as bar:

        def shown(done: int, total: int) -> None:
            bar.resize(total)
            bar.advance(1)

        bring(made, steps, shown)
    save_model(made, made.state_dict(), model, target)
    return {"model": str(target), "steps": len(steps), "bytes": trajectory.stat().st_size}


@verb(app)
def plan(
    run: Run,
    model: Annotated[Path, Arg(help="a model folder, or its config.json alone")],
    tokens: Annotated[int, Opt(help="tokens a step and rank")] = 2048,
    link: Annotated[float, Opt(help="GB/s each way between host and device")] = 50.0,
    exchange: Annotated[float, Opt(help="GB/s between devices")] = 300.0,
    tflops: Annotated[float, Opt(help="the device's speed on matrix products")] = 600.0,
    offload_bytes: Annotated[int, Opt(help="a parameter at rest")] = 2,
    working_bytes: Annotated[int, Opt(help="a parameter in the forward passes")] = 2,
    pertp: Annotated[int, Opt(help="1, or 2: a sign to a rank")] = 1,
    slices: Annotated[int, Opt(help="ranks that share the moving of a block")] = 1,
    directions: Annotated[int, Opt(help="directions a step")] = 1,
) -> dict:
    """Memory, bytes and seconds of a step, from the config alone."""
    from isotone.distzo2 import plan as planning
    from isotone.distzo2.loading import meta_model

    hardware = planning.Hardware(link * 1e9, exchange * 1e9, tflops * 1e12)
    shape = planning.shape_of(meta_model(model))
    options = {"offload_bytes": offload_bytes, "working_bytes": working_bytes, "pertp": pertp}
    found = planning.predict(shape, hardware, tokens=tokens, slices=slices, directions=directions, **options)
    _write(run.out / "plan.json", {**asdict(shape), **asdict(found)})
    return {
        "parameters": f"{shape.parameters:,} in {shape.blocks} blocks of {shape.block_parameters:,} and the rest",
        "device memory": f"{found.device_bytes / 2**30:.3f} GiB and activations",
        "host memory a rank": f"{found.host_bytes / 2**30:.3f} GiB ({found.pinned_bytes / 2**30:.3f} pinned, "
        f"{found.start_bytes / 2**30:.3f} at the start)",
        "bytes a step": f"{found.upload_bytes:,} up, as many down, {found.exchange_bytes:,} between devices",
        "gradient": f"{found.scalar_bytes} bytes (first-order data parallelism: {found.gradient_bytes:,})",
        "step": f"{1000 * found.seconds:.4g} ms (in turn: {1000 * found.serial_seconds:.4g} ms)",
        "bottleneck": f"{found.bottleneck}; transfers are hidden from {found.tokens_to_hide:,.0f} tokens on",
    }


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    model: Annotated[Path | None, Opt(help="with --scale paper: a model's folder")] = None,
    text: Annotated[Path | None, Opt(help="with --scale paper: .jsonl lines of text and label")] = None,
    label_words: Words = "",
) -> Report:
    """Measure the paper's claims again: equivalences, learning, overlap, slicing, bytes."""
    from isotone.distzo2.reproduce import Given
    from isotone.distzo2.reproduce import reproduce as measure

    given = Given(model, text, _words(label_words)) if model is not None and text is not None else None
    return measure(scale, run, given)


@verb(app)
def bench(
    run: Run,
    size: Annotated[str, Opt(help="auto, cpu, gpu or tiny")] = "auto",
    zo2: Annotated[Path | None, Opt(help="a Python that has the authors' zo2: timed beside ours on a GPU")] = None,
) -> Report:
    """A step in memory and offloaded beside the reference's order of passes, LoRA with AdamW, and FSDP2's offload."""
    from isotone.distzo2.bench import bench as measure

    return measure(run, size, zo2)


@contextmanager
def _ranks(parallel: str, where: str) -> Iterator[str]:
    """torchrun's process group, for as long as the command runs; a rank that is gone ends it with one sentence."""
    from isotone.distzo2.distributed import RankLostError
    from isotone.distzo2.engine import RanksDifferError

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        if parallel != "none":
            raise InputError(f"expected ranks for --parallel {parallel}: launch it with torchrun")
        yield where
        return
    if parallel == "none":
        raise InputError(f"expected --parallel pertp, ddp or 2d for {world} ranks of torchrun, got none")
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    alone = where == "cuda" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if where == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo")
    try:
        yield where
    except (RankLostError, RanksDifferError) as error:
        print(f"isotone distzo2: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        dist.destroy_process_group()


def _write_run(run: Run, made: Any, state: Any, source: Path, target: Path, engine: Any, history: Any) -> None:
    from isotone.distzo2.loading import save_model
    from isotone.distzo2.plots import loss_plot
    from isotone.distzo2.trajectory import save_trajectory

    save_model(made, state, source, target)
    save_trajectory(engine.trajectory, run.out / "trajectory.safetensors")
    _write(run.out / "history.json", asdict(history))
    smooth = max(1, len(history.losses) // 100)
    _save_plot(loss_plot({"l+": history.losses}, "Training", smooth=smooth), run.out / "loss.png")


def _save_plot(drawing: Any, path: Path) -> None:
    import io

    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())


def _mesh(parallel: str, direction_ranks: int, where: str) -> Any:
    """The mesh with directions over ranks; None for what the config's word says."""
    from isotone.distzo2.distributed import init_mesh

    check_count("--direction-ranks", direction_ranks)
    if direction_ranks == 1:
        return None
    if parallel not in ("ddp", "2d"):
        raise InputError(f"expected --parallel ddp or 2d with --direction-ranks, got {parallel!r}")
    return init_mesh(2 if parallel == "2d" else 1, "rest", direction_ranks, where)


def _lora(model: Any, rank: int, seed: int, source: Path) -> Any:
    check_count("--lora", rank)
    try:
        import peft
    except ImportError:
        raise InputError("expected peft for --lora, found none: install isotone-distzo2[peft]") from None
    import torch

    torch.manual_seed(seed)  # of the factors' first values: a replay draws the same
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, task_type=_task(model))
    found = peft.get_peft_model(model, config).eval()
    found.peft_config["default"].base_model_name_or_path = str(source.resolve())
    return found


def _task(model: Any) -> str:
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"


def _dtype(name: str) -> Any:
    import torch

    known = {"model": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if name not in known:
        raise InputError(f"expected --offload-dtype to be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _words(given: str) -> tuple[str, ...]:
    return tuple(given.split(",")) if given else ()


def _one_seed(run: Run) -> int:
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed, got --seeds {','.join(map(str, seeds))}")
    return seeds[0]


def _target(source: Path, run: Run) -> Path:
    target = run.out / "model"
    if target.resolve() == source.resolve():
        raise InputError(f"expected another --out: {str(target)!r} is the model that is read, it would be overwritten")
    return target


def _write(path: Path, facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(facts, indent=1).encode())


def main() -> NoReturn:
    """Entry point of `isotone-distzo2`."""
    run_main(app, "distzo2")
