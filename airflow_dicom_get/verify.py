"""The verb ``verify``: compares what is listed, what is stored, and what the PACS lists."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.destination import (
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.config.groups import Deadlines, ForwardTarget, S3Config, Tls, UserIdentity
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import VerifyOptions
from airflow_dicom_get.dicom.header import walk_of
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.errors import (
    Cancelled,
    DeadlineExceeded,
    DicomGetError,
    InvalidOption,
    InvalidQuery,
    ListTooLong,
    NotNegotiated,
    OperationFailed,
    PeerError,
    SinkError,
    printable,
)
from airflow_dicom_get.lists.whole import doubt_remark
from airflow_dicom_get.manifest.files import MANIFESTS, without_links
from airflow_dicom_get.records import Instance, Key, Stored, Written
from airflow_dicom_get.result import html_table
from airflow_dicom_get.sinks.objects import (
    Listed,
    MissingError,
    Named,
    Opened,
    StoredObject,
    UnreadableError,
    UnusableError,
    load_listed,
    objects_below,
    objects_in,
    open_object,
)
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below
from airflow_dicom_get.vocabulary import CONTENT_IN_DOUBT, PRESENT, REASONS, Evidence, Verdict, noun

if TYPE_CHECKING:
    from pandas import DataFrame

    from airflow_dicom_get.engine.query import Query
    from airflow_dicom_get.lists.instances import InstanceList
    from airflow_dicom_get.manifest.scopes import Narrowed, Scopes
    from airflow_dicom_get.net.association import Cancels, CancelToken
    from airflow_dicom_get.net.peer import Peer

log = logging.getLogger(__name__)

SAME: Final = "="
NOT_THERE: Final = "+"
NOT_LISTED: Final = "-"
DIFFERENT: Final = "*"
UNREADABLE: Final = "!"
Symbol = Literal["=", "+", "-", "*", "!"]

_READERS = 4
_ASKED_AGAIN = 10.0
"""Seconds between two lists of a node that does not list all that it was given."""
_SHOWN = 10
"""Differences shown in a notebook; ``frame()`` has all."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One instance, as rclone's ``check`` would mark it.

    ``+`` is listed but not stored, ``-`` stored but not listed (told, and no reason to fetch anything), ``*`` stored
    with different content, ``!`` stored but not readable, or not possible to request, ``=`` the same.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    symbol: Symbol
    what: str

    def __str__(self) -> str:
        path = f"{self.study_instance_uid}/{self.series_instance_uid}/{self.sop_instance_uid}"
        return printable(f"{self.symbol} {path} {self.what}")


@dataclass(slots=True)
class Verification:
    """What a :func:`verify` found.

    Attributes
    ----------
    differences : list of Difference
        Everything that is not the same.
    counts : Counter
        Instances by symbol, ``=`` among them.
    uncompared : str or None
        Why a PACS could not be compared.
    unreachable : bool
        Whether that is because a node cannot be reached: another try may compare it.
    manifest_uri : str or None
        Where the manifest is: the input of a get that fetches what is missing or different.
    rows : list of Instance
        Its rows.
    in_part : int
        Studies of which the PACS was asked for a part alone: that which the manifest says that it is of.
    """

    differences: list[Difference] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    uncompared: str | None = None
    unreachable: bool = False
    errors: list[dict[str, Any]] = field(default_factory=list)
    manifest_uri: str | None = None
    plan_at: datetime | None = None
    rows: list[Instance] = field(default_factory=list, repr=False)
    written: Written | None = field(default=None, repr=False)
    """The manifest as it was written; None where it was not."""
    in_part: int = 0

    @property
    def differs(self) -> bool:
        """Whether a get would have something to fetch; what is stored and not listed (``-``) it passes over."""
        return any(x.symbol != NOT_LISTED for x in self.differences)

    @property
    def same(self) -> bool:
        """Whether everything that is listed was compared, and is the same."""
        return not self.differs and self.uncompared is None

    @property
    def exit_code(self) -> int:
        """0 the same, 3 differences; else 1 if a node cannot be reached, 4 if there is nothing to compare with."""
        if self.differs:
            return 3
        return 0 if self.uncompared is None else 1 if self.unreachable else 4

    @property
    def manifest(self) -> DataFrame:
        """The manifest as a DataFrame."""
        from airflow_dicom_get.manifest.frames import frame_of
        from airflow_dicom_get.manifest.schema import manifest_table

        return frame_of(manifest_table(self.rows, source="", destination=""))

    def frame(self) -> DataFrame:
        """The differences as a DataFrame of text columns."""
        import pandas as pd

        names = list(Difference.__slots__)
        found = {name: [getattr(x, name) for x in self.differences] for name in names}
        return pd.DataFrame(found, columns=names, dtype="string")

    def summary(self) -> str:
        """One line for people."""
        total = sum(self.counts.values())
        names = {NOT_THERE: "not there", NOT_LISTED: "not listed", DIFFERENT: "different", UNREADABLE: "not readable"}
        parts = [f"{self.counts[SAME]} of {total} instances are the same"]
        parts += [f"{self.counts[symbol]} {name}" for symbol, name in names.items() if self.counts[symbol]]
        word = "differences" if self.differs else "same" if self.uncompared is None else "not compared"
        text = f"{word}: {', '.join(parts)}"
        if self.in_part:
            text += f"; of {self.in_part} {noun(self.in_part, 'study', 'studies')} a part was asked for"
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "same": self.same,
            "counts": {symbol: self.counts[symbol] for symbol in (SAME, NOT_THERE, NOT_LISTED, DIFFERENT, UNREADABLE)},
            "uncompared": self.uncompared,
            "in_part": self.in_part,
            "differences": [{name: getattr(x, name) for name in Difference.__slots__} for x in self.differences],
            "errors": self.errors,
            "manifest": self.manifest_uri,
            "plan_at": self.plan_at.isoformat() if self.plan_at is not None else None,
        }

    def _repr_html_(self) -> str:
        shown = [(x.symbol, f"{x.sop_instance_uid}: {x.what}") for x in self.differences[:_SHOWN]]
        more = len(self.differences) - len(shown)
        return html_table(
            self.summary(),
            [
                ("not compared with the PACS", self.uncompared),
                *shown,
                ("…", f"{more} more in frame()" if more else None),
                ("manifest", self.manifest_uri),
            ],
        )


def verify(
    manifest: Any = None,
    *,
    root: Named | Sequence[Named] | None = None,
    study: str | Iterable[str] | None = None,
    addr: str | Node | None = None,
    destination: str | Path | None = None,
    quick: bool = False,
    manifest_root: str | Path | None = None,
    s3_config: S3Config | Mapping[str, Any] | None = None,
    forward_target: ForwardTarget | Mapping[str, Any] | None = None,
    trust_destination: bool = False,
    query_model: str = "StudyRoot",
    on_difference: Callable[[Difference], object] | None = None,
    manifest_name: str | None = None,
    calling_ae_title: str = "GET-SCU",
    called_ae_title: str = "ANY-SCP",
    max_pdu_length: int = 131072,
    list_limit: Any = None,
    verbose: bool = False,
    tls: Tls | Mapping[str, Any] | None = None,
    user_identity: UserIdentity | Mapping[str, Any] | None = None,
    transcript: Any = None,
    deadlines: Deadlines | Mapping[str, Any] | None = None,
) -> Verification:
    """Compare what is listed with what is stored, and with what a PACS lists now.

    What is listed comes from the manifest, without a manifest from the PACS, and without either from our
    own records at the destination. What is stored is what is at the destination, or where the manifest says.

    A manifest describes only its own run. Without a `destination`, an instance that it lists as not held counts as
    not stored, even if a later run has fetched it: verify the last manifest, or give the destination.

    An instance that it lists with another data set than the source sent stays a difference; one that it lists as
    changed or unreadable is the same where its recorded digest fits again. What was not compared is not the same.

    A node may list an instance and have other bytes. So there only that is the same which it also took from us, by the
    manifest or our records; what it refused is different, and all else that it lists is not compared.

    Parameters
    ----------
    manifest : manifest, reference or URI
        What a run wrote. Without a `destination` its objects are looked for where it says, in the place in which its
        ``_manifests`` lies (of a frame or reference, in that of its column ``destination``) and below ``root``. A row
        that names another place is a difference; what was forwarded is not asked for at a node that it names.
    root : path, address, or several of them
        Further folders or prefixes, ``s3://bucket/prefix``, in which objects of the manifest may lie.
    study : str or iterable of str
        Study Instance UIDs; those of the manifest by default.
    addr : str or Node
        A PACS to compare with.
    destination : str or Path
        Where to look, if not where the manifest says: a path, ``s3://bucket/prefix`` or ``dicom://[AE@]host:port``.
    quick : bool
        Compare only sizes; do not read the objects, but for those of which no size is recorded, and those whose ETag is
        not the recorded one.
    manifest_root, s3_config, forward_target, query_model
        As for :class:`~airflow_dicom_get.GetScu`; ``forward_target`` says how a node as destination is called.
    trust_destination : bool
        Take what a node as destination lists for held, though no record says that it took it from us.
    on_difference : callable
        Called with each :class:`Difference` as it is found, one after the other, in a thread of the comparison.
    manifest_name : str
        Path of the new manifest below its root, without its extension.
    calling_ae_title, called_ae_title, max_pdu_length, list_limit, verbose, tls, user_identity, transcript,
    deadlines
        How the PACS is called, and where it cuts its lists, as for :class:`~airflow_dicom_get.GetScu`.

    Raises
    ------
    InvalidOption, ManifestError, S3Error
        Invalid input, or a location that cannot be read.
    DeadlineExceeded
        The time of the whole call (``deadlines.operation``) was over; nothing was written.
    """
    options = VerifyOptions.of_arguments(locals())
    return compare(
        options,
        manifest,
        study,
        root=root,
        how=How(quick),
        on_difference=on_difference,
        manifest_name=manifest_name,
    )


@dataclass(frozen=True, slots=True)
class How:
    """How a comparison goes.

    Attributes
    ----------
    quick : bool
        By size, as far as that tells; see :func:`verify`.
    listed_within : float
        Seconds in which a node as destination is asked again while it does not list all that it was given.
    series : mapping
        By study the Series Instance UIDs of what alone is compared of it; all of the others.
    """

    quick: bool = False
    listed_within: float = 0.0
    series: Mapping[str, Collection[str]] = field(default_factory=dict)


def compare(
    options: VerifyOptions,
    manifest: Any = None,
    study: str | Iterable[str] | None = None,
    *,
    root: Named | Sequence[Named] | None = None,
    how: How = How(),
    on_difference: Callable[[Difference], object] | None = None,
    manifest_name: str | None = None,
    cancels: Cancels | None = None,
) -> Verification:
    """As :func:`verify`, with options that were checked already.

    Parameters
    ----------
    cancels : Cancels, optional
        What ends it, from any thread or a signal handler.

    Raises
    ------
    Cancelled
        It was ended by these: nothing was written.
    DeadlineExceeded
        Its time, ``deadlines.operation``, was over, and nothing was written either.
    SinkError
        So it was, and a place did not return from a call.
    """

    def work(cancel: CancelToken) -> Verification:
        studies = (study,) if isinstance(study, str) else tuple(map(str, study or ()))
        for uid in studies:
            if not is_uid(uid):
                raise invalid("study", f"{uid[:70]!a} is not a valid UID", "Give a Study Instance UID.")
        if manifest is None and not studies:
            raise invalid("manifest", "or study: nothing to verify", "Give a manifest, or a study.")
        if manifest is None and options.destination is None:
            raise invalid("destination", "is missing", "Give the destination of the study, or a manifest.")
        verb = _Verify(options, how, on_difference, cancel)
        verb.studies = studies
        if manifest is not None:
            verb.read_manifest(load_listed(manifest, options.s3_config, root))
        if options.addr is not None:
            verb.ask_source(options.addr)
        verb.look()
        found = verb.compare()
        verb.write(found, manifest, manifest_name)
        return found

    return _ended(work, options, cancels)


def examine(options: VerifyOptions, listed: Listed) -> Verification:
    """Read what a manifest lists where it says that it lies, and compare digests. Nothing is written."""

    def work(cancel: CancelToken) -> Verification:
        verb = _Verify(options, How(), None, cancel)
        verb.read_manifest(listed)
        verb.look()
        return verb.compare()

    return _ended(work, options)


def _ended(
    work: Callable[[CancelToken], Verification], options: VerifyOptions, cancels: Cancels | None = None
) -> Verification:
    """What the work of a call comes to; it ends as that of every verb, also where a place does not return."""
    from airflow_dicom_get.engine.ending import StuckError, run_beside
    from airflow_dicom_get.net.association import OVER, Cancels

    seconds = options.deadlines.operation
    with (cancels or Cancels()).call(seconds) as cancel:
        cancel.attend(lambda: cancel.abort(OVER))  # there is nothing to bring to an end in order
        try:
            return run_beside(partial(work, cancel), cancel)
        except StuckError as stuck:
            raise stuck.error() from None
        except (Cancelled, PeerError, SinkError):  # such a one is raised by what was broken off for it
            if not cancel.over():
                raise
            raise DeadlineExceeded(
                f"The time allowed for the whole comparison ({seconds:g} s) ran out.",
                hint="Nothing was written. Give it more time (deadlines.operation), or fewer studies.",
                phase="operation",
                seconds=seconds,
            ) from None


@dataclass(slots=True)
class _Item:
    """What is known of one instance."""

    row: Instance
    in_manifest: bool = False
    in_records: bool = False
    at_source: bool = False
    there: bool = False
    item: StoredObject | None = None
    recorded: list[Instance | Stored] = field(default_factory=list)
    """What the manifest or our records say of the object; where records contradict each other, any may be it."""
    places: set[str | None] = field(default_factory=set)
    """Where the rows of the manifest among these say that it lies."""
    told: Instance | Stored | None = None
    """The one that the object is."""
    doubt: str | None = None
    """The reason for which the manifest doubts its content."""
    confirmed: bool = False
    """Whether the node that is the destination took it from us."""
    refused: bool = False
    """Whether the manifest says that this node refused it."""
    trouble: str | None = None
    remark: str | None = None


class _Verify:
    def __init__(
        self,
        options: VerifyOptions,
        how: How,
        on_difference: Callable[[Difference], object] | None,
        cancel: CancelToken,
    ) -> None:
        self.options, self.place, self.s3 = options, options.destination, options.s3_config
        self.target = _target(options)
        self.node = str(self.target) if self.target is not None else None
        """The node that is the destination, as rows and records name it."""
        self.how, self.on_difference, self.cancel = how, on_difference, cancel
        self.items: dict[tuple[str, Key, str | None], _Item] = {}
        """By study, Series and SOP Instance UID; of a manifest of several places those of further ones apart."""
        self.studies: tuple[str, ...] = ()
        self.series = {uid: frozenset(uids) for uid, uids in how.series.items()}
        self.patients: Mapping[str, Mapping[int, bytes]] = {}
        """By study, the key of its patient as the PACS tells it."""
        self.has_manifest = self.has_source = False
        self.said: tuple[Verdict, Evidence] | None = None
        """Verdict and evidence of the manifest that was read."""
        self.scopes: Scopes = {}
        """What of its studies that manifest is of."""
        self.source = str(options.addr or "")
        """Where the instances came from: the PACS that is asked, or the one that the manifest names alone."""
        self.found = Verification()

    def _check_cancelled(self) -> None:
        """Raise where the call is to end: of what was half compared nothing is told, and nothing written."""
        if self.cancel.ending():
            raise Cancelled(f"Cancelled: {self.cancel.reason}.")

    def _means(self, study: str, series: str) -> bool:
        return study not in self.series or series in self.series[study]

    def _item(self, row: Instance, place: str | None = None) -> _Item:
        return self.items.setdefault((row.study, row.key, place), _Item(row))

    def _listed_item(self, row: Instance, opened: StoredObject | None) -> _Item:
        """What a row of the manifest is of: where no destination is given, each object that it names is one."""
        item, at = self._item(row), row.uri or row.forwarded_to
        if opened is not None and item.item is not None and opened.refused != item.item.refused:
            return self._item(row, opened.refused or at)  # what one manifest may open proves nothing of another one
        if self.place is None and at and item.places and at not in item.places:
            return self._item(row, at)
        return item

    # --- what is listed ------------------------------------------------------------------------

    def read_manifest(self, listed: Listed) -> None:
        """Take the rows of the manifest, of the studies that are given if some are."""
        self.has_manifest, self.said, self.scopes = True, (listed.verdict, listed.evidence), listed.scopes
        sources = listed.table.column("source").unique().to_pylist()
        self.source = self.source or (sources[0] or "" if len(sources) == 1 else "")
        for row, opener in listed.rows(self.s3, self.cancel):
            if (self.studies and row.study not in self.studies) or not self._means(row.study, row.series):
                continue
            if row.state == "withdrawn":
                continue
            named = (row.state in PRESENT or row.reason in CONTENT_IN_DOUBT) and row.uri and self.place is None
            opened = opener.object_of(row) if named else None
            item = self._listed_item(row, opened)
            item.in_manifest = True
            if row.reason in CONTENT_IN_DOUBT:
                item.doubt = row.reason
            if row.state in PRESENT or (item.doubt and row.sha256 is not None):
                item.row = item.row if item.recorded else row
                item.recorded.append(row)
                item.places.add(row.uri or row.forwarded_to)
            if self.node is not None and row.forwarded_to == self.node:
                item.confirmed = item.confirmed or row.state in PRESENT
                item.refused = item.refused or row.forward_status == "error"
            item.item = opened or item.item
        # A malformed UID is no name of a folder.
        self.studies = self.studies or tuple(dict.fromkeys(study for study, _, _ in self.items if is_uid(study)))

    def ask_source(self, node: Node) -> None:
        """List the studies at the PACS."""
        from airflow_dicom_get.engine.planning import Listed as Planned
        from airflow_dicom_get.engine.planning import count_doubtful, list_studies
        from airflow_dicom_get.engine.report import known_nowhere, unknown_remark
        from airflow_dicom_get.engine.source import Source
        from airflow_dicom_get.lists.finder import Finder
        from airflow_dicom_get.lists.matching import Dropped
        from airflow_dicom_get.net.find import FIND_PROPOSALS
        from airflow_dicom_get.net.peer import Peer

        o = self.options
        queries = list(self._queries())
        source = Source(Peer.of(node, o), max_associations=1, list_limit=o.list_limit, cancel=self.cancel)
        dropped, unknown = Dropped(), set[str]()
        doubts: list[str | None] = []
        lists: list[tuple[Planned, Collection[str] | None]] = []
        try:
            with source.association(FIND_PROPOSALS) as association:
                for query, classes in queries:
                    planned = list_studies(Finder(association, source.cuts), query, len(query.studies))
                    lists.append((planned, classes))
            for planned, classes in lists:
                doubts.append(planned.why_doubtful(count_doubtful(source, planned, o.query_model)))
                unknown |= known_nowhere(listing.unknown for listing in planned.listings)
                for listing in planned.listings:
                    listing.narrow(classes)
                dropped.update(planned.all_dropped())
        except (PeerError, InvalidQuery) as error:  # InvalidQuery: its responses leave out the UID of the study
            self._uncompared(error)
            return
        self.has_source = True
        self.found.in_part = len(self.scopes.keys() & set(self.studies))
        self.found.errors += dropped.remarks()
        doubt = next(filter(None, doubts), None)
        if doubt is not None:
            self.found.uncompared = f"{doubt}: {REASONS[doubt].text}"
            self.found.errors.append(doubt_remark(doubt))
        unknown -= {sop for _, (_, sop), _ in self.items}  # as a get does, of what the destination holds
        if unknown:
            self.found.uncompared = self.found.uncompared or unknown_remark(unknown)["error"]
            self.found.errors.append(unknown_remark(unknown))
        self.found.plan_at = min(planned.at for planned, _ in lists)
        self.patients = {scope.study: scope.patient_keys() for planned, _ in lists for scope in planned.scopes}
        for listing in (listing for planned, _ in lists for listing in planned.listings):
            for instance in (*listing.instances.values(), *listing.bad.values()):
                item = self._item(instance)
                item.at_source = True
                item.row.fill(instance)
                item.row.availability = instance.availability

    def _queries(self) -> Iterator[tuple[Query, Collection[str] | None]]:
        """What to ask a PACS for, and in which classes: of each study what its manifest is of, else all of it."""
        from airflow_dicom_get.engine.narrowed import in_series, query_within, that_can_be_asked

        self.scopes = {**that_can_be_asked(self.scopes), **in_series(self.series)}
        studies: dict[Narrowed | None, list[str]] = {}
        for study in self.studies:
            parts: list[Narrowed | None] = [*sorted(self.scopes.get(study, ()))]
            for part in parts or [None]:
                studies.setdefault(part, []).append(study)
        for narrowed, of in (studies or {None: []}).items():
            yield query_within(of, narrowed, self.options.query_model)

    def _uncompared(self, error: DicomGetError) -> None:
        self.found.uncompared = self.found.uncompared or error.message
        if isinstance(error, PeerError) and not isinstance(error, NotNegotiated | OperationFailed | ListTooLong):
            self.found.unreachable = True
        self.found.errors.append({"error": error.message, "count": 1, "hint": error.hint})

    # --- what is there -------------------------------------------------------------------------

    def look(self) -> None:
        """Find out what lies at the destination, or where the manifest says."""
        if self.target is not None:
            self._read_records(f"dicom://{self.node}")
            self._ask(self.target)
        elif isinstance(self.place, FilesystemDestination | S3Destination):
            self._read_records(self._recorded_as(self.place))
            for study in self.studies:
                self._look_into(self.place, study)
        else:
            for item in self.items.values():
                item.there = item.item is not None
            self._leave_forwarded()

    def _read_records(self, destination: str) -> None:
        """Our own ledgers of the destination: what it was given, sizes and digests, where no manifest tells them."""
        if self.has_manifest:
            return
        ledgers = self._root().ledgers(destination)
        for study in self.studies:
            for records in ledgers.read(study).values():
                if not self._means(study, records[0].series):
                    continue
                item = self._item(Instance(study, records[0].series, records[0].sop))
                item.row.adopt(records[0])
                item.in_records, item.recorded = True, list(records)

    def _recorded_as(self, place: FilesystemDestination | S3Destination) -> str:
        if isinstance(place, FilesystemDestination):
            return place.uri
        from airflow_dicom_get.storage.bucket import Bucket

        return Bucket(place.bucket, self.s3).recorded_as(place.prefix)

    def _look_into(self, place: FilesystemDestination | S3Destination, study: str) -> None:
        for key, item in _instances_in(place, study, self.s3, self.cancel):
            self._check_cancelled()
            if not self._means(study, key[0]):
                continue
            found = self._item(Instance(study, *key))
            found.there, found.item = True, item

    def _leave_forwarded(self) -> None:
        """A node that a manifest names is not called, unless the caller names it as destination."""
        forwarded = [x for x in self.items.values() if x.item is None and x.row.forwarded_to and x.row.state in PRESENT]
        for node in dict.fromkeys(str(item.row.forwarded_to) for item in forwarded):
            self._uncompared(
                InvalidOption(
                    f"The manifest says that instances were forwarded to {shown(node)}; no node is called for that.",
                    hint="Name the node as destination, dicom://[AE@]host:port, to compare with what it lists.",
                    option="destination",
                )
            )
        for item in forwarded:
            item.trouble = "forwarded to a node that was not given as destination"

    def _ask(self, target: Peer) -> None:
        """What the node that is the destination lists."""
        from airflow_dicom_get.lists.instances import ask
        from airflow_dicom_get.net.find import FIND_PROPOSALS

        over_at = clock.monotonic() + self.how.listed_within
        given = {(study, key) for (study, key, _), item in self.items.items() if item.recorded and item.doubt is None}
        listed: dict[str, InstanceList] = {}
        wanted = self.studies
        while True:
            problem: PeerError | None = None
            try:
                listed |= ask(target.open(FIND_PROPOSALS, self.cancel), dict.fromkeys(wanted), patients=self.patients)
            except PeerError as error:
                problem = error
            lacking = [(study, key) for study, key in given if study not in listed or key not in listed[study].keys]
            left = over_at - clock.monotonic()
            if left <= 0 or (problem is None and not lacking):
                break
            why = problem.message if problem is not None else f"It lists all but {len(lacking)} of what it was given."
            log.info("%s Asking %s again for %.0f s.", why, target, left)
            self.cancel.pause(min(left, _ASKED_AGAIN))
            self._check_cancelled()
            if problem is None:
                wanted = tuple(sorted({study for study, _ in lacking}))
        if problem is not None:
            self._uncompared(problem)
            for item in self.items.values():
                item.trouble = f"{target} cannot be queried"
            return
        self._take_list(listed)

    def _take_list(self, listed: Mapping[str, InstanceList]) -> None:
        """What the node lists is there; it is held where the manifest or our records say that the node took it."""
        from airflow_dicom_get.sinks.holdings import NodeHoldings

        assert self.node is not None
        unknown = []
        for study, instances in listed.items():
            there = [self._item(Instance(study, *key)) for key in sorted(instances.keys) if self._means(study, key[0])]
            if any(item.refused or not item.confirmed for item in there):
                ledgers = self._root().ledgers(f"dicom://{self.node}")
                holdings = NodeHoldings(ledgers, self.node, trusted=self.options.trust_destination)
                held = holdings.inventory(study, lambda *_, instances=instances: instances)
                for item in there:
                    if item.row.key in held:
                        item.confirmed, item.refused = True, False
            for item in there:
                item.there = True
                if item.confirmed:
                    item.row.forwarded_to = self.node
                elif not item.refused and item.doubt != "different_content" and self._listed(item)[0]:
                    item.trouble = "listed by its destination, and no record says that it was taken there from us"
                    unknown.append(item)
        if unknown:
            number = f"{len(unknown)} {noun(len(unknown), 'instance')}"
            self._uncompared(
                InvalidQuery(
                    f"{self.node} lists {number} of which no record says that it took them from us.",
                    hint="Give the manifest of the run that sent them, or the manifest_root under which it has its "
                    "records. trust_destination takes the word of the node.",
                )
            )

    # --- the comparison ------------------------------------------------------------------------

    def compare(self) -> Verification:
        """Hold the three against each other, and settle the row of each instance."""
        from airflow_dicom_get.engine.report import remarks_of
        from airflow_dicom_get.net.association import OVER

        for (study, instance, at), item in self.items.items():
            if at is not None:
                item.at_source = self.items[study, instance, None].at_source
        gone = [
            key
            for key, item in self.items.items()
            if self.has_source
            and not (item.at_source or item.in_manifest)
            and (not item.there or item.row.study in self.scopes)
        ]
        for key in gone:  # recorded once, and gone everywhere; or there, and perhaps not of the scope
            del self.items[key]
        told = {study for (study, _, _), item in self.items.items() if self._is_told(item)}
        stored = {study for (study, _, _), item in self.items.items() if item.there}
        for study in self.studies:
            if study not in told:
                self._nothing_tells_of(study, stored=study in stored)
        if not self.items and self.found.uncompared is None:
            hint = "Look at the result of the retrieval that was to bring some."
            self._uncompared(InvalidQuery("No instance is listed.", hint=hint))
        order = sorted(self.items.values(), key=lambda item: (item.row.study, item.row.series, item.row.sop))
        queue, mutex = iter(enumerate(order)), threading.Lock()
        judged: dict[int, tuple[Symbol, str]] = {}
        """What waits for those before it."""

        def read() -> None:
            while True:
                with mutex:
                    self._check_cancelled()
                    number, item = next(queue, (0, None))
                if item is None:
                    return
                outcome = self._judge(item)
                with mutex:
                    self._check_cancelled()
                    judged[number] = outcome
                    while (next_one := len(self.found.rows)) in judged:
                        self._tell(order[next_one], *judged.pop(next_one))

        def end(error: BaseException) -> None:
            self.cancel.abort(OVER if self.cancel.over() else type(error).__name__)

        clock.together([read] * min(_READERS, max(len(order), 1)), "dicom-get-verify", end)
        self.found.errors += remarks_of(self.found.rows)
        return self.found

    def _tell(self, item: _Item, symbol: Symbol, what: str) -> None:
        self.found.counts[symbol] += 1
        self.found.rows.append(_settled(item, symbol, what))
        if symbol == SAME or (symbol == UNREADABLE and item.trouble is not None and item.item is None):
            return
        row = item.row
        difference = Difference(row.study, row.series, row.sop, symbol, what)
        self.found.differences.append(difference)
        if self.on_difference is not None:
            self.on_difference(difference)

    def _is_told(self, item: _Item) -> bool:
        """Whether there is something to hold it against: the list of the PACS; without one, a manifest or a record."""
        return item.at_source if self.has_source else item.in_manifest or item.in_records

    def _nothing_tells_of(self, study: str, *, stored: bool) -> None:
        if self.found.uncompared is not None:
            return
        where, hint = "listed or stored anywhere", "Check its UID."
        if self.has_source:
            where = "listed by the PACS"
        elif stored:
            where = "listed anywhere, and no record says what was stored of it"
            hint = "Give a PACS, the manifest of the retrieval, or the manifest_root under which it has its records."
        self._uncompared(InvalidQuery(f"Study {study} is not {where}.", hint=hint, study=study))

    def _judge(self, item: _Item) -> tuple[Symbol, str]:
        if item.trouble is not None:
            return UNREADABLE, item.trouble
        listed, where = self._listed(item)
        if item.doubt == "different_content" and (item.there or self.place is None):
            return DIFFERENT, "another data set was sent for it, and was not stored"
        if not item.there:
            return NOT_THERE, f"{where}, not there" if listed else "no longer listed, and not present"
        symbol, what = self._content(item)
        if self.has_source and not item.at_source and not item.in_manifest:  # a get leaves it alone, whatever it holds
            return NOT_LISTED, where if symbol == SAME else f"{where}: {what}"
        if symbol != SAME:  # of what a manifest names it is told also where the PACS no longer lists it
            return symbol, what
        return (SAME, what) if listed else (NOT_LISTED, where)

    def _listed(self, item: _Item) -> tuple[bool, str]:
        """Whether it is listed by all that list, and by whom, or by whom not."""
        if self.has_source and not item.at_source:
            return False, "present, but not listed by the PACS"
        if self.has_manifest and not item.in_manifest:
            return (
                (True, "listed by the PACS, but not in the manifest")
                if item.at_source
                else (
                    False,
                    "present, but not in the manifest",
                )
            )
        if self.has_source:
            return True, "listed by the PACS"
        if self.has_manifest:
            return True, "listed in the manifest"
        return (True, "recorded") if item.in_records else (False, "present, but in no record")

    def _content(self, item: _Item) -> tuple[Symbol, str]:
        """Whether the object is what is recorded; where nothing is, whether it is a whole instance of its name."""
        stored = item.item
        if stored is None:
            item.told = next(iter(item.recorded), None)
            if item.refused:
                return DIFFERENT, "refused by its destination, which lists one of its UID"
            return SAME, "listed by its destination"
        try:
            size, etag = stored.status()
            fits = [record for record in item.recorded if record.bytes in (None, size)]
            if item.recorded and not fits:
                return DIFFERENT, f"{size} bytes, but {item.recorded[0].bytes} are recorded"
            same = [x for x in fits if x.bytes is not None and not _written_anew(x, etag)]
            if self.how.quick and item.doubt is None and same:  # what was written anew, or has no record, is read
                item.told = next(iter(same), None)
                return SAME, "of the same size"
            stored.row = stored.row or item.row  # what tells a bare data set
            opened = open_object(stored)
            read, digest, item.remark = _read(self._chunks(opened), opened.instance.syntax, opened.dataset_offset)
        except MissingError:
            return NOT_THERE, f"{self._listed(item)[1]}, not there"
        except UnreadableError as error:
            return UNREADABLE, f"cannot be read: {error}"
        except UnusableError as error:
            return DIFFERENT, str(error)
        # Where any of them has a digest, those without one tell nothing.
        told = [record for record in fits if record.sha256 == digest]
        if not told and all(record.sha256 is None for record in fits):
            told = fits
        if fits and not told:
            return DIFFERENT, "digest differs from the recorded one"
        found, row = opened.instance, item.row
        if (found.study, found.series, found.sop) != (row.study, row.series, row.sop):
            return DIFFERENT, "not the instance that its name says"
        item.told = next(iter(told), None)
        if item.told is not None and item.told.sha256 is not None:
            return SAME, "of the same digest"
        if item.told is None and item.remark is not None:
            return DIFFERENT, "cut off, and no record says that it was sent so"
        if item.doubt is not None:
            return DIFFERENT, "its content is in doubt, and no digest is recorded"
        return (SAME, "readable, but no digest is recorded") if read == size else (UNREADABLE, "grows while being read")

    def _chunks(self, opened: Opened) -> Iterator[memoryview]:
        for view in opened.chunks():
            self._check_cancelled()
            yield view

    # --- the manifest --------------------------------------------------------------------------

    def _root(self, manifest: Any = None) -> Any:
        """Where the manifest goes, and where ledgers lie: as for a get to the same place; else beside the manifest."""
        root = self._place_of_root(manifest)
        root.attend(self.cancel)
        return root

    def _place_of_root(self, manifest: Any) -> Any:
        from airflow_dicom_get.sinks.places import FolderRoot, named_root, root_for

        named = named_root(self.options)
        if named is not None:
            return named
        if isinstance(self.place, FilesystemDestination):
            return FolderRoot(Below(self.place.path.absolute()) / MANIFESTS)
        if isinstance(self.place, S3Destination):
            return self._bucket_root(self.place.bucket, self.place.prefix, whole=True)
        if isinstance(manifest, str | os.PathLike):
            at = parse_destination(os.fspath(manifest), "manifest")
            if isinstance(at, FilesystemDestination):
                beside = without_links(at.path.absolute()).parent
                return FolderRoot(beside if isinstance(beside, Below) else Below(beside))
            if isinstance(at, S3Destination):
                return self._bucket_root(at.bucket, at.prefix.rpartition("/")[0])
        return root_for(self.options)

    def _bucket_root(self, bucket: str, prefix: str, *, whole: bool = False) -> Any:
        from airflow_dicom_get.sinks.s3_places import BucketRoot, root_of
        from airflow_dicom_get.storage.bucket import Bucket

        return BucketRoot(Bucket(bucket, self.s3), root_of(prefix) if whole else prefix)

    def write(self, found: Verification, manifest: Any, name: str | None) -> None:
        """Write the manifest of what was found."""
        from airflow_dicom_get.engine.report import verdict_of_comparison, verdict_of_verified
        from airflow_dicom_get.manifest.schema import manifest_rows

        self._check_cancelled()
        run = clock.run_name()
        described = {
            "source": self.source,
            "destination": str(self.place) if self.place is not None else "",
        }
        compared = verdict_of_comparison(found.same, found.differs)
        try:
            found.manifest_uri, found.written = self._root(manifest).write_manifest(
                manifest_rows(found.rows, **described),
                name or f"verify-{run}",
                verdict=verdict_of_verified(compared, self.said, self.has_source),
                evidence="list" if self.has_source else "none",
                run=run,
                scopes=self.scopes,
            )
        except (SinkError, InvalidOption) as error:
            found.errors.append({"error": error.message, "count": 1, "hint": error.hint})


def _target(options: VerifyOptions) -> Peer | None:
    """The node that is the destination, where one is."""
    from airflow_dicom_get.net.peer import Peer

    if not isinstance(options.destination, ForwardDestination):
        return None
    assert options.destination.node is not None
    return Peer.of_target(options.destination.node, options.forward_target or ForwardTarget(), options)


def _instances_in(
    place: FilesystemDestination | S3Destination, study: str, s3: S3Config | None, cancel: CancelToken
) -> Iterator[tuple[Key, StoredObject]]:
    """The objects of a study under final names, with Series and SOP Instance UID of each. Raises :class:`S3Error`.

    Only those directly below its folder and a series' count: a copy further down is not where a get looks.
    """
    if isinstance(place, FilesystemDestination):
        folder = Below(place.path.absolute()) / study
        found = objects_below(folder) if files.is_folder(folder) else []
    else:
        prefix = f"{place.prefix}/{study}" if place.prefix else study
        found = objects_in([S3Destination(place.bucket, prefix).uri], s3, ending=cancel)
    for item in found:
        below = item.path.names[1:] if isinstance(item.path, Below) else item.key[len(prefix) + 1 :].split("/")
        if len(below) == 2 and below[1].endswith(".dcm"):
            series, sop = below[0], below[1].removesuffix(".dcm")
            if is_uid(series) and is_uid(sop):
                yield (series, sop), item


def _read(
    views: Iterable[memoryview], syntax: str | None, offset: int | None
) -> tuple[int, bytes, Literal["truncated_dataset"] | None]:
    """Read an object: its size, its digest, and what there is to say of its data set."""
    digest, size = hashlib.sha256(), 0
    walk, ahead = (None, 0) if syntax is None or offset is None else (walk_of(syntax), offset)
    for view in views:
        digest.update(view)
        size += len(view)
        if walk is not None:
            walk.feed(view[ahead:])
            ahead = max(ahead - len(view), 0)
    return size, digest.digest(), "truncated_dataset" if walk is not None and not walk.whole else None


def _written_anew(record: Instance | Stored, etag: str) -> bool:
    """Whether the service has another mark of the content than was recorded."""
    return bool(isinstance(record, Stored) and record.etag and etag and record.etag != etag)


def _be(row: Instance, told: Instance | Stored | None) -> None:
    """Let a row tell of the object what was recorded of it."""
    row.bytes, row.sha256 = (told.bytes, told.sha256) if told is not None else (None, None)
    if told is not None:
        row.syntax, row.dataset_offset = told.syntax or row.syntax, told.dataset_offset


def _settled(item: _Item, symbol: Symbol, what: str) -> Instance:
    """The row of the new manifest."""
    row = item.row
    row.error = row.reason = None
    row.attempt = 0
    if item.item is not None:
        row.uri = item.item.name
    match symbol:
        case "=":
            row.state, row.reason = "held", item.remark
            _be(row, item.told)
        case "-":
            row.state = "withdrawn" if item.in_manifest or item.in_records else "unexpected"
            row.reason = "gone_from_list" if row.state == "withdrawn" else "not_listed"
            _be(row, item.told)
        case "+":
            row.state, row.reason, row.error, row.uri = "missing", "not_sent", what, None
            row.forwarded_to = None
        case "*" if item.doubt == "different_content":
            row.state, row.reason, row.error = "conflict", item.doubt, what
        case "*" if item.refused:
            row.state, row.reason, row.error = "failed", "destination_refused", what
        case "*":
            row.state, row.reason, row.error = "failed", "size_changed", what
        case _:
            reason = "unreadable" if item.item is not None else "destination_error"
            row.state, row.reason, row.error = "failed", reason, what
    row.received_at = clock.now()
    return row
