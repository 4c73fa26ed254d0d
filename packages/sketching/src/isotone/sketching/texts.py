"""What the commands' options say, out of their texts. All raise `InputError` on others, naming the option."""

from __future__ import annotations

from isotone.shared.errors import InputError


def global_step(text: str) -> str | float:
    """ "auto", or the number."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"expected --eta-g to be auto or a number, got {text!r}") from None


def shape_of(text: str) -> tuple[int, ...]:
    """Of an example: "8,8,1"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"expected --shape as numbers by commas such as 8,8,1, got {text!r}") from None


def numbers_in(text: str, option: str) -> tuple[float, ...]:
    """Numbers by commas; none where there is no text."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"expected {option} as numbers by commas, got {text!r}") from None


def whole_in(text: str, option: str, least: int) -> tuple[int, ...]:
    """Whole numbers by commas, one or more, each at least `least`."""
    found = numbers_in(text, option)
    if not found or any(not value.is_integer() or value < least for value in found):
        raise InputError(f"expected {option} as whole numbers from {least} by commas, got {text!r}")
    return tuple(int(value) for value in found)
