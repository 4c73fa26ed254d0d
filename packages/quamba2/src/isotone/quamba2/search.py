"""Which blocks keep 16-bit activations: an evolutionary search at a fixed number of them (section 2, "W4AX").

The search of the paper is not released. Here fitness is the loss against the float model, or the next token's, on
calibration samples; a mutant swaps one block of each kind; a cross takes blocks of both parents down to the number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from isotone.quamba2.calibrate import batches, samples_of
from isotone.shared.errors import InputError, check_count

Blocks = frozenset[int]


def search_mixed_precision(
    model: Any,
    data: Iterable[Any],
    n_high: int = 14,
    population: int = 40,
    generations: int = 5,
    keep: float = 0.5,
    mutations: int = 10,
    crossovers: int = 10,
    seed: int = 0,
    teacher: Callable[[Tensor], Tensor] | None = None,
    samples: int = 16,
    on_generation: Callable[[int, float], None] | None = None,
) -> list[str]:
    """The precision of each block, "W4A8" or "W4A16", with exactly `n_high` of 16 bits; `model` is left set to it.

    `model`: a `QuambaForCausalLM` quantised with a_bits "mixed". `data`: samples of token ids. Fitness: the KL from
    `teacher`, a function from ids (b, l) to float logits (b, l, vocab), or without one the next token's cross-entropy.
    Each generation keeps the best part `keep` and adds `mutations` and `crossovers`. No set is measured twice.
    `on_generation(number, best)`. Raises `InputError` on numbers out of range and another kind of model.
    """
    layers = model.arch.layers
    for name, value in (("population", population), ("generations", generations)):
        check_count(name, value)
    for name, value in (("n_high", n_high), ("mutations", mutations), ("crossovers", crossovers)):
        check_count(name, value, 0)
    if n_high > layers:
        raise InputError(f"expected n_high of at most the model's {layers} blocks, got {n_high}")
    if not 0 < keep <= 1:
        raise InputError(f"expected keep above 0 and at most 1, got {keep}")
    if model.config.a_bits != "mixed":
        raise InputError(f"expected a model quantised with a_bits 'mixed', got {model.config.a_bits!r}")
    rows = batches(samples_of(data, samples, model.config.calib_len, model.arch.vocab))
    targets = [teacher(ids).log_softmax(-1) if teacher else None for ids in rows]

    def fitness(blocks: Blocks) -> float:
        model.set_precision(bits_of(blocks, layers))
        return _loss(model, rows, targets)

    best = evolve(fitness, layers, n_high, population, generations, keep, mutations, crossovers, seed, on_generation)
    model.set_precision(bits_of(best, layers))
    return ["W4A16" if bits == 16 else "W4A8" for bits in model.block_bits]


def bits_of(blocks: Blocks, layers: int) -> list[int]:
    """16 for each of `blocks`, 8 for the others."""
    return [16 if number in blocks else 8 for number in range(layers)]


def _loss(model: Any, rows: list[Tensor], targets: list[Tensor | None]) -> float:
    total, tokens = 0.0, 0
    for ids, target in zip(rows, targets, strict=True):
        ids = ids.to(model.device)
        found = model(ids).logits.float().log_softmax(-1)
        if target is None:
            total += float(F.nll_loss(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            tokens += ids[:, 1:].numel()
        else:
            total += float(F.kl_div(found, target.to(found.device), log_target=True, reduction="sum"))
            tokens += ids.numel()
    return total / max(tokens, 1)


def evolve(
    fitness: Callable[[Blocks], float],
    layers: int,
    count: int,
    population: int = 40,
    generations: int = 5,
    keep: float = 0.5,
    mutations: int = 10,
    crossovers: int = 10,
    seed: int = 0,
    on_generation: Callable[[int, float], None] | None = None,
) -> Blocks:
    """The set of `count` out of `layers` blocks with the least `fitness` that the search finds."""
    drawn = random.Random(seed)
    known: dict[Blocks, float] = {}

    def score(blocks: Blocks) -> tuple[float, list[int]]:
        if blocks not in known:
            known[blocks] = fitness(blocks)
        return known[blocks], sorted(blocks)

    members = sorted({frozenset(drawn.sample(range(layers), count)) for _ in range(population)}, key=sorted)
    for number in range(generations):
        members = sorted(members, key=score)[: max(1, round(keep * population))]
        if on_generation:
            on_generation(number, known[members[0]])
        parents = list(members)
        added = [mutant(drawn.choice(parents), layers, drawn) for _ in range(mutations)]
        added += [cross(drawn.choice(parents), drawn.choice(parents), count, drawn) for _ in range(crossovers)]
        members = sorted({*members, *added}, key=sorted)
    return min(members, key=score)


def mutant(blocks: Blocks, layers: int, drawn: random.Random) -> Blocks:
    """One block of 16 bits swapped with one of 8, where there are both."""
    others = sorted(set(range(layers)) - blocks)
    if not blocks or not others:
        return blocks
    return (blocks - {drawn.choice(sorted(blocks))}) | {drawn.choice(others)}


def cross(first: Blocks, second: Blocks, count: int, drawn: random.Random) -> Blocks:
    """`count` blocks of those that either parent has."""
    return frozenset(drawn.sample(sorted(first | second), count))
