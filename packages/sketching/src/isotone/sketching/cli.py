"""`isotone sketching ...`: train, server, client, attack, audit, account, compare, reproduce, bench, info."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import jax
import typer

from isotone.shared import device, progress
from isotone.shared.checkpoint import atomic_write
from isotone.shared.claims import Report
from isotone.shared.cli import Run, paper_app, run_main, verb
from isotone.shared.errors import InputError
from isotone.sketching.client import ClientConfig, run_client
from isotone.sketching.models import MODELS
from isotone.sketching.plan import Plan
from isotone.sketching.server import ServerConfig, serve
from isotone.sketching.sketches import KINDS
from isotone.sketching.training import ARMS, SERVERS, RunConfig
from isotone.sketching.training import train as train_run

app = paper_app("sketching", framework="jax")
if importlib.util.find_spec("isotone.sketching.audit_cli"):
    importlib.import_module("isotone.sketching.audit_cli").register(app)
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
Size = Annotated[int | None, Opt(help="in place of --ratio: s of a sketch, k, columns, rank or levels")]
EtaG = Annotated[str, Opt(help="the global step: auto, 1/(1+alpha), or a number")]
ServerOpt = Annotated[str, Opt("--server-opt", help=", ".join(SERVERS))]
ServerRate = Annotated[float, Opt(help="the server optimizer's rate")]
Epsilon = Annotated[float | None, Opt(help="private mode: epsilon of all releases at --delta")]
Noise = Annotated[float | None, Opt(help="private mode: noise multiplier, in place of --epsilon")]
Clip = Annotated[float, Opt(help="private mode: the norm that an example's gradient is clipped to")]
Sampling = Annotated[float, Opt(help="private mode: rate of Poisson sampling, in place of --batch")]
Delta = Annotated[float, Opt(help="private mode: delta")]


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
    per_leaf: Annotated[bool, Opt("--per-leaf", help="a sketch of each leaf")] = False,
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
            arm=arm, kind=kind, ratio=ratio, size=size, per_leaf=per_leaf, eta_g=_step(eta_g), server=server_opt,
            server_rate=server_rate, epsilon=epsilon, noise=noise, clip=clip, sampling=sampling, delta=delta,
            seed=_one_seed(run),
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
            size=size, eta_g=_step(eta_g), server=server_opt, server_rate=server_rate, noise=noise, clip=clip,
            sampling=sampling, delta=delta, seed=_one_seed(run),
        )  # fmt: skip
        plan = Plan(config, _shape(shape), classes)
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
        heard = sum(map(len, report.heard)) / max(1, len(report.heard))
        return {
            "rounds": len(report.heard),
            "clients heard in a round": round(heard, 2),
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
) -> dict:
    """Take part in the rounds of a server, with examples that stay here; comes back when the line breaks."""
    with _on(run.device):
        config = ClientConfig(client, host, port, clients, data, patience)
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
        return {**found, "written": str(run.out / "params.safetensors")}


@verb(app)
def bench(run: Run) -> Report:
    """Transforms, sketches, rounds and bytes beside their peers."""
    with _on(run.device):
        return importlib.import_module("isotone.sketching.bench").bench(run)


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


def _step(text: str) -> str | float:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"expected --eta-g to be auto or a number, got {text!r}") from None


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected --shape as numbers by commas such as 8,8,1, got {text!r}") from None


def main() -> NoReturn:
    """Entry point of `isotone-sketching`."""
    run_main(app, "sketching")
