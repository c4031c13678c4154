"""An SCP that answers C-FIND and C-GET from memory, to measure what a C-GET SCU can reach.

    python benchmarks/memory_scp.py --port 11500 --instances 1000 --size 524288

The instances of its one study (``STUDY``) differ in their UIDs only: one data set is patched and
framed before the first client comes, and each object leaves in one write. Every association is served
by a process of its own. Each C-STORE-RQ waits for the response to the one before.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.pdata import (
    A_ASSOCIATE_RQ,
    A_RELEASE_RQ,
    RELEASE_RP,
    Deframer,
    Fragment,
    Pdu,
    frame_message,
)

ROOT = "1.2.826.0.1.3680043.10.1511"
STUDY = f"{ROOT}.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
MAX_PDU = 131072
"""What most clients ask for; other sizes are framed again in each association."""
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_KEYS = frozenset({
    i.QUERY_RETRIEVE_LEVEL, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID, h.SOP_CLASS_UID,
    h.MODALITY, h.INSTANCE_NUMBER, i.STUDY_RELATED_INSTANCES, i.SERIES_RELATED_INSTANCES,
})  # fmt: skip
_UIDS = (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID, h.SOP_CLASS_UID)


def sop_uid(number: int) -> str:
    """SOP Instance UID of an instance; all have one length."""
    return f"{STUDY}.9.{100000000 + number}"


class Framed(NamedTuple):
    """A framed C-STORE-RQ, and where in it the UIDs stand that make it another instance."""

    message: bytearray
    instance: tuple[int, int]
    series: int


class Study:
    """The one study: its instances by number, series by turns."""

    def __init__(self, instances: int, size: int, series: int) -> None:
        self.instances, self.series = instances, series
        self.dataset = self._dataset(size)
        self._framed: dict[int, Framed] = {}

    def frame(self, peer_max: int) -> Framed:
        """The C-STORE-RQ of an instance in PDUs of a size; framed once, as 128 MiB take half a second."""
        if peer_max not in self._framed:
            elements: dict[int, int | str] = {
                c.AFFECTED_SOP_CLASS: CT, c.COMMAND_FIELD: c.C_STORE_RQ, c.MESSAGE_ID: 1, c.PRIORITY: 0,
                c.DATASET_TYPE: c.DATASET_FOLLOWS, c.AFFECTED_SOP_INSTANCE: sop_uid(0),
            }  # fmt: skip
            framed = bytearray(frame_message(1, c.encode(elements), self.dataset, peer_max))
            uid = sop_uid(0).encode()
            in_command = framed.index(uid)
            in_dataset = framed.index(uid, in_command + 1)
            self._framed[peer_max] = Framed(
                framed, (in_command, in_dataset), framed.index(self.series_uid(0).encode(), in_dataset)
            )
        return self._framed[peer_max]

    def series_uid(self, number: int) -> str:
        """Series Instance UID of an instance."""
        return f"{STUDY}.{1000 + number % self.series}"

    def _dataset(self, size: int) -> bytes:
        """An explicit VR little endian data set of a CT image, ``size`` bytes of random pixels."""
        out = bytearray()
        rows = 512 if size >= 524288 else 64
        for tag, vr, value in (
            (0x00080016, b"UI", CT.encode()), (0x00080018, b"UI", sop_uid(0).encode()), (0x00080060, b"CS", b"CT"),
            (0x00100010, b"PN", b"BENCH^MARK"), (0x00100020, b"LO", b"BENCH"), (0x0020000D, b"UI", STUDY.encode()),
            (0x0020000E, b"UI", self.series_uid(0).encode()), (0x00200013, b"IS", b"1"),
            (0x00280010, b"US", struct.pack("<H", rows)), (0x00280011, b"US", struct.pack("<H", rows)),
            (0x00280100, b"US", b"\x10\0"),
        ):  # fmt: skip
            value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
            out += struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value
        block = os.urandom(min(size, 1 << 20))
        pixels = (block * (size // len(block) + 1))[: size - size % 2]
        return bytes(out + struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OW", 0, len(pixels))) + pixels

    def select(self, keys: dict[int, bytes]) -> Sequence[int]:
        """Numbers of the instances that an identifier asks for."""
        if sops := keys.get(h.SOP_INSTANCE_UID):
            return [int(uid.rsplit(b".", 1)[1]) - 100000000 for uid in sops.strip(b"\0").split(b"\\")]
        if series := keys.get(h.SERIES_INSTANCE_UID):
            wanted = {int(uid.rsplit(b".", 1)[1]) - 1000 for uid in series.strip(b"\0").split(b"\\")}
            return [n for n in range(self.instances) if n % self.series in wanted]
        return range(self.instances)

    def rows(self, keys: dict[int, bytes]) -> Iterator[bytes]:
        """C-FIND rows for an identifier."""
        level = keys[i.QUERY_RETRIEVE_LEVEL].strip(b" \0").decode()
        row: dict[int, str] = {i.QUERY_RETRIEVE_LEVEL: level, h.STUDY_INSTANCE_UID: STUDY}
        numbers = self.select(keys)
        if level == "STUDY":
            yield i.encode_identifier({**row, i.STUDY_RELATED_INSTANCES: str(self.instances)}, _UIDS)
        elif level == "SERIES":
            for series in range(self.series):
                count = len(range(series, self.instances, self.series))
                series_row = {
                    **row, h.SERIES_INSTANCE_UID: self.series_uid(series), h.MODALITY: "CT",
                    i.SERIES_RELATED_INSTANCES: str(count),
                }  # fmt: skip
                yield i.encode_identifier(series_row, _UIDS)
        else:
            for n in numbers:
                image_row = {
                    **row, h.SERIES_INSTANCE_UID: self.series_uid(n), h.SOP_INSTANCE_UID: sop_uid(n),
                    h.SOP_CLASS_UID: CT, h.INSTANCE_NUMBER: str(n + 1),
                }  # fmt: skip
                yield i.encode_identifier(image_row, _UIDS)


class Association:
    """One association, served to its end."""

    def __init__(self, sock: socket.socket, study: Study, latency: float, pending_every: int) -> None:
        self.sock, self.study = sock, study
        self.latency, self.pending_every = latency, pending_every
        self.deframer = Deframer(1 << 20)
        self.buffer = memoryview(bytearray(1 << 16))
        self.items: list[Fragment | Pdu] = []
        self.storage_context = 0
        self.peer_max = 16384

    def item(self) -> Fragment | Pdu:
        """The next fragment (copied) or PDU."""
        while not self.items:
            size = self.sock.recv_into(self.buffer)
            if not size:
                raise ConnectionError
            self.items = [
                x._replace(data=memoryview(bytes(x.data))) if isinstance(x, Fragment) else x
                for x in self.deframer.feed(self.buffer[:size])
            ]
        return self.items.pop(0)

    def negotiate(self, request: bytes) -> None:
        """Accept every context, images in explicit VR and queries in implicit VR; grant the roles asked for."""
        results, roles, pos = b"", b"", 68
        while pos < len(request):
            kind, length = struct.unpack_from(">BxH", request, pos)
            body = request[pos + 4 : pos + 4 + length]
            pos += 4 + length
            if kind == 0x20:
                items = list(_subitems(body, 4))
                abstract = next(value for sub, value in items if sub == 0x30).decode()
                offered = [value for sub, value in items if sub == 0x40]
                wanted = (_EXPLICIT if abstract == CT else _IMPLICIT).encode()
                syntax = wanted if wanted in offered else offered[0]
                if abstract == CT and syntax == wanted:
                    self.storage_context = body[0]
                item = bytes((body[0], 0, 0, 0)) + struct.pack(">BBH", 0x40, 0, len(syntax)) + syntax
                results += struct.pack(">BBH", 0x21, 0, len(item)) + item
            elif kind == 0x50:
                for sub, value in _subitems(body, 0):
                    if sub == 0x51:
                        self.peer_max = struct.unpack(">L", value)[0] or 1 << 20
                    elif sub == 0x54:
                        roles += struct.pack(">BBH", 0x54, 0, len(value)) + value
        user = struct.pack(">BBHL", 0x51, 0, 4, 131072) + roles
        user += struct.pack(">BBH", 0x52, 0, len(ROOT)) + ROOT.encode()
        context = b"1.2.840.10008.3.1.1.1"
        body = struct.pack(">HH", 1, 0) + request[4:36] + bytes(32)
        body += struct.pack(">BBH", 0x10, 0, len(context)) + context + results
        body += struct.pack(">BBH", 0x50, 0, len(user)) + user
        self.sock.sendall(struct.pack(">BBL", 2, 0, len(body)) + body)

    def message(self) -> tuple[int, c.Command, bytes] | None:
        """One DIMSE message, or None at the end."""
        command: c.Command | None = None
        raw, data = bytearray(), bytearray()
        while True:
            item = self.item()
            if isinstance(item, Pdu):
                if item.pdu_type == A_ASSOCIATE_RQ:
                    self.negotiate(item.data)
                    continue
                if item.pdu_type == A_RELEASE_RQ:
                    self.sock.sendall(RELEASE_RP)
                return None
            if item.is_command:
                raw += item.data
                if item.last:
                    command = c.Command(raw)
                    if not command.has_dataset:
                        return item.context_id, command, b""
            else:
                data += item.data
                if item.last:
                    assert command is not None
                    return item.context_id, command, bytes(data)

    def serve(self) -> None:
        """Answer until the association ends."""
        while (message := self.message()) is not None:
            context, command, data = message
            if command.field == c.C_ECHO_RQ:
                self.respond(context, command, 0)
            elif command.field == c.C_FIND_RQ:
                out = bytearray()
                for row in self.study.rows(i.decode_identifier(bytearray(data), _KEYS)):
                    out += self.response(context, command, 0xFF00, dataset=row)
                    if len(out) > 1 << 16:
                        self.sock.sendall(out)
                        out.clear()
                self.sock.sendall(bytes(out) + self.response(context, command, 0))
            elif command.field == c.C_GET_RQ:
                self.get(context, command, i.decode_identifier(bytearray(data), _KEYS))

    def response(
        self, context: int, command: c.Command, status: int, counts: tuple[int, int] = (0, 0),
        dataset: bytes | None = None,
    ) -> bytes:  # fmt: skip
        """A response, framed."""
        elements: dict[int, int | str] = {
            c.AFFECTED_SOP_CLASS: command.text(c.AFFECTED_SOP_CLASS),
            c.COMMAND_FIELD: command.field | 0x8000,
            c.RESPONDED_MESSAGE_ID: command.message_id or 0,
            c.DATASET_TYPE: c.DATASET_FOLLOWS if dataset is not None else c.NO_DATASET,
            c.STATUS: status,
        }
        if command.field == c.C_GET_RQ:
            elements.update({c.COMPLETED: min(counts[0], 65535), c.FAILED: 0, c.WARNING: 0})
            if status == 0xFF00:
                elements[c.REMAINING] = min(counts[1], 65535)
        return frame_message(context, c.encode(elements), dataset, self.peer_max)

    def respond(self, context: int, command: c.Command, status: int) -> None:
        """Send a response without data set."""
        self.sock.sendall(self.response(context, command, status))

    def get(self, context: int, command: c.Command, keys: dict[int, bytes]) -> None:
        """Send what is asked for, one object at a time."""
        numbers = self.study.select(keys)
        framed, places, series_place = self.study.frame(self.peer_max)
        pos = 0
        while pos < len(framed):  # a header of 6 bytes, then the length and the context of its one fragment
            framed[pos + 10] = self.storage_context
            pos += 6 + struct.unpack_from(">L", framed, pos + 2)[0]
        pending = b""
        for done, number in enumerate(numbers):
            uid = sop_uid(number).encode()
            for place in places:
                framed[place : place + len(uid)] = uid
            own = self.study.series_uid(number).encode()
            framed[series_place : series_place + len(own)] = own
            if self.latency:
                time.sleep(self.latency)
            self.sock.sendall(pending + framed if pending and len(framed) < 1 << 16 else framed)
            pending = b""
            answer = self.message()
            if answer is None:
                return
            if answer[1].field == c.C_CANCEL_RQ:
                self.respond(context, command, 0xFE00)
                return
            if self.pending_every and done + 1 < len(numbers) and (done + 1) % self.pending_every == 0:
                pending = self.response(context, command, 0xFF00, (done + 1, len(numbers) - done - 1))
                if len(framed) >= 1 << 16:
                    self.sock.sendall(pending)
                    pending = b""
        self.sock.sendall(self.response(context, command, 0, (len(numbers), 0)))


def _subitems(body: bytes, pos: int) -> Iterator[tuple[int, bytes]]:
    while pos + 4 <= len(body):
        kind, length = struct.unpack_from(">BxH", body, pos)
        yield kind, body[pos + 4 : pos + 4 + length].rstrip(b"\0") if kind != 0x51 else body[pos + 4 : pos + 8]
        pos += 4 + length


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=11500)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--size", type=int, default=524288, help="bytes of pixels an instance")
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--latency-ms", type=float, default=0, help="wait before each object")
    parser.add_argument("--pending-every", type=int, default=1, help="objects between two Pending responses; 0: none")
    args = parser.parse_args()
    study = Study(args.instances, args.size, args.series)
    study.frame(MAX_PDU)
    listener = socket.create_server(("127.0.0.1", args.port), backlog=64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"ready on 127.0.0.1:{listener.getsockname()[1]}, study {STUDY}", flush=True)
    try:
        while True:
            sock, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    Association(sock, study, args.latency_ms / 1000, args.pending_every).serve()
                except ConnectionError:
                    pass
                os._exit(0)
            sock.close()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
