"""What was said with nodes, for whoever runs them: one JSON object a message, and nothing of a patient.

An association that has a :class:`Conversation` tells it what it sends and receives; one that has none costs nothing.
UIDs are kept where they are UIDs, and numbers, statuses and AE titles as they are; of every other value of a query or
of an answer only the keyword of its attribute, or its size. Error Comment (0000,0902) is free text, and left out.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from airflow_dicom_get import clock
from airflow_dicom_get.config.destination import check_own
from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import DicomGetError, InvalidOption, PeerProtocolError
from airflow_dicom_get.vocabulary import AVAILABILITIES

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import UserIdentity
    from airflow_dicom_get.net.acse import Accepted, Proposal

log = logging.getLogger(__name__)

VERSION = 1
"""Of the format; every first entry of an association names it."""
HIDDEN = "***"
"""Stands for a value that is not shown."""
US, PEER = "us", "peer"

_MESSAGES = {
    c.C_STORE_RQ: "C-STORE-RQ",
    c.C_GET_RQ: "C-GET-RQ",
    c.C_FIND_RQ: "C-FIND-RQ",
    c.C_ECHO_RQ: "C-ECHO-RQ",
    c.C_CANCEL_RQ: "C-CANCEL-RQ",
    c.C_STORE_RSP: "C-STORE-RSP",
    c.C_GET_RSP: "C-GET-RSP",
    c.C_FIND_RSP: "C-FIND-RSP",
    c.C_ECHO_RSP: "C-ECHO-RSP",
}
_LEVELS = frozenset({"PATIENT", "STUDY", "SERIES", "IMAGE"})
_COUNTERS = {"remaining": c.REMAINING, "completed": c.COMPLETED, "failed": c.FAILED, "warning": c.WARNING}
_UIDS = {
    h.STUDY_INSTANCE_UID: "StudyInstanceUID",
    h.SERIES_INSTANCE_UID: "SeriesInstanceUID",
    h.SOP_INSTANCE_UID: "SOPInstanceUID",
    h.SOP_CLASS_UID: "SOPClassUID",
    i.AVAILABLE_TRANSFER_SYNTAX: "AvailableTransferSyntaxUID",
}
"""Attributes whose values are shown where they are UIDs."""
_COUNTS = {
    i.STUDY_RELATED_SERIES: "NumberOfStudyRelatedSeries",
    i.STUDY_RELATED_INSTANCES: "NumberOfStudyRelatedInstances",
    i.SERIES_RELATED_INSTANCES: "NumberOfSeriesRelatedInstances",
}
_LONGEST_COUNT = 7
"""Digits of a count that is shown."""


class Transcript:
    """Takes what is told of all associations of a run, of one node or of several. Thread-safe.

    Parameters
    ----------
    run : str
        Tells the entries of this one from others in the same file.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._mutex = threading.Lock()
        self._begun = 0

    def begin(self) -> Conversation:
        """A further association is to be opened."""
        with self._mutex:
            self._begun += 1
            return Conversation(self, self._begun)

    def now(self) -> float:
        """The time of an entry, in seconds since the epoch."""
        return clock.now()

    def monotonic(self) -> float:
        """What durations are measured by, in seconds."""
        return clock.monotonic()

    def take(self, entry: dict[str, Any]) -> None:
        """An entry, in the order in which they come. Never raises."""
        with self._mutex:
            self.write(entry)

    def write(self, entry: dict[str, Any]) -> None:
        """Keep an entry, which can be written as JSON; one call at a time."""
        raise NotImplementedError


class MemoryTranscript(Transcript):
    """Keeps the entries in memory.

    Attributes
    ----------
    entries : list of dict
        In the order in which they came.
    """

    def __init__(self, run: str = "memory") -> None:
        super().__init__(run)
        self.entries: list[dict[str, Any]] = []

    def write(self, entry: dict[str, Any]) -> None:
        """See :meth:`Transcript.write`."""
        self.entries.append(entry)


class FileTranscript(Transcript):
    """Appends the entries to a file, a line each, written whole at once: a killed process leaves none in part.

    A file that cannot be written, or that another user has put in its place, is said once, and the association goes on
    without it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(clock.run_name())
        self.path = path
        self._broken = False

    def write(self, entry: dict[str, Any]) -> None:
        """See :meth:`Transcript.write`."""
        from airflow_dicom_get.storage import files

        if self._broken:
            return
        try:
            check_own(self.path, "transcript")
            try:
                files.append_to(self.path, line_of(entry))
            except FileNotFoundError:
                files.disk.make_folders(self.path.parent)
                files.append_to(self.path, line_of(entry))
        except (OSError, InvalidOption) as error:
            self._broken = True
            why = error.strerror if isinstance(error, OSError) else error.message.rstrip(".")
            log.warning("The transcript %s cannot be written, and ends here: %s.", self.path, why)


def line_of(entry: Mapping[str, Any]) -> bytes:
    """An entry as a line of the file."""
    return json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"


_FILES: WeakValueDictionary[Path, FileTranscript] = WeakValueDictionary()


def transcript_of(option: Path | Transcript | None) -> Transcript | None:
    """What the option ``transcript`` means. All that is open on one file numbers its associations together."""
    if not isinstance(option, Path):
        return option
    path = option.absolute()
    return _FILES.get(path) or _FILES.setdefault(path, FileTranscript(path))


class Conversation:
    """One association, as it is told to a :class:`Transcript`."""

    def __init__(self, transcript: Transcript, number: int) -> None:
        self._transcript, self._number = transcript, number
        self._began = self._transcript.monotonic()
        self._contexts: dict[int, Proposal] = {}
        self._object: dict[str, Any] | None = None
        """The C-STORE that has begun and was not answered yet."""
        self._object_began = 0.0
        self._object_bytes = 0
        self._objects = self._bytes = 0
        self._over = False

    def _tell(self, by: str, message: str, facts: Mapping[str, Any]) -> None:
        at = (
            datetime.fromtimestamp(self._transcript.now(), UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
        whose = {"at": at, "run": self._transcript.run, "association": self._number}
        known = {key: value for key, value in facts.items() if value is not None}
        self._transcript.take({**whose, "from": by, "message": message, **known})

    # --- the association -----------------------------------------------------------------------

    def connecting(self, address: str, *, tls: bool) -> None:
        """A connection is to be made with a host and port."""
        self._tell(US, "connect", {"transcript": VERSION, "node": address, "tls": tls})

    def requested(
        self,
        calling: str,
        called: str,
        proposals: Sequence[Proposal],
        *,
        storage_classes: Sequence[str] = (),
        max_pdu_length: int,
        user_identity: UserIdentity | None = None,
    ) -> None:
        """The A-ASSOCIATE-RQ, as :func:`~airflow_dicom_get.net.acse.encode_request` makes it."""
        self._contexts = {2 * at + 1: proposal for at, proposal in enumerate(proposals)}
        facts = {
            "calling": calling,
            "called": called,
            "max_pdu": max_pdu_length,
            "user_identity": user_identity.identity_type if user_identity is not None else None,
            "contexts": [_context(number, proposal) for number, proposal in self._contexts.items()],
            "roles": [{"sop_class": uid, "scu": False, "scp": True} for uid in dict.fromkeys(storage_classes)] or None,
        }
        self._tell(US, "A-ASSOCIATE-RQ", facts)

    def accepted(self, accepted: Accepted) -> None:
        """The A-ASSOCIATE-AC."""
        results, refused = accepted.results, accepted.refused_roles
        roles = [{"sop_class": _uid(uid), "scp": uid not in refused} for uid in sorted(accepted.answered_roles)]
        facts = {
            "max_pdu": accepted.max_pdu_length,
            "implementation": accepted.implementation or None,
            "accepted": [_context(number, proposal) for number, proposal in sorted(accepted.contexts.items())],
            "refused": {str(number): result for number, result in sorted(results.items()) if result} or None,
            "unanswered": sorted(self._contexts.keys() - results.keys()) or None,
            "remarks": accepted.remarks or None,
            "roles": roles or None,
        }
        self._tell(PEER, "A-ASSOCIATE-AC", facts)

    def ended(self, by: str, how: str, facts: Mapping[str, Any] | None = None) -> None:
        """The association is over; only the first call counts, which knows why."""
        if self._over:
            return
        self._over = True
        unfinished = {**self._object, "bytes": self._object_bytes} if self._object is not None else None
        numbers = {"unfinished": unfinished, "objects": self._objects, "bytes": self._bytes}
        seconds = round(self._transcript.monotonic() - self._began, 3)
        self._tell(by, "end", {"how": how, **(facts or {}), **numbers, "seconds": seconds})

    def not_connected(self, error: DicomGetError) -> None:
        """No connection came about."""
        self.ended(US, "not connected", {"error": error.word, "phase": error.facts.get("phase")})

    # --- messages ------------------------------------------------------------------------------

    def sent(self, context_id: int, command: bytes, dataset: bytes | bytearray | None = None) -> None:
        """A message of ours."""
        try:
            self._message(US, context_id, c.Command(command), dataset)
        except PeerProtocolError:  # what ours never is
            return

    def received(self, context_id: int, command: c.Command, dataset: bytes | bytearray | None = None) -> None:
        """A message of the peer, with its data set unless that is an object."""
        self._message(PEER, context_id, command, dataset)

    def data(self, size: int) -> None:
        """So many further bytes of an object, sent or received."""
        self._object_bytes += size

    def _message(self, by: str, context_id: int, command: c.Command, dataset: bytes | bytearray | None) -> None:
        field = command.field
        facts: dict[str, Any] = {"context": context_id}
        facts["id"] = command.message_id if command.message_id is not None else command.responded_id
        if sop_class := command.text(c.AFFECTED_SOP_CLASS):
            facts["sop_class"] = _uid(sop_class)
        if sop := command.text(c.AFFECTED_SOP_INSTANCE):
            facts["sop_instance"] = _uid(sop)
        if command.status is not None:
            facts["status"] = f"{command.status:04X}"
        facts |= {name: command.us(element) for name, element in _COUNTERS.items()}
        if field == c.C_STORE_RQ:
            proposal = self._contexts.get(context_id)
            facts["transfer_syntax"] = proposal.transfer_syntax if proposal is not None else None
            self._object = {"sop_instance": facts.get("sop_instance")}
            self._object_began, self._object_bytes = self._transcript.monotonic(), 0
        elif field == c.C_STORE_RSP:
            facts |= self._answered()
        elif dataset is not None:
            facts |= _identifier(field, bytes(dataset))
        if field == c.C_GET_RSP and command.stray:
            facts.setdefault("failed_uids", _values(command.stray.get(i.FAILED_SOP_INSTANCES, b"")) or None)
        self._tell(by, _MESSAGES.get(field, f"{field:04X}"), facts)

    def _answered(self) -> dict[str, Any]:
        size, self._object = self._object_bytes, None
        self._objects += 1
        self._bytes += size
        self._object_bytes = 0
        return {"bytes": size, "seconds": round(self._transcript.monotonic() - self._object_began, 3)}


def _context(number: int, proposal: Proposal) -> dict[str, Any]:
    return {"id": number, "abstract_syntax": proposal.abstract_syntax, "transfer_syntax": proposal.transfer_syntax}


def _uid(text: str) -> str:
    return text if is_uid(text) else HIDDEN


def _values(raw: bytes) -> list[str]:
    """A value of UIDs, each shown if it is one."""
    return [_uid(part.strip("\0 ")) for part in raw.decode("ascii", "replace").split("\\") if part.strip("\0 ")]


def _shown(raw: bytes) -> str | list[str]:
    values = _values(raw)
    return values if len(values) > 1 else values[0] if values else ""


def _identifier(field: int, data: bytes) -> dict[str, Any]:
    """What is shown of the data set of a message that is no object."""
    if not field & 0x8000:
        level, keys = "", {}
        for tag, raw in i.elements_of(data):
            if tag == i.QUERY_RETRIEVE_LEVEL:
                level = i.text_value(raw) or ""
            elif tag != h.SPECIFIC_CHARACTER_SET:
                keys[_keyword(tag)] = _shown(raw) if tag in _UIDS else HIDDEN if raw.strip(b"\0 ") else ""
        return {"level": level if level in _LEVELS else HIDDEN, "keys": keys}
    try:
        found = i.decode_identifier(data, {*_UIDS, *_COUNTS, i.INSTANCE_AVAILABILITY, i.FAILED_SOP_INSTANCES})
    except h.HeaderError:
        return {"bytes": len(data), "unreadable": True}
    if field == c.C_GET_RSP:
        return {"failed_uids": _values(found.get(i.FAILED_SOP_INSTANCES, b"")) or None}
    row: dict[str, Any] = {name: _shown(found[tag]) for tag, name in _UIDS.items() if found.get(tag)}
    for tag, name in _COUNTS.items():
        text = i.text_value(found.get(tag)) or ""
        if text.isascii() and text.isdigit() and len(text) <= _LONGEST_COUNT:
            row[name] = int(text)
    if (word := i.text_value(found.get(i.INSTANCE_AVAILABILITY))) in AVAILABILITIES:
        row["InstanceAvailability"] = word
    return {"row": row, "bytes": len(data)}


def _keyword(tag: int) -> str:
    from pydicom.datadict import keyword_for_tag

    return keyword_for_tag(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
