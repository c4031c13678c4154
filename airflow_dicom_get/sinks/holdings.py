"""What a node holds, as far as our records of its answers and its own lists tell.

A forward keeps nothing of what it sends. So what was sent before decides whether an instance is held, whether it may be
sent, and what the node means when it answers that it has one of this UID already; all of that is decided here.

Our records stand until something ends them: a list of the node that lacks the instance and is whole lets another data
set be sent, and what was recorded of the first one ends by a ``dropped`` before that goes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from airflow_dicom_get.errors import ListTooLong, OperationFailed
from airflow_dicom_get.lists.instances import InstanceList
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.ledger import Ledgers

log = logging.getLogger(__name__)

Ask = Callable[[str, Collection[str] | None, Collection[Key]], InstanceList | None]
"""Study, series (None: all of them) and what was recorded of it → what the node lists; None where it offers no list."""


class Sent(NamedTuple):
    """What a node holds under a SOP Instance UID."""

    study: str
    series: str
    sha256: bytes | None
    bytes: int | None


class NodeHoldings:
    """What is known of one node in one run. Thread-safe.

    Parameters
    ----------
    ledgers : Ledgers
        Our records of its answers.
    name : str
        The node.
    trusted : bool
        Whether what it lists is held, though no record of ours says so.
    """

    def __init__(self, ledgers: Ledgers, name: str, *, trusted: bool) -> None:
        self._ledgers, self._name, self._trusted = ledgers, name, trusted
        self._mutex = threading.Lock()
        self._sent: dict[str, Sent] = {}
        """What it took, by SOP Instance UID: a node may hold one instance of a UID, whatever its study."""
        self._listed_too: dict[tuple[str, str], Sent] = {}
        """By study and SOP Instance UID, what it lists besides: some nodes hold an instance of a UID in each study."""
        self._recorded: dict[str, dict[str, list[Stored]]] = {}
        """What it took in earlier runs, by study and SOP Instance UID: it may be sent again, but not be replaced."""
        self._absent: dict[str, Mapping[Key, Collection[str]]] = {}
        """By study, what of this its list proves not to be there any more, and where it lists the UID instead; see
        :class:`InstanceList`."""

    def inventory(self, study: str, ask: Ask) -> dict[Key, Stored]:
        """What our records say that it took, and it still lists; see :meth:`sinks.base.Sink.inventory`."""
        recorded = self._ledgers.read(study, durably=True)
        held = {key: records[0] for key, records in recorded.items() if records[0].durable}
        absent: Mapping[Key, Collection[str]] = {}
        if held or self._trusted:
            series = None if self._trusted else {series for series, _ in recorded}
            try:
                listed = ask(study, series, recorded.keys())
            except (OperationFailed, ListTooLong) as error:
                log.warning("%s does not tell what it holds, so all is sent again: %s", self._name, error.message)
                held.clear()
            else:
                if listed is not None:
                    self._hold_against(study, listed, held)
                    absent = listed.absent
        with self._mutex:
            self._absent[study] = absent
            self._remember(study, recorded)
            for x in held.values():
                there = Sent(study, x.series, x.sha256, x.bytes)
                if self._sent.setdefault(x.sop, there).study != study:
                    self._listed_too[study, x.sop] = there
        return held

    def _hold_against(self, study: str, listed: InstanceList, held: dict[Key, Stored]) -> None:
        """Correct what is held by what the node lists."""
        unlisted = held.keys() - listed.keys
        if unproven := len(unlisted - listed.absent.keys()):
            log.warning(
                "%s does not list %d of the instances of study %s that it took from us, and its answers do not prove "
                "that they are gone: they are sent again. Does it cut its answers?",
                self._name, unproven, study,
            )  # fmt: skip
        if gone := len(unlisted) - unproven:
            log.info("%s no longer lists %d of the instances of study %s that it took", self._name, gone, study)
        for key in unlisted:
            del held[key]
        sent = {sop for _, sop in held}
        for series, sop in sorted(listed.keys - held.keys()):
            if self._trusted or sop in sent:
                held[series, sop] = Stored(series, sop, forwarded_to=self._name, durable=True)

    def _remember(self, study: str, recorded: dict[Key, list[Stored]]) -> dict[str, list[Stored]]:
        by_uid: dict[str, list[Stored]] = {}
        for (_, sop), records in recorded.items():
            by_uid.setdefault(sop, []).extend(records)
        return self._recorded.setdefault(study, by_uid)

    def _records(self, instance: Instance) -> list[Stored]:
        """What our ledgers say that the node took under this UID, also where the inventory was not asked for."""
        known = self._recorded.get(instance.study)
        if known is None:
            recorded = self._ledgers.read(instance.study)
            with self._mutex:
                known = self._remember(instance.study, recorded)
        return known.get(instance.sop, [])

    # --- before and while an instance is sent --------------------------------------------------

    def first(self, instance: Instance) -> Sent | None:
        """What the node holds under this UID, by an answer in this run or by the inventory."""
        with self._mutex:
            known = self._sent.get(instance.sop)
            if known is not None and known.study != instance.study:
                known = self._listed_too.get((instance.study, instance.sop), known)
            return known

    def is_recorded(self, instance: Instance) -> bool:
        """Whether anything was recorded under this UID, so that the data sets have to be compared."""
        return bool(self._records(instance))

    def elsewhere(self, instance: Instance) -> str | None:
        """The series in which alone the node holds this UID."""
        standing = self._standing(instance)
        return standing[0].series if standing and all(x.series != instance.series for x in standing) else None

    def _standing(self, instance: Instance) -> list[Stored]:
        """What was recorded under this UID and may still be there.

        What the node has moved to another series is there, unless that is the series of this instance: then it was
        moved at the source as well.
        """
        absent = self._absent.get(instance.study, {})
        return [
            record
            for record in self._records(instance)
            if (instead := absent.get(record.key)) is None or (instead and instance.series not in instead)
        ]

    def replaces(self, instance: Instance, size: int, digest: bytes) -> bool:
        """Whether this data set would take the place of another one that the node holds, as far as we know."""
        return not all(is_same(x, size, digest) for x in self._standing(instance) if x.series == instance.series)

    def to_end(self, instance: Instance, size: int, digest: bytes) -> list[Key]:
        """What was recorded of something else under this UID: it has to end before this one goes."""
        standing = self._standing(instance)
        return list(
            dict.fromkeys(
                record.key
                for record in self._records(instance)
                if record not in standing and not (record.series == instance.series and is_same(record, size, digest))
            )
        )

    def ended(self, instance: Instance, keys: Collection[Key]) -> None:
        """Their records end, in the ledger too."""
        with self._mutex:
            known = self._recorded[instance.study]
            known[instance.sop] = [record for record in known[instance.sop] if record.key not in keys]

    # --- what it answers -----------------------------------------------------------------------

    def took(self, instance: Instance) -> None:
        """It has answered that it has it."""
        with self._mutex:
            self._sent[instance.sop] = Sent(instance.study, instance.series, instance.sha256, instance.bytes)

    def took_before(self, instance: Instance) -> bool:
        """Whether just this data set was confirmed before, so that what it has of this UID already is this one."""
        return any(
            record.series == instance.series and is_same(record, instance.bytes, instance.sha256)
            for record in self._records(instance)
        )


def is_same(first: Sent | Stored, size: int | None, digest: bytes | None) -> bool:
    """Whether a data set is the one that was sent first, as far as that is known."""
    return first.bytes in (None, size) and first.sha256 in (None, digest)
