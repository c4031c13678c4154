"""A destination that keeps the source waiting: no late answer, nothing fetched twice that was kept, complete.

Sources give up on a C-STORE response after half a minute or a minute, and break the association with
the next request. `LONG=1` waits as long as that, with the real ones; it takes six minutes.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc
from tests.support.holdings import Holding, hold
from tests.support.relay import Relay

LONG = pytest.mark.skipif("LONG" not in os.environ, reason="LONG=1 waits as long as real sources do")
SHORT = {"sub_operation": 0.3, "stall": 0.3}


class Slow:
    """Delays some calls of a sink's writers: ``plan`` maps (method, number of the instance) to seconds."""

    def __init__(self, plan: dict[tuple[str, int], float]) -> None:
        self.plan = plan
        self.begun: list[str] = []
        self.delays: list[tuple[str, float]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begin = FilesystemSink.begin

        def slow_begin(sink: FilesystemSink, instance: Any) -> Any:
            if instance.sop not in self.begun:
                self.begun.append(instance.sop)
                number = len(self.begun)
            else:
                number = -1
            self._wait("begin", number)
            return _SlowWriter(begin(sink, instance), self, number)

        monkeypatch.setattr(FilesystemSink, "begin", slow_begin)

    def _wait(self, method: str, number: int) -> None:
        seconds = self.plan.get((method, number), 0.0)
        if seconds:
            self.delays.append((method, seconds))
            time.sleep(seconds)


class _SlowWriter:
    def __init__(self, writer: Any, slow: Slow, number: int) -> None:
        self.writer, self.slow, self.number, self.written = writer, slow, number, 0

    def write(self, view: memoryview) -> None:
        self.written += len(view)
        if self.written > 100_000:
            number, self.number = self.number, -1 if ("write", self.number) in self.slow.plan else self.number
            self.slow._wait("write", number)
        self.writer.write(view)

    def take(self) -> Any:
        taken = self.writer.take()
        self.slow._wait("take", self.number)
        return taken

    def abort(self) -> None:
        self.writer.abort()


def retrieve(port: int, study: str, to: Path, **options: Any) -> Any:
    return GetScu(f"PACS@127.0.0.1:{port}", destination=to, **options).get_study({"StudyInstanceUID": study})


@pytest.mark.parametrize("associations", [1, 3])
def test_what_is_kept_late_is_not_answered_and_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, associations: int
) -> None:
    slow = Slow({("take", 3): 0.6, ("take", 9): 0.6})
    slow.install(monkeypatch)
    with MisbehavingPacs(series=3, instances=6) as pacs:
        together = {"associations": associations, "max_associations": associations}
        result = retrieve(pacs.port, pacs.study_uid, tmp_path, deadlines=SHORT, **together)
        assert (result.verdict, result.completed) == ("complete", 18)
        assert len(slow.delays) == 2
        assert pacs.sent == Counter(pacs.uids), "each was kept at the first time"
        assert pacs.statuses == [0] * 16, "two were not answered"
        assert result.associations <= 2 + associations + 2
        for path in tmp_path.rglob("*.dcm"):
            assert path.read_bytes().endswith(pacs.dataset(path.stem))


def test_answers_in_time_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow({("take", 3): 0.2, ("begin", 5): 0.2}).install(monkeypatch)
    with MisbehavingPacs(series=1, instances=6) as pacs:
        result = retrieve(pacs.port, pacs.study_uid, tmp_path, deadlines=SHORT)
        assert result.verdict == "complete"
        assert pacs.statuses == [0] * 6
        assert result.associations == 3


@pytest.mark.parametrize("method", ["begin", "write"])
def test_a_source_is_not_left_unread_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    slow = Slow({(method, 2): 0.6})
    slow.install(monkeypatch)
    with MisbehavingPacs(series=1, instances=4, size=1_000_000) as pacs:
        result = retrieve(pacs.port, pacs.study_uid, tmp_path, deadlines=SHORT)
        assert result.verdict == "complete"
        assert slow.delays
        assert result.associations == 4
        assert sum(pacs.sent.values()) in (4, 5)
        assert not list(tmp_path.rglob("*.part"))
        for path in tmp_path.rglob("*.dcm"):
            assert path.read_bytes().endswith(pacs.dataset(path.stem))


def test_a_destination_that_is_always_slow_names_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow({("write", number): 0.5 for number in (-1, 1)}).install(monkeypatch)
    with MisbehavingPacs(series=1, instances=1, size=1_000_000) as pacs:
        result = retrieve(pacs.port, pacs.study_uid, tmp_path, deadlines=SHORT, retries=1)
    assert result.verdict == "failed"
    assert result.transient
    assert any("'stall'" in e["error"] and "destination" in e["error"] for e in result.errors), result.errors


def test_a_slow_callback_does_not_make_us_late(tmp_path: Path) -> None:
    seen: list[Any] = []

    def callback(event: Any) -> None:
        seen.append(event)
        if len(seen) == 2:
            time.sleep(0.6)

    with MisbehavingPacs(series=1, instances=4) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, deadlines=SHORT)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid}, on_sub_operation=callback)
        assert result.verdict == "complete"
        assert pacs.statuses == [0] * 3
        assert pacs.sent == Counter(pacs.uids)


class Stuck(Slow):
    """A destination whose call does not return until it is released, as on a file server that is dead."""

    def __init__(self, method: str, number: int) -> None:
        super().__init__({(method, number): float("inf")})
        self.blocked, self.released = threading.Event(), threading.Event()

    def _wait(self, method: str, number: int) -> None:
        if (method, number) in self.plan and not self.blocked.is_set():
            self.blocked.set()
            assert self.released.wait(60)


@pytest.mark.parametrize("method", ["write", "take"])
@pytest.mark.parametrize("way", ["deadline", "cancelled", "cancelled twice"])
def test_a_source_is_let_go_while_the_destination_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: Callable[..., EmbeddedPacs], method: str, way: str
) -> None:
    stuck = Stuck(method, 2)
    stuck.install(monkeypatch)
    holding = hold(tmp_path / "pacs", big_study(tmp_path / "pacs", 4, 1_000_000))
    pacs = embedded(holding.folder)
    deadlines = SHORT if way == "deadline" else {}
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to", deadlines=deadlines)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(scu.get_study, {"StudyInstanceUID": holding.study})
        try:
            assert stuck.blocked.wait(30)
            for _ in range(way.count("cancelled") + way.count("twice")):
                scu.cancel("stop")
            limit = time.monotonic() + 15
            while pacs.associations and time.monotonic() < limit:
                time.sleep(0.01)
            assert pacs.associations == 0
            assert not run.done(), "it is stuck"
        finally:
            stuck.released.set()
        result = run.result(30)
    assert result.verdict == ("complete" if way == "deadline" else "cancelled")
    assert result.completed >= 1 + (method == "take")
    assert not list((tmp_path / "to").rglob(".*.part"))
    for path in (tmp_path / "to").rglob("*.dcm"):
        assert path.read_bytes().endswith(holding.dataset(path.stem))


# --- as long as it really takes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """Six instances of 60 MB."""
    folder = tmp_path_factory.mktemp("large")
    return hold(folder, big_study(folder, 6, 60 << 20, name="large"))


@LONG
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["dcmqrscp", "orthanc"])
@pytest.mark.parametrize(
    "plan",
    [{("take", 2): 20.0}, {("take", 2): 35.0}, {("take", 2): 70.0}, {("write", 2): 35.0}, {("write", 2): 75.0}],
    ids=["answer after 20 s", "answer after 35 s", "answer after 70 s", "35 s unread", "75 s unread"],
)
def test_real_sources(
    large: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, plan: dict[tuple[str, int], float]
) -> None:
    Slow(plan).install(monkeypatch)
    server: Dcmqrscp | Orthanc
    if kind == "dcmqrscp":
        server = Dcmqrscp(tmp_path / "pacs")
        server.register(large.files)
    else:
        server = Orthanc(tmp_path / "pacs")
    with server:
        if isinstance(server, Orthanc):
            server.load(large.files)
        with Relay("127.0.0.1", server.port, keep_data=False) as relay:
            lateness = _lateness(relay)
            scu = GetScu(f"{server.ae_title}@127.0.0.1:{relay.port}", destination=tmp_path / "to")
            result = scu.get_study({"StudyInstanceUID": large.study})
        assert result.verdict == "complete", result
        assert max(lateness()) < 26
        sent = relay.by_sop()
        for path in (tmp_path / "to").rglob("*.dcm"):
            assert path.stem in sent
        unread = any(method == "write" for method, _ in plan)
        assert len(relay.sent) <= 6 + unread


def _lateness(relay: Relay) -> Callable[[], list[float]]:
    """How long each C-STORE request waited for its response, from when the relay had passed it on."""
    waits: list[float] = []
    began: list[float] = []

    class Watched(list[Any]):
        def append(self, item: Any) -> None:
            direction, kind, _ = item
            if direction == "up" and kind == 0x8001 and began:
                waits.append(time.monotonic() - began.pop())
            super().append(item)

    class Arrived(list[Any]):
        def append(self, item: Any) -> None:
            began[:] = [time.monotonic()]
            super().append(item)

    relay.commands, relay.sent = Watched(), Arrived()
    return lambda: waits or [0.0]
