"""Arms of a comparison: every way to a ticket, from the same weights, through the same training.

An arm is written METHOD[:OPTION][@init]:

- `cts` (reverse KL), `cts:OBJECTIVE`; `cts:OBJECTIVE+lagrangian`, `cts:OBJECTIVE+short` (an eighth of the epochs)
- `ltr` (keep 0.8 a round), `ltr:0.5` (another share), `ltr:7` (that many rounds); `ltr@init` is IMP
- `snip`, `grasp`, `synflow`; `snip:1`, `grasp:100`: rounds (1 where not given, 100 for SynFlow)
- `saliency:OBJECTIVE`, `saliency:OBJECTIVE+100` (in rounds), `magnitude`, `random`, `erk`
- `gmp`, gradual pruning during the one training; `dense`

Tickets are of the weights at the rewind point and trained from there; with `@init` of the initial weights.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import Array

from isotone.concrete_tickets import baselines, lottery
from isotone.concrete_tickets.batches import accuracy, check_data
from isotone.concrete_tickets.images import Images, load_images
from isotone.concrete_tickets.layout import Params, kept_count, named_weights
from isotone.concrete_tickets.models import Model, make_model
from isotone.concrete_tickets.objectives import OBJECTIVES, Batch, Network, resolve_objective
from isotone.concrete_tickets.search import SearchConfig, SearchResult, search
from isotone.concrete_tickets.ticket import LayerCollapse, Ticket
from isotone.concrete_tickets.training import Recipe, Trainer, train
from isotone.shared.errors import InputError

METHODS = ("cts", "ltr", "snip", "grasp", "synflow", "saliency", "magnitude", "random", "erk", "gmp", "dense")


@dataclass(frozen=True)
class Arm:
    """An arm's parts: `option` is None where not given."""

    method: str
    option: str | None = None
    at_init: bool = False

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Raises `InputError` on an unknown method or option."""
        name, at, where = text.partition("@")
        method, colon, option = name.partition(":")
        if method not in METHODS or (at and where != "init") or (colon and not option):
            raise InputError(f"expected an arm METHOD[:OPTION][@init] of {', '.join(METHODS)}, got {text!r}")
        arm = cls(method, option or None, bool(at))
        if arm.option is not None:
            arm._check(text)
        return arm

    def _check(self, text: str) -> None:
        option = str(self.option)
        if self.method in ("cts", "saliency"):
            name, plus, form = option.partition("+")
            resolve_objective(name)
            if plus and self.method == "cts" and form not in ("short", "lagrangian"):
                raise InputError(f"expected cts:OBJECTIVE+short or +lagrangian, got {text!r}")
            if plus and self.method == "saliency":
                _rounds(form, text)
        elif self.method == "ltr":
            lottery.rounds_to(0.5, self.keep(0.5))
        elif self.method in ("snip", "grasp", "synflow"):
            _rounds(option, text)
        else:
            raise InputError(f"expected no option for {self.method}, got {text!r}")

    def keep(self, density: float) -> float:
        """The share that a round of `ltr` keeps."""
        if self.option is None:
            return 0.8
        try:
            value = float(self.option)
        except ValueError:
            raise InputError(f"expected ltr:SHARE or ltr:ROUNDS, got {self.option!r}") from None
        return density ** (1 / value) if self.option.isdigit() and value >= 1 else value


def _rounds(option: str, text: str) -> int:
    if not (option.isdecimal() and option.isascii() and int(option) >= 1):
        raise InputError(f"expected a number of rounds, got {text!r}")
    return int(option)


@dataclass(frozen=True)
class Start:
    """What the arms of one seed share: the initial weights, those of the rewind point, and the key of the training."""

    initial: Params
    rewind: Params
    key: Array

    def weights(self, at_init: bool) -> Params:
        return self.initial if at_init else self.rewind


@dataclass(frozen=True)
class Outcome:
    """An arm's result. Seconds: to the ticket, and of the sparse training after it."""

    ticket: Ticket
    accuracy: float
    ticket_seconds: float
    train_seconds: float
    search: SearchResult | None = None

    def summary(self) -> dict[str, Any]:
        """What JSON can say of it."""
        return {
            "accuracy": 100 * self.accuracy,
            "ticket_seconds": self.ticket_seconds,
            "train_seconds": self.train_seconds,
            "kept": self.ticket.kept,
            "layers": self.ticket.layer_densities(),
            "collapsed": self.ticket.collapsed(),
        }


@dataclass(frozen=True, eq=False)
class Experiment:
    """One network on one data set with one recipe. `rewind` epochs of it come before the rewind point."""

    images: Images
    model: Model
    recipe: Recipe
    rewind: int = 3
    config: SearchConfig = SearchConfig()
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rewind < self.recipe.epochs:
            raise InputError(f"expected a rewind epoch from 0 to {self.recipe.epochs - 1}, got {self.rewind}")

    @classmethod
    def load(
        cls, data: str, model: str, recipe: Recipe, rewind: int = 3, config: SearchConfig | None = None
    ) -> Experiment:
        """The network called `model` on the data that `data` names (images.py)."""
        images = load_images(data)
        check_data(images.train, recipe.batch_size, images.classes)
        network = make_model(model, images.shape, images.classes)
        return cls(images, network, recipe, rewind, config or SearchConfig())

    @functools.cached_property
    def trainer(self) -> Trainer:
        augment = self.images.augment if self.augment else None
        return Trainer(self.model.apply, self.recipe, self.images.prepare, augment)

    @functools.cached_property
    def data(self) -> tuple[Array, Array]:
        """The training part, on the device whole."""
        return jax.device_put(self.images.train)

    @functools.cached_property
    def test(self) -> tuple[Array, Array]:
        return jax.device_put(self.images.test)

    def start(self, seed: int) -> Start:
        """Initial weights of the seed, and those after `rewind` epochs."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        initial = self.model.init(jax.random.key(seed))
        dense = Ticket.dense(initial, self.model.where)
        rewind = train(self.trainer, initial, self.data, key=key, ticket=dense, last=self.rewind).params
        return Start(initial, rewind, key)

    def finish(self, start: Start, ticket: Ticket | None, at_init: bool = False, weights: Params = None) -> Any:
        """Train `ticket` to the end of the recipe: `(params, test accuracy, seconds)`."""
        begin = time.perf_counter()
        params = start.weights(at_init) if weights is None else weights
        # the ticket of everything, not None: a mask is an argument, and one compile serves all
        ticket = Ticket.dense(params, self.model.where) if ticket is None else ticket
        first = 0 if at_init else self.rewind
        trained = train(self.trainer, params, self.data, key=start.key, ticket=ticket, first=first).params
        seconds = time.perf_counter() - begin
        return trained, self.evaluate(trained), seconds

    def evaluate(self, params: Params) -> float:
        """Test accuracy, 0 to 1."""
        return accuracy(self.model.apply, params, self.test, self.images.prepare)

    def search(self, start: Start, density: float | None, arm: Arm, seed: int, **more: Any) -> SearchResult:
        """The search of a `cts` arm."""
        objective, _, form = (arm.option or "kl").partition("+")
        config = self.config
        if form == "lagrangian":
            config = dataclasses.replace(config, controller="lagrangian")
        elif form == "short":
            config = dataclasses.replace(config, epochs=max(1, config.epochs // 8))
        return search(
            *(self.model.apply, start.weights(arm.at_init), self.data, density, objective),
            key=jax.random.fold_in(jax.random.key(seed), 2),
            config=config,
            where=self.model.where,
            features_fn=self.model.features,
            prepare=self.images.prepare,
            **more,
        )

    def run(self, text: str, density: float, seed: int, start: Start, folder: Path | None = None) -> Outcome:
        """One arm from its beginning to the accuracy of the trained sparse network.

        `folder`: where an `ltr` arm keeps its rounds, to go on with them.
        """
        arm = Arm.parse(text)
        with quiet_collapse():
            begin = time.perf_counter()
            if arm.method == "gmp":
                trained, ticket = lottery.gradual_magnitude(
                    self.trainer, start.initial, self.data, density, key=start.key, where=self.model.where
                )
                seconds = time.perf_counter() - begin
                return Outcome(ticket, self.evaluate(trained.params), 0.0, seconds)
            ticket, result = self._ticket(arm, density, seed, start, folder)
            jax.block_until_ready(ticket.masks)
            # of rounds that were run earlier their own seconds, not those of reading them
            ticket_seconds = time.perf_counter() - begin if folder is None else lottery.round_seconds(folder)
        _, correct, seconds = self.finish(start, ticket, arm.at_init)
        return Outcome(ticket, correct, ticket_seconds, seconds, result)

    def warm(self, text: str, density: float, seed: int, start: Start) -> None:
        """Compile what `run` of this arm runs, by its ticket, where that takes no training, and one epoch."""
        arm = Arm.parse(text)
        with quiet_collapse():
            trains = arm.method in ("ltr", "gmp")
            ticket = baselines.magnitude(start.rewind, density, self.model.where)
            if not trains:
                ticket, _ = self._ticket(arm, density, seed, start, None)
            trained = train(self.trainer, start.rewind, self.data, key=start.key, ticket=ticket, last=1)
            if trains:
                lottery.prune_magnitude(trained.params, ticket, density)
            self.evaluate(trained.params)

    def _ticket(
        self, arm: Arm, density: float, seed: int, start: Start, folder: Path | None
    ) -> tuple[Ticket, SearchResult | None]:
        params, where, apply_fn = start.weights(arm.at_init), self.model.where, self.model.apply
        rounds = int(arm.option or 1) if arm.method in ("snip", "grasp", "synflow") else 1
        key = jax.random.fold_in(jax.random.key(seed), 3)
        if arm.method == "cts":
            result = self.search(start, density, arm, seed)
            return result.ticket, result
        if arm.method == "ltr":
            first = 0 if arm.at_init else self.rewind

            def train_fn(weights: Params, ticket: Ticket) -> Params:
                return train(self.trainer, weights, self.data, key=start.key, ticket=ticket, first=first).params

            keep = arm.keep(density)
            said = {"training": self.said(), "first": first}
            rounds_of = functools.partial(lottery.imp, keep=keep, where=where, folder=folder, identity=said)
            return rounds_of(train_fn, params, density)[-1], None
        if arm.method in ("snip", "grasp", "saliency"):
            batch = self.batch(seed)
            if arm.method == "saliency":
                objective, _, form = (arm.option or "loss").partition("+")
                rounds, features = int(form or 1), self.model.features
                return baselines.saliency(apply_fn, params, batch, density, objective, rounds, where, features), None
            score = baselines.snip if arm.method == "snip" else baselines.grasp
            return score(apply_fn, params, batch, density, rounds, where), None
        if arm.method == "synflow":
            one = self._prepared(self.data[0][:1])
            return baselines.synflow(self.model.linear, params, one, density, int(arm.option or 100), where), None
        if arm.method == "magnitude":
            return baselines.magnitude(params, density, where), None
        if arm.method == "random":
            return baselines.random_ticket(params, density, key, where=where), None
        if arm.method == "erk":
            return baselines.erk(params, density, key, where), None
        return Ticket.dense(params, where), None

    def said(self) -> dict[str, Any]:
        """What JSON can say of the training: data, network, recipe."""
        facts = {"data": self.images.sha256, "network": self.model.name, "augment": self.augment}
        return {**facts, "recipe": dataclasses.asdict(self.recipe)}

    def batch(self, seed: int) -> Batch:
        """Ten examples of each class: SNIP's and GraSP's batch."""
        batch = baselines.balanced_batch(self.images.train, 10, seed)
        return Batch(self._prepared(batch.inputs), batch.labels)

    def _prepared(self, inputs: Any) -> Any:
        return inputs if self.images.prepare is None else self.images.prepare(inputs)

    def objective_values(self, params: Params, ticket: Ticket, names: tuple[str, ...]) -> dict[str, float]:
        """The objectives of the exact ticket at frozen weights, over a thousand examples of the training part."""
        inputs, labels = (part[:1000] for part in self.images.train)
        values = _values(self.model, tuple(named_weights(params, self.model.where)), names, self.images.prepare)
        return {n: float(v) for n, v in values(params, ticket.apply(params), inputs, labels).items()}

    def count(self, params: Params, density: float) -> int:
        """Weights to be kept at a density."""
        return kept_count(density, sum(w.size for w in named_weights(params, self.model.where).values()))


@contextmanager
def quiet_collapse() -> Iterator[None]:
    """No `LayerCollapse` warnings: an outcome says it, and a timing does not ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapse)
        yield


@functools.cache
def _values(model: Model, leaves: tuple[str, ...], names: tuple[str, ...], prepare: Any) -> Any:
    @jax.jit
    def values(params: Params, sparse: Params, inputs: Array, labels: Array) -> dict[str, Array]:
        batch = Batch(inputs if prepare is None else prepare(inputs), labels)
        nets = [Network(model.apply, p, leaves, model.features) for p in (sparse, params)]
        return {name: OBJECTIVES[name](nets[0], nets[1], batch, jax.random.key(0)) for name in names}

    return values
