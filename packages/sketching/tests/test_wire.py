"""Messages: what they hold comes back, what is not whole and meant is refused, and bytes counted at a socket."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.shared.errors import InputError
from isotone.sketching import wire
from isotone.sketching.compressors import QSGD, FetchSGD, Plain, PowerSGD, Sketched, TopK
from isotone.sketching.exchange import Loopback, measure_bytes, read_exactly
from isotone.sketching.integer import IntegerCode, IntegerSketch
from isotone.sketching.rounding import RoundedSketch
from isotone.sketching.trees import tree_sketch
from isotone.sketching.wire import HEADER, Expected, Message, decode, encode

PARAMS = {"1": {"w": jnp.zeros((20, 12)), "b": jnp.zeros(12)}, "2": {"w": jnp.zeros((12, 5)), "b": jnp.zeros(5)}}
D = 317


def message(**changes):
    values = np.linspace(-1, 1, 7, dtype=np.float32)
    return Message(
        **{"kind": "sketch", "seed": 2**63 + 5, "round": 4, "client": 2, "d": D, "values": values, **changes}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_values_come_back(dtype):
    assert HEADER == 64
    sent = message(dtype=dtype)
    data = encode(sent)
    assert len(data) == HEADER + {"float32": 28, "bfloat16": 14, "int8": 4 + 7}[dtype]
    back = decode(data)
    assert (back.kind, back.seed, back.round, back.client, back.d) == ("sketch", 2**63 + 5, 4, 2, D)
    step = {"float32": 0, "bfloat16": 2**-9, "int8": 0.5 / 127 + 1e-6}[dtype]
    assert np.abs(back.values - sent.values).max() <= step
    # what came once over the wire loses nothing more
    assert np.allclose(decode(encode(message(values=back.values, dtype=dtype))).values, back.values, rtol=1e-6)
    assert decode(encode(message(values=np.zeros(3, np.float32), dtype=dtype))).values.tolist() == [0, 0, 0]


def test_words_come_back():
    words = np.array([0, 2**32 - 1, 2**31], np.uint32)
    back = decode(encode(message(values=words, dtype="uint32")))
    assert back.values.dtype == np.uint32 and np.array_equal(back.values, words)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_packed_steps_come_back(levels, count, seed):
    steps = np.random.default_rng(seed).integers(-levels, levels + 1, count).astype(np.float32)
    sent = message(kind="quantized", values=steps, extra=levels, scale=2.5, dtype="bits")
    data = encode(sent)
    assert len(data) == HEADER + 4 + -(-wire.bits_of(levels) * count // 8)
    back = decode(data)
    assert np.array_equal(back.values, steps) and np.allclose(back.numbers, 2.5 * steps / levels)


def test_places_and_texts_come_back():
    places = np.array([300, 2, 17], np.uint32)
    back = decode(encode(message(kind="sparse", values=np.ones(3, np.float32), places=places)))
    assert back.places.tolist() == [300, 2, 17] and back.s == 3
    assert decode(encode(Message("plan", text="{'a': 'ä'}"))).text == "{'a': 'ä'}"


def reseal(data):
    """The same bytes with the checksum that belongs to them."""
    front = data[: HEADER - 12] + bytes(12)
    return data[: HEADER - 12] + struct.pack("<I8x", zlib.crc32(data[HEADER:], zlib.crc32(front))) + data[HEADER:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:20], "torn header"),
        (lambda d: d[:-1], "whole message"),
        (lambda d: d + b"\0", "whole message"),
        (lambda d: b"GET " + d[4:], "ISKW"),
        (lambda d: d[:4] + b"\x07" + d[5:], "version"),
        (lambda d: d[:5] + b"\xff" + d[6:], "kind"),
        (lambda d: d[:6] + b"\xff" + d[7:], "dtype"),
        (lambda d: d[:-3] + bytes([d[-3] ^ 1]) + d[-2:], "checksum"),
        (lambda d: d[:34] + bytes([d[34] ^ 1]) + d[35:], "checksum"),
        # whole and well sealed, and still not what is meant
        (lambda d: reseal(d[:-4] + struct.pack("<f", float("nan"))), "NaN"),
        (lambda d: reseal(d[:-4] + struct.pack("<f", float("inf"))), "NaN"),
        (lambda d: reseal(d[:24] + struct.pack("<Q", 9) + d[32:]), "bytes for"),
        (lambda d: reseal(d[:6] + bytes([wire.DTYPES.index("text")]) + d[7:]), "numbers"),
        (lambda d: reseal(d[:6] + bytes([wire.DTYPES.index("bits")]) + d[7:]), "bytes for"),
        (lambda d: reseal(d[:5] + bytes([wire.KINDS.index("plan")]) + d[6:]), "text"),
    ],
)
def test_what_is_not_whole_is_refused(change, words):
    data = encode(message())
    assert reseal(data) == data
    with pytest.raises(InputError, match=words) as found:
        decode(change(data))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (Expected(round=5), r"round 5, got 4 \(stale\)"),
        (Expected(round=3), "round 3, got 4$"),
        (Expected(seed=1), "seed"),
        (Expected(kind="mean"), "kind"),
        (Expected(s=8), "s 8, got 7"),
        (Expected(d=D + 1), "of d"),
        (Expected(clients=2), "client"),
        (Expected(dtype="int8"), "dtype int8, got float32"),
        (Expected(limit=HEADER + 27), "at most"),
    ],
)
def test_what_is_not_meant_is_refused(expected, words):
    with pytest.raises(InputError, match=words):
        decode(encode(message()), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: message(values=np.array([np.nan], np.float32)),
        lambda: message(kind="sparse", places=np.arange(3, dtype=np.uint32)),
        lambda: message(kind="quantized", extra=1, values=np.full(3, 2, np.float32), dtype="bits"),
        lambda: message(kind="quantized", extra=0, dtype="bits"),
        lambda: message(seed=2**64),
        lambda: message(round=-1),
        lambda: message(dtype="uint32"),
        lambda: message(values=np.arange(3, dtype=np.uint32)),
    ],
)
def test_what_can_not_be_sent(make):
    with pytest.raises(InputError):
        encode(make())


def test_odd_places_are_refused():
    for places in ([1, 1, 2], [0, 1, D]):
        sent = message(kind="sparse", values=np.ones(3, np.float32), places=np.array(places, np.uint32))
        with pytest.raises(InputError, match="each once"):
            decode(encode(sent))
    for kind, dtype in (("gossip", "float32"), ("sketch", "float16")):
        with pytest.raises(InputError):
            Message(kind, dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_never_gets_through(junk, sealed):
    """Random bytes, also with a right front and checksum: an `InputError`, never anything else."""
    data = encode(message())[:8] + junk if sealed else junk
    if sealed and len(data) >= HEADER:
        data = reseal(data[: HEADER - 16] + struct.pack("<I", len(data) - HEADER) + data[HEADER - 12 :])
    try:
        found = decode(data)
    except InputError:
        return
    assert np.isfinite(found.values).all() and found.s == len(found.values)


SHAPES = tuple(leaf.shape for leaf in jax.tree.leaves(PARAMS))


@pytest.mark.parametrize(
    "compressor",
    [
        Plain(D),
        Sketched(tree_sketch(PARAMS, ratio=8.0)),
        Sketched(tree_sketch(PARAMS, "countsketch", ratio=8.0, per_leaf=True)),
        Sketched(tree_sketch(PARAMS, "rand-k", ratio=8.0)),
        TopK(D, 60, 2),
        TopK(D, 150, 2),
        FetchSGD(D, 10, 15, rows=3),
        PowerSGD(SHAPES, 2),
        PowerSGD(SHAPES, 100),
        QSGD(D, 1),
        QSGD(D, 5, 1000),
        Sketched(tree_sketch(PARAMS, "rand-k", ratio=8.0), one_way=True),
        RoundedSketch(tree_sketch(PARAMS, ratio=8.0), "bfloat16"),
        RoundedSketch(tree_sketch(PARAMS, "countsketch", ratio=8.0), "int8"),
        IntegerSketch(tree_sketch(PARAMS, ratio=8.0), IntegerCode(100.0, 3)),
    ],
    ids=lambda c: type(c).__name__,
)
def test_bytes_at_the_socket_are_those_of_the_formula(compressor):
    """And what arrived gives every client the update that `combine` says."""
    found = measure_bytes(compressor, clients=3 if isinstance(compressor, IntegerSketch) else 2)
    if getattr(compressor, "one_way", False):
        assert found.down == 4 * D and found.up < D
    assert found.up == found.formula_up
    assert found.down == found.formula_down <= compressor.bytes_down
    assert (found.down < compressor.bytes_down) == (isinstance(compressor, TopK) and compressor.k == 60)
    assert found.error < 1e-5
    assert found.headers == HEADER * 2 * compressor.messages


def test_numbers_of_fewer_bits_one_way():
    compressor = RoundedSketch(tree_sketch(PARAMS, ratio=8.0), "int8", one_way=True)
    y = jnp.arange(40.0)
    assert (compressor.bytes_up, compressor.bytes_down) == (4 + 40, 4 * D)
    assert compressor.down(jax.random.key(0), y) is y


def test_a_compressor_without_messages_is_refused():
    class Other(Plain):
        pass

    assert measure_bytes(Other(4)).up == 16, "what is a Plain travels as one"
    with pytest.raises(InputError, match="clients"):
        measure_bytes(Plain(4), clients=0)


def test_a_line_that_breaks():
    with Loopback() as line:
        assert line.send(encode(message())) == encode(message()) and line.received == HEADER + 28
        import socket

        near, far = socket.socketpair()
        near.sendall(b"abc")
        near.close()
        with pytest.raises(ConnectionError, match="after 3"):
            read_exactly(far, 5)
        assert read_exactly(far, 5) == b""
        far.close()
