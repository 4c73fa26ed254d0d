"""A whole federated run in one process: its settings, its chunks of rounds, its files, and what it cost.

`train` goes through the rounds in chunks of one `lax.scan` each. After every chunk the state lies on the disk; chunks
begin at multiples of their length, so that a run that was killed goes through the very same compiled chunks when it is
resumed, and ends bit for bit as one that was not. At the end: params.safetensors, history.json, ledger.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.shared.checkpoint import Checkpoint, CheckpointStore, atomic_write, load_latest
from isotone.shared.errors import InputError, check_count
from isotone.sketching import federated
from isotone.sketching.compressors import Compressor, Sketched, compressor_of
from isotone.sketching.data import ClientData, Dataset, deal, load
from isotone.sketching.federated import FedAlgorithm, FedState, fed_algorithm, round_keys
from isotone.sketching.ledger import Ledger
from isotone.sketching.models import Model, make_model
from isotone.sketching.privacy import PrivacyConfig, calibrate, private_local
from isotone.sketching.rounding import RoundedSketch, payload
from isotone.sketching.statement import own_noise_seed, privacy_statement
from isotone.sketching.weights import save_weights

ARMS = ("sketch", "plain", "topk", "fetchsgd", "powersgd", "qsgd", "rand-k")
SERVERS = ("sgd", "momentum", "adam")


@dataclass(frozen=True)
class RunConfig:
    """`data`: "digits" or an .npz; `concentration` of the Dirichlet dealing (None: evenly); `local_steps` K on `batch`.

    `arm`: what travels, `ratio` times less than the weights up, or of `size` (s of a sketch, k, columns, rank or
    levels). `kind`: of sketch, `ordered` as `tree_sketch`; `dtype` of its numbers, of which there are `ratio` times
    fewer. `server` with `server_rate`: what the server's update goes through. `epsilon` (for all rounds) or `noise`
    (its multiplier) switch the private mode on: `clip`, Poisson `sampling` and `delta` are its, and `batch` is not
    used. Raises `InputError` on what can not be meant.
    """

    data: str = "digits"
    model: str = "linear"
    hidden: int = 32
    clients: int = 20
    concentration: float | None = 0.5
    rounds: int = 200
    local_steps: int = 5
    batch: int = 32
    rate: float = 0.5
    participants: int | None = None
    straggle: float = 0.0
    weigh: str = "equal"
    arm: str = "sketch"
    kind: str = "srht"
    ratio: float = 10.0
    size: int | None = None
    per_leaf: bool = False
    ordered: bool | None = None
    dtype: str = "float32"
    eta_g: str | float = "auto"
    server: str = "sgd"
    server_rate: float = 1.0
    epsilon: float | None = None
    noise: float | None = None
    clip: float = 1.0
    sampling: float = 0.1
    delta: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "hidden"):
            check_count(name, getattr(self, name), 1)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"expected a seed from 0 to 2^32 - 1, got {self.seed}")
        if self.arm not in ARMS:
            raise InputError(f"expected an arm of {', '.join(ARMS)}, got {self.arm!r}")
        payload(self.dtype, 1)
        if self.dtype != "float32" and self.arm not in ("sketch", "rand-k"):
            raise InputError(f"expected numbers of float32 where no sketch is sent, got {self.dtype} for {self.arm}")
        if self.server not in SERVERS:
            raise InputError(f"expected a server optimizer of {', '.join(SERVERS)}, got {self.server!r}")
        if not (math.isfinite(self.server_rate) and self.server_rate > 0):
            raise InputError(f"expected a finite server rate above 0, got {self.server_rate}")
        if self.concentration is not None and not 0 < self.concentration < math.inf:
            raise InputError(f"expected a finite concentration above 0, or none, got {self.concentration}")
        if self.size is not None:
            check_count("size", self.size, 1)
        if not 1 <= self.ratio < math.inf:
            raise InputError(f"expected a finite ratio of at least 1, got {self.ratio}")
        if self.participants is not None and self.participants > self.clients:
            raise InputError(f"expected at most {self.clients} participants, got {self.participants}")
        if self.epsilon is not None and self.noise is not None:
            raise InputError(f"expected epsilon or noise, got both: {self.epsilon} and {self.noise}")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"expected a finite epsilon above 0, got {self.epsilon}")
        self.fed  # noqa: B018 - its own checks
        PrivacyConfig(self.clip, 1.0 if self.noise is None else self.noise, self.sampling, self.delta)

    @property
    def fed(self) -> dict[str, Any]:
        """The fields of `FedConfig`, checked."""
        names = ("local_steps", "batch", "rate", "participants", "straggle", "weigh", "eta_g")
        found = {name: getattr(self, name) for name in names}
        federated.FedConfig(**found)
        return found

    @property
    def private(self) -> bool:
        """Whether local steps are private."""
        return self.epsilon is not None or self.noise is not None

    @property
    def releases(self) -> int:
        """K T: of a client that takes part in every round."""
        return self.local_steps * self.rounds

    def privacy(self) -> PrivacyConfig | None:
        """The private mode's settings, its noise found from `epsilon` where that is what is given."""
        if not self.private:
            return None
        noise = self.noise
        if noise is None:
            assert self.epsilon is not None
            noise = calibrate(self.epsilon, self.delta, self.sampling, self.releases)
        return PrivacyConfig(self.clip, noise, self.sampling, self.delta)


def make_compressor(config: RunConfig, params: Any) -> Compressor:
    """What travels in a run of `config`: see `compressors.compressor_of`."""
    made = compressor_of(
        config.arm,
        params,
        ratio=config.ratio,
        size=config.size,
        kind=config.kind,
        participants=config.participants or config.clients,
        seed=config.seed,
        per_leaf=config.per_leaf,
        ordered=config.ordered,
    )
    if config.dtype != "float32" and isinstance(made, Sketched):
        return RoundedSketch(made.sketch, config.dtype)
    return made


@dataclass(frozen=True, eq=False)
class Setup:
    """All that a run needs: `key` of its rounds; `privacy` None where it is not private."""

    config: RunConfig
    dataset: Dataset
    data: ClientData
    model: Model
    params: Any
    algorithm: FedAlgorithm
    key: Array
    privacy: PrivacyConfig | None


def prepare(config: RunConfig, noise_seed: int | None = None) -> Setup:
    """Data dealt, weights drawn, channel made. `noise_seed`: of the private mode's noise, nobody's to know. Raises
    `InputError` on a private config without one."""
    dataset = load(config.data)
    dealt = deal(dataset.x, dataset.y, config.clients, config.concentration, config.seed)
    made = _made(config, dataset.x.shape[1:], dataset.classes, noise_seed)
    return Setup(config, dataset, dealt, *made)


@functools.lru_cache(maxsize=8)
def _made(config: RunConfig, shape: tuple[int, ...], classes: int, noise_seed: int | None) -> Any:
    """(model, params, algorithm, key, privacy): the same objects for the same run, so that it is compiled once."""
    model = make_model(config.model, shape, classes, config.hidden)
    start, rounds = run_keys(config.seed)
    params, privacy = model.init(start), config.privacy()
    return model, params, make_algorithm(config, model, params, privacy, noise_seed), rounds, privacy


def make_algorithm(
    config: RunConfig, model: Model, params: Any, privacy: PrivacyConfig | None, noise_seed: int | None = None
) -> FedAlgorithm:
    """The rounds of `config` for weights like `params`, of which nothing but shapes and types is looked at. Raises
    `InputError` on `privacy` without a seed of its noise: any that is fixed could be guessed."""
    local = None
    if privacy is not None:
        if noise_seed is None:
            raise InputError("expected a seed of a private run's noise, got none")
        local = private_local(model.loss, privacy, config.local_steps, config.rate, noise_seed)
    optimizers = {
        "sgd": lambda: optax.sgd(config.server_rate),
        "momentum": lambda: optax.sgd(config.server_rate, 0.9),
        "adam": lambda: optax.adam(config.server_rate),
    }
    return fed_algorithm(
        *(model.loss, params, make_compressor(config, params)),
        server_opt=optimizers[config.server](),
        local_update=local,
        **config.fed,
    )


def run_keys(seed: int | Array) -> tuple[Array, Array]:
    """Of the first weights, and of the rounds: two that share nothing, made of one seed."""
    first, second = jax.random.split(jax.random.key(seed))
    return first, second


@dataclass(frozen=True, eq=False)
class Trained:
    """`params`; `history` (one entry a round); `ledger`; `accuracy` on the test examples; `privacy`: the statement."""

    params: Any
    history: list[dict[str, Any]]
    ledger: Ledger
    accuracy: float
    privacy: dict[str, Any] | None


@dataclass
class _Log:
    """What happened in every round, as arrays that a checkpoint can hold."""

    loss: np.ndarray
    norm: np.ndarray
    taken: np.ndarray
    heard: np.ndarray
    late: np.ndarray
    accuracy: np.ndarray
    down: np.ndarray

    @classmethod
    def empty(cls, rounds: int, m: int) -> _Log:
        nan = np.full(rounds, np.nan, np.float32)
        none = np.zeros((rounds, m), bool)
        whole = np.zeros((rounds, m), np.int32)
        return cls(nan, nan.copy(), whole, none, none.copy(), nan.copy(), np.zeros(rounds, np.int32))

    def rejected(self, first: int, last: int) -> np.ndarray:
        """Who was on time, with numbers that are not finite."""
        return ~self.heard[first:last] & ~self.late[first:last]


def train(
    config: RunConfig,
    folder: str | Path,
    resume: bool = True,
    *,
    every: int = 10,
    noise_seed: int | None = None,
    advanced: Callable[[int, float], None] | None = None,
) -> Trained:
    """Run `config` to its end in `folder`, going on with what a killed run left there.

    `every`: rounds between checkpoints, and between looks at the test accuracy. `advanced(rounds, loss)` is called
    after each chunk. `noise_seed`: fixed noise for tests; without it, one of the system's entropy lies in noise.key.

    Raises `InputError` where the folder holds a run of other settings or data, and where no update of a round is
    finite: what was saved before stays.
    """
    check_count("every", every, 1)
    folder = Path(folder)
    store = CheckpointStore(folder / "checkpoints")
    with store:
        if not resume:
            store.clear()
        saved = load_latest(store.directory)
        begun = saved is not None
        secret = own_noise_seed(folder, begun, noise_seed) if config.private else None
        setup = prepare(config, secret)
        mine = _identity(setup, every)
        if saved is not None:
            _check_same(saved.state, mine, folder)
        m = config.participants or config.clients
        state, log = setup.algorithm.init(setup.params, config.clients), _Log.empty(config.rounds, m)
        first = 0
        if saved is not None:
            state, log = _restored(saved, state)
            first = saved.step
        test = jnp.asarray(setup.dataset.test_x), jnp.asarray(setup.dataset.test_y)
        for begin in range(first, config.rounds, every):
            end = min(begin + every, config.rounds)
            state, infos = _run(
                setup.algorithm, state, setup.key, (setup.data.x, setup.data.y, setup.data.size), end - begin
            )
            log.loss[begin:end] = np.asarray(infos.loss)
            log.norm[begin:end], log.down[begin:end] = np.asarray(infos.norm), np.asarray(infos.down)
            log.taken[begin:end], log.heard[begin:end] = np.asarray(infos.taken), np.asarray(infos.heard)
            log.late[begin:end] = late(setup.key, np.arange(begin, end), m, config.straggle)
            log.accuracy[end - 1] = float(_accuracy(setup.model, state.params, *test))
            _check_heard(log, begin, end, config)
            arrays = {f"state/{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            store.save(end, {**arrays, **{f"log/{name}": array for name, array in vars(log).items()}}, mine)
            if advanced is not None:
                advanced(end - begin, float(log.loss[end - 1]))
        trained = _finished(setup, state, log)
        write(folder, trained, config)
    return trained


@functools.partial(jax.jit, static_argnums=0)
def _accuracy(model: Model, params: Any, x: Array, y: Array) -> Array:
    return model.accuracy(params, x, y)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(algorithm: FedAlgorithm, state: FedState, key: Array, data: Any, rounds: int) -> Any:
    return federated.run(algorithm, state, key, ClientData(*data), rounds)


def late(key: Array, rounds: np.ndarray, m: int, straggle: float) -> np.ndarray:
    """Which of the m participants of each of `rounds` are stragglers (rounds, m): what `FedAlgorithm.round` draws."""
    if not straggle:
        return np.zeros((len(rounds), m), bool)
    drawn = jax.vmap(lambda t: jax.random.uniform(round_keys(key, t)[1], (m,)))(jnp.asarray(rounds))
    return np.asarray(drawn < straggle)


def write(folder: Path, trained: Trained, config: RunConfig) -> None:
    """params.safetensors, history.json and ledger.json."""
    save_weights(folder / "params.safetensors", trained.params)
    _write_json(folder / "history.json", {"config": dataclasses.asdict(config), "rounds": trained.history})
    _write_json(folder / "ledger.json", {**trained.ledger.to_json(), "privacy": trained.privacy})


def _write_json(path: Path, content: Any) -> None:
    atomic_write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _identity(setup: Setup, every: int) -> dict[str, Any]:
    """What makes another run of it: the settings, the chunks and the data themselves."""
    settings = json.loads(json.dumps(dataclasses.asdict(setup.config)))
    return {**settings, "checkpoint_every": every, "sha256": setup.dataset.digest}


def _check_same(saved: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    for name, value in mine.items():
        if saved.get(name) != value:
            what = f"{name} {saved.get(name)!r}" if name != "sha256" else "other data"
            raise InputError(f"expected a run of the same settings in {str(folder)!r}, it holds one of {what}")


def _restored(saved: Checkpoint, state: FedState) -> tuple[FedState, _Log]:
    leaves, tree = jax.tree.flatten(state)
    kept = [jnp.asarray(saved.arrays[f"state/{i}"], leaf.dtype) for i, leaf in enumerate(leaves)]
    log = _Log(**{field.name: saved.arrays[f"log/{field.name}"] for field in dataclasses.fields(_Log)})
    return jax.tree.unflatten(tree, kept), log


def _check_heard(log: _Log, begin: int, end: int, config: RunConfig) -> None:
    """Stragglers alone may leave a round empty; numbers that are not finite mean that the run is lost."""
    lost = ~log.heard[begin:end].any(1) & log.rejected(begin, end).any(1)
    if lost.any():
        number = begin + int(np.argmax(lost))
        raise InputError(
            f"expected a finite update from some client, got none in round {number}: "
            f"a rate below {config.rate}, or other data, is needed"
        )


def _finished(setup: Setup, state: FedState, log: _Log) -> Trained:
    config, compressor = setup.config, setup.algorithm.compressor
    rejected = log.rejected(0, config.rounds)
    ledger = Ledger(config.clients, arm=config.arm, d=compressor.d)
    history = []
    for t in range(config.rounds):
        on_time = log.taken[t][~log.late[t]]
        for client in on_time:
            ledger.sent_up(t, int(client), compressor.bytes_up)
        # everybody holds the weights, and so everybody is told the round's update
        for client in range(config.clients):
            ledger.sent_down(t, client, int(log.down[t]))
        accuracy, loss = float(log.accuracy[t]), float(log.loss[t])
        history.append(
            {
                "round": t,
                # the private mode reports none: it would be a release of its own
                "loss": None if config.private or not math.isfinite(loss) else loss,
                "accuracy": None if math.isnan(accuracy) else accuracy,
                "heard": log.taken[t][log.heard[t]].tolist(),
                "late": log.taken[t][log.late[t]].tolist(),
                "rejected": log.taken[t][rejected[t]].tolist(),
                "norm": float(log.norm[t]) if math.isfinite(log.norm[t]) else None,
                "bytes_up": ledger.round_bytes(t)[0],
                "bytes_down": ledger.round_bytes(t)[1],
            }
        )
    statement = None
    if setup.privacy is not None:
        # whoever was drawn took the steps, heard or not
        most = max(np.bincount(log.taken.ravel(), minlength=config.clients).tolist())
        statement = privacy_statement(setup.privacy, config.local_steps, most)
    return Trained(state.params, history, ledger, float(log.accuracy[-1]), statement)
