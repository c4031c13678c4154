"""The run of one study: list, get what is missing, list again, until nothing changes."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import all_storage_classes
from airflow_dicom_get.engine.contexts import PeerKnowledge, pack
from airflow_dicom_get.engine.events import Events
from airflow_dicom_get.engine.listing import Listing, list_study
from airflow_dicom_get.engine.resolve import FIND_PROPOSALS, Finder, Scope
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.engine.spread import Spread
from airflow_dicom_get.engine.strategies import WAYS, contexts_for
from airflow_dicom_get.engine.tags import tags_of
from airflow_dicom_get.engine.worker import Pass, Request, lists_of
from airflow_dicom_get.errors import Cancelled, DicomGetError, InvalidQuery, ListTooLong, NotNegotiated, OperationFailed
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.base import Held, Sink, Taken
from airflow_dicom_get.vocabulary import DONE, FATAL_REASONS, LOCAL_REASONS

log = logging.getLogger(__name__)

_UNPLANNED = 200_000
"""Objects that one C-GET may bring where there is no plan."""
MAX_ROUNDS = 8
"""Rounds of list and get before a study counts as still growing."""
_MOST_REFUSED = 10
"""Instances in a row that the destination may fail to take before the source is left alone."""


@dataclass(slots=True)
class Settings:
    """What a study's run needs to know of the options."""

    query_model: str = "StudyRoot"
    associations: int = 1
    retries: int = 5
    resume: bool = True
    require_exact: bool = False
    ack_durable: bool = False
    sop_classes: frozenset[str] | None = None
    strict_forward: bool = False
    tag_numbers: frozenset[int] = frozenset()
    decode_tags: Callable[[dict[int, bytes], str], tuple[str | None, ...]] | None = None
    before_object: Callable[[], str | None] = field(default=lambda: None)
    """Asked after each object and before each association; a text stops the run for that reason."""
    expect: Callable[[Iterable[str]], None] = field(default=lambda classes: None)
    """Told the SOP classes that are to come."""


class StudyRun:
    """State and steps of one study's retrieval. Its receivers may be several threads."""

    def __init__(
        self,
        scope: Scope,
        source: Source,
        sink: Sink,
        peer: PeerKnowledge,
        events: Events,
        settings: Settings,
        first_list: Listing | None = None,
    ) -> None:
        self.scope, self.source, self.sink, self.peer, self.events = scope, source, sink, peer, events
        self.settings = settings
        self.query_model, self.retries = settings.query_model, settings.retries
        self.require_exact, self.tag_numbers = settings.require_exact, settings.tag_numbers
        self._first_list = first_list
        self.instances: dict[str, Instance] = {}
        """Every instance of the study that was ever listed, held or sent, by SOP Instance UID."""
        self.listing: Listing | None = None
        self.lists_agree = False
        self.unlisted_uids: set[str] = set()
        self.rounds = 0
        self.errors: list[DicomGetError] = []
        self.strays: Counter[str] = Counter()
        """Objects that were refused and belong to no row, by reason."""
        self.remarks: Counter[str] = Counter()
        self.stop_reason: str | None = None
        self._mutex = threading.Lock()
        self.tried_classes: set[str] = set()
        """Classes that were proposed for instances whose class is not known."""
        self.whole_series: set[str] = set()
        """Series that were asked for at SERIES level to the end."""
        self.progress = 0
        """Listed instances that were taken, and others where there is no list: what reconnects are allowed for."""
        self._moving = False
        self._inventory: dict[str, Held] = {}
        self._refused_in_a_row = 0
        self._late: set[str] = set()

    # --- called by receivers and passes --------------------------------------------------------

    def instance(self, sop: str) -> Instance | None:
        """The record of an instance."""
        return self.instances.get(sop)

    def in_scope(self, series: str, sop: str) -> bool:
        """Whether an instance that no list names may still be meant by the query."""
        scope = self.scope
        if scope.instances is not None:
            return sop in scope.instances
        if scope.series is not None:
            return series in scope.series
        return not scope.filters or (self.listing is not None and series in self.listing.series)

    def unlisted(self, series: str, sop: str, sop_class: str) -> Instance:
        """A record for an instance that was sent and is not listed."""
        with self._mutex:
            self.unlisted_uids.add(sop)
            return self.instances.setdefault(sop, Instance(self.scope.study, series, sop, sop_class))

    def decode_tags(self, values: dict[int, bytes], syntax: str) -> tuple[str | None, ...]:
        """The values of the ``tags`` option as text."""
        assert self.settings.decode_tags is not None
        return self.settings.decode_tags(values, syntax)

    def is_done(self, instance: Instance) -> bool:
        """Whether nothing more is to be asked for this instance."""
        return instance.state in DONE

    def refused_here(self, instance: Instance) -> bool:
        """Whether we refused it in this round, for a reason that asking again does not mend."""
        return instance.attempt == self.rounds and instance.reason in LOCAL_REASONS

    def failed(self, instance: Instance, reason: str, error: str) -> None:
        """Mark an instance that did not come."""
        instance.state, instance.reason, instance.error = "missing", reason, error
        instance.attempt = self.rounds

    def max_objects(self) -> int:
        """Objects that one C-GET may bring: twice the plan and a hundred."""
        return 2 * len(self.listing.instances) + 100 if self.listing is not None else _UNPLANNED

    def taken(self, uid: str, instance: Instance | None, taken: Taken, size: int) -> None:
        """An object was answered."""
        record = self.instances.get(uid)
        if taken.reason is None:
            assert instance is not None
            assert record is not None
            new = instance is record
            self._refused_in_a_row = 0
            if new:
                record.state, record.reason, record.error = taken.state, None, None
                record.attempt = self.rounds
                with self._mutex:
                    self.progress += uid not in self.unlisted_uids or self.listing is None
            self.events.arrived(record, uid, None, size, new=new)
            return
        if record is None:
            self.strays[taken.reason or "refused"] += 1
            record = Instance(self.scope.study, "", uid)
        elif not self.is_done(record) or taken.reason == "different_content":
            record.state = "conflict" if taken.reason == "different_content" else "failed"
            record.reason, record.error, record.dimse_status = taken.reason, taken.error, taken.status
            record.attempt = self.rounds
        self.events.arrived(record, uid, taken.error or taken.reason, 0, new=False)
        if taken.reason == "destination_full":
            self.stop("destination_full")
        elif self.settings.strict_forward and record.forward_status == "error":
            self.stop("strict_forward")
        elif taken.reason == "destination_error" and record.forward_status is None:
            self._refused_in_a_row += 1
            if self._refused_in_a_row >= _MOST_REFUSED:
                self.stop("destination_error")

    def keep(self, instance: Instance) -> str | None:
        """Wait until a taken instance is confirmed (``ack="durable"``); why it is not, if so."""
        self._confirm(wait=True)
        return instance.error if instance.state == "failed" else None

    def answered(self) -> None:
        """After each answer: note confirmations, hold the limits."""
        self._confirm(wait=False)
        self.hold_limits()

    def hold_limits(self) -> None:
        """Stop the run where the source may not be used any more."""
        reason = self.settings.before_object()
        if reason is not None:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """End the run in an orderly way for a reason of its own."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self.source.cancel.cancel(reason)

    def remark(self, error: DicomGetError) -> None:
        """Keep an error that was got over."""
        self.remarks[type(error).__name__] += 1
        log.info("%s", error.message)

    def _confirm(self, wait: bool) -> None:
        for instance, error, reason in self.sink.confirmations(wait=wait):
            if error is None:
                self._kept(instance)
            else:
                conflict = reason == "different_content"
                instance.state = "conflict" if conflict else "failed"
                instance.reason, instance.attempt = reason, self.rounds
                told = conflict or instance.forward_status == "error"
                instance.error = error if told else f"Taken, then not kept: {error}"
                self._refused_in_a_row += not conflict and reason != "cancelled"
                if self._refused_in_a_row >= _MOST_REFUSED:
                    self.stop("destination_error")

    def settle(self) -> None:
        """Wait for the destination's late answers; what it has kept is not asked for again."""
        self._confirm(wait=True)

    def late(self, instance: Instance | None) -> None:
        """An instance was left to the destination: whether it is taken, a confirmation will say."""
        if instance is not None:
            self._late.add(instance.sop)

    def _kept(self, instance: Instance) -> None:
        """The destination has kept an instance; if it said so too late for the source, it is taken only now."""
        with self._mutex:
            if instance.sop not in self._late or self.instances.get(instance.sop) is not instance:
                return
            self._late.discard(instance.sop)
            instance.state, instance.reason, instance.error = "forwarded", None, None
            instance.attempt = self.rounds
            self.progress += instance.sop not in self.unlisted_uids or self.listing is None
        self.events.arrived(instance, instance.sop, None, instance.bytes or 0, new=True)

    # --- the rounds ----------------------------------------------------------------------------

    def execute(self) -> None:
        """Run the study to its end. Errors of peer and destination end up in :attr:`errors`."""
        try:
            if self.scope.listed:
                first, self._first_list = self._first_list, None
                self.listing = self._narrowed(first) if first is not None else self._list_anew()
            self._take_inventory()
            if self.query_model == "PatientRoot" and self.scope.patient_id is None:
                raise InvalidQuery(
                    f"Study {self.scope.study}: its Patient ID is not known, and PatientRoot needs it.",
                    hint="Give PatientID in the query, or use StudyRoot.",
                    study=self.scope.study,
                )
            if self.listing is None:
                self._without_list()
            else:
                self._with_list()
        except Cancelled as error:
            if self.stop_reason is None:
                self.errors.append(error)
        except DicomGetError as error:
            self.errors.append(error)
        finally:
            try:
                self._confirm(wait=True)
            except DicomGetError as error:
                self.errors.append(error)

    def _with_list(self) -> None:
        while True:
            missing = self.missing()
            before = self.progress
            if missing:
                self._fetch(missing)
            else:
                self.rounds = max(self.rounds, 1)
            self._probe()
            self._confirm(wait=True)
            changed = self._list_again()
            if changed is None:
                return
            left = self.missing()
            if not changed and (not left or self.progress == before):
                return
            if self.rounds >= MAX_ROUNDS:
                self._moving = changed
                return
            log.info(
                "%d instances are missing after round %d%s",
                len(left),
                self.rounds,
                "; the list has changed" if changed else "",
            )

    def _list_again(self) -> bool | None:
        """List again; whether the list has changed, None if it is not to be had any more."""
        new = self._list_anew()
        if new is None:
            return None
        assert self.listing is not None
        changed = new.instances.keys() != self.listing.instances.keys()
        self.lists_agree = not changed
        self.listing = new
        self._adopt_inventory()
        return changed

    def _fetch(self, missing: Sequence[Instance]) -> None:
        """Ask for these in one way after the other, each only for what is then still missing."""
        for number, (name, way) in enumerate(WAYS):
            settled = LOCAL_REASONS if number == 0 else LOCAL_REASONS | FATAL_REASONS
            left = [x for x in missing if not self.is_done(x) and x.reason not in settled]
            if number == 1 and any(x.reason == "not_sent" for x in left):
                # The source left them out and called it well: are they still there?
                self._confirm(wait=True)
                if self._list_again() is None:
                    return
                assert self.listing is not None
                left = [x for x in left if x.sop in self.listing.instances]
            if not left:
                return
            started = False
            for proposals, requests in way(self, left):
                if not requests or not proposals:
                    continue
                if not started:
                    started = True
                    self.rounds += 1
                    log.info("round %d (%s): %d instances of study %s", self.rounds, name, len(left), self.scope.study)
                Pass(self, proposals, requests).execute(self.settings.associations)

    def _probe(self) -> None:
        """Where a list may be cut, one SERIES-level get tells: it brings what the list leaves out."""
        assert self.listing is not None
        if not self.scope.whole_series or self.settings.sop_classes is not None:
            return
        suspects = self.listing.perhaps_cut() - self.whole_series
        if not suspects:
            return
        log.info("%d series of study %s may be listed in part; asking for them whole", len(suspects), self.scope.study)
        members = [x for x in self.listing.instances.values() if x.series in suspects]
        for proposals, part in contexts_for(self, members):
            series = {x.series for x in part}
            Pass(self, proposals, [Request("SERIES", uid) for uid in series]).execute(self.settings.associations)

    def still_growing(self) -> bool:
        """Whether the rounds were spent while the list still changed."""
        return self._moving

    def missing(self) -> list[Instance]:
        """Listed, not held, and not given up."""
        assert self.listing is not None
        return [x for x in self.listing.instances.values() if not self.is_done(x)]

    def _list(self, finder: Finder) -> Listing | None:
        try:
            listing = list_study(finder, self.scope, self.instances, Spread(self.source, self.settings.associations))
        except (NotNegotiated, OperationFailed, ListTooLong) as error:
            log.warning("study %s cannot be listed: %s", self.scope.study, error)
            self.remark(error)
            return None
        return self._narrowed(listing)

    def _narrowed(self, listing: Listing) -> Listing:
        """The list without the classes that are not wanted; its instances are known from now on."""
        wanted = self.settings.sop_classes
        if wanted is not None:
            listing.instances = {
                uid: x for uid, x in listing.instances.items() if x.sop_class is None or x.sop_class in wanted
            }
            listing.related_instances = None
        for uid, instance in listing.instances.items():
            self.instances.setdefault(uid, instance)
        return listing

    def _list_anew(self) -> Listing | None:
        """List over an association of its own."""
        self.hold_limits()
        return self.source.with_retries(self.retries, FIND_PROPOSALS, lambda a: self._list(Finder(a)))

    # --- what is held --------------------------------------------------------------------------

    def _take_inventory(self) -> None:
        if self.settings.resume:
            self._inventory = self.sink.inventory(self.scope.study)
        if self.listing is not None:
            self._adopt_inventory()
            missing = self.missing()
            self.events.planned(len(missing))
            self.settings.expect(dict.fromkeys(x.sop_class for x in missing if x.sop_class))

    def _adopt_inventory(self) -> None:
        """Mark what the list names and the destination holds."""
        assert self.listing is not None
        for uid, instance in self.listing.instances.items():
            held = self._inventory.get(uid)
            if held is None or instance.state is not None or held.series != instance.series:
                continue
            del self._inventory[uid]
            _fill(instance, held)
            instance.state = "held"
            if self.tag_numbers:
                instance.tags = tags_of(held, self.sink, self.tag_numbers, self.decode_tags)
            if instance.listed_syntax:
                instance.exactness = "as_listed" if held.syntax == instance.listed_syntax else "converted"

    def held_and_gone(self) -> Iterator[Instance]:
        """Held of the scope, and no longer listed."""
        if self.listing is None or not self.scope.whole_study:
            return
        for uid, held in self._inventory.items():
            if uid not in self.listing.instances and uid not in self.instances:
                instance = Instance(self.scope.study, held.series, uid)
                _fill(instance, held)
                yield instance

    # --- without a list ------------------------------------------------------------------------

    def _without_list(self) -> None:
        """No list is to be had: ask for the scope as it was given, in the common classes first."""
        self.rounds = 1
        scope = self.scope
        requests: list[Request] = []
        if scope.instances and scope.series and len(scope.series) == 1:
            (series,) = scope.series
            wanted = [self.unlisted(series, sop, "") for sop in sorted(scope.instances)]
            for x in wanted:
                x.sop_class = None
            requests = lists_of([x for x in wanted if not self.is_done(x)])
        elif scope.series and not scope.instances:
            requests = [Request("SERIES", series) for series in sorted(scope.series)]
        elif not scope.series and not scope.instances:
            requests = [Request("STUDY", None)]
        if not requests:
            raise InvalidQuery(
                f"Study {scope.study}: the PACS cannot list, and single instances need their one series.",
                hint="Give the Series Instance UID with the SOP Instance UIDs, or ask for the series.",
                study=scope.study,
            )
        classes = self.settings.sop_classes or all_storage_classes()
        for proposals in pack({c: self.peer.syntaxes(c) for c in classes}):
            work = Pass(self, proposals, [Request(r.level, r.series, list(r.targets)) for r in requests])
            work.execute(self.settings.associations)
            if all(o.status == s.SUCCESS and not o.failed and not o.remaining for o in work.outcomes):
                return


def _fill(instance: Instance, held: Held) -> None:
    """What the destination knows of an instance that was there before."""
    instance.attempt = 0
    instance.sop_class = held.sop_class or instance.sop_class
    instance.modality = instance.modality or held.modality
    instance.syntax, instance.uri = held.syntax, held.uri
    instance.bytes, instance.sha256 = held.bytes, held.sha256
    instance.dataset_offset = held.dataset_offset
    instance.forwarded_to = held.forwarded_to
