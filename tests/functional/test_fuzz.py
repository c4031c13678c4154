"""Whole associations with a peer whose bytes are not what they should be: a result of ours, in time, in bounds.

A relay changes what a good PACS sends, at any place of any connection; and a peer that is none sends
anything at any stage. `make fuzz` tries many more of both than the suite does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from airflow_dicom_get import GetScu
from airflow_dicom_get.config.groups import Deadlines
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.errors import DicomGetError, InvalidQuery
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import CancelToken
from airflow_dicom_get.net.peer import Peer
from airflow_dicom_get.testing.misbehave import MisbehavingPacs

EXAMPLES = int(os.environ.get("FUZZ_ASSOCIATIONS", "12"))
SHORT: dict[str, Any] = {
    "connect": 1.0, "acse": 0.3, "find_response": 0.3, "next_object": 0.3, "idle": 0.3, "min_rate_window": 0.3,
    "release": 0.1, "operation": 3.0,
}  # fmt: skip
LONGEST = 8.0
SIZE, COUNT = 1500, 3
VERDICTS = {"complete", "partial", "unverified", "failed", "empty"}
EACH = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Edit = tuple[int, str, bytes]


def _memory() -> int:
    """Resident bytes now: what other tests of this process have used does not count."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


@pytest.fixture(scope="module", autouse=True)
def memory_before() -> int:
    """Resident bytes before the first test here."""
    return _memory()


class Changing:
    """A relay that changes what the server sends: per connection, edits at offsets of its bytes."""

    def __init__(self, target: int, edits: Sequence[Sequence[Edit]]) -> None:
        self.target, self.edits = target, edits
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Changing:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self.sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        number = 0
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [client, server]
                edits = self.edits[number % len(self.edits)] if self.edits else ()
                number += 1
                threading.Thread(target=_pump, args=(client, server, ()), daemon=True).start()
                threading.Thread(target=_pump, args=(server, client, sorted(edits)), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, edits: Sequence[Edit]) -> None:
    passed, left = 0, list(edits)
    with suppress(OSError):
        while data := source.recv(65536):
            out, at = bytearray(), 0
            while left and left[0][0] < passed + len(data):
                place, kind, value = left.pop(0)
                place = max(place - passed, at)
                out += data[at:place]
                at = place
                if kind == "replace":
                    out += value
                    at += len(value)
                elif kind == "insert":
                    out += value
                elif kind == "delete":
                    at += len(value)
                elif kind == "end":
                    target.sendall(out)
                    target.shutdown(socket.SHUT_RDWR)
                    return
            out += data[at:]
            passed += len(data)
            target.sendall(out)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


# The interesting bytes: lengths, types, group and element numbers, everything that flips a sign or a size.
_VALUES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x04\0", b"\x07", b"\n"]),
)
_PLACES = st.one_of(st.integers(0, 700), st.integers(0, COUNT * (SIZE + 400)))
_EDITS = st.lists(
    st.tuples(_PLACES, st.sampled_from(["replace", "insert", "delete", "end"]), _VALUES), min_size=0, max_size=3
)


@pytest.fixture(scope="module")
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs(series=1, instances=COUNT, size=SIZE, list_syntaxes=True) as server:
        yield server


def check(result: Any, folder: Path, uids: Sequence[str], seconds: float) -> None:
    """What must be so whatever was sent."""
    assert result.verdict in VERDICTS
    assert seconds < LONGEST, result
    assert result.failed == result.total - result.completed
    if result.verdict == "complete":
        assert result.completed == result.total > 0
    json.dumps(result.to_json())
    names = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert len(names) <= 2  # the study, and the manifests
    for path in folder.rglob("*"):
        if path.is_file() and "_manifests" not in path.parts:
            assert path.suffix == ".dcm", path
            assert set(path.stem) <= set("0123456789.")
    held = {row["sop_instance_uid"] for row in result.manifest.to_dict("records") if row["state"] == "stored"}
    assert held <= {path.stem for path in folder.rglob("*.dcm")}
    assert "HOSTILE" not in json.dumps(result.to_json())


@EACH
@example(edits=[[(373, "replace", b"\x00\x00\x80")]], several=False)
@given(edits=st.lists(_EDITS, min_size=1, max_size=4), several=st.booleans())
def test_what_a_good_pacs_sends_changed_anywhere(pacs: MisbehavingPacs, edits: list[list[Edit]], several: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with Changing(pacs.port, edits) as relay:
            scu = GetScu(
                f"PACS@127.0.0.1:{relay.port}",
                destination=folder,
                deadlines=SHORT,
                retries=1,
                durable=False,
                associations=2 if several else 1,
            )
            begun = time.monotonic()
            refused = None
            try:
                result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
            except InvalidQuery as error:  # the UID was changed in all rows, so the PACS seems not to know the key
                refused = error
            if refused is None:
                check(result, folder, pacs.uids, time.monotonic() - begun)
            else:
                assert "does not support the key" in str(refused)
                assert not list(folder.rglob("*.dcm"))
        # Whatever it has come to, the next run from a good PACS makes it whole, unless bytes were changed in a
        # way that nobody can see: then the first stays.
        again = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=folder, durable=False)
        whole = again.get_study({"StudyInstanceUID": pacs.study_uid})
        assert whole.verdict in ("complete", "partial"), whole
        assert whole.verdict == "complete" or whole.conflicts
    finally:
        shutil.rmtree(folder)


class AnyPeer:
    """Sends prepared bytes at each turn, after something was received, and closes or stays silent at the end."""

    def __init__(self, turns: Sequence[bytes], close: bool) -> None:
        self.turns, self.close = turns, close
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> AnyPeer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.sockets.append(client)
                threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with suppress(OSError):
            for turn in self.turns:
                if not client.recv(65536):
                    return
                client.sendall(turn)
            if self.close:
                client.shutdown(socket.SHUT_RDWR)
            else:
                while client.recv(65536):
                    pass

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self.sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _pdu(kind: int, body: bytes, length: int | None) -> bytes:
    return bytes((kind, 0)) + (len(body) if length is None else length).to_bytes(4, "big") + body


_LENGTHS = st.one_of(st.none(), st.sampled_from([0, 1, 3, 4, 0x20000, 0x7FFFFFFF, 0xFFFFFFFF]))
_PDVS = st.builds(
    lambda length, context, control, value: (
        (len(value) + 2 if length is None else length).to_bytes(4, "big") + bytes((context, control)) + value
    ),
    _LENGTHS, st.integers(0, 255), st.integers(0, 3), st.binary(max_size=60),
)  # fmt: skip
_PDUS = st.one_of(
    st.binary(max_size=100),
    st.builds(_pdu, st.integers(0, 9), st.binary(max_size=100), _LENGTHS),
    st.builds(lambda pdvs, length: _pdu(4, b"".join(pdvs), length), st.lists(_PDVS, max_size=4), _LENGTHS),
)


@pytest.fixture(scope="module")
def accept(pacs: MisbehavingPacs) -> bytes:
    """What a good PACS answers to the association request of a C-FIND."""
    from airflow_dicom_get.net.acse import encode_request
    from airflow_dicom_get.net.find import FIND_PROPOSALS

    with socket.create_connection(("127.0.0.1", pacs.port)) as sock:
        sock.sendall(encode_request("GET-SCU", "PACS", FIND_PROPOSALS, max_pdu_length=131072))
        data = sock.recv(65536)
    assert data[0] == 2
    return data


@EACH
@given(turns=st.lists(_PDUS, min_size=1, max_size=5), good_start=st.booleans(), close=st.booleans())
def test_a_peer_that_sends_anything(accept: bytes, turns: list[bytes], good_start: bool, close: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with AnyPeer([accept, *turns] if good_start else turns, close) as peer:
            scu = GetScu(f"PACS@127.0.0.1:{peer.port}", destination=folder, deadlines=SHORT, retries=0)
            begun = time.monotonic()
            result = scu.get_study({"StudyInstanceUID": "1.2.3"})
            check(result, folder, (), time.monotonic() - begun)
            assert result.verdict != "complete"
    finally:
        shutil.rmtree(folder)


@EACH
@given(answer=st.one_of(_PDUS, st.binary(max_size=300).map(lambda body: _pdu(2, body, None))), close=st.booleans())
def test_an_association_is_made_or_refused_in_words(answer: bytes, close: bool) -> None:
    deadlines = Deadlines(**SHORT)
    with AnyPeer([answer], close) as peer:
        begun = time.monotonic()
        with suppress(DicomGetError):  # and nothing else
            us = Peer(Node("127.0.0.1", peer.port, "PACS"), "US", "PACS", deadlines)
            association = us.open([Proposal("1.2.840.10008.1.1", "1.2.840.10008.1.2")], CancelToken())
            association.abort()
        assert time.monotonic() - begun < 2


def test_memory_stayed_bounded(memory_before: int) -> None:
    assert _memory() - memory_before < 200 << 20
