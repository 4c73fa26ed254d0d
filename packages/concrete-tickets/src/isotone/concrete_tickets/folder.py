"""A folder that holds one run of `search` or `ltr`: settings, ticket, rewind weights, and what was made of them.

run.json is written last and names by hash the ticket and the weights that it belongs to, so that a run killed in
between is noticed. What is made of a ticket later bears the run's stamp, a hash of run.json. The settings of a run
under way lie in unfinished.json: it goes on beside an older run, which stays whole until the new one is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from isotone.concrete_tickets.arms import Experiment, Start
from isotone.concrete_tickets.layout import Params
from isotone.concrete_tickets.resume import fingerprint
from isotone.concrete_tickets.ticket import Ticket
from isotone.concrete_tickets.training import Recipe
from isotone.concrete_tickets.weights import load_metadata, load_weights, save_weights
from isotone.shared.checkpoint import CheckpointStore, atomic_write
from isotone.shared.errors import InputError

RUN, UNFINISHED = "run.json", "unfinished.json"
MADE = (
    *("sparse.safetensors", "logits.safetensors", "history.json", "sanity.json", "sanity.png"),
    *("model.safetensors", "torch.safetensors", "dense.npz"),
)
"""Files that belong to one run, and go with it."""
_KINDS = {"data": str, "sha256": str, "model": str, "seed": int, "rewind": int, "recipe": dict, "files": dict}


@dataclass(frozen=True)
class Opened:
    """A finished run. `stamp`: what the files made of it bear."""

    experiment: Experiment
    start: Start
    ticket: Ticket
    stamp: str


def settings_of(experiment: Experiment, data: str, model: str, seed: int, **method: Any) -> dict[str, Any]:
    """Everything that defines a run's ticket and its training; `method`: how the ticket is found."""
    recipe = {**vars(experiment.recipe), "milestones": list(experiment.recipe.milestones)}
    facts = {"data": data, "sha256": experiment.images.sha256, "model": model, "seed": seed}
    return json.loads(json.dumps({**facts, "rewind": experiment.rewind, "recipe": recipe, **method}))


def begin(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Before a run: with `resume` a folder of other settings is refused, else what was saved on the way is cleared.

    A finished run stays in the folder, as it is, until `finish`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, path, rounds = folder / UNFINISHED, folder / RUN, folder / "rounds"
    checkpoints = folder / "checkpoints" / "search"
    if resume:
        under_way = _stored(unfinished) if unfinished.exists() else None
        saved = any(checkpoints.glob("step-*")) or any(rounds.glob("round-*"))
        # a run that saved nothing yet binds nobody to its settings
        if under_way is not None and (saved or _other(under_way, settings) is None):
            other = _other(under_way, settings)
        else:
            other = _other(read_json(path), settings) if path.exists() else None
        if other is not None:
            raise InputError(f"expected a run of the same {other} in {str(folder)!r}, use --fresh or another --out")
    else:
        if checkpoints.is_dir():
            with CheckpointStore(checkpoints) as store:
                store.clear()
        for round in rounds.glob("round*"):
            round.unlink()
    write_json(unfinished, settings)


def finish(
    folder: Path,
    settings: Mapping[str, Any],
    rewind: Params,
    ticket: Ticket,
    logits: Mapping[str, Any] | None = None,
    history: Mapping[str, Any] | None = None,
) -> None:
    """Write a run; what was made of another one goes."""
    path = folder / RUN
    run = {**settings, "files": {"ticket": _digest(ticket), "weights": fingerprint(rewind)}}
    ticket.save(folder / "ticket.safetensors")
    save_weights(folder / "rewind.safetensors", rewind)
    if path.exists() and _stored(path) != run:
        for name in MADE:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints" / "train", ignore_errors=True)
    if logits:
        save_weights(folder / "logits.safetensors", logits, {"run": _stamp(run)})
    if history:
        write_json(folder / "history.json", history)
    write_json(path, run)
    (folder / UNFINISHED).unlink(missing_ok=True)


def open_run(folder: Path) -> Opened:
    """What `finish` wrote. Raises `InputError` where it is not there, not whole, or of two runs."""
    path = folder / RUN
    if not path.is_file():
        raise InputError(f"expected a folder of `search` or `ltr`, found no {RUN} in {str(folder)!r}")
    run = read_json(path)
    for name, kind in _KINDS.items():
        # not isinstance: True is no seed
        if type(run.get(name)) is not kind or (name == "seed" and not 0 <= run[name] < 2**32):
            raise InputError(f"expected the {name} of a run in {str(path)!r}, got {run.get(name)!r}")
    try:
        recipe = Recipe(**{**run["recipe"], "milestones": tuple(run["recipe"]["milestones"])})
    except (KeyError, TypeError):
        raise InputError(f"expected the recipe of a run in {str(path)!r}, got {run['recipe']!r}") from None
    experiment = Experiment.load(run["data"], run["model"], recipe, run["rewind"])
    if experiment.images.sha256 != run["sha256"]:
        raise InputError(f"expected the data that the ticket was found on, {run['data']!r} has changed")
    ticket = Ticket.load(folder / "ticket.safetensors")
    weights = folder / "rewind.safetensors"
    if not weights.exists():
        raise InputError(f"expected the rewind checkpoint at {str(weights)!r}, found no such file")
    key = jax.random.key(run["seed"])
    initial, rewind = experiment.model.init(key), load_weights(weights, experiment.model.shapes)
    if run["files"] != {"ticket": _digest(ticket), "weights": fingerprint(rewind)}:
        raise InputError(f"expected the ticket and weights of one run in {str(folder)!r}, got two runs': run it again")
    ticket.check(rewind)
    return Opened(experiment, Start(initial, rewind, jax.random.fold_in(key, 1)), ticket, _stamp(run))


def own(path: Path, stamp: str) -> Path | None:
    """`path` where it is there. Raises `InputError` where it was made of another run."""
    if not path.exists():
        return None
    if load_metadata(path).get("run") != stamp:
        raise InputError(f"expected {path.name} of the run beside it, got another's: make it again, or delete it")
    return path


def write_json(path: Path, content: Any) -> None:
    """Whole, or not at all."""
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Raises `InputError` where the file is torn, or no JSON object."""
    if (found := _stored(path)) is None:
        raise InputError(f"expected the settings of a run, got a torn or other file: {str(path)!r}")
    return found


def _stored(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _other(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The first of the settings that `stored` has otherwise."""
    return next((name for name in settings if stored.get(name) != settings[name]), None)


def _digest(ticket: Ticket) -> str:
    return fingerprint({name: ticket.masks[name] for name in sorted(ticket.masks)})


def _stamp(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
