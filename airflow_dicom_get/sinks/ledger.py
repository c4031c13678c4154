"""The ledger: what a run took and confirmed, one JSON line each, so that the next run knows.

One writer a file, one file a run and study; readers take the union of all runs. A line is written
whole by one ``write``, so a killed process loses nothing that was written before.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from airflow_dicom_get.errors import LedgerError
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.storage import files

SCHEMA = 1


def header_line() -> str:
    """The first line of a ledger."""
    return json.dumps({"ledger": SCHEMA}) + "\n"


def taken_line(instance: Instance | Stored) -> str:
    """The line that says that an instance is there whole."""
    entry = {
        "state": "taken",
        "uid": instance.sop,
        "series": instance.series,
        "class": instance.sop_class,
        "syntax": instance.syntax,
        "size": instance.bytes,
        "dataset_offset": instance.dataset_offset,
        "sha256": instance.sha256.hex() if instance.sha256 else None,
        "modality": instance.modality,
        "series_number": instance.series_number,
        "instance_number": instance.instance_number,
    }
    if instance.forwarded_to is not None:
        entry["forwarded_to"] = instance.forwarded_to
    return json.dumps(entry) + "\n"


def durable_line(uid: str, etag: str | None = None) -> str:
    """The record that says that an instance is durable."""
    return json.dumps({"state": "durable", "uid": uid} | ({"etag": etag} if etag else {})) + "\n"


def dropped_line(uid: str) -> str:
    """The line that takes a ``taken`` back."""
    return json.dumps({"state": "dropped", "uid": uid}) + "\n"


class Ledger(Protocol):
    """The records of one run for one study. What cannot be recorded raises ``OSError``."""

    def taken(self, instance: Instance | Stored) -> None:
        """Record that the whole instance is there, before it gets its final name."""

    def durable(self, uids: Iterable[str], etag: str | None = None) -> None:
        """Record that these are durable; ``etag`` is the store's own mark of the content."""

    def dropped(self, uid: str) -> None:
        """Take back a ``taken``: the object did not get its final name."""

    def sync(self) -> None:
        """Make the ledger itself durable."""

    def close(self) -> None:
        """Close; a ledger that recorded nothing leaves nothing behind."""


class Ledgers(Protocol):
    """The ledgers of all runs, wherever they lie."""

    def open(self, study: str, run: str) -> Ledger:
        """Begin the ledger of a run for a study. Raises ``OSError``."""

    def read(self, study: str, forwarded_to: str | None = None) -> dict[str, list[Stored]]:
        """What all runs recorded of a study, as :func:`read_ledgers` gives it. Raises :class:`LedgerError`."""


class FolderLedgers:
    """The ledgers below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, study: str, run: str) -> Ledger:
        """See :meth:`Ledgers.open`."""
        return LedgerWriter(self.root, study, run)

    def read(self, study: str, forwarded_to: str | None = None) -> dict[str, list[Stored]]:
        """See :meth:`Ledgers.read`."""
        return read_ledgers(self.root, study, forwarded_to)


class LedgerWriter:
    """Appends the records of one run for one study to ``<root>/.ledger/<study>/<run>.jsonl``."""

    def __init__(self, root: Path, study: str, run: str) -> None:
        folder = root / ".ledger" / study
        self._disk = files.disk
        self._disk.make_folders(folder)
        self.path = folder / f"{run}.jsonl"
        self._fd = self._disk.open(self.path, files.APPEND)
        self._mutex = threading.Lock()
        self._size = 0

    def _append(self, lines: str) -> None:
        with self._mutex:
            if not self._size:
                lines = header_line() + lines
            data = lines.encode("ascii")
            if self._disk.write(self._fd, data) != len(data):
                # Part of a line would break what is appended once there is room.
                self._disk.truncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(data)

    def taken(self, instance: Instance | Stored) -> None:
        """See :meth:`Ledger.taken`."""
        self._append(taken_line(instance))

    def durable(self, uids: Iterable[str], etag: str | None = None) -> None:
        """See :meth:`Ledger.durable`; one write."""
        self._append("".join(durable_line(uid, etag) for uid in uids))

    def dropped(self, uid: str) -> None:
        """See :meth:`Ledger.dropped`."""
        self._append(dropped_line(uid))

    def sync(self) -> None:
        """Make the ledger itself durable."""
        self._disk.sync(self._fd)

    def close(self) -> None:
        """Close; a ledger that recorded nothing is removed."""
        self._disk.close(self._fd)
        if not self._size:
            self._disk.remove(self.path)


def read_ledgers(root: Path, study: str, forwarded_to: str | None = None) -> dict[str, list[Stored]]:
    """What all runs recorded of a study, by SOP Instance UID: the likeliest record first.

    One root may serve several destinations: of forwards only those to ``forwarded_to`` are read, and
    without it none. Durable ones come before those that were only taken, newer ones before older ones. A torn last
    line is ignored.

    Raises
    ------
    LedgerError
        A file is of a newer schema, or broken before its last line; it is left as it is.
    """
    folder = root / ".ledger" / study
    try:
        paths = [folder / name for name in reversed(files.names_in(folder)) if name.endswith(".jsonl")]
    except OSError as error:
        raise LedgerError(f"The ledger of study {study} cannot be listed: {error.strerror}.", study=study) from error
    return merge_records((parse_ledger([(str(path), _content(path, study))], study) for path in paths), forwarded_to)


def merge_records(runs: Iterable[Mapping[str, Stored]], forwarded_to: str | None = None) -> dict[str, list[Stored]]:
    """The union of what runs recorded, each given newest first, as :func:`read_ledgers` gives it."""
    records: dict[str, list[Stored]] = {}
    for run in runs:
        for uid, record in run.items():
            if record.forwarded_to == forwarded_to:
                records.setdefault(uid, []).append(record)
    for candidates in records.values():
        candidates.sort(key=lambda record: not record.durable)
    return records


def _content(path: Path, study: str) -> bytes:
    try:
        return files.read_whole(path)
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be read: {error.strerror}.", study=study, path=str(path)
        ) from error


def parse_ledger(parts: Iterable[tuple[str, bytes]], study: str) -> dict[str, Stored]:
    """The records of one run, in one file or several: where each lies, and its content.

    Raises
    ------
    LedgerError
        A part is of a newer schema, or broken before its last line.
    """
    records: dict[str, Stored] = {}
    for path, data in parts:
        for entry in _entries(path, data, study):
            try:
                uid = str(entry["uid"])
                match entry["state"]:
                    case "taken":
                        records[uid] = _record(uid, entry)
                    case "durable" if uid in records:
                        records[uid].durable = True
                        records[uid].etag = entry.get("etag")
                    case "dropped":
                        records.pop(uid, None)
            except (KeyError, OverflowError, TypeError, ValueError):
                raise LedgerError(
                    f"The ledger {path} contains an unreadable record.",
                    hint="It was not changed. Move it away to fetch its instances again.",
                    study=study,
                    path=path,
                ) from None
    return records


def _record(uid: str, entry: Mapping[str, Any]) -> Stored:
    digest = entry["sha256"]
    return Stored(
        series=sys.intern(str(entry["series"])),
        sop=uid,
        sop_class=_interned(entry["class"]),
        syntax=_interned(entry["syntax"]),
        bytes=int(entry["size"]),
        dataset_offset=int(entry["dataset_offset"]),
        sha256=bytes.fromhex(digest) if digest else None,
        modality=_interned(entry.get("modality")),
        series_number=_number(entry.get("series_number")),
        instance_number=_number(entry.get("instance_number")),
        forwarded_to=_interned(entry.get("forwarded_to")),
    )


def _interned(text: str | None) -> str | None:
    return sys.intern(text) if text is not None else None


def _number(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError
    return value


def _entries(path: str, data: bytes, study: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(BytesIO(data), 1):  # not all lines at once: a ledger may be large
        if not line.endswith(b"\n"):
            return  # torn
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
        except (RecursionError, ValueError):
            raise LedgerError(
                f"The ledger {path} is damaged in line {number}.",
                hint="It was not changed. Move it away to fetch its instances again.",
                study=study,
                path=path,
            ) from None
        version = entry.get("ledger")
        if version is None:
            yield entry
        elif version != SCHEMA:
            raise LedgerError(
                f"The ledger {path} has schema {version}; this version reads {SCHEMA}.",
                hint="Use the version of airflow-dicom-get that wrote it, or a newer one.",
                study=study,
                path=path,
            )
