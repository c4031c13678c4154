"""The ways to ask for what is missing, from the planned one down to the fall-backs.

Each way yields passes: presentation contexts, and the requests to make with them. It is asked again
what is missing before each pass, so it yields only what is still needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from airflow_dicom_get.dicom.syntaxes import UNCOMPRESSED, all_storage_classes, candidates
from airflow_dicom_get.engine.contexts import ROOM, likely_classes, other_classes, pack, pairs_of
from airflow_dicom_get.engine.worker import MAX_LIST, Request, lists_of
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.records import Instance
from airflow_dicom_get.vocabulary import SOURCE_REFUSED

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study import StudyRun

Passes = Iterator[tuple[list[Proposal], list[Request]]]

_COMMON = 15
"""Classes to try where nothing at all is known of a series."""
_ASK_SINGLY = 200
"""Missing instances up to which each is asked for alone."""
_LEAST_SHARE = 16
"""Instances below which a series is not cut for several associations."""


def as_planned(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """Each class in exactly the listed syntaxes, else in all it may have; unknown classes by modality."""
    known = [x for x in left if x.sop_class is not None]
    unknown = [x for x in left if x.sop_class is None]
    bins = pack(pairs_of(known, run.peer))
    for proposals in bins:
        classes = {p.abstract_syntax for p in proposals}
        mine = [x for x in known if x.sop_class in classes]
        yield proposals, _requests(run, mine, split=len(bins) > 1 or bool(unknown))
    for target in known:
        if target.state is None and run.peer.refuses_class(str(target.sop_class)):
            run.failed(target, "class_refused", "The source accepted no context for its SOP class.")
    yield from _guessed(run, unknown)


def _requests(run: StudyRun, targets: Sequence[Instance], *, split: bool = False) -> list[Request]:
    """A SERIES request where all of a series is wanted; UID lists where not, or where ``split`` asks."""
    assert run.listing is not None
    sizes = Counter(x.series for x in run.listing.instances.values())
    partial = run.scope.instances is not None or run.settings.sop_classes is not None
    partial = partial or any(f.level == "IMAGE" for f in run.scope.filters)
    several = run.settings.associations > 1
    # A series that is asked for whole cannot be divided later: it should be a small part of the work.
    share = max(len(targets) // (4 * run.settings.associations), _LEAST_SHARE) if several else len(targets)
    suspects = run.listing.perhaps_cut()  # they would be asked for whole afterwards, and come twice
    requests: list[Request] = []
    for series, part in by_series(targets).items():
        whole = len(part) == sizes[series] and not partial and not split
        if whole and (len(part) <= share or series in suspects):
            requests.append(Request("SERIES", series, part))
        else:
            requests += _lists(run, part)
    return requests


def _lists(run: StudyRun, targets: Sequence[Instance], size: int = MAX_LIST) -> list[Request]:
    return lists_of(targets, size if run.peer.takes_lists else 1)


def by_series(instances: Iterable[Instance]) -> dict[str, list[Instance]]:
    """Instances by Series Instance UID."""
    out: dict[str, list[Instance]] = {}
    for x in instances:
        out.setdefault(x.series, []).append(x)
    return out


def _guessed(run: StudyRun, unknown: Sequence[Instance]) -> Passes:
    """Instances whose class the source does not tell: the likely classes of each series."""
    groups: dict[tuple[str, ...], list[Instance]] = {}
    for x in unknown:
        groups.setdefault(likely_classes(x.modality, run.scope.sop_classes), []).append(x)
    merged = tuple(dict.fromkeys(uid for classes in groups for uid in classes))
    if len(groups) > 1 and len(pack({c: run.peer.syntaxes(c) for c in merged})) == 1:
        named = [x for classes, part in groups.items() if classes for x in part]
        groups = {merged: named, (): groups.get((), [])}
    for classes, part in groups.items():
        classes = classes or all_storage_classes()[:_COMMON]
        run.tried_classes.update(classes)
        for proposals in pack({c: run.peer.syntaxes(c) for c in classes}):
            yield proposals, _requests(run, _todo(run, part))


def _todo(run: StudyRun, targets: Iterable[Instance]) -> list[Instance]:
    return [x for x in targets if not run.is_done(x)]


def ladder(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """One compressed syntax at a time: some sources take the first context of a class and then fail."""
    targets = [x for x in left if x.listed_syntax is None and x.reason != "class_refused"]
    classes: dict[str, None] = {}
    for x in targets:
        guesses = (x.sop_class,) if x.sop_class else likely_classes(x.modality, run.scope.sop_classes)
        classes.update(dict.fromkeys(guesses or tuple(run.tried_classes)))
    syntaxes = dict.fromkeys(
        syntax
        for c in classes
        for syntax in candidates(c)
        if syntax not in UNCOMPRESSED and run.peer.accepts(c, syntax)
    )
    for syntax in syntaxes:
        proposals = [Proposal(c, syntax) for c in classes if run.peer.accepts(c, syntax)]
        yield proposals[:ROOM], _lists(run, _todo(run, targets))


def every_class(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """Instances of unknown class that no likely class has brought: every class there is."""
    targets = [x for x in left if x.sop_class is None]
    if targets:
        for proposals in pack({c: run.peer.syntaxes(c) for c in other_classes(run.tried_classes)}):
            run.tried_classes.update(p.abstract_syntax for p in proposals)
            yield proposals, _lists(run, _todo(run, targets))


def contexts_for(run: StudyRun, targets: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Instance]]]:
    """All contexts that the targets may need, known classes and likely ones, with those they serve."""
    pairs = pairs_of([x for x in targets if x.sop_class is not None], run.peer)
    for x in targets:
        if x.sop_class is None:
            for c in likely_classes(x.modality, run.scope.sop_classes):
                pairs.setdefault(c, run.peer.syntaxes(c))
    for proposals in pack(pairs):
        classes = {p.abstract_syntax for p in proposals}
        yield proposals, [x for x in targets if x.sop_class is None or x.sop_class in classes]


def singly(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """A few that lists did not bring, each alone."""
    targets = [x for x in left if x.reason not in SOURCE_REFUSED]
    if len(targets) <= _ASK_SINGLY:
        for proposals, part in contexts_for(run, targets):
            yield proposals, lists_of(_todo(run, part), 1)


def whole_series(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """Series of which nothing came, asked for whole: the source may not know the IMAGE level."""
    assert run.listing is not None
    if run.scope.instances is not None:
        return
    came = {x.series for x in run.listing.instances.values() if run.is_done(x)}
    targets = [x for x in left if x.series not in came and x.reason != "class_refused"]
    for proposals, part in contexts_for(run, targets):
        yield proposals, [Request("SERIES", series, xs) for series, xs in by_series(_todo(run, part)).items()]


def whole_study(run: StudyRun, left: Sequence[Instance]) -> Passes:
    """A study of which nothing came, asked for whole."""
    assert run.listing is not None
    if not run.scope.whole_study or any(run.is_done(x) for x in run.listing.instances.values()):
        return
    for proposals, part in contexts_for(run, [x for x in left if x.reason != "class_refused"]):
        yield proposals, [Request("STUDY", None, todo)] if (todo := _todo(run, part)) else []


WAYS: tuple[tuple[str, Callable[[StudyRun, Sequence[Instance]], Passes]], ...] = (
    ("as planned", as_planned),
    ("one compressed syntax at a time", ladder),
    ("every SOP class", every_class),
    ("one by one", singly),
    ("series whole", whole_series),
    ("study whole", whole_study),
)
