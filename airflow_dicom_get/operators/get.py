"""The operator that retrieves studies from a PACS."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.checks import invalid, shown
from airflow_dicom_get.operators import _config
from airflow_dicom_get.operators._base import DicomOperator, final_errors
from airflow_dicom_get.operators._hiding import label_of, shown_manifest, shown_query, shown_study
from airflow_dicom_get.operators._manifests import MODES, Manifest, check_place, part_name, root_of, run_name
from airflow_dicom_get.operators._outcome import check_accept, merge, raise_for, summary
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.operators._request import Query, manifest_queries, study_queries
from airflow_dicom_get.query import parse_query
from airflow_dicom_get.result import CANCELLED, Result

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.errors import DicomGetError
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.hooks.dicom import DicomHook
    from airflow_dicom_get.operators._items import Item

OUTSIDE_WINDOW = ("defer", "fail", "ignore")
ON_BAD_STUDY = ("fail", "skip")


@dataclass(frozen=True)
class _Request:
    """What one task does, checked."""

    hook: DicomHook
    model: str
    queries: Sequence[Query]
    destination: str
    root: str | None
    """Where manifests and ledger go; None: below the destination."""
    name: str
    """Name of the manifest below that."""
    ends: float
    """``time.monotonic()`` value at which the engine is to have ended."""


class DicomGetOperator(DicomOperator):
    """Retrieve studies by C-GET, and prove instance by instance that they are held.

    One task retrieves one study, a list of them, what a query matches, or what a manifest lists::

        find = DicomFindOperator(task_id="find", study_date="today-1")
        DicomGetOperator.partial(task_id="get", destination="/data/dicom", retries=3).expand(study=find.output)

    The task succeeds if the verdict is one of ``accept``. Else another try, which fetches only what is missing,
    follows where that can help, and none where it cannot. Whatever the verdict, the manifest file is written, and
    ``summary`` and ``return_value`` are in XCom.

    :param study: Study Instance UID, Item of ``DicomFindOperator``, or a list of either (templated)
    :param query: DICOM keywords or tags, and values, which may match several studies (templated)
    :param manifest: manifest of an earlier retrieval, or several: the instances that they list (templated)
    :param destination: an absolute path or ``file://…`` (templated)
    :param s3_conn_id: connection of a bucket as destination (templated)
    :param associations: associations that the task uses at a time; give as many ``pool_slots``
    :param accept: verdicts that are a success: ``complete``, ``empty``, ``unverified``, ``partial``, ``failed``
    :param strict_forward: end at the first instance that a DICOM node as destination refuses
    :param store_with_file_meta: write DICOM files, not bare data sets
    :param resume: skip what is held and verified
    :param verify_held: ``size``, ``digest`` or ``none``: how what is held is verified
    :param tags: keywords of attributes that become columns of the manifest. They go to XCom, which every viewer of
        the DAG can read.
    :param checksum: ``sha256``, or None for no digest
    :param durable: count an instance once it is synced to the disk
    :param ack: ``taken`` or ``durable``: when an instance is acknowledged to the PACS
    :param manifest_root: absolute path for manifests and ledger; ``_manifests`` in the destination by default
        (templated)
    :param manifest_xcom: ``auto`` returns the manifest as a DataFrame, and a reference to its file where it is larger
        than ``[dicom_get] manifest_xcom_max_bytes``; ``full`` always the DataFrame; ``reference`` always the reference
    :param outside_window: outside the hours of the connection ``defer`` until they begin, ``fail``, or ``ignore`` them
    :param on_bad_study: a malformed UID in a list makes the task ``fail``, or is left out (``skip``)
    :param verbose: log each instance
    :param query_model: ``StudyRoot`` or ``PatientRoot``; the connection's by default
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

    def __init__(
        self,
        *,
        study: str | Item | Sequence[str | Item] | None = None,
        query: Mapping[str, Any] | None = None,
        manifest: Any = None,
        destination: str,
        s3_conn_id: str | None = None,
        associations: int = 1,
        accept: Sequence[str] = ("complete",),
        strict_forward: bool = False,
        store_with_file_meta: bool = True,
        resume: bool = True,
        verify_held: str = "size",
        tags: Sequence[str] = (),
        checksum: str | None = "sha256",
        durable: bool = True,
        ack: str = "taken",
        manifest_root: str | None = None,
        manifest_xcom: str = "auto",
        outside_window: str = "defer",
        on_bad_study: str = "fail",
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.study = study
        self.query = query
        self.manifest = manifest
        self.destination = destination
        self.s3_conn_id = s3_conn_id
        self.associations = associations
        self.accept = accept
        self.strict_forward = strict_forward
        self.store_with_file_meta = store_with_file_meta
        self.resume = resume
        self.verify_held = verify_held
        self.tags = tags
        self.checksum = checksum
        self.durable = durable
        self.ack = ack
        self.manifest_root = manifest_root
        self.manifest_xcom = manifest_xcom
        self.outside_window = outside_window
        self.on_bad_study = on_bad_study
        self.verbose = verbose

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests, and the values of identifying keys."""
        hide = {"study": shown_study, "query": shown_query, "manifest": shown_manifest}.get(name)
        return hide(value) if hide else value

    def map_label(self) -> str:
        """Name what is retrieved, without patient data: the study's UID."""
        return label_of(self.given("study"), self.given("query"), self.given("manifest"))

    def execute(self, context: Context) -> Any:
        """Retrieve, and return the manifest or a reference to it."""
        return self._retrieve(context)

    def execute_after_window(self, context: Context, event: Any = None) -> Any:
        """Go on when the hours of the connection have begun."""
        self.log.info("The retrieval goes on.")
        return self._retrieve(context)

    def _retrieve(self, context: Context) -> Any:
        with final_errors():
            request = self._request(context)
            progress = Progress(
                log=self.log,
                store=context.get("task_state_store"),
                interval=_config.integer("progress_interval"),
                associations=self.associations,
            )
            results = self._run(request, progress)
            result = merge(results)
            self.log.info("%s.", result.summary())
            for error in result.errors:
                self.log.warning("%d × %s %s", error["count"], error["error"], error["hint"])
            manifest = Manifest(results, request.name, mode=self.manifest_xcom, log=self.log)
        progress.finish("done")
        return self._end(context, result, manifest, progress)

    # --- before traffic ----------------------------------------------------------------------------

    def _request(self, context: Context) -> _Request:
        started = time.monotonic()
        self._check_choices()
        self._check_dependants(context)
        destination = check_place(self.destination, "destination")
        root = root_of(destination, self.manifest_root, _config.text("manifest_root"))
        queries = self._queries()
        hook = self.hook
        model = self.query_model or hook.query_model
        for query in queries:
            parse_query(query, query_model=model, timezone=hook.timezone)
        self.warn_of_limits(context, associations=self.associations, require_pool=_config.boolean("require_pool"))
        ti = context["ti"]
        name = run_name(
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=-1 if ti.map_index is None else ti.map_index,
            try_number=ti.try_number,
        )
        return _Request(hook, model, queries, destination, root, name, started + self._seconds())

    def _seconds(self) -> float:
        """How long the engine may run: a little less than the task, to end with a verdict and a manifest."""
        if self.execution_timeout is None:
            return float("inf")
        seconds = self.execution_timeout.total_seconds()
        return seconds - min(10.0, 0.2 * seconds)

    def _check_choices(self) -> None:
        for name, allowed in (("manifest_xcom", MODES), ("outside_window", OUTSIDE_WINDOW),
                              ("on_bad_study", ON_BAD_STUDY)):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise invalid(name, f"{shown(getattr(self, name))} is not allowed", f"Give {' or '.join(allowed)}.")
        check_accept(self.accept)

    def _check_dependants(self, context: Context) -> None:
        """Refuse what Airflow would fail only after the work: to map over what one task returns."""
        if getattr(context["ti"], "is_mapped", False):
            return
        consumer = next(self.iter_mapped_dependants(), None)
        if consumer is not None:
            raise AirflowFailException(
                f"{consumer.node_id} is mapped over the output of {self.task_id}, which is one manifest and no list. "
                f"Map {self.task_id} itself: DicomGetOperator.partial(…).expand(study=[…]); or give its output as it "
                f"is: manifest={self.task_id}.output without expand."
            )

    def _queries(self) -> list[Query]:
        """What to retrieve, as queries for one call of the engine each."""
        given = [name for name in ("study", "query", "manifest") if self.given(name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none of them is given"
            raise invalid("study, query, manifest", what, "Give one of the three. Did a template render to nothing?")
        value = self.given(given[0])
        if given == ["study"]:
            return study_queries(value, skip=self._left_out if self.on_bad_study == "skip" else None)
        if given == ["manifest"]:
            return manifest_queries(value)
        if not isinstance(value, Mapping) or not value:
            raise invalid("query", "is no mapping of keys to values", 'Give {"PatientID": "…"}, for example.')
        return [dict(value)]

    def _left_out(self, error: DicomGetError) -> None:
        self.log.warning("Left out: %s", error)

    # --- traffic -----------------------------------------------------------------------------------

    def _run(self, request: _Request, progress: Progress) -> list[Result]:
        """Retrieve one part after the other, until one is cancelled or has to wait for its hours."""
        results: list[Result] = []
        for number, query in enumerate(request.queries):
            self._scu = scu = self._make_scu(request, query)
            if self._killed:
                results.append(Result(verdict=CANCELLED))
                break
            result = scu.get_study(
                query,
                query_model=request.model,
                on_sub_operation=progress.on_sub_operation,
                on_completed=progress.on_completed,
                manifest_name=part_name(request.name, number, len(request.queries)),
            )
            results.append(result)
            if result.verdict == CANCELLED or result.resume_at is not None:
                break
        return results

    def _make_scu(self, request: _Request, query: Query) -> GetScu:
        studies = query.get("StudyInstanceUID")
        options: dict[str, Any] = {
            "destination": request.destination,
            "associations": self.associations,
            "strict_forward": self.strict_forward,
            "store_with_file_meta": self.store_with_file_meta,
            "resume": self.resume,
            "verify_held": self.verify_held,
            "tags": tuple(self.tags),
            "checksum": self.checksum,
            "durable": self.durable,
            "ack": self.ack,
            "verbose": self.verbose,
        }
        if request.root is not None:
            options["manifest_root"] = request.root
        if self.outside_window == "ignore":
            options["window"] = None
        if isinstance(studies, list):
            # Whoever names each of them knows how many they are.
            options["max_studies"] = max(len(studies), 100)
        return request.hook.get_scu(seconds=request.ends - time.monotonic(), **options)

    # --- after it ----------------------------------------------------------------------------------

    def _end(self, context: Context, result: Result, manifest: Manifest, progress: Progress) -> Any:
        """Leave summary and manifest in XCom, whatever the verdict; then succeed, raise or defer."""
        ti = context["ti"]
        self._push(ti, "summary", summary(result, **manifest.counts(), try_number=ti.try_number), result)
        value = manifest.value
        waits = result.resume_at is not None and self.outside_window == "defer"
        if result.verdict in check_accept(self.accept) and not waits and manifest.problem is None:
            return value
        if self.do_xcom_push:
            self._push(ti, "return_value", value, result)
        if manifest.problem is not None:
            raise AirflowFailException(manifest.problem)
        if waits:
            self._defer(result, progress)
        if result.resume_at is not None and result.verdict != CANCELLED:
            raise AirflowFailException(f"{result.summary()}. outside_window is 'fail'.")
        raise_for(result, self.accept)
        return value

    def _push(self, ti: Any, key: str, value: Any, result: Result) -> None:
        try:
            ti.xcom_push(key, value)
        except Exception as error:
            # A task that was ended from outside may write no more; its own error is the one to see.
            if result.verdict != CANCELLED:
                raise
            self.log.warning("XCom %s could not be written: %s", key, type(error).__name__)

    def _defer(self, result: Result, progress: Progress) -> None:
        from airflow.providers.standard.triggers.temporal import DateTimeTrigger

        assert result.resume_at is not None
        progress.window(result.resume_at)
        self.log.info("The hours of the PACS are over; the task goes on at %s.", result.resume_at.isoformat())
        self.defer(trigger=DateTimeTrigger(moment=result.resume_at), method_name="execute_after_window")
