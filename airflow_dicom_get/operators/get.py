"""The operator that retrieves studies from a PACS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_dicom_get.config.checks import invalid
from airflow_dicom_get.config.destination import ForwardDestination
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.engine.retry import manifest_queries
from airflow_dicom_get.hooks._destinations import Destinations, resolve_destinations
from airflow_dicom_get.hooks._redaction import label_of, shown_manifest, shown_query, shown_study
from airflow_dicom_get.hooks._studies import study_queries
from airflow_dicom_get.operators._manifests import load_given, part_name
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.operators._transfer import Transfer, TransferOperator
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import CANCELLED

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.engine.items import Item
    from airflow_dicom_get.errors import DicomGetError
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.hooks.dicom import DicomHook

ON_BAD_STUDY = ("fail", "skip")


class DicomGetOperator(TransferOperator):
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
    :param destination: an absolute path or ``file://…``; ``s3://[CONN_ID@]bucket/prefix``; ``dicom://CONN_ID``, the
        node of a ``dicom`` connection with its AE titles, TLS and limits, or ``dicom://[AE@]host:port``: instances
        go on there as they arrive, and nothing is kept here (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of a bucket whose address names none (templated)
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
    :param manifest_root: absolute path or ``s3://[CONN_ID@]bucket/prefix`` for manifests and ledger; by default
        ``_manifests`` in the destination, and for a DICOM node ``[dicom_get] manifest_root`` (templated)
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
        destination: str,
        store_with_file_meta: bool = True,
        verify_held: str = "size",
        tags: Sequence[str] = (),
        checksum: str | None = "sha256",
        durable: bool = True,
        ack: str = "taken",
        on_bad_study: str = "fail",
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.study = study
        self.query = query
        self.destination = destination
        self.store_with_file_meta = store_with_file_meta
        self.verify_held = verify_held
        self.tags = tags
        self.checksum = checksum
        self.durable = durable
        self.ack = ack
        self.on_bad_study = on_bad_study
        self.verbose = verbose

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests, and the values of identifying keys."""
        hide = {"study": shown_study, "query": shown_query, "manifest": shown_manifest}.get(name)
        return hide(value) if hide else value

    def map_label(self) -> str:
        """Name what is retrieved, without patient data: the study's UID."""
        return label_of(self.given("study"), self.given("query"), self.given("manifest"))

    def choices(self) -> dict[str, Sequence[str]]:
        """What each parameter that is a choice may be."""
        return {**super().choices(), "on_bad_study": ON_BAD_STUDY}

    def prepare(self, context: Context, name: str, ends: float) -> Transfer:
        """Look up the connections, and make the queries."""
        destinations = resolve_destinations(
            self.destination, manifest_root=self.manifest_root, s3_conn_id=self.s3_conn_id
        )
        queries = self._queries()
        hook = self.hook
        model = self.query_model or hook.query_model
        for query in queries:
            parse_query(query, query_model=model, timezone=hook.timezone)
        options: dict[str, Any] = {}
        scratch = None
        if destinations.root is None and isinstance(destinations.destination.destination, ForwardDestination):
            scratch = self.scratch()
            options["manifest_root"] = scratch.name
        make = partial(self._make_scu, hook, destinations, ends, options)
        make({})  # what is wrong with the options shows here
        return Transfer(partial(self._run, queries, model, name, make), name, destinations.manifest_conn_id, scratch)

    def _queries(self) -> list[dict[str, Any]]:
        """What to retrieve, as queries for one call of the engine each."""
        kind, value = self.one_of("study", "query", "manifest")
        if kind == "study":
            return study_queries(value, skip=self._left_out if self.on_bad_study == "skip" else None)
        if kind == "manifest":
            return manifest_queries(load_given(value, self.s3_conn_id))
        if not isinstance(value, Mapping) or not value:
            raise invalid("query", "is no mapping of keys to values", 'Give {"PatientID": "…"}, for example.')
        return [dict(value)]

    def _left_out(self, error: DicomGetError) -> None:
        self.log.warning("Left out: %s", error)

    # --- traffic -----------------------------------------------------------------------------------

    def _run(
        self,
        queries: Sequence[Mapping[str, Any]],
        model: str,
        name: str,
        make: Callable[[Mapping[str, Any]], GetScu],
        progress: Progress,
    ) -> list[Result]:
        """Retrieve one part after the other, until one is cancelled or has to wait for its hours."""
        results: list[Result] = []
        for number, query in enumerate(queries):
            self._scu = scu = make(query)
            if self._killed:
                results.append(Result(verdict=CANCELLED))
                break
            result = scu.get_study(
                query,
                query_model=model,
                on_sub_operation=progress.on_sub_operation,
                on_completed=progress.on_completed,
                manifest_name=part_name(name, number, len(queries)),
            )
            results.append(result)
            if result.verdict == CANCELLED or result.resume_at is not None:
                break
        return results

    def _make_scu(
        self,
        hook: DicomHook,
        destinations: Destinations,
        ends: float,
        more: Mapping[str, Any],
        query: Mapping[str, Any],
    ) -> GetScu:
        studies = query.get("StudyInstanceUID")
        options: dict[str, Any] = {
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
            **more,
        }
        if self.outside_window == "ignore":
            options["window"] = None
        if isinstance(studies, list):
            # Whoever names each of them knows how many they are.
            options["max_studies"] = max(len(studies), 100)
        return hook.get_scu(seconds=ends - time.monotonic(), destinations=destinations, **options)
