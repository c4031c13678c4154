"""From what the engine says of a retrieval to what Airflow is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.options import check_acceptable
from airflow_dicom_get.errors import Cancelled, IncompleteRetrieval
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import CANCELLED


def check_accept(accept: Any) -> tuple[str, ...]:
    """The verdicts that are a success."""
    words = (accept,) if isinstance(accept, str) else tuple(accept) if isinstance(accept, Iterable) else (accept,)
    check_acceptable("accept", words)
    return words


def summary(result: Result, *, kind: str, manifest: Mapping[str, Any], try_number: int) -> dict[str, Any]:
    """The readable value beside the manifest, which XCom shows in hexadecimal.

    :param kind: ``get``, ``store`` or ``verify``
    :param manifest: what it is of, and where it is
    """
    from airflow_dicom_get.engine.report import MOST_ERRORS

    values = result.to_json()
    source = values.pop("node")
    del values["manifest"]
    return {
        "schema": 1,
        "kind": kind,
        **values,
        "errors": values["errors"][:MOST_ERRORS],
        "source": source,
        **manifest,
        "try_number": try_number,
    }


def raise_for(result: Result, accept: Sequence[str]) -> None:
    """Raise what fits a verdict that is not a success: with or without another try."""
    if result.verdict == CANCELLED:
        raise Cancelled(f"{result.summary()}.", hint="The next try resumes it.", node=result.node)
    try:
        result.raise_for_verdict(accept)
    except IncompleteRetrieval as error:
        if error.transient:
            raise
        # Its cause would be a second traceback with the same words.
        raise AirflowFailException(str(error)) from None
