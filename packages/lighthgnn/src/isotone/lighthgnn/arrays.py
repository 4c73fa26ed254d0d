"""Arrays of a user's files: what cannot be read whole is one sentence that names the file."""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
import zlib

import numpy as np

from isotone.shared.errors import InputError

# zeroed bytes fail in NumPy's tokenizer of headers, in struct, or (an unknown method) as NotImplementedError
_BROKEN = (
    *(ValueError, OSError, EOFError, KeyError, RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError, struct.error),
)


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an npz by name, nothing unpickled; `InputError` where it is no npz, or not a whole one."""
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise _not_whole(path, "an npz of arrays", error) from None


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an npy, nothing unpickled; `InputError` where it is no npy, or not a whole one."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise _not_whole(path, "an array in npy form", error) from None


def _not_whole(path: str | os.PathLike[str], expected: str, error: BaseException) -> InputError:
    return InputError(f"expected {expected} at {os.fspath(path)!r}: {str(error) or type(error).__name__}")
