"""Looks at a PACS: each connection's on a thread of its own, one at a time, shared by all that ask the same.

The triggerer runs all triggers of all providers in one loop, with one small pool of threads for what blocks. A PACS
that accepts connections and says nothing would hold them all; so looks do not go there.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_dicom_get import clock
from airflow_dicom_get.engine.arrivals import Sighting, list_studies
from airflow_dicom_get.errors import AssociationRejected, ConnectFailed, DeadlineExceeded
from airflow_dicom_get.hooks.dicom import DicomHook

if TYPE_CHECKING:
    from airflow_dicom_get.getscu import GetScu

Queries = Sequence[Mapping[str, Any]]

SHARE = 0.25
"""Of the time between two looks, what one may take."""
SHORTEST, LONGEST = 5.0, 120.0
"""Whatever the time between two looks is."""
GRACE_SECONDS = 10.0
"""What a look gets beyond its own deadline before it is given up."""


def seconds_of(poke_interval: float) -> float:
    """How long a look may take, where there is one in so many seconds."""
    return min(max(poke_interval * SHARE, SHORTEST), LONGEST)


def look(hook: DicomHook, queries: Queries, seconds: float, on_scu: Callable[[GetScu], None]) -> Sighting:
    """Ask the PACS of a connection once, without retries: the next look is the retry.

    :param seconds: how long all of it may take
    :param on_scu: takes the client before it is used, to cancel it by
    """
    ends = clock.monotonic() + seconds
    own = hook.options().deadlines
    # Where the node is not even heard, that is said as such: before the time of the look is over.
    heard = min(own.acse, seconds * 0.8)
    deadlines = replace(own, connect=min(own.connect, heard), acse=heard)
    model = hook.query_model

    def find(query: Mapping[str, Any], level: str, return_keys: Sequence[str]) -> Any:
        left = max(ends - clock.monotonic(), 0.001)
        scu = hook.get_scu(seconds=left, deadlines=deadlines, retries=0)
        on_scu(scu)
        return scu.find(query, level=level, query_model=model, return_keys=return_keys)

    return list_studies(queries, find, clock.now(), model=model, timezone=hook.timezone)


def never_heard(error: BaseException) -> bool:
    """Whether an error is about the node alone, whatever it was asked: it would have met any other question too."""
    if isinstance(error, DeadlineExceeded):
        return error.facts.get("phase") in ("connect", "acse")
    return isinstance(error, ConnectFailed | AssociationRejected)


class _Look:
    """One look, and all who wait for what it sees."""

    def __init__(self, question: str, work: Callable[[_Look], Sighting], seconds: float) -> None:
        self.question = question
        self.seconds = seconds
        self.askers: list[Future[Sighting]] = []
        self.over = False
        self._context = copy_context()  # its log lines are those of the first who asks
        self._work = work
        self._scu: GetScu | None = None
        self._unwanted = False

    def run(self) -> Sighting:
        return self._context.run(self._work, self)

    def take(self, scu: GetScu) -> None:
        """Take the client that asks."""
        self._scu = scu
        if self._unwanted:
            self.cancel()

    def cancel(self) -> None:
        """End it: nobody waits for it any more. A thread cannot be ended, but its association can."""
        self._unwanted = True
        if self._scu is not None:
            self._scu.cancel("nobody waits for the answer any longer")

    @property
    def open(self) -> bool:
        """Whether one more may wait for it."""
        return not self.over and not self._unwanted

    def answer(self, value: Sighting | None, error: BaseException | None = None) -> None:
        """Tell all who wait, once."""
        if self.over:
            return
        self.over = True
        for asker in self.askers:
            if asker.set_running_or_notify_cancel():
                if error is not None:
                    asker.set_exception(error)
                else:
                    assert value is not None
                    asker.set_result(value)


class _Line:
    """The looks at one connection, in the order of their asking."""

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._mutex = threading.Lock()
        self._waiting: deque[_Look] = deque()
        self._now: _Look | None = None
        self._late = 0.0
        self._at_work = False

    def join(self, question: str, queries: Queries, seconds: float) -> tuple[_Look, Future[Sighting]]:
        """Wait for a look that asks the same, or for a new one.

        :raises TimeoutError: the last look was given up, and its thread still hangs in it
        """
        asker: Future[Sighting] = Future()
        with self._mutex:
            self._give_up()
            if self._now is not None and self._now.over:
                raise TimeoutError("The look before this one has not come back yet.")
            known = [self._now, *self._waiting] if self._now is not None else self._waiting
            found = next((one for one in known if one.question == question and one.open), None)
            if found is None:
                found = _Look(question, partial(self._look, queries), seconds)
                self._waiting.append(found)
            found.askers.append(asker)
            if not self._at_work:
                self._at_work = True
                clock.spawn(self._work, f"dicom-look-{self._conn_id}")
        return found, asker

    def leave(self, look: _Look, asker: Future[Sighting]) -> None:
        """Wait no longer. The last one who leaves ends the look."""
        asker.cancel()
        with self._mutex:
            if look.over or not all(one.cancelled() for one in look.askers):
                return
            if look in self._waiting:
                self._waiting.remove(look)
            look.cancel()

    def give_up(self) -> None:
        """Let nobody wait any longer for a look whose time is over, nor for those behind it."""
        with self._mutex:
            self._give_up()

    def _give_up(self) -> None:
        if self._now is None or self._now.over or clock.monotonic() < self._late:
            return
        self._now.cancel()
        error = TimeoutError(f"The PACS did not answer within {self._now.seconds + GRACE_SECONDS:g} s.")
        for one in (self._now, *self._waiting):
            one.answer(None, error)
        self._waiting.clear()

    # --- on its thread -----------------------------------------------------------------------------

    def _look(self, queries: Queries, this: _Look) -> Sighting:
        try:
            return look(DicomHook(self._conn_id), queries, this.seconds, this.take)
        except DeadlineExceeded as error:
            hint = f"A look may take {this.seconds:g} s, a quarter of poke_interval: raise that if the PACS is slow."
            raise DeadlineExceeded(error.message, hint=hint, **error.facts) from error

    def _work(self) -> None:
        while (this := self._next()) is not None:
            value, error = None, None
            try:
                value = this.run()
            except BaseException as raised:
                error = raised
            with self._mutex:
                this.answer(value, error)
                self._now = None  # one who asks before the next begins finds none that hangs
                if error is not None and never_heard(error):
                    # A node that does not answer is not asked by one after the other of all who wait: each has lost
                    # this one look, and asks again at its next.
                    for one in self._waiting:
                        one.answer(None, error)
                    self._waiting.clear()

    def _next(self) -> _Look | None:
        with self._mutex:
            self._now = self._waiting.popleft() if self._waiting else None
            self._at_work = self._now is not None
            if self._now is not None:
                self._late = clock.monotonic() + self._now.seconds + GRACE_SECONDS
            return self._now


_lines: dict[str, _Line] = {}
_mutex = threading.Lock()


async def wait_for_look(conn_id: str, queries: Queries, poke_interval: float) -> Sighting:
    """Look at the PACS of a connection as soon as the looks before this one have ended.

    :param queries: as :class:`~airflow_dicom_get.engine.arrivals.Awaited` has them
    :param poke_interval: seconds between two looks of the one who asks
    :raises DicomGetError: what the look has met, or the look that this one had to wait for
    :raises TimeoutError: it did not end by its own deadline
    """
    with _mutex:
        line = _lines.setdefault(conn_id, _Line(conn_id))
    seconds = seconds_of(poke_interval)
    joined, asker = line.join(json.dumps([dict(one) for one in queries], sort_keys=True), queries, seconds)
    answer = asyncio.wrap_future(asker)
    try:
        while not (await asyncio.wait({answer}, timeout=seconds + GRACE_SECONDS))[0]:
            line.give_up()
        return answer.result()
    finally:
        line.leave(joined, asker)
