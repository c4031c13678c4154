"""The client: :class:`GetScu` retrieves studies from one source node into one destination."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import Integer, invalid
from airflow_dicom_get.config.destination import check_folder
from airflow_dicom_get.config.groups import Deadlines, ForwardTarget, S3Config, Tls, UserIdentity, Window
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import GetOptions, parse_keywords
from airflow_dicom_get.errors import (
    DicomGetError,
    InvalidOption,
    InvalidQuery,
    SinkError,
    unexpected,
)
from airflow_dicom_get.records import Completed, SubOperation
from airflow_dicom_get.result import EchoReport, Plan, Result

if TYPE_CHECKING:
    from airflow_dicom_get.engine.events import Events
    from airflow_dicom_get.engine.profile import Profile
    from airflow_dicom_get.engine.query import Query
    from airflow_dicom_get.engine.report import End
    from airflow_dicom_get.engine.retrieval import Retrieval
    from airflow_dicom_get.engine.retry import Asked
    from airflow_dicom_get.engine.source import Source
    from airflow_dicom_get.engine.state import StudyState
    from airflow_dicom_get.engine.study_list import FoundList, ListedStudy
    from airflow_dicom_get.manifest.scopes import Scopes
    from airflow_dicom_get.net.association import CancelToken
    from airflow_dicom_get.sinks.base import Sink
    from airflow_dicom_get.sinks.places import OpenDestination

log = logging.getLogger(__name__)


class GetScu:
    """Retrieve studies by C-GET, and verify that they are complete.

    Parameters
    ----------
    addr : str or Node
        Address of the source, ``[AE@]host:port``.
    **options
        See the table of options in the documentation; all are keyword-only and checked before any traffic.

    Raises
    ------
    InvalidOption
        An option is malformed or contradicts another one.
    """

    def __init__(
        self,
        addr: str | Node,
        *,
        calling_ae_title: str = "GET-SCU",
        called_ae_title: str = "ANY-SCP",
        max_pdu_length: int = 131072,
        verbose: bool = False,
        storage_backend: Literal["Filesystem", "S3", "Forward"] = "Filesystem",
        out_dir: str | Path | None = None,
        s3_config: S3Config | Mapping[str, Any] | None = None,
        forward_target: ForwardTarget | Mapping[str, Any] | None = None,
        destination: str | Path | None = None,
        strict_forward: bool = False,
        store_with_file_meta: bool = True,
        associations: int = 1,
        max_associations: int = 2,
        bytes_per_second: int | str | None = None,
        window: str | Window | None = None,
        timezone: Any = "UTC",
        max_studies: int = 100,
        list_limit: Any = None,
        profile: str | Path | None = None,
        resume: bool = True,
        verify_held: Literal["size", "digest"] = "size",
        on_conflict: Literal["keep", "replace"] = "keep",
        adopt: bool = False,
        retries: int = 5,
        checksum: Literal["sha256"] | None = "sha256",
        durable: bool = True,
        ack: Literal["taken", "durable"] = "taken",
        require_exact: bool = False,
        tags: Any = (),
        manifest_root: str | Path | None = None,
        trust_destination: bool = False,
        transfer_syntaxes: Any = None,
        sop_classes: Any = None,
        tls: Tls | Mapping[str, Any] | None = None,
        user_identity: UserIdentity | Mapping[str, Any] | None = None,
        transcript: Any = None,
        deadlines: Deadlines | Mapping[str, Any] | None = None,
    ) -> None:
        self._begin(GetOptions.of_arguments(locals()))

    @classmethod
    def of(cls, options: GetOptions) -> Self:
        """A client whose options were checked already."""
        scu = cls.__new__(cls)
        scu._begin(options)
        return scu

    def _begin(self, options: GetOptions) -> None:
        from airflow_dicom_get.net.association import Cancels
        from airflow_dicom_get.net.peer import Peer

        self.options = options
        self._peer = Peer.of(options.addr, options)
        self._profile: Profile | None = None
        if options.profile is not None:
            from airflow_dicom_get.engine.profile import read_profile

            self._profile = read_profile(options.profile, self._peer)
        self._cancels = Cancels()
        self._clock: Callable[[], datetime] = lambda: datetime.fromtimestamp(clock.now(), UTC)

    # --- verbs ---------------------------------------------------------------------------------

    def cancel(self, reason: str = "cancelled") -> None:
        """End the call that runs: C-CANCEL, then abort; a second cancel aborts at once.

        Callable from any thread and from a signal handler: it is short, and takes no lock. Where no call
        runs, it ends the next one at its start. Either way it is spent by that call: the one after it runs.
        """
        self._cancels.cancel(reason)

    def get_study(
        self,
        query: Mapping[str, Any] | None = None,
        *,
        query_model: str = "StudyRoot",
        on_sub_operation: Callable[[SubOperation], object] | None = None,
        on_completed: Callable[[Completed], object] | None = None,
        manifest: Any = None,
        manifest_name: str | None = None,
        found: FoundList | None = None,
    ) -> Result:
        """Retrieve what a query selects, and verify every instance.

        Parameters
        ----------
        query : mapping
            DICOM keywords to values; see :func:`~airflow_dicom_get.engine.query.parse_query`.
        query_model : {"StudyRoot", "PatientRoot"}
            Information model of the C-GET.
        on_sub_operation : callable
            Called with a :class:`SubOperation` for each instance that arrives. Without it, a notebook shows a progress
            bar.
        on_completed : callable
            Called once with a :class:`Completed`, however the retrieval ends.
        manifest : manifest, reference or URI
            Instead of a query: every instance that it lists (``withdrawn`` and ``unexpected`` rows aside). What is held
            at this destination is skipped; what the source no longer lists is ``missing`` unless it is held.
        manifest_name : str
            Path of the new manifest below the manifest root, without its extension; the run's name by default.
        found : FoundList
            The search of which the query is, as :meth:`find_listed` returns it. What it did not find counts for the
            verdict of result and manifest.

        Returns
        -------
        Result
            Unless the input is invalid: verdict, numbers, and the manifest's URI.

        Raises
        ------
        InvalidQuery, InvalidOption, ManifestError
            Invalid input; nothing was fetched.
        """
        from airflow_dicom_get.cell import at_cell
        from airflow_dicom_get.engine import report
        from airflow_dicom_get.engine.ending import StuckError, read_first, run_beside, write_manifest
        from airflow_dicom_get.engine.events import Events
        from airflow_dicom_get.manifest.schema import manifest_rows, manifest_table
        from airflow_dicom_get.sinks.places import open_destination

        with (
            self._opened_source() as source,
            _Reporting(self.options.verbose),
            at_cell(source.cancel.cancel, on_sub_operation) as shown,
        ):
            if manifest is not None and query is not None:
                raise InvalidQuery("query and manifest are both given.", hint="Give one of the two.")
            parsed = self._parse(query, query_model) if manifest is None else None
            places = open_destination(self.options)
            run = clock.run_name()
            asked = (
                read_first(lambda: self._asked_by(manifest, query_model), source.cancel)
                if manifest is not None
                else None
            )
            if asked is not None:
                places = open_destination(self._options_for(asked))
            events = Events(shown, on_completed)
            call = _Call(source, places, run, events)
            results: list[Result] = []

            def judge(end: End) -> Result:
                result = report.assemble(
                    end,
                    events=events,
                    node=str(self.options.addr),
                    destination=str(self.options.destination),
                    associations=source.opened,
                    cancelled_by=source.cancel.reason,
                )
                if end.resume_at is not None:
                    report.wait_for_window(result, end.resume_at)
                elif end.waits or (end.unproven and self._hours()[1] is not None):
                    report.resume_later(result, self._next_opening())
                if end.unclosed is not None:
                    report.not_closed(result, end.unclosed)
                if found is not None:
                    report.add_search_of_list(result, found)
                rows = end.rows()
                result.rows = lambda: manifest_table(rows, **self._described(places))
                results.append(result)
                return result

            def work() -> None:
                if parsed is None and asked is None:  # it was to end before its manifest was read
                    end = report.left_to_itself((), source.why_ended(), source.cancel)
                else:
                    end = self._retrieve(call, parsed, asked, query_model)
                result = judge(end)
                rows = manifest_rows(end.rows(), **self._described(places))
                narrowed = self._narrowed(parsed, asked, end)
                write_manifest(result, rows, places.root, manifest_name or run, run, source.cancel, scopes=narrowed)

            try:
                run_beside(work, source.cancel)
            except StuckError as stuck:
                if not results:
                    left = report.left_to_itself(call.states, source.why_ended(), source.cancel)
                    report.fix_rows(judge(left))
                report.manifest_not_written(results[0], stuck.error())
            finally:  # also where the caller gets an exception, as from Ctrl-C
                if results:
                    events.completed(report.completed_event(results[0]), wait=not source.cancel.left)
        return results[0]

    def plan(self, query: Mapping[str, Any], *, query_model: str = "StudyRoot") -> Plan:
        """List what a get would fetch, and what is already held. Nothing is fetched or written.

        Rows of the source that contradict the query are left out; ``errors`` of the plan says so.

        Raises
        ------
        InvalidQuery, and any error of the association
        """
        from airflow_dicom_get.engine.contexts import PeerKnowledge
        from airflow_dicom_get.engine.planning import list_studies, mark_held, plan_of
        from airflow_dicom_get.lists.finder import Finder
        from airflow_dicom_get.net.find import FIND_PROPOSALS
        from airflow_dicom_get.sinks.places import open_destination

        o = self.options
        with self._opened_source() as source:
            parsed = self._parse(query, query_model)
            places = open_destination(o) if o.destination is not None else None
            with source.association(FIND_PROPOSALS) as association:
                listed = list_studies(Finder(association, source.cuts), parsed, o.max_studies)
            for listing in listed.listings:
                listing.narrow(o.sop_classes)
            if places is not None:
                places.attend(source.cancel)
                sink = places.sink(clock.run_name(), read_only=True)
                try:
                    mark_held(listed, sink)
                except SinkError:
                    source.check_stopped()  # then that is why it failed
                    raise
                finally:
                    sink.close()
        return plan_of(
            listed,
            PeerKnowledge(o.transfer_syntaxes, self._profile),
            node=str(o.addr),
            destination=str(places.place) if places is not None else None,
        )

    def find(
        self,
        query: Mapping[str, Any],
        *,
        level: str = "STUDY",
        query_model: str = "StudyRoot",
        return_keys: Any = (),
        as_frame: bool = False,
        limit: int | None = None,
        split_on_truncation: bool = True,
        on_remark: Callable[[str], object] | None = None,
    ) -> Any:
        """Query the source by C-FIND.

        A row that contradicts the query is left out. A study, series or instance that the source
        returns several times is one row.

        Parameters
        ----------
        query : mapping
            Keys as in :meth:`get_study`; at least one must have a value. Here a lone ``*`` as the value of any key
            matches everything.
        level : {"STUDY", "SERIES", "IMAGE"}
            Level of the rows.
        return_keys : str or sequence of str
            Additional keywords to return.
        as_frame : bool
            Return a DataFrame with one text column per keyword; sequences are left out.
        limit : int
            Rows after which the C-FIND is cancelled (PS3.4 C.4.1.3); none by default.
        split_on_truncation : bool
            Whether an answer for studies that the source may have cut is asked for again by parts: by Study Date, then
            by Study Time.
        on_remark : callable
            Called with each remark on the answer: rows that were left out, that it was cancelled, and that it may be
            cut. By default remarks are logged as warnings.

        Returns
        -------
        list of Dataset, or DataFrame
            Text is decoded by the row's Specific Character Set. ``cut`` of the list (in ``attrs`` of the DataFrame)
            says whether there may be more: it was cancelled, or ends where the source may cut it.

        Raises
        ------
        InvalidQuery, InvalidOption, NotNegotiated, OperationFailed, and whatever ends an association
        """
        from airflow_dicom_get.engine.find import find_rows, frame_of_rows

        with self._opened_source() as source:
            if level not in ("STUDY", "SERIES", "IMAGE"):
                raise InvalidOption(
                    f"level: {str(level)[:32]!a} is not a query level.",
                    hint="Give STUDY, SERIES or IMAGE.",
                    option="level",
                )
            most = None if limit is None else Integer(1)("limit", limit)
            keywords = parse_keywords("return_keys", return_keys)
            parsed = self._parse(query, query_model, selective=False)
            rows = find_rows(source, parsed, level, keywords, limit=most, split=split_on_truncation)
            frame = frame_of_rows(source, rows, level, keywords) if as_frame else None
        for text in rows.remark_texts():
            if on_remark is None:
                log.warning("%s: %s", source.node, text)
            else:
                on_remark(text)
        if frame is None:
            return rows
        frame.attrs["cut"] = rows.cut
        return frame

    def find_listed(self, listed: Sequence[ListedStudy]) -> FoundList:
        """Find the studies of a list by C-FIND, over one association.

        Parameters
        ----------
        listed : sequence of ListedStudy
            As :func:`~airflow_dicom_get.engine.study_list.read_study_list` reads them.

        Returns
        -------
        FoundList
            For each entry, the studies that the source has, or why there are none; other entries are not affected.

        Raises
        ------
        InvalidQuery
            The source does not support the key by which the list names its studies.
        NotNegotiated, OperationFailed, and whatever ends an association
        """
        from airflow_dicom_get.engine.study_list import find_listed

        with self._opened_source() as source:
            return find_listed(source, listed, self.options.retries, self.options.max_studies)

    def echo(self, *, study: str | None = None, profile: str | Path | None = None) -> EchoReport:
        """Send a C-ECHO, and find out which services the node accepts.

        Parameters
        ----------
        study : str
            Study Instance UID of a study that the node holds. It is listed, and a few of its instances
            are fetched and not kept, to find out whether the node converts, takes UID lists and tells
            counts.
        profile : str or Path
            File to write that to, for ``GetScu(…, profile=…)``: nothing is written where none is named.

        Raises
        ------
        InvalidQuery
            The node does not hold the study.
        InvalidOption
            ``profile`` is given without ``study``, or cannot be written.
        ConnectFailed, AssociationRejected, AssociationAborted, DeadlineExceeded, PeerProtocolError
        """
        from airflow_dicom_get.engine.echo import echo

        with self._opened_source() as source:
            uid = self._parse({"StudyInstanceUID": study}, "StudyRoot").studies[0] if study is not None else None
            file = Path(profile) if profile is not None else None
            if file is not None:
                if uid is None:
                    raise invalid("profile", "is given without a study", "Name a study that the node holds.")
                check_folder(file.parent, "profile")
            report = echo(source)
            if uid is not None:
                from airflow_dicom_get.engine.probe import probe
                from airflow_dicom_get.engine.profile import write_profile

                found = probe(source, uid, self.options.max_associations)
                report.profile = found.to_json()
                if file is not None:
                    write_profile(file, found)
            return report

    # --- before traffic ------------------------------------------------------------------------

    def _parse(self, query: Mapping[str, Any] | None, query_model: str, *, selective: bool = True) -> Query:
        from airflow_dicom_get.engine.query import parse_query

        if query is None:
            raise InvalidQuery("No query is given.", hint="Give a query, or a manifest to resume from.")
        return parse_query(query, query_model=query_model, timezone=self.options.timezone, selective=selective)

    def _asked_by(self, manifest: Any, query_model: str) -> Asked:
        from airflow_dicom_get.engine.retry import asked_by
        from airflow_dicom_get.manifest.frames import load_table

        return asked_by(load_table(manifest, self.options.s3_config), self.options.sop_classes, query_model)

    def _narrowed(self, parsed: Query | None, asked: Asked | None, end: End) -> Scopes:
        """What of its studies the manifest of the call is of."""
        from airflow_dicom_get.engine.narrowed import narrowed_by

        if asked is not None:
            return asked.narrowed
        narrowed = narrowed_by(parsed, self.options.sop_classes) if parsed is not None else None
        return {state.scope.study: frozenset({narrowed}) for state in end.states} if narrowed is not None else {}

    def _options_for(self, asked: Asked | None) -> GetOptions:
        """The options, with digests made and compared where the manifest names objects whose content is in doubt."""
        o = self.options
        if asked is None or not asked.by_digest:
            return o
        return replace(o, verify_held="digest", checksum="sha256")

    def _hours(self) -> tuple[datetime | None, datetime | None]:
        """When the source's window closes, and when it opens if it is closed now: looked at once in a call."""
        window, zone = self.options.window, self.options.timezone
        if window is None:
            return None, None
        now = self._clock()
        closes = window.closes_at(now, zone)
        return closes, window.opens_at(now, zone) if closes is None else None

    # --- parts ---------------------------------------------------------------------------------

    @contextmanager
    def _opened_source(self) -> Iterator[Source]:
        """The source of one call. Opened before its input is checked: a call that is refused spends its cancel too."""
        with self._cancels.call(self.options.deadlines.operation) as cancel:
            yield self._source(cancel)

    def _source(self, cancel: CancelToken) -> Source:
        from airflow_dicom_get.engine.limits import RateLimit
        from airflow_dicom_get.engine.source import Source

        o = self.options
        throttle = RateLimit(o.bytes_per_second) if o.bytes_per_second is not None else None
        return Source(
            self._peer,
            max_associations=o.max_associations,
            throttle=throttle,
            list_limit=o.list_limit,
            cancel=cancel,
        )

    def _retrieve(self, call: _Call, parsed: Query | None, asked: Asked | None, query_model: str) -> End:
        """Do what was asked; the states of the call are filled as it goes on."""
        from airflow_dicom_get.engine.planning import Listed, list_studies
        from airflow_dicom_get.engine.report import End, end_of
        from airflow_dicom_get.engine.spread import Spread
        from airflow_dicom_get.engine.study import run_studies
        from airflow_dicom_get.lists.finder import Finder
        from airflow_dicom_get.lists.matching import Dropped
        from airflow_dicom_get.net.find import FIND_PROPOSALS

        if asked is not None and not asked.scopes:
            return End(nothing_asked=True)
        closes, resume_at = self._hours()
        if resume_at is not None:
            return End(resume_at=resume_at)
        o, source, places, states = self.options, call.source, call.places, call.states
        found = Listed([], [], Dropped())
        try:
            source.check_stopped()
            places.attend(source.cancel)
            try:
                places.prepare()
            except SinkError:
                source.check_stopped()  # then that is why it failed
                raise
            if asked is not None:
                found = Listed(asked.scopes, [], Dropped())
            else:
                assert parsed is not None
                spread = Spread(source, o.associations)
                found = source.with_retries(
                    o.retries,
                    FIND_PROPOSALS,
                    lambda association: list_studies(
                        Finder(association, source.cuts), parsed, o.max_studies, spread, for_get=True
                    ),
                )
            sink = places.sink(call.run)
            try:
                retrieval = self._retrieval(call, sink, query_model, closes)
                run_studies(retrieval, found.scopes, states, next(iter(found.listings), None))
            finally:
                unclosed = _close(sink)
            return replace(end_of(states, found.dropped, found.doubt, unknown=found.unknown), unclosed=unclosed)
        except DicomGetError as error:
            if isinstance(error, InvalidQuery | InvalidOption) and not states:
                raise
            return end_of(states, found.dropped, found.doubt, error, found.unknown)
        except Exception as error:
            log.exception("the retrieval ended unexpectedly")
            return end_of(states, found.dropped, found.doubt, unexpected(error), found.unknown)

    def _retrieval(self, call: _Call, sink: Sink, query_model: str, closes: datetime | None) -> Retrieval:
        from airflow_dicom_get.engine.contexts import PeerKnowledge
        from airflow_dicom_get.engine.retrieval import Retrieval
        from airflow_dicom_get.engine.tags import TagDecoder

        o, place = self.options, call.places.place
        return Retrieval(
            options=o,
            query_model=query_model,
            source=call.source,
            sink=sink,
            peer=PeerKnowledge(o.transfer_syntaxes, self._profile),
            events=call.events,
            tags=TagDecoder(o.tags) if o.tags else None,
            limit=lambda: "window" if closes is not None and self._clock() >= closes else None,
            check_room=place.check_room,
            expect=place.expect,
        )

    # --- the end -------------------------------------------------------------------------------

    def _next_opening(self) -> datetime | None:
        window = self.options.window
        return window.opens_at(self._clock(), self.options.timezone) if window is not None else None

    def _described(self, places: OpenDestination) -> dict[str, Any]:
        """What each row of the manifest says besides its instance."""
        return {"source": str(self.options.addr), "destination": places.place.uri, "tags": self.options.tags}


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call of :meth:`GetScu.get_study` works with."""

    source: Source
    places: OpenDestination
    run: str
    events: Events
    states: list[StudyState] = field(default_factory=list)
    """Of the studies that were begun."""


def _close(sink: Sink) -> DicomGetError | None:
    """Close a destination; why that failed, if it did: what was confirmed before stays so."""
    try:
        sink.close()
    except DicomGetError as error:
        return error
    except OSError as error:
        return SinkError(
            f"The destination cannot be closed in order: {error.strerror or error}.",
            hint="Check the mount of the destination, and run again: what is held is not fetched again.",
        )
    except Exception as error:
        log.exception("the destination cannot be closed")
        return unexpected(error)
    return None


class _Reporting:
    """The ``verbose`` option: the package logs each message while a call runs."""

    def __init__(self, verbose: bool) -> None:
        self._logger = logging.getLogger("airflow_dicom_get")
        self._verbose = verbose
        self._level = logging.NOTSET

    def __enter__(self) -> None:
        if self._verbose:
            self._level = self._logger.level
            self._logger.setLevel(logging.DEBUG)

    def __exit__(self, *exc: object) -> None:
        if self._verbose:
            self._logger.setLevel(self._level)
