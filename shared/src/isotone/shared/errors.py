"""The line between a user's mistake and a bug.

A mistake (bad value, unknown option, a file that is not there) is one sentence on stderr and exit code 2.
Anything else is a bug: a traceback and exit code 1.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

USAGE_ERROR = 2
BUG = 1
INTERRUPTED = 130


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence: the value, and what was expected."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `InputError` where `value`, called `name`, is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"expected {name} to be a whole number of at least {least}, got {value!r}")


def run_app(app: Any, argv: Sequence[str], prog: str) -> int:
    """Run the typer application `app` on `argv` and return its exit code.

    `InputError`, usage errors and `OSError`s on a path named in `argv` become one line on stderr and exit
    code 2. Any other exception prints its traceback and gives exit code 1.
    """
    import typer
    import typer.main

    # typer carries click inside since 0.16 and depended on it before: take the class from typer's own public name
    usage_errors: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = typer.main.get_command(app).main(list(argv), prog_name=prog, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _say(prog, "interrupted", INTERRUPTED)
    except usage_errors as error:
        return _say(prog, error.format_message(), USAGE_ERROR)
    except InputError as error:
        return _say(prog, str(error), USAGE_ERROR)
    except BrokenPipeError:
        # the reader of our output went away (`| head`); keep the interpreter from failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG
    except OSError as error:
        if not _user_named(error, argv):
            traceback.print_exc()
            return BUG
        return _say(prog, f"{error.filename}: {error.strerror}", USAGE_ERROR)
    except Exception:
        traceback.print_exc()
        return BUG


def _say(prog: str, message: str, code: int) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _user_named(error: OSError, argv: Sequence[str]) -> bool:
    """Whether the error is about a path that stands in `argv`, or one inside a folder that does."""
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    culprit = os.path.abspath(error.filename)
    named = (os.path.abspath(word.split("=", 1)[-1]) for word in argv if word)
    return any(culprit == path or culprit.startswith(path + os.sep) for path in named)
