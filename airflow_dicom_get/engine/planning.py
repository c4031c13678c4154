"""What a get would fetch: the lists of the studies that a query means, and what of them is held."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from airflow_dicom_get import clock
from airflow_dicom_get.engine.below import count_below
from airflow_dicom_get.engine.contexts import PeerKnowledge, bins_for, common_classes, likely_classes, pack
from airflow_dicom_get.engine.listing import Each, Listing, list_study, one_by_one
from airflow_dicom_get.engine.query import Query
from airflow_dicom_get.engine.report import known_nowhere, unknown_remark
from airflow_dicom_get.engine.resolve import Scope, resolve
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import Cancelled, DicomGetError, ListTooLong, NotNegotiated, OperationFailed
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.lists.matching import Dropped
from airflow_dicom_get.lists.whole import doubt_remark
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import Plan
from airflow_dicom_get.sinks.base import Sink
from airflow_dicom_get.vocabulary import HELD

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """The lists of some studies.

    Attributes
    ----------
    scopes, listings : list
        The studies that the query means, and the list of each; none where they were left to their own runs.
    dropped : Dropped
        The rows that contradict what was asked for.
    doubt : str or None
        Why the query may mean more studies, as a reason of the vocabulary.
    unknown : frozenset of str
        Studies that the query names, and that are not there; see :class:`~airflow_dicom_get.engine.resolve.Meant`.
    """

    scopes: list[Scope]
    listings: list[Listing]
    dropped: Dropped
    doubt: str | None = None
    unknown: frozenset[str] = frozenset()

    @property
    def at(self) -> datetime:
        """When the last of the lists was made, in UTC."""
        return datetime.fromtimestamp(max((x.at for x in self.listings), default=clock.now()), UTC)

    def all_dropped(self) -> Dropped:
        """Those of the search, and of the lists."""
        found = Dropped()
        for dropped in (self.dropped, *(listing.dropped for listing in self.listings)):
            found.update(dropped)
        return found

    def why_doubtful(self, counted: Sequence[Mapping[str | None, int]] | None = None) -> str | None:
        """Why there may be more than is listed, as a reason of the vocabulary.

        Parameters
        ----------
        counted : sequence of mapping, optional
            What C-GETs have shown of each study; see :meth:`~airflow_dicom_get.lists.whole.Lists.doubts`.
        """
        if self.doubt is not None:
            return self.doubt
        if any(listing.lists().contradicted() for listing in self.listings):
            return "list_contradicted"
        shown = counted or [{}] * len(self.listings)
        doubtful = [listing.doubts(of_study) for listing, of_study in zip(self.listings, shown, strict=True)]
        return "list_may_be_cut" if any(doubtful) else None


def list_studies(
    finder: Finder, query: Query, max_studies: int, each: Each = one_by_one, *, for_get: bool = False
) -> Listed:
    """List the studies that a query means.

    Parameters
    ----------
    each : callable
        Has the series of a study listed; see :func:`~airflow_dicom_get.engine.listing.list_study`.
    for_get : bool
        List a single study alone. Several, and one that cannot be listed, are left to their own runs.

    Raises
    ------
    InvalidQuery
        It means more than ``max_studies`` studies, or names a key that the source does not support.
    NotNegotiated, OperationFailed, and whatever ends an association
    """
    meant = resolve(finder, query, max_studies)
    listings: list[Listing] = []
    if not for_get or (len(meant.scopes) == 1 and meant.scopes[0].listed):
        try:
            listings = [list_study(finder, scope, {}, each) for scope in meant.scopes]
        except (NotNegotiated, OperationFailed, ListTooLong) as error:
            if not for_get:
                raise
            log.debug("left to the run of the study: %s", error.message)
    return Listed(meant.scopes, listings, finder.dropped, meant.doubt, meant.unknown)


def count_doubtful(source: Source, listed: Listed, query_model: str) -> list[dict[str | None, int]]:
    """Ask, for each list that may be cut, how many instances there are at the level above; for each study.

    A number below zero stands for what the source does not tell.
    """
    peer = PeerKnowledge()
    found: list[dict[str | None, int]] = []
    for scope, listing in zip(listed.scopes, listed.listings, strict=True):
        counted: dict[str | None, int] = {}
        found.append(counted)
        doubts = listing.doubts(counted)

        def guess(instance: Instance, scope: Scope = scope) -> tuple[str, ...]:
            return likely_classes(instance.modality, scope.sop_classes) or common_classes()

        for series in doubts.to_ask(whole_study=scope.whole_study):
            members = [x for x in listing.instances.values() if series in (None, x.series)]
            contexts = next(iter(bins_for(members, peer, guess)), [])
            total = None
            try:
                below = count_below(source, scope, series, query_model, contexts, 0)
                if not below.uids - {x.sop for x in members}:  # else there are more than are listed
                    total = below.total
            except Cancelled:
                raise
            except DicomGetError as error:  # the list stays doubtful, and all else can be told from it
                log.info("the instances below %s could not be counted: %s", series or scope.study, error.message)
            counted[series] = -1 if total is None else total
    return found


def mark_held(listed: Listed, sink: Sink) -> None:
    """Mark what the destination holds."""
    for scope, listing in zip(listed.scopes, listed.listings, strict=True):
        inventory = sink.inventory(scope.study, scope.patient_keys()) if scope.named_well else {}
        for key, instance in listing.instances.items():
            if key in inventory:
                instance.state, instance.attempt = "held", 0


def plan_of(listed: Listed, peer: PeerKnowledge, *, node: str, destination: str | None = None) -> Plan:
    """Sum the lists up, with the presentation contexts that a get would propose."""
    listings, doubt = listed.listings, listed.why_doubtful()
    rows = [instance for listing in listings for instance in (*listing.instances.values(), *listing.bad.values())]
    missing = [instance for instance in rows if instance.state is None]
    bins = _contexts(missing, peer)
    unknown = listed.unknown | known_nowhere(listing.unknown for listing in listings)
    unknown |= {
        scope.study
        for scope, listing in zip(listed.scopes, listings, strict=True)
        if not scope.found and not listing.series and not listing.total
    }
    said = [*([doubt_remark(doubt)] if doubt is not None else []), *([unknown_remark(unknown)] if unknown else [])]
    return Plan(
        node=node,
        studies=[scope.study for scope in listed.scopes],
        series=sum(len(listing.series) for listing in listings),
        instances=len(rows),
        held=sum(instance.state in HELD for instance in rows),
        missing=sum(instance.state not in HELD for instance in rows),
        classes=dict(Counter(instance.sop_class for instance in rows)),
        contexts=sum(map(len, bins)),
        associations=len(bins),
        evidence="list+counts" if listings and all(x.counts_agree() for x in listings) else "list",
        plan_at=listed.at,
        destination=destination,
        errors=[*said, *listed.all_dropped().remarks()],
        doubt=doubt,
        unknown=sorted(unknown),
        rows=rows,
    )


def _contexts(missing: Iterable[Instance], peer: PeerKnowledge) -> list[list[Proposal]]:
    pairs: dict[str, dict[str, None]] = {}
    for instance in missing:
        listed = [instance.listed_syntax] if instance.listed_syntax else []
        for sop_class in (instance.sop_class,) if instance.sop_class else likely_classes(instance.modality, ()):
            pairs.setdefault(sop_class, {}).update(dict.fromkeys(peer.syntaxes(sop_class, listed)))
    return pack({sop_class: tuple(syntaxes) for sop_class, syntaxes in pairs.items()})
