"""The verbs attack, audit, account, compare and reproduce of `isotone sketching`."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import safetensors.numpy
import typer

from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import ArmLog, Report
from isotone.shared.cli import Run, verb
from isotone.shared.data import sha256
from isotone.shared.errors import InputError
from isotone.sketching import plots, privacy, study
from isotone.sketching import reproduce as reproduction
from isotone.sketching.attack import AttackConfig
from isotone.sketching.audit import AuditConfig, audit
from isotone.sketching.data import load
from isotone.sketching.models import MODELS, make_model
from isotone.sketching.privacy import PrivacyConfig
from isotone.sketching.private_study import accounts
from isotone.sketching.scales import ARMS
from isotone.sketching.weights import load_weights

Opt = typer.Option
Data = Annotated[str, Opt(help="digits, or an .npz with x (n, ...) and y (n,)")]
ModelName = Annotated[str, Opt(help=", ".join(MODELS))]
Hidden = Annotated[int, Opt(help="units of the MLP")]
Weights = Annotated[
    Path | None, Opt(help="weights of the model, .safetensors as `train` writes or .npz; fresh ones if not given")
]


def register(app: typer.Typer) -> None:
    """Give `app` the verbs of this module."""
    for function in (attack, audit_verb, account, compare, reproduce):
        verb(app, "audit" if function is audit_verb else None)(function)


def attack(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    hidden: Hidden = 32,
    weights: Weights = None,
    size: Annotated[int | None, Opt(help="numbers of the sketch; the whole vector if not given")] = None,
    kind: Annotated[str, Opt(help="of sketch")] = "srht",
    batch: Annotated[int, Opt(help="examples of a message")] = 1,
    local_steps: Annotated[int, Opt(help="K, local steps of a message")] = 1,
    messages: Annotated[int, Opt(help="messages to attack")] = 5,
    method: Annotated[str, Opt(help="l2 or cosine")] = "l2",
    optimizer: Annotated[str, Opt(help="adam or lbfgs")] = "adam",
    tv: Annotated[float, Opt(help="weight of the total variation of pictures")] = 0.0,
    restarts: Annotated[int, Opt(help="starts of each attack, the best by its loss kept")] = 2,
    steps: Annotated[int, Opt(help="of the optimizer")] = 1500,
) -> dict:
    """Reconstruct examples from what a client would send of them: attack.json and a sheet of reconstructions."""
    attacker = AttackConfig(method, optimizer, steps, restarts=restarts, tv=tv)
    config = AuditConfig((size,), (batch,), (local_steps,), messages=messages, kind=kind, attack=attacker)
    return _audited(run, data, model, hidden, weights, config, "attack")


def audit_verb(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    hidden: Hidden = 32,
    weights: Weights = None,
    sizes: Annotated[str, Opt(help="sizes of sketches by commas; 0: the whole vector")] = "0,512,128,64",
    kind: Annotated[str, Opt(help="of sketch")] = "srht",
    batches: Annotated[str, Opt(help="examples of a message, by commas")] = "1,8",
    local_steps: Annotated[str, Opt(help="local steps of a message, by commas")] = "1,5",
    noises: Annotated[str, Opt(help="noise multipliers of the private mode, by commas")] = "",
    clip: Annotated[float, Opt(help="norm that gradients are clipped to there")] = 1.0,
    messages: Annotated[int, Opt(help="messages of each setting")] = 3,
    private_messages: Annotated[int, Opt(help="of each noise")] = 30,
    steps: Annotated[int, Opt(help="of the attack")] = 1500,
) -> dict:
    """What leaks from messages by size, batch, local steps and noise: audit.json and sheets of reconstructions."""
    config = AuditConfig(
        tuple(s or None for s in _whole(sizes, "--sizes", 0)),
        _whole(batches, "--batches", 1),
        _whole(local_steps, "--local-steps", 1),
        messages=messages,
        kind=kind,
        noises=_numbers(noises, "--noises"),
        clip=clip,
        attack=AttackConfig(steps=steps, restarts=2),
        private_messages=private_messages,
        private_attack=AttackConfig(steps=min(steps, 200), restarts=10),
    )
    return _audited(run, data, model, hidden, weights, config, "audit")


def account(
    run: Run,
    rounds: Annotated[int, Opt(help="rounds a client takes part in")] = 100,
    local_steps: Annotated[int, Opt(help="K, local steps of a round: a release each")] = 5,
    sampling: Annotated[float, Opt(help="rate of Poisson sampling")] = 0.1,
    delta: Annotated[float, Opt(help="delta")] = 1e-5,
    noise: Annotated[float | None, Opt(help="noise multiplier, for its epsilon")] = None,
    epsilon: Annotated[float | None, Opt(help="epsilon, for its noise multiplier")] = None,
) -> dict:
    """Epsilon of a noise multiplier, or the noise of an epsilon: by Renyi divergence, by privacy loss distributions
    where dp-accounting is installed, and by the theorem's composition."""
    if (noise is None) == (epsilon is None):
        raise InputError(f"expected --noise or --epsilon, got {'neither' if noise is None else 'both'}")
    if rounds < 1 or local_steps < 1:
        raise InputError(f"expected rounds and local steps of at least 1, got {rounds} and {local_steps}")
    PrivacyConfig(1.0, 1.0 if noise is None else noise, sampling, delta)
    releases = rounds * local_steps
    found: dict[str, Any] = {"releases": releases, "delta": delta, "sampling": sampling}
    if noise is None:
        assert epsilon is not None
        noise = privacy.calibrate(epsilon, delta, sampling, releases)
        found["noise multiplier (Renyi)"] = round(noise, 5)
    # the theorem is asked for the epsilon that Renyi divergence has for this noise
    row = accounts(epsilon or _epsilon(noise, delta, sampling, releases), delta, sampling, releases, noise)
    found["epsilon (Renyi)"] = round(row["rdp"], 5)
    missing = "needs dp-accounting, which is not installed"
    found["epsilon (privacy loss distributions)"] = missing if row["pld"] is None else round(row["pld"], 5)
    found["noise multiplier (the theorem, at the same epsilon)"] = round(row["theorem"], 5)
    found["adjacency"] = "add or remove one example of one client"
    return found


def _epsilon(noise: float, delta: float, sampling: float, releases: int) -> float:
    accountant = privacy.Accountant(sampling, noise)
    accountant.spend(releases)
    return accountant.epsilon(delta)


def compare(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    hidden: Hidden = 32,
    arms: Annotated[str, Opt(help="by commas; all if not given")] = "",
    clients: Annotated[int, Opt(help="clients")] = 20,
    concentration: Annotated[float, Opt(help="of the Dirichlet dealing by label")] = 0.5,
    rounds: Annotated[int, Opt(help="rounds of FedAvg, whose bytes every arm may send")] = 60,
    ratio: Annotated[float, Opt(help="times fewer bytes up than the weights have")] = 10.0,
    rates: Annotated[str, Opt(help="learning rates to choose from, by commas")] = "0.1,0.5,1,2,4,8",
) -> dict:
    """Accuracy for equal bytes of FedAvg, sketches, top-k, FetchSGD, PowerSGD and QSGD: compare.json and bytes.png."""
    source = load(data)
    names = [name.strip() for name in arms.split(",")] if arms else list(ARMS)
    if odd := [name for name in names if name not in ARMS]:
        raise InputError(f"expected --arms of {', '.join(ARMS)}, got {odd[0]!r}")
    for name, count in (("rounds", rounds), ("clients", clients)):
        if count < 1:
            raise InputError(f"expected --{name} of at least 1, got {count}")
    setting = study.Setting(
        model, hidden, clients, concentration, plain_rounds=rounds, ratio=ratio, rates=_numbers(rates, "--rates"),
        looks=min(20, rounds), valid=max(1, len(source.x) // 5),
    )  # fmt: skip
    seeds = run.seeds or (0,)
    identity = {"compare": repr(setting), "data": sha256(source.x.tobytes()), "seeds": list(seeds)}
    log = ArmLog(run.out, identity, run.resume)
    rows = []
    with progress.bar("compare", len(names), run.silent) as bar, on(run.device):
        for name in names:
            bar.advance(0, arm=name)
            rows.append(log.arm(name, partial(study.compare, source, setting, name, seeds)))
            bar.advance(1)
    _write(run.out / "compare.json", rows)
    plots.against_bytes(rows).savefig(run.out / "bytes.png", dpi=120)
    plain = next((row for row in rows if row["arm"] == "fedavg"), None)
    target = None if plain is None else float(np.mean([curve[-1] for curve in plain["accuracy"]])) - 1
    found: dict[str, Any] = {}
    for row in rows:
        final = [curve[-1] for curve in row["accuracy"]]
        words = (
            f"{np.mean(final):.2f} % in {row['rounds']} rounds of {row['bytes_up']} bytes up, {row['bytes_down']} down"
        )
        if target is not None:
            reached = study.bytes_to(row, target)
            words += f"; {target:.1f} % " + ("never" if reached is None else f"after {reached / 1e3:.0f} kB")
        found[row["arm"]] = f"{words}; rate {row['rate']:g}"
    return {**found, "written": str(run.out / "compare.json")}


def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    data: Data = "digits",
) -> Report:
    """Measure the paper's claims again."""
    return reproduction.reproduce(scale, run, data)


def _audited(
    run: Run, data: str, model: str, hidden: int, weights: Path | None, config: AuditConfig, name: str
) -> dict[str, Any]:
    source = load(data)
    network = make_model(model, source.x.shape[1:], source.classes, hidden)
    seed = (run.seeds or (0,))[0]
    params = network.init(jax.random.key(seed))
    if weights is not None:
        params = load_weights(weights, params) if weights.suffix != ".npz" else _npz_weights(weights, params)
    known = (source.x, source.y)
    with on(run.device):
        report = audit(network, params, source.test_x, source.test_y, config, known=known, seed=seed)
    _write(run.out / f"{name}.json", report.to_json())
    found: dict[str, Any] = {}
    for leak in report.leaks:
        what = "whole" if leak.s is None else f"{leak.s} of {leak.d}"
        what = what if leak.noise is None else f"noise {leak.noise:g}"
        words = f"PSNR {leak.psnr:.1f} dB, error {leak.mse:.2g} (class mean {leak.guess:.2g}), "
        words += f"identified {leak.found} of {leak.tried} among {leak.pool} (chance {100 * leak.chance:.1f} %)"
        said = "; the attack failed" if leak.failed else ""
        found[f"{what}, batch {leak.batch}, K = {leak.local_steps}"] = words + said
    found["written"] = str(run.out / f"{name}.json")
    for sheet, rows in report.pictures.items():
        if next(iter(rows.values())).ndim >= 3:
            path = run.out / f"{name}-{sheet.replace(' ', '-')}.png"
            plots.sheet(rows).savefig(path, dpi=120)
            found[f"reconstructions, {sheet}"] = str(path)
    return found


def _npz_weights(path: Path, like: Any) -> Any:
    """The leaves of an .npz, named as in a safetensors file of ours."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = safetensors.numpy.save({name: np.ascontiguousarray(file[name]) for name in file.files})
    except FileNotFoundError:
        raise InputError(f"expected weights at {str(path)!r}, found no such file") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"expected an .npz of weights, got a torn or other one: {str(path)!r}") from None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.with_suffix(".safetensors").name)
        copy.write_bytes(content)
        try:
            return load_weights(copy, like)
        except InputError as error:
            raise InputError(str(error).replace(str(copy), str(path))) from None


@contextmanager
def on(name: str) -> Iterator[None]:
    """Compute on the device `name`."""
    where = device.resolve(name, "jax")
    with jax.default_device(jax.devices("gpu" if where == "cuda" else "cpu")[0]):
        yield


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"expected {option} as numbers by commas, got {text!r}") from None


def _whole(text: str, option: str, least: int) -> tuple[int, ...]:
    found = _numbers(text, option)
    if not found or any(not value.is_integer() or value < least for value in found):
        raise InputError(f"expected {option} as whole numbers from {least} by commas, got {text!r}")
    return tuple(int(value) for value in found)
