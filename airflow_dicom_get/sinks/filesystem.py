"""The filesystem sink: ``<root>/<study>/<series>/<sop>.dcm``, whole or not there.

An instance is written under a temporary name, recorded as taken, given its final name without ever
replacing another, then synced with others by a thread behind the receiver and recorded as durable.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from airflow_dicom_get import clock
from airflow_dicom_get.config.options import WritingOptions
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.part10 import META_LIMIT, file_header, read_file_meta
from airflow_dicom_get.errors import DestinationFull, SinkError
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.sinks import locks
from airflow_dicom_get.sinks.base import Confirmation, Taken
from airflow_dicom_get.sinks.ledger import Ledgers
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Follower, digest_of, digest_of_path, same_content, sync_path

log = logging.getLogger(__name__)

MAX_UNCONFIRMED = 64 << 20
"""Bytes that may be taken and not yet confirmed; one instance may be larger than that alone."""
_MAX_QUEUED = 128  # open files behind the receiver
_GATHER = 0.02
"""Seconds in which more instances may join the first of a batch."""
_FOLLOW_FROM = 4 << 20
"""Size from which the digest follows the file in a thread of its own; below it a hand-over costs more."""


def sink_error(error: OSError, what: str) -> SinkError:
    """An OS error of the destination as an error of ours."""
    text = f"{what}: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationFull(
            text, hint="Free space and run again: what is held is not fetched again.", errno=error.errno
        )
    return SinkError(text, hint="Check permissions and mount of the destination.", errno=error.errno)


class FilesystemSink:
    """Write instances below a folder.

    Parameters
    ----------
    root : Path
        The destination folder; made if absent.
    ledgers : Ledgers
        Where runs record what they took and kept.
    run : str
        Name of this run, unique.
    options : WritingOptions
        Titles for the file meta information, how files are written, and what counts as held.
    read_only : bool
        Only :meth:`inventory` will be called, and it shall leave no trace.
    """

    def __init__(
        self,
        root: Path,
        ledgers: Ledgers,
        run: str,
        options: WritingOptions,
        *,
        read_only: bool = False,
    ) -> None:
        self.root = root
        self.disk = files.disk
        self.ledgers = ledgers
        self.run = run
        self.options = options
        self._read_only = read_only
        self.replaceable: set[str] = set()
        """UIDs whose file is no longer what the ledger says: it may be replaced."""
        self._mutex = threading.Lock()
        self._room = clock.condition(self._mutex)
        self._studies: dict[str, _Study] = {}
        self._unconfirmed = 0
        self._due = 0
        self._done: list[Confirmation] = []
        self._queue: deque[_Pending] = deque()
        self._syncing = False
        self._hurry = clock.event()

    # --- what is held ------------------------------------------------------------------------

    def inventory(self, study: str) -> dict[str, Stored]:
        """See :meth:`sinks.base.Sink.inventory`."""
        if not self._read_only:  # here, too: of a study that is held whole no writer is ever begun
            try:
                locks.clean_dead_runs(self.root / study, self.run)
            except OSError as error:
                raise sink_error(error, f"The destination cannot be cleaned up in study {study}") from error
        records = self.ledgers.read(study)
        held: dict[str, Stored] = {}
        place = f"{self.root / study}/"
        for series, sop, entry in self._files(study):
            candidates = [record for record in records.pop(sop, ()) if record.series == series]
            found = next((h for record in candidates if (h := self._verified(study, record, entry, place))), None)
            if found is None and candidates:
                self.replaceable.add(sop)
            elif found is None and self.options.adopt and not self._read_only:
                found = self._adopted(study, series, sop, entry)
            if found is not None:
                held[sop] = found
        return held

    def _files(self, study: str) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        try:
            for series in self.disk.scan(self.root / study):
                if series.is_dir(follow_symlinks=False):
                    for entry in self.disk.scan(series.path):
                        if entry.name.endswith(".dcm") and not entry.name.startswith("."):
                            yield series.name, entry.name[:-4], entry
        except FileNotFoundError:
            pass
        except OSError as error:
            raise sink_error(error, f"The destination cannot list study {study}") from error

    def _verified(self, study: str, record: Stored, entry: os.DirEntry[str], place: str) -> Stored | None:
        """The record as held, if the file is still what it says."""
        checkable = record.sha256 is not None
        need_digest = self.options.verify_held == "digest" or not record.durable
        if self.options.verify_held != "none" or not record.durable:
            if entry.stat(follow_symlinks=False).st_size != record.bytes:
                return None
            if need_digest and (not checkable or digest_of_path(entry.path) != record.sha256):
                return None
        if not record.durable and not self._read_only:
            self._sync_now(entry.path)
            self._record(study, record)
        record.where = place
        return record

    def _adopted(self, study: str, series: str, sop: str, entry: os.DirEntry[str]) -> Stored | None:
        """A file that no ledger knows, if it is a whole Part 10 file of this UID."""
        from airflow_dicom_get.sinks.objects import whole_instance

        found = whole_instance(Path(entry.path), study, series, sop)
        if found is not None:
            self._sync_now(entry.path)
            self._record(study, found)
        return found

    def _record(self, study: str, stored: Stored) -> None:
        ledger = self._study(study).ledger
        ledger.taken(stored)
        ledger.durable([stored.sop])

    def _sync_now(self, path: str) -> None:
        if self.options.durable:
            sync_path(path)
            sync_path(os.path.dirname(path))

    def head(self, held: Stored, size: int) -> bytes:
        """See :meth:`sinks.base.Sink.head`."""
        try:
            with files.opened(held.uri or "") as fd:
                return self.disk.read_at(fd, size, 0)
        except OSError:
            return b""

    # --- writing -----------------------------------------------------------------------------

    def begin(self, instance: Instance) -> _FileWriter:
        """See :meth:`sinks.base.Sink.begin`."""
        with self._room:
            while self._due and (self._unconfirmed >= MAX_UNCONFIRMED or self._due >= _MAX_QUEUED):
                self._hurry.set()
                self._room.wait(1.0)
            self._hurry.clear()
        try:
            study = self._study(instance.study)
            folder = study.series(instance.series)
            return _FileWriter(self, study, folder, instance)
        except OSError as error:
            raise sink_error(error, f"The destination cannot create a file for instance {instance.sop}") from error

    def _study(self, uid: str) -> _Study:
        with self._mutex:
            study = self._studies.get(uid)
            if study is None:
                try:
                    study = self._studies[uid] = _Study(self.root / uid, self.ledgers, uid, self.run)
                except OSError as error:
                    raise sink_error(error, f"The destination cannot create a folder for study {uid}") from error
            return study

    def taken(self, pending: _Pending) -> None:
        """Hand a taken instance to the threads that make it durable."""
        with self._mutex:
            self._unconfirmed += pending.size
            self._due += 1
            self._queue.append(pending)
            begin = not self._syncing
            self._syncing = True
        if begin:
            clock.spawn(self._sync_queued, "dicom-get-sync")

    def _sync_queued(self) -> None:
        """Sync what was taken, until nothing is left for a moment."""
        while True:
            # Each wake-up interrupts the receiver, and each batch costs a commit of the journal.
            self._hurry.wait(_GATHER)
            with self._mutex:
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _MAX_QUEUED))]
                if not batch:
                    self._syncing = False
                    self._room.notify_all()
                    return
            try:
                results = self._synced(batch)
            except Exception as error:  # whatever it is: who waits for these must not wait forever
                log.exception("syncing failed")
                results = [Confirmation(item.instance, f"sync: unexpected {type(error).__name__}") for item in batch]
            with self._room:
                self._done += results
                self._due -= len(batch)
                self._unconfirmed -= sum(item.size for item in batch)
                self._room.notify_all()

    def _synced(self, batch: list[_Pending]) -> list[Confirmation]:
        """Sync a batch of files, then each of their folders once, then say so in the ledgers.

        All are pushed out before the first is waited for: so they share a commit of the journal.
        """
        results: list[Confirmation] = []
        good: list[_Pending] = []
        if self.options.durable and len(batch) > 1:
            for item in batch:
                self.disk.start_write_back(item.fd)
        for item in batch:
            try:
                if self.options.durable:
                    self.disk.sync_data(item.fd)
                good.append(item)
            except OSError as error:
                results.append(Confirmation(item.instance, f"sync: {error.strerror}"))
            finally:
                self.disk.close(item.fd)
        try:
            for item in {item.folder: item for item in good}.values():
                if self.options.durable:
                    self.disk.sync(item.folder)
                if not self.disk.is_at(item.folder, item.study.path / item.instance.series):
                    # Moved away, or another disk lies over it.
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            for study in {item.study for item in good}:
                study.ledger.durable([item.instance.sop for item in good if item.study is study])
            results += [Confirmation(item.instance) for item in good]
        except OSError as error:
            results += [Confirmation(item.instance, f"sync: {error.strerror}") for item in good]
        return results

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        """See :meth:`sinks.base.Sink.confirmations`."""
        with self._room:
            while wait and self._due:
                self._hurry.set()
                self._room.wait(1.0)
            self._hurry.clear()
            done, self._done = self._done, []
            return done

    def close(self) -> None:
        """See :meth:`sinks.base.Sink.close`."""
        self._hurry.set()
        with self._room:
            while self._syncing:
                self._room.wait(1.0)
        for study in self._studies.values():
            study.close(self.options.durable)


class _Pending:
    """An instance under its final name, not yet synced."""

    __slots__ = ("fd", "folder", "instance", "size", "study")

    def __init__(self, instance: Instance, study: _Study, fd: int, folder: int, size: int) -> None:
        self.instance, self.study, self.fd, self.folder, self.size = instance, study, fd, folder, size


class _Study:
    """The folder of a study with this run's lock, ledger and open series folders."""

    def __init__(self, path: Path, ledgers: Ledgers, uid: str, run: str) -> None:
        self.path = path
        self.place = f"{path}/"
        self._disk = files.disk
        self._disk.make_folders(path)
        self._lock_path = path / f".{run}.lock"
        self._lock = locks.hold(self._lock_path)
        self.ledger = ledgers.open(uid, run)
        self._folders: dict[str, int] = {}
        self._mutex = threading.Lock()
        locks.clean_dead_runs(path, run)

    def series(self, uid: str) -> int:
        """An open descriptor of the series folder, made if absent."""
        with self._mutex:
            fd = self._folders.get(uid)
            if fd is None:
                folder = self.path / uid
                self._disk.make_folder(folder)
                fd = self._folders[uid] = self._disk.open_folder(folder)
            return fd

    def close(self, durable: bool) -> None:
        """Sync the ledger and the folders above the series, give back the lock."""
        try:
            if durable:
                self.ledger.sync()
                sync_path(self.path)
                sync_path(self.path.parent)
        except OSError as error:
            log.warning("%s: %s", self.path, error.strerror)
        self.ledger.close()
        for fd in self._folders.values():
            self._disk.close(fd)
        self._disk.remove(self._lock_path)
        self._disk.close(self._lock)
        for folder in (*(self.path / uid for uid in self._folders), self.path):
            try:
                self._disk.remove_folder(folder)  # only where nothing came
            except OSError:
                pass


class _FileWriter:
    """One instance on its way into a file."""

    __slots__ = (
        "_disk",
        "_fd",
        "_folder",
        "_follower",
        "_hash",
        "_head",
        "_instance",
        "_name",
        "_offset",
        "_sink",
        "_size",
        "_study",
    )

    def __init__(self, sink: FilesystemSink, study: _Study, folder: int, instance: Instance) -> None:
        self._sink, self._study, self._folder, self._instance = sink, study, folder, instance
        self._name = f".{instance.sop}.{sink.run}.part"
        self._disk = sink.disk
        self._fd = self._disk.open(self._name, files.REPLACE, folder)
        head = b""
        if sink.options.store_with_file_meta:
            assert instance.sop_class is not None
            assert instance.syntax is not None
            head = file_header(
                instance.sop_class,
                instance.sop,
                instance.syntax,
                calling=sink.options.calling_ae_title,
                called=sink.options.called,
            )
        self._head: bytes | None = head
        self._offset = len(head)
        self._hash: Any = hashlib.sha256() if sink.options.checksum else None
        self._size = 0
        self._follower: Follower | None = None

    def write(self, view: memoryview) -> None:
        """See :meth:`sinks.base.Writer.write`."""
        head = self._head
        try:
            if head is not None:
                self._head = None
                self._write_all(self._disk.writev(self._fd, (head, view)) - len(head), view, head)
                if self._hash is not None:
                    self._hash.update(head)
                self._size = len(head)
            else:
                self._write_all(self._disk.write(self._fd, view), view)
        except OSError as error:
            raise sink_error(error, f"The destination cannot store instance {self._instance.sop}") from error
        self._size += len(view)
        if self._follower is not None:
            self._follower.grown(self._size)
        elif self._hash is not None:
            self._hash.update(view)
            if self._size >= _FOLLOW_FROM:
                self._follower = Follower(self._fd, self._hash, self._size)

    def _write_all(self, written: int, view: memoryview, head: bytes = b"") -> None:
        """Finish a short write (a full disk, a signal)."""
        if written < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while written < len(view):
            written += self._disk.write(self._fd, view[written:])

    def take(self) -> Taken:
        """See :meth:`sinks.base.Writer.take`."""
        instance = self._instance
        if self._head is not None:
            self.write(memoryview(b""))
        try:
            if self._follower is not None:
                self._follower.finish()
            instance.bytes = self._size
            instance.sha256 = self._hash.digest() if self._hash is not None else None
            instance.dataset_offset = self._offset
            instance.uri = self._study.place
            return self._place()
        except OSError as error:
            self.abort()
            failure = sink_error(error, f"The destination cannot store instance {instance.sop}")
            full = isinstance(failure, DestinationFull)
            return Taken(s.OUT_OF_RESOURCES, "destination_full" if full else "destination_error", str(failure))

    def _place(self) -> Taken:
        instance, folder = self._instance, self._folder
        final = f"{instance.sop}.dcm"
        replace = instance.sop in self._sink.replaceable
        if not replace and self._disk.has(final, folder):
            return self._meet_first(final)
        self._study.ledger.taken(instance)
        if replace:
            self._disk.rename_over(self._name, final, folder)
            self._sink.replaceable.discard(instance.sop)
        else:
            try:
                self._disk.rename_new(self._name, final, folder)
            except FileExistsError:  # another run was quicker by a moment
                self._study.ledger.dropped(instance.sop)
                return self._meet_first(final)
        fd, self._fd = self._fd, -1
        self._sink.taken(_Pending(instance, self._study, fd, folder, self._size))
        return Taken(s.SUCCESS)

    def _meet_first(self, final: str) -> Taken:
        """A file of this UID is there: the first stays, and counts only if its data set is the same."""
        instance = self._instance
        fd = self._disk.open(final, files.CHANGE, self._folder)
        meta = read_file_meta(self._disk.read_at(fd, META_LIMIT, 0))
        offset = meta.dataset_offset if meta else 0
        size = self._disk.size(fd)
        if size - offset == instance.dataset_bytes and same_content(fd, offset, self._fd, self._offset):
            instance.bytes, instance.dataset_offset = size, offset
            if self._hash is not None and self._sink.options.checksum:
                instance.sha256 = digest_of(fd)
            self._study.ledger.taken(instance)
            self._drop()
            self._sink.taken(_Pending(instance, self._study, fd, self._folder, size))
            return Taken(s.SUCCESS)
        self._disk.close(fd)
        self.abort()
        return Taken(
            s.DUPLICATE_OTHER_CONTENT,
            "different_content",
            "A different data set is already stored under this UID; it was kept.",
        )

    def _drop(self) -> None:
        self._disk.close(self._fd)
        self._fd = -1
        try:
            self._disk.unlink(self._name, self._folder)
        except OSError:
            pass

    def abort(self) -> None:
        """See :meth:`sinks.base.Writer.abort`."""
        if self._follower is not None:
            with suppress(OSError):
                self._follower.finish()
        if self._fd >= 0:
            self._drop()
