"""`isotone opgfn ...`: train, sample, evaluate, export, reproduce, bench, info."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import typer

from isotone.opgfn import bench as benchmark
from isotone.opgfn import metrics, plots, tasks
from isotone.opgfn import reproduce as reproduction
from isotone.opgfn.chem.objectives import Objectives
from isotone.opgfn.conditional import conditioner_of
from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import FragmentEnv
from isotone.opgfn.gflownet import GFlowNet
from isotone.opgfn.pareto import nd_rank, non_dominated_mask
from isotone.opgfn.replay import ReplayConfig
from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import Report, figure
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError

app = paper_app("opgfn", framework="torch")
Opt = typer.Option
FORMATS = ("csv", "jsonl", "smi", "sdf")


@verb(app)
def train(
    run: Run,
    env: Annotated[str, Opt(help="hypergrid, moo-grid, bag, binding, ngrams, dna, nas or fragments")] = "moo-grid",
    objectives: Annotated[list[str] | None, Opt(help="an objective by name; give it several times for several")] = None,
    score: Annotated[
        str | None, Opt(help="FILE.py:FUNCTION of yours, from a list of objects to numbers (it is run: trust it)")
    ] = None,
    loss: Annotated[
        str, Opt(help="op-tb, op-db, op-fm, op-subtb, op-fl-db, tb, pc-tb, gc-tb, reinforce, ...")
    ] = "op-tb",
    label: Annotated[str | None, Opt(help="pairwise, all-pairs, pareto, buffer, rank, bce or pair-balanced")] = None,
    steps: Annotated[int, Opt(help="steps")] = 300,
    batch: Annotated[int | None, Opt(help="trajectories a step")] = None,
    lr: Annotated[float | None, Opt(help="learning rate")] = None,
    beta: Annotated[float, Opt(help="exponent of the baselines' reward")] = 1.0,
    replay: Annotated[str | None, Opt(help="off, uniform or prioritized")] = None,
    side: Annotated[int, Opt(help="cells along an axis of a grid")] = 32,
    dim: Annotated[int, Opt(help="axes of the hypergrid")] = 2,
    length: Annotated[int | None, Opt(help="the longest string")] = None,
    max_fragments: Annotated[int, Opt(help="fragments of a molecule")] = 9,
    vocabulary: Annotated[str, Opt(help="full, linear, or a file of lines SMILES 0,2,3")] = "full",
    channels: Annotated[int, Opt(help="width of the graph policy")] = 64,
    layers: Annotated[int, Opt(help="depth of the graph policy")] = 2,
    workers: Annotated[int, Opt(help="processes for the objectives of molecules")] = 0,
    seh_weights: Annotated[Path | None, Opt(help="the sEH proxy's safetensors file")] = None,
    candidates: Annotated[int, Opt(help="objects drawn at the end")] = 500,
    checkpoint_every: Annotated[int, Opt(help="steps between checkpoints")] = 100,
) -> dict:
    """Train a sampler on objectives of yours or ours; resumes where it was killed."""
    for name, value, least in (("steps", steps, 1), ("candidates", candidates, 1), ("workers", workers, 0)):
        if value < least:
            raise InputError(f"expected --{name} to be at least {least}, got {value}")
    if checkpoint_every < 1:
        raise InputError(f"expected --checkpoint-every to be at least 1, got {checkpoint_every}")
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed for one training, got --seeds {','.join(map(str, seeds))}")
    scorer = load_function(score) if score else None
    if scorer is not None and objectives:
        raise InputError(f"expected --score or --objectives, got both: {score!r} says what is maximised")
    spec = tasks.TaskSpec(
        env, tuple(objectives or ()), side=side, dim=dim, length=length, max_fragments=max_fragments,
        vocabulary=vocabulary, channels=channels, layers=layers,
    )  # fmt: skip
    task = tasks.make_task(spec, workers=workers, seh_weights=seh_weights)
    changes: dict[str, Any] = {"objective": loss, "label": label, "beta": beta, "seed": seeds[0]}
    changes |= {name: value for name, value in (("batch_size", batch), ("lr", lr)) if value is not None}
    where = device.resolve(run.device)
    with _scoring(task):
        config = dataclasses.replace(task.config, **changes)
        replay_config = task.replay if replay is None else ReplayConfig(replay)
        gfn = build(task, config, replay_config, where)
        with progress.bar(f"{env} {loss}", steps, run.silent) as bar, warnings.catch_warnings():
            if run.silent:
                warnings.simplefilter("ignore")
            gfn.fit(
                scorer or task.objective,
                steps,
                callbacks=[lambda _, step, value: bar.advance(1, loss=round(value, 3))],
                folder=run.out / "checkpoints",
                checkpoint_every=checkpoint_every,
                resume=run.resume,
            )
        gfn.save(run.out / "model", {"task": dataclasses.asdict(spec), "score": score})
        found = gfn.candidates(candidates)
        assert gfn.memo is not None
        u, valid = gfn.memo(found.states)
    keep = valid.cpu().numpy()
    values = u.cpu().numpy()[keep]
    names = column_names(scorer, task, u.shape[1])
    texts = [text for text, ok in zip(labels(found.objects), keep, strict=True) if ok]
    rows = table(texts, values, names, found.log_reward.cpu().numpy()[keep])
    write_table(run.out / "candidates.csv", rows)
    atomic_write(run.out / "history.json", json.dumps(gfn.history).encode())
    draw_training(run.out, gfn, spec if scorer is None else None, texts, values, names)
    result = {
        "steps": gfn.step,
        "objects evaluated": gfn.memo.evaluations,
        "objects drawn": len(values),
        "not dominated": int(non_dominated_mask(torch.from_numpy(values)).sum()) if len(values) else 0,
        "model": str(run.out / "model"),
        "candidates": str(run.out / "candidates.csv"),
    }
    if len(values) and 1 < u.shape[1] <= 4:
        low = np.minimum(0.0, values.min(0))
        said = "hypervolume" if not low.any() else f"hypervolume above {', '.join(f'{value:.4g}' for value in low)}"
        result[said] = round(metrics.hypervolume(values, low), 4)
    return result


@verb(app)
def sample(
    run: Run,
    model: Annotated[Path, typer.Argument(help="the folder `model` of a training")],
    n: Annotated[int, Opt("--n", help="objects to draw")] = 1000,
    temperature: Annotated[float, Opt(help="of the logits: below 1, closer to the best")] = 1.0,
    unique: Annotated[bool, Opt("--unique/--all", help="each object once")] = False,
    diverse: Annotated[
        float | None, Opt(help="of molecules, leave out those more alike than this (Tanimoto) to a better one")
    ] = None,
    to: Annotated[Path | None, Opt(help="a .smi, .csv, .jsonl or .sdf file; default: samples.csv in --out")] = None,
) -> dict:
    """Draw objects from a trained sampler."""
    if n < 1 or not temperature > 0:
        raise InputError(f"expected --n of at least 1 and a --temperature above 0, got {n} and {temperature}")
    if to is not None and to.exists() and run.resume:
        raise InputError(f"expected --to a new file, {str(to)!r} is there: give --fresh to write over it")
    gfn, spec = load_model(model, device.resolve(run.device))
    if to is not None and to.suffix in (".smi", ".sdf") and spec.env != "fragments":
        raise InputError(f"expected --to a .csv or .jsonl file for {spec.env}, which are no molecules, got {str(to)!r}")
    drawn = gfn.sample(n, temperature=temperature, seed=(run.seeds or (0,))[0])
    texts, rewards = labels(drawn.objects), drawn.log_reward.cpu().numpy()
    keep = [i for i, text in enumerate(texts) if text]
    if unique:
        keep = list({texts[i]: i for i in reversed(keep)}.values())[::-1]
    if diverse is not None:
        if spec.env != "fragments":
            raise InputError(f"expected --diverse for molecules, got {spec.env}")
        try:
            best = metrics.diverse_top_k([texts[i] for i in keep], rewards[keep], len(keep) or 1, threshold=diverse)
        except ValueError as error:
            raise InputError(str(error)) from None
        keep = [keep[i] for i in best]
    rows = [{"object": texts[i], "log_reward": f"{rewards[i]:.6g}"} for i in keep]
    path = to or run.out / "samples.csv"
    write_table(path, rows)
    return {"drawn": n, "valid": sum(map(bool, texts)), "written": len(rows), "file": str(path)}


@verb(app)
def evaluate(
    run: Run,
    file: Annotated[Path, typer.Argument(help="a .smi file, or a .csv with a column smiles or object")],
    objectives: Annotated[list[str] | None, Opt(help="qed, sa, np, mw, logp or seh; several times for several")] = None,
    workers: Annotated[int, Opt(help="processes")] = 0,
    seh_weights: Annotated[Path | None, Opt(help="the sEH proxy's safetensors file")] = None,
) -> dict:
    """Score a file of molecules: front, hypervolume, IGD+, R2, diversity."""
    names = tuple(objectives or ("qed", "sa"))
    tasks.check_molecule_objectives(names)
    smiles = read_smiles(file)
    with Objectives(names, workers=workers, seh_weights=seh_weights) as scorer:
        u = scorer(smiles)
    front = non_dominated_mask(torch.from_numpy(u)).numpy()
    write_table(run.out / "evaluated.csv", table(smiles, u, names))
    best = list(dict.fromkeys(text for text, on in zip(smiles, front, strict=True) if on))
    faces = metrics.extreme_faces(len(names))
    result = {
        "molecules": len(smiles),
        "distinct": len(set(smiles)),
        "not dominated": len(best),
        "IGD+ to the extreme faces": round(metrics.igd_plus(u, faces), 4),
        "R2": round(metrics.r2(u), 4),
        "PC-ent": round(metrics.pc_entropy(u, faces), 4),
        "diversity of the front": round(metrics.tanimoto_diversity(best), 4),
    }
    distinct = list(dict.fromkeys(smiles))
    scores = {text: value for text, value in zip(smiles, u.mean(1), strict=True)}
    chosen = metrics.diverse_top_k(distinct, np.array([scores[text] for text in distinct]), 100)
    result["diverse top-100 (Tanimoto at most 0.7): mean of the objectives' mean"] = round(
        metrics.top_k_mean(np.array([scores[distinct[i]] for i in chosen])), 4
    )
    if len(names) <= 4:
        result["hypervolume"] = round(metrics.hypervolume(u), 4)
    for name, column in zip(names, u.T, strict=True):
        result[f"top-100 mean {name}"] = round(metrics.top_k_mean(column), 4)
    return result


@verb(app)
def export(
    run: Run,
    model: Annotated[Path, typer.Argument(help="the folder `model` of a training")],
    n: Annotated[int, Opt("--n", help="objects to draw")] = 1000,
    formats: Annotated[str, Opt(help="csv, jsonl, smi and sdf, with commas between")] = "csv,jsonl",
    score: Annotated[str | None, Opt(help="FILE.py:FUNCTION, for a model that was trained on one")] = None,
    workers: Annotated[int, Opt(help="processes for the objectives of molecules")] = 0,
    seh_weights: Annotated[Path | None, Opt(help="the sEH proxy's safetensors file")] = None,
) -> dict:
    """Write the distinct objects of a trained sampler, best first, for other tools."""
    chosen = [part.strip() for part in formats.split(",")]
    for part in chosen:
        if part not in FORMATS:
            raise InputError(f"expected --formats of {', '.join(FORMATS)}, got {part!r}")
    if n < 1:
        raise InputError(f"expected --n of at least 1, got {n}")
    gfn, spec = load_model(model, device.resolve(run.device))
    trained_on = json.loads((model / "config.json").read_text(encoding="utf-8"))["meta"].get("score")
    if trained_on and not score:
        raise InputError(f"expected --score FILE.py:FUNCTION: this model was trained on {trained_on!r}")
    if set(chosen) & {"smi", "sdf"} and spec.env != "fragments":
        raise InputError(f"expected --formats of csv and jsonl for {spec.env}, which are no molecules, got {formats!r}")
    task = tasks.make_task(spec, workers=workers, seh_weights=seh_weights)
    scorer = load_function(score) if score else None
    with _scoring(task):
        gfn.observe(gfn.sample(2, seed=0).states, scorer or task.objective)
        found = gfn.candidates(n, seed=(run.seeds or (0,))[0])
        assert gfn.memo is not None
        u, valid = gfn.memo(found.states)
    keep = valid.cpu().numpy()
    texts = [text for text, ok in zip(labels(found.objects), keep, strict=True) if ok]
    names = column_names(scorer, task, u.shape[1])
    rows = table(texts, u.cpu().numpy()[keep], names, found.log_reward.cpu().numpy()[keep])
    written = []
    for part in chosen:
        path = run.out / f"candidates.{part}"
        write_table(path, rows)
        written.append(str(path))
    return {"objects": len(rows), "not dominated": sum(row["rank"] == 0 for row in rows), "files": ", ".join(written)}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    tables: Annotated[
        list[str] | None, Opt("--table", help="moo-grid, hypergrid, nas, strings or fragments; all if not given")
    ] = None,
) -> Report:
    """Measure the paper's claims again, against baselines tuned with the same budget."""
    return reproduction.reproduce(scale, run, tuple(tables or ()))


@verb(app)
def bench(run: Run, small: Annotated[bool, Opt("--small", help="tiny sizes: does it run?")] = False) -> Report:
    """Steps and trajectories a second, and metrics, beside torchgfn, a per-state reference and pymoo."""
    return benchmark.bench(run, small)


# --- what the verbs share -------------------------------------------------------------------------------------


@contextmanager
def _scoring(task: tasks.Task) -> Iterator[None]:
    """What a user's settings or function can not mean is their mistake; afterwards the workers are gone."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from None
    finally:
        if isinstance(task.objective, Objectives):
            task.objective.close()


def build(task: tasks.Task, config: TrainConfig, replay: ReplayConfig, where: str) -> GFlowNet:
    """The GFlowNet of a task, its policy drawn from the seed."""
    count = len(task.names)
    probe = condition_width(config, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy = task.policy(config, probe)
    return GFlowNet(task.env, policy, config=config, replay=replay, objectives=count, device=where)


def condition_width(config: TrainConfig, objectives: int) -> int:
    """Numbers in the condition of the conditional baselines' networks; 0 for the others."""
    found = conditioner_of(config.kind, objectives, config.beta, config.beta_low)
    return found.dim if found else 0


def column_names(scorer: Callable | None, task: tasks.Task, objectives: int) -> tuple[str, ...]:
    """The objectives' names: a function's own `names` where it has as many, the task's, or their numbers."""
    names = task.names if scorer is None else tuple(map(str, getattr(scorer, "names", ())))
    return names if len(names) == objectives else tuple(f"objective {k}" for k in range(objectives))


def load_model(folder: Path, where: str) -> tuple[GFlowNet, tasks.TaskSpec]:
    """The model of a training and what it was trained on."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"expected the folder of a trained model, with config.json, at {str(folder)!r}, found none")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        config = TrainConfig(**document["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"expected a model saved by `isotone opgfn train` in {str(folder)!r}, got {error}") from None
    spec = tasks.spec_from(document, str(folder))
    # sampling asks for no objective; those of molecules may need weights that are not here
    shell = (
        dataclasses.replace(spec, objectives=("qed", "sa")[: len(spec.objectives)])
        if "seh" in spec.objectives
        else spec
    )
    task = tasks.make_task(shell)
    count = len(spec.objectives) or len(task.names)
    probe = condition_width(config, count)
    gfn = GFlowNet.load(folder, task.env, task.policy(config, probe), device=where, objectives=count)
    return gfn, spec


def load_function(name: str) -> Callable[[Any], Any]:
    """The user's function FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise InputError(f"expected --score FILE.py:FUNCTION with a file that is there, got {name!r}")
    spec = importlib.util.spec_from_file_location(f"score_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"expected --score of a Python file, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"expected --score of a file that runs, {str(path)!r} raised {_said(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"expected a function {function!r} in {str(path)!r}, found none")

    @functools.wraps(found)
    def called(objects: Any) -> Any:
        try:
            return found(objects)
        except Exception as error:
            raise InputError(f"expected {name!r} to score {len(objects)} objects, it raised {_said(error)}") from None

    return called


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def labels(objects: Any) -> list[str]:
    """Objects as text: strings as they are, rows of numbers with spaces."""
    if isinstance(objects, torch.Tensor):
        return [" ".join(map(str, row)) for row in objects.tolist()]
    return [text or "" for text in objects]


def table(
    texts: list[str], u: np.ndarray, names: tuple[str, ...], log_reward: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Rows of object, non-domination rank, objectives and learned log-reward; best first."""
    if not len(u):
        return []
    rank = nd_rank(torch.from_numpy(np.asarray(u, dtype=np.float64))).tolist()
    order = sorted(range(len(u)), key=lambda i: (rank[i], -log_reward[i] if log_reward is not None else i))
    rows = []
    for i in order:
        row: dict[str, Any] = {"object": texts[i], "rank": rank[i]}
        row |= {name: round(float(value), 6) for name, value in zip(names, u[i], strict=True)}
        if log_reward is not None:
            row["log_reward"] = round(float(log_reward[i]), 6)
        rows.append(row)
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV, JSON lines, SMILES with a name, or an SD file, by the suffix."""
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"expected a file that ends in {', '.join('.' + name for name in FORMATS)}, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, list(rows[0]) if rows else ["object"])
        writer.writeheader()
        writer.writerows(rows)
        text = lines.getvalue()
    elif kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "smi":
        text = "".join(f"{row['object']}\t{number}\n" for number, row in enumerate(rows, 1))
    else:
        from rdkit import Chem

        parts = []
        for row in rows:
            molecule = Chem.MolFromSmiles(str(row["object"]))
            if molecule is None:
                raise InputError(f"expected molecules for an SD file, got {row['object']!r}")
            fields = "".join(f"> <{key}>\n{value}\n\n" for key, value in row.items())
            parts.append(Chem.MolToMolBlock(molecule) + fields + "$$$$\n")
        text = "".join(parts)
    atomic_write(path, text.encode())


def read_smiles(path: Path) -> list[str]:
    """The molecules of a .smi or .csv file."""
    if not path.is_file():
        raise InputError(f"expected a file of SMILES at {str(path)!r}, found none")
    if path.suffix == ".csv":
        reader = csv.DictReader(tasks.read_text(path).splitlines())
        column = next((name for name in ("smiles", "SMILES", "object") if name in (reader.fieldnames or ())), None)
        if column is None:
            raise InputError(f"expected a column smiles or object in {str(path)!r}, got {reader.fieldnames}")
        found = [row[column] for row in reader if row[column]]
    else:
        found = [line.split()[0] for line in tasks.read_text(path).splitlines() if line.split()]
    if not found:
        raise InputError(f"expected SMILES in {str(path)!r}, found none")
    return found


def draw_training(
    out: Path, gfn: GFlowNet, spec: tasks.TaskSpec | None, texts: list[str], u: np.ndarray, names: tuple[str, ...]
) -> None:
    """loss.png, and where they mean something front.png, mass.png and molecules.png.

    `spec`: None where another objective than the task's own was maximised, whose true front is not known.
    """
    drawing, axes = figure("Training loss", "step", gfn.config.objective)
    axes.plot(range(1, len(gfn.history) + 1), gfn.history)
    drawing.savefig(out / "loss.png", dpi=120)
    reference = None
    if gfn.graph is not None and spec is not None and spec.env in ("moo-grid", "hypergrid"):
        every = gfn.env.objective(gfn.graph.states)  # type: ignore[attr-defined]
        mask = non_dominated_mask(every)
        reference = every[mask].numpy()
        if gfn.env.width == 2:
            mass = {gfn.config.objective: gfn.terminal_distribution().numpy()}
            picture = plots.mass_figure(gfn.graph.states.numpy(), mass, mask.numpy(), "Exact terminal mass")
            picture.savefig(out / "mass.png", dpi=120)
    if u.shape[1] > 1 and len(u):
        plots.front_figure({"drawn": u}, reference, names, "What was drawn").savefig(out / "front.png", dpi=120)
    if isinstance(gfn.env, FragmentEnv) and texts:
        captions = [", ".join(f"{n} {v:.2f}" for n, v in zip(names, row, strict=True)) for row in u]
        plots.molecules_figure(texts, captions, "Best candidates").savefig(out / "molecules.png", dpi=120)


def main() -> NoReturn:
    """Entry point of `isotone-opgfn`."""
    run_main(app, "opgfn")
