"""Which errors are worth a retry, and how a task reports them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from airflow_dicom_get.errors import Cancelled, DicomGetError

log = logging.getLogger(__name__)


def may_pass(error: DicomGetError | AirflowNotFoundException) -> bool:
    """Whether another try may do better: a connection may only seem missing, where its secrets backend is away, and
    of what was ended from outside nothing is known to be wrong.
    """
    return isinstance(error, AirflowNotFoundException | Cancelled) or error.transient


@contextmanager
def said_first() -> Iterator[None]:
    """Log an error as a line of its own, before Airflow writes the tracebacks of it and of each of its causes."""
    try:
        yield
    except (AirflowFailException, AirflowNotFoundException, DicomGetError) as error:
        log.error("%s", error)
        raise


@contextmanager
def final_errors() -> Iterator[None]:
    """Let an error that a retry cannot fix fail the task at once, whatever its ``retries``.

    A connection that is not found is tried again: a secrets backend that cannot be reached looks the same to Airflow.

    The operators do this themselves; use it in ``@task`` functions that call hooks or read manifests::

        @task(retries=3)
        def count(manifests):
            with final_errors():
                return len(load_manifests(manifests))

    :raises AirflowFailException: instead of an error of this package that is not ``transient``
    """
    try:
        with said_first():
            yield
    except DicomGetError as error:
        if may_pass(error):
            raise
        raise AirflowFailException(str(error)) from error
