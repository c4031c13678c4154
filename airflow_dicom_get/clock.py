"""Time, chance, the names of runs, and who works beside whom: all that would make two equal runs differ.

``net``, ``storage``, ``sinks``, ``manifest`` and ``engine`` ask this module and no other::

    from airflow_dicom_get import clock

    limit = clock.monotonic() + 10

:func:`replaced` puts another :class:`Clock` in the place of the real one, as for a simulation in one thread.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

T = TypeVar("T")


class Event(Protocol):
    """What :func:`event` makes: something to wait for."""

    def set(self) -> None:
        """Let those go on who wait."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, or for so many seconds; whether it was set."""


class Worker(Protocol):
    """What :func:`spawn` has begun."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, or for so many seconds."""


class Clock(Protocol):
    """The functions of this module that :func:`replaced` replaces."""

    def now(self) -> float:
        """Seconds since the epoch, UTC."""

    def monotonic(self) -> float:
        """Seconds of a clock that is never set."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""

    def jitter(self, least: float, most: float) -> float:
        """A number between the two, by chance."""

    def token(self) -> str:
        """Eight hexadecimal digits, by chance."""

    def lock(self) -> threading.Lock:
        """A lock that is held while something is waited for; one that is held for a moment is no matter of a clock."""

    def condition(self, lock: threading.Lock | None = None, /) -> threading.Condition:
        """A condition to wait for."""

    def event(self) -> threading.Event:
        """An event to wait for."""

    def spawn(self, work: Callable[[], object], name: str) -> Worker:
        """Have something done beside the caller."""

    def pool(self, workers: int, name: str) -> Executor:
        """Have many things done beside the caller, so many at a time."""


now = time.time
monotonic = time.monotonic
sleep = time.sleep
jitter = random.uniform
lock = threading.Lock
condition = threading.Condition
event = threading.Event


def token() -> str:
    """See :meth:`Clock.token`."""
    return os.urandom(4).hex()


def spawn(work: Callable[[], object], name: str) -> Worker:
    """See :meth:`Clock.spawn`: a thread that does not keep the process."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def pool(workers: int, name: str) -> Executor:
    """See :meth:`Clock.pool`: threads, which are begun as they are needed."""
    return ThreadPoolExecutor(workers, thread_name_prefix=name)


class Beside(Generic[T]):
    """Work that was begun beside the caller, and what came of it: a value, or an exception of whatever kind.

    Parameters
    ----------
    work : callable
        It sees the context variables of the caller.
    name : str
        Of its thread.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._over = False
        self._value: T | None = None
        self._raised: BaseException | None = None
        self._worker = spawn(partial(copy_context().run, self._run, work), name)

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._value = work()
        except BaseException as error:
            self._raised = error
        self._over = True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, or for so many seconds; whether it has ended."""
        self._worker.join(seconds)
        return self._over

    def result(self) -> T:
        """Wait for its end; its value. Raises what it raised."""
        self.wait()
        if self._raised is not None:
            raise self._raised
        return cast(T, self._value)


def together(works: Sequence[Callable[[], object]], name: str, end: Callable[[BaseException], object]) -> None:
    """Do the first of these here and the others beside; none of them is at work any more when this returns or raises.

    Parameters
    ----------
    works : sequence of callable
        At least one.
    name : str
        Of the threads, which are numbered.
    end : callable
        Called with each exception of one of them, so that the others end.

    Raises
    ------
    BaseException
        The first that one of them raised.
    """
    raised: list[BaseException] = []

    def do(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)
            end(error)

    beside = [Beside(partial(do, work), f"{name}-{number}") for number, work in enumerate(works[1:], 1)]
    do(works[0])
    for one in beside:
        one.result()
    if raised:
        raise raised[0]


RUN_NAME = r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}"
"""What :func:`run_name` makes, as a regular expression."""


def run_name(at: datetime | None = None) -> str:
    """Name of a run: the time in UTC, by default now, and eight hexadecimal digits by chance."""
    when = at.astimezone(UTC) if at is not None else datetime.fromtimestamp(now(), UTC)
    return f"{when:%Y%m%dT%H%M%SZ}-{token()}"


@contextmanager
def replaced(by: Clock) -> Iterator[None]:
    """Take time, chance and helpers from ``by`` for a while, in all threads."""
    names = [name for name in vars(Clock) if not name.startswith("_")]
    real = {name: globals()[name] for name in names}
    globals().update({name: getattr(by, name) for name in names})
    try:
        yield
    finally:
        globals().update(real)
