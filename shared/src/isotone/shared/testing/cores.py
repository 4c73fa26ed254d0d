"""How fast a core computes just now: limits of seconds are those of a reference core. Run as a script it prints it."""

from __future__ import annotations

import time

LOOP_SECONDS = 0.085
"""What the reference core takes for the loop below."""


def slowness() -> float:
    """How many times longer than the reference this core computes for a loop of Python, 1 at least."""
    begin = time.thread_time()
    [i & 7 for i in range(3_000_000)]
    return max(1.0, (time.thread_time() - begin) / LOOP_SECONDS)


if __name__ == "__main__":
    print(slowness())
