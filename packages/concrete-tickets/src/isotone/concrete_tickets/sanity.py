"""Sanity checks of a ticket: whether WHICH weights are kept matters, or only how many in each layer.

(a) the mask shuffled inside each layer, (b) the ticket of the lowest logits, (c) the weights drawn again (which says
something of tickets from the initial weights alone). A ticket passes a check where the change hurts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import Array

from isotone.concrete_tickets.layout import Masks, Params
from isotone.concrete_tickets.ticket import Ticket, random_reinitialise

Evaluate = Callable[[Params, Ticket], float]
"""`evaluate(rewind_params, ticket) -> accuracy` (0 to 1) of the sparse network after its training."""


@dataclass(frozen=True)
class SanityReport:
    """Accuracies, 0 to 1: of the ticket and of each change by name; `tickets` by the same names."""

    accuracy: float
    changed: dict[str, float]
    tickets: dict[str, Ticket]

    def passed(self, margin: float = 0.0) -> dict[str, bool]:
        """Whether each change costs more than `margin` of accuracy."""
        return {name: self.accuracy - value > margin for name, value in self.changed.items()}


def sanity_check(
    ticket: Ticket,
    params: Params,
    evaluate: Evaluate,
    *,
    key: Array,
    scores: Masks | None = None,
    accuracy: float | None = None,
) -> SanityReport:
    """Train and evaluate the ticket and its changes: "shuffled", "reinitialised" and, with `scores` (the logits by
    leaf), "inverted". `accuracy`: of the ticket itself, where it is known already."""
    ticket.check(params)
    shuffle_key, draw_key = (jax.random.fold_in(key, number) for number in (1, 2))
    tickets = {"shuffled": ticket.shuffle_layers(shuffle_key)}
    if scores:
        tickets["inverted"] = ticket.invert(scores)
    changed = {name: evaluate(params, other) for name, other in tickets.items()}
    changed["reinitialised"] = evaluate(random_reinitialise(params, ticket.masks, draw_key), ticket)
    tickets["reinitialised"] = ticket
    own = evaluate(params, ticket) if accuracy is None else accuracy
    return SanityReport(own, changed, tickets)
