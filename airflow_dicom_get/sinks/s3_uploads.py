"""Uploads side by side, bounded by bytes and by requests, that outlast a short outage of the service."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from airflow_dicom_get import clock
from airflow_dicom_get.errors import S3Error, SinkError
from airflow_dicom_get.net.association import CancelToken
from airflow_dicom_get.storage.bucket import REQUESTS_PER_SLOT, Bucket

log = logging.getLogger(__name__)

PART_SIZE = 8 << 20
"""Bytes of a part; an instance up to this size goes in one request."""
_LEAST_COST = 32 << 10
"""Bytes that a request counts as at least: so many small ones that wait take memory too."""
_LONGEST_PAUSE = 5.0
_LONGEST_END = 2.5
"""Seconds that a request may take in a run that is to end at once."""
LOOK = 0.2
"""Seconds between two looks at whether the run is cancelled."""
_BUCKET_GONE = "NoSuchBucket"

T = TypeVar("T")


class Uploads:
    """A pool of requests.

    Bytes that were handed over and not yet stored: at most ``max_concurrency`` parts of 8 MiB, so 64 MiB by
    default, and one part more for each association that writes at the time. In memory are these, and the part
    that each association is filling: ``(max_concurrency + 2 x associations) x 8 MiB``. Requests at a time:
    four for each of ``max_concurrency``, since small objects wait for the service's answer; one after the other, at
    the bucket's pace, while the service asks to slow down.

    Parameters
    ----------
    bucket : Bucket
        Of the requests.
    patience : float
        Seconds that a writer may wait for room: less than the source waits for us.
    outage : float
        Seconds for which a request is made again while the service fails.
    cancel : CancelToken
        The run's: once it is set nothing is tried again, and after a hard one nothing is begun or waited for.
    """

    def __init__(self, bucket: Bucket, *, patience: float, outage: float, cancel: CancelToken | None = None) -> None:
        concurrency = bucket.config.max_concurrency
        self._pace = bucket.pace
        self.most = concurrency * PART_SIZE
        self._patience, self._outage = patience, outage
        self._pool = clock.pool(concurrency * REQUESTS_PER_SLOT, "dicom-get-s3")
        self._room = clock.condition()
        self._bytes = 0
        self._active = 0
        """Requests that are handed over and not done."""
        self._stored_at = 0.0
        self._lost: S3Error | None = None
        self.cancel = cancel or CancelToken()

    @property
    def abandoned(self) -> bool:
        """Whether what is under way is waited for no more."""
        return self.cancel.hard

    def check(self) -> None:
        """Raise what has made every further request vain."""
        if self.cancel.hard:
            raise SinkError(f"Cancelled: {self.cancel.reason}.")
        if self._lost is not None:
            raise S3Error(self._lost.message, hint=self._lost.hint, **self._lost.facts)

    def wait_for_room(self) -> None:
        """Wait until bytes may be handed over.

        Raises
        ------
        SinkError
            The service is lost, or took nothing for longer than the source may wait.
        """
        deadline = clock.monotonic() + self._patience
        with self._room:
            while True:
                self.check()
                if self._bytes < self.most:
                    return
                left = deadline - clock.monotonic()
                if left <= 0:
                    raise SinkError(
                        f"The bucket has accepted nothing for {self._patience:g} s, and the upload buffer is full.",
                        hint="Check the service and the network; missing instances are requested again.",
                    )
                self._room.wait(min(left, LOOK))

    def hand_over(self, size: int, work: Callable[[], T]) -> Future[T]:
        """Do something with ``size`` bytes that are held in memory until it is done."""
        cost = max(size, _LEAST_COST)
        with self._room:
            self._bytes += cost

        def run() -> T:
            try:
                return work()
            finally:
                with self._room:
                    self._bytes -= cost
                    self._room.notify_all()

        return self._submitted(run)

    def submit(self, work: Callable[[], object]) -> None:
        """Do something after what was handed over before it was begun."""
        self._submitted(work)

    def _submitted(self, work: Callable[[], T]) -> Future[T]:
        with self._room:
            self._active += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._done)
        return future

    def _done(self, _future: Future[Any]) -> None:
        with self._room:
            self._active -= 1
            self._room.notify_all()

    def persist(self, request: Callable[[], T]) -> T:
        """Make a request, again and again through an outage.

        A failure that nothing outlasts, while nothing else was stored either, gives the service up.
        """
        began = clock.monotonic()
        pause, until = 0.5, None
        while True:
            self._wait_for_place()
            try:
                found = request()
            except S3Error as error:
                now = clock.monotonic()
                until = until or now + self._outage
                if error.transient and now + pause < until:
                    self.cancel.pause(pause * clock.jitter(0.5, 1.0))
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    if not self.cancel.ending():
                        continue
                if (
                    not error.transient
                    and error.facts.get("status") in (404, 412)
                    and error.facts["code"] != _BUCKET_GONE
                ):
                    raise
                if not error.transient or (self._stored_at < began and not self.cancel.ending()):
                    self._lose(error)
                raise
            self._stored_at = clock.monotonic()
            return found

    def _wait_for_place(self) -> None:
        """Wait while the service asks to slow down. Raises what has made the request vain by then."""
        at = self._pace.place()
        while True:
            self.check()
            left = at - clock.monotonic()
            if left <= 0:
                return
            if self.cancel.ending():
                raise SinkError("The run has ended while the service asked to slow down.")
            clock.sleep(min(left, LOOK))

    def _lose(self, error: S3Error) -> None:
        with self._room:
            if self._lost is None:
                log.error("%s", error)
                self._lost = error
            self._room.notify_all()

    def close(self) -> None:
        """Wait for all that was handed over; in a run that is to end at once for what is being sent, and not long."""
        with self._room:
            while self._active and not self.abandoned:
                self._room.wait(LOOK)
        if self.abandoned:
            self._pool.shutdown(wait=False, cancel_futures=True)
            limit = clock.monotonic() + _LONGEST_END
            with self._room:
                while self._active and clock.monotonic() < limit:
                    self._room.wait(LOOK)
        if not self._active:
            self._pool.shutdown()
