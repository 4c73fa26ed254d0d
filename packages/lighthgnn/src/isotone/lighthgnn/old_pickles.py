"""Reads the pickles that HyperGCN's and Planetoid's files are, without unpickling: nothing in them is ever called.

`pickletools` splits the file into opcodes; the few that plain data, NumPy arrays and scipy matrices need are
interpreted here, with constructors of our own for the few names allowed. Any other opcode or name is refused.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from isotone.shared.errors import InputError


class _Array:
    """An ndarray under construction."""

    value: np.ndarray

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        array = np.frombuffer(raw, dtype.value)
        self.value = array.reshape(shape, order="F" if fortran else "C").copy()


class _DType:
    """A dtype; its state only says the byte order."""

    def __init__(self, name: str) -> None:
        self.value = np.dtype(_text(name))
        if self.value.hasobject:
            raise InputError(f"expected an array of numbers, got dtype {self.value}")

    def set_state(self, state: Any) -> None:
        order: Any = _text(state[1])
        if order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Sparse:
    """A scipy CSR matrix; its state is its attributes."""

    value: Any

    def set_state(self, state: Any) -> None:
        fields = {_text(name): value for name, value in state.items()}
        shape = fields.get("_shape") or fields["shape"]
        parts = tuple(_plain(fields[name]) for name in ("data", "indices", "indptr"))
        self.value = scipy.sparse.csr_matrix(parts, tuple(shape))


def _scalar(dtype: _DType, data: Any) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(raw, dtype.value)[0].item()


_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(module, "_reconstruct"): lambda *_: _Array() for module in _ARRAY_MODULES},
    **{(module, "scalar"): _scalar for module in _ARRAY_MODULES},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): lambda name, *_: _DType(name),
    ("scipy.sparse.csr", "csr_matrix"): _Sparse,
    ("scipy.sparse._csr", "csr_matrix"): _Sparse,
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
    **{(module, "list"): list for module in ("__builtin__", "builtins")},
    **{(module, "set"): set for module in ("__builtin__", "builtins")},
    ("collections", "defaultdict"): lambda *_: {},
    ("collections", "OrderedDict"): lambda *_: {},
}
_MARK = object()
_IGNORED = {"PROTO", "FRAME", "STOP"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE"),
}


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Lists, dicts, sets, numbers, texts, arrays and CSR matrices in the pickle at `path`.

    Raises `InputError` on a file that is none, is cut short, or holds anything else.
    """
    data = Path(path).read_bytes()
    try:
        return _plain(_interpret(data))
    except InputError as error:
        raise InputError(f"{os.fspath(path)!r}: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError) as error:
        raise InputError(f"expected a whole pickle of plain data at {os.fspath(path)!r}: {error}") from None


def _interpret(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _IGNORED:
            continue
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_named(module, attribute))
        else:
            _combine(name, stack)
    if len(stack) != 1:
        raise InputError(f"expected one object, got {len(stack)}")
    return stack[0]


def _combine(name: str, stack: list[Any]) -> None:
    """The opcodes that take values from the stack."""
    if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("TUPLE", "LIST"):
        items = _since_mark(stack)
        stack.append(tuple(items) if name == "TUPLE" else items)
    elif name == "APPEND":
        item = stack.pop()
        stack[-1].append(item)
    elif name == "APPENDS":
        items = _since_mark(stack)
        stack[-1].extend(items)
    elif name == "ADDITEMS":
        items = _since_mark(stack)
        stack[-1].update(items)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        stack[-1][key] = value
    elif name == "SETITEMS":
        items = _since_mark(stack)
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, function = stack.pop(), stack.pop()
        if function not in _ALLOWED.values():
            raise InputError(f"expected a call of an allowed name, got {function!r}")
        stack.append(function(*arguments))
    elif name == "BUILD":
        state = stack.pop()
        stack[-1].set_state(state)
    else:
        raise InputError(f"expected plain data, got the opcode {name}")


def _named(module: str, name: str) -> Callable[..., Any]:
    try:
        return _ALLOWED[_text(module), _text(name)]
    except KeyError:
        raise InputError(f"expected plain data, got the name {module}.{name}") from None


def _since_mark(stack: list[Any]) -> list[Any]:
    position = max(i for i, item in enumerate(stack) if item is _MARK)
    items = stack[position + 1 :]
    del stack[position:]
    return items


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    if isinstance(value, (_Array, _DType, _Sparse)):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
