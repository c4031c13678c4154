"""Get a set of instances over one or several associations: requests, reconnects, bisection.

Every pass has one set of presentation contexts and a queue of requests, largest first, shared by its
associations until all is done.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.engine.receiver import Receiver
from airflow_dicom_get.engine.watch import watched
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
    peer_text,
)
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.get import PATIENT_ROOT_GET, STUDY_ROOT_GET, GetOutcome, c_get
from airflow_dicom_get.records import Instance

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study import StudyRun

log = logging.getLogger(__name__)

MAX_LIST = 500
"""UIDs in one C-GET: one bad UID costs the whole list on some sources."""
_LEAST_PIECE = 8
"""Instances below which a list is not divided among associations: each request costs a round trip."""
_UIDS = frozenset({h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})
_LAST_CUTS = 2
_MOST_SINGLED_OUT = 20
_WHOLE = frozenset({s.SUCCESS, s.SUB_OPERATIONS_WARNING, 0xA702})
"""Final statuses after which the source has tried all that was asked for."""


@dataclass(slots=True)
class Request:
    """One C-GET: a level, the series it concerns, and the instances that should come of it.

    Without targets (no list was to be had) the request is done when the source says so.
    """

    level: str
    series: str | None
    targets: list[Instance] = field(default_factory=list)
    cuts: int = 0
    """How often the association was lost over it without any of it arriving."""

    def keys(self, run: StudyRun) -> dict[int, str | bytes | list[str]]:
        """The level and its unique keys, never an empty one, nothing else (PS3.4 C.4.3.1.3)."""
        keys: dict[int, str | bytes | list[str]] = {
            i.QUERY_RETRIEVE_LEVEL: self.level,
            h.STUDY_INSTANCE_UID: run.scope.study,
        }
        if run.query_model == "PatientRoot" and run.scope.patient_id:
            keys[i.PATIENT_ID] = run.scope.patient_id
            if not run.scope.patient_id.isascii():
                keys[h.SPECIFIC_CHARACTER_SET] = run.scope.character_set
        if self.level != "STUDY":
            assert self.series is not None
            keys[h.SERIES_INSTANCE_UID] = self.series
        if self.level == "IMAGE":
            keys[h.SOP_INSTANCE_UID] = [target.sop for target in self.targets]
        return keys


def lists_of(targets: Sequence[Instance], size: int = MAX_LIST) -> list[Request]:
    """IMAGE requests for these instances, by series, at most ``size`` UIDs each."""
    by_series: dict[str, list[Instance]] = {}
    for target in targets:
        by_series.setdefault(target.series, []).append(target)
    return [
        Request("IMAGE", series, part[start : start + size])
        for series, part in by_series.items()
        for start in range(0, len(part), size)
    ]


def _pieces(request: Request) -> int:
    """How many workers a request may keep busy."""
    return -(-len(request.targets) // _LEAST_PIECE) if request.level == "IMAGE" else 1


def _why_given_up(error: DicomGetError) -> str:
    if error.at_fault == "destination":
        return "destination_error"
    return "deadline" if isinstance(error, DeadlineExceeded) else "association_lost"


class Pass:
    """One pass over some requests with one set of contexts."""

    def __init__(self, run: StudyRun, proposals: Sequence[Proposal], requests: Sequence[Request]) -> None:
        self._run = run
        self._model = PATIENT_ROOT_GET if run.query_model == "PatientRoot" else STUDY_ROOT_GET
        self._proposals = [Proposal(self._model, IMPLICIT_LE), *proposals]
        self._classes = tuple(dict.fromkeys(p.abstract_syntax for p in proposals))
        self._queue = deque(sorted(requests, key=lambda r: -len(r.targets)))
        self._mutex = threading.Lock()
        self._error: DicomGetError | None = None
        self._active = 0
        self._workers = 1
        self._singled_out = 0
        """How often an instance was set apart or given up because associations died of it."""
        self.outcomes: list[GetOutcome] = []

    def execute(self, associations: int) -> None:
        """Work the queue off.

        Raises
        ------
        DicomGetError
            The first error that ended the pass; what arrived before is kept.
        """
        workers = self._workers = min(associations, sum(map(_pieces, self._queue)))
        threads = [
            threading.Thread(target=self._work, name=f"dicom-get-{number}", daemon=True) for number in range(1, workers)
        ]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    # --- one worker --------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        run = self._run
        while self._queue and self._error is None:
            before = self._moves()
            try:
                run.hold_limits()
                run.source.check_stopped()
                self._serve()
                return
            except DicomGetError as error:
                cause = self._judged(error)
                failures = 1 if self._moves() > before else failures + 1
                over = isinstance(cause, Cancelled) or cause.facts.get("phase") == "operation"
                if over or not cause.transient or failures > run.retries:
                    self._fail(cause)
                    return
                if self._full(cause) and self._others():
                    log.info("%s allows fewer associations; going on with those that are open", run.source.node)
                    return
                run.remark(cause)
                if not (isinstance(cause, ForwardLate) and failures == 1):  # it has answered by now
                    run.source.back_off(failures, cause)
            except BaseException as error:
                self._fail(DicomGetError(f"Unexpected {type(error).__name__}: {peer_text(error, 200)}"))
                raise

    def _moves(self) -> int:
        """Grows with whatever brings the pass nearer to its end; a source that kills everything does so in vain."""
        return self._run.progress + min(self._singled_out, _MOST_SINGLED_OUT)

    def _fail(self, error: DicomGetError) -> None:
        with self._mutex:
            if self._error is None:
                self._error = error

    def _judged(self, error: DicomGetError) -> DicomGetError:
        """A hang-up on a request means 'not authorised' only from a source that has never sent anything."""
        if isinstance(error, NotAuthorised) and self._run.progress:
            return AssociationAborted(error.message, node=str(self._run.source.node))
        return error

    @staticmethod
    def _full(error: DicomGetError) -> bool:
        return isinstance(error, AssociationRejected | ForwardLost) and error.facts.get("source") == 3

    def _others(self) -> bool:
        with self._mutex:
            return self._active > 0

    def _serve(self) -> None:
        """One association: requests until the queue is empty."""
        run = self._run
        with run.source.association(self._proposals, self._classes) as association:
            run.peer.learn(association.accepted, self._proposals)
            if self._model not in {p.abstract_syntax for p in association.accepted.contexts.values()}:
                raise GetNotOffered(
                    f"{association.node} does not offer C-GET ({run.query_model}).",
                    hint="Ask the PACS admin to enable C-GET, or try the other query model.",
                    node=str(association.node),
                )
            refused = association.accepted.refused_roles
            if refused and refused >= {p.abstract_syntax for p in association.accepted.contexts.values()} - {
                self._model
            }:
                log.warning("%s refused us the SCP role for every storage class; it may send nothing", association.node)
            receiver = Receiver(run, run.source.opened)
            with self._mutex:
                self._active += 1
            try:
                while (request := self._next()) is not None:
                    before = run.progress
                    try:
                        with watched(association, receiver):
                            self._one(association, receiver, request)
                    except DicomGetError as error:
                        if isinstance(error, ForwardLate):
                            run.settle()
                        self._put_back(request, error, moved=run.progress > before)
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
        run = self._run
        left = [target for target in request.targets if not run.is_done(target) and not run.refused_here(target)]
        # A destination that cannot even be reached says nothing about the instance that was to go there.
        cuts = 0 if moved else request.cuts + (not error.facts.get("unreachable"))
        front: list[Request] = []
        if not request.targets:
            front = [request]
        elif cuts >= _LAST_CUTS and len(left) == 1 and request.level == "IMAGE":
            self._singled_out += 1
            run.failed(left[0], _why_given_up(error), error.message)
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

    # --- one request -------------------------------------------------------------------------

    def _one(self, association: Association, receiver: Receiver, request: Request) -> None:
        run = self._run
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
        outcome = c_get(
            association,
            self._model,
            i.encode_identifier(request.keys(run), _UIDS),
            receiver,
            next_object=run.source.deadlines.next_object,
            max_objects=run.max_objects(),
        )
        with self._mutex:
            self.outcomes.append(outcome)
        log.debug("%s: %s, %d objects", association.node, s.describe(outcome.status), outcome.objects)
        run.source.check_stopped()
        if request.targets:
            self._follow_up(request, outcome)
        if request.level == "SERIES" and outcome.status in _WHOLE:
            run.whole_series.add(str(request.series))

    def _servable(self, association: Association, targets: Sequence[Instance]) -> tuple[list[Instance], bool]:
        """Those still to fetch whose class has an accepted context, and whether others had none."""
        classes = {p.abstract_syntax for p in association.accepted.contexts.values()}
        left: list[Instance] = []
        refused = False
        for target in targets:
            if self._run.is_done(target):
                continue
            if target.sop_class is not None and target.sop_class not in classes:
                refused = True
                self._run.failed(target, "class_refused", "The source accepted no context for its SOP class.")
            else:
                left.append(target)
        return left, refused

    def _follow_up(self, request: Request, outcome: GetOutcome) -> None:
        """Ask anew, in smaller pieces, for what a failed request left untried; mark the rest."""
        run = self._run
        left = [t for t in request.targets if not run.is_done(t) and not run.refused_here(t)]
        if not left:
            return
        hinted = set(outcome.failed_uids)
        if outcome.status in _WHOLE:
            reported = bool(outcome.failed) or outcome.status != s.SUCCESS
            for target in left:
                if target.sop in hinted or (reported and not hinted):
                    run.failed(target, "sub_operation_failed", f"The source ended with {s.describe(outcome.status)}.")
                else:
                    run.failed(
                        target, "not_sent", f"The source ended with {s.describe(outcome.status)} and did not send it."
                    )
            return
        if len(request.targets) == 1 and request.level == "IMAGE":
            run.failed(left[0], "refused_by_source", f"The source answered {s.describe(outcome.status)}.")
            return
        nothing = len(left) == len(request.targets)
        if request.level == "IMAGE":
            if nothing and outcome.status in (0xC413, 0xC320):  # the codes of one that takes no lists at all
                run.peer.takes_lists = False
            size = 1 if not run.peer.takes_lists else max(len(left) // 2, 1)
        else:
            size = MAX_LIST
        log.info(
            "%s answered %s; asking again for %d instances in lists of at most %d",
            run.source.node,
            s.describe(outcome.status),
            len(left),
            size,
        )
        with self._mutex:
            self._queue.extendleft(reversed(lists_of(left, size)))
