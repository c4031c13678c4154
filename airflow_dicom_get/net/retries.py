"""How often a failure of a node is retried, and after which wait: one rule for sources, destinations and targets.

- A transient failure is retried ``retries`` times, after 0.5, 1.5, 4.5, 13.5 and 30 s (each by up to a quarter
  more or less): the five retries of the default outlast a node that restarts.
- A node that no association was ever opened with in this run may not be there at all: where no connection can be
  made, it is retried twice, which takes about 2 s where the port is closed.
- A node that has let a deadline pass and has never answered anything in this run is retried once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from airflow_dicom_get import clock
from airflow_dicom_get.errors import ConnectFailed, DeadlineExceeded, DicomGetError, sentences

if TYPE_CHECKING:
    from airflow_dicom_get.net.association import CancelToken

log = logging.getLogger(__name__)

_FIRST, _GROWTH, _LONGEST = 0.5, 3, 30.0
_UNREACHED, _SILENT = 2, 1


def no_contact(error: DicomGetError, *, reached: bool, answered: bool) -> int | None:
    """Retries that a failure is worth where the node was never heard in this run; None where it was.

    Parameters
    ----------
    reached : bool
        Whether an association with the node was ever opened.
    answered : bool
        Whether it has ever sent anything over one.
    """
    if not reached and (isinstance(error, ConnectFailed) or error.facts.get("phase") == "connect"):
        return _UNREACHED
    if not answered and isinstance(error, DeadlineExceeded):
        return _SILENT
    return None


def allowed(error: DicomGetError, retries: int) -> int:
    """How many times a failure is retried, of the ``retries`` of the options."""
    if not error.transient or error.facts.get("phase") == "operation":
        return 0
    worth = error.facts.get("retries")
    return retries if worth is None else min(retries, int(worth))


def back_off(failures: int, why: str, retries: int, cancel: CancelToken, until: float = float("inf")) -> None:
    """Wait before the next try, exponentially and with jitter.

    Parameters
    ----------
    failures : int
        Tries in a row that have failed.
    why : str
        The last failure, for the log.
    retries : int
        What :func:`allowed` says of it.
    cancel, until : CancelToken, float
        A cancel, or this value of ``clock.monotonic()``, cuts the wait short.
    """
    wait = min(_FIRST * _GROWTH ** (failures - 1), _LONGEST) * clock.jitter(0.75, 1.25)
    log.warning("%s", sentences(why, f"Retrying in {wait:.1f} s ({failures} of {retries})."))
    cancel.pause(min(wait, until - clock.monotonic()))
