"""`isotone sketching ...`: train, server, client, attack, audit, account, theory, compare, reproduce, bench,
info."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import numpy as np
import typer

from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import ArmLog, Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError, check_count
from isotone.sketching import plots, privacy, study
from isotone.sketching import reproduce as reproduction
from isotone.sketching.attack import AttackConfig
from isotone.sketching.audit import AuditConfig
from isotone.sketching.audit import audit as audit_run
from isotone.sketching.client import ClientConfig, run_client
from isotone.sketching.data import load
from isotone.sketching.models import MODELS, make_model
from isotone.sketching.plan import Plan
from isotone.sketching.privacy import PrivacyConfig
from isotone.sketching.private_study import accounts
from isotone.sketching.rounding import DTYPES
from isotone.sketching.scales import ARMS as COMPARED
from isotone.sketching.server import ServerConfig, serve
from isotone.sketching.sketches import KINDS, make_sketch
from isotone.sketching.texts import global_step, numbers_in, shape_of, whole_in
from isotone.sketching.theory import Problem, convex_rounds_needed, rounds_needed, total_ratio
from isotone.sketching.training import ARMS, SERVERS, RunConfig, run_keys
from isotone.sketching.training import train as train_run
from isotone.sketching.weights import load_weights

app = paper_app("sketching", framework="jax")
Opt = typer.Option
Data = Annotated[str, Opt(help="digits, or an .npz with x (n, ...) and y (n,)")]
ModelName = Annotated[str, Opt(help=", ".join(MODELS))]
Hidden = Annotated[int, Opt(help="units of the MLP")]
Clients = Annotated[int, Opt(help="clients in all")]
Concentration = Annotated[float, Opt(help="of the Dirichlet dealing by label; 0: evenly at random")]
Rounds = Annotated[int, Opt(help="rounds")]
LocalSteps = Annotated[int, Opt(help="K, local steps of a round")]
Batch = Annotated[int, Opt(help="examples of a local step; 0: all")]
Rate = Annotated[float, Opt(help="the clients' learning rate")]
Participants = Annotated[int | None, Opt(help="clients drawn for a round; all if not given")]
Kind = Annotated[str, Opt(help=", ".join(KINDS))]
Ratio = Annotated[float, Opt(help="times fewer bytes up than the weights have")]
Dtype = Annotated[str, Opt(help=f"of a sketch's numbers: {', '.join(DTYPES)}")]
Size = Annotated[int | None, Opt(help="in place of --ratio: s of a sketch, k, columns, rank or levels")]
EtaG = Annotated[str, Opt(help="the global step: auto, 1/(1+alpha), or a number")]
ServerOpt = Annotated[str, Opt("--server-opt", help=", ".join(SERVERS))]
ServerRate = Annotated[float, Opt(help="the server optimizer's rate")]
Epsilon = Annotated[float | None, Opt(help="private mode: epsilon of all releases at --delta")]
Noise = Annotated[float | None, Opt(help="private mode: noise multiplier, in place of --epsilon")]
Clip = Annotated[float, Opt(help="private mode: the norm that an example's gradient is clipped to")]
Sampling = Annotated[float, Opt(help="private mode: rate of Poisson sampling, in place of --batch")]
Delta = Annotated[float, Opt(help="private mode: delta")]
Weights = Annotated[
    Path | None, Opt(help="weights of the model, .safetensors as `train` writes or .npz; fresh ones if not given")
]


@verb(app)
def train(
    run: Run,
    data: Data = "digits",
    model: ModelName = "linear",
    hidden: Hidden = 32,
    clients: Clients = 20,
    concentration: Concentration = 0.5,
    rounds: Rounds = 200,
    local_steps: LocalSteps = 5,
    batch: Batch = 32,
    rate: Rate = 0.5,
    participants: Participants = None,
    straggle: Annotated[float, Opt(help="chance that a participant is not heard")] = 0.0,
    weigh: Annotated[str, Opt(help="equal, or by size")] = "equal",
    arm: Annotated[str, Opt(help=", ".join(ARMS))] = "sketch",
    kind: Kind = "srht",
    ratio: Ratio = 10.0,
    size: Size = None,
    dtype: Dtype = "float32",
    per_leaf: Annotated[bool, Opt("--per-leaf", help="a sketch of each leaf")] = False,
    ordered: Annotated[bool | None, Opt(help="sums in a fixed order, for a sort; on a GPU if not given")] = None,
    eta_g: EtaG = "auto",
    server_opt: ServerOpt = "sgd",
    server_rate: ServerRate = 1.0,
    epsilon: Epsilon = None,
    noise: Noise = None,
    clip: Clip = 1.0,
    sampling: Sampling = 0.1,
    delta: Delta = 1e-5,
    checkpoint_every: Annotated[int, Opt(help="rounds between checkpoints, and looks at the accuracy")] = 10,
) -> dict:
    """Train by federated rounds through a channel, in one process; resumes where it was killed."""
    with _on(run.device):
        config = RunConfig(
            data=data, model=model, hidden=hidden, clients=clients, concentration=concentration or None, rounds=rounds,
            local_steps=local_steps, batch=batch, rate=rate, participants=participants, straggle=straggle, weigh=weigh,
            arm=arm, kind=kind, ratio=ratio, size=size, dtype=dtype, per_leaf=per_leaf, ordered=ordered,
            eta_g=global_step(eta_g), server=server_opt, server_rate=server_rate, epsilon=epsilon, noise=noise,
            clip=clip, sampling=sampling, delta=delta, seed=_one_seed(run),
        )  # fmt: skip
        run.out.mkdir(parents=True, exist_ok=True)
        with progress.bar(arm, rounds, run.silent) as bar:
            trained = train_run(
                *(config, run.out, run.resume),
                every=checkpoint_every,
                advanced=lambda n, loss: bar.advance(n, loss=round(loss, 4)),
            )
        up, down = trained.ledger.total
        each = up / max(1, sum(len(row["heard"]) + len(row["rejected"]) for row in trained.history))
        rejected = sum(len(row["rejected"]) for row in trained.history)
        found: dict[str, Any] = {
            "test accuracy (%)": round(100 * trained.accuracy, 2),
            "bytes up, a client's round": round(each),
            "bytes up": up,
            "bytes down": down,
            **({"updates rejected (not finite)": rejected} if rejected else {}),
        }
        if trained.privacy is not None:
            said = trained.privacy
            tight = said["epsilon_pld"]
            found["epsilon"] = f"{said['epsilon_rdp']:.4g} (Renyi)" + (f", {tight:.4g} (PLD)" if tight else "")
            found["at delta"], found["releases"] = said["delta"], said["releases"]
            found["noise multiplier"] = round(said["noise_multiplier"], 4)
            found["adjacency"], found["trust"] = said["adjacency"], said["trust"]
        return {**found, "written": str(run.out / "params.safetensors")}


@verb(app)
def server(
    run: Run,
    host: Annotated[str, Opt(help="address to listen at; anything but loopback is not protected")] = "127.0.0.1",
    port: Annotated[int, Opt(help="0: any that is free, told in address.txt")] = 8765,
    shape: Annotated[str, Opt(help="of an example, by commas")] = "8,8,1",
    classes: Annotated[int, Opt(help="labels")] = 10,
    model: ModelName = "linear",
    hidden: Hidden = 32,
    clients: Clients = 20,
    concentration: Concentration = 0.5,
    rounds: Rounds = 200,
    local_steps: LocalSteps = 5,
    batch: Batch = 32,
    rate: Rate = 0.5,
    participants: Participants = None,
    arm: Annotated[str, Opt(help="sketch, plain or rand-k: what can be added unseen")] = "sketch",
    kind: Kind = "srht",
    ratio: Ratio = 10.0,
    size: Size = None,
    dtype: Dtype = "float32",
    eta_g: EtaG = "auto",
    server_opt: ServerOpt = "sgd",
    server_rate: ServerRate = 1.0,
    noise: Noise = None,
    clip: Clip = 1.0,
    sampling: Sampling = 0.1,
    delta: Delta = 1e-5,
    deadline: Annotated[float, Opt(help="seconds that a round waits for those who take part")] = 60.0,
    wait_for: Annotated[int | None, Opt(help="clients that round 0 waits for; all if not given")] = None,
    patience: Annotated[float, Opt(help="seconds without a message before it gives up")] = 600.0,
    linger: Annotated[float, Opt(help="seconds that late clients have after the last round")] = 5.0,
    catch_up: Annotated[str, Opt(help="what late clients are told: history or weights")] = "history",
) -> dict:
    """Serve rounds over TCP: adds sketches, never has the weights; goes on where it was killed."""
    with _on(run.device):
        config = RunConfig(
            model=model, hidden=hidden, clients=clients, concentration=concentration or None, rounds=rounds,
            local_steps=local_steps, batch=batch, rate=rate, participants=participants, arm=arm, kind=kind, ratio=ratio,
            size=size, dtype=dtype, eta_g=global_step(eta_g), server=server_opt, server_rate=server_rate, noise=noise,
            clip=clip, sampling=sampling, delta=delta, seed=_one_seed(run),
        )  # fmt: skip
        plan = Plan(config, shape_of(shape), classes)
        limits = ServerConfig(host, port, deadline, wait_for, patience, linger, catch_up)
        with progress.bar("rounds", rounds, run.silent) as bar:

            def ready(at: int) -> None:
                atomic_write(run.out / "address.txt", f"{host}:{at}\n".encode())
                if not run.silent:
                    print(f"listening at {host}:{at}", file=sys.stderr, flush=True)

            report = serve(
                *(plan, run.out, limits, run.resume),
                ready=ready,
                round_done=lambda t, heard: bar.advance(1, heard=heard),
            )
        events = {f"messages {name}": count for name, count in report.events.items() if count}
        known = [len(heard) for heard in report.heard if heard is not None]
        return {
            "rounds": len(report.heard),
            "clients heard in a round": round(sum(known) / max(1, len(known)), 2),
            **events,
            "written": str(run.out / "ledger.json"),
        }


@verb(app)
def client(
    run: Run,
    client: Annotated[int, Opt(help="this client's number, from 0")],
    clients: Annotated[int | None, Opt(help="how many the server must say there are")] = None,
    host: Annotated[str, Opt(help="the server's address")] = "127.0.0.1",
    port: Annotated[int, Opt(help="the server's port")] = 8765,
    data: Annotated[str, Opt(help="digits (its share of them), or an .npz of its own")] = "digits",
    patience: Annotated[float, Opt(help="seconds without a server before it gives up")] = 60.0,
    epsilon: Annotated[float | None, Opt(help="the most that the server's plan may cost in all its rounds")] = None,
    delta: Annotated[float, Opt(help="of --epsilon")] = 1e-5,
) -> dict:
    """Take part in the rounds of a server, with examples that stay here; comes back when the line breaks."""
    with _on(run.device):
        config = ClientConfig(client, host, port, clients, data, patience, epsilon, delta)
        with progress.bar(f"client {client}", None, run.silent) as bar:
            done = run_client(config, run.out, run.resume, advanced=lambda t: bar.advance(1))
        found: dict[str, Any] = {
            "test accuracy (%)": round(100 * done.accuracy, 2),
            "bytes up": done.bytes_up,
            "bytes down": done.bytes_down,
            "reconnected": done.reconnected,
        }
        if done.privacy is not None:
            found["epsilon"] = f"{done.privacy['epsilon_rdp']:.4g} at delta {done.privacy['delta']:g}"
            found["trust"] = done.privacy["trust"]
        return {**found, "written": str(run.out / "params.safetensors")}


@verb(app)
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


@verb(app)
def audit(
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
        tuple(s or None for s in whole_in(sizes, "--sizes", 0)),
        whole_in(batches, "--batches", 1),
        whole_in(local_steps, "--local-steps", 1),
        messages=messages,
        kind=kind,
        noises=numbers_in(noises, "--noises"),
        clip=clip,
        attack=AttackConfig(steps=steps, restarts=2),
        private_messages=private_messages,
        private_attack=AttackConfig(steps=min(steps, 200), restarts=10),
    )
    return _audited(run, data, model, hidden, weights, config, "audit")


@verb(app)
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


@verb(app)
def theory(
    run: Run,
    numbers: Annotated[int, Opt(help="d, numbers in the weights")],
    size: Annotated[int | None, Opt(help="s, numbers of the sketch; --ratio if not given")] = None,
    ratio: Annotated[float, Opt(help="d / s")] = 10.0,
    kind: Kind = "srht",
    smoothness: Annotated[float, Opt(help="L")] = 1.0,
    strong_convexity: Annotated[float, Opt(help="mu; 0: convex")] = 0.0,
    local_steps: LocalSteps = 5,
    gap: Annotated[float, Opt(help="f - f* at the start, of strongly convex problems")] = 1.0,
    distance: Annotated[float, Opt(help="|w - w*| at the start, of convex problems")] = 1.0,
    target: Annotated[float, Opt(help="f - f* to reach")] = 1e-2,
) -> dict:
    """What the theorems say of a sketch: alpha, step sizes, rounds until a target, numbers sent beside descent's."""
    check_count("--numbers", numbers, 1)
    sketch = make_sketch(kind, numbers, size, ratio=None if size is not None else ratio)
    plain, own = (Problem(smoothness, strong_convexity, alpha) for alpha in (0.0, sketch.alpha))
    if strong_convexity > 0:
        rounds, without = (rounds_needed(problem, gap, target) for problem in (own, plain))
    else:
        rounds, without = (convex_rounds_needed(problem, distance**2, target) for problem in (own, plain))
    return {
        "s": sketch.s,
        "alpha": round(sketch.alpha, 6),
        "step (K = 1)": own.step if strong_convexity > 0 else own.convex_step,
        "step, non-convex (K = 1)": own.step,
        f"local step (K = {local_steps}, its constant recalled)": own.local_step(local_steps),
        "rounds": rounds,
        "rounds of gradient descent": without,
        "numbers a round, each way": sketch.s,
        "numbers in all over gradient descent's": round(rounds * sketch.s / (without * numbers), 4),
        "(1 + alpha) s / d": round(total_ratio(numbers, sketch.s, sketch.alpha), 4),
    }


@verb(app)
def compare(
    run: Run,
    data: Data = "digits",
    model: ModelName = "mlp",
    hidden: Hidden = 32,
    arms: Annotated[str, Opt(help="by commas; all if not given")] = "",
    clients: Annotated[int, Opt(help="clients")] = 20,
    concentration: Concentration = 0.5,
    rounds: Annotated[int, Opt(help="rounds of FedAvg, whose bytes every arm may send")] = 60,
    ratio: Annotated[float, Opt(help="times fewer bytes in a round of the compressed arms")] = 10.0,
    rates: Annotated[
        str, Opt(help="learning rates to choose from, by commas; the first and last are gone past")
    ] = "0.1,0.5,1,2,4,8",
) -> dict:
    """Accuracy for equal bytes of FedAvg, sketches, top-k, FetchSGD, PowerSGD and QSGD: compare.json and bytes.png."""
    source = load(data)
    names = [name.strip() for name in arms.split(",")] if arms else list(COMPARED)
    if odd := [name for name in names if name not in COMPARED]:
        raise InputError(f"expected --arms of {', '.join(COMPARED)}, got {odd[0]!r}")
    setting = study.Setting(
        model, hidden, clients, concentration or None, plain_rounds=rounds, ratio=ratio,
        rates=numbers_in(rates, "--rates"), valid=max(1, len(source.x) // 5),
    )  # fmt: skip
    seeds = run.seeds or (0,)
    identity = {"compare": repr(setting), "data": source.digest, "seeds": list(seeds)}
    log = ArmLog(run.out, identity, run.resume)
    rows = []
    with progress.bar("compare", len(names), run.silent) as bar, _on(run.device):
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
            reached = [value for value in study.bytes_to(row, target) if value is not None]
            some = f" by {len(reached)} of {len(seeds)} seeds" if len(reached) < len(seeds) else ""
            words += f"; {target:.1f} % "
            words += f"after {np.mean(reached) / 1e3:.0f} kB{some}" if reached else "never"
        found[row["arm"]] = f"{words}; rate {row['rate']:g}" + (", an end of those tried" if row["end"] else "")
    return {**found, "written": str(run.out / "compare.json")}


@verb(app)
def reproduce(
    run: Run,
    scale: Annotated[str, Opt(help="smoke, cpu, gpu or paper")] = "smoke",
    data: Data = "digits",
) -> Report:
    """Measure the paper's claims again."""
    return reproduction.reproduce(scale, run, data)


@verb(app)
def bench(run: Run) -> Report:
    """Transforms, sketches, rounds and bytes beside their peers."""
    with _on(run.device):
        return importlib.import_module("isotone.sketching.bench").bench(run)


def _audited(
    run: Run, data: str, model: str, hidden: int, weights: Path | None, config: AuditConfig, name: str
) -> dict[str, Any]:
    source = load(data)
    network = make_model(model, source.x.shape[1:], source.classes, hidden)
    seed = (run.seeds or (0,))[0]
    params = network.init(run_keys(seed)[0])
    if weights is not None:
        params = load_weights(weights, params)
    known = (source.x, source.y)
    with _on(run.device):
        report = audit_run(network, params, source.test_x, source.test_y, config, known=known, seed=seed)
    _write(run.out / f"{name}.json", report.to_json())
    found: dict[str, Any] = {}
    for leak in report.leaks:
        what = "whole" if leak.s is None else f"{leak.s} of {leak.d}"
        what = what if leak.noise is None else f"noise {leak.noise:g}"
        words = f"PSNR {leak.psnr:.1f} dB, error {leak.mse:.2g} (class mean {leak.guess:.2g}), "
        words += f"identified {leak.found} of {leak.tried} among {leak.pool} (chance {100 * leak.chance:.1f} %)"
        if leak.by_likelihood is not None:
            words += f", likeliest in {leak.by_likelihood} (chance {100 / leak.pool:.1f} %)"
        said = "; the attack failed" if leak.failed else ""
        found[f"{what}, batch {leak.batch}, K = {leak.local_steps}"] = words + said
    found["written"] = str(run.out / f"{name}.json")
    for sheet, rows in report.pictures.items():
        if next(iter(rows.values())).ndim >= 3:
            path = run.out / f"{name}-{sheet.replace(' ', '-')}.png"
            plots.sheet(rows).savefig(path, dpi=120)
            found[f"reconstructions, {sheet}"] = str(path)
    return found


def _epsilon(noise: float, delta: float, sampling: float, releases: int) -> float:
    accountant = privacy.Accountant(sampling, noise)
    accountant.spend(releases)
    return accountant.epsilon(delta)


@contextmanager
def _on(name: str) -> Iterator[None]:
    """Compute on the device `name`."""
    where = device.resolve(name, "jax")
    with jax.default_device(jax.devices("gpu" if where == "cuda" else "cpu")[0]):
        yield


def _one_seed(run: Run) -> int:
    seeds = run.seeds or (0,)
    if len(seeds) > 1:
        raise InputError(f"expected one seed for one run, got --seeds {','.join(map(str, seeds))}")
    return seeds[0]


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def main() -> NoReturn:
    """Entry point of `isotone-sketching`."""
    run_main(app, "sketching")
