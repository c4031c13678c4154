"""The operator that holds what is listed against what is there."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.checks import invalid
from airflow_dicom_get.config.destination import ForwardDestination
from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.errors import IncompleteRetrieval
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.hooks._destinations import ResolvedDestination, resolve_destination, resolve_root
from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.hooks._redaction import label_of, shown_manifest, shown_study
from airflow_dicom_get.hooks._studies import study_uids
from airflow_dicom_get.hooks._task import DicomTask
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.operators._manifests import (
    connection_of,
    load_given,
    one_table,
    place_of_objects,
    run_name_of,
    xcom_bytes,
)
from airflow_dicom_get.operators._outcome import summary
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import COMPLETE, PARTIAL, UNVERIFIED, Verdict

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.engine.items import Item
    from airflow_dicom_get.verify import Verification


class DicomVerifyOperator(DicomTask):
    """Compare what a manifest lists, what is there, and what a PACS lists now.

    Three comparisons, by what is given: ``manifest`` alone (is what was retrieved still there, byte for byte),
    ``manifest`` and ``dicom_conn_id`` (and does the PACS list the same), ``study`` with ``destination`` (and
    ``dicom_conn_id``)::

        DicomVerifyOperator(task_id="verify", manifest=get.output, dicom_conn_id="pacs")

    Returns a DataFrame ``study_instance_uid, series_instance_uid, sop_instance_uid, symbol, what`` of all that is
    not the same: ``+`` listed and not there, ``-`` there and not listed, ``*`` of other content, ``!`` not readable.
    A manifest of what was found is written as well; its address is in ``summary``, and ``DicomGetOperator`` takes it.

    :param manifest: manifest of a retrieval, of any shape, or several (templated)
    :param study: Study Instance UID, Item of ``DicomFindOperator``, or a list of either (templated)
    :param destination: where to look, if not where the manifest says: an absolute path,
        ``s3://[CONN_ID@]bucket/prefix``, ``dicom://CONN_ID`` or ``dicom://[AE@]host:port`` (templated)
    :param dicom_conn_id: the ``dicom`` connection of a PACS whose list is compared (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of a bucket whose address names none (templated)
    :param quick: compare sizes, and read nothing
    :param fail_on_difference: let the task fail where something is not the same
    :param query_model: ``StudyRoot`` or ``PatientRoot``; the connection's by default
    """

    template_fields: Sequence[str] = ("manifest", "study", "destination", "dicom_conn_id", "s3_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"study": "json"}

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.manifest = manifest
        self.study = study
        self.destination = destination
        self.dicom_conn_id = dicom_conn_id  # type: ignore[assignment]  # here it may be left out
        self.s3_conn_id = s3_conn_id
        self.quick = quick
        self.fail_on_difference = fail_on_difference

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
                self.log.warning("%d × %s %s", error["count"], error["error"], error["hint"])
            frame = found.frame()
            summed = self._summary(context, found, result, conn_id)
        size, limit = xcom_bytes(frame), configuration.integer("manifest_xcom_hard_max_bytes")
        ti = context["ti"]
        ti.xcom_push("summary", summed)
        if size > limit:
            raise AirflowFailException(
                f"{found.summary()}. The {len(frame)} differences take {size} bytes in XCom, and [dicom_get] "
                f"manifest_xcom_hard_max_bytes is {limit}; all of them are in {summed['manifest_uri']}."
            )
        failing = found.uncompared is not None or (found.differences and self.fail_on_difference)
        if failing and self.do_xcom_push:
            ti.xcom_push("return_value", frame)
        if found.differences and self.fail_on_difference:
            raise AirflowFailException(f"{found.summary()}. XCom return_value names each difference.")
        if found.uncompared is not None:
            raise IncompleteRetrieval(f"{found.summary()}. {found.uncompared}", verdict=UNVERIFIED, transient=True)
        return frame

    def _verify(self, context: Context, scratch: str) -> tuple[Verification, Result, str | None]:
        from airflow_dicom_get.verify import verify

        manifest, study = self.given("manifest"), self.given("study")
        if manifest is None and study is None:
            raise invalid(
                "manifest, study", "none of them is given", "Give one or both. Did a template render to nothing?"
            )
        studies = study_uids(study) if study is not None else []
        tables = load_given(manifest, self.s3_conn_id) if manifest is not None else []
        place = (
            resolve_destination(self.destination, "destination", self.s3_conn_id)
            if self.destination is not None
            else None
        )
        if manifest is None and place is None:
            raise invalid("destination", "is missing", "Say where the study should be, or give a manifest.")
        objects = place or place_of_objects(tables, self.s3_conn_id or connection_of(manifest))
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
            asked = hook.options()
            options["addr"] = asked.addr
            options["query_model"] = self.query_model or hook.query_model
            options |= {
                name: getattr(asked, name) for name in ("calling_ae_title", "max_pdu_length", "tls", "deadlines")
            }
        found = verify(
            one_table(tables) if tables else None,
            study=studies or None,
            destination=place.destination if place is not None else None,  # type: ignore[arg-type]
            quick=self.quick,
            manifest_name=run_name_of(context["ti"]),
            **options,
        )
        if not kept:
            found.manifest_uri = None
        conn_id = root.conn_id if root is not None else place.conn_id if place is not None else None
        return found, _result(found, source, self.destination), conn_id

    def _summary(self, context: Context, found: Verification, result: Result, conn_id: str | None) -> dict[str, Any]:
        from airflow_dicom_get.manifest.files import reference

        kept = reference(with_connection(found.manifest_uri, conn_id)) if found.manifest_uri is not None else {}
        return {
            **summary(
                result,
                studies=len({row.study for row in found.rows}),
                series=len({(row.study, row.series) for row in found.rows}),
                manifest={
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
    total, same = sum(found.counts.values()), found.counts["="]
    verdict: Verdict = COMPLETE if found.same else PARTIAL if found.differences else UNVERIFIED
    return Result(
        verdict,
        None if found.same else "differences" if found.differences else "not_compared",
        expected=total,
        total=total,
        completed=same,
        failed=total - same,
        withdrawn=found.counts["-"],
        bytes=0,
        plan_at=found.plan_at,
        evidence="list" if found.plan_at is not None else "none",
        errors=list(found.errors),
        node=source,
        destination=destination,
    )
