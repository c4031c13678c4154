"""How a call ends: with nothing of it at work any more, whatever ended it.

Its work is done beside the caller. A handler of a signal may raise in the caller's thread, between any two
steps of it (Ctrl-C, Airflow's timeout of a task); here it finds nobody but one who waits. It also finds
him where the work does not return, as from a write to a file server that is dead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from airflow_dicom_get import clock
from airflow_dicom_get.engine.report import manifest_not_written, no_better
from airflow_dicom_get.errors import DicomGetError, SinkError, unexpected
from airflow_dicom_get.manifest.scopes import NO_SCOPES, Scopes
from airflow_dicom_get.net.association import OVER, CancelToken
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks.places import Root
from airflow_dicom_get.vocabulary import Evidence, Verdict

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK = 0.2
PATIENCE = 5.0
"""Seconds in which a call ends that is to end at once; and that it may go on when its time is over."""


class StuckError(Exception):
    """The work did not return: the call was left to itself, and changes nothing any more when it does."""

    @staticmethod
    def error() -> SinkError:
        """What to say of what could not be written for that."""
        return SinkError(
            "The destination did not return from a call, so the call was given up, and no manifest was written.",
            hint="Check the mount of the destination, then run again: what is held is not fetched again.",
        )


def run_beside(work: Callable[[], T], cancel: CancelToken) -> T:
    """Have the work of a call done beside the caller, and give what it returns.

    Parameters
    ----------
    work : callable
        Raises what the caller is to get.
    cancel : CancelToken
        What ends it. It is left where the work does not return.

    Raises
    ------
    StuckError
        It was to end at once, and did not within :data:`PATIENCE`.
    BaseException
        What the work raised; or what came in this thread, after the work has ended by it.
    """
    came: BaseException | None = None
    call: clock.Beside[T] | None = None
    until = float("inf")
    # Set once somebody waits for the work, since an exception may come while its thread begins; and once it is over.
    known, over = clock.event(), clock.event()

    def begun() -> T:
        try:
            known.wait()
            if came is not None:
                raise came
            return work()
        finally:
            over.set()

    while True:
        try:
            if call is None:
                call = clock.Beside(begun, "dicom-get-run")
            known.set()
            while clock.monotonic() < until and not call.wait(_LOOK):
                if clock.monotonic() >= cancel.over_at + PATIENCE:
                    cancel.abort(OVER)
                if cancel.hard:
                    until = min(until, clock.monotonic() + PATIENCE)
                if cancel.ending():
                    cancel.hasten()
            break
        except BaseException as error:
            cancel.abort(type(error).__name__)
            came = came or error
            known.set()
            until = min(until, clock.monotonic() + PATIENCE)
            if call is None:
                over.wait(_LOOK)
                raise
    if not call.wait(0):
        cancel.left = True
        log.error("The destination does not return from a call; it was left to itself.")
        if came is None:
            raise StuckError
    if came is not None:
        raise came
    return call.result()


def read_first(read: Callable[[], T], cancel: CancelToken) -> T | None:
    """What a call has to read before it can begin, as its manifest or its source; None where it is to end before that.

    Raises
    ------
    DicomGetError
        What ``read`` raises while the call is not to end.
    """
    try:
        return run_beside(read, cancel)
    except StuckError:
        return None
    except DicomGetError:
        if cancel.ending():  # a request that was broken off for it
            return None
        raise


def write_manifest(
    result: Result,
    rows: Iterable[dict[str, Any]],
    root: Root,
    name: str,
    run: str,
    cancel: CancelToken,
    read: tuple[Verdict, Evidence] | None = None,
    scopes: Scopes = NO_SCOPES,
) -> None:
    """Write the manifest of a call, and say in its result where it is, or why it is not.

    Parameters
    ----------
    name : str
        Its path below the root, without its extension.
    read : (verdict, evidence), optional
        What a manifest says of itself that these rows were made of.
    scopes : mapping, optional
        What of its studies it is of.
    """
    uri, written, problem = None, None, None
    said, rests_on = no_better((result.verdict, result.evidence), read)
    try:
        uri, written = root.write_manifest(rows, name, verdict=said, evidence=rests_on, run=run, scopes=scopes)
    except DicomGetError as error:
        problem = error
    except Exception as error:
        log.exception("the manifest cannot be written")
        problem = unexpected(error)
    if cancel.left:  # the caller has the result already
        return
    result.manifest_uri, result.written = uri, written
    if problem is not None:
        manifest_not_written(result, problem)
