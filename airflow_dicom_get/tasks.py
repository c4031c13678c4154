"""What DAGs use that is no operator: a cohort from a file, the group find → get → report, an export, final errors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from airflow.sdk import task_group
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.connections import with_connection
from airflow_dicom_get.engine.items import Item, make_item, pack
from airflow_dicom_get.hooks._destinations import ResolvedDestination, check_address, resolve_destination
from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.hooks.configuration import max_map_length
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.operators._functions import function_task
from airflow_dicom_get.operators._manifests import connection_of, load_each, place_of_objects
from airflow_dicom_get.operators._outcome import check_accept
from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.vocabulary import (
    COMPLETE,
    FAILED,
    HELD,
    NOT_HELD,
    REASONS,
    WORST_FIRST,
    Verdict,
    accepted,
    advice,
    noun,
    worst,
)

if TYPE_CHECKING:
    from airflow_dicom_get.engine.study_list import ListedStudy

__all__ = ["export_manifest", "final_errors", "find_cohort", "report", "retrieve"]

UNKNOWN = ("fail", "skip")
_LINES = 20

log = logging.getLogger(__name__)


@task_group(group_id="retrieve", prefix_group_id=False, tooltip="Find studies, retrieve them, report")
def retrieve(
    destination: str,
    *,
    study_date: str | None = None,
    query: Mapping[str, Any] | None = None,
    modalities: str | Sequence[str] | None = None,
    dicom_conn_id: str = DicomHook.default_conn_name,
    at_once: int = 2,
    accept: Sequence[str] = (COMPLETE,),
) -> Any:
    """Make the tasks ``find``, ``get`` and ``report``: the studies of a query, one mapped ``get`` each.

    The last task decides the state of the run: it fails unless everything is held. If nothing matches, ``get`` and
    ``report`` are skipped. Pool, retries and other settings are those of the DAG, or of
    ``retrieve.override(default_args={"pool": "pacs"})(…)``; a second group in a DAG needs
    ``retrieve.override(group_id="mr", prefix_group_id=True)(…)``.

    :param destination: as in ``DicomGetOperator`` (templated)
    :param study_date: as in ``DicomFindOperator``, and so are ``query`` and ``modalities`` (templated)
    :param query: DICOM keywords or tags, and values (templated)
    :param modalities: one or several modalities; a study matches if it has at least one (templated)
    :param dicom_conn_id: the ``dicom`` connection to the PACS
    :param at_once: how many ``get`` run at a time in this DAG; a pool limits all DAGs together
    :param accept: the verdicts that are a success
    :return: the manifests, for tasks that follow: ``manifest=…``, or ``.expand(manifest=…)``
    """
    find = DicomFindOperator(
        task_id="find", query=query, study_date=study_date, modalities=modalities, dicom_conn_id=dicom_conn_id
    )
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id=dicom_conn_id,
        destination=destination,
        accept=accept,
        max_active_tis_per_dag=at_once,
    ).expand(study=find.output)
    found: Any = find.output  # a list, when it runs
    report(found, get.output["summary"], get.output, accept)
    return get.output


@function_task(trigger_rule="all_done_min_one_success")
def report(
    parts: Sized,
    summaries: Sequence[Mapping[str, Any]],
    manifests: Iterable[Any],
    accept: Sequence[str] = (COMPLETE,),
) -> dict[str, Any]:
    """Sum up mapped retrievals, and fail unless all of them are complete.

    A mapped task leaves its summary and its manifest in XCom, whatever its verdict. So this task runs even if some of
    them failed, and as the last task it decides the state of the run::

        get = DicomGetOperator.partial(task_id="get", destination="/data/dicom").expand(study=find.output)
        report(find.output, get.output["summary"], get.output)

    If there was nothing to retrieve, it is skipped like the mapped tasks.

    :param parts: what was mapped over, to notice tasks that left no result
    :param summaries: of the retrievals
    :param manifests: of the retrievals, of any shape
    :param accept: the verdicts that are a success; each of them has to be one, not only the worst
    :return: ``verdict`` (the worst), ``verdicts``, ``studies, series, instances, held, bytes``, ``reasons`` of what is
        not held, ``manifests`` (addresses)
    :raises AirflowFailException: not everything is complete; the text says how much is missing, why, and what to do
    """
    with final_errors():
        # By index: Airflow's own iterator over XCom asks for one more, and logs an error for it.
        whole = _sum_up(len(parts), [summaries[index] for index in range(len(summaries))], manifests)
        text = _text(whole)
        if not accepted(whole["verdict"], whole["verdicts"], check_accept(accept)):
            raise AirflowFailException(f"{text} Clear the failed tasks to resume: what is held is not fetched again.")
    log.info("%s", text)
    return whole


def _sum_up(tasks: int, summaries: list[Mapping[str, Any]], manifests: Iterable[Any]) -> dict[str, Any]:
    """The results of several retrievals as one; see :func:`report`.

    :param tasks: how many there were
    """
    from airflow_dicom_get.manifest.frames import load_manifests

    frame = load_manifests(manifests)
    not_held = frame[frame["state"].isin(NOT_HELD)]
    silent = tasks - len(summaries)
    verdicts: Counter[Verdict] = Counter(summary["verdict"] for summary in summaries)
    return {
        "verdict": FAILED if silent else worst(verdicts),
        "verdicts": {verdict: verdicts[verdict] for verdict in WORST_FIRST if verdict in verdicts},
        "silent": silent,
        "studies": int(frame["study_instance_uid"].nunique()),
        "series": int(frame["series_instance_uid"].nunique()),
        "instances": len(frame),
        "held": int(frame["state"].isin(HELD).sum()),
        "bytes": int(frame["bytes"].fillna(0).sum()),
        "reasons": {str(reason): int(count) for reason, count in not_held["reason"].value_counts().items()},
        "manifests": [summary["manifest_uri"] for summary in summaries],
    }


def _text(whole: Mapping[str, Any]) -> str:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in whole["verdicts"].items())
    studies = f"{whole['studies']} {noun(whole['studies'], 'study', 'studies')}"
    text = f"{whole['held']} of {whole['instances']} instances of {studies} are held"
    text += f" ({verdicts})." if verdicts else "."
    if whole["reasons"]:
        text += f" Reasons of the others: {', '.join(f'{count} {word}' for word, count in whole['reasons'].items())}."
    if whole["silent"]:
        tasks, logs = ("task", "its log says") if whole["silent"] == 1 else ("tasks", "their logs say")
        text += f" {whole['silent']} {tasks} left no summary; {logs} why."
    return text


# --- what is handed on -----------------------------------------------------------------------------


@function_task()
def export_manifest(
    manifests: Any,
    form: str,
    to: str,
    *,
    options: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (COMPLETE,),
    check: bool = False,
    s3_conn_id: str | None = None,
) -> dict[str, Any]:
    """Write manifests in a form that other tools read; a task that ends a chain::

        export_manifest(get.output, "sha256sums", "/data/dicom/SHA256SUMS-{{ ds_nodash }}")

    Nothing is written unless all that was retrieved is complete, and never in place of a file that is there: give each
    run a name of its own. All arguments are templated.

    :param manifests: of any shape, one or several; of each instance the newest row counts
    :param form: ``sha256sums``, ``series``, ``croissant`` or ``omop``
    :param to: an absolute path or ``s3://[CONN_ID@]bucket/key``, as far as ``[dicom_get] allowed_destinations`` has it
    :param options: of the form, as ``airflow_dicom_get.export`` takes them: ``name``, ``licence``, ``citation``,
        ``description``, ``mapping``, ``columns``
    :param accept: the verdicts that may be exported; what is missing is then said in the export
    :param check: read every file first, and compare its digest
    :param s3_conn_id: the connection of a bucket whose address names none; of objects to check that of ``to`` by
        default
    :return: ``form, to, files, verdict, studies, series, instances, bytes, missing``
    :raises AirflowFailException: invalid input; a verdict that is not accepted; a file that is not what its manifest
        says; a file is there already
    """
    from airflow_dicom_get.config.options import ExportOptions
    from airflow_dicom_get.exports.verb import summary, write_export

    with final_errors():
        place = resolve_destination(to, "to", s3_conn_id)
        given = load_each(manifests, s3_conn_id)
        objects = _objects_of(given, s3_conn_id or connection_of(manifests) or place.conn_id) if check else None
        if objects is not None and place.s3_config is not None and objects.conn_id != place.conn_id:
            what = f"is reached by {place.conn_id}, and the objects to check by {objects.conn_id}"
            raise invalid("to", what, "Give one connection for both, or export into a folder.")
        said = dict(options or {})
        if said.get("mapping") is not None:
            check_address(said["mapping"], "mapping")
        reached = place.s3_config or (objects.s3_config if objects is not None else None)
        words = [accept] if isinstance(accept, str) else list(accept)
        made = ExportOptions.check({**said, "accept": words, "s3_config": reached})
        written: dict[str, Any] = write_export(made, given, form, place.destination, check=check)
        log.info("%s: %s", written["to"], summary(written))
        files = [with_connection(uri, place.conn_id) for uri in written["files"]]
        return {**written, "to": with_connection(written["to"], place.conn_id), "files": files}


def _objects_of(given: Sequence[Any], conn_id: str | None) -> ResolvedDestination | None:
    """The bucket in which objects of some manifests lie, if some lie in one."""
    found = (place_of_objects(one, conn_id) for one in given if one is not None)
    return next((place for place in found if place is not None), None)


# --- a list of studies in a file -------------------------------------------------------------------


def find_cohort(
    path: str,
    *,
    label: str,
    within: Sequence[str] | None = None,
    unknown: str = "fail",
    dicom_conn_id: str = DicomHook.default_conn_name,
) -> list[list[Item]]:
    """Find the studies of a CSV file at a PACS, and return Items to map over, each with its ``label`` from the file.

    The file has a column ``StudyInstanceUID`` or ``AccessionNumber``, and one with the labels; the whole file is
    checked before the PACS is queried. Accession numbers are not returned: every viewer of the DAG can read what a
    task returns, including the labels.

    :param path: the file
    :param label: name of the column with the labels; not that of the studies, and none that is an attribute of a
        patient. Where whoever triggers a run names it, let them choose from a list.
    :param within: folders in one of which the file has to lie; to be given where whoever triggers a run names the
        file, which is read with the rights of the worker
    :param unknown: what happens if the PACS has no study for a row: ``fail``, or ``skip`` the row
    :param dicom_conn_id: the ``dicom`` connection to the PACS
    :return: lists of one Item each, or of more if there are more than Airflow can map over
    :raises AirflowFailException: the file is malformed, the PACS has no study for a row, or it refuses the query
    """
    from airflow_dicom_get.engine.study_list import list_within, read_study_list
    from airflow_dicom_get.lists.matching import remark_text

    with final_errors():
        if unknown not in UNKNOWN:
            raise invalid("unknown", f"{shown(unknown)} is not allowed", f"Give {' or '.join(UNKNOWN)}.")
        rows = read_study_list(path if within is None else list_within(path, within), label=label)
        found = DicomHook(dicom_conn_id).get_scu().find_listed(rows)
        items: dict[str, Item] = {}
        for entry in found.entries:
            for study in entry.uids:
                item = items.setdefault(study, {**make_item(study), "label": entry.listed.label})
                if item["label"] != entry.listed.label:
                    line = entry.listed.line
                    what = f"{shown_path(path)}, line {line}: its study appears in an earlier line with another label"
                    raise invalid("csv", what, "Give both lines the same label, or remove one of them.")
        log.info("Rows: %d. Studies found: %d.", len(rows), len(items))
        for remark in found.remarks:
            log.warning("%s", remark_text(remark))
        if found.doubt is not None:
            text = f"{shown_path(path)}: the PACS may have more studies for these rows ({found.doubt})."
            raise AirflowFailException(f"{text} {REASONS[found.doubt].text} {advice(found.doubt)}")
        nowhere = [entry.listed for entry in found.entries if not entry.uids]
        if nowhere:
            _say_unknown(path, nowhere, unknown)
    return pack(list(items.values()), target=1, at_most=max_map_length())


def _say_unknown(path: str, nowhere: list[ListedStudy], unknown: str) -> None:
    lines = ", ".join(str(row.line) for row in nowhere[:_LINES])
    more = f" and {len(nowhere) - _LINES} more" if len(nowhere) > _LINES else ""
    many = ", or more than max_studies," if nowhere[0].key == "AccessionNumber" else ""
    text = f"{shown_path(path)}: the PACS has no study{many} for column {nowhere[0].key} of line {lines}{more}."
    if unknown == "fail":
        raise AirflowFailException(f"{text} Correct these lines, or skip them with unknown='skip'.")
    log.warning("%s Skipping.", text)
