"""What a get would fetch: the lists of the studies that a query means, and what of them is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from airflow_dicom_get import clock
from airflow_dicom_get.engine.contexts import PeerKnowledge, likely_classes, pack
from airflow_dicom_get.engine.listing import Listing, list_study
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.resolve import FIND_PROPOSALS, Finder, Scope, resolve
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import Plan
from airflow_dicom_get.sinks.base import Sink


def list_studies(source: Source, query: Query, max_studies: int) -> list[tuple[Scope, Listing]]:
    """List the studies that a query means, over one association.

    Raises
    ------
    InvalidQuery
        It means more than ``max_studies`` studies.
    NotNegotiated, OperationFailed, and whatever ends an association
    """
    with source.association(FIND_PROPOSALS) as association:
        finder = Finder(association)
        return [(scope, list_study(finder, scope, {})) for scope in resolve(finder, query, max_studies)]


def mark_held(listed: Iterable[tuple[Scope, Listing]], sink: Sink) -> None:
    """Mark what the destination holds."""
    for scope, listing in listed:
        inventory = sink.inventory(scope.study)
        for uid, instance in listing.instances.items():
            if uid in inventory:
                instance.state, instance.attempt = "held", 0


def plan_of(
    listed: Sequence[tuple[Scope, Listing]], peer: PeerKnowledge, *, node: str, destination: str | None = None
) -> Plan:
    """Sum the lists up, with the presentation contexts that a get would propose."""
    listings = [listing for _, listing in listed]
    rows = [instance for listing in listings for instance in listing.instances.values()]
    missing = [instance for instance in rows if instance.state is None]
    bins = _contexts(missing, peer)
    return Plan(
        node=node,
        studies=[scope.study for scope, _ in listed],
        series=sum(len(listing.series) for listing in listings),
        instances=len(rows),
        held=len(rows) - len(missing),
        missing=len(missing),
        classes=dict(Counter(instance.sop_class for instance in rows)),
        contexts=sum(map(len, bins)),
        associations=len(bins),
        evidence="list+counts" if listings and all(x.has_counts() for x in listings) else "list",
        plan_at=datetime.fromtimestamp(max((x.at for x in listings), default=clock.now()), UTC),
        destination=destination,
        rows=rows,
    )


def _contexts(missing: Iterable[Instance], peer: PeerKnowledge) -> list[list[Proposal]]:
    pairs: dict[str, dict[str, None]] = {}
    for instance in missing:
        listed = [instance.listed_syntax] if instance.listed_syntax else []
        for sop_class in (instance.sop_class,) if instance.sop_class else likely_classes(instance.modality, ()):
            pairs.setdefault(sop_class, {}).update(dict.fromkeys(peer.syntaxes(sop_class, listed)))
    return pack({sop_class: tuple(syntaxes) for sop_class, syntaxes in pairs.items()})
