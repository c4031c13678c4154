"""PDU framing: any bytes in any chunking, and messages that come back as they went."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.dicom import pdata
from airflow_dicom_get.dicom.pdata import Deframer, Fragment, Pdu, frame_message
from airflow_dicom_get.errors import PeerProtocolError

MAX_PDU = 4096

Event = tuple[object, ...]


def p_data(*pdvs: tuple[int, int, bytes]) -> bytes:
    """A P-DATA-TF of (context, control, value) PDVs."""
    body = b"".join(struct.pack(">LBB", len(value) + 2, context, control) + value for context, control, value in pdvs)
    return struct.pack(">BxL", 4, len(body)) + body


def cut(stream: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, over and over."""
    sizes = list(sizes)
    at = turn = 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        yield stream[at : at + size]
        at, turn = at + size, turn + 1


def events(pieces: Iterable[bytes], max_pdu: int = MAX_PDU) -> tuple[list[Event], str | None]:
    """What a stream holds whatever its pieces: whole runs of fragments, PDUs, and the error that ends it."""
    deframer = Deframer(max_pdu)
    out: list[Event] = []
    for piece in pieces:
        buffer = bytearray(piece)
        try:
            items = deframer.feed(memoryview(buffer))
        except PeerProtocolError as error:
            return out, str(error)
        for item in items:
            if isinstance(item, Pdu):
                out.append(("pdu", item.pdu_type, item.data))
                continue
            key = ("part", item.context_id, item.is_command)
            if out and out[-1][:3] == key and not out[-1][4]:
                out[-1] = (*key, bytes(out[-1][3]) + bytes(item.data), item.last)  # type: ignore[call-overload]
            else:
                out.append((*key, bytes(item.data), item.last))
        buffer[:] = bytes(len(buffer))  # the views are void once the buffer is filled again
    return out, None


VALUES = st.binary(max_size=64)
PDVS = st.tuples(st.integers(0, 255), st.integers(0, 255), VALUES)
PDUS = st.one_of(
    st.lists(PDVS, min_size=1, max_size=4).map(lambda pdvs: p_data(*pdvs)),
    st.tuples(st.sampled_from((1, 2)), VALUES).map(lambda x: struct.pack(">BxL", x[0], len(x[1])) + x[1]),
    st.tuples(st.sampled_from((3, 5, 6, 7)), st.binary(min_size=4, max_size=4)).map(
        lambda x: struct.pack(">BxL", x[0], 4) + x[1]
    ),
)
STREAMS = st.one_of(
    st.binary(max_size=400),
    st.tuples(st.lists(PDUS, max_size=6).map(b"".join), st.binary(max_size=20)).map(b"".join),
    # A good stream with a byte changed.
    st.tuples(st.lists(PDUS, min_size=1, max_size=4).map(b"".join), st.integers(0, 10_000), st.integers(0, 255)).map(
        lambda x: x[0][: x[1] % len(x[0])] + bytes((x[2],)) + x[0][x[1] % len(x[0]) + 1 :]
    ),
)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(STREAMS, SIZES)
def test_any_bytes_in_any_chunking_have_the_same_outcome(stream: bytes, sizes: list[int]) -> None:
    whole, error = events([stream])
    single, single_error = events(bytes((byte,)) for byte in stream)
    pieces, pieces_error = events(cut(stream, sizes))
    assert error == single_error == pieces_error
    if error is None:
        assert whole == single == pieces
    else:
        # What came before the error is lost with the piece that holds it; nothing else may differ.
        assert len(pieces) <= len(single)
        for one, other in zip(pieces[:-1], single, strict=False):
            assert one == other


@given(
    st.integers(0, 127).map(lambda n: 2 * n + 1),
    st.binary(min_size=1, max_size=300),
    st.one_of(st.none(), st.binary(max_size=3000)),
    st.one_of(st.just(0), st.integers(1, 5000)),
    SIZES,
)
def test_messages_come_back(context: int, command: bytes, dataset: bytes | None, room: int, sizes: list[int]) -> None:
    stream = frame_message(context, command, dataset, room)
    out, error = events(cut(stream, sizes), max_pdu=0x40000)
    assert error is None
    expected: list[Event] = [("part", context, True, command, True)]
    if dataset is not None:
        expected.append(("part", context, False, dataset, True))
    assert out == expected


@given(st.binary(max_size=2000), st.integers(8, 300))
def test_no_pdu_is_longer_than_the_peer_allows_and_fragments_are_even(dataset: bytes, room: int) -> None:
    stream, at = frame_message(1, b"12", dataset, room), 0
    lengths = []
    while at < len(stream):
        (length,) = struct.unpack_from(">L", stream, at + 2)
        lengths.append(length)
        at += 6 + length
    assert at == len(stream)
    assert max(lengths) <= room
    assert all((length - 6) % 2 == 0 for length in lengths[:-1])


def test_several_pdvs_in_one_pdu_and_an_empty_one() -> None:
    out, error = events([p_data((1, 1, b"ab"), (1, 3, b""), (1, 0, b"data"), (1, 2, b""))])
    assert error is None
    assert out == [("part", 1, True, b"ab", True), ("part", 1, False, b"data", True)]


def test_reserved_bits_of_the_control_header_are_not_looked_at() -> None:
    (fragment,) = Deframer(MAX_PDU).feed(memoryview(p_data((3, 0xFF, b"x"))))
    assert isinstance(fragment, Fragment)
    assert (fragment.context_id, fragment.is_command, fragment.last) == (3, True, True)


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (struct.pack(">BxL", 4, MAX_PDU + 1), "at most 4096"),
        (struct.pack(">BxL", 4, 0xFFFFFFFF), "at most 4096"),
        (struct.pack(">BxL", 4, 0), "holds no PDV"),
        (struct.pack(">BxL", 4, 5), "holds no PDV"),
        (struct.pack(">BxL", 2, 0xFFFFFFFF), "1048576 are allowed"),
        (struct.pack(">BxL", 2, (1 << 20) + 1), "1048576 are allowed"),
        (struct.pack(">BxL", 7, 5), "4 are allowed"),
        (struct.pack(">BxL", 0x42, 4), "unknown type 42H"),
        (b"HTTP/1.1 400 Bad Request\r\n", "unknown type 48H"),
        (struct.pack(">BxLLBB", 4, 10, 1, 1, 0), "PDV of 1 bytes"),
        (struct.pack(">BxLLBB", 4, 10, 7, 1, 0), "PDV of 7 bytes"),
        (struct.pack(">BxLLBB", 4, 10, 0xFFFFFFFF, 1, 0), "PDV of 4294967295 bytes"),
    ],
)
def test_lengths_that_lie_are_refused_before_anything_is_read_for_them(stream: bytes, text: str) -> None:
    with pytest.raises(PeerProtocolError, match=text):
        Deframer(MAX_PDU).feed(memoryview(stream))


def test_says_whether_it_stands_inside_a_pdu() -> None:
    deframer = Deframer(MAX_PDU)
    stream = p_data((1, 2, b"data")) + struct.pack(">BxLL", 5, 4, 0)
    assert not deframer.mid_pdu
    for at, byte in enumerate(stream):
        deframer.feed(memoryview(bytes((byte,))))
        assert deframer.mid_pdu == (at + 1 not in (len(stream) - 10, len(stream)))


def test_payload_is_not_copied() -> None:
    """A view into what was fed: the payload of a whole study costs no memory here."""
    deframer = Deframer(1 << 17)
    pdu = bytearray(p_data((1, 0, bytes((1 << 17) - 6))))
    view = memoryview(pdu)
    tracemalloc.start()
    try:
        for _ in range(100):
            (fragment,) = deframer.feed(view)
            assert isinstance(fragment, Fragment)
            assert fragment.data.obj is pdu
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [1, 2])
def test_the_longest_associate_pdu_is_all_that_is_kept(kind: int) -> None:
    deframer = Deframer(MAX_PDU)
    piece = memoryview(bytes(1 << 16))
    tracemalloc.start()
    try:
        for _ in range(8):
            deframer.feed(memoryview(struct.pack(">BxL", kind, pdata.MAX_ASSOCIATE_LENGTH)))
            out = [item for _ in range(16) for item in deframer.feed(piece)]
            assert [type(item) for item in out] == [Pdu]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_release_and_abort() -> None:
    out, _ = events([pdata.RELEASE_RQ + pdata.RELEASE_RP + pdata.abort_pdu(2, 6)])
    assert out == [("pdu", 5, bytes(4)), ("pdu", 6, bytes(4)), ("pdu", 7, b"\0\0\2\6")]
