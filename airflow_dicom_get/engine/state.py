"""The state of one study's retrieval: what is listed, what is held, what became of each instance.

Plain data and its transitions. No socket, disk, thread, lock or clock stands behind it: what source and
destination did comes in as arguments, and what follows for the run goes out as return values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import (
    Cancelled,
    DeadlineExceeded,
    DestinationFull,
    DicomGetError,
    NotAuthorised,
    NotNegotiated,
)
from airflow_dicom_get.lists.whole import COUNTER
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.base import Confirmation, Taken
from airflow_dicom_get.vocabulary import (
    DID_NOT_COME,
    DONE,
    HELD,
    LOCAL_REASONS,
    NOT_AVAILABLE,
    NOT_BROUGHT,
    NOT_COMPARED,
    NOT_OF_THE_QUERY,
    NOT_THE_DESTINATIONS,
    STOPS,
)

if TYPE_CHECKING:
    from airflow_dicom_get.engine.listing import Listing
    from airflow_dicom_get.engine.resolve import Scope

UNPLANNED = 200_000
"""Objects that one C-GET may bring where there is no list."""
MOST_REFUSED = 10
"""Instances in a row that the destination may fail to take before the source is left alone."""
_MOST_SERIES = 100
"""Series of one SOP Instance UID that are looked at for an object: a list may name it in any number."""


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
        Every instance of the study that was ever listed, held or sent, by Series and SOP Instance UID.
    listing : Listing or None
        The last list; None where there is none.
    lists_agree, still_growing : bool
        Whether the last two lists are the same set; whether the rounds were spent while they still differed.
    unlisted : set of (series, sop)
        Instances that were sent though no list had named them by then.
    unread : set of str
        SOP Instance UIDs that their C-STORE-RQ alone tells: nothing of them could be read, and nothing is recorded.
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
    sop_classes : collection of str or None
        The classes that are wanted; None is all.
    unwanted : set of (series, sop)
        Instances of which it came out that they are of another class.
    counted : dict
        Instances that a C-GET of a series (None: of the study) has shown there to be, modulo 65,536; below zero where
        one was made in vain.
    left, returned : set of (series, sop)
        Instances that left the list before they were held, and were asked for once more; those of them that came.
    tried_classes : dict of set of str
        By series the SOP classes in which its instances of unknown class were asked for.
    inventory : dict
        What the destination held before this run, and no list has named yet.
    gone : list of Instance
        What is held of the scope and is listed no longer; known at the end.
    """

    scope: Scope
    strict: bool = False
    instances: dict[Key, Instance] = field(default_factory=dict)
    listing: Listing | None = None
    lists_agree: bool = False
    still_growing: bool = False
    unlisted: set[Key] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    rounds: int = 0
    progress: int = 0
    errors: list[DicomGetError] = field(default_factory=list)
    strays: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    stop_reason: str | None = None
    cancelled_by: str | None = None
    tried_classes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sop_classes: Collection[str] | None = None
    unwanted: set[Key] = field(default_factory=set)
    counted: dict[str | None, int] = field(default_factory=dict)
    left: set[Key] = field(default_factory=set)
    returned: set[Key] = field(default_factory=set)
    inventory: dict[Key, Stored] = field(default_factory=dict)
    gone: list[Instance] = field(default_factory=list)
    _list_stands: bool = False
    _by_uid: dict[str, Instance] = field(default_factory=dict)
    _others: dict[str, dict[Key, Instance]] = field(default_factory=dict)
    """All of ``instances`` by their SOP Instance UID: there may be as many series as instances, and of one UID too."""
    _late: set[Key] = field(default_factory=set)
    _due: dict[int, Instance] = field(default_factory=dict)
    """What was taken and not confirmed yet, by ``id``."""
    _early: dict[int, Confirmation] = field(default_factory=dict)
    """What the destination said of an instance before its answer was noted, by ``id``."""
    _refused_in_a_row: int = 0

    # --- questions -----------------------------------------------------------------------------

    def in_scope(self, series: str, sop: str) -> bool:
        """Whether an instance that no list names may still be meant by the query."""
        scope, listed = self.scope, self.listing.series if self.listing is not None else {}
        if scope.filters and (scope.filters_images or series not in listed):
            return False
        if scope.instances is not None:
            return scope.names(series, sop)
        return scope.series is None or series in scope.series

    def of(self, sop: str) -> list[Instance]:
        """The instances of a SOP Instance UID: one in each series that has it, of a hundred at most."""
        first, others = self._by_uid.get(sop), self._others.get(sop, {})
        return [] if first is None else [first, *islice(others.values(), _MOST_SERIES - 1)]

    def listed_elsewhere(self, series: str, sop: str) -> bool:
        """Whether the list names the SOP Instance UID, and not in this series."""
        listed = self.listing.instances if self.listing is not None else {}
        return (series, sop) not in listed and any(x.key in listed for x in self.of(sop))

    def refused_here(self, instance: Instance) -> bool:
        """Whether it was refused in this round, for a reason that asking again does not change."""
        return instance.attempt == self.rounds and instance.reason in LOCAL_REASONS

    def unknown(self) -> frozenset[str]:
        """UIDs of the query that the list does not have, nor, for an instance, the destination."""
        held = {sop for _, sop in self.inventory}
        return self.listing.unknown - held if self.listing is not None else frozenset()

    def missing(self) -> list[Instance]:
        """Listed, not held, and not given up."""
        assert self.listing is not None
        return [x for x in self.listing.instances.values() if x.state not in DONE]

    def most_objects(self) -> int:
        """Objects that one C-GET may bring: twice the plan and a hundred, where there is a list that stands."""
        return 2 * self.listing.total + 100 if self.listing is not None and self._list_stands else UNPLANNED

    def most_steps(self) -> int:
        """How often one C-GET may say that fewer remain: once for all that are listed, before our own filters too."""
        if self.listing is None or not self._list_stands:
            return UNPLANNED
        return max(self.listing.total, sum(series.listed for series in self.listing.series.values()))

    # --- lists and inventory -------------------------------------------------------------------

    def take_list(self, listing: Listing) -> bool:
        """A list came; whether it names other instances than the one before."""
        named = listing.instances.keys() & self.scope.named
        listing.narrow(self.sop_classes, self.unwanted)
        self.unwanted |= named - listing.instances.keys()  # the list tells another class
        changed = self.listing is not None and listing.keys() != self.listing.keys()
        self.counted.clear()  # what a C-GET has counted before is of another moment than this list
        self.lists_agree = self.listing is not None and not changed
        lists = listing.lists()
        self._list_stands = not lists.is_round(listing.cuts) and not lists.contradicted()
        self.listing = listing
        for instance in listing.instances.values():
            self._keep(instance)
        return changed

    def gone_unheld(self) -> list[Instance]:
        """What left the list before it was held, and is to be asked for once more by its UID.

        Whatever became of it before counts no more: only a request that ends without it makes it ``withdrawn``.
        """
        assert self.listing is not None
        found = [
            x
            for key, x in self.instances.items()
            if key not in self.listing.instances
            and key not in self.unlisted
            and key not in self.left
            and x.state not in DONE
        ]
        for x in found:
            self.left.add(x.key)
            x.state = x.reason = x.error = None
        return found

    def leave_out(self, key: Key, sop_class: str) -> None:
        """It came out that an instance, whose class the list does not tell, is of a class that is not wanted."""
        one = self.instances.get(key)
        if one is not None and one.sop_class in (None, sop_class) and one.state not in DONE:
            self._leave_out(one)

    def _leave_out(self, one: Instance) -> None:
        self.unwanted.add(one.key)
        self.unlisted.discard(one.key)
        del self.instances[one.key]
        others = self._others.get(one.sop, {})
        if others.pop(one.key, None) is None:
            del self._by_uid[one.sop]
            if others:
                self._index(others.popitem()[1])
        if self.listing is not None:
            self.listing.instances.pop(one.key, None)
        one.state = "unexpected"  # for who still has it in hand

    def learn_count(self, series: str | None, total: int | None, sent: Collection[Key] | None) -> None:
        """What a C-GET of a whole series, or of the study, has said and sent.

        Parameters
        ----------
        total : int or None
            What its counters came to, modulo 65,536.
        sent : collection of (series, sop), optional
            All that it sent, where it ended in success.
        """
        if self.listing is None or not self.listing.in_question(series):
            return
        listed = {key for key in self.listing.instances if series in (None, key[0])}
        if sent is not None and sent == listed:
            self.counted[series] = len(listed) % COUNTER
        elif total is not None:
            self.counted[series] = total
        else:
            self.counted.setdefault(series, -1)

    def adopt_inventory(self) -> Iterator[tuple[Instance, Stored]]:
        """Mark what the list names and the destination holds; gives each pair that it marked.

        Where there is no list, what is asked for by its UIDs stands for it.
        """
        named = self.listing.instances if self.listing is not None else self.instances
        for key, instance in list(named.items()):
            if instance.state is not None or (held := self.inventory.pop(key, None)) is None:
                continue
            if self.sop_classes is not None and held.sop_class is not None and held.sop_class not in self.sop_classes:
                if instance.sop_class is None:
                    self._leave_out(instance)
                continue  # the list says otherwise: what it sends decides
            instance.adopt(held)
            instance.state, instance.reason = "held", instance.remark
            if instance.listed_syntax:
                instance.exactness = "as_listed" if held.syntax == instance.listed_syntax else "converted"
            yield instance, held

    # --- what came -----------------------------------------------------------------------------

    def add_unlisted(self, series: str, sop: str, sop_class: str | None) -> Instance:
        """The record of an instance that was sent, or asked for, and is not listed."""
        self.unlisted.add((series, sop))
        return self._keep(Instance(self.scope.study, series, sop, sop_class))

    def _keep(self, instance: Instance) -> Instance:
        """The record of an instance: this one, unless there is one already."""
        kept = self.instances.get(instance.key)
        if kept is None:
            kept = self.instances[instance.key] = instance
            self._index(instance)
        return kept

    def _index(self, instance: Instance) -> None:
        if self._by_uid.setdefault(instance.sop, instance) is not instance:
            self._others.setdefault(instance.sop, {})[instance.key] = instance

    def answer(self, uid: str, instance: Instance | None, taken: Taken) -> Answered:
        """An object was answered.

        Parameters
        ----------
        uid : str
            The SOP Instance UID that its C-STORE-RQ names.
        instance : Instance or None
            Its record, or one of its own where the first one stays; None where its data set names none of ours.
        """
        record = self.instances.get(instance.key) if instance is not None else None
        if taken.reason is None:
            assert instance is not None
            assert record is not None
            self._refused_in_a_row = 0
            self._due[id(instance)] = instance
            if taken.remark == "replaced":
                record.become(instance)
            if instance is record or taken.remark == "replaced":
                if record.state != "conflict" or taken.remark == "replaced":
                    record.state, record.reason, record.error = taken.state, record.remark or taken.remark, None
                self._came(record)
            early = self._early.pop(id(instance), None)
            said = self.confirm(early) if early is not None else None
            return said if said is not None and said.error else Answered(record, new=instance is record)
        error = taken.error or taken.reason
        meant = [record] if record is not None else self.of(uid)
        if not meant:
            self.strays[taken.reason] += 1
            if taken.reason not in NOT_OF_THE_QUERY:
                self.note_unread([uid])
            meant = [Instance(self.scope.study, "", uid)]
        for one in meant:
            if one is instance and taken.reason == "different_content":
                one.forget_content()
            if one.state in HELD and taken.reason in NOT_COMPARED and _is_ours(instance):
                self._not_compared(one, taken.reason, error)
            else:
                self._refuse(one, taken)
        record, stop = meant[0], None
        if taken.reason == "destination_full":
            stop = taken.reason
        elif self.strict and record.forward_status == "error":
            stop = "strict_forward"
        elif taken.reason == "destination_error" and record.forward_status is None:
            stop = self._refused_again()
        return Answered(record, error, stop=stop)

    def note_unread(self, uids: Iterable[str]) -> None:
        """Instances were sent of which only the SOP Instance UID is known: the list may lack them."""
        if self.sop_classes is None:  # else it may be of a class that is not wanted
            self.unread.update(filter(is_uid, uids))

    def _refuse(self, record: Instance, taken: Taken) -> None:
        """What was sent for it was not taken; one that is held stays held, unless its content is another."""
        if taken.reason == "different_content":
            record.state = "conflict"
        elif record.state in DONE:
            return
        elif taken.reason != "uid_mismatch":
            record.state = "failed"
        elif record.state == "failed" and record.attempt == self.rounds:
            return  # its own object came as well
        else:  # an object that names another instance is none of this one
            record.state = "missing"
        record.reason, record.error, record.dimse_status = taken.reason, taken.error, taken.status
        record.attempt = self.rounds

    def _not_compared(self, record: Instance, reason: str, error: str | None) -> None:
        """What is held was sent again, and the destination could neither compare it nor put it in its place."""
        record.state, record.reason, record.attempt = "failed", reason, self.rounds
        record.error = f"Sent again, but neither compared with what is held nor put in its place: {error}"

    def sent_in_other_syntax(self, key: Key) -> None:
        """An instance that is there, or on its way, was sent again in another transfer syntax: the first stays."""
        record = self.instances[key]
        record.other_syntax = True
        if record.state in HELD:
            record.reason = record.reason or record.remark

    def left_to_destination(self, instance: Instance) -> Answered | None:
        """The source was aborted before the destination answered: a confirmation will tell whether it stored it.

        What is new, where it has come already.
        """
        self._late.add(instance.key)
        early = self._early.pop(id(instance), None)
        return self.confirm(early) if early is not None else None

    def confirm(self, confirmation: Confirmation) -> Answered | None:
        """The destination has confirmed an instance, or could not; None where nothing is new by that."""
        instance, error, reason, remark = confirmation
        if self._due.pop(id(instance), None) is None and instance.key not in self._late:
            self._early[id(instance)] = confirmation
            return None
        record = self.instances.get(instance.key, instance)
        if error is not None:
            conflict = reason == "different_content"
            stop = None if reason in NOT_THE_DESTINATIONS else self._refused_again()
            if not conflict and record is not instance and _is_ours(instance) and record.state in HELD:
                self._not_compared(record, reason, error)
                return Answered(record, record.error, stop=stop)
            if not conflict and (record is not instance or record.state == "conflict"):
                # Refused by a node that has it, or beside other bytes: the row stands.
                return Answered(instance, error, stop=stop)
            if conflict and record is instance:
                record.forget_content()
            record.state = "conflict" if conflict else "failed"
            record.reason, record.attempt = reason, self.rounds
            told = conflict or record.forward_status == "error"
            record.error = error if told else f"Received, but not confirmed: {error}"
            return Answered(record, record.error, stop=stop)
        if remark == "replaced" and record.state != "conflict":
            record.become(instance)
            record.state, record.reason, record.attempt = "stored", record.remark or remark, self.rounds
        if record is instance and record.state in HELD:
            record.reason = record.reason or record.remark  # what came out when it was compared
        if record is not instance or record.key not in self._late:
            return None
        # It said so too late for the source: taken only now.
        self._late.discard(record.key)
        if record.state != "conflict":
            record.state, record.reason, record.error = "forwarded", record.remark, None
        self._came(record)
        return Answered(record, new=True)

    def _came(self, record: Instance) -> None:
        record.attempt = self.rounds
        if record.key in self.left:
            self.returned.add(record.key)
            self.unlisted.add(record.key)
        self.progress += record.key not in self.unlisted or self.listing is None

    def _refused_again(self) -> str | None:
        self._refused_in_a_row += 1
        return "destination_error" if self._refused_in_a_row >= MOST_REFUSED else None

    def not_received(self, instance: Instance, reason: str, error: str) -> None:
        """An instance was asked for and did not come."""
        if reason in NOT_BROUGHT:
            reason = NOT_AVAILABLE.get(instance.availability or "", reason)
        instance.state, instance.reason, instance.error = "missing", reason, error
        instance.attempt = self.rounds

    # --- the end -------------------------------------------------------------------------------

    def conclude(self, undelivered: str = "cancelled") -> None:
        """Give every record its final state: what no outcome has reached is missing, what no list names is outside.

        ``undelivered`` is the reason of what the destination did not return for: :attr:`CancelToken.word`.
        """
        listing, named = self.listing, self.scope.named
        self.gone.clear()
        for instance in list(self._due.values()):  # only where the destination did not return
            self.confirm(Confirmation(instance, "The destination did not return before the end.", undelivered))
        if listing is not None:
            for key in self.unlisted & self.instances.keys():
                if self.instances[key].state is None:  # it broke off while it came, and nobody has listed it
                    del self.instances[key]
        for key, instance in self.instances.items():
            if listing is None or key in listing.instances:
                if instance.state is None:
                    instance.state, instance.reason = "missing", self._why_untried()
            elif key in self.unlisted:
                if instance.state in HELD:
                    instance.state, instance.reason = "unexpected", instance.reason or "not_listed"
            elif key in named:  # asked for, whatever is listed
                if instance.state not in DONE:
                    instance.state, instance.reason = "missing", "gone_from_list"
            elif instance.state in HELD or (key in self.left and instance.reason in DID_NOT_COME):
                instance.state, instance.reason = "withdrawn", "gone_from_list"
            elif instance.state is None:
                instance.state, instance.reason = "missing", self._why_untried()
        if listing is None:
            for series, sop in sorted(self.scope.bad):
                instance = self.instances[series, sop] = Instance(self.scope.study, series, sop)
                instance.state, instance.reason = "missing", "bad_uid"
            return
        for key in sorted(named - self.instances.keys() - self.unwanted):
            held = self.inventory.get(key)
            if held is not None and self.sop_classes is not None and held.sop_class not in self.sop_classes:
                continue
            instance = self.instances[key] = Instance(self.scope.study, *key)
            if held is not None:
                instance.adopt(held)
                instance.state, instance.reason = "held", instance.remark
            else:
                instance.state, instance.reason = "missing", "gone_from_list"
        if not self.scope.whole_study or self.sop_classes is not None:
            return
        for key, held in self.inventory.items():
            if key not in listing.instances and key not in self.instances:
                instance = Instance(self.scope.study, held.series, held.sop)
                instance.adopt(held)
                instance.state, instance.reason = "withdrawn", "gone_from_list"
                self.gone.append(instance)

    def rows(self) -> Collection[Instance]:
        """Every record of the study's part of the manifest."""
        bad = self.listing.bad.values() if self.listing is not None else ()
        return [*self.instances.values(), *bad, *self.gone]

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


def _is_ours(instance: Instance | None) -> bool:
    """Whether no node has answered for it: one that has an instance may refuse it as a duplicate."""
    return instance is None or instance.forward_status is None
