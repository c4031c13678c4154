"""The verb ``store``: files, a prefix of a bucket, or what a manifest lists as held, to a node by C-STORE."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import about, invalid, shown_path
from airflow_dicom_get.config.groups import MAX_PDU_LENGTH, Deadlines, S3Config, Tls, UserIdentity
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import StoreOptions
from airflow_dicom_get.dicom.header import walk_of
from airflow_dicom_get.engine.report import StoreEnd, assemble_store, completed_event, fix_rows, manifest_not_written
from airflow_dicom_get.errors import DicomGetError, ForwardLate, ForwardLost, InvalidOption, unexpected
from airflow_dicom_get.net.association import time_is_over
from airflow_dicom_get.net.retries import allowed, back_off
from airflow_dicom_get.records import Completed, Instance, Key, Stored, SubOperation
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks.base import Confirmation, Taken
from airflow_dicom_get.sinks.objects import (
    Listed,
    Named,
    Opened,
    RefusedError,
    StoredObject,
    UnreadableError,
    UnusableError,
    load_listed,
    objects_in,
    objects_of,
    open_object,
)
from airflow_dicom_get.vocabulary import DONE, HELD

if TYPE_CHECKING:
    from airflow_dicom_get.engine.events import Events
    from airflow_dicom_get.manifest.scopes import Scopes
    from airflow_dicom_get.net.association import CancelToken
    from airflow_dicom_get.net.peer import Peer
    from airflow_dicom_get.sinks.forward import ForwardSink
    from airflow_dicom_get.vocabulary import Evidence, Verdict

log = logging.getLogger(__name__)

_BUSY_TRIES = 3
"""How often an instance is sent to a destination that says it is out of resources."""
_MOST_GIVEN_UP = 3
"""Instances given up in a row, with none that the destination answers between them, after which the run ends."""

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class StoreScu:
    """Store instances at a node, and verify each: retrieve first, forward later.

    Parameters
    ----------
    addr : str or Node
        Address of the node to store at, ``[AE@]host:port``.
    **options
        Those of :class:`~airflow_dicom_get.GetScu` that apply to storing; all are keyword-only.

    Raises
    ------
    InvalidOption
        An option is malformed or contradicts another one.
    """

    def __init__(
        self,
        addr: str | Node,
        *,
        calling_ae_title: str = "GET-SCU",
        called_ae_title: str = "ANY-SCP",
        max_pdu_length: int = 131072,
        verbose: bool = False,
        s3_config: S3Config | Mapping[str, Any] | None = None,
        strict_forward: bool = False,
        associations: int = 1,
        max_associations: int = 2,
        resume: bool = True,
        verify_held: Literal["size", "digest"] = "size",
        retries: int = 5,
        checksum: Literal["sha256"] | None = "sha256",
        manifest_root: str | Path | None = None,
        trust_destination: bool = False,
        tls: Tls | Mapping[str, Any] | None = None,
        user_identity: UserIdentity | Mapping[str, Any] | None = None,
        transcript: Any = None,
        deadlines: Deadlines | Mapping[str, Any] | None = None,
    ) -> None:
        self._begin(StoreOptions.of_arguments(locals()))

    @classmethod
    def of(cls, options: StoreOptions) -> Self:
        """A client whose options were checked already."""
        scu = cls.__new__(cls)
        scu._begin(options)
        return scu

    def _begin(self, options: StoreOptions) -> None:
        from airflow_dicom_get.net.association import Cancels
        from airflow_dicom_get.net.peer import Peer

        self.options = options
        peer = Peer.of(options.addr, options)
        self._target = dataclasses.replace(peer, max_pdu_length=min(peer.max_pdu_length, MAX_PDU_LENGTH))
        self._cancels = Cancels()

    def cancel(self, reason: str = "cancelled") -> None:
        """End the call that runs after its current instance; a second cancel aborts at once.

        Otherwise as :meth:`GetScu.cancel`.
        """
        self._cancels.cancel(reason)

    def store(
        self,
        source: Source | None = None,
        *,
        manifest: Any = None,
        root: Named | Sequence[Named] | None = None,
        on_sub_operation: Callable[[SubOperation], object] | None = None,
        on_completed: Callable[[Completed], object] | None = None,
        on_unusable: Callable[[str, str], object] | None = None,
        manifest_name: str | None = None,
    ) -> Result:
        """Store the instances of a source, and report what became of each.

        Parameters
        ----------
        source : path, URI, or sequence of these
            Files, folders, and prefixes as ``s3://bucket/prefix``.
        manifest : manifest, reference or URI
            Instead of a source: store the objects that it lists, in the destination in which its ``_manifests`` lies
            (of a frame or reference, in that of its column ``destination``) and below ``root``. A row that names
            another place is ``failed``.
        root : path, address, or several of them
            Further folders or prefixes, ``s3://bucket/prefix``, in which objects of the manifest may lie, and files to
            which links in the folders of ``source`` lead. Those that lead elsewhere are not followed.
        on_sub_operation, on_completed : callable
            As in :meth:`GetScu.get_study`; ``file`` is the object that was stored.
        on_unusable : callable
            Called with the name of each object that cannot be stored as an instance, and the reason.
        manifest_name : str
            Path of the new manifest below the manifest root, without its extension.

        Returns
        -------
        Result
            ``complete`` if every object of the source, or that the manifest lists, is confirmed at the node. The new
            manifest has no better verdict than the one that it was made of.

        Raises
        ------
        InvalidOption, ManifestError, S3Error
            Invalid input; nothing was stored.
        """
        from airflow_dicom_get.cell import at_cell
        from airflow_dicom_get.engine.ending import StuckError, read_first, run_beside, write_manifest
        from airflow_dicom_get.engine.events import Events
        from airflow_dicom_get.manifest.schema import manifest_rows, manifest_table
        from airflow_dicom_get.sinks.places import root_for

        name = clock.run_name()
        operation = self.options.deadlines.operation
        with self._cancels.call(operation) as cancel, at_cell(cancel.cancel, on_sub_operation) as shown:
            if (source is None) == (manifest is None):
                raise invalid("source and manifest", "are both given, or neither", "Give one of the two.")
            sources: list[Named] = []
            if source is not None:
                sources = [source] if isinstance(source, str | os.PathLike) else list(source)
            given = manifest if isinstance(manifest, str | os.PathLike) else "manifest"
            shown_source = " ".join(map(str, sources or [given]))
            state = root_for(self.options)

            said: tuple[Verdict, Evidence] | None = None
            scopes: Scopes = {}

            def read() -> tuple[list[StoredObject], list[Instance]]:
                nonlocal said, scopes
                if manifest is None:
                    return self._objects_in(sources, root, cancel), []
                listed = load_listed(manifest, self.options.s3_config, root)
                said, scopes = (listed.verdict, listed.evidence), listed.scopes
                self._check_not_source(listed)
                return objects_of(listed, self.options.s3_config, cancel)

            found = read_first(read, cancel)
            events = Events(shown, on_completed)
            state.attend(cancel)
            ledgers = state.ledgers(f"dicom://{self._target}")
            run = _Run(self, self._target.of_run(), ledgers, name, events, on_unusable, cancel)
            run.unread = found is None
            results: list[Result] = []
            described = {"source": shown_source, "destination": f"dicom://{self._target}"}

            def judge() -> Result:
                result = run.result(str(self._target))
                result.rows = lambda: manifest_table(run.rows.values(), **described)
                results.append(result)
                return result

            def work() -> None:
                run.execute(*(found or ([], [])))
                result = judge()
                rows = manifest_rows(run.rows.values(), **described)
                write_manifest(result, rows, state, manifest_name or name, name, cancel, said, scopes)

            try:
                run_beside(work, cancel)
            except StuckError as stuck:
                if not results:
                    fix_rows(judge())
                manifest_not_written(results[0], stuck.error())
        result = results[0]
        events.completed(completed_event(result), wait=not cancel.left)
        return result

    def _objects_in(
        self, sources: Sequence[Named], root: Named | Sequence[Named] | None, cancel: CancelToken
    ) -> list[StoredObject]:
        objects = objects_in(sources, self.options.s3_config, root, cancel)
        if not objects:
            named = ", ".join(map(shown_path, sources)) or "source"
            raise InvalidOption(
                about(named, "holds no files"), hint="Name files, or folders that hold some.", option="source"
            )
        return objects

    def _check_not_source(self, listed: Listed) -> None:
        """Refuse to store at the node that a manifest was retrieved from."""
        for text in listed.table["source"].unique().to_pylist():
            try:
                source = Node.parse(text or "")
            except InvalidOption:
                continue
            target = self._target
            if source.endpoint == target.node.endpoint and source.ae_title in (None, target.called):
                raise invalid(
                    "addr", f"{target} is the node that the manifest was retrieved from", "Name the node to store at."
                )


class _Run:
    """One call of :meth:`StoreScu.store`."""

    def __init__(
        self,
        scu: StoreScu,
        target: Peer,
        ledgers: Any,
        name: str,
        events: Events,
        on_unusable: Callable[[str, str], object] | None,
        cancel: CancelToken,
    ) -> None:
        from airflow_dicom_get.sinks.forward import ForwardSink

        o = scu.options
        self.cancel = cancel
        self.rows: dict[tuple[str, Key], Instance] = {}
        self._records: dict[tuple[str, Key], list[Instance]] = {}
        """What became of each object of an instance; the first one is its row."""
        self._digests: dict[int, bytes] = {}
        """Of the objects, as their manifests record them, by the ``id`` of what became of each."""
        self.unusable: list[tuple[str, str]] = []
        self.strict = o.strict_forward
        self._options, self._events, self._on_unusable = o, events, on_unusable
        # Nobody waits for us here: a slow destination has the time that a slow source would have.
        patient = dataclasses.replace(o.deadlines, sub_operation=o.deadlines.next_object, stall=o.deadlines.idle)
        self._sink: ForwardSink = ForwardSink(
            dataclasses.replace(target, deadlines=patient),
            ledgers,
            name,
            dataclasses.replace(o, deadlines=patient),
            cancel=self.cancel,
            forwarding=False,
        )
        self._mutex = threading.Lock()
        self._waiting = clock.lock()
        """Of the one that waits for what is answered late."""
        self._late: dict[int, Confirmation] = {}
        """What was confirmed, by the record, until it is asked for: one of several wakes for all of them."""
        self._held: dict[str, dict[Key, Stored]] = {}
        self._error: DicomGetError | None = None
        self._given_up = 0
        """Instances given up since the destination has answered one."""
        self._stopped = False
        self.unread = False
        """Whether the call was to end before its source was read."""
        self._files = 0
        """Of a source; each object of a manifest has its row."""

    # --- the work ------------------------------------------------------------------------------

    def execute(self, objects: Sequence[StoredObject], others: Sequence[Instance]) -> None:
        """Store all of them; what cannot be ends up in the rows."""
        for row in others:
            self._not_there(row)
        for item in objects:
            if item.row is not None:  # the manifest names them: each gets its row, also where the run ends early
                self.rows.setdefault(_identity(item.row), _blank(item.row))
            else:
                self._files += 1
        self._events.planned(len(objects))
        queue = iter(objects)
        workers = min(self._options.associations, max(len(objects), 1))
        try:
            clock.together([partial(self._work, queue)] * workers, "dicom-get-store", self._end_at_once)
        finally:
            self._closed(self._sink)
        for item in queue:  # none was begun; each has its say in what becomes of its row
            if item.row is not None and not self._has_one_like(item.row):
                record = self._record(_blank(item.row))
                record.state, record.reason = "missing", self._why_untried()
        for records in self._records.values():
            _join(records)
        for row in self.rows.values():
            if row.state is None:
                row.state, row.reason = "missing", self._why_untried()

    def _has_one_like(self, row: Instance) -> bool:
        """Whether the node has an object of an instance that was recorded with the same digest."""
        records = self._records.get(_identity(row), ())
        return row.sha256 is not None and any(
            one.state in HELD and self._digests.get(id(one)) == row.sha256 for one in records
        )

    def _not_there(self, row: Instance) -> None:
        """A row of the manifest that has no object of its own is listed, and is not stored."""
        if row.state == "withdrawn":
            return
        listed = self.rows.setdefault(_identity(row), _blank(row))
        listed.state, listed.reason = "missing", row.reason or "not_sent"
        listed.error = "The manifest names no readable object for it."

    def _why_untried(self) -> str:
        if self.cancel.over():
            return "deadline"
        if self.cancel.reason is not None:
            return "cancelled"
        return "strict_forward" if self._stopped else "destination_error"

    def _end_at_once(self, error: BaseException) -> None:
        self.cancel.abort(type(error).__name__)

    def _closed(self, sink: ForwardSink) -> None:
        try:
            sink.close()
        except DicomGetError as error:
            self._failed(error)
        except Exception as error:
            log.exception("the ledgers cannot be closed")
            self._failed(unexpected(error))

    def _failed(self, error: DicomGetError) -> None:
        with self._mutex:
            self._error = self._error or error

    def _work(self, queue: Iterator[StoredObject]) -> None:
        while True:
            with self._mutex:
                over = self._error is not None or self._stopped or self.cancel.ending()
                item = None if over else next(queue, None)
            if item is None:
                return
            try:
                self._one(item)
            except DicomGetError as error:
                self._failed(error)
                return
            except Exception as error:
                log.exception("an association ended unexpectedly")
                self._failed(unexpected(error))
                return

    def _one(self, item: StoredObject) -> None:
        try:
            opened = self._open(item)
        except UnusableError as error:
            self._unusable(item, str(error))
            return
        except UnreadableError as error:
            self._unusable(item, f"cannot be read: {error}")
            return
        if opened is None:
            return
        instance = opened.instance
        record = self._record(instance)
        if item.row is not None and item.row.sha256 is not None:
            self._digests[id(record)] = item.row.sha256
        # What is sent is what the object says, and not its manifest.
        record.sop_class, record.syntax = instance.sop_class, instance.syntax
        record.fill(instance)
        held = self._inventory(instance.study, opened.patient).get(instance.key)
        if held is None:
            self._store(item, opened, record)
            return
        try:
            same = self._same(held, item, opened)
        except UnreadableError as error:
            self._changed(record, f"{item.name}: {error}")
            return
        if same:
            record.adopt(held)
            record.state, record.reason = "held", record.remark
        else:  # the sink says in which way it differs
            self._store(item, None, record)

    def _record(self, instance: Instance) -> Instance:
        """What becomes of an object: the row of its instance; a second one has its own, and the two are joined last."""
        with self._mutex:
            records = self._records.setdefault(_identity(instance), [])
            records.append(instance if records else self.rows.setdefault(_identity(instance), instance))
            return records[-1]

    def _open(self, item: StoredObject) -> Opened | None:
        """The object with its header read; None if it is not what its manifest says, which its row then tells."""
        row = item.row
        try:
            if row is not None and row.bytes is not None and item.size() != row.bytes:
                raise UnreadableError("its size differs from the recorded one")
            opened = open_object(item)
            if row is not None and _identity(opened.instance) != _identity(row):
                raise UnreadableError("it is not the instance that the manifest names")
        except (UnreadableError, UnusableError) as error:
            if row is None:
                raise
            record = self._record(_blank(row))
            self._changed(record, f"{item.name}: {error}", refused=isinstance(error, RefusedError))
            return None
        return opened

    def _changed(self, record: Instance, text: str, *, refused: bool = False) -> None:
        reason = "outside_root" if refused else "size_changed"
        record.state, record.reason, record.error = "failed", reason, text
        self._events.arrived(record, record.sop, text, 0, new=False)

    def _unusable(self, item: StoredObject, why: str) -> None:
        with self._mutex:
            self.unusable.append((item.name, why))
        if self._on_unusable is not None:
            self._events.call(self._on_unusable, item.name, why)

    @staticmethod
    def _same(held: Stored, item: StoredObject, opened: Opened) -> bool:
        """Whether the node holds just this data set, as far as our records tell.

        Raises
        ------
        UnreadableError
            It cannot be read, or is not the one that its manifest names.
        """
        recorded = item.row.sha256 if item.row is not None else None
        sent = held.sha256 if held.bytes is not None else None
        skip, whole, digest = opened.dataset_offset, hashlib.sha256(), hashlib.sha256()
        if held.bytes is not None and item.size() - skip != held.bytes:
            return False
        if recorded is None and sent is None:
            return True
        for view in opened.chunks():
            if recorded is not None:
                whole.update(view)
            if sent is not None:
                digest.update(view[skip:])
                skip = max(skip - len(view), 0)
        if recorded is not None and whole.digest() != recorded:
            raise UnreadableError("its digest differs from the recorded one")
        return sent in (None, digest.digest())

    def _inventory(self, study: str, patient: Mapping[int, bytes]) -> dict[Key, Stored]:
        if not self._options.resume:
            return {}
        with self._mutex:
            held = self._held.get(study)
            if held is None:
                held = self._held[study] = self._sink.inventory(study, patient)
            return held

    def _store(self, item: StoredObject, opened: Opened | None, record: Instance) -> None:
        """Send one instance, also again where its destination went away or has no room for the moment.

        One instance may be what makes the destination break off: it is given up, and the others are tried.
        """
        failures = busy = 0
        began = clock.monotonic()
        while True:
            try:
                at_hand, opened = opened, None  # what is sent again is opened again
                taken = self._send(item, at_hand or open_object(item), record)
            except ForwardLost as error:
                failures += 1
                retries = allowed(error, self._options.retries)
                if self._given_up and not error.facts.get("unreachable"):
                    retries = min(retries, 1)  # it may break off on everything
                if self.cancel.ending():
                    raise
                if failures > retries:
                    self._give_up(record, error)
                    return
                back_off(failures, error.message, retries, self.cancel, self.cancel.over_at)
            except (UnreadableError, UnusableError) as error:
                self._changed(record, f"{item.name}: {error}")
                return
            else:
                self._given_up = 0
                busy += taken.reason == "destination_error"
                if taken.reason != "destination_error" or self.strict or busy >= _BUSY_TRIES:
                    break
                back_off(busy, taken.error or "", _BUSY_TRIES - 1, self.cancel, self.cancel.over_at)
            if self.cancel.ending():
                return
        record.received_at = clock.now()
        record.duration_ms = int((clock.monotonic() - began) * 1000)
        self._settle(record, taken)

    def _give_up(self, record: Instance, error: ForwardLost) -> None:
        """Leave an instance on which the destination breaks off; raise the error where others would fare no better."""
        with self._mutex:
            self._given_up += 1
            over = error.facts.get("unreachable") or not error.transient or self.strict
        if over or self._given_up >= _MOST_GIVEN_UP:
            raise error
        record.state, record.reason, record.error = "failed", "destination_error", error.message
        record.attempt = 1
        self._events.arrived(record, record.sop, error.message, 0, new=False)

    def _send(self, item: StoredObject, opened: Opened, record: Instance) -> Taken:
        recorded = item.row.sha256 if item.row is not None else None
        digest = hashlib.sha256() if recorded else None
        skip = opened.dataset_offset
        writer = self._sink.begin(record)
        if isinstance(writer, Taken):
            return writer
        walk = walk_of(opened.instance.syntax or "")
        try:
            for view in opened.chunks():
                if digest is not None:
                    digest.update(view)
                if skip:
                    view, skip = view[skip:], max(skip - len(view), 0)
                if view:
                    writer.write(view)
                    walk.feed(view)
            if digest is not None and digest.digest() != recorded:
                raise UnreadableError("its digest differs from the recorded one")
            record.truncated = not walk.whole
            return writer.take()
        except ForwardLate:
            if self._confirmed_late(record):
                return self._sink.taken_late(record)
            raise
        except BaseException:
            writer.abort()
            raise

    def _confirmed_late(self, record: Instance) -> bool:
        """Wait for what the destination answers late; what it says of the instances of others is kept for them."""
        with self._waiting:
            for one in self._sink.confirmations(wait=True):
                self._late[id(one.instance)] = one
            said = self._late.pop(id(record), None)
        return said is not None and said.error is None

    def _settle(self, record: Instance, taken: Taken) -> None:
        first = self.rows[_identity(record)]
        record.dimse_status, record.attempt = taken.status, 1
        if taken.reason is None:
            record.state, record.reason, record.error = taken.state, record.remark, None
            self._events.arrived(record, record.sop, None, record.bytes or 0, new=record is first)
            return
        record.state = "conflict" if taken.reason == "different_content" else "failed"
        record.reason, record.error = taken.reason, taken.error
        self._events.arrived(record, record.sop, taken.error or taken.reason, 0, new=False)
        if self.strict:
            self._stopped = True

    # --- the end -------------------------------------------------------------------------------

    def result(self, node: str) -> Result:
        """What became of the whole."""
        error, cancelled_by = self._error, self.cancel.reason
        known = len(self.unusable) + sum(map(len, self._records.values()))
        untried = max(self._files - known, 0)
        undone = self.unread or untried or any(row.state not in DONE for row in self.rows.values())
        if self.cancel.over() and (error is not None or undone):
            error, cancelled_by = time_is_over(self._sink.target.node, self._options.deadlines), None
        end = StoreEnd(error, self._stopped, cancelled_by, self.unusable, untried)
        return assemble_store(
            list(self.rows.values()), end, events=self._events, node=node, associations=self._sink.opened
        )


def _identity(row: Instance) -> tuple[str, Key]:
    return row.study, row.key


def _join(records: Sequence[Instance]) -> None:
    """Let the row of an instance tell of all its objects: it is stored where each of them, or its like, is."""
    row = records[0]
    stored = [x for x in records if x.state in HELD]
    digests = {x.sha256 for x in stored} - {None}
    lacking = [x for x in records if x.state not in HELD and x.sha256 not in digests]
    lacking.sort(key=lambda x: (x.state is None, x.state != "conflict"))
    if lacking:
        row.state, row.reason, row.error = lacking[0].state, lacking[0].reason, lacking[0].error
    elif row.state not in HELD:
        row.become(stored[0])


def _blank(row: Instance) -> Instance:
    """A row of ours for one of another manifest."""
    instance = Instance(row.study, row.series, row.sop)
    instance.fill(row)
    return instance
