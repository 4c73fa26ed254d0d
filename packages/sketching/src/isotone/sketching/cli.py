"""`isotone sketching ...`: so far the verb `info` alone."""

from __future__ import annotations

from typing import NoReturn

from isotone.shared.cli import paper_app, run_main

app = paper_app("sketching", framework="jax")


def main() -> NoReturn:
    """Entry point of `isotone-sketching`."""
    run_main(app, "sketching")
