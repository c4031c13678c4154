"""The strategies for asking for what is missing, from the planned one down to the fall-backs.

Each strategy yields passes: presentation contexts, and the requests to make with them. It is asked again
what is missing before each pass, so it yields only what is still needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from airflow_dicom_get.config.options import GetOptions
from airflow_dicom_get.dicom.syntaxes import UNCOMPRESSED, candidates
from airflow_dicom_get.engine.contexts import (
    ROOM,
    PeerKnowledge,
    bins_for,
    common_classes,
    likely_classes,
    other_classes,
    pack,
    pairs_of,
)
from airflow_dicom_get.engine.requests import MAX_LIST, Request, by_series, lists_of
from airflow_dicom_get.engine.state import StudyState
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.records import Instance
from airflow_dicom_get.vocabulary import DONE, SOURCE_REFUSED


class Situation(NamedTuple):
    """What a strategy decides on."""

    state: StudyState
    peer: PeerKnowledge
    options: GetOptions

    def guess(self, instance: Instance) -> tuple[str, ...]:
        """The classes in which an instance of unknown class is asked for first: those that are wanted, if some are."""
        return tuple(self.state.sop_classes or ()) or likely_classes(instance.modality, self.state.scope.sop_classes)


Passes = Iterator[tuple[list[Proposal], list[Request]]]

_ASK_SINGLY = 200
"""Missing instances up to which each is asked for alone."""
_LEAST_SHARE = 16
"""Instances below which a series is not cut for several associations."""


def as_planned(at: Situation, left: Sequence[Instance]) -> Passes:
    """Each class in exactly the listed syntaxes, else in all it may have; unknown classes by modality."""
    known = [x for x in left if x.sop_class is not None]
    unknown = [x for x in left if x.sop_class is None]
    bins = pack(pairs_of(known, at.peer))
    for proposals in bins:
        classes = {p.abstract_syntax for p in proposals}
        mine = [x for x in known if x.sop_class in classes]
        yield proposals, _requests(at, mine, split=len(bins) > 1 or bool(unknown))
    for target in known:
        if target.state is None and at.peer.refuses_class(str(target.sop_class)):
            at.state.not_received(
                target, "class_refused", "The source accepted no presentation context for its SOP class."
            )
    yield from _guessed(at, unknown)


def _requests(at: Situation, targets: Sequence[Instance], *, split: bool = False) -> list[Request]:
    """A SERIES request where all of a series is wanted; UID lists where not, or where ``split`` asks."""
    assert at.state.listing is not None
    sizes = Counter(x.series for x in at.state.listing.instances.values())
    partial = at.state.scope.instances is not None or at.state.sop_classes is not None
    partial = partial or any(f.level == "IMAGE" for f in at.state.scope.filters)
    several = at.options.associations > 1
    # A series that is asked for whole cannot be divided later: it should be a small part of the work.
    share = max(len(targets) // (4 * at.options.associations), _LEAST_SHARE) if several else len(targets)
    # They would be asked for whole afterwards, and come twice.
    suspects = at.state.listing.doubts(at.state.counted).of_series
    requests: list[Request] = []
    for series, part in by_series(targets).items():
        whole = len(part) == sizes[series] and not partial and not split
        if whole and (len(part) <= share or series in suspects):
            requests.append(Request("SERIES", series, part))
        else:
            requests += _lists(at, part)
    return requests


def _lists(at: Situation, targets: Sequence[Instance], size: int = MAX_LIST) -> list[Request]:
    return lists_of(targets, size if at.peer.takes_lists else 1)


def _guessed(at: Situation, unknown: Sequence[Instance]) -> Passes:
    """Instances whose class the source does not tell: the likely classes of each series."""
    groups: dict[tuple[str, ...], list[Instance]] = {}
    for x in unknown:
        groups.setdefault(at.guess(x), []).append(x)
    merged = tuple(dict.fromkeys(uid for classes in groups for uid in classes))
    if len(groups) > 1 and len(pack({c: at.peer.syntaxes(c) for c in merged})) == 1:
        named = [x for classes, part in groups.items() if classes for x in part]
        groups = {merged: named, (): groups.get((), [])}
    for classes, part in groups.items():
        classes = classes or common_classes()
        _tried(at, part, classes)
        for proposals in pack({c: at.peer.syntaxes(c) for c in classes}):
            yield proposals, _requests(at, _todo(part))


def _tried(at: Situation, targets: Iterable[Instance], classes: Iterable[str]) -> None:
    """Note in which classes the instances of unknown class of a series were asked for."""
    for series in {x.series for x in targets}:
        at.state.tried_classes[series].update(classes)


def _todo(targets: Iterable[Instance]) -> list[Instance]:
    return [x for x in targets if x.state not in DONE]


def ladder(at: Situation, left: Sequence[Instance]) -> Passes:
    """One compressed syntax at a time: some sources take the first context of a class and then fail."""
    targets = [x for x in left if x.listed_syntax is None and x.reason != "class_refused"]
    classes: dict[str, None] = {}
    for x in targets:
        guesses = (x.sop_class,) if x.sop_class else at.guess(x)
        classes.update(dict.fromkeys(guesses or tuple(at.state.tried_classes[x.series])))
    syntaxes = dict.fromkeys(
        syntax for c in classes for syntax in candidates(c) if syntax not in UNCOMPRESSED and at.peer.accepts(c, syntax)
    )
    for syntax in syntaxes:
        proposals = [Proposal(c, syntax) for c in classes if at.peer.accepts(c, syntax)]
        yield proposals[:ROOM], _lists(at, _todo(targets))


def every_class(at: Situation, left: Sequence[Instance]) -> Passes:
    """Instances of unknown class that no likely class has brought: every class there is, the likely ones first."""
    targets = [x for x in left if x.sop_class is None]
    if targets:
        likely = {c for x in targets for c in likely_classes(x.modality, at.state.scope.sop_classes)}
        tried = set.intersection(*(at.state.tried_classes[x.series] for x in targets))
        others = sorted(other_classes(tried), key=lambda c: c not in likely)
        for proposals in pack({c: at.peer.syntaxes(c) for c in others}):
            _tried(at, targets, {p.abstract_syntax for p in proposals})
            yield proposals, _lists(at, _todo(targets))


def contexts_for(at: Situation, targets: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Instance]]]:
    """All contexts that the targets may need, known classes and likely ones, with those they serve."""
    for proposals in bins_for(targets, at.peer, at.guess):
        classes = {p.abstract_syntax for p in proposals}
        yield proposals, [x for x in targets if x.sop_class is None or x.sop_class in classes]


def singly(at: Situation, left: Sequence[Instance]) -> Passes:
    """A few that lists did not bring, each alone."""
    targets = [x for x in left if x.reason not in SOURCE_REFUSED]
    if len(targets) <= _ASK_SINGLY:
        for proposals, part in contexts_for(at, targets):
            yield proposals, lists_of(_todo(part), 1)


def whole_series(at: Situation, left: Sequence[Instance]) -> Passes:
    """Series of which nothing came, asked for whole: the source may not know the IMAGE level."""
    assert at.state.listing is not None
    if at.state.scope.instances is not None:
        return
    came = {x.series for x in at.state.listing.instances.values() if x.state in DONE}
    targets = [x for x in left if x.series not in came and x.reason != "class_refused"]
    for proposals, part in contexts_for(at, targets):
        yield proposals, [Request("SERIES", series, xs) for series, xs in by_series(_todo(part)).items()]


def whole_study(at: Situation, left: Sequence[Instance]) -> Passes:
    """A study of which nothing came, asked for whole."""
    assert at.state.listing is not None
    if not at.state.scope.whole_study or any(x.state in DONE for x in at.state.listing.instances.values()):
        return
    for proposals, part in contexts_for(at, [x for x in left if x.reason != "class_refused"]):
        yield proposals, [Request("STUDY", None, todo)] if (todo := _todo(part)) else []


STRATEGIES: tuple[tuple[str, Callable[[Situation, Sequence[Instance]], Passes]], ...] = (
    ("in their listed or likely transfer syntaxes", as_planned),
    ("one compressed transfer syntax at a time", ladder),
    ("in every SOP class", every_class),
    ("one instance at a time", singly),
    ("as whole series", whole_series),
    ("as a whole study", whole_study),
)
