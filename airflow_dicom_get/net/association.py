"""An association over a transport, with a deadline on every wait.

One thread uses an association; any thread may set its :class:`CancelToken`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from airflow_dicom_get import clock
from airflow_dicom_get.dicom.command import Commands
from airflow_dicom_get.dicom.pdata import (
    A_ABORT,
    A_ASSOCIATE_AC,
    A_ASSOCIATE_RJ,
    A_RELEASE_RP,
    A_RELEASE_RQ,
    RELEASE_RP,
    RELEASE_RQ,
    Deframer,
    Fragment,
    Pdu,
    abort_pdu,
    frame_message,
)
from airflow_dicom_get.errors import (
    AssociationAborted,
    AssociationRejected,
    Cancelled,
    DeadlineExceeded,
    PeerProtocolError,
    peer_text,
)
from airflow_dicom_get.net.acse import MAX_CONTEXTS, Accepted, Proposal, decode_accept
from airflow_dicom_get.net.transcript import PEER, US
from airflow_dicom_get.vocabulary import STOPS

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import Deadlines
    from airflow_dicom_get.config.node import Node
    from airflow_dicom_get.net.transcript import Conversation
    from airflow_dicom_get.net.transport import Transport

log = logging.getLogger(__name__)
waits = logging.getLogger("airflow_dicom_get.waits")
"""Says what is waited for: a name of its own, since the shell shows this where it shows nothing else below WARNING."""

_SILENCE = 5.0
"""Seconds without an answer after which it is said what is waited for."""
_WAITED_FOR = {
    "acse": "to answer the association request",
    "find_response": "to answer the C-FIND",
    "next_object": "to send the next instance",
}
_TOO_LATE = {
    "acse": "did not answer",
    "find_response": "did not answer",
    "next_object": "sent no instance",
    "idle": "sent nothing in the middle of a message",
    "min_rate": "sent less than deadlines.min_rate asks for",
    "stall": "took no data",
    "sub_operation": "did not answer the C-STORE",
    "release": "did not answer the release",
}
_BUFFER = 1 << 18

_REJECTED = {
    (1, 1): "no reason given",
    (1, 2): "application context not supported",
    (1, 3): "calling AE title not recognised",
    (1, 7): "called AE title not recognised",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "local limit exceeded",
}
_REJECT_HINT = {
    (1, 3): "Ask the PACS admin to register our calling AE title.",
    (1, 7): "Check the called AE title of the node.",
    (3, 1): "Try again later.",
    (3, 2): "Use fewer associations, or try again later.",
}

_LOOK = 0.05
"""Seconds between two looks at whether to go on."""
_CANCEL_GRACE = 1.0
"""Seconds that a peer has after a cancel to take a message of ours; of a data set, all that is sent then."""
_ABORTED = 0.15
"""Seconds that a peer has to hang up after our A-ABORT."""


class Throttle(Protocol):
    """Holds a rate over several associations."""

    most: int
    """Bytes to take in one read."""

    def __call__(self, size: int) -> None:
        """So many bytes were read; may sleep."""


OVER = "deadline"
"""The reason of a cancel where the call's own time is over."""
STUCK = "stuck"
"""The reason of one where the destination does not return, though nobody asked for an end."""


class CancelToken:
    """Whether a call is to end. Set from any thread or a signal handler, seen by whoever works for it when he waits.

    Attributes
    ----------
    reason : str or None
        Why it is to end, in order.
    hard : bool
        At once, without waiting for anybody.
    left : bool
        The caller has gone, as one does whose call is over, and where something did not return: whoever returns to
        this changes nothing any more.
    over_at : float
        ``clock.monotonic()`` value at which its own time, ``deadlines.operation``, is over.
    """

    __slots__ = ("_attending", "hard", "left", "over_at", "reason")

    def __init__(self, operation: float | None = None) -> None:
        self.reason: str | None = None
        self.hard = self.left = False
        self.over_at = float("inf") if operation is None else clock.monotonic() + operation
        self._attending: list[Callable[[], object]] = []

    def cancel(self, reason: str) -> None:
        """Ask for an orderly end; a second call asks for an abort."""
        if self.reason is not None:
            self.hard = True
        else:
            self.reason = reason

    def abort(self, reason: str) -> None:
        """Ask for an end at once."""
        self.cancel(reason)
        self.hard = True

    def ending(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.reason is not None or clock.monotonic() >= self.over_at

    def over(self) -> bool:
        """Whether it is its own time that ends it."""
        return self.reason in (None, OVER) and self.ending()

    @property
    def word(self) -> str:
        """The reason of an instance that was received, and that the end has left unconfirmed."""
        if self.over():
            return OVER
        if self.reason == STUCK:
            return "destination_error"
        return self.reason if self.reason in STOPS else "cancelled"

    def attend(self, hasten: Callable[[], object]) -> None:
        """Have something called again and again by who waits for the call, once it is to end."""
        self._attending.append(hasten)

    def hasten(self) -> None:
        """Call these."""
        for hasten in self._attending:
            hasten()

    def pause(self, seconds: float) -> None:
        """Wait so many seconds, or until it is to end."""
        limit = clock.monotonic() + seconds
        while not self.ending() and (left := limit - clock.monotonic()) > 0:
            clock.sleep(min(left, _LOOK))


class Cancels:
    """The cancels of a client: each ends the calls that run, or the next one at its start, and no other after it.

    Without locks, since one may come in a signal handler, at any moment of the thread that begins or ends a call.
    """

    def __init__(self) -> None:
        self._asked: deque[str] = deque()
        self._running: list[CancelToken] = []

    def cancel(self, reason: str) -> None:
        """See :meth:`CancelToken.cancel`. Those that wait for a call are all spent by the next one."""
        self._asked.append(reason)
        self._hand_on()

    @contextmanager
    def call(self, operation: float | None = None) -> Iterator[CancelToken]:
        """While a call runs: what ends it, its own time (``deadlines.operation``) too."""
        token = CancelToken(operation)
        self._running.append(token)
        try:
            self._hand_on()  # after it is known: so whoever asks at this moment is heard here, or hands it on himself
            yield token
        finally:
            self._running.remove(token)
            token.left = True

    def _hand_on(self) -> None:
        while running := list(self._running):
            try:
                reason = self._asked.popleft()
            except IndexError:
                return
            for token in running:
                token.cancel(reason)


class Remarks:
    """What was said of a node in one run: once, over however many associations and answers it shows.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._said: dict[str, set[str]] = {}
        self._mutex = threading.Lock()

    def is_new(self, kind: str, text: str = "") -> bool:
        """Whether it is to be said: not for the second time, nor beyond 128 texts of a kind."""
        with self._mutex:
            said = self._said.setdefault(kind, set())
            if text in said or len(said) >= MAX_CONTEXTS:
                return False
            said.add(text)
            return True


class Association:
    """An established association. Made by :meth:`net.peer.Peer.open`.

    Attributes
    ----------
    accepted : Accepted
        The contexts and the roles that the peer granted.
    """

    def __init__(
        self, line: Transport, node: Node, max_pdu_length: int, deadlines: Deadlines, cancel: CancelToken
    ) -> None:
        self.node = node
        self.deadlines = deadlines
        self.cancel = cancel
        self.accepted = Accepted()
        self.throttle: Throttle | None = None
        """Called with the size of each read; may sleep to hold a rate."""
        self.in_message = False
        """Whether a message is half read: then ``idle`` and ``min_rate`` hold, whatever the PDUs are."""
        self._line = line
        self._deframer = Deframer(max_pdu_length)
        self._view = memoryview(bytearray(_BUFFER))
        self._items: deque[Fragment | Pdu] = deque()
        self.read_at = 0.0
        """When something was read for the last time."""
        self._waited = 0.0
        self._waited_bytes = 0
        self._message_id = 0
        self._open = True
        self._established = False
        self.commands = Commands()
        self.told: Conversation | None = None
        """Is told of all messages, and how it ends."""
        self.remarks = Remarks()
        """What was said of the node, over other associations of the run too."""
        self.answered = False
        """Whether the peer has sent anything since it accepted the association."""
        self._said: set[str] = set()
        self._cut_at = float("inf")
        """When a data set that is being sent is given up, since a cancel was seen."""
        self._unread_at = float("inf")
        """When a late response is given up, since a cancel was seen."""

    # --- opening -----------------------------------------------------------------------------

    def negotiate(self, request: bytes, proposals: Sequence[Proposal], titles: str) -> None:
        """Send the A-ASSOCIATE-RQ of these proposals, and take what the peer accepts.

        Raises
        ------
        AssociationRejected, AssociationAborted, DeadlineExceeded, PeerProtocolError
        """
        self._send(request, "acse", self.deadlines.acse)
        self.accepted = self._await_accept(proposals, titles)
        self._established = True
        if self.told is not None:
            self.told.accepted(self.accepted)
        for remark in self.accepted.remarks:
            if self.remarks.is_new("context", remark):
                log.warning("%s: %s; ignored", self.node, remark)

    def _await_accept(self, proposals: Sequence[Proposal], titles: str) -> Accepted:
        item = self.next_item(clock.monotonic() + self.deadlines.acse, "acse")
        if isinstance(item, Pdu):
            if item.pdu_type == A_ASSOCIATE_AC:
                header = bytes((A_ASSOCIATE_AC, 0)) + len(item.data).to_bytes(4, "big")
                return decode_accept(header + item.data, proposals)
            if item.pdu_type == A_ASSOCIATE_RJ and len(item.data) == 4:
                result, source, reason = item.data[1], item.data[2], item.data[3]
                self._tell_end(PEER, "rejected", {"result": result, "source": source, "reason": reason})
                self.close()
                raise AssociationRejected(
                    f"{self.node} rejected the association {'for now' if result == 2 else 'permanently'}: "
                    f"{_REJECTED.get((source, reason), 'unknown reason')} ({titles}).",
                    hint=_REJECT_HINT.get((source, reason), "Ask the PACS admin what the log of the PACS says."),
                    node=str(self.node),
                    result=result,
                    source=source,
                    reason=reason,
                )
            self._unexpected(item)
        raise PeerProtocolError(f"{self.node} sent data before it accepted the association.", node=str(self.node))

    # --- receiving ---------------------------------------------------------------------------

    def next_item(self, limit: float, phase: str) -> Fragment | Pdu:
        """The next fragment or PDU; views in fragments last until the next call that has to read.

        Parameters
        ----------
        limit : float
            ``clock.monotonic()`` value at which :class:`DeadlineExceeded` is raised with ``phase``.
        """
        items = self._items
        while not items:
            self._read(limit, phase)
        return items.popleft()

    def _read(self, limit: float, phase: str) -> None:
        receive = self._line.receive
        view = self._view if self.throttle is None else self._view[: self.throttle.most]
        inside = self.in_message or self._deframer.mid_pdu
        began = clock.monotonic()
        if self.cancel.over_at < limit:
            limit, phase = self.cancel.over_at, "operation"
        idle_limit = began + self.deadlines.idle if inside else limit
        while True:
            if self.cancel.reason is not None and (
                self.cancel.hard or phase in ("acse", "find_response") or (phase == "idle" and self._is_left_unread())
            ):
                raise Cancelled(f"Cancelled: {self.cancel.reason}.", node=str(self.node))
            try:
                size = receive(view)
            except TimeoutError:
                now = clock.monotonic()
                if now >= limit:
                    raise self._late(phase) from None
                if now >= idle_limit:
                    raise self._late("idle") from None
                if self.cancel.reason is not None and phase == "next_object":
                    raise CancelSeenError from None
                if now - began >= _SILENCE and phase in _WAITED_FOR and not inside:
                    self._say_waiting(phase, limit - now)
                continue
            except OSError as error:
                raise self._lost(error) from error
            break
        if not size:
            raise self._lost(None)
        self.answered = self._established
        now = self.read_at = clock.monotonic()
        if now >= limit:
            raise self._late(phase)
        if inside:
            self._watch_rate(now - began, size)
        if self.throttle is not None:
            self.throttle(size)
        try:
            self._items.extend(self._deframer.feed(self._view[:size]))
        except PeerProtocolError as error:
            self.abort(2)
            raise PeerProtocolError(f"{self.node}: {error}", node=str(self.node)) from error

    def _is_left_unread(self) -> bool:
        """Whether a late response is given up after a cancel: what has come of it is read, and not for long."""
        now = clock.monotonic()
        self._unread_at = min(self._unread_at, now + _CANCEL_GRACE)
        return now >= self._unread_at or not self._line.wait(0)

    def _watch_rate(self, waited: float, size: int) -> None:
        """Hold a minimum rate, counted over the time that was spent waiting inside a message."""
        self._waited += waited
        self._waited_bytes += size
        if self._waited >= self.deadlines.min_rate_window:
            if self._waited_bytes < self.deadlines.min_rate * self._waited:
                raise self._late("min_rate")
            self._waited = 0.0
            self._waited_bytes = 0

    def _say_waiting(self, phase: str, left: float) -> None:
        """Say what is waited for and until when; once for each kind of wait."""
        if phase not in self._said:
            self._said.add(phase)
            until = datetime.fromtimestamp(clock.now() + left).astimezone().strftime("%H:%M:%S %Z")
            seconds = getattr(self.deadlines, phase)
            waits.info(
                "Waiting for %s %s, until %s at most (%g s, deadlines.%s).",
                self.node, _WAITED_FOR[phase], until, seconds, phase,
            )  # fmt: skip

    def _late(self, phase: str) -> DeadlineExceeded:
        self._tell_end(US, "aborted", {"source": 0, "reason": 0, "deadline": phase})
        self.abort()
        if phase == "operation":
            return time_is_over(self.node, self.deadlines)
        name = "min_rate_window" if phase == "min_rate" else phase
        seconds = float(getattr(self.deadlines, name))
        return DeadlineExceeded(
            f"{self.node} {_TOO_LATE[phase]} within {seconds:g} s (deadlines.{phase}); the association was aborted.",
            hint=f"If the node needs longer, {'lower' if phase == 'min_rate' else 'raise'} deadlines.{phase}.",
            node=str(self.node),
            phase=phase,
            seconds=seconds,
        )

    def _lost(self, error: OSError | None) -> AssociationAborted:
        self._tell_end(PEER, "closed" if error is None else "lost", {"error": error and error.strerror})
        self.close()
        what = "closed the connection" if error is None else f"lost the connection ({error.strerror or error})"
        return AssociationAborted(
            f"{self.node} {what}.", hint="Check the log of the PACS; running again may help.", node=str(self.node)
        )

    def _unexpected(self, item: Pdu) -> None:
        """Raise for a PDU that ends or breaks the association."""
        if item.pdu_type == A_ABORT and len(item.data) == 4:
            source, reason = item.data[2], item.data[3]
            self._tell_end(PEER, "aborted", {"source": source, "reason": reason})
            self.close()
            raise AssociationAborted(
                f"{self.node} aborted the association (source {source}, reason {reason}).",
                hint="Check the log of the PACS; running again may help.",
                node=str(self.node),
                source=source,
                reason=reason,
            )
        if item.pdu_type == A_RELEASE_RQ:
            self._tell_end(PEER, "released")
            try:
                self._send(RELEASE_RP, "release", self.deadlines.release)
            finally:
                self.close()
            raise AssociationAborted(
                f"{self.node} released the association before the operation ended.",
                node=str(self.node),
                hint="Check the log of the PACS; running again may help.",
            )
        self.abort(2)
        raise PeerProtocolError(
            f"{self.node} sent a PDU of type {item.pdu_type:02X}H where it is not allowed.", node=str(self.node)
        )

    def wait_for_data(self, limit: float) -> bool:
        """Whether the peer has sent something that is not read yet, or does so before ``limit``. Reads nothing.

        Raises
        ------
        Cancelled
            By a second, hard cancel.
        """
        if self._items:
            return True
        while True:
            left = limit - clock.monotonic()
            if self._line.wait(left):
                return True
            if left <= 0:
                return False
            if self.cancel.hard:
                raise Cancelled(f"Cancelled: {self.cancel.reason}.", node=str(self.node))

    def fragment(self, limit: float, phase: str) -> Fragment:
        """The next P-DATA fragment; anything else raises."""
        item = self._items.popleft() if self._items else self.next_item(limit, phase)
        if isinstance(item, Fragment):
            return item
        self._unexpected(item)
        raise AssertionError  # pragma: no cover - _unexpected always raises

    # --- sending -----------------------------------------------------------------------------

    def next_message_id(self) -> int:
        """A fresh message id, 1 to 65535."""
        self._message_id = self._message_id % 65535 + 1
        return self._message_id

    def send_message(self, context_id: int, command: bytes, dataset: bytes | None = None) -> None:
        """Send one DIMSE message in one write."""
        if self.told is not None:
            self.told.sent(context_id, command, dataset)
        self._send(
            frame_message(context_id, command, dataset, self.accepted.max_pdu_length), "idle", self.deadlines.idle
        )

    def _send(self, data: bytes, phase: str, seconds: float) -> None:
        self.send(memoryview(data), clock.monotonic() + seconds, phase)

    def send(self, view: memoryview, limit: float, phase: str) -> None:
        """Send bytes as they are.

        Parameters
        ----------
        limit : float
            ``clock.monotonic()`` value at which :class:`DeadlineExceeded` is raised with ``phase``, or with
            ``operation`` where the call's own time is over before.
        """
        ending, whole, dataset = False, phase != "stall", phase in ("stall", "sub_operation")
        hears_cancel = dataset or phase == "idle"
        if self.cancel.over_at < limit:
            limit, phase = self.cancel.over_at, "operation"
        try:
            while view:
                try:
                    view = view[self._line.send(view) :]
                except TimeoutError:
                    pass
                if not view and whole:
                    return
                # A peer that takes a little at a time is waited for no longer than one that takes nothing.
                if hears_cancel and self.cancel.reason is not None and not ending:
                    until = clock.monotonic() + _CANCEL_GRACE
                    if dataset:
                        until = self._cut_at = min(self._cut_at, until)
                    ending, limit = True, min(limit, until)
                over = clock.monotonic() >= limit
                if (over and ending) or self.cancel.hard:
                    raise Cancelled(f"Cancelled: {self.cancel.reason}.", node=str(self.node))
                if over and view:
                    raise self._late(phase)
        except OSError as error:
            cause = self._line.said() or error
            raise self._lost(cause) from cause

    # --- ending ------------------------------------------------------------------------------

    def release(self) -> None:
        """Release in an orderly way; a peer that does not answer is closed on. Never raises for that."""
        if not self._open:
            return
        try:
            self._send(RELEASE_RQ, "release", self.deadlines.release)
            limit = clock.monotonic() + self.deadlines.release
            collided = False
            while True:
                item = self.next_item(limit, "release")
                if isinstance(item, Pdu):
                    if item.pdu_type == A_RELEASE_RQ and not collided:  # PS3.8 9.2: answer, and wait for ours
                        collided = True
                        self._send(RELEASE_RP, "release", self.deadlines.release)
                        continue
                    if item.pdu_type == A_RELEASE_RP:
                        self._tell_end(US, "released")
                    else:
                        log.info("%s answered the release request with a PDU of type %02XH", self.node, item.pdu_type)
                    break
        except (AssociationAborted, DeadlineExceeded, PeerProtocolError, Cancelled) as error:
            log.info("release: %s", peer_text(error, 200))
        finally:
            self.close()

    def abort(self, source: int = 0) -> None:
        """Send A-ABORT as far as the socket takes it, give the peer a moment to hang up (PS3.8 9.2, Sta13), and close.

        A peer that is closed on while it still sends may never read the A-ABORT, and would count
        the association as open when the next one asks for its place.
        """
        if not self._open:
            return
        self._tell_end(US, "aborted", {"source": source, "reason": 6 if source == 2 else 0})
        self._open = False
        self._line.hang_up(abort_pdu(source, 6 if source == 2 else 0), _ABORTED)

    def close(self) -> None:
        """Close the connection."""
        if self._open:
            self._tell_end(US, "closed")
            self._open = False
            self._line.close()

    def _tell_end(self, by: str, how: str, facts: Mapping[str, Any] | None = None) -> None:
        if self.told is not None:
            self.told.ended(by, how, {**(facts or {}), "cancelled": self.cancel.reason is not None or None})


def time_is_over(node: Node, deadlines: Deadlines) -> DeadlineExceeded:
    """The error of an operation whose own time, ``deadlines.operation``, has run out."""
    return DeadlineExceeded(
        f"The time allowed for the whole transfer with {node} ({deadlines.operation:g} s) ran out.",
        hint="Run it again: it resumes, and transfers only what is missing.",
        node=str(node),
        phase="operation",
        seconds=deadlines.operation,
    )


class CancelSeenError(Exception):
    """A cancel was seen while waiting between messages. Internal to ``net``."""
