"""The run of one study: list, get what is missing, list again, until nothing changes."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import UNCOMPRESSED, all_storage_classes, candidates
from airflow_dicom_get.engine.contexts import PeerKnowledge, likely_classes, other_classes, pack, pairs_of
from airflow_dicom_get.engine.events import Events
from airflow_dicom_get.engine.fetch import MAX_LIST, Pass, Request, lists_of
from airflow_dicom_get.engine.listing import Listing, list_study
from airflow_dicom_get.engine.resolve import FIND_PROPOSALS, Finder, Scope
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import Cancelled, DicomGetError, InvalidQuery, NotNegotiated, OperationFailed
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.base import Held, Sink, Taken

log = logging.getLogger(__name__)

MAX_ROUNDS = 8
"""Rounds of list and get before a study counts as still growing."""
_ASK_SINGLY = 200
"""Missing instances up to which each is asked for alone."""
_LOCAL = frozenset(
    {
        "uid_mismatch",
        "bad_uid",
        "unparsable",
        "empty_dataset",
        "different_content",
        "destination_full",
        "destination_error",
        "destination_refused",
    }
)
"""Reasons that asking in another way does not mend."""


@dataclass(slots=True)
class Settings:
    """What a study's run needs to know of the options."""

    query_model: str = "StudyRoot"
    associations: int = 1
    retries: int = 5
    resume: bool = True
    require_exact: bool = False
    sop_classes: frozenset[str] | None = None
    tag_numbers: frozenset[int] = frozenset()
    decode_tags: Callable[[dict[int, bytes], str], tuple[str | None, ...]] | None = None
    before_object: Callable[[], str | None] = field(default=lambda: None)
    """Asked after each object; a text stops the run for that reason."""


class StudyRun:
    """State and steps of one study's retrieval. Its receivers may be several threads."""

    def __init__(
        self, scope: Scope, source: Source, sink: Sink, peer: PeerKnowledge, events: Events, settings: Settings
    ) -> None:
        self.scope, self.source, self.sink, self.peer, self.events = scope, source, sink, peer, events
        self.settings = settings
        self.query_model, self.retries = settings.query_model, settings.retries
        self.require_exact, self.tag_numbers = settings.require_exact, settings.tag_numbers
        self.instances: dict[str, Instance] = {}
        """Every instance of the study that was ever listed, held or sent, by SOP Instance UID."""
        self.listing: Listing | None = None
        self.lists_agree = False
        self.unlisted_uids: set[str] = set()
        self.rounds = 0
        self.errors: list[DicomGetError] = []
        self.strays: Counter[str] = Counter()
        """Objects that were refused and belong to no row, by reason."""
        self.remarks: Counter[str] = Counter()
        self.stop_reason: str | None = None
        self._mutex = threading.Lock()
        self._tried_classes: set[str] = set()
        self._moving = False

    # --- called by receivers and passes --------------------------------------------------------

    def instance(self, sop: str) -> Instance | None:
        """The record of an instance."""
        return self.instances.get(sop)

    def unlisted(self, series: str, sop: str, sop_class: str) -> Instance:
        """A record for an instance that was sent and is not listed."""
        with self._mutex:
            self.unlisted_uids.add(sop)
            return self.instances.setdefault(sop, Instance(self.scope.study, series, sop, sop_class))

    def decode_tags(self, values: dict[int, bytes], syntax: str) -> tuple[str | None, ...]:
        """The values of the ``tags`` option as text."""
        assert self.settings.decode_tags is not None
        return self.settings.decode_tags(values, syntax)

    def is_done(self, instance: Instance) -> bool:
        """Whether nothing more is to be asked for this instance."""
        return instance.state in ("stored", "forwarded", "held", "conflict")

    def refused_here(self, instance: Instance) -> bool:
        """Whether we refused it in this round, for a reason that asking again does not mend."""
        return instance.attempt == self.rounds and instance.reason in _LOCAL

    def failed(self, instance: Instance, reason: str, error: str) -> None:
        """Mark an instance that did not come."""
        instance.state, instance.reason, instance.error = "missing", reason, error
        instance.attempt = self.rounds

    def max_objects(self, targets: int) -> int:
        """Objects that one C-GET may bring: twice the plan and a hundred."""
        return 2 * max(targets, len(self.instances)) + 100 if self.listing is not None else 1_000_000

    def taken(self, uid: str, instance: Instance | None, taken: Taken, size: int) -> None:
        """An object was answered."""
        record = self.instances.get(uid)
        if taken.status == s.SUCCESS:
            assert instance is not None and record is not None
            new = instance is record
            if new:
                record.state, record.reason, record.error = "stored", None, None
                record.attempt = self.rounds
            self.events.arrived(record, uid, None, size, new=new)
            return
        if record is None:
            self.strays[taken.reason or "refused"] += 1
            record = Instance(self.scope.study, "", uid)
        elif record.state not in ("stored", "held") or taken.reason == "different_content":
            record.state = "conflict" if taken.reason == "different_content" else "failed"
            record.reason, record.error, record.dimse_status = taken.reason, taken.error, taken.status
            record.attempt = self.rounds
        self.events.arrived(record, uid, taken.error or taken.reason, 0, new=False)
        if taken.reason == "destination_full":
            self.stop("disk_full")

    def answered(self) -> None:
        """After each answer: note confirmations, hold the limits."""
        self._confirm(wait=False)
        reason = self.settings.before_object()
        if reason is not None:
            self.stop(reason)

    def stop(self, reason: str) -> None:
        """End the run in an orderly way for a reason of its own."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self.source.cancel.cancel(reason)

    def remark(self, error: DicomGetError) -> None:
        """Keep an error that was got over."""
        self.remarks[type(error).__name__] += 1
        log.info("%s", error.message)

    def _confirm(self, wait: bool) -> None:
        for instance, error in self.sink.confirmations(wait=wait):
            if error is not None:
                instance.state, instance.reason = "failed", "destination_error"
                instance.error = f"Taken, then not kept: {error}"

    # --- the rounds ----------------------------------------------------------------------------

    def execute(self) -> None:
        """Run the study to its end. Errors of peer and destination end up in :attr:`errors`."""
        try:
            if self.scope.listed:
                self.listing = self._list_anew()
            self._take_inventory()
            if self.listing is None:
                self._without_list()
            else:
                self._with_list()
        except Cancelled as error:
            if self.stop_reason is None:
                self.errors.append(error)
        except DicomGetError as error:
            self.errors.append(error)
        finally:
            try:
                self._confirm(wait=True)
            except DicomGetError as error:
                self.errors.append(error)

    def _with_list(self) -> None:
        while True:
            missing = self.missing()
            before = self.events.taken
            if missing:
                self._fetch(missing)
                self._confirm(wait=True)
            else:
                self.rounds = max(self.rounds, 1)
            new = self._list_anew()
            if new is None:
                return
            assert self.listing is not None
            same = new.instances.keys() == self.listing.instances.keys()
            self.lists_agree = same
            self.listing = new
            self._adopt_inventory()
            left = self.missing()
            progress = self.events.taken > before
            if same and (not left or not progress):
                return
            if self.rounds >= MAX_ROUNDS:
                self._moving = not same
                return
            if left:
                log.info(
                    "%d instances are missing after round %d%s",
                    len(left),
                    self.rounds,
                    "" if same else "; the list has changed",
                )

    def still_growing(self) -> bool:
        """Whether the rounds were spent while the list still changed."""
        return self._moving

    def missing(self) -> list[Instance]:
        """Listed, not held, and not given up."""
        assert self.listing is not None
        return [x for x in self.listing.instances.values() if not self.is_done(x)]

    def _list(self, finder: Finder) -> Listing | None:
        try:
            listing = list_study(finder, self.scope, self.instances)
        except (NotNegotiated, OperationFailed) as error:
            log.warning("study %s cannot be listed: %s", self.scope.study, error)
            self.remark(error)
            return None
        wanted = self.settings.sop_classes
        if wanted is not None:
            listing.instances = {
                uid: x for uid, x in listing.instances.items() if x.sop_class is None or x.sop_class in wanted
            }
            listing.related_instances = None
        for uid, instance in listing.instances.items():
            self.instances.setdefault(uid, instance)
        return listing

    def _list_anew(self) -> Listing | None:
        """List over an association of its own."""
        return self.source.with_retries(self.retries, FIND_PROPOSALS, lambda a: self._list(Finder(a)))

    # --- what is held --------------------------------------------------------------------------

    def _take_inventory(self) -> None:
        self._inventory: dict[str, Held] = self.sink.inventory(self.scope.study) if self.settings.resume else {}
        if self.listing is not None:
            self._adopt_inventory()
            self.events.planned(len(self.missing()))

    def _adopt_inventory(self) -> None:
        """Mark what the list names and the destination holds."""
        assert self.listing is not None
        for uid, instance in self.listing.instances.items():
            held = self._inventory.get(uid)
            if held is None or instance.state is not None or held.series != instance.series:
                continue
            instance.state, instance.attempt = "held", 0
            instance.sop_class = held.sop_class or instance.sop_class
            instance.syntax, instance.uri, instance.bytes, instance.sha256 = (
                held.syntax,
                held.uri,
                held.bytes,
                held.sha256,
            )
            instance.dataset_offset = held.dataset_offset
            instance.dataset_bytes = held.bytes - held.dataset_offset
            instance.modality = instance.modality or held.modality
            if instance.listed_syntax:
                instance.exactness = "as_listed" if held.syntax == instance.listed_syntax else "converted"

    def held_and_gone(self) -> Iterator[Instance]:
        """Held of the scope, and no longer listed."""
        if self.listing is None or not self.scope.whole_study:
            return
        for uid, held in self._inventory.items():
            if uid not in self.listing.instances and uid not in self.instances:
                instance = Instance(self.scope.study, held.series, uid, held.sop_class)
                instance.syntax, instance.uri, instance.bytes, instance.sha256 = (
                    held.syntax,
                    held.uri,
                    held.bytes,
                    held.sha256,
                )
                instance.dataset_offset, instance.dataset_bytes = held.dataset_offset, held.bytes - held.dataset_offset
                instance.modality, instance.attempt = held.modality, 0
                yield instance

    # --- the passes ----------------------------------------------------------------------------

    def _fetch(self, missing: Sequence[Instance]) -> None:
        """Ask for these in one way after the other, each only for what is then still missing."""
        for name, ways in (
            ("as planned", self._as_planned),
            ("one compressed syntax at a time", self._ladder),
            ("other SOP classes", self._other_classes),
            ("one by one", self._singly),
            ("by series", self._by_series),
            ("whole study", self._by_study),
        ):
            left = [x for x in missing if not self.is_done(x) and x.reason not in _LOCAL]
            if not left:
                return
            started = False
            for proposals, requests in ways(left):
                if not requests or not proposals:
                    continue
                if not started:
                    started = True
                    self.rounds += 1
                    log.info("round %d (%s): %d instances of study %s", self.rounds, name, len(left), self.scope.study)
                Pass(self, proposals, requests).execute(self.settings.associations)

    def _requests(self, targets: Sequence[Instance], *, split: bool = False) -> list[Request]:
        """A SERIES request where all of a series is wanted, UID lists where not, or where ``split`` asks."""
        assert self.listing is not None
        sizes: Counter[str] = Counter(x.series for x in self.listing.instances.values())
        by_series: dict[str, list[Instance]] = {}
        for target in targets:
            by_series.setdefault(target.series, []).append(target)
        share = len(targets) // (2 * self.settings.associations) if self.settings.associations > 1 else len(targets)
        requests: list[Request] = []
        for series, part in by_series.items():
            info = self.listing.series.get(series)
            whole = len(part) == sizes[series] and (info is None or info.related_instances in (None, len(part)))
            scoped = self.scope.instances is not None or any(f.level == "IMAGE" for f in self.scope.filters)
            filtered = scoped or self.settings.sop_classes is not None
            if whole and not filtered and not split and len(part) <= max(share, 50):
                requests.append(Request("SERIES", series, part))
            else:
                size = min(MAX_LIST, max(share, 50)) if self.settings.associations > 1 else MAX_LIST
                requests += lists_of(part, size if self.peer.takes_lists else 1)
        return requests

    def _as_planned(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        known = [x for x in left if x.sop_class is not None]
        unknown = [x for x in left if x.sop_class is None]
        bins = pack(pairs_of(known, self.peer))
        for proposals in bins:
            classes = {p.abstract_syntax for p in proposals}
            mine = [x for x in known if x.sop_class in classes]
            yield proposals, self._requests(mine, split=len(bins) > 1 or bool(unknown))
        for target in known:
            if not self.is_done(target) and self.peer.refuses_class(str(target.sop_class)) and target.state is None:
                self.failed(target, "class_refused", "The source accepted no context for its SOP class.")
        yield from self._guessed(unknown)

    def _guessed(self, unknown: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        """Instances whose class the source does not tell: the likely classes of each series."""
        groups: dict[tuple[str, ...], list[Instance]] = {}
        for x in unknown:
            groups.setdefault(likely_classes(x.modality, self.scope.sop_classes), []).append(x)
        merged = tuple(dict.fromkeys(uid for classes in groups if classes for uid in classes))
        if merged and len(groups) > 1 and len(pack({c: self.peer.syntaxes(c) for c in merged})) == 1:
            groups = {merged: [x for classes, part in groups.items() if classes for x in part], (): groups.get((), [])}
        for classes, part in groups.items():
            classes = classes or all_storage_classes()[:15]
            self._tried_classes.update(classes)
            for proposals in pack({c: self.peer.syntaxes(c) for c in classes}):
                todo = [x for x in part if not self.is_done(x)]
                if todo:
                    yield proposals, self._requests(todo)

    def _ladder(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        """One compressed syntax at a time: some sources take the first context of a class and then fail."""
        targets = [x for x in left if x.listed_syntax is None and x.reason != "class_refused"]
        classes: dict[str, None] = {}
        for x in targets:
            guesses = (x.sop_class,) if x.sop_class else likely_classes(x.modality, self.scope.sop_classes)
            classes.update(dict.fromkeys(guesses or tuple(self._tried_classes)))
        syntaxes = dict.fromkeys(
            syntax
            for c in classes
            for syntax in candidates(c)
            if syntax not in UNCOMPRESSED and self.peer.accepts(c, syntax)
        )
        for syntax in syntaxes:
            todo = [x for x in targets if not self.is_done(x)]
            if not todo:
                return
            proposals = [Proposal(c, syntax) for c in classes if self.peer.accepts(c, syntax)]
            yield proposals[:127], lists_of(todo, MAX_LIST if self.peer.takes_lists else 1)

    def _other_classes(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        """Instances of unknown class that no likely class has brought: every class there is."""
        targets = [x for x in left if x.sop_class is None]
        if not targets:
            return
        for proposals in pack({c: self.peer.syntaxes(c) for c in other_classes(self._tried_classes)}):
            todo = [x for x in targets if not self.is_done(x)]
            if not todo:
                return
            self._tried_classes.update(p.abstract_syntax for p in proposals)
            yield proposals, lists_of(todo, MAX_LIST if self.peer.takes_lists else 1)

    def _last_contexts(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Instance]]]:
        known = [x for x in left if x.sop_class is not None]
        pairs = pairs_of(known, self.peer)
        for x in left:
            if x.sop_class is None:
                for c in likely_classes(x.modality, self.scope.sop_classes):
                    pairs.setdefault(c, self.peer.syntaxes(c))
        for proposals in pack(pairs):
            classes = {p.abstract_syntax for p in proposals}
            yield (
                proposals,
                [x for x in left if not self.is_done(x) and (x.sop_class in classes or x.sop_class is None)],
            )

    def _singly(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        targets = [x for x in left if x.reason not in ("class_refused", "refused_by_source")]
        if len(targets) <= _ASK_SINGLY:
            for proposals, part in self._last_contexts(targets):
                yield proposals, lists_of(part, 1)

    def _by_series(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        """Series of which nothing came: asked for whole, in case the source takes no IMAGE level."""
        assert self.listing is not None
        came = {x.series for x in self.listing.instances.values() if self.is_done(x)}
        targets = [x for x in left if x.series not in came and x.reason != "class_refused"]
        if self.scope.instances is not None:
            return
        for proposals, part in self._last_contexts(targets):
            by_series: dict[str, list[Instance]] = {}
            for x in part:
                by_series.setdefault(x.series, []).append(x)
            yield proposals, [Request("SERIES", series, xs) for series, xs in by_series.items()]

    def _by_study(self, left: Sequence[Instance]) -> Iterator[tuple[list[Proposal], list[Request]]]:
        """A study of which nothing came: asked for whole."""
        assert self.listing is not None
        if not self.scope.whole_study or any(self.is_done(x) for x in self.listing.instances.values()):
            return
        targets = [x for x in left if x.reason != "class_refused"]
        for proposals, part in self._last_contexts(targets):
            if part:
                yield proposals, [Request("STUDY", None, part)]

    # --- without a list ------------------------------------------------------------------------

    def _without_list(self) -> None:
        """No list is to be had: ask for the scope as it was given, in the common classes first."""
        self.rounds = 1
        scope = self.scope
        requests: list[Request] = []
        if scope.instances and scope.series and len(scope.series) == 1:
            (series,) = scope.series
            wanted = [self.unlisted(series, sop, "") for sop in sorted(scope.instances)]
            for x in wanted:
                x.sop_class = None
            requests = lists_of([x for x in wanted if not self.is_done(x)])
        elif scope.series and not scope.instances:
            requests = [Request("SERIES", series) for series in sorted(scope.series)]
        elif not scope.series and not scope.instances:
            requests = [Request("STUDY", None)]
        if not requests:
            raise InvalidQuery(
                f"Study {scope.study}: the PACS cannot list, and single instances need their one series.",
                hint="Give the Series Instance UID with the SOP Instance UIDs, or ask for the series.",
                study=scope.study,
            )
        classes = self.settings.sop_classes or all_storage_classes()
        for proposals in pack({c: self.peer.syntaxes(c) for c in classes}):
            work = Pass(self, proposals, [Request(r.level, r.series, list(r.targets)) for r in requests])
            work.execute(self.settings.associations)
            if all(o.status == s.SUCCESS and not o.failed and not o.remaining for o in work.outcomes):
                return
