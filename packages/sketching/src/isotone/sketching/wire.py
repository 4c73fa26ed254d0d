"""The messages that travel, byte by byte: a header of 64 bytes and a payload of numbers, never a pickle.

| bytes | header, little-endian |
| --- | --- |
| 4 | magic "ISKW" |
| 1, 1, 1, 1 | version, kind, dtype of the values, 0 |
| 8, 8, 8 | seed of the sketch, d (numbers in the weights), s (values in the message) |
| 4, 4 | round, client |
| 4, 4 | places in the message, extra: levels of a quantisation, clients in a mean |
| 4, 4, 8 | length of the payload, CRC-32 of header and payload, 0 |

The payload: places (uint32) where there are some, then the scale (float32) of quantised values, then the values. The
checksum finds what a line tears or turns, not what somebody forges: there is no authentication here.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt32

from isotone.shared.errors import InputError

MAGIC, VERSION = b"ISKW", 1
KINDS = ("hello", "plan", "refused", "sketch", "mean", "weights", "plain", "sparse", "table", "factors", "quantized")
TEXTS = ("hello", "plan", "refused")
DTYPES = ("float32", "bfloat16", "int8", "bits", "text", "uint32")
_HEADER = struct.Struct("<4sBBBBQQQIIIIII8x")
HEADER = _HEADER.size
_BF16 = np.dtype(jnp.bfloat16)
LIMIT = 1 << 31
"""Bytes of the longest message that is read at all."""


@dataclass(frozen=True, eq=False)
class Message:
    """`values` (s,), and where they are not at all d places `places`; or `text`. `extra`: see the header's table.

    `dtype` "bits": `values` are whole steps from -`extra` to `extra`, each `scale` / `extra` wide. "uint32": they are
    words modulo 2^32, and no numbers before they are added (`integer.IntegerCode`).
    """

    kind: str
    seed: int = 0
    round: int = 0
    client: int = 0
    d: int = 0
    values: Float32[np.ndarray, " s"] | UInt32[np.ndarray, " s"] = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )
    places: UInt32[np.ndarray, " k"] | None = None
    extra: int = 0
    dtype: str = "float32"
    text: str = ""
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"expected a message of {', '.join(KINDS)}, got {self.kind!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"expected values of {', '.join(DTYPES)}, got {self.dtype!r}")
        if (self.dtype == "uint32") != (self.values.dtype == np.uint32):
            raise InputError(f"expected values of {self.dtype}, got {self.values.dtype}")

    @property
    def s(self) -> int:
        """Values in it."""
        return len(self.values)

    @property
    def numbers(self) -> np.ndarray:
        """`values`, of steps what they stand for."""
        if self.dtype != "bits":
            return self.values
        return (np.float32(self.scale) * self.values / np.float32(self.extra)).astype(np.float32)


@dataclass(frozen=True)
class Expected:
    """What a receiver waits for; None: anything. `limit`: bytes of the longest message."""

    kind: str | None = None
    seed: int | None = None
    round: int | None = None
    d: int | None = None
    s: int | None = None
    dtype: str | None = None
    clients: int | None = None
    limit: int = LIMIT


def encode(message: Message) -> bytes:
    """Header and payload. Raises `InputError` on values that are not finite or that their dtype can not hold."""
    payload = message.text.encode() if message.kind in TEXTS else _packed(message)
    dtype = "text" if message.kind in TEXTS else message.dtype
    places = 0 if message.places is None else len(message.places)
    front = (MAGIC, VERSION, KINDS.index(message.kind), DTYPES.index(dtype), 0)
    numbers = (message.seed, message.d, message.s, message.round, message.client, places, message.extra)
    try:
        header = _HEADER.pack(*front, *numbers, len(payload), 0)
    except struct.error:
        raise InputError(f"expected numbers that fit a header, got {numbers}") from None
    checksum = zlib.crc32(payload, zlib.crc32(header))
    return _HEADER.pack(*front, *numbers, len(payload), checksum) + payload


def payload_length(header: bytes, expected: Expected | None = None) -> int:
    """Bytes that follow a header. Raises `InputError` where it is no header of ours, or of too long a message: what a
    receiver asks before it takes in anything."""
    if len(header) < HEADER:
        raise InputError(f"expected a whole message, got a torn header of {len(header)} bytes")
    magic, version, kind, dtype, *_, length, _ = _HEADER.unpack(header[:HEADER])
    if magic != MAGIC:
        raise InputError(f"expected a message that begins with {MAGIC!r}, got {bytes(magic)!r}")
    if version != VERSION:
        raise InputError(f"expected messages of version {VERSION}, got {version}")
    if kind >= len(KINDS) or dtype >= len(DTYPES):
        raise InputError(f"expected a known kind and dtype, got {kind} and {dtype}")
    limit = LIMIT if expected is None else expected.limit
    if HEADER + length > limit:
        raise InputError(f"expected a message of at most {limit} bytes, got {HEADER + length}")
    return int(length)


def decode(data: bytes, expected: Expected | None = None) -> Message:
    """The message in `data`, all of it. Raises `InputError`, one sentence, on a torn or foreign one, one of another
    kind, seed, round or size than `expected`, and on numbers that are not finite."""
    wanted = expected or Expected()
    length = payload_length(data[:HEADER], wanted)
    if len(data) != HEADER + length:
        raise InputError(f"expected a whole message of {HEADER + length} bytes, got {len(data)}")
    *front, seed, d, s, t, client, places, extra, length, checksum = _HEADER.unpack(data[:HEADER])
    bare = _HEADER.pack(*front, seed, d, s, t, client, places, extra, length, 0)
    if zlib.crc32(data[HEADER:], zlib.crc32(bare)) != checksum:
        raise InputError("expected a message whose checksum is right, got a torn or corrupted one")
    kind, dtype = KINDS[front[2]], DTYPES[front[3]]
    found = {"kind": kind, "seed": seed, "round": t, "d": d, "s": s, "dtype": dtype}
    for name, value in found.items():
        asked = getattr(wanted, name)
        if asked is not None and value != asked:
            stale = " (stale)" if name == "round" and value < asked else ""
            raise InputError(f"expected a message of {name} {asked}, got {value}{stale}")
    if wanted.clients is not None and not 0 <= client < wanted.clients:
        raise InputError(f"expected a client from 0 to {wanted.clients - 1}, got {client}")
    if (dtype == "text") != (kind in TEXTS):
        raise InputError(f"expected {'text' if kind in TEXTS else 'numbers'} in a message of kind {kind}")
    head = {"kind": kind, "seed": seed, "round": t, "client": client, "d": d, "extra": extra, "dtype": dtype}
    body = data[HEADER:]
    if kind in TEXTS:
        try:
            return Message(**{**head, "text": body.decode()})
        except UnicodeDecodeError:
            raise InputError(f"expected UTF-8 in a message of kind {kind}") from None
    wanted_length = 4 * places + value_bytes(dtype, s, extra)
    if len(body) != wanted_length:
        raise InputError(f"expected {wanted_length} bytes for {places} places and {s} values, got {len(body)}")
    where = np.frombuffer(body[: 4 * places], "<u4") if places else None
    if where is not None and (places != s or int(where.max()) >= d or len(np.unique(where)) != places):
        raise InputError(f"expected {s} places, each once, below {d}, got others")
    values, scale = _unpacked(body[4 * places :], dtype, s, extra)
    if not (np.isfinite(values).all() and math.isfinite(scale)):
        raise InputError(f"expected finite numbers from client {client} in round {t}, got NaN or infinity")
    return Message(**{**head, "values": values, "places": where, "scale": scale})


def bits_of(levels: int) -> int:
    """Bits of a number of 2 `levels` + 1 values."""
    return math.ceil(math.log2(2 * levels + 1))


def value_bytes(dtype: str, s: int, levels: int = 1) -> int:
    """Bytes of s values, with the scale of quantised ones."""
    if dtype == "bits":
        return 4 + -(-bits_of(max(1, levels)) * s // 8)
    return {"float32": 4 * s, "uint32": 4 * s, "bfloat16": 2 * s, "int8": 4 + s}[dtype]


def _packed(message: Message) -> bytes:
    values = np.ascontiguousarray(message.values, "<u4" if message.dtype == "uint32" else "<f4")
    if not np.isfinite(values).all():
        raise InputError(f"expected finite numbers to send from client {message.client}, got NaN or infinity")
    front = b"" if message.places is None else np.ascontiguousarray(message.places, "<u4").tobytes()
    if message.places is not None and len(message.places) != len(values):
        raise InputError(f"expected a place for each of {len(values)} values, got {len(message.places)}")
    if message.dtype in ("float32", "uint32"):
        return front + values.tobytes()
    if message.dtype == "bfloat16":
        return front + values.astype(_BF16).view("<u2").tobytes()
    if message.dtype == "int8":
        scale = np.float32(np.abs(values).max(initial=0.0) / 127)
        steps = np.rint(values / scale) if scale > 0 else np.zeros_like(values)
        return front + np.float32(scale).astype("<f4").tobytes() + steps.astype(np.int8).tobytes()
    levels, steps = message.extra, np.rint(values).astype(np.int64)
    if levels < 1 or np.abs(steps).max(initial=0) > levels or not np.isfinite(message.scale):
        raise InputError(f"expected steps from -{levels} to {levels} of a finite scale, got others")
    return front + struct.pack("<f", message.scale) + _pack_bits(steps + levels, bits_of(levels))


def _unpacked(body: bytes, dtype: str, s: int, levels: int) -> tuple[np.ndarray, float]:
    """Values, and the scale of steps."""
    if dtype == "float32":
        return np.frombuffer(body, "<f4").astype(np.float32), 0.0
    if dtype == "uint32":
        return np.frombuffer(body, "<u4").astype(np.uint32), 0.0
    if dtype == "bfloat16":
        return np.frombuffer(body, "<u2").view(_BF16).astype(np.float32), 0.0
    scale = np.frombuffer(body[:4], "<f4")[0]
    if dtype == "int8":
        return (scale * np.frombuffer(body[4:], np.int8)).astype(np.float32), 0.0
    if levels < 1:
        raise InputError(f"expected at least 1 level of a quantisation, got {levels}")
    steps = _unpack_bits(body[4:], s, bits_of(levels)) - levels
    if np.abs(steps).max(initial=0) > levels:
        raise InputError(f"expected steps from -{levels} to {levels}, got others")
    return steps.astype(np.float32), float(scale)


def _pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """Whole numbers of `bits` bits each, end to end, the lowest bit first."""
    spread = (numbers[:, None] >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8).ravel(), bitorder="little").tobytes()


def _unpack_bits(data: bytes, count: int, bits: int) -> np.ndarray:
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    return flat.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))
