"""Ledgers in a bucket: numbered objects ``<root>/.ledger/<study>/<run>.<number>.jsonl``.

An object cannot be appended to, so records wait up to five seconds or for a thousand instances. What
a killed run had not written yet, the objects say themselves, where the service keeps their metadata.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable

from airflow_dicom_get import clock
from airflow_dicom_get.errors import S3Error
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.ledger import (
    Ledger,
    check_size,
    dropped_line,
    durable_line,
    header_line,
    merge_records,
    parse_ledger,
    taken_line,
)
from airflow_dicom_get.storage.bucket import Bucket, Listed

log = logging.getLogger(__name__)

_EVERY_SECONDS = 5.0
_EVERY_INSTANCES = 1000
_READERS = 8


class BucketLedgers:
    """The ledgers below a prefix, for one destination."""

    def __init__(self, bucket: Bucket, root: str, destination: str) -> None:
        self.bucket, self.destination = bucket, destination
        self._root = f"{root}/" if root else ""

    def _folder(self, study: str) -> str:
        return f"{self._root}.ledger/{study}/"

    def open(self, study: str, run: str) -> Ledger:
        """See :meth:`sinks.ledger.Ledgers.open`."""
        return BucketLedger(self.bucket, self.destination, f"{self._folder(study)}{run}")

    def read(self, study: str, *, durably: bool = False) -> dict[Key, list[Stored]]:
        """See :meth:`sinks.ledger.Ledgers.read`; objects are durable. Raises :class:`S3Error` too."""
        listed = _listed(self.bucket, self._folder(study))
        keys = [item.key for item in listed]
        check_size(sum(item.size for item in listed), study, self.bucket.uri(self._folder(study)))
        with clock.pool(_READERS, "dicom-get-s3-ledger") as pool:
            contents = list(pool.map(lambda item: self.bucket.get(item.key, item.size), listed))
        runs: dict[str, list[tuple[str, bytes]]] = {}
        for key, content in zip(keys, contents, strict=True):
            runs.setdefault(_run_of(key), []).append((self.bucket.uri(key), content))
        last_first = sorted(runs.items(), reverse=True)
        return merge_records((run, parse_ledger(parts, study, self.destination, runs)) for run, parts in last_first)


def _listed(bucket: Bucket, folder: str) -> list[Listed]:
    found = (item for item in bucket.list(folder) if item.key.endswith(".jsonl"))
    return sorted(found, key=lambda item: item.key)


def _run_of(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".jsonl").rpartition(".")[0]


class BucketLedger:
    """The records of one run for one study; see :class:`sinks.ledger.Ledger`. Thread-safe."""

    at_once = False

    def __init__(self, bucket: Bucket, destination: str, name: str) -> None:
        self._bucket, self._destination, self._name = bucket, destination, name
        self._mutex = threading.Lock()
        self._writing = clock.lock()
        self._lines: list[str] = []
        self._kept = 0
        self._number = 0
        self._earlier: list[str] | None = None
        """See :class:`sinks.ledger.LedgerWriter`."""
        self._since = clock.monotonic()

    def taken(self, instance: Instance | Stored, *, anew: bool = False) -> None:
        """See :meth:`sinks.ledger.Ledger.taken`."""
        ended = [self._dropped_line(instance.key)] if anew else []
        self._add([*ended, taken_line(instance, self._destination)])

    def durable(self, keys: Iterable[Key], etag: str | None = None, forwarded_to: str | None = None) -> None:
        """See :meth:`sinks.ledger.Ledger.durable`."""
        lines = [durable_line(key, etag, forwarded_to) for key in keys]
        self._add(lines, len(lines))

    def dropped(self, key: Key) -> None:
        """See :meth:`sinks.ledger.Ledger.dropped`."""
        self._add([self._dropped_line(key)])

    def _dropped_line(self, key: Key) -> str:
        if self._earlier is None:
            folder, _, own = self._name.rpartition("/")
            try:
                runs = dict.fromkeys(_run_of(item.key) for item in _listed(self._bucket, f"{folder}/"))
            except S3Error as error:
                raise OSError(errno.EIO, str(error)) from error
            self._earlier = [run for run in runs if run > own]
        return dropped_line(key, self._destination, self._earlier)

    def _add(self, lines: list[str], kept: int = 0) -> None:
        with self._mutex:
            if not self._lines:
                self._since = clock.monotonic()
            self._lines += lines
            self._kept += kept
        self.tick()

    def tick(self) -> None:
        """Write what waits, if its time has come; what cannot be written waits on."""
        due = self._kept >= _EVERY_INSTANCES or clock.monotonic() - self._since >= _EVERY_SECONDS
        if due and self._lines and self._writing.acquire(blocking=False):
            try:
                self._write()
            except S3Error as error:
                log.warning("%s", error)
            finally:
                self._writing.release()

    def sync(self) -> None:
        """See :meth:`sinks.ledger.Ledger.sync`: write what waits."""
        with self._writing:
            try:
                self._write()
            except S3Error as error:
                raise OSError(errno.EIO, str(error)) from error

    def _write(self) -> None:
        with self._mutex:
            lines, self._lines = self._lines, []
            kept, self._kept = self._kept, 0
            self._since = clock.monotonic()
        if not lines:
            return
        try:
            body = (header_line() + "".join(lines)).encode("ascii")
            self._bucket.put(f"{self._name}.{self._number + 1:06}.jsonl", body, ContentType="application/x-ndjson")
            self._number += 1
        except S3Error:
            with self._mutex:
                self._lines = lines + self._lines
                self._kept += kept
            raise

    def close(self) -> None:
        """See :meth:`sinks.ledger.Ledger.close`. Raises ``OSError`` where the last records cannot be written."""
        self.sync()
