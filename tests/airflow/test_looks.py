"""Many triggers, few PACSs, and one of these silent: what the looks of a triggerer cost the others."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from airflow_dicom_get.engine.arrivals import Awaited, Sighting
from airflow_dicom_get.errors import ConnectFailed, DeadlineExceeded, OperationFailed
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.triggers import _looks as looks
from airflow_dicom_get.triggers.dicom import DicomStudyTrigger
from tests.support.silent import SilentPacs

SENSORS = int(os.environ.get("SENSORS", "30"))
"""Of the three PACSs together."""
SECONDS = 60


@pytest.fixture
def nodes(archive, monkeypatch):
    """Two PACSs and a silent one, with a connection each."""
    with ExitStack() as stack:
        served: dict[str, EmbeddedPacs | SilentPacs] = {}
        for name in ("first", "second"):
            served[name] = stack.enter_context(EmbeddedPacs(archive.folder))
        served["silent"] = stack.enter_context(SilentPacs())
        for name, server in served.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", f"dicom://PACS@127.0.0.1:{server.port}")
        yield served


class Forbidden(ThreadPoolExecutor):
    """The pool that the triggerer shares among all providers."""

    def submit(self, fn, /, *args, **kwargs):
        raise AssertionError("the pool of the triggerer was used")


def trigger(study: str, conn_id: str, poke_interval: float) -> DicomStudyTrigger:
    awaited = Awaited([{"StudyInstanceUID": study}], [study], settled_seconds=3600.0)
    return DicomStudyTrigger(awaited.to_json(), {}, poke_interval, conn_id)


def test_a_silent_pacs_costs_the_others_nothing(nodes, archive, monkeypatch):
    """The silent one's looks have not even failed when all others have seen their studies three times."""
    answers: dict[str, list[tuple[str, float]]] = {name: [] for name in nodes}
    real = looks.wait_for_look
    done = threading.Event()
    poke = 1.0
    monkeypatch.setattr(looks, "SHORTEST", float(SECONDS))

    async def watched(conn_id, queries, poke_interval):
        number = queries[0]["StudyInstanceUID"]
        try:
            return await real(conn_id, queries, poke_interval)
        finally:
            answers[conn_id].append((number, time.monotonic()))
            counts = [sum(one == other for other, _ in answers[name]) for name in ("first", "second")
                      for one in {one for one, _ in answers[name]}]  # fmt: skip
            if len(counts) == 2 * (SENSORS // 3) and min(counts) >= 3:
                done.set()

    monkeypatch.setattr("airflow_dicom_get.triggers.dicom.wait_for_look", watched)

    async def run():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(Forbidden())

        async def follow(one):
            async for _ in one.run():
                raise AssertionError("nothing settles here")

        tasks = [
            asyncio.create_task(follow(trigger(f"1.2.{number}", name, poke)))
            for number in range(SENSORS // 3)
            for name in nodes
        ]
        until = loop.time() + SECONDS
        while not done.is_set() and loop.time() < until:
            await asyncio.sleep(0.05)
        silent = list(answers["silent"])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return silent

    silent = asyncio.run(run())
    assert done.is_set()
    assert silent == []
    assert nodes["silent"].most == 1


class Gate:
    """Stands for the PACS: each look waits until it is let through."""

    def __init__(self, monkeypatch):
        self.asked: list[tuple[str, str]] = []
        self.at_work = self.most = 0
        self.outcomes: list[BaseException] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self._mutex = threading.Lock()
        monkeypatch.setattr(looks, "look", self.look)

    def look(self, hook, queries, seconds, on_scu):
        with self._mutex:
            self.asked.append((hook.dicom_conn_id, queries[0]["StudyInstanceUID"]))
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        self.entered.set()
        assert self.open.wait(SECONDS)
        with self._mutex:
            self.at_work -= 1
            outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        return Sighting([], 0.0)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


async def joined(conn_id, *studies):
    """Tasks that wait for a look each, all of them in line; the first of the connection is under way."""
    tasks = [asyncio.create_task(looks.wait_for_look(conn_id, [{"StudyInstanceUID": study}], 60)) for study in studies]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def entered(gate):
    while not gate.entered.is_set():
        await asyncio.sleep(0.01)


def test_who_asks_the_same_shares_a_look_and_a_connection_has_one_at_a_time(gate):
    async def run():
        tasks = await joined("x", "1.1", *["1.2"] * 20, "1.1", "1.3")
        await entered(gate)
        tasks += await joined("x", "1.2", "1.1")
        gate.open.set()
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(run())) == 25
    assert gate.asked == [("x", "1.1"), ("x", "1.2"), ("x", "1.3")]
    assert gate.most == 1
    assert not looks._lines["x"]._at_work


NEVER_HEARD = [
    ConnectFailed("refused"),
    DeadlineExceeded("silent", phase="acse"),
    DeadlineExceeded("silent", phase="connect"),
]


@pytest.mark.parametrize("error", NEVER_HEARD, ids=lambda error: f"{type(error).__name__}_{error.facts.get('phase')}")
def test_a_node_that_does_not_answer_is_asked_once_for_all_who_wait(gate, error):
    async def run():
        gate.outcomes = [error]
        tasks = await joined("x", "1.1", "1.2", "1.3")
        await entered(gate)
        gate.open.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await asyncio.gather(*await joined("x", "1.1", "1.2"))

    answers, later = asyncio.run(run())
    assert [type(one) for one in answers] == [type(error)] * 3
    assert len(later) == 2
    assert gate.asked == [("x", "1.1"), ("x", "1.1"), ("x", "1.2")]


def test_one_who_asks_when_a_look_has_ended_and_its_thread_has_not_gone_on_waits_for_the_next(gate, monkeypatch):
    goes_on, real = threading.Event(), looks._Line._next
    calls = iter((True, False))

    def late(line):
        assert next(calls, False) or goes_on.wait(10)
        return real(line)

    monkeypatch.setattr(looks._Line, "_next", late)

    async def run():
        gate.open.set()
        first = await asyncio.gather(*await joined("x", "1.1"))
        tasks = await joined("x", "1.2")
        goes_on.set()
        return [*first, *await asyncio.gather(*tasks)]

    assert [type(one) for one in asyncio.run(run())] == [Sighting] * 2
    assert gate.asked == [("x", "1.1"), ("x", "1.2")]


@pytest.mark.parametrize(
    "error", [OperationFailed("no", status=0xA700), DeadlineExceeded("slow", phase="find_response"), ValueError("odd")]
)
def test_what_a_question_meets_costs_those_alone_who_asked_it(gate, error):
    async def run():
        gate.outcomes = [error]
        tasks = await joined("x", "1.1", "1.2", "1.1")
        await entered(gate)
        gate.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(run())
    assert type(first) is type(third) is type(error)
    assert isinstance(second, Sighting)


def test_a_look_that_does_not_come_back_is_given_up_and_no_other_is_begun_beside_it(gate, monkeypatch):
    monkeypatch.setattr(looks, "SHORTEST", 0.05)
    monkeypatch.setattr(looks, "GRACE_SECONDS", 0.05)

    async def short(study):
        return await looks.wait_for_look("x", [{"StudyInstanceUID": study}], 0.1)

    async def run():
        answers = await asyncio.gather(short("1.1"), short("1.2"), return_exceptions=True)
        later = await asyncio.gather(short("1.3"), return_exceptions=True)
        assert [type(one) for one in (*answers, *later)] == [TimeoutError] * 3
        assert gate.asked == [("x", "1.1")]
        gate.open.set()
        while looks._lines["x"]._at_work:
            await asyncio.sleep(0.01)
        return await short("1.4")

    assert isinstance(asyncio.run(run()), Sighting)
    assert gate.most == 1


def test_who_leaves_takes_along_what_nobody_else_waits_for(gate):
    async def run():
        tasks = await joined("x", "1.1", "1.2", "1.3", "1.3")
        await entered(gate)
        for task in (tasks[1], tasks[2]):
            task.cancel()
        await asyncio.gather(*tasks[1:3], return_exceptions=True)
        gate.open.set()
        await asyncio.gather(tasks[0], tasks[3])

    asyncio.run(run())
    assert gate.asked == [("x", "1.1"), ("x", "1.3")]


@pytest.mark.parametrize(("poke_interval", "seconds"), [(1, 5), (60, 15), (300, 75), (3600, 120)])
def test_a_look_may_take_a_quarter_of_the_interval(poke_interval, seconds):
    assert looks.seconds_of(poke_interval) == seconds


def test_a_silent_pacs_is_left_in_time(nodes, monkeypatch):
    """The deadlines of the connection are longer: ten seconds to connect, thirty for an association."""
    monkeypatch.setattr(looks, "SHORTEST", 0.5)

    async def run():
        return await looks.wait_for_look("silent", [{"StudyInstanceUID": "1.2"}], 0.1)

    with pytest.raises(DeadlineExceeded) as raised:
        asyncio.run(run())
    assert raised.value.facts["phase"] == "acse"
    assert looks.never_heard(raised.value)
    assert "raise that if the PACS is slow" in str(raised.value)
