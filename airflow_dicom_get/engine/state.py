"""The state of one study's retrieval: what is listed, what is held, what became of each instance.

Plain data and its transitions. No socket, disk, thread, lock or clock stands behind it: what source and
destination did comes in as arguments, and what follows for the run goes out as return values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from airflow_dicom_get.errors import (
    Cancelled,
    DeadlineExceeded,
    DestinationFull,
    DicomGetError,
    NotAuthorised,
    NotNegotiated,
)
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.vocabulary import DONE, LOCAL_REASONS, NOT_THE_DESTINATIONS, STOPS

if TYPE_CHECKING:
    from airflow_dicom_get.engine.listing import Listing
    from airflow_dicom_get.engine.resolve import Scope
    from airflow_dicom_get.sinks.base import Confirmation, Taken

UNPLANNED = 200_000
"""Objects that one C-GET may bring where there is no list."""
MOST_REFUSED = 10
"""Instances in a row that the destination may fail to take before the source is left alone."""


class Answered(NamedTuple):
    """What an object that was answered means for the events and for the run."""

    record: Instance
    error: str | None = None
    """Why it was refused; None where it was taken."""
    new: bool = False
    """Whether it is the first object of its instance."""
    stop: str | None = None
    """A reason to end the run in order."""


@dataclass(slots=True)
class StudyState:
    """What is known of one study in one run. Not thread-safe: whoever shares it holds a lock.

    Attributes
    ----------
    scope : Scope
        What the query means within the study.
    strict : bool
        Whether one instance that the destination refuses ends the run.
    instances : dict
        Every instance of the study that was ever listed, held or sent, by SOP Instance UID.
    listing : Listing or None
        The last list; None where there is none.
    lists_agree, still_growing : bool
        Whether the last two lists are the same set; whether the rounds were spent while they still differed.
    unlisted : set of str
        Instances that were sent though no list had named them by then.
    rounds : int
        Rounds of list and get so far.
    progress : int
        Listed instances that were taken, and others where there is no list: what reconnects are allowed for.
    errors : list
        What ended the study, or a part of it, most telling first.
    strays : Counter
        Objects that were refused and belong to no row, by reason.
    remarks : Counter
        Errors that the run recovered from, by their class.
    stop_reason : str or None
        Why the run ends in order before its work is done.
    cancelled_by : str or None
        Who cancelled the run: the name of a signal, or the word given to ``cancel()``.
    tried_classes : set of str
        SOP classes that were proposed for instances whose class is not known.
    whole_series : set of str
        Series that were asked for at SERIES level to the end.
    inventory : dict
        What the destination held before this run, and no list has named yet.
    gone : list of Instance
        What is held of the scope and is listed no longer; known at the end.
    """

    scope: Scope
    strict: bool = False
    instances: dict[str, Instance] = field(default_factory=dict)
    listing: Listing | None = None
    lists_agree: bool = False
    still_growing: bool = False
    unlisted: set[str] = field(default_factory=set)
    rounds: int = 0
    progress: int = 0
    errors: list[DicomGetError] = field(default_factory=list)
    strays: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    stop_reason: str | None = None
    cancelled_by: str | None = None
    tried_classes: set[str] = field(default_factory=set)
    whole_series: set[str] = field(default_factory=set)
    inventory: dict[str, Stored] = field(default_factory=dict)
    gone: list[Instance] = field(default_factory=list)
    _late: set[str] = field(default_factory=set)
    _refused_in_a_row: int = 0

    # --- questions -----------------------------------------------------------------------------

    def in_scope(self, series: str, sop: str) -> bool:
        """Whether an instance that no list names may still be meant by the query."""
        scope = self.scope
        if scope.instances is not None:
            return sop in scope.instances
        if scope.series is not None:
            return series in scope.series
        return not scope.filters or (self.listing is not None and series in self.listing.series)

    def refused_here(self, instance: Instance) -> bool:
        """Whether it was refused in this round, for a reason that asking again does not change."""
        return instance.attempt == self.rounds and instance.reason in LOCAL_REASONS

    def missing(self) -> list[Instance]:
        """Listed, not held, and not given up."""
        assert self.listing is not None
        return [x for x in self.listing.instances.values() if x.state not in DONE]

    def most_objects(self) -> int:
        """Objects that one C-GET may bring: twice the plan and a hundred."""
        return 2 * len(self.listing.instances) + 100 if self.listing is not None else UNPLANNED

    # --- lists and inventory -------------------------------------------------------------------

    def take_list(self, listing: Listing) -> bool:
        """A list came; whether it names other instances than the one before."""
        changed = self.listing is not None and listing.instances.keys() != self.listing.instances.keys()
        self.lists_agree = self.listing is not None and not changed
        self.listing = listing
        for uid, instance in listing.instances.items():
            self.instances.setdefault(uid, instance)
        return changed

    def adopt_inventory(self) -> Iterator[tuple[Instance, Stored]]:
        """Mark what the list names and the destination holds; gives each pair that it marked."""
        assert self.listing is not None
        for uid, instance in self.listing.instances.items():
            held = self.inventory.get(uid)
            if held is None or instance.state is not None or held.series != instance.series:
                continue
            del self.inventory[uid]
            instance.adopt(held)
            instance.state = "held"
            if instance.listed_syntax:
                instance.exactness = "as_listed" if held.syntax == instance.listed_syntax else "converted"
            yield instance, held

    # --- what came -----------------------------------------------------------------------------

    def add_unlisted(self, series: str, sop: str, sop_class: str | None) -> Instance:
        """The record of an instance that was sent, or asked for, and is not listed."""
        self.unlisted.add(sop)
        return self.instances.setdefault(sop, Instance(self.scope.study, series, sop, sop_class))

    def answer(self, uid: str, instance: Instance | None, taken: Taken) -> Answered:
        """An object was answered; ``instance`` is its record, or one of its own where the first one stays."""
        record = self.instances.get(uid)
        if taken.reason is None:
            assert instance is not None
            assert record is not None
            self._refused_in_a_row = 0
            if instance is record:
                record.state, record.reason, record.error = taken.state, None, None
                self._came(record)
            return Answered(record, new=instance is record)
        error = taken.error or taken.reason
        if record is None:
            self.strays[taken.reason] += 1
            record = Instance(self.scope.study, "", uid)
        elif record.state not in DONE or taken.reason == "different_content":
            record.state = "conflict" if taken.reason == "different_content" else "failed"
            record.reason, record.error, record.dimse_status = taken.reason, taken.error, taken.status
            record.attempt = self.rounds
        stop = None
        if taken.reason == "destination_full":
            stop = taken.reason
        elif self.strict and record.forward_status == "error":
            stop = "strict_forward"
        elif taken.reason == "destination_error" and record.forward_status is None:
            stop = self._refused_again()
        return Answered(record, error, stop=stop)

    def left_to_destination(self, instance: Instance) -> None:
        """The source was aborted before the destination answered: a confirmation will tell whether it stored it."""
        self._late.add(instance.sop)

    def confirm(self, confirmation: Confirmation) -> Answered | None:
        """The destination has confirmed an instance, or could not; None where nothing is new by that."""
        instance, error, reason = confirmation
        if error is not None:
            conflict = reason == "different_content"
            instance.state = "conflict" if conflict else "failed"
            instance.reason, instance.attempt = reason, self.rounds
            told = conflict or instance.forward_status == "error"
            instance.error = error if told else f"Received, but not confirmed: {error}"
            stop = None if reason in NOT_THE_DESTINATIONS else self._refused_again()
            return Answered(instance, instance.error, stop=stop)
        if instance.sop not in self._late or self.instances.get(instance.sop) is not instance:
            return None
        # It said so too late for the source: taken only now.
        self._late.discard(instance.sop)
        instance.state, instance.reason, instance.error = "forwarded", None, None
        self._came(instance)
        return Answered(instance, new=True)

    def _came(self, record: Instance) -> None:
        record.attempt = self.rounds
        self.progress += record.sop not in self.unlisted or self.listing is None

    def _refused_again(self) -> str | None:
        self._refused_in_a_row += 1
        return "destination_error" if self._refused_in_a_row >= MOST_REFUSED else None

    def not_received(self, instance: Instance, reason: str, error: str) -> None:
        """An instance was asked for and did not come."""
        instance.state, instance.reason, instance.error = "missing", reason, error
        instance.attempt = self.rounds

    # --- the end -------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Give every record its final state: what no outcome has reached is missing, what no list names is outside."""
        listing = self.listing
        for uid, instance in self.instances.items():
            if listing is None or uid in listing.instances:
                if instance.state is None:
                    instance.state, instance.reason = "missing", self._why_untried()
            elif uid in self.unlisted:
                instance.state = "unexpected"
                instance.reason = instance.reason or "not_listed"
            else:
                instance.state, instance.reason = "withdrawn", "gone_from_list"
        if listing is None or not self.scope.whole_study:
            return
        for uid, held in self.inventory.items():
            if uid not in listing.instances and uid not in self.instances:
                instance = Instance(self.scope.study, held.series, uid)
                instance.adopt(held)
                instance.state, instance.reason = "withdrawn", "gone_from_list"
                self.gone.append(instance)

    def rows(self) -> Collection[Instance]:
        """Every record of the study's part of the manifest."""
        return [*self.instances.values(), *self.gone]

    def _why_untried(self) -> str:
        """Why nothing became of a listed instance."""
        if self.stop_reason is not None and self.stop_reason in STOPS:
            return self.stop_reason
        for error in self.errors:
            if isinstance(error, NotAuthorised | NotNegotiated):
                return "refused_by_source"
            if isinstance(error, Cancelled | DestinationFull | DeadlineExceeded):
                return error.word
            if error.at_fault == "peer":
                return "association_lost"
            if error.at_fault == "destination":
                return "destination_error"
        return "not_sent"
