"""What a get would fetch: the lists of the studies that a query means, and what of them is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from airflow_dicom_get import clock
from airflow_dicom_get.engine.contexts import PeerKnowledge, likely_classes, pack
from airflow_dicom_get.engine.listing import Listing, list_study
from airflow_dicom_get.engine.matching import Dropped
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.resolve import Finder, Scope, resolve
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.find import FIND_PROPOSALS
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import Plan
from airflow_dicom_get.sinks.base import Sink


@dataclass(frozen=True, slots=True)
class Listed:
    """The lists of some studies.

    Attributes
    ----------
    scopes, listings : list
        The studies that the query means, and the list of each.
    dropped : Dropped
        The rows that contradict what was asked for.
    """

    scopes: list[Scope]
    listings: list[Listing]
    dropped: Dropped

    @property
    def at(self) -> datetime:
        """When the last of the lists was made, in UTC."""
        return datetime.fromtimestamp(max((x.at for x in self.listings), default=clock.now()), UTC)


def list_studies(source: Source, query: Query, max_studies: int) -> Listed:
    """List the studies that a query means, over one association.

    Raises
    ------
    InvalidQuery
        It means more than ``max_studies`` studies, or names a key that the source does not support.
    NotNegotiated, OperationFailed, and whatever ends an association
    """
    with source.association(FIND_PROPOSALS) as association:
        finder = Finder(association)
        scopes = resolve(finder, query, max_studies)
        listings = [list_study(finder, scope, {}) for scope in scopes]
    for listing in listings:
        finder.dropped.update(listing.dropped)
    return Listed(scopes, listings, finder.dropped)


def mark_held(listed: Listed, sink: Sink) -> None:
    """Mark what the destination holds."""
    for scope, listing in zip(listed.scopes, listed.listings, strict=True):
        inventory = sink.inventory(scope.study)
        for key, instance in listing.instances.items():
            if key in inventory:
                instance.state, instance.attempt = "held", 0


def plan_of(listed: Listed, peer: PeerKnowledge, *, node: str, destination: str | None = None) -> Plan:
    """Sum the lists up, with the presentation contexts that a get would propose."""
    listings = listed.listings
    rows = [instance for listing in listings for instance in listing.instances.values()]
    missing = [instance for instance in rows if instance.state is None]
    bins = _contexts(missing, peer)
    return Plan(
        node=node,
        studies=[scope.study for scope in listed.scopes],
        series=sum(len(listing.series) for listing in listings),
        instances=len(rows),
        held=len(rows) - len(missing),
        missing=len(missing),
        classes=dict(Counter(instance.sop_class for instance in rows)),
        contexts=sum(map(len, bins)),
        associations=len(bins),
        evidence="list+counts" if listings and all(x.has_counts() for x in listings) else "list",
        plan_at=listed.at,
        destination=destination,
        errors=listed.dropped.remarks(),
        rows=rows,
    )


def _contexts(missing: Iterable[Instance], peer: PeerKnowledge) -> list[list[Proposal]]:
    pairs: dict[str, dict[str, None]] = {}
    for instance in missing:
        listed = [instance.listed_syntax] if instance.listed_syntax else []
        for sop_class in (instance.sop_class,) if instance.sop_class else likely_classes(instance.modality, ()):
            pairs.setdefault(sop_class, {}).update(dict.fromkeys(peer.syntaxes(sop_class, listed)))
    return pack({sop_class: tuple(syntaxes) for sop_class, syntaxes in pairs.items()})
