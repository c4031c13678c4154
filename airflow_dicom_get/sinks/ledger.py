"""The ledger: what a run took and confirmed, one JSON line each, so that the next run knows.

One writer a file, one file a run and study; readers take the union of all runs. A line is written
whole by one ``write``, so a killed process loses nothing that was written before.

One root may serve several destinations, so each ``taken`` says where; a ``durable`` counts for the
``taken`` before it in its own file alone. Before an object is replaced, a synced ``dropped`` ends all
that was recorded of its instance, in older runs too: in those whose names sort before, and in those that
were there though their names sort behind, by a clock that was set back or within one second.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import BytesIO
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from airflow_dicom_get.config.checks import shown
from airflow_dicom_get.errors import LedgerError, SinkError
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Disk, Folder, sync_path

log = logging.getLogger(__name__)

SCHEMA = 2
READABLE_SCHEMAS = frozenset({1, SCHEMA})
OWN = "."
"""How a ledger calls the destination that it lies in: it may be moved as a whole."""
_LARGEST = 512 << 20
"""Bytes of the ledgers of one study, of all runs together: of nearly a million instances."""
_MOST = 1 << 63
UNREADABLE = (KeyError, OverflowError, TypeError, ValueError)
"""What a record that cannot be read raises."""
_LONGEST = 64 << 10
"""Bytes of a line; ours have some hundred, and two thousand at most."""
_scan = json.JSONDecoder().raw_decode
"""A third of what ``json.loads`` costs for a line, which looks for its encoding and for blanks."""


def first_failure(works: Iterable[Callable[[], object]]) -> OSError | None:
    """Do all of these, whatever becomes of one of them; the first error of the disk, if there was one."""
    failed: OSError | None = None
    for work in works:
        try:
            work()
        except OSError as error:
            failed = failed or error
    return failed


def _line(entry: Mapping[str, Any]) -> str:
    """What ``json.dumps`` makes of an entry, and the end of its line; but that builds an encoder for each call.

    Raises
    ------
    OSError
        It is longer than what is read again (``EMSGSIZE``).
    """
    line = "{" + ", ".join([f'"{name}": {_text(value)}' for name, value in entry.items()]) + "}\n"
    if len(line) >= _LONGEST:
        raise OSError(errno.EMSGSIZE, f"a record is longer than {_LONGEST >> 10} KiB")
    return line


def _text(value: Any) -> Any:
    if type(value) is str:
        return _quoted(value)
    return value if type(value) is int else "null" if value is None else json.dumps(value)


def header_line() -> str:
    """The first line of a ledger."""
    return _line({"ledger": SCHEMA})


def taken_line(instance: Instance | Stored, destination: str) -> str:
    """The line that says that an instance is there whole."""
    entry = {
        "state": "taken",
        "destination": destination,
        "series": instance.series,
        "uid": instance.sop,
        "class": instance.sop_class,
        "syntax": instance.syntax,
        "size": instance.bytes,
        "dataset_offset": instance.dataset_offset,
        "sha256": instance.sha256.hex() if instance.sha256 else None,
        "modality": instance.modality,
        "series_number": instance.series_number,
        "instance_number": instance.instance_number,
    }
    if instance.truncated:
        entry["truncated"] = True
    if instance.other_patient:
        entry["other_patient"] = True
    return _line(entry)


def durable_line(key: Key, etag: str | None = None, forwarded_to: str | None = None) -> str:
    """The line that says that an instance is durable."""
    entry = {"state": "durable", "series": key[0], "uid": key[1]}
    if etag:
        entry["etag"] = etag
    if forwarded_to:
        entry["forwarded_to"] = forwarded_to
    return _line(entry)


def dropped_line(key: Key, destination: str, runs: Sequence[str] = ()) -> str:
    """The line that ends all that was recorded of an instance; in these ``runs`` too, whose names sort behind."""
    entry = {"state": "dropped", "destination": destination, "series": key[0], "uid": key[1]}
    return _line({**entry, "runs": list(runs)} if runs else entry)


class Ledger(Protocol):
    """The records of one run for one study. What cannot be recorded raises ``OSError``."""

    at_once: bool
    """Whether a record outlasts a kill as soon as it is made, and not only once it is synced."""

    def taken(self, instance: Instance | Stored, *, anew: bool = False) -> None:
        """Record that the whole instance is there, before it gets its final name.

        With ``anew`` nothing that was recorded of it before counts any more. Both are written at once: were the disk
        full after the first, what still lies under the final name would be nobody's.
        """

    def durable(self, keys: Iterable[Key], etag: str | None = None, forwarded_to: str | None = None) -> None:
        """Record that these are durable.

        Parameters
        ----------
        etag : str, optional
            The store's own mark of the content.
        forwarded_to : str, optional
            The node that said so.
        """

    def dropped(self, key: Key) -> None:
        """Record that nothing that was recorded of this instance counts any more."""

    def sync(self) -> None:
        """Make the ledger itself durable."""

    def close(self) -> None:
        """Close; a ledger that recorded nothing leaves nothing behind."""


class Ledgers(Protocol):
    """The ledgers of all runs for one destination, wherever they lie."""

    def open(self, study: str, run: str) -> Ledger:
        """Begin the ledger of a run for a study. Raises ``OSError``."""

    def read(self, study: str, *, durably: bool = False) -> dict[Key, list[Stored]]:
        """What all runs recorded of a study, as :func:`merge_records` gives it.

        With ``durably`` the ledgers are made durable themselves: a run that was killed has not done it, and what counts
        on its records would be without proof after a power cut. Where that fails, nothing in them is durable either.

        Raises
        ------
        LedgerError
            A file is of a newer schema, or broken before its last line; it is left as it is.
        """


class _Took(NamedTuple):
    """What runs have recorded of an instance: the digests, and of what has none size and mark, where it is durable."""

    digests: frozenset[bytes]
    sizes: frozenset[tuple[int | None, str | None]]


class RecordedDigests:
    """The digests of what runs have recorded as taken; those of a study are read when an object of it is in doubt.

    Its methods raise :class:`SinkError` where they cannot be read: nobody knows then whether what is there came so.
    """

    def __init__(self, ledgers: Ledgers) -> None:
        self._ledgers = ledgers
        self._of: dict[str, dict[Key, _Took]] = {}

    def of(self, study: str, key: Key) -> frozenset[bytes] | None:
        """Those of an instance; None where no run has recorded it."""
        took = self._took(study, key)
        return took.digests if took is not None else None

    def are_of(
        self, study: str, key: Key, digest: Callable[[], bytes | None], size: int, etag: str | None = None
    ) -> bool:
        """Whether a run has recorded an object as it is: by its digest, or where none has any, by size and mark.

        Parameters
        ----------
        digest : callable
            Gives that of the object; called only where there is one to compare with.
        """
        took = self._took(study, key)
        if took is None:
            return False
        return digest() in took.digests if took.digests else (size, etag or None) in took.sizes

    def _took(self, study: str, key: Key) -> _Took | None:
        if study not in self._of:
            try:
                records = self._ledgers.read(study)
            except LedgerError as error:
                raise SinkError(error.message, hint=error.hint) from error
            self._of[study] = {
                one: _Took(
                    frozenset(x.sha256 for x in found if x.sha256),
                    frozenset((x.bytes, x.etag) for x in found if x.durable and not x.sha256),
                )
                for one, found in records.items()
            }
        return self._of[study].get(key)

    def forget(self, study: str) -> None:
        """Read them anew when they are next asked for."""
        self._of.pop(study, None)


class FolderLedgers:
    """The ledgers below a folder, for one destination; nothing is recorded any more once the run was ``left``."""

    def __init__(self, root: Folder, destination: str, left: Callable[[], bool] = lambda: False) -> None:
        self.root, self.destination = root, destination
        self._left = left

    def open(self, study: str, run: str) -> Ledger:
        """See :meth:`Ledgers.open`."""
        return LedgerWriter(self.root, self.destination, study, run, files.shut_when(self._left))

    def read(self, study: str, *, durably: bool = False) -> dict[Key, list[Stored]]:
        """See :meth:`Ledgers.read`."""
        folder = self.root / ".ledger" / study
        try:
            paths = [folder / name for name in reversed(files.names_in(folder)) if name.endswith(".jsonl")]
        except OSError as error:
            raise LedgerError(
                f"The ledger of study {study} cannot be listed: {error.strerror}.", study=study
            ) from error
        names = frozenset(map(_run_of, paths))
        found = [
            (path, parse_ledger([(str(path), content)], study, self.destination, names))
            for path, content in _contents(paths, study)
        ]
        if durably:
            self._sync([(path, run) for path, run in found if any(x.durable for x in run.stored.values())])
        return merge_records((_run_of(path), run) for path, run in found)

    def _sync(self, ledgers: Sequence[tuple[Folder, RunRecords]]) -> None:
        """Make the ledgers of a study durable."""
        folders = dict.fromkeys(folder for path, _ in ledgers for folder in _above(self.root, path.parent))
        lost = first_failure([partial(_sync_folders, folders, self.root)])
        for path, run in ledgers:
            error = first_failure([partial(sync_path, path)]) or lost
            if error is not None:
                log.warning("%s cannot be made durable, so what it says to be durable is not: %s", path, error.strerror)
                for record in run.stored.values():
                    record.durable = False


class LedgerWriter:
    """Appends the records of one run for one study to ``<root>/.ledger/<study>/<run>.jsonl``."""

    at_once = True

    def __init__(self, root: Folder, destination: str, study: str, run: str, disk: Disk) -> None:
        folder = root / ".ledger" / study
        self._disk = disk
        self._destination = destination
        self._root = root
        self._unsynced = [*_above(root, folder), *files.make_folders(folder, disk)]
        self.path = folder / f"{run}.jsonl"
        self._fd = self._disk.open(self.path, files.APPEND)
        self._mutex = threading.Lock()
        self._size = 0
        self._earlier: list[str] | None = None
        """Runs that were there before this one dropped anything, though their names sort behind its own."""

    def _append(self, lines: str) -> None:
        with self._mutex:
            if not self._size:
                lines = header_line() + lines
            data = lines.encode("ascii")
            if self._fd < 0:  # its number may be another file's by now
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self._disk.write(self._fd, data) != len(data):
                # Part of a line would break what is appended once there is room.
                self._disk.truncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += len(data)

    def taken(self, instance: Instance | Stored, *, anew: bool = False) -> None:
        """See :meth:`Ledger.taken`."""
        ended = self._dropped_line(instance.key) if anew else ""
        self._append(ended + taken_line(instance, self._destination))

    def durable(self, keys: Iterable[Key], etag: str | None = None, forwarded_to: str | None = None) -> None:
        """See :meth:`Ledger.durable`; one write."""
        self._append("".join(durable_line(key, etag, forwarded_to) for key in keys))

    def dropped(self, key: Key) -> None:
        """See :meth:`Ledger.dropped`."""
        self._append(self._dropped_line(key))

    def _dropped_line(self, key: Key) -> str:
        if self._earlier is None:
            names = files.names_in(self.path.parent)
            self._earlier = [name.removesuffix(".jsonl") for name in names if name > self.path.name]
        return dropped_line(key, self._destination, self._earlier)

    def sync(self) -> None:
        """See :meth:`Ledger.sync`: the file, and once the folders in which it may be new."""
        self._disk.sync(self._fd)
        _sync_folders(self._unsynced, self._root)
        self._unsynced = []

    def close(self) -> None:
        """Close; a ledger that recorded nothing is removed."""
        with self._mutex:
            fd, self._fd = self._fd, -1
        self._disk.close(fd)
        if not self._size:
            self._disk.remove(self.path)


def _run_of(path: Folder) -> str:
    return path.name.removesuffix(".jsonl")


def _above(root: Folder, folder: Folder) -> list[Folder]:
    """The folders of a ledger that a run which was killed may have made, and not have made durable."""
    return [folder, folder.parent, root, root.parent]


def _sync_folders(folders: Iterable[Folder], root: Folder) -> None:
    for folder in dict.fromkeys(folders):
        try:
            sync_path(folder)
        except PermissionError:  # above the root one may not look
            if Path(folder).is_relative_to(root):
                raise


class RunRecords(NamedTuple):
    """What one run recorded of a study, for one destination."""

    stored: dict[Key, Stored]
    dropped: dict[Key, tuple[str, ...]]
    """Instances of which older records do not count any more, and the runs that are older though they sort behind.

    Tuples of shared texts: these take no more memory than the bytes that name the runs.
    """


def merge_records(runs: Iterable[tuple[str, RunRecords]]) -> dict[Key, list[Stored]]:
    """The union of what runs recorded, given by their names, the last first: by instance, the likeliest record first.

    Durable ones come before those that were only taken, newer ones before older ones.
    """
    named = list(runs)
    stored = {name: run.stored for name, run in named}
    ended = {
        (name, key)
        for _, run in named
        for key, names in run.dropped.items()
        for name in names
        if key in stored.get(name, ())
    }
    records: dict[Key, list[Stored]] = {}
    dropped: set[Key] = set()
    for name, run in named:
        for key, record in run.stored.items():
            if key not in dropped and (name, key) not in ended:
                records.setdefault(key, []).append(record)
        dropped |= run.dropped.keys()
    for candidates in records.values():
        candidates.sort(key=lambda record: not record.durable)
    return records


def contradict(records: Sequence[Stored]) -> bool:
    """Whether the records of one instance name more than one content: then sizes do not tell what is there."""
    return len({record.sha256 for record in records}) > 1


def is_unsure(records: Sequence[Stored]) -> bool:
    """Whether what is there may be what no run has confirmed: another content, or put there by a run that was killed.

    That a file was recorded as durable before says nothing of one that took its place.
    """
    return contradict(records) or not all(record.durable for record in records)


def _contents(paths: Iterable[Folder], study: str) -> Iterator[tuple[Folder, bytes]]:
    """Each ledger and what is in it."""
    size = 0
    for path in paths:
        content = _content(path, study)
        size += len(content)
        check_size(size, study, str(path))
        yield path, content


def check_size(size: int, study: str, path: str) -> None:
    """Refuse ledgers of a study that are too large together. Raises :class:`LedgerError`."""
    if size > _LARGEST:
        raise LedgerError(
            f"The ledgers of study {study} are larger than {_LARGEST >> 20} MiB together, with {path}.",
            hint="They were not changed. Move away those that no run of yours wrote.",
            study=study,
            path=path,
        )


def _content(path: Folder, study: str) -> bytes:
    try:
        return files.read_whole(path, _LARGEST)
    except OSError as error:
        raise LedgerError(
            f"The ledger {path} cannot be read: {error.strerror}.",
            hint="It was not changed. Move it away to fetch its instances again.",
            study=study,
            path=str(path),
        ) from error


def parse_ledger(parts: Iterable[tuple[str, bytes]], study: str, destination: str, runs: Collection[str]) -> RunRecords:
    """The records of one run for one destination, in one file or several: where each lies, and its content.

    Of the runs that a line names only those count that have records, given as ``runs``. A torn last line is ignored.
    In schema 1 no destination is named: what was recorded as durable counts where it must be this one, and only if one
    series of the SOP Instance UID was taken.

    Raises
    ------
    LedgerError
        A part is of a newer schema, or broken before its last line.
    """
    stored: dict[Key, Stored] = {}
    dropped: dict[Key, tuple[str, ...]] = {}
    taken: dict[str, list[Key]] = {}  # of schema 1, whose other records do not name the series
    for path, data in parts:
        for schema, entry in _entries(path, data, study):
            try:
                uid, state, where = str(entry["uid"]), entry["state"], entry.get("destination")
                if schema != 1:
                    keys = [(str(entry["series"]), uid)]
                else:
                    if state == "taken":
                        where = _destination_of_schema_1(entry, destination)
                        taken.setdefault(uid, []).append((str(entry["series"]), uid))
                    keys = taken.get(uid, [])
                if state == "taken" and where == destination:
                    stored[keys[-1]] = stored_of(keys[-1], entry)
                elif state == "durable" and len(set(keys)) == 1 and keys[0] in stored:
                    record = stored[keys[0]]
                    forwarded_to = entry.get("forwarded_to")
                    own = destination == OWN and not forwarded_to
                    record.durable = schema == SCHEMA or own or record.forwarded_to is not None
                    record.etag = _interned(entry.get("etag"))
                    if forwarded_to is not None:
                        record.forwarded_to = _interned(forwarded_to) or record.forwarded_to
                elif state == "dropped" and schema == 1:  # took back a record of its own file
                    for key in keys:
                        stored.pop(key, None)
                elif state == "dropped" and where == destination:
                    stored.pop(keys[0], None)
                    dropped[keys[0]] = tuple(sys.intern(run) for run in entry.get("runs", ()) if run in runs)
            except UNREADABLE:
                raise LedgerError(
                    f"The ledger {path} contains an unreadable record.",
                    hint="It was not changed. Move it away to fetch its instances again.",
                    study=study,
                    path=path,
                ) from None
    return RunRecords(stored, dropped)


def _destination_of_schema_1(entry: Mapping[str, Any], destination: str) -> str | None:
    """The destination of a record that names none: the node that it was forwarded to, or the one that is asked for."""
    node = entry.get("forwarded_to")
    if node is not None:
        return f"dicom://{node}"
    return None if destination.startswith("dicom://") else destination


def stored_of(key: Key, entry: Mapping[str, Any]) -> Stored:
    """What a record says of an instance that is there: one of a ledger, or of a bucket's object about itself.

    Raises
    ------
    KeyError, OverflowError, TypeError, ValueError
        It says what no record can (:data:`UNREADABLE`): something else than a number, or one that no column of a
        manifest holds; a data set that begins outside of its object.
    """
    digest = entry["sha256"]
    size, offset = _fits(int(entry["size"])), _fits(int(entry["dataset_offset"]))
    if not 0 <= offset <= size:
        raise ValueError
    return Stored(
        series=sys.intern(key[0]),
        sop=key[1],
        sop_class=_interned(entry["class"]),
        syntax=_interned(entry["syntax"]),
        bytes=size,
        dataset_offset=offset,
        sha256=bytes.fromhex(digest) if digest else None,
        modality=_interned(entry.get("modality")),
        series_number=_number(entry.get("series_number")),
        instance_number=_number(entry.get("instance_number")),
        forwarded_to=_interned(entry.get("forwarded_to")),
        truncated=entry.get("truncated") is True,
        other_patient=entry.get("other_patient") is True,
    )


def _interned(text: str | None) -> str | None:
    return sys.intern(text) if text is not None else None


def _number(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError
    return value if value is None else _fits(value)


def _fits(number: int) -> int:
    """A number that a column of a manifest can hold. Raises :class:`OverflowError`."""
    if not -_MOST <= number < _MOST:
        raise OverflowError
    return number


def _entries(path: str, data: bytes, study: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the schema of its file."""
    schema = 0
    lines = BytesIO(data)  # not all lines at once: a ledger may be large
    for number, line in enumerate(iter(partial(lines.readline, _LONGEST), b""), 1):
        if len(line) < _LONGEST and (not line.endswith(b"\n") or b"\0" in line):
            return  # torn; what follows the zeros of a power cut was not synced either
        try:
            if len(line) == _LONGEST:
                raise ValueError
            text = line.strip().decode()
            entry, end = _scan(text)
            if end != len(text) or not isinstance(entry, dict):
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
            yield schema or SCHEMA, entry
        elif type(version) is int and version in READABLE_SCHEMAS:
            schema = version
        else:
            raise LedgerError(
                f"The ledger {path} has schema {shown(version)}; this version reads {SCHEMA}.",
                hint="Use the version of airflow-dicom-get that wrote it, or a newer one.",
                study=study,
                path=path,
            )
