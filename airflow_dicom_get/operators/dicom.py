"""The operators: find studies, retrieve them, store them elsewhere, verify what is held."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_dicom_get.config.checks import Check, Choice, Flag, Integer, Parsed, invalid, shown
from airflow_dicom_get.config.destination import ForwardDestination, S3Destination
from airflow_dicom_get.config.options import OPTIONS, NodeOptions, StoreOptions, VerifyOptions, parse_keywords
from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.engine import report
from airflow_dicom_get.engine.arrivals import SPAN
from airflow_dicom_get.engine.items import Item, is_modality
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.engine.search import Search
from airflow_dicom_get.errors import DicomGetError, IncompleteRetrieval, printable, sentences
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.hooks._destinations import (
    ResolvedDestination,
    check_allowed,
    resolve_destination,
    resolve_destinations,
    resolve_root,
)
from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.hooks._node_config import within
from airflow_dicom_get.hooks._redaction import label_of, shown_manifest, shown_query, shown_study
from airflow_dicom_get.hooks._studies import study_queries, study_series, study_uids
from airflow_dicom_get.hooks._task import DicomTask
from airflow_dicom_get.hooks.configuration import max_map_length
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.manifest.frames import bytes_in_xcom, reference_to
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.operators._manifests import (
    connection_of,
    counts_of,
    load_given,
    part_name,
    place_of_objects,
    run_name_of,
)
from airflow_dicom_get.operators._outcome import summary
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.operators._transfer import Transfer, TransferOperator, engine_options_of
from airflow_dicom_get.operators.links import DicomManifestLink
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import CANCELLED, REASONS, UNVERIFIED, advice

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.config.options import GetOptions
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.store import StoreScu
    from airflow_dicom_get.verify import Verification

LEVELS = ("STUDY", "SERIES")
ON_EMPTY = ("return", "skip", "fail")
ON_TRUNCATION = ("fail", "return")
ON_BAD_STUDY = ("fail", "skip")
_MOST_MODALITIES = 64
MODEL = Choice("StudyRoot", "PatientRoot", optional=True)
"""By default that of the connection."""


class DicomFindOperator(DicomTask):
    """Find studies on a PACS by C-FIND, and return one Item each: what ``DicomGetOperator`` takes as ``study``.

    An Item is a dict of ``study_instance_uid``, ``series_instance_uids`` (None: all), ``expected_instances``
    (None where the PACS does not say), ``modalities``, ``label`` and ``keys``. It contains no patient data
    except what ``return_keys`` requests.

    :param query: DICOM keywords or tags, and values (templated)
    :param level: ``STUDY``, or ``SERIES`` to retrieve only the series that match
    :param study_date: StudyDate of the query: ``20240131``, ``2024-01-31``, ``2024-01-01/2024-01-31``, ``today``,
        ``today-1`` in the connection's time zone, or a date-time such as ``{{ logical_date }}``, which is the day that
        it is there (templated)
    :param modalities: one or several modalities, of which a study (or series) has at least one: a C-FIND each, and
        64 at most (templated)
    :param return_keys: keywords whose values go into the ``keys`` of each Item. They go to XCom, which every viewer of
        the DAG can read.
    :param split_on_truncation: query again by parts of the date range if the PACS seems to truncate its answer
    :param on_truncation: what happens if more studies may match than the PACS has listed, or if it lists only some of
        the UIDs that the query names: ``fail`` the task, or ``return`` what was found, with a warning
    :param shard_instances: return lists of Items with about this number of instances each; a large study is split by
        series. There are never more lists than Airflow can map over.
    :param on_empty: what happens if nothing matches: ``return`` an empty list, ``skip`` or ``fail`` the task
    :param query_model: ``StudyRoot`` or ``PatientRoot``; by default that of the connection
    :param dicom_conn_id: the ``dicom`` connection to the PACS (templated)
    """

    template_fields: Sequence[str] = ("query", "study_date", "modalities", "dicom_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"query": "json"}
    checks: ClassVar[Mapping[str, Check]] = {
        "level": Choice(*LEVELS),
        "return_keys": Parsed(parse_keywords, "keywords"),
        "split_on_truncation": Flag(),
        "on_truncation": Choice(*ON_TRUNCATION),
        "shard_instances": Integer(1, optional=True),
        "on_empty": Choice(*ON_EMPTY),
        "query_model": MODEL,
    }

    def __init__(
        self,
        *,
        query: Mapping[str, Any] | None = None,
        level: str = "STUDY",
        study_date: str | None = None,
        modalities: str | Sequence[str] | None = None,
        return_keys: Sequence[str] = (),
        split_on_truncation: bool = True,
        on_truncation: str = "fail",
        shard_instances: int | None = None,
        on_empty: str = "return",
        query_model: str | None = None,
        dicom_conn_id: str = DicomHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.query_model = self.checked("query_model", query_model)
        self.dicom_conn_id = dicom_conn_id
        self.query = query
        self.level = self.checked("level", level)
        self.study_date = study_date
        self.modalities = modalities
        self.return_keys = self.checked("return_keys", return_keys)
        self.split_on_truncation = self.checked("split_on_truncation", split_on_truncation)
        self.on_truncation = self.checked("on_truncation", on_truncation)
        self.shard_instances = self.checked("shard_instances", shard_instances)
        self.on_empty = self.checked("on_empty", on_empty)

    def shown(self, name: str, value: Any) -> Any:
        """Hide the values of identifying keys."""
        return shown_query(value) if name == "query" else value

    def map_label(self) -> str:
        """Name what is queried, without patient data."""
        if self.study_date:
            return f"StudyDate={self.study_date}"[:100]
        return label_of(None, self.given("query"), None) if self.given("query") else ""

    def execute(self, context: Context) -> list[Item] | list[list[Item]]:
        """Query, and return the Items."""
        with final_errors():
            query, modalities = self._checked()
            search = self._search(modalities)
            items = search.items(query)
            found: list[Any] = items
            if self.shard_instances:
                found = search.shards(items, target=self.shard_instances, at_most=max_map_length())
            self._summarise(context, search, items, found)
            self._check_whole(search)
            if not items:
                self._empty()
            self._check_mappable(found)
        return found

    def _checked(self) -> tuple[dict[str, Any], list[str]]:
        """The query as one mapping, and the modalities; before any traffic."""
        given = self.given("query")
        if given is not None and not isinstance(given, Mapping):
            raise invalid("query", "is not a mapping", 'For example, give {"PatientID": "…"}.')
        query = dict(given or {})
        if query.pop("QueryRetrieveLevel", self.level) != self.level:
            raise invalid("query", "has a different QueryRetrieveLevel than level", "Give level alone.")
        for name, key in (("study_date", "StudyDate"), ("modalities", self._modality_key)):
            if getattr(self, name) and query.get(key):
                raise invalid(name, f"is given, and so is {key} in query", "Give one of them.")
        if self.rendered_to_nothing("study_date"):
            hint = "A run that was triggered without a logical date has no dates: give it one, or use a param."
            raise invalid("study_date", "rendered to nothing", hint)
        if self.study_date is not None:
            query["StudyDate"] = str(self.study_date).strip()
        return query, self._modality_codes()

    def _modality_codes(self) -> list[str]:
        given: Any = self.modalities or []
        codes = [str(one).strip() for one in (given.replace("\\", ",").split(",") if isinstance(given, str) else given)]
        for code in codes:
            if not is_modality(code):
                hint = (
                    "Give codes such as CT. A list in a template needs render_template_as_native_obj=True on the DAG."
                )
                raise invalid("modalities", f"{shown(code)} is not a modality code", hint)
        codes = list(dict.fromkeys(codes))
        if len(codes) > _MOST_MODALITIES:
            what = f"has {len(codes)} codes, of which each is a C-FIND"
            raise invalid("modalities", what, f"Give {_MOST_MODALITIES} at most, or none for all studies.")
        return codes

    @property
    def _modality_key(self) -> str:
        return "ModalitiesInStudy" if self.level == "STUDY" else "Modality"

    def _search(self, modalities: list[str]) -> Search:
        hook = self.hook
        scu = hook.get_scu()
        self.ends_with_task(scu)
        model = self.query_model or hook.query_model

        def find(query: Mapping[str, Any], level: str, return_keys: Sequence[str]) -> Any:
            split = self.split_on_truncation
            return scu.find(query, level=level, query_model=model, return_keys=return_keys, split_on_truncation=split)

        return Search(
            find,
            level=self.level,
            model=model,
            modalities=modalities,
            return_keys=self.return_keys,
            timezone=hook.timezone,
        )

    def _summarise(self, context: Context, search: Search, items: list[Item], found: list[Any]) -> None:
        counts = [item["expected_instances"] for item in items]
        instances = None if any(one is None for one in counts) else sum(counts)
        summary = {
            "schema": 1,
            "matched": len({item["study_instance_uid"] for item in items}),
            "returned": len(found),
            "queries": search.queries,
            "truncated": search.doubt is not None or bool(search.unknown),
            "instances": instances,
        }
        context["ti"].xcom_push("summary", summary)
        self.log.info(
            "Studies found: %d. Instances in them: %s. C-FIND queries: %d.",
            summary["matched"],
            "unknown" if instances is None else instances,
            search.queries,
        )

    def _check_whole(self, search: Search) -> None:
        texts = []
        if search.doubt is not None:
            why = f"{REASONS[search.doubt].text} {advice(search.doubt)}"
            texts.append(f"More studies may match ({search.doubt}). {why}")
        if search.unknown:
            remark = report.unknown_remark(search.unknown)
            texts.append(sentences(remark["error"], remark["hint"]))
        if texts and self.on_truncation == "fail":
            raise AirflowFailException(f"{' '.join(texts)} To go on with what was found, set on_truncation='return'.")
        for text in texts:
            self.log.warning("%s", text)

    def _empty(self) -> None:
        if self.on_empty == "skip":
            raise AirflowSkipException("No study matches.")
        if self.on_empty == "fail":
            raise AirflowFailException("No study matches, and on_empty is 'fail'.")

    def _check_mappable(self, found: list[Any]) -> None:
        """Airflow fails a task whose list is too long to map over, and does not say what to do."""
        limit = max_map_length()
        if len(found) > limit and next(self.iter_mapped_dependants(), None) is not None:
            raise AirflowFailException(
                f"{len(found)} studies match, and Airflow maps over at most {limit} ([core] max_map_length). "
                "Set shard_instances=2000, for example: each mapped task then gets a list of studies."
            )


class DicomGetOperator(TransferOperator):
    """Retrieve studies by C-GET, and verify instance by instance that they are held.

    One task retrieves one study, a list of them, what a query matches, or what a manifest lists::

        find = DicomFindOperator(task_id="find", study_date="today-1")
        DicomGetOperator.partial(task_id="get", destination="/data/dicom", retries=3).expand(study=find.output)

    The task succeeds if the verdict is one of ``accept``. Otherwise it is retried if the result
    is transient, which fetches only what is missing, and fails at once if it is not. Whatever the verdict, the
    manifest file is written, and ``summary`` and ``return_value`` are in XCom.

    :param study: Study Instance UID, Item of ``DicomFindOperator``, or a list of either (templated)
    :param query: DICOM keywords or tags, and values, which may match several studies (templated)
    :param manifest: manifest of an earlier retrieval, or several: the instances that they list (templated)
    :param destination: an absolute path or ``file://…``; ``s3://[CONN_ID@]bucket/prefix``; ``dicom://CONN_ID``, the
        node of a ``dicom`` connection with its AE titles, TLS and limits, or ``dicom://[AE@]host:port``: instances
        are forwarded as they arrive, and nothing is stored here (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of a bucket whose address names none (templated)
    :param associations: number of parallel associations of the task; set ``pool_slots`` to the same number
    :param accept: verdicts that are a success: ``complete``, ``empty``, ``unverified``, ``partial``, ``failed``
    :param strict_forward: end at the first instance that a DICOM node as destination refuses
    :param store_with_file_meta: write DICOM files, not bare data sets
    :param resume: skip what is held and verified
    :param tags: keywords of attributes to add as columns of the manifest. They go to XCom, which every viewer of
        the DAG can read.
    :param manifest_root: absolute path or ``s3://[CONN_ID@]bucket/prefix`` for manifests and ledger; by default
        ``_manifests`` in the destination, and for a DICOM node ``[dicom_get] manifest_root`` (templated)
    :param manifest_xcom: ``auto`` returns the manifest as a DataFrame, and a reference to its file where it is larger
        than ``[dicom_get] manifest_xcom_max_bytes``; ``full`` the DataFrame or, where it is larger, an error;
        ``reference`` always the reference. ``load_manifest()`` takes either.
    :param outside_window: outside the window of the connection, ``defer`` until it opens, ``fail``, or ``ignore`` it
    :param on_bad_study: whether a malformed UID in a list makes the task ``fail`` or is skipped (``skip``)
    :param verbose: log each instance
    :param engine_options: options of ``GetScu`` for this task, as in ``{"verify_held": "digest"}``: ``verify_held``,
        ``on_conflict``, ``adopt``, ``trust_destination``, ``checksum``, ``durable``, ``ack``, ``sop_classes``,
        ``require_exact``, ``retries``, ``transfer_syntaxes``, ``deadlines``, ``transcript``
    :param query_model: ``StudyRoot`` or ``PatientRoot``; by default that of the connection
    :param dicom_conn_id: the ``dicom`` connection to the PACS (templated)
    """

    template_fields: Sequence[str] = (
        "study",
        "query",
        "manifest",
        "destination",
        "dicom_conn_id",
        "s3_conn_id",
        "manifest_root",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"study": "json", "query": "json"}
    checks: ClassVar[Mapping[str, Check]] = {
        **TransferOperator.checks,
        "store_with_file_meta": Flag(),
        "tags": OPTIONS["tags"].check,
        "on_bad_study": Choice(*ON_BAD_STUDY),
        "verbose": Flag(),
        "query_model": MODEL,
    }

    def __init__(
        self,
        *,
        study: str | Item | Sequence[str | Item] | None = None,
        query: Mapping[str, Any] | None = None,
        destination: str,
        store_with_file_meta: bool = True,
        tags: Sequence[str] = (),
        on_bad_study: str = "fail",
        verbose: bool = False,
        query_model: str | None = None,
        dicom_conn_id: str = DicomHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.query_model = self.checked("query_model", query_model)
        self.dicom_conn_id = dicom_conn_id
        self.study = study
        self.query = query
        self.destination = destination
        self.store_with_file_meta = self.checked("store_with_file_meta", store_with_file_meta)
        self.tags = self.checked("tags", tags)
        self.on_bad_study = self.checked("on_bad_study", on_bad_study)
        self.verbose = self.checked("verbose", verbose)

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests, and the values of identifying keys."""
        hide = {"study": shown_study, "query": shown_query, "manifest": shown_manifest}.get(name)
        return hide(value) if hide else value

    def map_label(self) -> str:
        """Name what is retrieved, without patient data: the study's UID."""
        return label_of(self.given("study"), self.given("query"), self.given("manifest"))

    def prepare(self, context: Context, name: str, ends: float) -> Transfer:
        """Look up the connections, and make the queries."""
        destinations = resolve_destinations(
            self.destination, manifest_root=self.manifest_root, s3_conn_id=self.s3_conn_id
        )
        calls = self._calls()
        if calls and "manifest" in calls[0]:  # of an empty list of studies there are none
            self.label_by(context, calls[0]["manifest"])
        hook = self.hook
        model = self.query_model or hook.query_model
        for call in calls:
            if "query" in call:
                parse_query(call["query"], query_model=model, timezone=hook.timezone)
        more: dict[str, Any] = {} if self.outside_window != "ignore" else {"window": None}
        scratch = None
        if destinations.root is None and isinstance(destinations.destination.destination, ForwardDestination):
            scratch = self.scratch()
            more["manifest_root"] = scratch.name
        options = hook.get_scu(
            destinations=destinations,
            associations=self.associations,
            strict_forward=self.strict_forward,
            store_with_file_meta=self.store_with_file_meta,
            resume=self.resume,
            tags=self.tags,
            verbose=self.verbose,
            **(self.engine_options or {}),
            **more,
        ).options
        run = partial(self._run, calls, model, name, partial(_client, options, ends))
        return Transfer(
            run, name, [_of_node(hook)], _where(destinations.destination), destinations.manifest_conn_id, scratch
        )

    def _calls(self) -> list[dict[str, Any]]:
        """What to retrieve: query or manifest for one call of the engine each."""
        kind, value = self.one_of("study", "query", "manifest")
        if kind == "manifest":
            return [{"manifest": load_given(value, self.s3_conn_id).table}]
        if kind == "study":
            queries = study_queries(value, skip=self._left_out if self.on_bad_study == "skip" else None)
            return [{"query": query} for query in queries]
        if not isinstance(value, Mapping) or not value:
            raise invalid("query", "is not a mapping of keys to values", 'For example, give {"PatientID": "…"}.')
        return [{"query": dict(value)}]

    def _left_out(self, error: DicomGetError) -> None:
        self.log.warning("Skipped: %s", error)

    # --- traffic -----------------------------------------------------------------------------------

    def _run(
        self,
        calls: Sequence[Mapping[str, Any]],
        model: str,
        name: str,
        make: Callable[[], GetScu],
        progress: Progress,
    ) -> list[Result]:
        """Retrieve one part after the other, until one is cancelled or has to wait for its hours."""
        results: list[Result] = []
        for number, call in enumerate(calls):
            self._scu = scu = make()
            if self._killed:
                results.append(report.never_begun())
                break
            try:
                result = scu.get_study(
                    **call,
                    query_model=model,
                    on_sub_operation=progress.on_sub_operation,
                    on_completed=progress.on_completed,
                    manifest_name=part_name(name, number, len(calls)),
                )
            except DicomGetError as error:
                if not results:
                    raise
                result = report.broken_off(error)  # the rows of the calls before it stay
            results.append(result)
            if result.verdict == CANCELLED or result.resume_at is not None:
                if number + 1 < len(calls):  # the others are asked for as well, and were not begun
                    waits = result.resume_at is not None
                    results.append(report.outside_hours(result.resume_at) if waits else report.never_begun())
                break
        return results


def _client(options: GetOptions, ends: float) -> GetScu:
    """The client for one query, with what is left of the task's time."""
    from airflow_dicom_get.getscu import GetScu

    return GetScu.of(replace(options, deadlines=within(options.deadlines, ends - time.monotonic())))


class DicomStoreOperator(TransferOperator):
    """Store at a DICOM node what a manifest lists as held, or the files of a folder or bucket.

    Retrieve first, forward later, with the acknowledgement of the node for every instance::

        get = DicomGetOperator.partial(task_id="get", destination="/data/dicom", retries=3).expand(study=find.output)
        DicomStoreOperator.partial(task_id="store", target_conn_id="archive").expand(manifest=get.output)

    The task succeeds if the verdict is one of ``accept``. Otherwise it is retried if the
    result is transient, which sends only what the node has not acknowledged yet, and fails at once if it is not.
    Nothing is stored at the node from which the manifest was retrieved.

    :param manifest: manifest of a retrieval, of any shape, or several: the objects that they list (templated)
    :param source: an absolute path or ``s3://[CONN_ID@]bucket/prefix``, instead of a manifest (templated)
    :param target_conn_id: the ``dicom`` connection of the node to store at (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of the bucket in which the objects lie; by default the one
        that the address of source or manifest names (templated)
    :param associations: number of parallel associations of the task; set ``pool_slots`` to the same number
    :param accept: verdicts that are a success: ``complete``, ``partial``, ``failed``
    :param resume: skip what the node has acknowledged before
    :param strict_forward: end at the first instance that the node refuses
    :param manifest_root: absolute path or ``s3://[CONN_ID@]bucket/prefix`` for manifest and ledger; by default
        ``[dicom_get] manifest_root`` (templated)
    :param manifest_xcom: as in ``DicomGetOperator``
    :param outside_window: outside the window of the connection, ``defer`` until it opens, ``fail``, or ``ignore`` it
    :param engine_options: options of ``StoreScu`` for this task: ``verify_held``, ``trust_destination``, ``checksum``,
        ``retries``, ``deadlines``, ``transcript``
    """

    template_fields: Sequence[str] = ("manifest", "source", "target_conn_id", "s3_conn_id", "manifest_root")
    phase = "store"
    checks: ClassVar[Mapping[str, Check]] = {
        **TransferOperator.checks,
        "engine_options": engine_options_of(StoreOptions),
    }

    def __init__(
        self,
        *,
        manifest: Any = None,
        source: str | None = None,
        target_conn_id: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(manifest=manifest, **kwargs)
        self.source = source
        self.target_conn_id = target_conn_id

    @property
    def hook(self) -> DicomHook:
        """The hook of the node to store at."""
        return DicomHook(self.target_conn_id)

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests."""
        return shown_manifest(value) if name == "manifest" else value

    def map_label(self) -> str:
        """Name what is stored, without patient data: the study's UID."""
        manifest = self.given("manifest")
        return str(self.source)[:200] if manifest is None else label_of(None, None, manifest)

    def prepare(self, context: Context, name: str, ends: float) -> Transfer:
        """Look up the connections, and load the manifest."""
        kind, value = self.one_of("manifest", "source")
        check_allowed(ForwardDestination(conn_id=self.target_conn_id), "target_conn_id")
        objects: ResolvedDestination | None
        given: dict[str, Any]
        if kind == "manifest":
            listed = load_given(value, self.s3_conn_id)
            self.label_by(context, listed.table)
            sources = [_where(ResolvedDestination(place)) for place in listed.places]
            objects = place_of_objects(listed, self.s3_conn_id or connection_of(value))
            given = {"manifest": listed}
        else:
            place = objects = resolve_destination(value, "source", self.s3_conn_id)
            given = {"source": _address(place)}
            sources = [_where(place)]
        root = resolve_root(self.manifest_root, s3_conn_id=self.s3_conn_id)
        buckets = [place for place in (objects, root) if place is not None and place.s3_config is not None]
        if len({place.conn_id for place in buckets}) > 1:
            raise invalid(
                "manifest_root",
                f"uses the connection {buckets[1].conn_id}, but the objects use {buckets[0].conn_id}",
                "Give one connection for both.",
            )
        scratch = self.scratch() if root is None else None
        options: dict[str, Any] = {
            "manifest_root": root.destination if root is not None else scratch.name if scratch is not None else None,
            "s3_config": buckets[0].s3_config if buckets else None,
            "strict_forward": self.strict_forward,
            "resume": self.resume,
            **(self.engine_options or {}),
        }
        hook = self.hook
        hours = hook.config.own
        scu = hook.get_store_scu(associations=self.associations, **options)
        run = partial(self._run, scu.options, given, name, hours, ends)
        return Transfer(
            run,
            name,
            sources,
            _of_node(hook),
            root.conn_id if root is not None else None,
            scratch,
            by_study=kind == "manifest",
        )

    # --- traffic -----------------------------------------------------------------------------------

    def _run(
        self,
        options: StoreOptions,
        given: dict[str, Any],
        name: str,
        hours: GetOptions,
        ends: float,
        progress: Progress,
    ) -> list[Result]:
        window = None if self.outside_window == "ignore" else hours.window
        closes = None
        if window is not None:
            now = datetime.now(UTC)
            closes = window.closes_at(now, hours.timezone)
            if closes is None:
                resume_at = window.opens_at(now, hours.timezone)
                return [report.outside_hours(resume_at, kind="store")]
        from airflow_dicom_get.store import StoreScu

        scu = StoreScu.of(replace(options, deadlines=within(options.deadlines, ends - time.monotonic())))
        self._scu = scu
        if self._killed:
            return [report.never_begun(kind="store")]
        with _until(closes, scu):
            result = scu.store(
                **given,
                on_sub_operation=progress.on_sub_operation,
                on_completed=progress.on_completed,
                on_unusable=self._unusable,
                manifest_name=name,
            )
        if window is not None and result.verdict == CANCELLED and not self._killed:
            report.wait_for_window(result, window.opens_at(datetime.now(UTC), hours.timezone))
        return [result]

    def _unusable(self, name: str, why: str) -> None:
        self.log.warning("Skipped: %s", printable(f"{name} {why}"))


@contextmanager
def _until(closes: datetime | None, scu: StoreScu) -> Iterator[None]:
    """End the transfer when the hours do."""
    if closes is None:
        yield
        return
    timer = threading.Timer(max((closes - datetime.now(UTC)).total_seconds(), 0), scu.cancel, ["window"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _of_node(hook: DicomHook) -> str:
    """The address of the node of a connection."""
    return f"dicom://{hook.node}"


def _where(place: ResolvedDestination) -> str:
    """The address of a place, with a node in place of the connection that says which."""
    if place.target is not None:
        return f"dicom://{place.target.node}"
    if isinstance(place.destination, ForwardDestination):
        return str(place.destination)
    return place.destination.uri


def _address(place: ResolvedDestination) -> str:
    if isinstance(place.destination, ForwardDestination):
        raise invalid("source", "is a DICOM node", "Give an absolute path, or s3://CONN_ID@bucket/prefix.")
    if isinstance(place.destination, S3Destination):
        return f"s3://{place.destination.bucket}/{quote(place.destination.prefix)}"
    return str(place.destination.path)


class DicomVerifyOperator(DicomTask):
    """Compare what a manifest lists, what is stored, and what a PACS lists now.

    The parameters decide what is compared: ``manifest`` alone (whether what was retrieved is still there, byte for
    byte), ``manifest`` and ``dicom_conn_id`` (and whether the PACS lists the same), ``study`` with ``destination`` (and
    ``dicom_conn_id``)::

        DicomVerifyOperator(task_id="verify", manifest=get.output, dicom_conn_id="pacs")

    Returns a DataFrame ``study_instance_uid, series_instance_uid, sop_instance_uid, symbol, what`` of all that is
    not the same: ``+`` listed but missing, ``-`` present but not listed (which fails nothing), ``*`` different, ``!``
    not readable.
    A manifest of the comparison is written as well: ``DicomGetOperator`` accepts it. Its address is in ``summary``.

    :param manifest: manifest of a retrieval, of any shape, or several (templated)
    :param study: Study Instance UID, Item of ``DicomFindOperator``, or a list of either; of an Item with series only
        these are compared (templated)
    :param destination: where to look, if not where the manifest points to: an absolute path,
        ``s3://[CONN_ID@]bucket/prefix``, ``dicom://CONN_ID`` or ``dicom://[AE@]host:port`` (templated)
    :param dicom_conn_id: the ``dicom`` connection of a PACS whose list is compared (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of a bucket whose address names none (templated)
    :param quick: compare sizes only; do not read the objects
    :param fail_on_difference: whether differences fail the task
    :param listed_within: how long a node as ``destination`` may take until it lists what it was given: until then it is
        asked again, and only what it does not list by then is a difference
    """

    operator_extra_links = (DicomManifestLink(),)
    template_fields: Sequence[str] = ("manifest", "study", "destination", "dicom_conn_id", "s3_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"study": "json"}
    checks: ClassVar[Mapping[str, Check]] = {
        "quick": Flag(),
        "fail_on_difference": Flag(),
        "listed_within": SPAN,
    }

    def __init__(
        self,
        *,
        manifest: Any = None,
        study: str | Item | Sequence[str | Item] | None = None,
        destination: str | None = None,
        dicom_conn_id: str | None = None,
        s3_conn_id: str | None = None,
        quick: bool = False,
        fail_on_difference: bool = True,
        listed_within: timedelta = timedelta(0),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.manifest = manifest
        self.study = study
        self.destination = destination
        self.dicom_conn_id = dicom_conn_id  # type: ignore[assignment]  # here it may be left out
        self.s3_conn_id = s3_conn_id
        self.quick = self.checked("quick", quick)
        self.fail_on_difference = self.checked("fail_on_difference", fail_on_difference)
        self.listed_within = self.checked("listed_within", listed_within)

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests."""
        hide = {"study": shown_study, "manifest": shown_manifest}.get(name)
        return hide(value) if hide else value

    def map_label(self) -> str:
        """Name what is verified, without patient data."""
        return label_of(self.given("study"), None, self.given("manifest"))

    def execute(self, context: Context) -> Any:
        """Compare, and return the differences."""
        with final_errors(), TemporaryDirectory(prefix="dicom-get-") as scratch:
            found, result, conn_id = self._verify(context, scratch)
            self.log.info("%s.", found.summary())
            for error in found.errors:
                self.log.warning("%d × %s", error["count"], sentences(error["error"], error["hint"] or ""))
            frame = found.frame()
            summed = self._summary(context, found, result, conn_id)
            size, limit = bytes_in_xcom(frame), configuration.integer("manifest_xcom_max_bytes")
            ti = context["ti"]
            ti.xcom_push("summary", summed)
            if size > limit:
                raise AirflowFailException(
                    f"{found.summary()}. The {len(frame)} differences take {size} bytes in XCom, and [dicom_get] "
                    f"manifest_xcom_max_bytes is {limit}; all of them are in {summed['manifest_uri']}."
                )
            failing = found.unreachable or (not found.same and self.fail_on_difference)
            if failing and self.do_xcom_push:
                ti.xcom_push("return_value", frame)
            if found.differs and self.fail_on_difference:
                raise AirflowFailException(f"{found.summary()}. The XCom return_value lists the differences.")
            if found.unreachable:
                raise IncompleteRetrieval(f"{found.summary()}. {found.uncompared}", verdict=UNVERIFIED, transient=True)
            if found.uncompared is not None and self.fail_on_difference:
                raise AirflowFailException(f"{found.summary()}. {found.uncompared}")
        return frame

    def _verify(self, context: Context, scratch: str) -> tuple[Verification, Result, str | None]:
        from airflow_dicom_get.net.association import Cancels
        from airflow_dicom_get.verify import How, compare

        cancels = Cancels()
        self.ends_with_task(cancels)  # first: what ends the task meanwhile ends the comparison at its start
        manifest, study = self.given("manifest"), self.given("study")
        if manifest is None and study is None:
            raise invalid(
                "manifest, study", "none of them is given", "Give one or both. A template may have rendered to nothing."
            )
        studies = study_uids(study) if study is not None else []
        listed = load_given(manifest, self.s3_conn_id) if manifest is not None else None
        if listed is not None and study is None:
            self.label_by(context, listed.table)
        place = (
            resolve_destination(self.destination, "destination", self.s3_conn_id)
            if self.destination is not None
            else None
        )
        if manifest is None and place is None:
            raise invalid("destination", "is missing", "Give the destination of the study, or a manifest.")
        objects = place
        if objects is None and listed is not None:
            objects = place_of_objects(listed, self.s3_conn_id or connection_of(manifest))
        root = None if place is not None and not _is_node(place) else resolve_root(None, s3_conn_id=self.s3_conn_id)
        kept = root is not None or (place is not None and not _is_node(place))
        buckets = [one for one in (objects, root) if one is not None and one.s3_config is not None]
        options: dict[str, Any] = {}
        if buckets:
            options["s3_config"] = buckets[0].s3_config
        if root is not None or not kept:
            options["manifest_root"] = root.destination if root is not None else scratch
        if place is not None and place.target is not None:
            options["forward_target"] = place.target.forward_target()
        source = None
        if self.dicom_conn_id is not None:
            hook = DicomHook(self.dicom_conn_id)
            source = str(hook.node)
            options |= hook.config.own.values(NodeOptions) | {"query_model": hook.query_model}
        if place is not None:
            options["destination"] = place.destination
        found = compare(
            VerifyOptions.check(options),
            listed,
            studies,
            how=How(self.quick, self.listed_within.total_seconds(), study_series(study) if study is not None else {}),
            manifest_name=run_name_of(context["ti"]),
            cancels=cancels,
        )
        if not kept:
            found.manifest_uri = None
        conn_id = root.conn_id if root is not None else place.conn_id if place is not None else None
        return found, _result(found, source, self.destination), conn_id

    def _summary(self, context: Context, found: Verification, result: Result, conn_id: str | None) -> dict[str, Any]:
        kept = {}
        if found.manifest_uri is not None and found.written is not None:
            kept = reference_to(with_connection(found.manifest_uri, conn_id), found.written)
        return {
            **summary(
                result,
                kind="verify",
                manifest={
                    **counts_of(manifest_table(found.rows, source="", destination="")),
                    "manifest_kind": "reference",
                    "manifest_uri": kept.get("manifest_uri"),
                    "manifest_rows": len(found.rows),
                    "manifest_sha256": kept.get("sha256"),
                },
                try_number=context["ti"].try_number,
            ),
            "symbols": dict(found.counts),
        }


def _is_node(place: ResolvedDestination) -> bool:
    return isinstance(place.destination, ForwardDestination)


def _result(found: Verification, source: str | None, destination: str | None) -> Result:
    """The comparison in the words of a retrieval: what is the same counts as held."""
    from airflow_dicom_get.engine.report import assemble_comparison, verdict_of_comparison

    return assemble_comparison(
        found.counts,
        verdict=verdict_of_comparison(found.same, found.differs),
        plan_at=found.plan_at,
        errors=found.errors,
        node=source,
        destination=destination,
    )
