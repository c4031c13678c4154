"""The filesystem sink: ``<root>/<study>/<series>/<sop>.dcm``, whole or not there.

An instance is written under a temporary name, recorded as taken, given its final name without ever
replacing another, then synced with others by a thread behind the receiver and recorded as durable. Where
a record is not there at once, as in a bucket, the file is synced before it gets its final name.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from airflow_dicom_get import clock
from airflow_dicom_get.config.options import WritingOptions
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.part10 import META_LIMIT, file_header, read_file_meta
from airflow_dicom_get.errors import DestinationFull, LedgerError, SinkError
from airflow_dicom_get.net.association import OVER, STUCK, CancelToken
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks import locks, objects
from airflow_dicom_get.sinks.base import Confirmation, Taken, ended_early
from airflow_dicom_get.sinks.ledger import Ledgers, RecordedDigests, first_failure, is_unsure
from airflow_dicom_get.sinks.objects import whole_instance
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import (
    Below,
    Disk,
    Follower,
    differ_by_lost_blocks,
    digest_of,
    digest_of_path,
    same_content,
    starts_alike,
    sync_path,
)

log = logging.getLogger(__name__)

MAX_UNCONFIRMED = 64 << 20
"""Bytes that may be taken and not yet confirmed; one instance may be larger than that alone."""
_MAX_QUEUED = 128  # open files behind the receiver
_MAX_FOLDERS = 64
"""Folders of series that stay open, those in use among them: a study may have more series than we descriptors."""
_LOOK = 0.2
"""Seconds between two looks at whether the run is to end."""
_ENDING, _AT_ONCE = 5.0, 1.0
"""Seconds that a sync may take in a run that is to end, or to end at once; after that nobody waits for it.

In any other run it may take as long as a source for its next instance: a file server that restarts comes back.
"""
_GATHER = 0.02
"""Seconds in which more instances may join the first of a batch."""
_RESERVE, _RESERVE_SHARE = 1 << 30, 20
"""Bytes of free space that are never written to, or this part of a disk where that is less."""
_FILES_RESERVE, _FILES_SHARE = 10_000, 100
"""Files that are never made, or this part of those that a disk has room for where that is less."""
_TO_BEGIN = 64 << 20
"""Bytes that have to be free at least to begin a study."""
_REPORTED = 1 << 20
"""Bytes after which a writer says how much it has written."""
_LOOK_AGAIN = 64 << 20
"""Bytes that may be written between two looks at the free space; fewer where there is less of it."""
_FILES_AGAIN = 1000
"""Files and folders that may be made between two looks; fewer where there is room for fewer."""
_BLOCK = 4 << 10
"""Bytes that the smallest file takes, until the disk has said it."""
_MOST_MEETINGS = 8
"""How often the file that is to be replaced may be another one by then."""
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


class Room:
    """The free space at a destination, and its room for files, but for reserves of others, ledgers and manifests.

    It is looked at again and again while something is written, and as seldom as it allows. Thread-safe. ``name`` is
    what the place is called in errors, ``reserve`` what is left at most, in bytes.
    """

    def __init__(self, path: Path, name: str = "The destination", reserve: int = _RESERVE) -> None:
        self._path, self._name, self._reserve = path, name, reserve
        self._left = 4 * _REPORTED
        self._files_left = 1
        self._block = _BLOCK
        self._mutex = threading.Lock()

    def check_start(self) -> None:
        """Refuse to begin without room. Raises :class:`DestinationFull`."""
        self._look(_TO_BEGIN)

    def wrote(self, size: int, begun: int = 0) -> None:
        """So many bytes were written, in whole blocks, and so many files begun.

        Raises :class:`DestinationFull` where a reserve is reached.
        """
        with self._mutex:
            self._left -= size + -size % self._block
            self._files_left -= begun
            if self._left <= 0 or self._files_left <= 0:
                room, files_left = self._look()
                self._left = min(max(room // 4, _REPORTED), _LOOK_AGAIN)
                self._files_left = min(max(files_left // 4, 1), _FILES_AGAIN)  # each may have a new folder, too

    def _look(self, least: int = 0) -> tuple[int, int]:
        """Bytes that may be written, and files made, before a reserve is reached."""
        try:
            free = files.disk.free(files.nearest(self._path))
        except OSError as error:
            raise sink_error(error, f"{self._name} {self._path} cannot be looked at") from error
        self._block = free.block
        reserve = max(min(self._reserve, free.all_sizes // _RESERVE_SHARE), least)
        if free.size <= reserve:
            raise self._full(f"{free.size >> 20} MiB free; the last {reserve >> 20} MiB are not used")
        left = free.size - reserve
        if not free.all_files:
            return left, _FILES_AGAIN * 4
        reserve = min(_FILES_RESERVE, free.all_files // _FILES_SHARE)
        if free.files <= reserve:
            raise self._full(f"room for {free.files} files; that for the last {reserve} is not used")
        return left, free.files - reserve

    def _full(self, what: str) -> DestinationFull:
        return DestinationFull(
            f"{self._name} {self._path} has {what}.",
            hint="Free space and run again: what is held is not fetched again.",
        )


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
    cancel : CancelToken
        The run's. A sync cannot be ended: where it does not return in a run that is to end, it is left to itself,
        with the descriptors of the study; what it was to make durable is not confirmed.
    """

    def __init__(
        self,
        root: Path,
        ledgers: Ledgers,
        run: str,
        options: WritingOptions,
        *,
        read_only: bool = False,
        cancel: CancelToken | None = None,
    ) -> None:
        self.root = Below(root)
        self.cancel = cancel or CancelToken()
        self.disk = files.shut_when(lambda: self.cancel.left)
        self.room = Room(root)
        self.writers = count(1)
        """Numbers the writers: no two write one temporary file."""
        self.ledgers = ledgers
        self.run = run
        self.options = options
        self._read_only = read_only
        self.torn: set[Key] = set()
        """Instances whose file was written and never synced, and is not what was written: a crash may have torn it."""
        self._mutex = threading.Lock()
        self._room = clock.condition(self._mutex)
        self._studies: dict[str, _Study] = {}
        self._unclosed: OSError | None = None
        self._recorded: dict[str, _Recorded] = {}
        self.digests = RecordedDigests(ledgers)
        self._unconfirmed = 0
        self._due = 0
        self._done: list[Confirmation] = []
        self._queue: deque[_Pending] = deque()
        self._batch: list[_Pending] = []
        self._syncing = self._given_up = False
        self._syncer: clock.Worker | None = None
        self._returned_at = clock.monotonic()
        """When the thread that syncs was seen at work."""
        self._hurry = clock.event()

    # --- what is held ------------------------------------------------------------------------

    def inventory(self, study: str, patient: Mapping[int, bytes] = {}) -> dict[Key, Stored]:
        """See :meth:`sinks.base.Sink.inventory`."""
        if not self._read_only:  # here, too: of a study that is held whole no writer is ever begun
            try:
                locks.clean_dead_runs(self.root / study, self.run, self.disk)
            except OSError as error:
                raise sink_error(error, f"The destination cannot be cleaned up in study {study}") from error
        records = self.ledgers.read(study, durably=self.options.durable and not self._read_only)
        self._recorded[study] = self._recorded_in(records)
        held: dict[Key, Stored] = {}
        place = f"{self.root / study}/"
        for series, sop, entry in self._files(study):
            candidates = records.pop((series, sop), [])
            path = self.root / f"{study}/{series}/{entry.name}"
            try:
                found = self._verified(study, candidates, entry, path, place)
                if found is None and not candidates and self.options.adopt and not self._read_only:
                    found = self._adopted(study, series, sop, path)
            except FileNotFoundError:  # somebody has taken it away just now
                continue
            except OSError as error:
                raise sink_error(error, f"The destination cannot tell whether it holds instance {sop}") from error
            if found is not None:
                held[found.key] = found
        return held

    def look_on(self) -> None:
        """Raise :class:`SinkError` where the run is to end: to read what is there may take long."""
        if self.cancel.ending():
            raise ended_early()

    def _files(self, study: str) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        try:
            for series in self.disk.scan(self.root / study):
                if series.is_dir(follow_symlinks=False):
                    for entry in self.disk.scan(self.root / study / series.name):
                        if entry.name.endswith(".dcm") and not entry.name.startswith("."):
                            yield series.name, entry.name[:-4], entry
        except FileNotFoundError:
            pass
        except OSError as error:
            raise sink_error(error, f"The destination cannot list study {study}") from error

    def _verified(
        self, study: str, candidates: Sequence[Stored], entry: os.DirEntry[str], path: Below, place: str
    ) -> Stored | None:
        """The record that the file still is as it says; where it was never synced, it is now."""
        if not candidates:
            return None
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return None
        size = status.st_size
        fits = [record for record in candidates if record.bytes == size <= files.LARGEST]
        if not fits:
            return None
        found, unsure = fits[0], is_unsure(candidates)
        if self.options.verify_held == "digest" or unsure:
            digest = digest_of_path(path, self.look_on)
            told = next((record for record in fits if record.sha256 == digest), None)
            if told is None:
                # Without a digest in the records nothing says that it is not what was written.
                if not any(record.durable for record in candidates) and all(record.sha256 for record in fits):
                    self.torn.add(found.key)
                return None
            found = told
        if unsure and not self._read_only:
            if not all(record.durable for record in candidates) and not self._sync_now(study, path):
                return None  # it is fetched again: a sync of it may have failed in the run that took it
            self._record(study, found, anew=True)  # and the next run need not read it again
            self.recorded(study).durable.add(found.key)
        found.where = place
        return found

    def _adopted(self, study: str, series: str, sop: str, path: Below) -> Stored | None:
        """A file that no ledger knows, if it is a whole Part 10 file of this UID."""
        self.look_on()
        found = whole_instance(path, study, series, sop, self.look_on)
        if found is not None:
            self._sync_now(study, path)
            self._record(study, found)
        return found

    def _record(self, study: str, stored: Stored, *, anew: bool = False) -> None:
        if self.options.durable:
            ledger = self._study(study).ledger
            ledger.taken(stored, anew=anew)
            ledger.durable([stored.key])

    def _sync_now(self, study: str, path: Below) -> bool:
        """Make a file durable that a run before this one has left, perhaps in folders that it has never synced.

        Whether it surely is, where a sync of it may have failed before: not if we may not write it again.
        """
        if not self.options.durable:
            return True
        written = files.write_again(path, go_on=self.look_on)
        sync_path(path)
        sync_path(path.parent)
        self._study(study).sync_folders()  # and once in a run all those above
        return written

    def head(self, held: Stored, size: int) -> bytes:
        """See :meth:`sinks.base.Sink.head`."""
        try:
            with files.opened(self.root.at(held.uri or "")) as fd:
                return self.disk.read_at(fd, size, 0)
        except (OSError, ValueError):
            return b""

    # --- writing -----------------------------------------------------------------------------

    def begin(self, instance: Instance) -> _FileWriter:
        """See :meth:`sinks.base.Sink.begin`."""
        with self._room:
            self._wait(lambda: not self._due or (self._unconfirmed < MAX_UNCONFIRMED and self._due < _MAX_QUEUED))
            if self._given_up:
                raise SinkError("The destination does not return from a sync.", hint="Check its mount.")
        try:
            study = self._study(instance.study)
            try:
                return _FileWriter(self, study, instance)
            except FileNotFoundError:  # another run found the folder empty at its end, and removed it
                return _FileWriter(self, study, instance)
        except OSError as error:
            raise sink_error(error, f"The destination cannot create a file for instance {instance.sop}") from error

    def _study(self, uid: str) -> _Study:
        with self._mutex:
            study = self._studies.get(uid)
            if study is None:
                try:
                    study = self._studies[uid] = _Study(self.root / uid, self.disk, self.ledgers, uid, self.run)
                except OSError as error:
                    raise sink_error(error, f"The destination cannot create a folder for study {uid}") from error
            return study

    def recorded(self, study: str) -> _Recorded:
        """What runs before this one have recorded of a study."""
        if study not in self._recorded:
            try:
                self._recorded[study] = self._recorded_in(self.ledgers.read(study))
            except LedgerError:
                self._recorded[study] = _Recorded(None, set())
        return self._recorded[study]

    def _recorded_in(self, records: Mapping[Key, Sequence[Stored]]) -> _Recorded:
        # A durable run takes none for durable where the ledgers could not be synced; the next run may.
        counting = {
            key for key, found in records.items() if self.options.durable or any(record.durable for record in found)
        }
        return _Recorded(counting, {key for key, found in records.items() if not is_unsure(found)})

    def taken(self, pending: _Pending) -> None:
        """Hand a taken instance to the thread that makes it durable."""
        with self._mutex:
            if self._given_up:
                self._done.append(self._not_synced(pending))
                return
            self._unconfirmed += pending.size
            self._due += 1
            self._queue.append(pending)
            begin = not self._syncing
            self._syncing = True
            if begin:
                self._returned_at = clock.monotonic()
        if begin:
            self._syncer = clock.spawn(self._sync_queued, "dicom-get-sync")

    def _wait(self, met: Callable[[], bool]) -> None:
        """Wait, holding the lock, until it is so, or until the thread that syncs is given up."""
        asked = clock.monotonic()
        while not met() and not self._left():
            self._hurry.set()
            self._room.wait(_LOOK)
            now = clock.monotonic()
            if not self.cancel.ending():
                asked, late = now, now - self._returned_at > self.options.deadlines.next_object
            else:
                late = now - max(asked, self._returned_at) > (_AT_ONCE if self.cancel.hard else _ENDING)
            if late:
                self._give_up()
        self._hurry.clear()

    def _give_up(self) -> None:
        """Wait no longer for the thread that syncs: it owns the descriptors, and changes nothing when it returns."""
        log.error("%s does not return from a sync; what it was to make durable is not confirmed.", self.root)
        self._given_up = True
        self.cancel.abort(OVER if self.cancel.ending() else STUCK)
        self._done += [self._not_synced(item) for item in (*self._batch, *self._queue)]
        self._due = self._unconfirmed = 0

    def _not_synced(self, item: _Pending) -> Confirmation:
        error = "The destination had not synced it when the run ended."
        return Confirmation(item.instance, error, self.cancel.word)

    def _sync_queued(self) -> None:
        """Sync what was taken, until nothing is left for a moment."""
        while True:
            # Each wake-up interrupts the receiver, and each batch costs a commit of the journal.
            self._hurry.wait(_GATHER)
            with self._mutex:
                if self._given_up:
                    return
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), _MAX_QUEUED))]
                self._batch = batch
                if not batch:
                    self._syncing = False
                    self._room.notify_all()
                    return
            try:
                results = self._synced(batch)
            except _GivenUpError:
                return
            except Exception as error:  # whatever it is: who waits for these must not wait forever
                log.exception("syncing failed")
                results = [Confirmation(item.instance, f"sync: unexpected {type(error).__name__}") for item in batch]
            for item in batch:
                item.study.leave(item.folder)
            with self._room:
                if self._left():
                    return
                self._batch = []
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
        go_on = self._go_on
        if self.options.durable and len(batch) > 1:
            for item in batch:
                self.disk.start_write_back(item.fd)
        for item in batch:
            go_on()
            failed: OSError | None = None
            try:
                if self.options.durable:
                    self.disk.sync_data(item.fd)
            except OSError as error:
                failed = error
            go_on()
            try:
                self.disk.close(item.fd)  # a network file system may say only now that it has no room
            except OSError as error:
                failed = failed or error
            if failed is not None:
                item.study.failed_syncs[item.instance.key] += 1
                results.append(Confirmation(item.instance, f"sync: {failed.strerror}"))
            elif item.after != item.study.failed_syncs[item.instance.key]:
                # Whoever opens a file after a sync that failed is not told of it.
                results.append(Confirmation(item.instance, "sync: another one of this file has failed"))
            else:
                good.append(item)
        try:
            for item in {item.folder: item for item in good}.values():
                go_on()
                if self.options.durable:
                    self.disk.sync(item.folder.fd)
                    go_on()
                    item.study.sync_folders()
                go_on()
                if not self.disk.is_at(item.folder.fd, item.study.path / item.instance.series):
                    # Moved away, or another disk lies over it.
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                item.study.confirmed_in(item.folder)
            for study in {item.study for item in good} if self.options.durable else ():
                go_on()
                study.ledger.durable([item.instance.key for item in good if item.study is study])
            results += [Confirmation(item.instance) for item in good]
        except OSError as error:
            results += [Confirmation(item.instance, f"sync: {error.strerror}") for item in good]
        return results

    def _left(self) -> bool:
        return self._given_up or self.cancel.left

    def _go_on(self) -> None:
        """Between two calls of the disk: raise where nobody waits any more for what they are for."""
        if self._left():
            raise _GivenUpError
        self._returned_at = clock.monotonic()

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        """See :meth:`sinks.base.Sink.confirmations`."""
        with self._room:
            if wait:
                self._wait(lambda: not self._due)
            done, self._done = self._done, []
            return done

    def end_study(self, study: str) -> None:
        """See :meth:`sinks.base.Sink.end_study`."""
        with self._room:
            self._wait(lambda: not self._due)
        if self._left():
            return
        self._recorded.pop(study, None)
        self.digests.forget(study)
        ended = self._studies.pop(study, None)
        if ended is not None:
            failed = first_failure([partial(ended.close, self.options.durable, self.cancel)])
            self._unclosed = self._unclosed or failed

    def close(self) -> None:
        """See :meth:`sinks.base.Sink.close`."""
        with self._room:
            self._wait(lambda: not self._syncing)
        if self._left():
            return
        if self._syncer is not None:
            self._syncer.join()
        for study in list(self._studies):
            self.end_study(study)
        if self._unclosed is not None:
            raise sink_error(self._unclosed, "The ledger of what is held cannot be written") from self._unclosed


class _GivenUpError(Exception):
    """The run has ended without the thread that syncs."""


class _Recorded(NamedTuple):
    """What runs before this one have recorded of the instances of a study."""

    counting: set[Key] | None
    """Those whose record may count as durable for another file in place of theirs; None where no run can read it."""
    durable: set[Key]
    """Those whose file is surely durable."""

    def may_count(self, key: Key) -> bool:
        return self.counting is None or key in self.counting

    def ended(self, key: Key) -> None:
        """None of them counts any more."""
        if self.counting is not None:
            self.counting.discard(key)
        self.durable.discard(key)


class _Pending:
    """An instance under its final name, not yet synced; it uses the folder.

    It is written, or written again, after so many failed syncs of this run.
    """

    __slots__ = ("after", "fd", "folder", "instance", "size", "study")

    def __init__(self, instance: Instance, study: _Study, fd: int, folder: _Folder, size: int, after: int) -> None:
        self.instance, self.study, self.fd, self.folder, self.size = instance, study, fd, folder, size
        self.after = after


class _Folder:
    """The folder of a series, open; its study counts the users, and closes it under none."""

    __slots__ = ("fd", "identity", "series", "users")

    def __init__(self, series: str, fd: int, identity: tuple[int, int]) -> None:
        self.series, self.fd, self.identity, self.users = series, fd, identity, 0


class _Study:
    """The folder of a study with this run's lock, ledger and series folders."""

    def __init__(self, path: Below, disk: Disk, ledgers: Ledgers, uid: str, run: str) -> None:
        self.path = path
        self.place = f"{path}/"
        self._disk = disk
        self._disk.make_folders(path)
        self._unsynced = [path, *path.parents]
        """Folders whose entries may not be durable: a run that was killed may have made what is in them."""
        self._lock_path = path / f".{run}.lock"
        self._lock = locks.hold(self._lock_path, disk)
        try:
            locks.clean_dead_runs(path, run, disk)
            self.ledger = ledgers.open(uid, run)
        except BaseException:
            self._give_back_lock()  # the next try of this run would wait for it for ever
            raise
        self.placed: set[Key] = set()
        """What this run put or found here: of two different ones that it is sent the first stays."""
        self.failed_syncs: Counter[Key] = Counter()
        """How often this run could not sync an instance: another sync alone says nothing of it."""
        self._series: dict[str, tuple[int, int] | None] = {}
        """The series that were written to, and in which folder what was confirmed of them lies."""
        self._open: dict[str, _Folder] = {}
        """Their folders that are open, the one last asked for last."""
        self._mutex = threading.Lock()
        self._placing: set[Key] = set()
        self._changed = clock.condition()

    @contextmanager
    def alone_with(self, key: Key) -> Iterator[None]:
        """While an instance gets its final name: one that came over another association at the same time waits."""
        with self._changed:
            while key in self._placing:
                self._changed.wait(_LOOK)
            self._placing.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._placing.discard(key)
                self._changed.notify_all()

    def _give_back_lock(self) -> None:
        try:
            self._disk.remove(self._lock_path)
        finally:
            self._disk.close(self._lock)

    def enter(self, series: str) -> _Folder:
        """The folder of a series, made if absent. It stays open until it is left as often as it was entered."""
        with self._mutex:
            folder = self._open.pop(series, None)
            if folder is None:
                self._close_idle(_MAX_FOLDERS - 1)
                folder = self._opened(series)
            self._open[series] = folder
            folder.users += 1
            return folder

    def leave(self, folder: _Folder, *, gone: bool = False) -> None:
        """Use a folder no longer; one that is ``gone`` is made anew for who comes next."""
        with self._mutex:
            folder.users -= 1
            if gone and self._open.get(folder.series) is folder:
                del self._open[folder.series]
            if self._open.get(folder.series) is folder:
                self._close_idle(_MAX_FOLDERS)
            elif not folder.users:
                self._close(folder)

    def confirmed_in(self, folder: _Folder) -> None:
        """What lies in it counts: no other folder may take its place in this run."""
        with self._mutex:
            self._series[folder.series] = folder.identity

    def _opened(self, series: str) -> _Folder:
        path = self.path / series
        known = self._series.setdefault(series, None)
        if known is None:
            self._unsynced.append(self.path)
            self._disk.make_folder(path)
        fd = self._disk.open_folder(path)
        folder = _Folder(series, fd, self._disk.identity(fd))
        if known not in (None, folder.identity):
            self._close(folder)
            raise OSError(errno.ESTALE, "the folder of its series is another one than before")
        return folder

    def _close_idle(self, most: int) -> None:
        """Close those last asked for first that nobody uses, until no more than ``most`` are open."""
        if len(self._open) > most:
            idle = [folder for folder in self._open.values() if not folder.users]
            for folder in idle[: len(self._open) - most]:
                del self._open[folder.series]
                self._close(folder)

    def _close(self, folder: _Folder) -> None:
        with suppress(OSError):  # nothing was written through it
            self._disk.close(folder.fd)

    def sync_folders(self) -> None:
        """Make the folders durable: what lies in them is only as durable as they are."""
        with self._mutex:
            unsynced, self._unsynced = self._unsynced, []
        try:
            for folder in dict.fromkeys(unsynced):
                try:
                    sync_path(folder)
                except PermissionError:  # far above the destination one may not look
                    if folder in (self.path, self.path.parent):
                        raise
        except OSError:
            with self._mutex:
                self._unsynced += unsynced
            raise

    def close(self, durable: bool, cancel: CancelToken) -> None:
        """Sync the ledger, give back the lock. Raises :class:`OSError` where what was recorded may be lost."""
        failed = first_failure([self.ledger.sync] if durable else [])
        if cancel.left:
            return
        unclosed = first_failure([self.ledger.close])
        for folder in self._open.values():
            self._close(folder)
        with suppress(OSError):  # who finds it will see that nobody holds it
            self._give_back_lock()
        for path in (*(self.path / series for series, known in self._series.items() if known is None), self.path):
            with suppress(OSError):
                self._disk.remove_folder(path)  # only where nothing came
        if (error := failed or unclosed) is not None:
            raise error


class _FileWriter:
    """One instance on its way into a file."""

    __slots__ = (
        "_after",
        "_disk",
        "_fd",
        "_folder",
        "_follower",
        "_hash",
        "_head",
        "_instance",
        "_meetings",
        "_name",
        "_offset",
        "_reported",
        "_sink",
        "_size",
        "_study",
    )

    def __init__(self, sink: FilesystemSink, study: _Study, instance: Instance) -> None:
        self._sink, self._study, self._instance = sink, study, instance
        # One run may be sent an instance on two associations at a time.
        self._name = f".{instance.sop}.{sink.run}.{next(sink.writers)}.part"
        self._disk = sink.disk
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
        self._size = self._reported = self._meetings = self._after = 0
        self._follower: Follower | None = None
        self._folder = study.enter(instance.series)
        try:
            self._fd = self._disk.open(self._name, files.NEW, self._folder.fd)
        except BaseException as error:
            study.leave(self._folder, gone=isinstance(error, FileNotFoundError))
            raise

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
        if self._size - self._reported >= _REPORTED:
            self._report()
        if self._follower is not None:
            self._follower.grown(self._size)
        elif self._hash is not None:
            self._hash.update(view)
            if self._size >= _FOLLOW_FROM:
                self._follower = Follower(self._fd, self._hash, self._size)

    def _report(self) -> None:
        size, new, self._reported = self._size - self._reported, not self._reported, self._size
        self._sink.room.wrote(size, int(new))

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
            self._report()
            if self._follower is not None:
                self._follower.finish()
            instance.bytes = self._size
            instance.sha256 = self._hash.digest() if self._hash is not None else None
            instance.dataset_offset = self._offset
            instance.uri = self._study.place
            with self._study.alone_with(instance.key):
                return self._place()
        except (OSError, SinkError) as error:
            self.abort()
            failure = error
            if isinstance(error, OSError):
                failure = sink_error(error, f"The destination cannot store instance {instance.sop}")
            reason = "destination_full" if isinstance(failure, DestinationFull) else "destination_error"
            if failure is error and reason != "destination_full" and self._sink.cancel.ending():
                reason = self._sink.cancel.word  # it was not compared to the end
            return Taken(s.OUT_OF_RESOURCES, reason, str(failure))

    def _place(self) -> Taken:
        """Give the file its final name, which never takes the place of a whole other one."""
        instance, folder = self._instance, self._folder.fd
        final = f"{instance.sop}.dcm"
        self._after = self._study.failed_syncs[instance.key]
        if self._disk.has(final, folder):
            return self._meet_first(final)
        if not self._study.ledger.at_once:  # after a power cut nothing would tell that it may be torn
            self._sync_data()
        # The file of what is recorded is gone: that would count for this one before it is synced.
        self._record_taken(anew=self._sink.recorded(instance.study).may_count(instance.key))
        try:
            self._disk.rename_new(self._name, final, folder)
        except FileExistsError:  # another run was quicker by a moment
            return self._meet_first(final)
        return self._placed()

    def _placed(self) -> Taken:
        fd, self._fd = self._fd, -1
        return self._stays(fd, self._size)

    def _stays(self, fd: int, size: int) -> Taken:
        """What is there under the final name, open as ``fd``, is the instance of this run."""
        self._study.placed.add(self._instance.key)
        self._sink.taken(_Pending(self._instance, self._study, fd, self._folder, size, self._after))
        return Taken(s.SUCCESS)

    def _meet_first(self, final: str) -> Taken:
        """A file is there under the final name: it counts if its data set is the same, and stays if it is whole."""
        instance = self._instance
        fd = self._disk.open(final, files.READ, self._folder.fd)
        try:
            head = self._disk.read_at(fd, META_LIMIT, 0)
            meta = read_file_meta(head)
            offset = meta.dataset_offset if meta else 0
            size = self._disk.size(fd)
            files.check_size(size)
            same = size - offset == instance.dataset_bytes and self._is_same(fd, offset)
            described = objects.describes(meta, instance)
            placed = instance.key in self._study.placed
            replaces = self._sink.options.on_conflict == "replace" and not placed
            if same and not described and self._is_as_taken(fd) is False:
                return self._put_over(final, fd)
            if not same and not replaces and (first := objects.other_syntax(meta, instance)) and self._is_as_taken(fd):
                instance.sent_again(first)
                same = described = True
            if same and described:
                unsure = self._is_unsure()
                if unsure and not files.write_again(final, self._folder.fd, self._sink.look_on) and self._was_taken():
                    return self._put_over(final, fd)
                instance.bytes, instance.dataset_offset = size, offset
                if self._hash is not None and self._sink.options.checksum:
                    instance.sha256 = digest_of(fd, self._sink.look_on)
                self._study.ledger.taken(instance, anew=unsure)
                self._drop()
                there, fd = fd, -1
                return self._stays(there, size)
            if not placed and self._is_torn(fd, size, offset, head):
                return self._put_over(final, fd)
            if replaces:
                return self._put_over(final, fd, "replaced")
        finally:
            if fd >= 0:
                self._disk.close(fd)
        self.abort()
        return Taken(
            s.DUPLICATE_OTHER_CONTENT,
            "different_content",
            "A different data set is already stored under this UID; it was kept.",
        )

    def _is_same(self, fd: int, offset: int) -> bool:
        return same_content(fd, offset, self._fd, self._offset, self._sink.look_on)

    def _is_unsure(self) -> bool:
        """Whether what is there is perhaps of a sync that failed: in this run, before it, or in one beside it."""
        recorded, key = self._sink.recorded(self._instance.study), self._instance.key
        if not self._sink.options.durable:
            return False
        if key in self._study.placed:
            return self._after > 0
        return key not in recorded.durable

    def _was_taken(self) -> bool:
        """Whether this run, or one before it, has taken what is there."""
        return self._after > 0 or self._sink.recorded(self._instance.study).may_count(self._instance.key)

    def _is_as_taken(self, fd: int) -> bool | None:
        """Whether what is there is as a run has taken it; None where no run has recorded that."""
        digests = self._sink.digests.of(self._instance.study, self._instance.key)
        return digest_of(fd, self._sink.look_on) in digests if digests else None

    def _is_torn(self, fd: int, size: int, offset: int, head: bytes) -> bool:
        """Whether what is there is only a part of a file: of this one, of one that a crash tore, or of any other."""
        look_on = self._sink.look_on
        if self._sink.digests.are_of(self._instance.study, self._instance.key, partial(digest_of, fd, look_on), size):
            return False  # so it came
        if self._instance.key in self._sink.torn:
            begin, own = (offset, self._offset) if offset else (0, 0)
            if differ_by_lost_blocks(fd, begin, self._fd, own, look_on):
                return True
        if size - offset < self._size - self._offset and starts_alike(fd, offset, self._fd, self._offset, look_on):
            return True
        path = self._study.path / self._instance.series / f"{self._instance.sop}.dcm"
        return not objects.looks_whole(path, head, size, look_on)

    def _put_over(self, final: str, judged: int, remark: str | None = None) -> Taken:
        """Take the place of what was judged, open as ``judged``; nothing that was recorded of it counts for this one.

        What is there may be whole: it goes when this one is durable, so that a power cut leaves one of both. What
        another run has put there meanwhile, for a sync may take long, is met as any other.
        """
        self._sync_data()
        if not self._is_under(final, judged):
            return self._meet_another()
        self._record_taken(anew=True)
        if not self._is_under(final, judged):
            return self._meet_another()
        self._disk.rename_over(self._name, final, self._folder.fd)
        self._sink.torn.discard(self._instance.key)
        return self._placed()._replace(remark=remark)

    def _sync_data(self) -> None:
        """Make the content durable before it gets its final name."""
        if self._sink.options.durable:
            self._disk.sync_data(self._fd)

    def _is_under(self, final: str, fd: int) -> bool:
        """Whether an open file is still the one under the final name."""
        try:
            return self._disk.is_at(fd, self._study.path / self._instance.series / final)
        except FileNotFoundError:
            return False

    def _meet_another(self) -> Taken:
        """What was there is there no longer: begin again with what is."""
        self._meetings += 1
        if self._meetings > _MOST_MEETINGS:
            raise OSError(errno.EBUSY, "others replace it again and again")
        self._sink.digests.forget(self._instance.study)
        return self._place()

    def _record_taken(self, *, anew: bool) -> None:
        """Record it; with ``anew`` nothing that was recorded of another file of it counts, also after a power cut."""
        self._study.ledger.taken(self._instance, anew=anew)
        if anew:
            self._study.ledger.sync()
            self._sink.recorded(self._instance.study).ended(self._instance.key)

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        with suppress(OSError):  # nothing of it counts
            self._disk.close(fd)
        with suppress(OSError):
            self._disk.unlink(self._name, self._folder.fd)

    def abort(self) -> None:
        """See :meth:`sinks.base.Writer.abort`."""
        if self._sink.cancel.left:
            return
        if self._follower is not None:
            with suppress(OSError):
                self._follower.finish()
        if self._fd >= 0:
            self._drop()
            self._study.leave(self._folder)
