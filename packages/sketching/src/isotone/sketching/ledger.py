"""Who sent how many bytes in which round: counted, not computed, wherever there is a wire to count at."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from isotone.shared.errors import InputError, check_count

SCHEMA = 1


@dataclass
class Ledger:
    """Bytes up (client to server) and down of `clients` clients, by round.

    `other`: bytes that belong to no round: greetings, plans, what a late joiner is told of rounds gone by.
    """

    clients: int
    arm: str = ""
    d: int = 0
    up: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    down: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    other: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def __post_init__(self) -> None:
        check_count("clients", self.clients, 1)

    def sent_up(self, round: int, client: int, count: int) -> None:
        """`count` bytes more from `client` in `round`."""
        self._check(round, client, count)
        self.up[round, client] += count

    def sent_down(self, round: int, client: int, count: int) -> None:
        """`count` bytes more to `client` in `round`."""
        self._check(round, client, count)
        self.down[round, client] += count

    def sent_aside(self, direction: str, count: int) -> None:
        """`count` bytes more that belong to no round; `direction` "up" or "down"."""
        check_count("bytes", count, 0)
        self.other[direction] += count

    def _check(self, round: int, client: int, count: int) -> None:
        check_count("round", round, 0)
        check_count("bytes", count, 0)
        if not 0 <= client < self.clients:
            raise InputError(f"expected a client from 0 to {self.clients - 1}, got {client}")

    def round_bytes(self, round: int) -> tuple[int, int]:
        """(up, down) of all clients in one round."""
        pairs = ((direction.get((round, c), 0) for c in range(self.clients)) for direction in (self.up, self.down))
        up, down = (sum(counts) for counts in pairs)
        return up, down

    def client_bytes(self, client: int) -> tuple[int, int]:
        """(up, down) of one client in all rounds."""
        up, down = (sum(n for (_, c), n in way.items() if c == client) for way in (self.up, self.down))
        return up, down

    @property
    def rounds(self) -> int:
        """How many rounds something was sent in, counted from 0."""
        return 1 + max((t for t, _ in [*self.up, *self.down]), default=-1)

    @property
    def total(self) -> tuple[int, int]:
        """(up, down) of everybody, what belongs to no round left out."""
        return sum(self.up.values()), sum(self.down.values())

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON can say it: `rounds[t]` = {up: [bytes of each client], down: [...]}."""
        rows = [
            {
                "up": [self.up.get((t, c), 0) for c in range(self.clients)],
                "down": [self.down.get((t, c), 0) for c in range(self.clients)],
            }
            for t in range(self.rounds)
        ]
        up, down = self.total
        facts = {"schema": SCHEMA, "arm": self.arm, "d": self.d, "clients": self.clients}
        return {**facts, "bytes_up": up, "bytes_down": down, "other": dict(self.other), "rounds": rows}

    @classmethod
    def from_json(cls, content: Any) -> Ledger:
        """What `to_json` gave. Raises `InputError` on anything else, sums that do not agree included."""
        try:
            if content["schema"] != SCHEMA:
                raise InputError(f"expected a ledger of schema {SCHEMA}, got {content['schema']!r}")
            found = cls(content["clients"], content["arm"], content["d"])
            for t, row in enumerate(content["rounds"]):
                for way, add in (("up", found.sent_up), ("down", found.sent_down)):
                    if len(row[way]) != found.clients:
                        raise InputError(f"expected {found.clients} clients in round {t}, got {len(row[way])}")
                    for client, count in enumerate(row[way]):
                        if count != 0:
                            add(t, client, count)
            for way in ("up", "down"):
                found.sent_aside(way, content["other"][way])
            if found.total != (content["bytes_up"], content["bytes_down"]):
                said = (content["bytes_up"], content["bytes_down"])
                raise InputError(f"expected the rounds of a ledger to add up to {said}, got {found.total}")
        except (KeyError, TypeError, AttributeError):
            raise InputError("expected a ledger, got other JSON") from None
        return found

    @classmethod
    def parse(cls, text: str) -> Ledger:
        """The ledger in a JSON text. Raises `InputError` on a torn one."""
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError:
            raise InputError("expected a ledger, got a torn or other file") from None
