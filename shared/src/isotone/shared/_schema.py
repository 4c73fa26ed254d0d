"""Schema 1 of the results files: every field, and what the fields say about each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from isotone.shared.errors import InputError

Check = tuple[Callable[[Any], bool], str]

# a path of the machine: two parts below a root, a home folder, a drive, a file address
_PATH = re.compile(r"(?:^|[\s\"'=(:,;\[])(?:/[\w.+@-]+/[\w.+@-]|~[\w-]*/|[A-Za-z]:\\|file://)")


def reaches(value: float | None, threshold: float | None, direction: str) -> bool | None:
    """Whether `value` is on the right side of `threshold`; None where either is missing."""
    if value is None or threshold is None:
        return None
    return bool(value >= threshold) if direction == "min" else bool(value <= threshold)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(pattern: str = r"(?s).*\S.*", words: str = "a text") -> Check:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value)), words


def _list(accepts: Callable[[Any], bool], words: str) -> Check:
    return lambda value: isinstance(value, list) and all(map(accepts, value)), words


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]} or null"


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values, " or ".join(map(repr, values))


_NUMBER: Check = (_is_number, "a finite number")
_AMOUNT: Check = (lambda value: _is_number(value) and value >= 0, "a finite number, 0 or more")
_COUNT: Check = (_is_count, "a whole number, 0 or more")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_STRING: Check = (lambda value: isinstance(value, str), "a string")

HEAD: dict[str, Check] = {
    "schema": (lambda value: _is_count(value) and value == 1, "1"),
    "package": _text(r"[a-z0-9]+(-[a-z0-9]+)*", "a package's name"),
    "version": _or_null(_text()),
    "commit": _or_null(_text(r"[0-9a-f]{40}|[0-9a-f]{64}", "a commit's hash")),
    "dirty": _or_null(_FLAG),
    "date": _text(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "a date such as 2026-01-31T12:00:00Z"),
    "command": _text(r"isotone \S.*", "a command that starts with isotone"),
    "scale": _one_of("smoke", "cpu", "gpu", "paper"),
    "seeds": _list(_is_count, "a list of whole numbers, 0 or more"),
    "data": _list(lambda value: isinstance(value, dict), "a list of objects"),
    "machine": (lambda value: isinstance(value, dict), "an object"),
    "seconds": _AMOUNT,
}
CLAIM: dict[str, Check] = {
    "id": _text(r"\S+", "a word"),
    "statement": _text(),
    "source": _text(),
    "unit": _STRING,
    "paper": _or_null((lambda value: isinstance(value, str) or _is_number(value), "a finite number, a string")),
    "measured": _or_null(_NUMBER),
    "spread": _or_null(_AMOUNT),
    "threshold": _or_null(_NUMBER),
    "direction": _one_of("min", "max"),
    "held": _or_null(_FLAG),
}
RATIO: dict[str, Check] = {
    "id": _text(r"\S+", "a word"),
    "work": _text(),
    "ours": _text(),
    "peer": _text(),
    "peer_version": _STRING,
    "ours_value": _AMOUNT,
    "peer_value": _AMOUNT,
    "unit": _STRING,
    "ratio": _AMOUNT,
    "target": _or_null(_NUMBER),
    "held": _or_null(_FLAG),
}
_DATA: dict[str, Check] = {
    "name": _text(),
    "sha256": _text(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits"),
}
_MACHINE: dict[str, Check] = {
    "cpu": _or_null(_text()),
    "cores": _or_null(_COUNT),
    "threads": _or_null(_COUNT),
    "memory_gib": _or_null(_AMOUNT),
    "gpu": _or_null(_text()),
    "python": _text(),
}
_FRAMEWORK = _or_null(_text())


def validate(document: Mapping[str, Any]) -> None:
    """Raise `InputError`, naming the field, unless `document` is a results file of schema 1."""
    if not isinstance(document, dict):
        raise InputError(f"expected an object, got {type(document).__name__}")
    kind, fields = ("ratios", RATIO) if "ratios" in document else ("claims", CLAIM)
    items = _list(lambda value: isinstance(value, dict), "a list of objects")
    _fields(document, {**HEAD, kind: items}, "")
    if kind == "ratios" and document["scale"] not in ("cpu", "gpu"):
        raise InputError(f"scale: expected 'cpu' or 'gpu' beside ratios, got {document['scale']!r}")
    if document["commit"] is None and document["dirty"] is not None:
        raise InputError(f"dirty: expected null without a commit, got {document['dirty']}")
    for number, item in enumerate(document["data"]):
        _fields(item, _DATA, f"data[{number}].")
    machine = document["machine"]
    frameworks = [name for name in ("torch", "jax") if name in machine]
    if not frameworks:
        raise InputError("machine: expected the field 'torch' or 'jax', found neither")
    _fields(machine, {**_MACHINE, **dict.fromkeys(frameworks, _FRAMEWORK)}, "machine.")
    seen = set()
    for number, item in enumerate(document[kind]):
        where = f"{kind}[{number}]."
        _fields(item, fields, where)
        if item["id"] in seen:
            raise InputError(f"{where}id: expected distinct names, got {item['id']!r} twice")
        seen.add(item["id"])
        (_agreeing_ratio if kind == "ratios" else _agreeing_claim)(item, where)
    for where, text in _strings(document, ""):
        if _PATH.search(text):
            raise InputError(f"{where}: expected no path of a machine, got {text!r}")


def _fields(item: Mapping[str, Any], fields: Mapping[str, Check], where: str) -> None:
    for name in (*fields, *item):
        if name not in item:
            raise InputError(f"{where}{name}: expected the field, found none")
        if name not in fields:
            raise InputError(f"{where}{name}: expected no such field")
    for name, (accepts, words) in fields.items():
        if not accepts(item[name]):
            raise InputError(f"{where}{name}: expected {words}, got {item[name]!r}")


def _agreeing_claim(item: Mapping[str, Any], where: str) -> None:
    expected = reaches(item["measured"], item["threshold"], item["direction"])
    if item["held"] is not expected:
        sign = ">=" if item["direction"] == "min" else "<="
        rule = f"{item['measured']} {sign} {item['threshold']}"
        raise InputError(f"{where}held: expected {expected} from {rule}, got {item['held']}")
    if item["measured"] is None and item["spread"] is not None:
        raise InputError(f"{where}spread: expected null where nothing was measured, got {item['spread']}")


def _agreeing_ratio(item: Mapping[str, Any], where: str) -> None:
    ours, peer, ratio = item["ours_value"], item["peer_value"], item["ratio"]
    if not (math.isclose(ratio * ours, peer, rel_tol=1e-6) or math.isclose(ratio * peer, ours, rel_tol=1e-6)):
        raise InputError(f"{where}ratio: expected {peer} over {ours} or its inverse, got {ratio}")
    expected = reaches(ratio, item["target"], "min")
    if item["held"] is not expected:
        rule = f"{ratio} >= {item['target']}"
        raise InputError(f"{where}held: expected {expected} from {rule}, got {item['held']}")


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{where}[{number}]")
