"""The misbehaving PACS itself: well by default, and each mode does on the wire what its sentence says."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import AssociationRejected
from airflow_dicom_get.testing import misbehave
from airflow_dicom_get.testing.misbehave import MODES, MisbehavingPacs, many_pairs
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES
from airflow_dicom_get.testing.misbehaving.link import mutated

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
VERIFICATION = "1.2.840.10008.1.1"


class Client:
    """A pynetdicom SCU that keeps what it is sent: SOP Instance UID and raw data set, in order."""

    def __init__(self, pacs: MisbehavingPacs, *, roles: bool = True, called: str = "ANY-SCP") -> None:
        self.received: list[tuple[str, str, bytes]] = []
        ae = AE(ae_title="CLIENT")
        ae.acse_timeout = 30  # a busy machine may take longer than three seconds to answer
        ae.dimse_timeout = ae.network_timeout = 3
        ae.add_requested_context(VERIFICATION)
        ae.add_requested_context(FIND, wire.IMPLICIT_LE)
        ae.add_requested_context(GET, wire.IMPLICIT_LE)
        pairs = sorted({(i.sop_class, i.syntax) for i in pacs.instances})[:120]
        for sop_class, syntax in pairs:
            ae.add_requested_context(sop_class, syntax)
        items: list[Any] = [build_role(c, scp_role=True) for c in sorted({c for c, _ in pairs})] if roles else []
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store)]
        self.assoc: Association = ae.associate(
            "127.0.0.1", pacs.port, ae_title=called, ext_neg=items, evt_handlers=handlers
        )

    def _store(self, event: evt.Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE)
        assert request.DataSet is not None
        assert request.AffectedSOPInstanceUID is not None
        data = request.DataSet.getvalue()
        self.received.append((request.AffectedSOPInstanceUID, event.context.transfer_syntax, data))
        return 0x0000

    def find(self, level: str, **keys: str) -> list[Dataset]:
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        answers: list[tuple[Dataset, Any]] = list(self.assoc.send_c_find(query, FIND))
        assert answers[-1][0].Status == 0x0000
        return [row for status, row in answers if status.Status == 0xFF00]

    def get(self, level: str, **keys: str | list[str]) -> list[Dataset]:
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        return [status for status, _ in self.assoc.send_c_get(query, GET)]


@contextmanager
def client(pacs: MisbehavingPacs, **options: bool | str) -> Iterator[Client]:
    scu = Client(pacs, **options)  # type: ignore[arg-type]
    try:
        yield scu
    finally:
        if scu.assoc.is_established:
            scu.assoc.release()
        scu.assoc.join(5)


@pytest.fixture
def peer() -> Iterator[Callable[..., MisbehavingPacs]]:
    running: list[MisbehavingPacs] = []

    def start(mode: str | None = None, **options: object) -> MisbehavingPacs:
        pacs = MisbehavingPacs(mode, **options)  # type: ignore[arg-type]
        pacs.start()
        running.append(pacs)
        return pacs

    yield start
    for pacs in running:
        pacs.close()
        assert pacs.faults == []


# --- raw client: what really stands on the wire ------------------------------------------------------


class Raw:
    """A client of a few lines on a plain socket."""

    def __init__(self, pacs: MisbehavingPacs, max_pdu: int = 16384) -> None:
        self.sock = socket.create_connection(("127.0.0.1", pacs.port), timeout=5)
        contexts = [(1, FIND, wire.IMPLICIT_LE), (3, GET, wire.IMPLICIT_LE), (5, archive.CT, wire.EXPLICIT_LE)]
        body = struct.pack(">HH16s16s32x", 1, 0, b"ANY-SCP".ljust(16), b"RAW".ljust(16))
        body += self._item(0x10, b"1.2.840.10008.3.1.1.1")
        for number, abstract, syntax in contexts:
            subs = self._item(0x30, abstract.encode()) + self._item(0x40, syntax.encode())
            body += self._item(0x20, bytes((number, 0, 0, 0)) + subs)
        role = struct.pack(">H", len(archive.CT)) + archive.CT.encode() + b"\0\1"
        body += self._item(0x50, self._item(0x51, struct.pack(">I", max_pdu)) + self._item(0x54, role))
        self.sock.sendall(wire.pdu(wire.ASSOCIATE_RQ, body))

    @staticmethod
    def _item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(body)) + body

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.sock.recv(size - len(data))
            if not chunk:
                raise EOFError(f"{len(data)} of {size} bytes")
            data += chunk
        return data

    def header(self) -> tuple[int, int]:
        kind, _, length = struct.unpack(">BBI", self.read(6))
        return kind, length

    def pdu(self) -> tuple[int, bytes]:
        kind, length = self.header()
        return kind, self.read(length)

    def items(self) -> list[tuple[int, int, bytes]]:
        """Context, flags and payload of each item of the next PDU."""
        kind, body = self.pdu()
        assert kind == wire.P_DATA
        found, at = [], 0
        while at < len(body):
            length, context, flags = struct.unpack_from(">IBB", body, at)
            found.append((context, flags, body[at + 6 : at + 4 + length]))
            at += 4 + length
        return found

    def ask(self) -> None:
        """Send a C-GET-RQ for the study."""
        self._request(3, GET, wire.C_GET, [(0x00080052, b"CS", "STUDY"), (0x0020000D, b"UI", archive.STUDY_UID)])

    def ask_list(self) -> None:
        """Send a C-FIND-RQ for the instances of the study."""
        level = (0x00080052, b"CS", "IMAGE")
        keys = [(0x00080016, b"UI", ""), (0x00080018, b"UI", ""), (0x0020000D, b"UI", archive.STUDY_UID)]
        self._request(1, FIND, wire.C_FIND, [*keys[:2], level, keys[2]])

    def _request(self, context: int, sop_class: str, field: int, keys: list[archive.Element]) -> None:
        fields: dict[int, wire.Value] = {
            wire.CLASS: sop_class,
            wire.FIELD: field,
            wire.MESSAGE_ID: 7,
            wire.PRIORITY: 0,
            wire.DATA_SET_TYPE: 1,
        }
        identifier = archive.encode(keys, wire.IMPLICIT_LE)
        self.sock.sendall(wire.p_data(context, 3, wire.command(fields)) + wire.p_data(context, 2, identifier))

    def answer(self, request: dict[int, bytes], status: int = 0) -> None:
        fields: dict[int, wire.Value] = {
            wire.FIELD: wire.C_STORE | wire.RESPONSE,
            wire.RESPONDED_ID: int.from_bytes(request[wire.MESSAGE_ID], "little"),
            wire.DATA_SET_TYPE: wire.NO_DATA_SET,
            wire.STATUS: status,
        }
        self.sock.sendall(wire.p_data(5, 3, wire.command(fields)))

    def message(self) -> tuple[int, dict[int, bytes], list[bytes]]:
        """The next message: context of its command, command elements, data fragments."""
        data: list[bytes] = []
        command, fields, context = b"", None, 0
        while True:
            for number, flags, payload in self.items():
                if flags & 1:
                    command, context = command + payload, number
                    if flags & 2:
                        fields = wire.parse_command(command)
                        if fields.get(wire.DATA_SET_TYPE) == b"\1\1":
                            return context, fields, data
                else:
                    data.append(payload)
                    if flags & 2:
                        assert fields is not None
                        return context, fields, data

    def gone(self) -> bool:
        """Whether the server has closed the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


# --- well by default -----------------------------------------------------------------------------


def test_echo_find_and_get_work(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer(series=2, instances=3, size=5000)
    with client(pacs) as scu:
        assert scu.assoc.send_c_echo().Status == 0x0000
        studies = scu.find(
            "STUDY", StudyInstanceUID="", NumberOfStudyRelatedInstances="", NumberOfStudyRelatedSeries="",
            SOPClassesInStudy="", PatientName="", StudyDate="20240101-20241231",
        )  # fmt: skip
        assert [(str(s.StudyInstanceUID), s.NumberOfStudyRelatedInstances) for s in studies] == [(pacs.study_uid, 6)]
        assert studies[0].NumberOfStudyRelatedSeries == 2
        assert studies[0].PatientName == "HOSTILE^PATIENT"
        assert scu.find("STUDY", StudyInstanceUID="", StudyDate="19990101-19991231") == []
        series = scu.find(
            "SERIES", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID="", NumberOfSeriesRelatedInstances=""
        )
        assert [s.NumberOfSeriesRelatedInstances for s in series] == [3, 3]
        rows = scu.find(
            "IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID=series[1].SeriesInstanceUID,
            SOPInstanceUID="", SOPClassUID="", AvailableTransferSyntaxUID="",
        )  # fmt: skip
        assert [r.SOPInstanceUID for r in rows] == pacs.uids[3:]
        assert {r.SOPClassUID for r in rows} == {archive.CT}
        assert not rows[0].AvailableTransferSyntaxUID

        statuses = scu.get("STUDY", StudyInstanceUID=pacs.study_uid)
        assert [s.Status for s in statuses] == [0xFF00] * 6 + [0x0000]
        assert statuses[-1].NumberOfCompletedSuboperations == 6
    assert [(uid, data) for uid, _, data in scu.received] == [(uid, pacs.dataset(uid)) for uid in pacs.uids]
    assert {len(data) for *_, data in scu.received} == {5000}
    assert pacs.sent == dict.fromkeys(pacs.uids, 1)
    assert pacs.statuses == [0x0000] * 6
    assert pacs.finals == [0x0000]
    assert pacs.associations == 1


def test_series_and_lists_of_images(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer()
    first, second = dict.fromkeys(i.series for i in pacs.instances)
    with client(pacs) as scu:
        scu.get("SERIES", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID=second)
        assert [uid for uid, *_ in scu.received] == pacs.uids[4:]
        wanted = [pacs.uids[3], pacs.uids[0], "2.25.404"]
        scu.get("IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID=first, SOPInstanceUID=wanted)
        assert [uid for uid, *_ in scu.received[4:]] == [pacs.uids[0], pacs.uids[3]]
        assert [s.Status for s in scu.get("STUDY", StudyInstanceUID="2.25.404")] == [0x0000]
        assert scu.get("SERIES", SeriesInstanceUID=first)[-1].Status == 0xA900
        assert scu.get("STUDY", StudyInstanceUID="")[-1].Status == 0xA900


def test_every_syntax_goes_out_as_it_is_held(peer: Callable[..., MisbehavingPacs]) -> None:
    syntaxes = [wire.EXPLICIT_LE, wire.IMPLICIT_LE, wire.EXPLICIT_BE, wire.DEFLATED_LE, wire.JPEG_2000]
    pacs = peer(series=1, instances=5, pairs=[(archive.CT, s) for s in syntaxes], list_syntaxes=True)
    with client(pacs) as scu:
        rows = scu.find(
            "IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID="", SOPInstanceUID="",
            AvailableTransferSyntaxUID="",
        )  # fmt: skip
        assert [r.AvailableTransferSyntaxUID for r in rows] == syntaxes
        scu.get("STUDY", StudyInstanceUID=pacs.study_uid)
    assert [s for _, s, _ in scu.received] == syntaxes
    for uid, syntax, data in scu.received:
        meta = archive.encode([(0x00020010, b"UI", syntax)], wire.EXPLICIT_LE)
        read = pydicom.dcmread(BytesIO(bytes(128) + b"DICM" + meta + data))
        assert read.SOPInstanceUID == uid
        assert read.StudyInstanceUID == pacs.study_uid
        assert len(read.PixelData) > 3000


def test_many_pairs_and_refused_contexts(peer: Callable[..., MisbehavingPacs]) -> None:
    pairs = many_pairs(200)
    assert len(set(pairs)) == 200
    pacs = peer(series=4, instances=50, size=800, pairs=pairs)
    with client(pacs) as scu:  # 120 of the 200 pairs
        last = scu.get("STUDY", StudyInstanceUID=pacs.study_uid)[-1]
    assert last.Status == 0xB000
    assert (last.NumberOfCompletedSuboperations, last.NumberOfFailedSuboperations) == (120, 80)
    assert len(scu.received) == 120


def test_without_role_nothing_is_sent(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer()
    with client(pacs, roles=False) as scu:
        assert scu.get("STUDY", StudyInstanceUID=pacs.study_uid)[-1].Status == 0xA702
    assert not pacs.sent


def test_cancel_is_obeyed(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer(series=1, instances=50)
    with client(pacs) as scu:
        query = Dataset()
        query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", pacs.study_uid
        statuses = []
        for status, _ in scu.assoc.send_c_get(query, GET, msg_id=9):
            statuses.append(status.Status)
            if len(statuses) == 3:
                scu.assoc.send_c_cancel(9, query_model=GET)
    assert statuses[-1] == 0xFE00
    assert sum(pacs.sent.values()) < 50


def test_called_ae_title_is_checked_if_one_is_given(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer(ae_title="RIGHT")
    # Not by pynetdicom: a busy machine sees the connection end before it has looked at the rejection.
    with pytest.raises(AssociationRejected, match="called AE title"):
        GetScu(f"WRONG@127.0.0.1:{pacs.port}").echo()
    with client(pacs, called="RIGHT") as scu:
        assert scu.assoc.send_c_echo().Status == 0x0000


def test_only_loopback_and_known_modes() -> None:
    with pytest.raises(ValueError, match="loopback"):
        MisbehavingPacs(host="0.0.0.0")
    with pytest.raises(ValueError, match="no mode 'stal_mid', but stall_mid"):
        MisbehavingPacs("stal_mid")


def test_serve_lists_the_modes(capsys: pytest.CaptureFixture[str]) -> None:
    assert misbehave.serve("list") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MODES)


# --- the table -----------------------------------------------------------------------------------


def test_every_mode_says_what_it_does_in_one_sentence() -> None:
    assert MODES.keys() == MODE_CLASSES.keys()
    for name, sentence in MODES.items():
        assert sentence.endswith("."), name
        assert sentence.count(". ") == 0, name
        assert len(sentence) < 160, name
        assert MODE_CLASSES[name].max_seconds <= 120
        assert MODE_CLASSES[name].max_bytes <= 512 << 20


def _naive(mode: str) -> list[str]:
    """One raw client that answers everything; returns what the server did wrong as a program."""
    with MisbehavingPacs(mode, series=1, instances=2, size=1000, max_seconds=20, max_bytes=4 << 20) as pacs:
        with Raw(pacs) as raw:
            raw.sock.settimeout(0.2)
            try:
                kind, _ = raw.pdu() if mode != "ac_huge" else raw.header()
                if kind == wire.ASSOCIATE_AC:
                    if "find" in MODE_CLASSES[mode].stages:
                        raw.ask_list()
                        for _ in range(20):
                            if raw.message()[1][wire.STATUS] != b"\x00\xff":
                                break
                    raw.ask()
                    for _ in range(8):
                        _, fields, _ = raw.message()
                        if fields.get(wire.FIELD) == b"\1\0":
                            raw.answer(fields)
            except (OSError, EOFError, AssertionError, struct.error, KeyError):
                pass  # that is what the mode is for
        end = time.monotonic() + 3
        while pacs._lines and time.monotonic() < end:
            time.sleep(0.005)
        outlived = ["the association outlives its connection"] if pacs._lines else []
    return outlived + pacs.faults


def test_every_mode_lives_through_a_naive_client_and_ends_with_it() -> None:
    with ThreadPoolExecutor(8) as pool:
        wrong = dict(zip(MODES, pool.map(_naive, MODES), strict=True))
    assert {mode: what for mode, what in wrong.items() if what} == {}


# --- a sample of the modes, on the wire -----------------------------------------------------------


def test_ac_huge_and_pdu_huge_announce_4_gib_and_stop_with_the_client(peer: Callable[..., MisbehavingPacs]) -> None:
    with Raw(peer("ac_huge")) as raw:
        assert raw.header() == (wire.ASSOCIATE_AC, 0xFFFFFFFF)
        assert raw.read(1 << 20) == bytes(1 << 20)
    pacs = peer("pdu_huge", series=1, instances=1)
    with Raw(pacs) as raw:
        raw.pdu()
        raw.ask()
        raw.items()
        raw.items()
        assert raw.header() == (wire.P_DATA, 0xFFFFFFFF)


def test_bounds_hold_against_a_client_that_never_leaves(peer: Callable[..., MisbehavingPacs]) -> None:
    with Raw(peer("ac_huge", max_bytes=1 << 20)) as raw:
        got = 0
        while chunk := raw.sock.recv(1 << 16):
            got += len(chunk)
        assert 900_000 < got <= 1 << 20
    started = time.monotonic()
    with Raw(peer("silent", max_seconds=0.3)) as raw:
        raw.pdu()
        raw.ask()
        assert raw.gone()
    assert 0.2 < time.monotonic() - started < 2


def test_pdu_over_max(peer: Callable[..., MisbehavingPacs]) -> None:
    with Raw(peer("pdu_over_max", series=1, instances=1), max_pdu=16384) as raw:
        raw.pdu()
        raw.ask()
        raw.items()
        assert raw.header()[1] > 16384


def test_good_pdus_keep_to_the_announced_length(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer(series=1, instances=1, size=50_000)
    with Raw(pacs, max_pdu=4096) as raw:
        raw.pdu()
        raw.ask()
        raw.items()
        lengths, data = [], b""
        while len(data) < 50_000:
            _, body = raw.pdu()
            lengths.append(len(body))
            data += body[6:]
        assert max(lengths) <= 4096
        assert all(length % 2 == 0 for length in lengths)
    assert data == pacs.dataset(pacs.uids[0])


@pytest.mark.parametrize(
    ("mode", "check"),
    [
        ("pdv_odd", lambda parts: len(parts[0]) % 2 == 1),
        ("pdv_two_byte", lambda parts: {len(p) for p in parts} == {2}),
        ("pdv_many", lambda parts: {len(p) for p in parts[:-1]} == {100}),
        ("pdv_empty", lambda parts: parts[1] == b"" and parts[-1] == b""),
        ("pdv_reserved", lambda parts: len(parts) >= 1),
        ("cmd_fragmented", lambda parts: len(parts) >= 1),
        ("cmd_nolen", lambda parts: len(parts) >= 1),
        ("cmd_badlen", lambda parts: len(parts) >= 1),
        ("same_msgid", lambda parts: len(parts) >= 1),
    ],
)
def test_odd_encodings_carry_the_right_bytes(
    peer: Callable[..., MisbehavingPacs], mode: str, check: Callable[[list[bytes]], bool]
) -> None:
    pacs = peer(mode, series=1, instances=2)
    with Raw(pacs) as raw:
        raw.pdu()
        raw.ask()
        for uid in pacs.uids:
            context, fields, parts = raw.message()
            assert (context, fields[wire.FIELD]) == (5, b"\1\0")
            assert b"".join(parts) == pacs.dataset(uid)
            assert check(parts), [len(p) for p in parts]
            assert (0x0000 in fields) == (mode != "cmd_nolen")
            if mode == "same_msgid":
                assert fields[wire.MESSAGE_ID] == b"\7\0"
            raw.answer(fields)
            _, fields, _ = raw.message()
            assert fields[wire.STATUS] == b"\x00\xff"
        _, fields, _ = raw.message()
        assert fields[wire.STATUS] == b"\0\0"
    assert pacs.statuses == [0, 0]


@pytest.mark.parametrize(
    ("mode", "status", "sent"),
    [
        ("success_partial", 0x0000, 4),
        ("success_with_failed", 0x0000, 4),
        ("success_nocounts_partial", 0x0000, 4),
        ("success_zero", 0x0000, 0),
        ("success_zero_lies", 0x0000, 0),
        ("b000_all_sent", 0xB000, 8),
        ("a702_all_sent", 0xA702, 8),
        ("unknown_status", 0x1234, 8),
        ("failed_list_lies", 0xB000, 8),
        ("failed_list_in_command", 0xB000, 8),
        ("counters_lie", 0x0000, 8),
        ("no_pending", 0x0000, 8),
        ("pipelined", 0x0000, 8),
        ("c000_half", 0xC000, 4),
        ("fe00_unasked", 0xFE00, 4),
        ("get_fails:0xA801", 0xA801, 0),
        ("lists_refused", 0x0000, 8),
        ("norole", 0x0000, 8),
        ("extra_instance", 0x0000, 9),
        ("foreign_study", 0x0000, 9),
        ("dup_diff", 0x0000, 9),
    ],
)
def test_final_status_and_what_was_sent(
    peer: Callable[..., MisbehavingPacs], mode: str, status: int, sent: int
) -> None:
    pacs = peer(mode)
    with Raw(pacs) as raw:
        raw.pdu()
        raw.ask()
        waiting = []
        while True:
            _, fields, _ = raw.message()
            if fields[wire.FIELD] == b"\1\0":
                waiting.append(fields)
                if mode != "pipelined" or len(waiting) == 8:
                    for request in waiting:
                        raw.answer(request)
                    waiting = []
            elif fields[wire.STATUS] != b"\x00\xff":
                break
    assert int.from_bytes(fields[wire.STATUS], "little") == status
    assert sum(pacs.sent.values()) == sent


def test_dup_diff_sends_two_contents_under_one_uid(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer("dup_diff", series=1)
    with client(pacs) as scu:
        scu.get("STUDY", StudyInstanceUID=pacs.study_uid)
    twice = [data for uid, _, data in scu.received if uid == pacs.uids[2]]
    assert len(twice) == 2
    assert twice[0] != twice[1]
    assert twice[0] == pacs.dataset(pacs.uids[2])


def test_hostile_uids_stand_in_command_and_data_set(peer: Callable[..., MisbehavingPacs]) -> None:
    for mode, uid in [("uid_traversal", "../../../../PWNED"), ("uid_newline", "1.2\n\x1b[31mFAKELOGLINE")]:
        with Raw(peer(mode, series=1, instances=1)) as raw:
            raw.pdu()
            raw.ask()
            _, fields, parts = raw.message()
            assert fields[wire.INSTANCE].rstrip(b"\0") == uid.encode()
            assert uid.encode() in b"".join(parts)
    with Raw(peer("ds_traversal", series=1, instances=1)) as raw:
        raw.pdu()
        raw.ask()
        _, fields, parts = raw.message()
        assert b"../../PWNED" in b"".join(parts)
        assert b"PWNED" not in fields[wire.INSTANCE]


def test_deflate_bomb_is_small_and_inflates_to_a_gibibyte() -> None:
    import zlib

    from airflow_dicom_get.testing.misbehaving.modes_object import _bomb

    unpacker, packed, size = zlib.decompressobj(wbits=-15), 0, 0
    instance = archive.build(series=1, instances=1, size=1000, pairs=[(archive.CT, wire.EXPLICIT_LE)])[0]
    for piece in _bomb(instance):
        packed += len(piece)
        size += len(unpacker.decompress(piece))
    assert packed < 2 << 20
    assert size > 1 << 30
    assert unpacker.eof


def test_deflate_bomb_goes_on_a_deflated_context(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer("deflate_bomb", series=1, instances=1, pairs=[(archive.CT, wire.DEFLATED_LE)])
    with client(pacs) as scu:
        scu.get("STUDY", StudyInstanceUID=pacs.study_uid)
    assert [(s, len(d) > 900_000) for _, s, d in scu.received] == [(wire.DEFLATED_LE, True)]


def test_lists_that_lie(peer: Callable[..., MisbehavingPacs]) -> None:
    def images(mode: str | None, **options: object) -> tuple[MisbehavingPacs, list[str]]:
        pacs = peer(mode, **options)
        with client(pacs) as scu:
            rows = scu.find("IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID="", SOPInstanceUID="")
        return pacs, [str(r.SOPInstanceUID) for r in rows]

    pacs, rows = images("find_lists_more")
    assert set(rows) > set(pacs.uids)
    assert len(rows) == 9
    pacs, rows = images("find_cut_at:3")
    assert rows == pacs.uids[:3]
    pacs, rows = images("find_duplicates")
    assert len(rows) == 16
    pacs, rows = images("find_foreign_rows")
    assert len(set(rows) - set(pacs.uids)) == 2
    pacs, rows = images("list_grows")
    assert rows == pacs.uids[:6]


def test_a_list_grows_and_shrinks_with_each_get(peer: Callable[..., MisbehavingPacs]) -> None:
    for mode, expected in [("list_grows", [6, 7, 8, 8]), ("list_shrinks", [8, 7, 7, 7])]:
        pacs = peer(mode)
        counts = []
        with client(pacs) as scu:
            for _ in range(4):
                rows = scu.find("IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID="", SOPInstanceUID="")
                counts.append(len(rows))
                scu.get("STUDY", StudyInstanceUID=pacs.study_uid)
        assert counts == expected, mode


def test_counts_and_classes_can_be_missing_or_wrong(peer: Callable[..., MisbehavingPacs]) -> None:
    for mode, expected in [(None, "8"), ("counts_lie", "9"), ("counts_lie:-2", "6"), ("no_counts", "")]:
        with client(peer(mode)) as scu:
            row = scu.find("STUDY", StudyInstanceUID="", NumberOfStudyRelatedInstances="")[0]
        assert str(row.NumberOfStudyRelatedInstances or "") == expected
    with client(peer("no_classes")) as scu:
        row = scu.find("IMAGE", StudyInstanceUID="", SOPInstanceUID="", SOPClassUID="")[0]
    assert not row.SOPClassUID


@pytest.mark.parametrize(("mode", "codes"), [("wrong_called_ae", (1, 1, 7)), ("reject_local_limit", (2, 3, 2))])
def test_rejections(peer: Callable[..., MisbehavingPacs], mode: str, codes: tuple[int, int, int]) -> None:
    with Raw(peer(mode)) as raw:
        assert raw.pdu() == (wire.ASSOCIATE_RJ, bytes((0, *codes)))


def test_reject_once_then_ok(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer("reject_once_then_ok")
    assert Client(pacs).assoc.is_rejected
    with client(pacs) as scu:
        assert scu.assoc.is_established


def test_healing_counts_only_associations_that_reach_the_misbehaviour(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer("drop", heal_after=2)
    for _ in range(3):
        with client(pacs) as scu:
            assert len(scu.find("STUDY", StudyInstanceUID="")) == 1
    finals = []
    for _ in range(3):
        with client(pacs) as scu:
            last = scu.get("STUDY", StudyInstanceUID=pacs.study_uid)[-1]
            finals.append(last.get("Status"))
    assert finals == [None, None, 0x0000]
    assert pacs.associations == 6


def test_a_victim_is_spoiled_whenever_it_is_asked_for(peer: Callable[..., MisbehavingPacs]) -> None:
    pacs = peer("drop", series=1, instances=6, victim=1)
    series = pacs.instances[0].series
    arrived = []
    for wanted in (pacs.uids, pacs.uids[1:3], pacs.uids[2:]):
        with client(pacs) as scu:
            scu.get("IMAGE", StudyInstanceUID=pacs.study_uid, SeriesInstanceUID=series, SOPInstanceUID=wanted)
        arrived.append(len(scu.received))
    assert arrived == [1, 0, 4]


@pytest.mark.parametrize("offset", [0, 1, 100, 5000])
def test_close_at_a_byte(peer: Callable[..., MisbehavingPacs], offset: int) -> None:
    with Raw(peer(f"close_at:{offset}", series=1, instances=1, size=8000)) as raw:
        raw.pdu()
        raw.ask()
        assert len(raw.read(offset)) == offset
        assert raw.gone()


def test_stall_at_a_byte(peer: Callable[..., MisbehavingPacs]) -> None:
    with Raw(peer("stall_at", param=321, series=1, instances=1)) as raw:
        raw.pdu()
        raw.ask()
        raw.read(321)
        raw.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.sock.recv(1)


def test_mutations_follow_their_seed() -> None:
    def writes(seed: int) -> list[bytes]:
        noise = random.Random(seed)
        return [mutated(bytes(500), noise) for _ in range(1000)]

    assert writes(1) == writes(1) != writes(2)
    assert 20 < sum(write != bytes(500) for write in writes(1)) < 80


def test_release_collision_and_silence(peer: Callable[..., MisbehavingPacs]) -> None:
    with Raw(peer("release_collision")) as raw:
        raw.pdu()
        raw.sock.sendall(wire.pdu(wire.RELEASE_RQ, bytes(4)))
        assert raw.pdu()[0] == wire.RELEASE_RQ
        raw.sock.sendall(wire.pdu(wire.RELEASE_RP, bytes(4)))
        assert raw.pdu()[0] == wire.RELEASE_RP
    with Raw(peer("no_release_rp")) as raw:
        raw.pdu()
        raw.sock.sendall(wire.pdu(wire.RELEASE_RQ, bytes(4)))
        raw.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            raw.sock.recv(1)


def test_close_ends_associations_that_hang() -> None:
    pacs = MisbehavingPacs("silent")
    pacs.start()
    with Raw(pacs) as raw:
        raw.pdu()
        raw.ask()
        time.sleep(0.05)
        started = time.monotonic()
        pacs.close()
        assert time.monotonic() - started < 1
        assert raw.gone()
    assert not [t for t in threading.enumerate() if t.name.startswith(f"misbehaving-pacs-{pacs.port}")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_that_it_is_ready_and_ends_on_a_signal(number: signal.Signals) -> None:
    code = "import sys; from airflow_dicom_get.testing.misbehave import serve; sys.exit(serve('silent', port=0))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("PACS on 127.0.0.1:")
        assert line.endswith("misbehaving: silent\n")
        os.kill(process.pid, number)
        assert process.wait(5) == 0
        assert process.stdout.read() == ""


def test_the_engine_is_not_in_the_data_path() -> None:
    code = (
        "import sys, airflow_dicom_get.testing.misbehave\n"
        "print(sorted(m for m in sys.modules if m.startswith(('pynetdicom', 'pydicom', 'airflow_dicom_get.'))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = set(eval(out))
    assert all(m.startswith("airflow_dicom_get.testing") for m in modules), modules
    assert misbehave.__name__ in modules
