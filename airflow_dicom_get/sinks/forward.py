"""The forward sink: every instance goes on to another node as it arrives, in the syntax in which it arrived.

Nothing is kept here but one buffer an association. An instance is taken when the destination's
C-STORE-RSP says so, and that response, in our ledger, is the proof on resume.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from airflow_dicom_get import clock
from airflow_dicom_get.config.options import TransferOptions
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.errors import (
    Cancelled,
    DicomGetError,
    ForwardLate,
    ForwardLost,
    ListTooLong,
    NotNegotiated,
    OperationFailed,
    PeerError,
    PeerProtocolError,
    SinkError,
    peer_text,
)
from airflow_dicom_get.lists.instances import InstanceList, ask
from airflow_dicom_get.lists.whole import Cuts
from airflow_dicom_get.net.acse import MAX_CONTEXTS, Proposal
from airflow_dicom_get.net.association import Association, CancelToken
from airflow_dicom_get.net.echo import VERIFICATION
from airflow_dicom_get.net.peer import Peer
from airflow_dicom_get.net.retries import allowed, back_off, no_contact
from airflow_dicom_get.net.store import StoreChannel, StoreResponse
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.base import Confirmation, Taken, Writer
from airflow_dicom_get.sinks.holdings import NodeHoldings, Sent, is_same
from airflow_dicom_get.sinks.ledger import Ledger, Ledgers, first_failure

log = logging.getLogger(__name__)

_RELEASE, _CONNECT, _ACSE = 0.15, 0.35, 0.5
"""Shares of ``stall`` that a change of associations may take, while the source is left unread."""


class _Line:
    """An association with the destination, and what it carries."""

    __slots__ = ("association", "channel", "contexts")

    def __init__(self, association: Association, max_pdu_length: int) -> None:
        self.association = association
        self.channel = StoreChannel(association, max_pdu_length)
        self.contexts = {proposal: number for number, proposal in association.accepted.contexts.items()}

    def hung_up(self) -> bool:
        """Whether the destination has ended it while nothing was asked: whatever came is not a response."""
        return self.association.wait_for_data(0.0)


class ForwardSink:
    """Store instances at another node.

    One association with the destination for each with the source: a line is taken for an instance
    and given back after its response. Memory: a buffer of 1 MiB for each of them, and about 150
    bytes for each instance that was forwarded.

    Parameters
    ----------
    target : Peer
        The destination.
    ledgers : Ledgers
        Where our records lie.
    run : str
        Name of this run, unique.
    options : TransferOptions
        Of its deadlines ``sub_operation`` and ``stall`` bound how long the source waits; ``next_object`` is how
        long a late response of the destination is waited for after that. What the destination does not list any
        more is not held. Without ``checksum`` a duplicate is told by its
        size alone.
    cancel : CancelToken
        The run's; a hard cancel ends waits here too.
    classes : collection of str
        SOP classes to come, as far as known: proposed in the syntaxes seen with each new association.
    forwarding : bool
        Whether a source sends the instances, and not ``store``; for the texts of errors.
    """

    def __init__(
        self,
        target: Peer,
        ledgers: Ledgers,
        run: str,
        options: TransferOptions,
        *,
        cancel: CancelToken,
        classes: Collection[str] = (),
        forwarding: bool = True,
    ) -> None:
        self.target, self.options, self.cancel = target, options, cancel
        self._forwarding = forwarding
        self.deadlines = deadlines = options.deadlines
        self.name = str(target)
        self._quick = replace(
            target,
            deadlines=replace(
                deadlines,
                release=min(deadlines.release, deadlines.stall * _RELEASE),
                connect=min(deadlines.connect, deadlines.stall * _CONNECT),
                acse=min(deadlines.acse, deadlines.stall * _ACSE),
            ),
        )
        self._ledger_store, self._run = ledgers, run
        self.opened = 0
        """Associations for storage so far."""
        self._answered = False
        """Whether the destination has answered anything yet."""
        self._stopped = False
        self._mutex = threading.Lock()
        self._changed = clock.condition(self._mutex)
        self._ledgers: dict[str, Ledger] = {}
        self._unclosed: OSError | None = None
        self._idle: list[_Line] = []
        self._classes = classes
        self._pairs: dict[Proposal, None] = {}  # seen, the latest last
        self._refused: set[Proposal] = set()
        self._holdings = NodeHoldings(ledgers, self.name, trusted=options.trust_destination)
        self._cuts = Cuts()
        self._under_way: set[str] = set()
        """SOP Instance UIDs of what is being sent."""
        self._late = 0
        self._done: list[Confirmation] = []
        self._closed = False

    # --- what is held --------------------------------------------------------------------------

    def inventory(self, study: str, patient: Mapping[int, bytes] = {}) -> dict[Key, Stored]:
        """See :meth:`sinks.base.Sink.inventory`: what our ledgers say was stored, and the destination still lists."""
        return self._holdings.inventory(study, partial(self._listed, patient))

    def _listed(
        self, patient: Mapping[int, bytes], study: str, series: Collection[str] | None, recorded: Collection[Key]
    ) -> InstanceList | None:
        """What the destination lists; None where it offers no list, so that our records of its answers stand.

        Raises
        ------
        ForwardLost
            It cannot be reached, and so confirms nothing.
        OperationFailed, ListTooLong
            It offers a list, and did not give it: that confirms nothing either.
        """
        from airflow_dicom_get.net.find import FIND_PROPOSALS

        self._release_idle()  # the question counts against the destination's limit, too
        # Some nodes reject an association of which they accept no context.
        proposals = (*FIND_PROPOSALS, Proposal(VERIFICATION, IMPLICIT_LE))
        failures = 0
        while True:
            try:
                association = self.target.open(proposals, self.cancel)
                listed = ask(association, {study: series}, {study: recorded}, self._cuts, {study: patient})[study]
            except NotNegotiated as error:
                log.info("%s offers no list, so our own records decide: %s", self.name, error.message)
                self._answered = True
                return None
            except (OperationFailed, ListTooLong):
                self._answered = True
                raise
            except PeerError as error:
                failures += 1
                lost = self.lost(error, may_pass=error.transient, unreachable=True)
                retries = allowed(lost, self.options.retries)
                if failures > retries or self.cancel.ending():
                    raise lost from error
                back_off(failures, lost.message, retries, self.cancel, self.cancel.over_at)
            else:
                self._answered = True
                return listed

    # --- writing -------------------------------------------------------------------------------

    def head(self, held: Stored, size: int) -> bytes:
        """Nothing: what was forwarded lies with the destination."""
        return b""

    def begin(self, instance: Instance) -> Writer | Taken:
        """See :meth:`sinks.base.Sink.begin`."""
        assert instance.sop_class is not None
        assert instance.syntax is not None
        if self._stopped:
            text = "An earlier instance was refused, and strict_forward is set."
            return Taken(s.OUT_OF_RESOURCES, "strict_forward", text)
        known = self._claim(instance)
        if known is not None:
            return _Comparing(self, instance, known)
        try:
            writer = self._begin(instance)
        except BaseException:
            self.give_up(instance)
            raise
        if isinstance(writer, Taken):
            self.give_up(instance)
        return writer

    def _claim(self, instance: Instance) -> Sent | None:
        """What is known of an instance of this UID that the destination took; without one, this is the one to send.

        One that is under way over another association is waited for: the two may differ.
        """
        limit = clock.monotonic() + self.deadlines.stall
        with self._changed:
            while instance.sop in self._under_way:
                if self.cancel.reason is not None:
                    raise Cancelled(f"Cancelled before {self.name} answered.")
                if clock.monotonic() >= limit:
                    raise ForwardLost(
                        f"{self.name} did not answer for another object of instance {instance.sop} within "
                        f"{self.deadlines.stall:g} s (deadlines.stall).",
                        hint="The association with the source was given up; the rest is requested again.",
                        node=self.name,
                        may_pass=True,
                    )
                self._changed.wait(0.2)
            known = self._holdings.first(instance)
            if known is None:
                self._under_way.add(instance.sop)
            return known

    def give_up(self, instance: Instance) -> None:
        """The instance is not under way any more: taken, or not."""
        with self._changed:
            self._under_way.discard(instance.sop)
            self._changed.notify_all()

    def _begin(self, instance: Instance) -> Writer | Taken:
        assert instance.sop_class is not None
        assert instance.syntax is not None
        try:
            self._ledger(instance.study)
        except OSError as error:
            raise _not_recorded(error) from error
        series = self._holdings.elsewhere(instance)
        if series is not None:
            return _elsewhere(f"series {series}")
        pair = Proposal(instance.sop_class, instance.syntax)
        line = self._line(pair)
        if line is None:
            return self._no_context(instance, pair)
        recorded = self._holdings.is_recorded(instance)
        digest = hashlib.sha256() if self.options.checksum or recorded else None
        line.channel.begin(line.contexts[pair], instance.sop_class, instance.sop, digest)
        return _ForwardWriter(self, line, instance, digest, recorded=recorded)

    def check_may_go(self, instance: Instance, size: int, digest: bytes) -> Taken | None:
        """Why a data set of a UID that was sent before may not be sent whole; what it takes the place of has ended."""
        if self._holdings.replaces(instance, size, digest):
            return _OTHER_CONTENT
        keys = self._holdings.to_end(instance, size, digest)
        if keys:
            try:
                ledger = self._ledger(instance.study)
                for key in keys:
                    ledger.dropped(key)
                ledger.sync()
            except OSError as error:
                return Taken(s.OUT_OF_RESOURCES, "destination_error", _not_recorded(error).message)
            self._holdings.ended(instance, keys)
        return None

    def _ledger(self, study: str) -> Ledger:
        with self._mutex:
            ledger = self._ledgers.get(study)
            if ledger is None:
                ledger = self._ledgers[study] = self._ledger_store.open(study, self._run)
            return ledger

    def _no_context(self, instance: Instance, pair: Proposal) -> Taken:
        pair_text = f"SOP class {pair.abstract_syntax} in {pair.transfer_syntax}"
        text = f"The destination accepted no presentation context for {pair_text}."
        return self._refusal(instance, s.CLASS_NOT_SUPPORTED, "destination_refused", text)

    def _refusal(self, instance: Instance, status: int, reason: str, text: str) -> Taken:
        instance.forwarded_to, instance.forward_status, instance.forward_error = self.name, "error", text
        self._stopped = self._stopped or self.options.strict_forward
        return Taken(status, reason, text)

    # --- lines ---------------------------------------------------------------------------------

    def _line(self, pair: Proposal) -> _Line | None:
        """A line that carries the pair; None if the destination refuses it."""
        with self._mutex:
            self._pairs.pop(pair, None)
            self._pairs[pair] = None
            if pair in self._refused:
                return None
            line = next((x for x in self._idle if pair in x.contexts), self._idle[-1] if self._idle else None)
            if line is not None:
                self._idle.remove(line)
        if line is not None:
            if line.hung_up():
                line.association.abort()
            elif pair in line.contexts:
                return line
            else:
                line.association.release()
        return self._open(pair)

    def _open(self, pair: Proposal) -> _Line | None:
        proposals = self._proposals(pair)
        try:
            association = self._quick.open(proposals, self.cancel)
        except PeerError as error:
            # What answers, but not as a DICOM node does, will not do so the next time.
            may_pass = error.transient and not isinstance(error, PeerProtocolError)
            raise self.lost(error, may_pass=may_pass, unreachable=True) from error
        line = _Line(association, self.target.max_pdu_length)
        with self._mutex:
            self.opened += 1
            self._refused.update(proposal for proposal in proposals if proposal not in line.contexts)
        if pair in line.contexts:
            return line
        self._give_back(line)
        return None

    def _proposals(self, pair: Proposal) -> list[Proposal]:
        """The pair, those seen before, and the classes to come in the syntaxes seen, the latest first."""
        with self._mutex:
            seen = list(reversed(self._pairs))
            syntaxes = dict.fromkeys(p.transfer_syntax for p in seen)
            wanted = dict.fromkeys([pair, *seen])
            wanted.update(dict.fromkeys(Proposal(c, syntax) for syntax in syntaxes for c in tuple(self._classes)))
            return [proposal for proposal in wanted if proposal not in self._refused][:MAX_CONTEXTS]

    def _give_back(self, line: _Line) -> None:
        with self._mutex:
            keep = not self._closed
            if keep:
                self._idle.append(line)
        if not keep:
            line.association.release()

    def lost(self, error: PeerError, *, may_pass: bool = True, unreachable: bool = False) -> ForwardLost:
        """An error of the destination's association, as the one that ends the source's."""
        facts: dict[str, Any] = {
            name: error.facts[name] for name in ("result", "source", "reason") if name in error.facts
        }
        worth = no_contact(error, reached=self.opened > 0 or self._answered, answered=self._answered)
        if worth is not None:
            facts["retries"] = worth
        return ForwardLost(
            f"{'Forwarding' if self._forwarding else 'Storing'} failed. {error.message}",
            hint=error.hint,
            node=self.name,
            may_pass=may_pass,
            unreachable=unreachable,
            **facts,
        )

    # --- responses -----------------------------------------------------------------------------

    def answered(self, line: _Line, instance: Instance, response: StoreResponse) -> Taken:
        """What the destination's response means for the instance; the line is free again."""
        self._give_back(line)
        self._answered = True
        status = response.status
        if response.comment:
            log.debug("%s answered %04XH: %s", self.name, status, peer_text(response.comment))
        outcome, text = s.store_outcome(status), f"The destination answered {s.describe_store(status)}."
        if outcome == "duplicate":  # what it has is this data set only where it has confirmed it to us
            known = self._holdings.took_before(instance)
            outcome, status = ("warning", s.SUCCESS) if known else ("refused", status)
            text += (
                "" if known else " Nothing of ours tells that it is this data set; trust_destination takes its word."
            )
        if outcome in ("busy", "refused"):
            reason = "destination_error" if outcome == "busy" else "destination_refused"
            return self._refusal(instance, s.store_status_for_source(status), reason, text)
        instance.forwarded_to, instance.forward_status, instance.forward_error = self.name, outcome, None
        if outcome == "warning":
            instance.forward_error = text
        self._record(instance)
        return Taken(s.store_status_for_source(status), state="forwarded")

    def confirm(self, instance: Instance) -> None:
        """What is taken is kept already: the response is in hand."""
        with self._mutex:
            self._done.append(Confirmation(instance))

    def _record(self, instance: Instance) -> None:
        """Write down that the destination has it."""
        self._holdings.took(instance)
        try:
            ledger = self._ledger(instance.study)
            ledger.taken(instance)
            ledger.durable([instance.key], forwarded_to=self.name)
        except OSError as error:  # it is there all the same; only a later run would send it again
            log.warning("the ledger of forwards cannot be written: %s", error.strerror or error)

    def late(self, line: _Line, instance: Instance) -> ForwardLate:
        """Go on waiting for a response for which the source must not wait any more; the error that tells it so."""
        with self._mutex:
            self._late += 1
        clock.spawn(lambda: self._wait_late(line, instance), "dicom-get-late")
        return ForwardLate(
            f"{self.name} did not answer the C-STORE within {self.deadlines.sub_operation:g} s "
            "(deadlines.sub_operation).",
            hint="The association with the source was given up; if the node still confirms the instance, it counts.",
            node=self.name,
        )

    def _wait_late(self, line: _Line, instance: Instance) -> None:
        try:
            confirmation = self._late_confirmation(line, instance)
        except BaseException as error:
            line.association.abort()
            text = error.message if isinstance(error, DicomGetError) else f"unexpected {type(error).__name__}"
            confirmation = Confirmation(instance, text)
            if not isinstance(error, DicomGetError):
                log.exception("waiting for a late response failed")
        with self._changed:
            self._late -= 1
            self._under_way.discard(instance.sop)
            self._done.append(confirmation)
            self._changed.notify_all()

    def _late_confirmation(self, line: _Line, instance: Instance) -> Confirmation:
        seconds = self.deadlines.next_object
        limit = clock.monotonic() + seconds
        while not line.channel.wait_for_response(min(limit, clock.monotonic() + 0.2)):
            if self.cancel.reason is not None:
                raise Cancelled(f"Cancelled before {self.name} answered.")
            if clock.monotonic() >= limit:
                raise SinkError(f"{self.name} did not answer within another {seconds:g} s.")
        response = line.channel.response(clock.monotonic() + self.deadlines.idle, "idle")
        taken = self.answered(line, instance, response)
        instance.received_at = clock.now()
        instance.dimse_status = taken.status
        return Confirmation(instance, taken.error, taken.reason or "destination_error")

    @staticmethod
    def taken_late(instance: Instance) -> Taken:
        """The answer to an instance whose late response was a good one."""
        return Taken(instance.dimse_status or s.SUCCESS, state="forwarded")

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        """See :meth:`sinks.base.Sink.confirmations`: only late answers are waited for."""
        if not wait and not self._done:
            return []
        with self._changed:
            while wait and self._late:
                self._changed.wait(1.0)
            done, self._done = self._done, []
            return done

    def _release_idle(self) -> None:
        with self._mutex:
            lines, self._idle = self._idle, []
        for line in lines:
            if line.hung_up():
                line.association.abort()
            else:
                line.association.release()

    def end_study(self, study: str) -> None:
        """See :meth:`sinks.base.Sink.end_study`."""
        with self._changed:
            ledger = self._ledgers.pop(study, None) if not self._late else None
        if ledger is not None:
            failed = first_failure([ledger.sync, ledger.close])
            self._unclosed = self._unclosed or failed

    def close(self) -> None:
        """See :meth:`sinks.base.Sink.close`."""
        with self._changed:
            self._closed = True
            while self._late:
                self._changed.wait(1.0)
        self._release_idle()
        for study in list(self._ledgers):
            self.end_study(study)
        if self._unclosed is not None:
            raise _not_recorded(self._unclosed) from self._unclosed


def _not_recorded(error: OSError) -> SinkError:
    return SinkError(
        f"The ledger of forwards cannot be written: {error.strerror or error}.",
        hint="Give another manifest_root, or free space there.",
    )


class _ForwardWriter:
    """One instance on its way on."""

    __slots__ = ("_hash", "_instance", "_line", "_recorded", "_seen", "_sink", "_size")

    def __init__(self, sink: ForwardSink, line: _Line, instance: Instance, digest: Any, *, recorded: bool) -> None:
        self._sink, self._instance, self._recorded = sink, instance, recorded
        self._line: _Line | None = line
        self._hash = digest
        self._size = 0
        self._seen = clock.monotonic()
        """When the latest bytes of the source arrived."""

    def write(self, view: memoryview) -> None:
        """See :meth:`sinks.base.Writer.write`."""
        line = self._line
        assert line is not None
        self._seen = clock.monotonic()
        self._size += len(view)
        try:
            line.channel.write(view, self._seen + self._sink.deadlines.stall)
        except PeerError as error:
            raise self._lost(error) from error

    def take(self) -> Taken:
        """See :meth:`sinks.base.Writer.take`."""
        line, instance, sink = self._line, self._instance, self._sink
        assert line is not None
        instance.bytes = self._size
        instance.dataset_offset, instance.uri = 0, None
        instance.forwarded_to = sink.name
        limit = self._seen + sink.deadlines.sub_operation
        line.channel.end()
        if self._recorded:
            line.channel.digest_sent()
            refused = sink.check_may_go(instance, self._size, self._hash.digest())
            if refused is not None:
                self.abort()  # before its last fragment: the destination has no whole data set to replace its own by
                return refused
        early = line.association.wait_for_data(0.0)
        try:
            line.channel.finish(limit)
            line.channel.digest_sent()
            instance.sha256 = self._hash.digest() if self._hash is not None else None
            if not line.channel.wait_for_response(limit):
                self._line = None
                raise sink.late(line, instance)
            response = line.channel.response(limit)
            if early and s.store_outcome(response.status) in ("ok", "warning"):
                raise PeerProtocolError(
                    f"{sink.name} confirmed instance {instance.sop} before it had the whole data set.",
                    hint="What it confirms may be lost: tell its admin, or forward to the node behind it.",
                    node=sink.name,
                )
        except PeerError as error:
            raise self._lost(error) from error
        self._line = None
        try:
            taken = sink.answered(line, instance, response)
        finally:
            sink.give_up(instance)
        if taken.reason is None:
            sink.confirm(instance)
        return taken

    def _lost(self, error: PeerError) -> ForwardLost:
        self.abort()
        return self._sink.lost(error)

    def abort(self) -> None:
        """See :meth:`sinks.base.Writer.abort`: half an instance must not be taken for a whole one."""
        line, self._line = self._line, None
        if line is not None:
            line.association.abort()
            self._sink.give_up(self._instance)


_OTHER_CONTENT: Final = Taken(
    s.DUPLICATE_OTHER_CONTENT,
    "different_content",
    "A different data set was already forwarded under this UID; it was kept.",
)


def _elsewhere(where: str) -> Taken:
    return Taken(
        s.DUPLICATE_OTHER_CONTENT,
        "different_content",
        f"An instance with this SOP Instance UID was already forwarded in {where}; a node holds one of a UID.",
    )


class _Comparing:
    """An instance whose UID was forwarded before: the first stays, and this one counts if it is the same."""

    __slots__ = ("_first", "_hash", "_instance", "_sink", "_size")

    def __init__(self, sink: ForwardSink, instance: Instance, first: Sent) -> None:
        self._sink, self._instance, self._first = sink, instance, first
        self._hash: Any = hashlib.sha256()
        self._size = 0

    def write(self, view: memoryview) -> None:
        """See :meth:`sinks.base.Writer.write`."""
        self._size += len(view)
        self._hash.update(view)

    def take(self) -> Taken:
        """See :meth:`sinks.base.Writer.take`."""
        instance, first = self._instance, self._first
        if instance.study != first.study:
            return _elsewhere(f"study {first.study}")
        if instance.series != first.series:
            return _elsewhere(f"series {first.series}")
        if not is_same(first, self._size, self._hash.digest()):
            return _OTHER_CONTENT
        instance.bytes = self._size
        instance.sha256, instance.dataset_offset, instance.uri = first.sha256, 0, None
        instance.forwarded_to, instance.forward_status, instance.forward_error = self._sink.name, "ok", None
        self._sink.confirm(instance)
        return Taken(s.SUCCESS, state="forwarded")

    def abort(self) -> None:
        """See :meth:`sinks.base.Writer.abort`."""
