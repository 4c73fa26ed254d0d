"""Progress bars on stderr, silent where it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

# the display that is on the screen: a bar opened inside another becomes a second line of it
_display: Any = None


class Bar:
    """What `bar` yields; without a display it does nothing."""

    def __init__(self, display: Any = None, task: Any = None) -> None:
        self._display, self._task = display, task

    def advance(self, n: float = 1, **fields: object) -> None:
        """Move on by `n`; `fields` are shown beside the bar (`loss=0.31`)."""
        if self._display is None:
            return
        shown = {"fields": " ".join(f"{k}={_short(v)}" for k, v in fields.items())} if fields else {}
        self._display.update(self._task, advance=n, **shown)

    def resize(self, total: float) -> None:
        """Set the total, where it is known only later."""
        if self._display is not None:
            self._display.update(self._task, total=total)


@contextmanager
def bar(description: str, total: float | None = None, quiet: bool = False) -> Iterator[Bar]:
    """A progress bar of `total` steps (None: not known) for the length of the `with` block."""
    global _display
    if quiet or not sys.stderr.isatty():
        yield Bar()
    elif _display is not None:
        task = _display.add_task(description, total=total, fields="")
        try:
            yield Bar(_display, task)
        finally:
            _display.remove_task(task)
    else:
        with _new_display() as display:
            _display = display
            try:
                yield Bar(display, display.add_task(description, total=total, fields=""))
            finally:
                _display = None


def track(iterable: Iterable[T], description: str, total: float | None = None, quiet: bool = False) -> Iterator[T]:
    """The items of `iterable`, with a progress bar while they are taken."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, quiet) as shown:
        for item in iterable:
            yield item
            shown.advance()


def _new_display() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[fields]}", style="dim", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


def _short(value: object) -> str:
    try:
        return f"{value:.4g}" if not isinstance(value, (int, str)) else str(value)  # type: ignore[str-format]
    except (TypeError, ValueError):
        return str(value)
