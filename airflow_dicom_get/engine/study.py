"""The loop of one study: list, get what is missing, list again, until nothing changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count

from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import all_storage_classes
from airflow_dicom_get.engine.below import count_below
from airflow_dicom_get.engine.contexts import pack, with_other_classes
from airflow_dicom_get.engine.listing import Listing, list_study, unasked
from airflow_dicom_get.engine.requests import Request, lists_of
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.retrieval import Intake, Retrieval
from airflow_dicom_get.engine.spread import Spread
from airflow_dicom_get.engine.state import StudyState
from airflow_dicom_get.engine.strategies import STRATEGIES, Situation, contexts_for
from airflow_dicom_get.engine.tags import tags_of
from airflow_dicom_get.engine.worker import Pass
from airflow_dicom_get.errors import (
    Cancelled,
    DicomGetError,
    InvalidQuery,
    ListTooLong,
    NotNegotiated,
    OperationFailed,
    SinkError,
    unexpected,
)
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.lists.whole import COUNTER, Doubts
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.find import FIND_PROPOSALS
from airflow_dicom_get.records import Instance, Key
from airflow_dicom_get.vocabulary import DONE, FATAL_REASONS, HELD, LOCAL_REASONS

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Lists, and rounds of get, after which a study whose list still changes counts as still growing."""


def run_studies(
    retrieval: Retrieval, scopes: Sequence[Scope], states: list[StudyState], first_list: Listing | None = None
) -> None:
    """Retrieve studies one after the other; the state of each is added to ``states`` when it is begun.

    Where the run is stopped or cancelled, the studies that were not begun are among them, with the reason.
    ``first_list`` is that of a single study that was listed when it was resolved.
    """
    options = retrieval.options
    for number, scope in enumerate(scopes):
        state = StudyState(scope, strict=options.strict_forward, sop_classes=options.sop_classes)
        states.append(state)
        if number and states[number - 1].stop_reason is not None:
            state.stop_reason = states[number - 1].stop_reason
        elif number and retrieval.source.cancel.reason is not None:
            state.errors.append(retrieval.source.why_ended())
        else:
            try:
                retrieval.check_room()
                StudyRun(retrieval, state, first_list).execute()
            except DicomGetError as error:
                state.errors.append(error)
            except Exception as error:
                log.exception("study %s ended unexpectedly", scope.study)
                state.errors.append(unexpected(error))
        state.cancelled_by = retrieval.source.cancel.reason
        state.conclude(retrieval.source.cancel.word)
        retrieval.sink.end_study(scope.study)


class StudyRun:
    """The steps of one study's retrieval; what comes of them is in its :class:`StudyState`."""

    def __init__(self, retrieval: Retrieval, state: StudyState, first_list: Listing | None = None) -> None:
        self._retrieval, self._state, self._first_list = retrieval, state, first_list
        self._intake = Intake(retrieval, state)
        self._options = retrieval.options
        self._situation = Situation(state, retrieval.peer, retrieval.options)
        self._inventory_taken = False

    def execute(self) -> None:
        """Run the study to its end. Errors of peer and destination end up in the state."""
        state, scope = self._state, self._state.scope
        if not scope.named_well:
            state.take_list(unasked(scope))
            return
        try:
            if scope.listed:
                first, self._first_list = self._first_list, None
                self._take_list(first if first is not None else self._list())
            self._take_inventory()
            self._check_patient()
            if state.listing is None:
                self._without_list()
            else:
                self._with_list()
        except Cancelled:
            if state.stop_reason is None:
                state.errors.append(self._retrieval.source.why_ended())
        except DicomGetError as error:
            state.errors.append(error)
        finally:
            try:
                self._intake.confirm(wait=True)
            except DicomGetError as error:
                state.errors.append(error)

    def _check_patient(self) -> None:
        """Refuse a study of which nothing may be asked for; where no series is listed, nothing is."""
        listing = self._state.listing
        if listing is None or listing.series:
            self._state.scope.keys_above(self._retrieval.query_model)

    # --- with a list ---------------------------------------------------------------------------

    def _with_list(self) -> None:
        state = self._state
        for turn in count(1):
            missing = state.missing()
            before = state.progress
            if missing:
                self._fetch(missing)
            else:
                state.rounds = max(state.rounds, 1)
            self._intake.confirm(wait=True)
            changed = self._list_again()
            if changed is None:
                return
            self._ask_for_gone()
            left = state.missing()
            if not changed and (not left or state.progress == before) and not self._confirm_lists():
                return
            if max(turn, state.rounds) >= MAX_ROUNDS:
                state.still_growing = changed
                return
            log.info(
                "instances missing: %d, after round %d%s",
                len(left),
                state.rounds,
                "; the list has changed" if changed else "",
            )

    def _list_again(self) -> bool | None:
        """List again; whether the list has changed, None where it cannot be had any more."""
        new = self._list()
        if new is None:
            return None
        changed = self._take_list(new)
        self._check_patient()
        return changed

    def _take_list(self, listing: Listing | None) -> bool:
        if listing is None:
            return False
        left = self._left_to_fetch()
        changed = self._state.take_list(listing)
        self._adopt_inventory()
        if self._inventory_taken:
            self._retrieval.events.planned(self._left_to_fetch() - left)
        return changed

    def _left_to_fetch(self) -> int:
        return len(self._state.missing()) if self._state.listing is not None else 0

    def _fetch(self, missing: Sequence[Instance]) -> None:
        """Ask for these by one strategy after the other, each only for what is then still missing."""
        state = self._state
        for number, (name, strategy) in enumerate(STRATEGIES):
            given_up = LOCAL_REASONS if number == 0 else LOCAL_REASONS | FATAL_REASONS
            left = [x for x in missing if x.state not in DONE and x.reason not in given_up]
            if number == 1 and any(x.reason == "not_sent" for x in left):
                # The source left them out and reported success: are they still there?
                self._intake.confirm(wait=True)
                if self._list_again() is None:
                    return
                assert state.listing is not None
                left = [x for x in left if x.key in state.listing.instances]
            if not left:
                return
            started = False
            for proposals, requests in strategy(self._situation, left):
                if not requests or not proposals:
                    continue
                if not started:
                    started = True
                    state.rounds += 1
                    log.info(
                        "round %d: instances to request: %d, of study %s, %s",
                        state.rounds,
                        len(left),
                        state.scope.study,
                        name,
                    )
                self._pass(proposals, requests)

    def _pass(self, proposals: Sequence[Proposal], requests: Sequence[Request]) -> Pass:
        work = Pass(self._intake, proposals, requests)
        work.execute(self._options.associations)
        return work

    def _confirm_lists(self) -> bool:
        """Where a list may be cut, ask at the level above how many there are, and then for all of it.

        Only once the list stays the same: a count is of its own moment, and confirms no list that came after it.
        Returns whether something came that is not listed, so that the list is asked for again.
        """
        before = len(self._state.unlisted)
        for series in self._to_be_confirmed():
            name = series or self._state.scope.study
            self._intake.hold_limits()
            log.info("the list of what is below %s may be cut; asking how many instances there are", name)
            total = self._count_below(series)
            self._intake.learn_count(series, total, None)
            if self._stands(series, total) or self._options.sop_classes is not None:
                continue
            log.info("nothing shows that the list of what is below %s is whole; requesting all of it", name)
            level = "STUDY" if series is None else "SERIES"
            for proposals, _ in contexts_for(self._situation, self._members(series)):
                self._pass(with_other_classes(proposals), [Request(level, series, confirms=True)])
        self._intake.confirm(wait=True)
        return len(self._state.unlisted) > before

    def _to_be_confirmed(self) -> list[str | None]:
        """Series whose list may be cut, or is too short for its count, where all of it is held; None is the study."""
        state = self._state
        listing = state.listing
        assert listing is not None
        if not state.scope.whole_series:
            return []
        lists, doubts = listing.lists(), listing.doubts(state.counted)
        short = lists.too_short()
        doubts = Doubts(doubts.of_study or short.of_study, doubts.of_series | short.of_series)
        unheld: set[str | None] = {x.series for x in state.missing()}
        if unheld:
            unheld.add(None)
        asked = doubts.to_ask(whole_study=state.scope.whole_study)
        return [one for one in asked if one not in state.counted and one not in unheld]

    def _members(self, series: str | None) -> list[Instance]:
        assert self._state.listing is not None
        return [x for x in self._state.listing.instances.values() if series in (None, x.series)]

    def _count_below(self, series: str | None) -> int | None:
        """What a C-GET counts that is cancelled after its first instance; None where it does not tell."""
        retrieval = self._retrieval
        proposals = next((proposals for proposals, _ in contexts_for(self._situation, self._members(series))), [])
        try:
            counted = count_below(
                retrieval.source,
                self._state.scope,
                series,
                retrieval.query_model,
                proposals,
                self._options.retries,
            )
        except Cancelled:
            raise
        except DicomGetError as error:
            self._intake.remark(error)
            return None
        retrieval.events.drained(counted.bytes)
        self._intake.note_unread(counted.uids)
        return counted.total

    def _stands(self, series: str | None, total: int | None) -> bool:
        """Whether there are no more than are listed, and than were sent without being listed and are kept."""
        state = self._state
        assert state.listing is not None
        below = state.listing.lists().series
        listed = sum(one.listed for uid, one in below.items() if series in (None, uid))
        kept = {*state.inventory, *(x.key for x in state.instances.values() if x.state in HELD)}
        beside = sum(series in (None, key[0]) for key in kept - state.listing.instances.keys())
        return total in (listed % COUNTER, (listed + beside) % COUNTER)

    def _ask_for_gone(self) -> None:
        """What left the list before it was held is asked for once by its UID: what comes denies the list."""
        gone = self._state.gone_unheld()
        for proposals, part in contexts_for(self._situation, gone):
            self._pass(proposals, lists_of([x for x in part if x.state not in DONE]))

    def _list(self) -> Listing | None:
        """List over an association of its own; None where the source offers no list."""
        self._intake.hold_limits()
        return self._retrieval.source.with_retries(self._options.retries, FIND_PROPOSALS, self._list_over)

    def _list_over(self, association: Association) -> Listing | None:
        source = self._retrieval.source
        spread = Spread(source, self._options.associations)
        try:
            return list_study(Finder(association, source.cuts), self._state.scope, self._state.instances, spread)
        except (NotNegotiated, OperationFailed, ListTooLong) as error:
            log.warning("study %s cannot be listed: %s", self._state.scope.study, error)
            self._intake.remark(error)
            return None

    # --- what is held --------------------------------------------------------------------------

    def _take_inventory(self) -> None:
        state = self._state
        if self._options.resume:
            try:
                state.inventory = self._retrieval.sink.inventory(state.scope.study, state.scope.patient_keys())
            except SinkError:
                self._retrieval.source.check_stopped()  # then that is why it failed
                raise
        self._inventory_taken = True
        if state.listing is not None:
            self._adopt_inventory()
            missing = state.missing()
            self._retrieval.events.planned(len(missing))
            self._retrieval.expect(dict.fromkeys(x.sop_class for x in missing if x.sop_class))

    def _adopt_inventory(self) -> None:
        tags = self._retrieval.tags
        for instance, held in self._state.adopt_inventory():
            if tags is not None:
                instance.tags = tags_of(held, self._retrieval.sink, tags)

    # --- without a list ------------------------------------------------------------------------

    def _without_list(self) -> None:
        """No list is to be had: ask for the scope as it was given, in the common classes first."""
        self._state.rounds = 1
        requests = self._unlisted_requests()
        if not requests:
            return
        peer = self._retrieval.peer
        classes = self._options.sop_classes or all_storage_classes()
        for proposals in pack({c: peer.syntaxes(c) for c in classes}):
            work = self._pass(proposals, [Request(r.level, r.series, list(r.targets)) for r in requests])
            if all(o.status == s.SUCCESS and not o.failed and not o.remaining for o in work.outcomes):
                return

    def _unlisted_requests(self) -> list[Request]:
        """What to ask for without a list: of what is named by its UIDs, what is not held."""
        scope = self._state.scope
        named: Sequence[Key] = sorted(scope.named)
        if scope.instances and scope.series and len(scope.series) == 1:
            (series,) = scope.series
            named = [(series, sop) for sop in sorted(scope.instances)]
        if named or scope.bad:
            wanted = [self._intake.add_unlisted(series, sop, None) for series, sop in named]
            self._adopt_inventory()
            return lists_of([x for x in wanted if x.state not in DONE])
        if scope.instances:
            raise InvalidQuery(
                f"Study {scope.study}: the PACS offers no list, so single instances need their series.",
                hint="Give the Series Instance UID with the SOP Instance UIDs, or request the series.",
                study=scope.study,
            )
        if scope.series:
            return [Request("SERIES", series) for series in sorted(scope.series)]
        return [Request("STUDY", None)]
