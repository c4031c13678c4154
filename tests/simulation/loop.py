"""Tasks, time and chance of the simulation: many that work beside each other, in one thread and without waiting.

A task is a greenlet. It runs until it waits for something (an event, another task, bytes, an hour), and then another
one that is ready goes on, chosen by the seed. When none is ready, time jumps to the next moment for which somebody
waits. So what is written with blocking calls, the engine and the misbehaving PACS alike, runs as it is written, in an
order that the seed alone decides.

Tasks belong to a :class:`~tests.simulation.faults.Process`, which can be killed between any two calls of a seam:
whatever its tasks do from then on (their ``finally`` blocks run, as greenlets have to be unwound) reaches nothing.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, ParamSpec, TypeVar, cast

from greenlet import getcurrent, greenlet

from airflow_dicom_get import clock
from tests.simulation.faults import Killed, Process

P = ParamSpec("P")
T = TypeVar("T")

EPOCH = 1_767_225_600.0
"""When histories begin: 2026-01-01, 00:00 UTC."""
_TICK = 1e-6
"""Seconds that pass with each look at the clock: who only looks at it gets on too."""


class EndlessError(AssertionError):
    """The tasks go on and on, or wait for each other for ever."""


class Wait:
    """One wait of one task, which ends once."""

    __slots__ = ("task", "woken")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.woken: bool | None = None


class Task:
    """Something that is done beside others."""

    def __init__(self, loop: Loop, work: Callable[[], object], name: str, process: Process | None) -> None:
        self._loop, self._work = loop, work
        self.name, self.process = name, process
        self.done = False
        self.error: BaseException | None = None
        self.awaited: list[Wait] = []
        self.greenlet = greenlet(self._run, parent=loop.hub)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.done = True
        for wait in self.awaited:
            self._loop.wake(wait)

    def join(self, timeout: float | None = None) -> None:
        """See :class:`clock.Worker`."""
        if not self.done:
            self._loop.park(self.awaited, timeout)


class Loop:
    """Runs tasks; see the module.

    Parameters
    ----------
    seed : int or str
        Of the order in which tasks go on, and of all chance.

    Attributes
    ----------
    steps : int
        How often a task went on.
    """

    most_steps = 2_000_000
    """Steps after which a history counts as endless."""

    def __init__(self, seed: int | str) -> None:
        self.chance = random.Random(seed)
        self.at = 0.0
        self.steps = 0
        self.hub = getcurrent()
        self.current: Task | None = None
        self.tasks: list[Task] = []
        self._ready: deque[tuple[Task, Wait | None]] = deque()
        self._timers: list[tuple[float, int, Wait]] = []
        self._numbers = 0
        self._aside: dict[Process | None, Task] = {}
        """Of a process that stands aside the task that will go on."""

    # --- for tasks -----------------------------------------------------------------------------

    @property
    def process(self) -> Process | None:
        """The process of the task that runs."""
        return self.current.process if self.current is not None else None

    def check(self) -> None:
        """Raise :class:`Killed` in what is left of a dead process."""
        process = self.process
        if process is not None and process.dead:
            raise Killed

    def spawn(self, work: Callable[[], object], name: str, process: Process | None = None) -> Task:
        """Begin a task."""
        task = Task(self, work, name, process)
        self.tasks.append(task)
        self._ready.append((task, None))
        return task

    def park(self, waiters: list[Wait] | None, timeout: float | None) -> bool:
        """Wait in a list until somebody calls :meth:`wake`, or for so many seconds; whether it was woken."""
        task = self.current
        assert task is not None, "only a task can wait"
        process = task.process
        if process is not None and process.dead:
            raise Killed
        wait = Wait(task)
        if waiters is not None:
            waiters.append(wait)
        if timeout is not None:
            self._numbers += 1
            heappush(self._timers, (self.at + max(timeout, 0.0), self._numbers, wait))
        self.hub.switch()
        if process is not None and process.dead:
            raise Killed
        if waiters is not None and wait in waiters:  # its time was over
            waiters.remove(wait)
        return bool(wait.woken)

    def stand_aside(self, seconds: float) -> None:
        """Let other processes go on; in this one nothing does, for it holds what the others of it may wait for."""
        task = self.current
        assert task is not None
        if task.process in self._aside:
            return
        self._aside[task.process] = task
        try:
            self.park(None, seconds)
        finally:
            del self._aside[task.process]

    def wake(self, wait: Wait, *, woken: bool = True) -> None:
        """End a wait."""
        if wait.woken is None:
            wait.woken = woken
            self._ready.append((wait.task, wait))

    def wake_all(self, waiters: list[Wait]) -> None:
        """End all waits of a list."""
        for wait in waiters:
            self.wake(wait)
        waiters.clear()

    # --- from outside --------------------------------------------------------------------------

    def run(self, work: Callable[[], object], process: Process | None = None) -> Task:
        """Run a task to its end, and others as long as it lasts."""
        main = self.spawn(work, "main", process)
        self.until(main)
        return main

    def until(self, task: Task) -> None:
        """Let all tasks go on until this one has ended."""
        while not task.done:
            self._step()

    def settle(self, process: Process) -> None:
        """Let what is ready go on, as long as something of this process is; no time passes."""
        while any(task.process is process and not task.done for task, _ in self._ready):
            self._step()

    def bury(self, process: Process) -> None:
        """Unwind what is left of a dead process."""
        for task in self.of(process):
            self._switch(task)

    def of(self, process: Process | None) -> list[Task]:
        """The tasks of a process that have not ended; those of nobody for None."""
        self.tasks = [task for task in self.tasks if not task.done]
        return [task for task in self.tasks if task.process is process]

    def _step(self) -> None:
        self.steps += 1
        if self.steps > self.most_steps:
            raise EndlessError(f"no end after {self.most_steps} steps")
        if self._aside:
            self._step_beside()
            return
        while not self._ready:
            self._pass_time()
        if len(self._ready) > 1:
            self._ready.rotate(-self.chance.randrange(len(self._ready)))
        task, _ = self._ready.popleft()
        if not task.done:
            self._switch(task)

    def _step_beside(self) -> None:
        while True:
            able = [n for n, (task, _) in enumerate(self._ready) if self._aside.get(task.process, task) is task]
            if able:
                break
            self._pass_time()
        at = able[self.chance.randrange(len(able))]
        task, _ = self._ready[at]
        del self._ready[at]
        if not task.done:
            self._switch(task)

    def _pass_time(self) -> None:
        if not self._timers:
            raise EndlessError("all tasks wait, and nothing can happen any more")
        at, _, wait = heappop(self._timers)
        if wait.woken is None:
            self.at = max(self.at, at)
            self.wake(wait, woken=False)

    def _switch(self, task: Task) -> None:
        self.current = task
        try:
            if task.process is not None and task.process.dead:
                if task.greenlet:  # it had begun
                    task.greenlet.throw(Killed)
                task.done = True
            else:
                task.greenlet.switch()
        finally:
            self.current = None


class Lock:
    """See :class:`threading.Lock`; it may be held while something is waited for."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._held = loop, False
        self._waiters: list[Wait] = []

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()

    def acquire(self, blocking: bool = True) -> bool:
        while self._held:
            if not blocking:
                return False
            self._loop.park(self._waiters, None)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False
        self._loop.wake_all(self._waiters)


class Event:
    """See :class:`clock.Event`."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._set = loop, False
        self._waiters: list[Wait] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._loop.wake_all(self._waiters)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            self._loop.park(self._waiters, timeout)
        return self._set


class Condition:
    """See :class:`threading.Condition`; over a lock of ``threading`` that nobody holds while it waits elsewhere."""

    def __init__(self, loop: Loop, lock: threading.Lock | None = None) -> None:
        self._loop, self._lock = loop, lock or threading.Lock()
        self._waiters: list[Wait] = []

    def __enter__(self) -> bool:
        self._acquire()
        return True

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def _acquire(self) -> None:
        while not self._lock.acquire(blocking=False):
            self._loop.park(None, _TICK)

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            return self._loop.park(self._waiters, timeout)
        finally:
            # What is left of a dead process must not wait here: nobody would give the lock back.
            process = self._loop.process
            if process is not None and process.dead:
                self._lock.acquire(blocking=False)
            else:
                self._acquire()

    def notify(self, n: int = 1) -> None:
        waiting = [wait for wait in self._waiters if wait.woken is None]  # the time of another may be over
        for wait in waiting[:n]:
            self._loop.wake(wait)
            self._waiters.remove(wait)

    def notify_all(self) -> None:
        self._loop.wake_all(self._waiters)


class _Answer(Future[T]):
    """A future whose readers wait in the loop."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.waiters: list[Wait] = []

    def result(self, timeout: float | None = None) -> T:
        if not self.done():
            self.loop.park(self.waiters, timeout)
        return super().result(0)


class Pool(Executor):
    """See :class:`concurrent.futures.ThreadPoolExecutor`."""

    def __init__(self, loop: Loop, workers: int, name: str) -> None:
        self._loop, self._most, self._name = loop, workers, name
        self._queue: deque[tuple[_Answer[Any], Callable[[], Any]]] = deque()
        self._workers: list[Task] = []
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        assert not self._closed, "a pool that was shut down takes nothing more"
        answer: _Answer[T] = _Answer(self._loop)
        self._queue.append((answer, lambda: fn(*args, **kwargs)))
        self._workers = [x for x in self._workers if not x.done]
        if len(self._workers) < self._most:
            self._workers.append(self._loop.spawn(self._work, self._name, self._loop.process))
        return answer

    def _work(self) -> None:
        while self._queue:
            answer, work = self._queue.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(work())
            except Exception as error:
                answer.set_exception(error)
            self._loop.wake_all(answer.waiters)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            while self._queue:
                answer, _ = self._queue.popleft()
                answer.cancel()
                self._loop.wake_all(answer.waiters)
        if wait:
            for worker in self._workers:
                worker.join()


class Time:
    """The :class:`~airflow_dicom_get.clock.Clock` of a loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def now(self) -> float:
        self._loop.check()
        return EPOCH + self.monotonic()

    def monotonic(self) -> float:
        loop = self._loop
        if loop.current is not None and loop.current.process is not None and loop.current.process.dead:
            return float("inf")  # whoever catches all there is, and goes on until a time, comes to its end
        loop.at += _TICK
        return loop.at

    def sleep(self, seconds: float, /) -> None:
        self._loop.park(None, seconds)

    def jitter(self, least: float, most: float) -> float:
        return self._loop.chance.uniform(least, most)

    def token(self) -> str:
        return f"{self._loop.chance.getrandbits(32):08x}"

    def lock(self) -> threading.Lock:
        return cast("threading.Lock", Lock(self._loop))

    def condition(self, lock: threading.Lock | None = None, /) -> threading.Condition:
        return cast("threading.Condition", Condition(self._loop, lock))

    def event(self) -> threading.Event:
        return cast("threading.Event", Event(self._loop))

    def spawn(self, work: Callable[[], object], name: str) -> clock.Worker:
        return self._loop.spawn(work, name, self._loop.process)

    def pool(self, workers: int, name: str) -> Executor:
        return Pool(self._loop, workers, name)


@contextmanager
def looped(seed: int | str) -> Iterator[Loop]:
    """A loop whose time and tasks are those of the package for a while."""
    loop = Loop(seed)
    with clock.replaced(Time(loop)):
        yield loop
