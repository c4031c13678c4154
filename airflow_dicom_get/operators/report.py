"""The last task of a retrieval over many tasks: what came of the whole."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from airflow.sdk import task
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.vocabulary import COMPLETE, FAILED, HELD, NOT_HELD, WORST_FIRST, Verdict, worst

log = logging.getLogger(__name__)


@task(trigger_rule="all_done_min_one_success", multiple_outputs=False)
def report(
    parts: Sized,
    summaries: Iterable[Mapping[str, Any]],
    manifests: Iterable[Any],
    accept: Sequence[str] = (COMPLETE,),
) -> dict[str, Any]:
    """Sum up mapped retrievals, and fail unless all of them are complete.

    A mapped task leaves its summary and its manifest in XCom whatever its verdict. So this runs too where some of
    them failed, and as the last task it decides on the state of the run::

        get = DicomGetOperator.partial(task_id="get", destination="/data/dicom").expand(study=find.output)
        report(find.output, get.output["summary"], get.output)

    Where there was nothing to retrieve it is skipped, as the mapped tasks are.

    :param parts: what was mapped over, to notice a task that ended without a word
    :param summaries: of the retrievals
    :param manifests: of the retrievals, of any shape
    :param accept: the verdicts that are a success
    :return: ``verdict`` (the worst), ``verdicts``, ``studies, series, instances, held, bytes``, ``reasons`` of what is
        not held, ``manifests`` (addresses)
    :raises AirflowFailException: not all is complete; the text says how much is missing, why, and what to do
    """
    with final_errors():
        whole = sum_up(len(parts), list(summaries), manifests)
    text = _text(whole)
    if whole["verdict"] not in accept:
        raise AirflowFailException(f"{text} Clear the failed tasks to go on: what is held is not fetched again.")
    log.info("%s", text)
    return whole


def sum_up(tasks: int, summaries: list[Mapping[str, Any]], manifests: Iterable[Any]) -> dict[str, Any]:
    """What came of some retrievals as one; see :func:`report`.

    :param tasks: how many there were
    """
    from airflow_dicom_get.manifest.files import load_manifests

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
    text = f"{whole['held']} of {whole['instances']} instances of {whole['studies']} studies are held"
    text += f" ({verdicts})." if verdicts else "."
    if whole["reasons"]:
        text += f" Why the others are not: {', '.join(f'{count} {word}' for word, count in whole['reasons'].items())}."
    if whole["silent"]:
        tasks, logs = ("task", "its log says") if whole["silent"] == 1 else ("tasks", "their logs say")
        text += f" Of {whole['silent']} {tasks} there is no summary, {logs} why."
    return text
