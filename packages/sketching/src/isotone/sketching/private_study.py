"""Accuracy of the private mode at an epsilon, by what is protected and who is trusted, and the accountants beside it.

"local": an example, every client noises its own steps. "local, not sketched": the same without a sketch. "central": an
example, clients add shares of the noise and only their sum is seen, as secure aggregation makes it. "client": all of a
client's examples at once, its difference clipped whole, the noise in shares. Rate and rounds are chosen on a validation
split with a seed of its own; what that choice costs in privacy is not counted, as is usual.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from isotone.shared.errors import InputError
from isotone.sketching import federated, privacy
from isotone.sketching.compiling import fast_jit
from isotone.sketching.compressors import Compressor
from isotone.sketching.data import ClientData, Dataset
from isotone.sketching.federated import fed_algorithm
from isotone.sketching.models import Model, make_model
from isotone.sketching.privacy import PrivacyConfig
from isotone.sketching.study import Dealt, Setting, compressors, dealt, starts
from isotone.sketching.training import run_keys

TRUSTS = ("local", "local, not sketched", "central", "client")


@dataclass(frozen=True)
class PrivateSetting:
    """`epsilons` at `delta`; `clip` C; `sampling` q of Poisson; `rounds` and `rates` to choose from; one private local
    step a round (with K of them a round is K releases), but for "client", where a round is a release whatever K is."""

    epsilons: tuple[float, ...] = (1.0, 8.0, 64.0)
    delta: float = 1e-5
    clip: float = 1.0
    sampling: float = 0.2
    rounds: tuple[int, ...] = (40, 160)
    rates: tuple[float, ...] = (0.5, 2.0, 8.0, 32.0)
    tuning_seed: int = 100


def private(
    source: Dataset, setting: Setting, mode: PrivateSetting, trust: str, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A row (JSON) for each epsilon: `noise` multiplier, `releases`, `rate`, `rounds`, `accuracy` by seed, %.

    Raises `InputError` on a trust that is not one of `TRUSTS`.
    """
    if trust not in TRUSTS:
        raise InputError(f"expected a trust of {', '.join(TRUSTS)}, got {trust!r}")
    model = make_model(setting.model, source.x.shape[1:], source.classes, setting.hidden)
    arm = "fedavg" if trust == "local, not sketched" else "srht"
    compressor = compressors(model.init(jax.random.key(0)), setting)[arm]
    sampling = 1.0 if trust == "client" else mode.sampling
    config = PrivacyConfig(mode.clip, 1.0, sampling, mode.delta)
    noises = {t: [privacy.calibrate(e, mode.delta, sampling, t) for e in mode.epsilons] for t in mode.rounds}

    def run(
        split: Any, rounds: int, noises: Sequence[float], rates: Sequence[float], seeds: Sequence[int]
    ) -> np.ndarray:
        """Accuracies (seeds, noises, rates)."""
        given = (dealt(source, setting, seeds), starts(model, seeds), (jnp.asarray(split[0]), jnp.asarray(split[1])))
        each = (jnp.asarray(noises, jnp.float32), jnp.asarray(rates, jnp.float32), jnp.asarray(list(seeds)))
        return np.asarray(_run(model, setting, compressor, config, trust, rounds, *given, *each))

    choices = [(t, rate) for t in mode.rounds for rate in mode.rates]
    scores = np.zeros((len(mode.epsilons), 1))
    if len(choices) > 1:
        valid = (source.x[-setting.valid :], source.y[-setting.valid :])
        each = [run(valid, t, noises[t], mode.rates, (mode.tuning_seed,))[0] for t in mode.rounds]
        scores = np.concatenate(each, 1)
    found = []
    for number, epsilon in enumerate(mode.epsilons):
        rounds, rate = choices[int(scores[number].argmax())]
        noise = noises[rounds][number]
        result = run((source.test_x, source.test_y), rounds, [noise], [rate], seeds)
        found.append(
            {
                "trust": trust,
                "epsilon": epsilon,
                "noise": noise,
                "rounds": rounds,
                "rate": rate,
                "accuracy": [100 * float(value) for value in result[:, 0, 0]],
                **accounts(epsilon, mode.delta, sampling, rounds, noise),
            }
        )
    return found


def accounts(epsilon: float, delta: float, sampling: float, releases: int, noise: float) -> dict[str, Any]:
    """The accountants side by side: `rdp` and, where dp-accounting is installed, `pld`, the epsilons of `noise`; the
    multiplier `theorem` that the theorem's composition asks for at `epsilon`."""
    loose, tight = privacy.epsilons(sampling, noise, releases, delta)
    return {
        "delta": delta,
        "sampling": sampling,
        "releases": releases,
        "rdp": loose,
        "pld": tight,
        "theorem": privacy.theorem_sigma(epsilon, delta, sampling, 1, releases),
    }


@functools.partial(fast_jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _run(
    model: Model,
    setting: Setting,
    compressor: Compressor,
    config: PrivacyConfig,
    trust: str,
    rounds: int,
    data: Dealt,
    params: Any,
    test: tuple[Array, Array],
    noises: Array,
    rates: Array,
    seeds: Array,
) -> Array:
    def one(noise: Array, rate: Array, seed: Array, own: Dealt, params: Any) -> Array:
        (_, key), mine = run_keys(seed), ClientData(*own)
        make = functools.partial(fed_algorithm, model.loss, params, compressor)
        if trust == "client":
            plain = make(client_opt=optax.sgd(rate), local_steps=setting.local_steps, batch=setting.batch)
            local = privacy.private_client(plain.local, config.clip, noise, setting.clients, seed + 1000)
        else:
            shares = setting.clients if trust == "central" else 1
            local = privacy.private_local(model.loss, config, 1, rate, seed + 1000, clients=shares, noise=noise)
        algorithm = make(local_update=local, weigh="size" if trust == "central" else "equal")
        state, _ = federated.run(algorithm, algorithm.init(params, setting.clients), key, mine, rounds)
        return model.accuracy(state.params, *test)

    over_rates = jax.vmap(one, (None, 0, None, None, None))
    over_noises = jax.vmap(over_rates, (0, None, None, None, None))
    return jax.vmap(over_noises, (None, None, 0, 0, 0))(noises, rates, seeds, data, params)
