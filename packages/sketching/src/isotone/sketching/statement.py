"""What a private run says of itself, and where the seed of its noise lies."""

from __future__ import annotations

import functools
import os
import secrets
from pathlib import Path
from typing import Any

from isotone.shared.errors import InputError
from isotone.sketching.privacy import PrivacyConfig, epsilons

ADJACENCY = "add or remove one example of one client, whose number of examples is public"
TRUST = "local: every client clips and noises its own steps; server, other clients and listeners are not trusted"
PLANNED = "local, at the noise of the server's plan: this client demanded no epsilon of its own"
SOURCE = "jax.random, which is not a cryptographic source of noise"


def privacy_statement(config: PrivacyConfig, local_steps: int, rounds: int, trust: str = TRUST) -> dict[str, Any]:
    """What the releases of a client that took part in `rounds` rounds cost: K of them a round.

    Clients own different examples (parallel composition), so that it is what the run costs any example. Epsilon by
    Renyi divergence, and by privacy loss distributions where dp-accounting is installed (else null).
    """
    releases = local_steps * rounds
    loose, tight = _epsilons(config, releases)
    return {
        "adjacency": ADJACENCY,
        "trust": trust,
        "sampling": f"Poisson: each example enters each local step with probability {config.rate:g}, independently",
        "sampling_rate": config.rate,
        "clip": config.clip,
        "noise_multiplier": config.noise,
        "local_steps": local_steps,
        "rounds": rounds,
        "releases": releases,
        "delta": config.delta,
        "epsilon_rdp": loose,
        "epsilon_pld": tight,
        "noise_source": SOURCE,
    }


@functools.lru_cache(maxsize=64)
def _epsilons(config: PrivacyConfig, releases: int) -> tuple[float, float | None]:
    return epsilons(config.rate, config.noise, releases, config.delta)


def own_noise_seed(folder: Path, begun: bool, fixed: int | None = None) -> int:
    """The seed of a run's or a client's noise, `fixed` or in `folder`/noise.key, which its owner alone can read.

    Kept, since a resumed run must add the noise it added before: other noise on the same step would be a release
    more. Drawn from the system where there is none. Raises `InputError` where a run has `begun` and it is gone.
    """
    if fixed is not None:
        return fixed
    path = folder / "noise.key"
    if begun:
        try:
            return int(path.read_text(encoding="ascii"), 16)
        except (OSError, ValueError):
            raise InputError(f"expected the seed of this run's noise in {str(path)!r}, it is gone or torn") from None
    folder.mkdir(parents=True, exist_ok=True)
    # jax.random.key takes 32 bits of a seed where 64-bit numbers are off
    seed = secrets.randbits(32)
    temporary = folder / f".noise.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, f"{seed:08x}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    return seed
