"""Get a set of instances over one or several associations: requests, reconnects, bisection.

Every pass has one set of presentation contexts and a queue of requests, largest first, shared by its
associations until all is done.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from functools import cache

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.engine.below import UIDS, retrieve_model
from airflow_dicom_get.engine.receiver import Receiver, attended
from airflow_dicom_get.engine.requests import MAX_LIST, Request, lists_of
from airflow_dicom_get.engine.retrieval import Intake
from airflow_dicom_get.errors import (
    AssociationAborted,
    AssociationRejected,
    Cancelled,
    DeadlineExceeded,
    DicomGetError,
    ForwardLate,
    ForwardLost,
    GetNotOffered,
    NotAuthorised,
    unexpected,
)
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.get import GetOutcome, Most, c_get
from airflow_dicom_get.net.retries import allowed
from airflow_dicom_get.records import Instance, Key
from airflow_dicom_get.vocabulary import DONE

log = logging.getLogger(__name__)

_LEAST_PIECE = 8
"""Instances below which a list is not divided among associations: each request costs a round trip."""
_LAST_CUTS = 2
_FROM_NEARLINE = 4
"""How many times longer the first object may take where it comes from a tape or another slow store."""
_MOST_SINGLED_OUT = 20
_WHOLE = frozenset({s.SUCCESS, s.SUB_OPERATIONS_WARNING, 0xA702})
"""Final statuses after which the source has tried all that was asked for."""


def _pieces(request: Request) -> int:
    """How many workers a request may keep busy."""
    return -(-len(request.targets) // _LEAST_PIECE) if request.level == "IMAGE" else 1


def _why_given_up(error: DicomGetError) -> str:
    if error.at_fault == "destination":
        return "destination_error"
    return "deadline" if isinstance(error, DeadlineExceeded) else "association_lost"


class Pass:
    """One pass over some requests with one set of contexts."""

    def __init__(self, intake: Intake, proposals: Sequence[Proposal], requests: Sequence[Request]) -> None:
        self._intake, self._state, self._retrieval = intake, intake.state, intake.retrieval
        self._source = intake.retrieval.source
        self._model = retrieve_model(intake.retrieval.query_model)
        self._proposals = [Proposal(self._model, IMPLICIT_LE), *proposals]
        self._classes = tuple(dict.fromkeys(p.abstract_syntax for p in proposals))
        self._queue = deque(sorted(requests, key=lambda r: -len(r.targets)))
        self._mutex = threading.Lock()
        self._error: DicomGetError | None = None
        self._active = 0
        self._workers = 1
        self._singled_out = 0
        """How often an instance was set apart or given up because associations died of it."""
        self._given_up: set[Key] = set()
        """What is settled of requests that were cut off since an instance was refused while it came."""
        self.outcomes: list[GetOutcome] = []

    def execute(self, associations: int) -> None:
        """Work the queue off.

        Raises
        ------
        DicomGetError
            The first error that ended the pass; what arrived before is kept.
        """
        workers = self._workers = min(associations, sum(map(_pieces, self._queue)))
        clock.together([self._work] * max(workers, 1), "dicom-get", self._source.end_at_once)
        if self._error is not None:
            raise self._error

    # --- one worker --------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        source = self._source
        while self._queue and self._error is None:
            before = self._moves()
            try:
                self._intake.hold_limits()
                source.check_stopped()
                self._serve()
                return
            except DicomGetError as error:
                cause = self._judged(error)
                moved = self._moves() > before
                given_up = moved and bool(cause.facts.get("given_up"))  # by us, and what it was for is settled
                failures = 0 if given_up else 1 if moved else failures + 1
                if isinstance(cause, Cancelled) or failures > allowed(cause, self._retrieval.options.retries):
                    self._fail(cause)
                    return
                if self._full(cause) and self._others():
                    log.info("%s allows fewer associations; continuing with those that are open", source.node)
                    return
                self._intake.remark(cause)
                if not given_up and not (isinstance(cause, ForwardLate) and failures == 1):  # it has answered by now
                    source.back_off(failures, cause, self._retrieval.options.retries)
            except Exception as error:
                log.exception("an association ended unexpectedly")
                self._fail(unexpected(error))
                return

    def _moves(self) -> int:
        """Grows with whatever brings the pass nearer to its end; a source that kills everything does so in vain."""
        return self._state.progress + len(self._given_up) + min(self._singled_out, _MOST_SINGLED_OUT)

    def _fail(self, error: DicomGetError) -> None:
        with self._mutex:
            if self._error is None:
                self._error = error

    def _judged(self, error: DicomGetError) -> DicomGetError:
        """A hang-up on a request means 'not authorised' only from a source that has never sent anything."""
        if isinstance(error, NotAuthorised) and self._state.progress:
            return AssociationAborted(error.message, node=str(self._source.node))
        return error

    @staticmethod
    def _full(error: DicomGetError) -> bool:
        return isinstance(error, AssociationRejected | ForwardLost) and error.facts.get("source") == 3

    def _others(self) -> bool:
        with self._mutex:
            return self._active > 0

    def _serve(self) -> None:
        """One association: requests until the queue is empty."""
        with self._source.association(self._proposals, self._classes) as association:
            self._retrieval.peer.learn(association.accepted, self._proposals)
            if self._model not in {p.abstract_syntax for p in association.accepted.contexts.values()}:
                raise GetNotOffered(
                    f"{association.node} does not offer C-GET ({self._retrieval.query_model}).",
                    hint="Ask the PACS admin to enable C-GET, or try the other query model.",
                    node=str(association.node),
                )
            refused = association.accepted.refused_roles
            if refused and refused >= {p.abstract_syntax for p in association.accepted.contexts.values()} - {
                self._model
            }:
                log.warning(
                    "%s did not grant us the SCP role for any storage class; it may send nothing", association.node
                )
            receiver = Receiver(self._intake, self._source.opened)
            with self._mutex:
                self._active += 1
            try:
                while (request := self._next()) is not None:
                    before = self._state.progress
                    try:
                        with attended(association, receiver):
                            self._one(association, receiver, request)
                    except DicomGetError as error:
                        if isinstance(error, ForwardLate):
                            self._intake.confirm(wait=True)
                        self._put_back(request, error, moved=self._state.progress > before)
                        if isinstance(error, ForwardLate):
                            self._source.check_stopped()  # then that is why it was not waited for any longer
                        raise
            finally:
                with self._mutex:
                    self._active -= 1

    def _next(self) -> Request | None:
        """The next request. Lists are handed out in pieces that grow smaller, so that all workers end together."""
        with self._mutex:
            if not self._queue or self._error is not None:
                return None
            request = self._queue.popleft()
            if self._workers > 1 and _pieces(request) > 1:
                left = len(request.targets) + sum(len(other.targets) for other in self._queue)
                size = max(2 * left // (3 * self._workers), _LEAST_PIECE)
                if len(request.targets) > size:
                    rest = Request("IMAGE", request.series, request.targets[size:], request.cuts)
                    self._queue.appendleft(rest)
                    request = Request("IMAGE", request.series, request.targets[:size], request.cuts)
            return request

    def _put_back(self, request: Request, error: DicomGetError, *, moved: bool) -> None:
        """What is left of a request that was cut off goes to the front, as a list.

        One instance may be what kills the association: after a cut without anything arriving the first
        of the list is asked for last and alone, and given up when that fails twice.
        """
        left = self._left(request)
        given_up = bool(error.facts.get("given_up"))
        if given_up:
            self._given_up |= {x.key for x in request.targets} - {x.key for x in left}
            self._singled_out += 1
        # A destination that cannot even be reached says nothing about the instance that was to go there.
        cuts = 0 if moved or given_up else request.cuts + (not error.facts.get("unreachable"))
        front: list[Request] = []
        if not request.targets:
            front = [request]
        elif cuts >= _LAST_CUTS and len(left) == 1 and request.level == "IMAGE":
            self._singled_out += 1
            self._state.not_received(left[0], _why_given_up(error), error.message)
        elif cuts and len(left) > 1 and request.level == "IMAGE":
            self._singled_out += 1
            front = lists_of(left[1:])
            with self._mutex:
                self._queue.append(Request("IMAGE", left[0].series, left[:1]))
        elif left:
            whole = request.level != "IMAGE" and len(left) == len(request.targets) and cuts < _LAST_CUTS
            front = [request] if whole else lists_of(left)
            front[0].cuts = cuts
        with self._mutex:
            self._queue.extendleft(reversed(front))

    def _left(self, request: Request) -> list[Instance]:
        """What a request has not brought, and what asking again may."""
        return [x for x in request.targets if x.state not in DONE and not self._state.refused_here(x)]

    # --- one request -------------------------------------------------------------------------

    def _one(self, association: Association, receiver: Receiver, request: Request) -> None:
        if request.targets:
            left, refused = self._servable(association, request.targets)
            if not left:
                return
            if len(left) < len(request.targets) and (refused or request.level == "IMAGE"):
                request = Request("IMAGE", left[0].series, left) if request.level != "STUDY" else request
                if len(left) > MAX_LIST:
                    with self._mutex:
                        self._queue.extendleft(reversed(lists_of(left)))
                    return
        next_object = self._source.deadlines.next_object
        listing = self._state.listing
        counts = request.level != "IMAGE" and listing is not None and listing.in_question(request.series)
        receiver.confirms, receiver.came = request.confirms, set() if counts else None
        outcome = c_get(
            association,
            self._model,
            i.encode_identifier(request.keys(self._state.scope, self._retrieval.query_model), UIDS),
            receiver,
            next_object=next_object,
            first_object=_FROM_NEARLINE * next_object if request.nearline() else None,
            most=Most(self._state.most_objects(), self._state.most_steps()),
        )
        with self._mutex:
            self.outcomes.append(outcome)
        log.debug("%s: %s, %d objects", association.node, s.describe(outcome.status), outcome.objects)
        self._source.check_stopped()
        hinted, outcome.failed_uids = frozenset(outcome.failed_uids), []  # of any number, and kept no longer
        if request.targets:
            self._follow_up(request, outcome, hinted)
        if counts:
            all_came = outcome.status == s.SUCCESS and not outcome.failed and self._state.sop_classes is None
            self._intake.learn_count(request.series, outcome.total, receiver.came if all_came else None)

    def _servable(self, association: Association, targets: Sequence[Instance]) -> tuple[list[Instance], bool]:
        """Those still to fetch whose class has an accepted context, and whether others had none."""
        classes = {p.abstract_syntax for p in association.accepted.contexts.values()}
        left: list[Instance] = []
        refused = False
        for target in targets:
            # One of its UID in another series may have come to a request for that: it was not asked for itself yet.
            given_up = self._state.refused_here(target) and target.reason != "uid_mismatch"
            if target.state in DONE or given_up:
                continue
            if target.sop_class is not None and target.sop_class not in classes:
                refused = True
                self._state.not_received(
                    target, "class_refused", "The source accepted no presentation context for its SOP class."
                )
            else:
                left.append(target)
        return left, refused

    def _follow_up(self, request: Request, outcome: GetOutcome, hinted: Collection[str]) -> None:
        """Request again, in smaller pieces, what a failed request left untried; mark the rest.

        ``hinted`` is what the source says has failed.
        """
        state, peer = self._state, self._retrieval.peer
        left = self._left(request)
        if not left:
            return
        if outcome.status in _WHOLE:
            ended = s.describe(outcome.status)
            reported = bool(outcome.failed) or outcome.status != s.SUCCESS
            on_compression = cache(peer.on_compression)
            for target in left:
                if target.sop in hinted or (reported and not hinted):
                    text = f"The source ended with {ended}. {on_compression(target.sop_class)}".rstrip()
                    state.not_received(target, "sub_operation_failed", text)
                else:
                    state.not_received(target, "not_sent", f"The source ended with {ended} and did not send it.")
            return
        if len(request.targets) == 1 and request.level == "IMAGE":
            state.not_received(left[0], "refused_by_source", f"The source answered {s.describe(outcome.status)}.")
            return
        nothing = len(left) == len(request.targets)
        if request.level == "IMAGE":
            if nothing and outcome.status in (0xC413, 0xC320):  # the codes of one that takes no lists at all
                peer.takes_lists = False
            size = 1 if not peer.takes_lists else max(len(left) // 2, 1)
        else:
            size = MAX_LIST
        log.info(
            "%s answered %s; instances to request again: %d, in lists of at most %d",
            self._source.node,
            s.describe(outcome.status),
            len(left),
            size,
        )
        with self._mutex:
            self._queue.extendleft(reversed(lists_of(left, size)))
