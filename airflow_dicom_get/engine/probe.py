"""Find out by a few small requests what a source accepts and how it behaves."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import EXPLICIT_LE, IMPLICIT_LE, UNCOMPRESSED
from airflow_dicom_get.engine.contexts import likely_classes, pack
from airflow_dicom_get.engine.listing import Listing, list_study
from airflow_dicom_get.engine.profile import Profile
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import AssociationRejected, DicomGetError, InvalidQuery
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.echo import VERIFICATION
from airflow_dicom_get.net.find import FIND_PROPOSALS
from airflow_dicom_get.net.get import STUDY_ROOT_GET, Most, StoreRequest, c_get
from airflow_dicom_get.records import Instance

log = logging.getLogger(__name__)

_TRIES = 3
"""Instances that are fetched at most to find one that is not compressed."""
_UIDS = frozenset({h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})


class _Sampler:
    """Takes objects without keeping them: their syntaxes and digests (an :class:`net.get.ObjectReceiver`)."""

    def __init__(self) -> None:
        self.came: dict[str, tuple[str, bytes]] = {}
        self._request: StoreRequest | None = None
        self._digest = hashlib.sha256()

    def begin(self, request: StoreRequest) -> None:
        self._request, self._digest = request, hashlib.sha256()

    def data(self, view: memoryview, last: bool) -> bool:
        self._digest.update(view)
        return True

    def finish(self) -> int:
        assert self._request is not None
        self.came[self._request.sop_instance] = (self._request.syntax, self._digest.digest())
        return s.SUCCESS

    def answered(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def give_up(self, error: str) -> None:
        pass

    def refused(self, sop_instance: str, status: int) -> None:
        pass


def probe(source: Source, study: str, max_associations: int) -> Profile:
    """Look at one study: list it, and fetch a few of its instances without keeping them.

    Raises
    ------
    InvalidQuery
        The source does not list the study, or nothing in it.
    DicomGetError
        Whatever ends an association.
    """
    profile = Profile(
        node=str(source.peer),
        calling=source.peer.calling,
        probed_at=datetime.fromtimestamp(clock.now(), UTC).isoformat(timespec="seconds"),
    )
    with source.association(FIND_PROPOSALS) as association:
        profile.implementation = association.accepted.implementation
        scope = Scope(study)
        listing = list_study(Finder(association, source.cuts), scope, {})
    if not listing.instances:
        raise InvalidQuery(
            f"{source.node} lists no instance of study {study}.", hint="Give a study that the node holds.", study=study
        )
    rows = list(listing.instances.values())
    profile.counts = listing.has_counts()
    profile.tells_classes = all(x.sop_class is not None for x in rows)
    profile.tells_syntaxes = all(x.listed_syntax is not None for x in rows)
    profile.converts = _converts(source, profile, _samples(listing))
    profile.takes_lists = _takes_lists(source, profile, listing)
    profile.associations = _associations(source, max_associations)
    return profile


def _samples(listing: Listing) -> list[Instance]:
    """One instance of each series, those of small modalities and classes first."""
    first: dict[str, Instance] = {}
    for x in listing.instances.values():
        first.setdefault(x.series, x)
    return sorted(first.values(), key=lambda x: x.modality not in ("CT", "MR", "PT", "SR", "PR", "KO"))[:_TRIES]


def _classes(x: Instance) -> Sequence[str]:
    return (x.sop_class,) if x.sop_class else likely_classes(x.modality, ())


def _converts(source: Source, profile: Profile, samples: Sequence[Instance]) -> bool | None:
    """Fetch an instance with explicit VR proposed first, and with implicit VR first."""
    for x in samples:
        came = []
        for order in ((EXPLICIT_LE, IMPLICIT_LE), (IMPLICIT_LE, EXPLICIT_LE)):
            pairs = [Proposal(c, syntax) for c in _classes(x)[:50] for syntax in order]
            came.append(_fetch(source, profile, pairs, [x]).get(x.sop))
        one, other = came
        if one is not None and other is not None and one[0] in UNCOMPRESSED:
            return one != other
    return None


def _takes_lists(source: Source, profile: Profile, listing: Listing) -> bool | None:
    sizes = Counter(x.series for x in listing.instances.values())
    series = min((uid for uid, size in sizes.items() if size > 1), key=lambda uid: sizes[uid], default=None)
    if series is None:
        return None
    two = [x for x in listing.instances.values() if x.series == series][:2]
    from airflow_dicom_get.engine.contexts import PeerKnowledge

    peer = PeerKnowledge()
    bins = pack({c: peer.syntaxes(c, filter(None, [x.listed_syntax for x in two])) for c in _classes(two[0])})
    if not bins:  # it tells neither a class nor a modality that is known
        return None
    pairs = bins[0]
    came = _fetch(source, profile, pairs, two)
    if not came:  # nothing in a list; is it the list, or these?
        return False if _fetch(source, profile, pairs, two[:1]) else None
    return len(came) == len(two)


def _fetch(
    source: Source, profile: Profile, pairs: Sequence[Proposal], targets: Sequence[Instance]
) -> dict[str, tuple[str, bytes]]:
    """What came of a C-GET for these instances of one series."""
    sampler = _Sampler()
    proposals = [Proposal(STUDY_ROOT_GET, IMPLICIT_LE), *pairs]
    identifier = i.encode_identifier(
        {
            i.QUERY_RETRIEVE_LEVEL: "IMAGE",
            h.STUDY_INSTANCE_UID: targets[0].study,
            h.SERIES_INSTANCE_UID: targets[0].series,
            h.SOP_INSTANCE_UID: [x.sop for x in targets],
        },
        _UIDS,
    )
    with source.association(proposals, tuple(dict.fromkeys(p.abstract_syntax for p in pairs))) as association:
        for proposal in association.accepted.contexts.values():
            if proposal.abstract_syntax != STUDY_ROOT_GET:
                known = profile.accepted.setdefault(proposal.abstract_syntax, [])
                if proposal.transfer_syntax not in known:
                    known.append(proposal.transfer_syntax)
        c_get(
            association,
            STUDY_ROOT_GET,
            identifier,
            sampler,
            next_object=source.deadlines.next_object,
            most=Most(len(targets) + 10),
        )
    wanted = {x.sop for x in targets}
    return {sop: value for sop, value in sampler.came.items() if sop in wanted}


def _associations(source: Source, limit: int) -> int:
    """How many associations the source allows at a time, up to our own limit."""
    with ExitStack() as stack:
        for number in range(limit):
            try:
                stack.enter_context(source.association([Proposal(VERIFICATION, IMPLICIT_LE)]))
            except AssociationRejected as error:
                log.info("%s", error.message)
                return number
            except DicomGetError:
                return number
            clock.sleep(0.01)
    return limit
