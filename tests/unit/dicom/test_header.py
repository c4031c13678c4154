"""The header scan: any bytes in any chunking, every encoding, real files, and bounds."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Iterable
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom.header import HeaderError, HeaderScan
from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from airflow_dicom_get.dicom.uids import uid_value
from airflow_dicom_get.testing.archive import SERIES_UID, SOP_CLASS, SOP_INSTANCE, STUDY_UID, read_header
from airflow_dicom_get.testing.sample_data import usable_pydicom_files

JPEG = "1.2.840.10008.1.2.4.50"
WANTED = frozenset(h.MANDATORY | {h.SOP_CLASS_UID, h.MODALITY, h.SERIES_NUMBER, h.INSTANCE_NUMBER})
LAST = h.INSTANCE_NUMBER
SYNTAXES = (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED_LE, JPEG)

UIDS = {h.SOP_INSTANCE_UID: b"1.2.3\0", h.STUDY_INSTANCE_UID: b"1.2\0\0"[:4], h.SERIES_INSTANCE_UID: b"1.2.34"}


def element(tag: int, value: bytes, syntax: str = EXPLICIT_LE, vr: bytes = b"UI", length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    order = ">" if syntax == EXPLICIT_BE else "<"
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if syntax == IMPLICIT_LE:
        return head + struct.pack("<L", size) + value
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"OV"):
        return head + vr + struct.pack(order + "HL", 0, size) + value
    return head + vr + struct.pack(order + "H", size) + value


def mark(tag: int, length: int, order: str = "<") -> bytes:
    """An item or a delimiter."""
    return struct.pack(order + "HHL", tag >> 16, tag & 0xFFFF, length)


UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD


def dataset(syntax: str = EXPLICIT_LE, early: bytes = b"", late: bytes = b"") -> bytes:
    """The three UIDs, with something before the study and after the series."""
    plain = EXPLICIT_LE if syntax in (DEFLATED_LE, JPEG) else syntax
    body = element(h.SOP_INSTANCE_UID, UIDS[h.SOP_INSTANCE_UID], plain) + early
    body += element(h.STUDY_INSTANCE_UID, UIDS[h.STUDY_INSTANCE_UID], plain)
    body += element(h.SERIES_INSTANCE_UID, UIDS[h.SERIES_INSTANCE_UID], plain) + late
    body += element(0x7FE00010, bytes(64), plain, b"OW")
    return body


def deflated(data: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush()


Outcome = tuple[dict[int, bytes] | None, str | None]


def scan(syntax: str, pieces: Iterable[bytes]) -> Outcome:
    """The values found, or the error. Pieces that come after the scan is done are not fed, as the engine does."""
    scanner = HeaderScan(syntax, WANTED, LAST)
    pieces = list(pieces) or [b""]
    try:
        for number, piece in enumerate(pieces, 1):
            scanner.feed(memoryview(piece), last=number == len(pieces))
            if scanner.done:
                return scanner.values, None
    except HeaderError as error:
        return None, str(error)
    raise AssertionError("the last piece must end the scan")


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    out: list[bytes] = []
    at = 0
    while at < len(data):
        size = sizes[len(out) % len(sizes)]
        out.append(data[at : at + size])
        at += size
    return out


# --- any bytes -------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=6)
VRS = st.sampled_from((b"UI", b"SH", b"SQ", b"UN", b"OB", b"CS", b"XX"))
TAGS = st.one_of(
    st.sampled_from((*WANTED, 0x00080005, 0x00081140, 0x7FE00010, ITEM, ITEM_END, SEQUENCE_END, 0x00020010)),
    st.integers(0, 0xFFFFFFFF),
)


@st.composite
def elements(draw: st.DrawFn) -> tuple[str, bytes]:
    """Elements that hold together, more or less, in an encoding that may be the one they come under."""
    syntax = draw(st.sampled_from(SYNTAXES))
    encoding = draw(st.sampled_from((IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, syntax)))
    body = b""
    for _ in range(draw(st.integers(0, 6))):
        value = draw(st.binary(max_size=20))
        length = draw(st.one_of(st.none(), st.sampled_from((UNDEFINED, 0, 7, 1 << 31))))
        body += element(
            draw(TAGS),
            value,
            encoding,
            draw(VRS),
            length if length is None or length < 65536 or encoding == IMPLICIT_LE else 65535,
        )
    return syntax, deflated(body) if syntax == DEFLATED_LE and draw(st.booleans()) else body


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, bytes]:
    """A good data set with one byte changed."""
    syntax = draw(st.sampled_from(SYNTAXES))
    data = bytearray(dataset(syntax, element(0x00100010, b"Doe^Jane", EXPLICIT_LE, b"PN")))
    if syntax == DEFLATED_LE:
        data = bytearray(deflated(bytes(data) + bytes(range(256)) * 4))
    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return syntax, bytes(data)


@given(
    st.one_of(st.tuples(st.sampled_from(SYNTAXES), st.binary(max_size=300)), elements(), spoiled()),
    SIZES,
)
def test_any_bytes_in_any_chunking_have_the_same_outcome(case: tuple[str, bytes], sizes: list[int]) -> None:
    syntax, data = case
    whole = scan(syntax, [data])
    assert scan(syntax, cut(data, sizes)) == whole
    assert scan(syntax, cut(data, [1])) == whole
    # The last fragment may be an empty one.
    assert scan(syntax, [data, b""]) == whole


# --- what it finds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_uids_in_every_encoding(syntax: str) -> None:
    data = dataset(syntax)
    found, error = scan(syntax, [deflated(data) if syntax == DEFLATED_LE else data])
    assert error is None
    assert found == UIDS


def sequences() -> dict[str, tuple[str, bytes]]:
    """Sequences before the Study Instance UID that have to be stepped over."""
    tag, inner = 0x00081140, 0x00080105
    out: dict[str, tuple[str, bytes]] = {}
    for syntax in (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE):
        order = ">" if syntax == EXPLICIT_BE else "<"
        value = element(0x0020000D, b"9.9.9\0", syntax)
        item, end = mark(ITEM, UNDEFINED, order), mark(ITEM_END, 0, order)
        close = mark(SEQUENCE_END, 0, order)
        begin = element(tag, b"", syntax, b"SQ", UNDEFINED)
        nested = element(inner, b"", syntax, b"SQ", UNDEFINED)
        out[f"undefined {syntax}"] = syntax, begin + item + value + end + close
        out[f"items with lengths {syntax}"] = syntax, begin + mark(ITEM, len(value), order) + value + close
        out[f"empty {syntax}"] = syntax, begin + close
        out[f"nested {syntax}"] = (
            syntax,
            begin + item + nested + item + value + end + close + value + end + item + end + close,
        )
        out[f"with a length {syntax}"] = syntax, element(tag, mark(ITEM, len(value), order) + value, syntax, b"SQ")
    implicit = element(0x0020000D, b"9.9.9\0", IMPLICIT_LE)
    out["UN with implicit items"] = (
        EXPLICIT_LE,
        element(tag, b"", EXPLICIT_LE, b"UN", UNDEFINED)
        + mark(ITEM, UNDEFINED) + implicit + mark(ITEM_END, 0) + mark(SEQUENCE_END, 0),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name", sequences())
def test_sequences_are_stepped_over(name: str) -> None:
    syntax, early = sequences()[name]
    data = dataset(syntax, early)
    assert scan(syntax, [data]) == (UIDS, None)
    assert scan(syntax, cut(data, [3])) == (UIDS, None)


def test_compressed_data_in_implicit_vr() -> None:
    """Seen in the field."""
    assert scan(JPEG, [dataset(IMPLICIT_LE)]) == (UIDS, None)


def test_uncompressed_data_of_another_encoding_is_refused() -> None:
    for syntax, encoding in ((EXPLICIT_LE, IMPLICIT_LE), (EXPLICIT_BE, EXPLICIT_LE)):
        found, error = scan(syntax, [dataset(encoding)])
        assert (found, bool(error)) == (None, True)


@lru_cache
def real_files() -> dict[str, tuple[str, bytes, dict[int, str]]]:
    out = {}
    for path in usable_pydicom_files():
        syntax, offset, _, row = read_header(path)
        out[path.name] = syntax, path.read_bytes()[offset:], row
    return out


@pytest.mark.parametrize("size", [1 << 20, 16384, 1000, 17])
def test_real_files(size: int) -> None:
    for name, (syntax, data, row) in real_files().items():
        found, error = scan(syntax, cut(data, [size]))
        assert error is None, name
        assert found is not None
        for tag in (SOP_INSTANCE, STUDY_UID, SERIES_UID, SOP_CLASS):
            assert uid_value(found[tag]) == row[tag], name


def test_reads_no_further_than_it_must() -> None:
    scanner = HeaderScan(EXPLICIT_LE, WANTED, LAST)
    head = dataset(late=element(0x00280010, b"\0\1", vr=b"US"))
    scanner.feed(head[:-70])
    assert scanner.done


def ends_whole(data: bytes, syntax: str) -> bool:
    walk = h.walk_of(syntax)
    walk.feed(data)
    return walk.whole


def test_real_files_end_whole_and_cut_ones_do_not() -> None:
    """A cut in the last element is noticed, whatever the encoding; one between two elements cannot be."""
    odd = []
    for name, (syntax, data, _) in real_files().items():
        if not ends_whole(data, syntax):
            odd.append(name)
            continue
        # A deflated one is whole without what stands behind the end of its stream.
        for cut_off in (1, 2, 7) if syntax != DEFLATED_LE else (20, 100):
            assert not ends_whole(data[:-cut_off], syntax), (name, cut_off)
    assert len(odd) < 5, odd


@given(st.sampled_from(SYNTAXES), st.binary(max_size=300))
def test_any_bytes_end_whole_or_do_not(syntax: str, data: bytes) -> None:
    assert ends_whole(data, syntax) in (True, False)


def arrives_whole(syntax: str, pieces: Iterable[bytes]) -> bool | None:
    """What is said of a data set that arrives in pieces; None where its header is refused."""
    scanner, pieces = HeaderScan(syntax, WANTED, LAST), list(pieces) or [b""]
    try:
        for number, piece in enumerate(pieces, 1):
            if scanner.done:
                assert scanner.walk is not None
                scanner.walk.feed(memoryview(piece))
            else:
                scanner.feed(memoryview(piece), last=number == len(pieces))
    except HeaderError:
        return None
    assert scanner.walk is not None
    return scanner.walk.whole


@given(st.one_of(elements(), spoiled()), SIZES, st.integers(0, 80))
def test_whether_it_ends_whole_is_seen_in_any_chunking(case: tuple[str, bytes], sizes: list[int], less: int) -> None:
    syntax, data = case
    data = data[: max(len(data) - less, 0)]
    outcome = arrives_whole(syntax, [data])
    assert arrives_whole(syntax, cut(data, sizes)) == outcome
    assert arrives_whole(syntax, cut(data, [1])) == outcome


@pytest.mark.parametrize("size", [1 << 21, 16384, 1000, 17])
def test_real_files_that_arrive_whole_or_cut(size: int) -> None:
    for name, (syntax, data, _) in real_files().items():
        whole = ends_whole(data, syntax)
        assert arrives_whole(syntax, cut(data, [size])) == whole, name
        for less in (1, 2, 7, len(data) // 3) if whole and syntax != DEFLATED_LE else ():
            cut_off = data[: len(data) - less]
            # A third less may end between two elements, or before the UIDs.
            expected = ends_whole(cut_off, syntax) if less > 7 else False
            assert arrives_whole(syntax, cut(cut_off, [size])) in (expected, None), (name, less)


def test_empty_fragments_of_a_deflated_data_set_cost_nothing() -> None:
    class Counts:
        copies, eof = 0, False

        def copy(self) -> object:
            self.copies += 1
            return zlib.decompressobj(-zlib.MAX_WBITS)

        def decompress(self, data: bytes, most: int) -> bytes:
            return b""

    scan = h.HeaderScan(DEFLATED_LE, frozenset(), 0x0020000E)
    scan._inflate = counts = Counts()  # type: ignore[assignment]
    for _ in range(100):
        scan.feed(b"")
    assert counts.copies == 0
    scan.feed(b"\x00")
    assert counts.copies == 1


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, DEFLATED_LE])
def test_one_that_arrives_is_followed_to_its_last_element(syntax: str) -> None:
    many = dataset() + element(0x7FE10010, b"", vr=b"LO") * 150_000 + element(0x7FE20010, b"", vr=b"LO", length=8)
    data = deflated(many) if syntax == DEFLATED_LE else many
    assert not arrives_whole(syntax, cut(data, [16384]))


def test_one_that_inflates_without_measure_does_not_arrive_whole() -> None:
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    most = 280 << 20
    bomb = squeeze.compress(dataset() + element(0x7FE10010, b"", vr=b"OB", length=most))
    bomb += b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(most >> 20)) + squeeze.flush()
    assert ends_whole(bomb, DEFLATED_LE)
    assert not arrives_whole(DEFLATED_LE, cut(bomb, [16384]))


def test_a_deflate_bomb_is_not_unpacked_to_see_whether_it_is_whole() -> None:
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    tracemalloc.start()
    try:
        assert ends_whole(bomb, DEFLATED_LE)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no \\(0008,0018\\), \\(0020,000D\\), \\(0020,000E\\)"),
        (b"\0" * 128 + b"DICM", "does not belong in a data set|no known VR"),
        (element(0x00020010, b"1.2.3\0"), "\\(0002,0010\\) does not belong"),
        (dataset()[:20], "runs past the end"),
        (element(0x00080018, b"1.2", length=64), "runs past the end"),
        (
            element(h.SOP_INSTANCE_UID, b"1.2\0") + element(h.SOP_CLASS_UID, b"", vr=b"UN", length=UNDEFINED),
            "\\(0008,0016\\) has no length",
        ),
        (b"<html><body>", "no known VR"),
    ],
)
def test_refused(data: bytes, text: str) -> None:
    scanner = HeaderScan(EXPLICIT_LE, WANTED, LAST)
    with pytest.raises(HeaderError, match=text):
        scanner.feed(data, last=True)


@pytest.mark.parametrize("tag", [h.SOP_INSTANCE_UID, h.PATIENT_ID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID])
def test_who_is_said_twice_is_refused_unless_it_is_the_same(tag: int) -> None:
    """Readers differ in which of the two they take: the one that was asked for, or another patient's."""
    values = {h.SOP_INSTANCE_UID: b"1.2.3\0", h.PATIENT_ID: b"A1", **UIDS}
    for second in (values[tag], b"9.8.7\0"):
        data = b"".join(
            element(one, value) + (element(one, second) if one == tag else b"") for one, value in sorted(values.items())
        )
        scan = HeaderScan(EXPLICIT_LE, WANTED | {h.PATIENT_ID}, LAST)
        if second == values[tag]:
            scan.feed(data, last=True)
            assert scan.values[tag] == values[tag]
        else:
            with pytest.raises(HeaderError, match="twice, with two values"):
                scan.feed(data, last=True)


def test_depth_is_bounded() -> None:
    deep = element(0x00081140, b"", EXPLICIT_LE, b"SQ", UNDEFINED) + mark(ITEM, UNDEFINED)
    _, error = scan(EXPLICIT_LE, [element(h.SOP_INSTANCE_UID, b"1.2\0") + deep * 50_000])
    assert error == "sequences nest deeper than 32 levels"


# --- bounds --------------------------------------------------------------------------------------------


def peak(syntax: str, pieces: Iterable[bytes]) -> int:
    tracemalloc.start()
    try:
        _, error = scan(syntax, pieces)
        assert error is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_early_element_that_claims_4_gib_costs_no_more_than_the_limit() -> None:
    piece = bytes(1 << 17)
    head = element(0x00080008, b"", EXPLICIT_LE, b"UT", 0xFFFFFFF0)
    assert peak(EXPLICIT_LE, [head, *[piece] * 64]) < 5 << 20


def test_a_deflate_bomb_costs_no_more_than_the_limit() -> None:
    head = element(h.SOP_INSTANCE_UID, b"1.2\0") + element(0x00080200, b"", EXPLICIT_LE, b"UN", 1 << 30)
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = squeeze.compress(head) + b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    assert len(bomb) < 1 << 17
    assert peak(DEFLATED_LE, [bomb]) < 6 << 20
    assert peak(DEFLATED_LE, cut(bomb, [4096])) < 6 << 20


def test_small_pieces_do_not_make_it_slow() -> None:
    """Each try starts from the beginning, so tries must become rarer: else this would take minutes."""
    data = dataset(early=b"".join(element(0x00081140 + n, bytes(30), vr=b"SH") for n in range(4000)))
    assert scan(EXPLICIT_LE, cut(data, [2])) == (UIDS, None)


# --- defects in a deflated data set that lie behind the header -------------------------------------------


@pytest.mark.parametrize("size", [1 << 20, 700, 1])
def test_damage_behind_the_header_of_a_deflated_data_set(size: int) -> None:
    """What is behind the header is never decoded: it is stored as received, whatever the fragments were."""
    good = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = good.compress(dataset(late=element(0x00280010, b"\0\1", vr=b"US"))) + good.flush(zlib.Z_FULL_FLUSH)
    # A block of the reserved type 3 (RFC 1951 3.2.3).
    assert scan(DEFLATED_LE, cut(data + b"\x07" + bytes(1000), [size])) == (UIDS, None)


@pytest.mark.parametrize("size", [1 << 20, 7, 1])
def test_damage_in_the_header_of_a_deflated_data_set(size: int) -> None:
    found, error = scan(DEFLATED_LE, cut(b"\x07" + deflated(dataset()), [size]))
    assert (found, error) == (None, "the deflated data set cannot be inflated")


@pytest.mark.parametrize(
    ("behind", "torn"),
    [
        (b"", False),
        (b"\n", False),
        (bytes(100), False),
        (b"a signature" * 100, False),
        (bytes(4096), True),
        (b"\xe0\x7f\x10\x00OW\x00\x00\x00\x10\x00\x00" + bytes(10), True),
        (b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff", True),
    ],
    ids=["nothing", "newline", "padding", "trailer", "lost blocks", "cut value", "open sequence"],
)
def test_bytes_of_somebody_behind_a_data_set_do_not_make_it_torn(behind: bytes, torn: bool) -> None:
    walk = h.walk_of("1.2.840.10008.1.2.1")
    walk.feed(b"\x20\x00\x13\x00IS\x02\x001 " + behind)
    assert walk.torn is torn
    assert walk.whole is (not behind)


def test_a_data_set_that_begins_with_zeros_is_torn() -> None:
    walk = h.walk_of(EXPLICIT_LE)
    walk.feed(bytes(100) + b"what a power cut left")
    assert walk.torn


def test_what_inflates_without_measure_is_not_followed_to_its_end() -> None:
    """A stream that is torn, and of which a megabyte inflates to a gigabyte, counts as whole."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = deflate.compress(bytes(64 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    walk = h.walk_of(DEFLATED_LE)
    for _ in range(4):
        walk.feed(piece)
    assert walk.torn
    walk.feed(piece)
    assert walk.whole
