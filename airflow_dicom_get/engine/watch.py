"""Frees a source whose object is stuck at the destination.

A call of a sink may block for ever, as on a file server that is dead, and nothing can end it. The
association that waits for it is aborted from beside: the PACS is not held, and what the destination
does after all still counts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from airflow_dicom_get.engine.receiver import Receiver
from airflow_dicom_get.net.association import Association

log = logging.getLogger(__name__)

_LOOK = 0.2
_CANCEL_GRACE = 2.0
"""Seconds that a destination may take after the run was cancelled; none after a second cancel."""


@contextmanager
def watched(association: Association, receiver: Receiver) -> Iterator[None]:
    """Abort an association as soon as the destination is late with what came over it."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(association, receiver, over), name="dicom-get-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(association: Association, receiver: Receiver, over: threading.Event) -> None:
    while not over.wait(_LOOK):
        limit, cancel = receiver.limit, association.cancel
        if cancel.reason is not None:
            limit = 0.0 if cancel.hard else min(limit, _CANCEL_GRACE)
        waited = time.monotonic() - receiver.came_at
        if waited > limit:
            log.warning("The destination has not returned for %.1f s; %s is let go.", waited, association.node)
            association.abort()
            return
