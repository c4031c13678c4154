"""Which presentation contexts to propose: one transfer syntax each, at most 127 beside the C-GET's own.

A context that lists several transfer syntaxes loses bit-exactness on every server that was tried, and
so does leaving a syntax out: some servers then convert.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from airflow_dicom_get.dicom.syntaxes import (
    EXPLICIT_LE,
    UNCOMPRESSED,
    all_storage_classes,
    candidates,
    classes_of_modality,
)
from airflow_dicom_get.engine.profile import Profile
from airflow_dicom_get.net.acse import MAX_CONTEXTS, Accepted, Proposal
from airflow_dicom_get.records import Instance

log = logging.getLogger(__name__)

ROOM = MAX_CONTEXTS - 1
_COMMON = 15
_DETAILS = re.compile(r" (?:\(|with |Image |Main |High )|/|,")
"""Where the name of a transfer syntax goes into details: profile, level, process."""


class PeerKnowledge:
    """What the associations of a run have taught about the source. Thread-safe."""

    def __init__(self, transfer_syntaxes: Sequence[str] | None = None, profile: Profile | None = None) -> None:
        self._profile = profile
        self._mutex = threading.Lock()
        self._allowed = frozenset(transfer_syntaxes) if transfer_syntaxes else None
        self._accepted: set[Proposal] = set()
        self._refused: set[Proposal] = set()
        self.takes_lists = profile is None or profile.takes_lists is not False
        """Whether UID lists work; some sources take single UIDs only."""
        self.converts = profile.converts if profile is not None else None
        """Whether it converts between uncompressed encodings, as far as a probe could tell."""

    def learn(self, accepted: Accepted, proposals: Sequence[Proposal]) -> None:
        """Remember what an association accepted and refused; ``proposals`` as proposed, the C-GET's own first."""
        with self._mutex:
            if self._profile is not None and accepted.implementation != self._profile.implementation:
                log.info("the node is not the implementation that was probed; its profile is not used")
                self._profile = self.converts = None
            for index, proposal in enumerate(proposals):
                (self._accepted if 2 * index + 1 in accepted.contexts else self._refused).add(proposal)

    def syntaxes(self, sop_class: str, listed: Iterable[str] = ()) -> tuple[str, ...]:
        """The syntaxes to propose for a class: exactly the listed ones if given, else all that it may have.

        Left out is what this source refused for this class, and what it refused for every class.
        """
        wanted = tuple(dict.fromkeys(listed)) or candidates(sop_class)
        with self._mutex:
            taken = {p.transfer_syntax for p in self._accepted}
            dropped = {p.transfer_syntax for p in self._refused} - taken
            own = {p.transfer_syntax for p in self._refused if p.abstract_syntax == sop_class}
        return tuple(
            syntax
            for syntax in wanted
            if syntax not in dropped and syntax not in own and (self._allowed is None or syntax in self._allowed)
        )

    def accepts(self, sop_class: str, syntax: str) -> bool:
        """Whether the source accepted this pair before."""
        return Proposal(sop_class, syntax) in self._accepted

    def on_compression(self, sop_class: str | None) -> str:
        """What the source accepted of the compressed syntaxes that were offered; empty where it accepted all.

        An instance that it stores in one of the others cannot be sent. ``sop_class`` None stands for any class.
        """
        with self._mutex:
            taken, refused = (
                {
                    p.transfer_syntax
                    for p in proposals
                    if p.transfer_syntax not in UNCOMPRESSED and sop_class in (None, p.abstract_syntax)
                }
                for proposals in (self._accepted, self._refused)
            )
        refused -= taken
        if not refused:
            return ""
        if taken:
            return f"Of the compressed transfer syntaxes it accepted {_names(taken)}, and refused {_names(refused)}."
        return (
            f"It accepted none of the compressed transfer syntaxes offered ({_names(refused)}), "
            "so it cannot send an instance that it stores compressed."
        )

    def refuses_class(self, sop_class: str) -> bool:
        """Whether everything that was proposed for the class was refused."""
        with self._mutex:
            return any(p.abstract_syntax == sop_class for p in self._refused) and not any(
                p.abstract_syntax == sop_class for p in self._accepted
            )


def _names(syntaxes: Iterable[str]) -> str:
    """Short names of transfer syntaxes, in the order of their UIDs."""
    from pydicom.uid import UID

    names = (UID(uid).name.removeprefix("Fragmentable ") for uid in sorted(syntaxes))
    return ", ".join(dict.fromkeys(_DETAILS.split(name)[0] for name in names))


def pack(pairs: Mapping[str, Sequence[str]], room: int = ROOM) -> list[list[Proposal]]:
    """Put the syntaxes of each class into as few associations as it takes, a class's together where they fit."""
    bins: list[list[Proposal]] = []
    for sop_class, syntaxes in pairs.items():
        proposals = [Proposal(sop_class, syntax) for syntax in syntaxes]
        for start in range(0, len(proposals), room):
            part = proposals[start : start + room]
            target = next((b for b in bins if len(b) + len(part) <= room), None)
            if target is None:
                bins.append(target := [])
            target += part
    return bins


def with_other_classes(proposals: Sequence[Proposal]) -> list[Proposal]:
    """These, and as far as there is room a context for each other storage class, in explicit VR little endian.

    Some sources count, and send, only what they have a context for: then what is not listed is not missed.
    """
    others = other_classes(p.abstract_syntax for p in proposals)
    return [*proposals, *(Proposal(uid, EXPLICIT_LE) for uid in others)][: max(ROOM, len(proposals))]


def pairs_of(instances: Iterable[Instance], peer: PeerKnowledge) -> dict[str, tuple[str, ...]]:
    """Syntaxes to propose by class, for instances whose class is known."""
    listed: dict[str, dict[str, None]] = {}
    open_ended: set[str] = set()
    for instance in instances:
        sop_class = instance.sop_class
        assert sop_class is not None
        syntaxes = listed.setdefault(sop_class, {})
        if instance.listed_syntax:
            syntaxes[instance.listed_syntax] = None
        else:
            open_ended.add(sop_class)
    return {
        sop_class: peer.syntaxes(sop_class, () if sop_class in open_ended else syntaxes)
        for sop_class, syntaxes in listed.items()
    }


def likely_classes(modality: str | None, study_classes: Sequence[str]) -> tuple[str, ...]:
    """Classes that an instance of unknown class may have: those of its study if told, else those of its modality."""
    return tuple(study_classes) or classes_of_modality(modality)


def common_classes() -> tuple[str, ...]:
    """Classes to try where nothing at all is known of a series."""
    return all_storage_classes()[:_COMMON]


def bins_for(
    targets: Iterable[Instance], peer: PeerKnowledge, guess: Callable[[Instance], Sequence[str]]
) -> list[list[Proposal]]:
    """All contexts that instances may need, packed: the known class of each, or those that ``guess`` gives."""
    targets = list(targets)
    pairs = pairs_of([x for x in targets if x.sop_class is not None], peer)
    for x in targets:
        for sop_class in guess(x) if x.sop_class is None else ():
            pairs.setdefault(sop_class, peer.syntaxes(sop_class))
    return pack(pairs)


def other_classes(tried: Iterable[str]) -> tuple[str, ...]:
    """Every storage class that was not tried."""
    done = frozenset(tried)
    return tuple(uid for uid in all_storage_classes() if uid not in done)
