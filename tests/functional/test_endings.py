"""However a call ends, nothing of it is at work afterwards: no thread, no association, no file that changes.

Exceptions come by real signals, as Ctrl-C and Airflow's timeout of a task do; a disk that hangs is the seam
with a call that does not return, here and in a process of the shell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from airflow_dicom_get import GetScu, StoreScu, clock
from airflow_dicom_get.config.options import VerifyOptions
from airflow_dicom_get.engine import spread
from airflow_dicom_get.engine.ending import run_beside
from airflow_dicom_get.engine.listing import ListSeries, SeriesInfo
from airflow_dicom_get.errors import Cancelled, DeadlineExceeded, InvalidOption, InvalidQuery, SinkError
from airflow_dicom_get.exports.verb import export
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.net.association import Cancels, CancelToken
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.bucket import Bucket, Listed
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, FaultProxy, Moto
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.verify import compare
from tests.simulation.mutations import Mutation, taken_out
from tests.support.holdings import Holding
from tests.support.odd_destination import OddDestination

WITHIN = 20.0
"""Seconds that tell an end from a hang; half of it are promised."""


class TaskTimeout(BaseException):
    """As Airflow's: raised by the handler of a signal, in the main thread, wherever that is."""


def ours() -> list[str]:
    """The threads of a call."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dicom-get")]


def assert_all_end() -> None:
    """Give the threads of a call their time, and see that none is left."""
    limit = time.monotonic() + WITHIN
    while ours() and time.monotonic() < limit:
        time.sleep(0.01)
    assert ours() == []


def below(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder: sizes and times of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def recycled(folder: Path) -> Iterator[None]:
    """Files that get the numbers of descriptors that were closed: nobody writes into them."""
    folder.mkdir()
    names = [folder / f"{number}" for number in range(60)]
    open_files = [os.open(name, os.O_RDWR | os.O_CREAT) for name in names]
    folders = [os.open(folder, os.O_RDONLY) for _ in names]
    try:
        yield
        assert {path.name for path in folder.iterdir()} == {name.name for name in names}
        assert all(not name.stat().st_size for name in names)
    finally:
        for fd in (*open_files, *folders):
            os.close(fd)


@contextmanager
def meanwhile(work: Callable[[], object], within: float = WITHIN) -> Iterator[None]:
    """Do something beside, and see that what lasts so long is over in time, in seconds."""
    beside = threading.Thread(target=work)
    beside.start()
    began = time.monotonic()
    try:
        yield
        assert time.monotonic() - began < within
    finally:
        beside.join()


@contextmanager
def raised_by_signal(when: Callable[[], object]) -> Iterator[None]:
    """While this lasts, a signal raises :class:`TaskTimeout` in the main thread once something is so."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise TaskTimeout

    over = threading.Event()

    def send() -> None:
        limit = time.monotonic() + WITHIN
        while not when() and time.monotonic() < limit:
            if over.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


def idle(pacs: EmbeddedPacs) -> bool:
    limit = time.monotonic() + 5
    while pacs.associations and time.monotonic() < limit:
        time.sleep(0.01)
    return pacs.associations == 0


# --- an exception in the middle ------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "node", "bucket"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    if request.param == "folder":
        yield {"destination": tmp_path / "to"}
    elif request.param == "node":
        with OddDestination() as node:
            yield {"destination": f"dicom://{node.node}", "manifest_root": tmp_path / "to"}
    else:
        service: Moto = request.getfixturevalue("moto")
        prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
        # The ledgers lie in a folder: these are the descriptors that may be recycled.
        place = {"destination": f"s3://{BUCKET}/{prefix}", "manifest_root": tmp_path / "to"}
        yield {**place, "s3_config": service.config}


@pytest.mark.parametrize("way", ["signal", "callback"])
@pytest.mark.parametrize("associations", [1, 3])
def test_after_an_exception_nothing_of_a_retrieval_is_at_work(
    tmp_path: Path,
    ct: Holding,
    embedded: Callable[..., EmbeddedPacs],
    destination: dict[str, Any],
    associations: int,
    way: str,
) -> None:
    pacs = embedded(ct.folder, before_send=lambda sop: time.sleep(0.02))
    came: list[Any] = []

    def callback(event: Any) -> None:
        came.append(event)
        if way == "callback" and len(came) == 7:
            raise TaskTimeout

    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", associations=associations, max_associations=associations, **destination)
    began = time.monotonic()
    with raised_by_signal(lambda: way == "signal" and len(came) >= 7), pytest.raises(TaskTimeout):
        scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=callback)
    assert time.monotonic() - began < WITHIN
    assert ours() == []
    before, number = below(tmp_path / "to"), len(came)
    with recycled(tmp_path / "others"):
        assert idle(pacs)
        time.sleep(0.3)
    assert below(tmp_path / "to") == before
    assert len(came) == number < 25, "no association goes on with what others have left"
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert result.verdict == "complete"


def test_after_a_signal_nothing_lists_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: Callable[..., EmbeddedPacs]
) -> None:
    serve = spread._serve

    def serve_slowly(finder: Finder, queue: deque[SeriesInfo], list_series: ListSeries) -> None:
        def list_slowly(finder: Finder, series: SeriesInfo) -> None:
            time.sleep(0.1)
            list_series(finder, series)

        serve(finder, queue, list_slowly)

    monkeypatch.setattr(spread, "_serve", serve_slowly)
    study = big_study(tmp_path / "pacs", 48, 200, name="endings", series=24)
    pacs = embedded(tmp_path / "pacs")
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to", associations=3, max_associations=3)
    with raised_by_signal(lambda: "dicom-get-list-2" in ours()), pytest.raises(TaskTimeout):
        scu.get_study({"StudyInstanceUID": study})
    assert ours() == []
    assert idle(pacs)


@pytest.mark.parametrize("way", ["signal", "callback"])
def test_after_an_exception_nothing_of_a_store_is_at_work(tmp_path: Path, ct: Holding, way: str) -> None:
    came: list[Any] = []

    def callback(event: Any) -> None:
        came.append(event)
        if way == "callback" and len(came) == 5:
            raise TaskTimeout

    with OddDestination(delay=lambda number: 0.05) as node:
        scu = StoreScu(node.node, manifest_root=tmp_path / "to", associations=3, max_associations=3)
        with raised_by_signal(lambda: way == "signal" and len(came) >= 5), pytest.raises(TaskTimeout):
            scu.store(ct.folder, on_sub_operation=callback)
        assert ours() == []
        before, number = below(tmp_path / "to"), len(came)
        with recycled(tmp_path / "others"):
            time.sleep(0.3)
        assert below(tmp_path / "to") == before
        assert len(came) == number < 40
        assert scu.store(ct.folder).verdict == "complete"


# --- cancels ---------------------------------------------------------------------------------------------------


def test_each_cancel_is_spent_by_one_call(tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs]) -> None:
    pacs = embedded(ct.folder)
    query = {"StudyInstanceUID": ct.study}
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to")
    scu.cancel("before")
    result = scu.get_study(query)
    assert (result.verdict, result.reason, result.completed) == ("cancelled", "before", 0)
    result = scu.get_study(
        query, on_sub_operation=lambda event: scu.cancel("between") if event.completed == 3 else None
    )
    assert (result.verdict, result.reason) == ("cancelled", "between")
    assert 3 <= result.completed < 40
    assert scu.get_study(query).verdict == "complete"
    scu.cancel("after")
    assert scu.get_study(query).reason == "after"
    assert scu.find(query)[0].StudyInstanceUID == ct.study
    with OddDestination() as node:
        store = StoreScu(node.node, manifest_root=tmp_path / "state")
        store.cancel("before")
        assert store.store(ct.folder).reason == "before"
        assert store.store(ct.folder).verdict == "complete"


def test_a_call_that_is_refused_spends_the_cancel_before_it(
    tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs]
) -> None:
    scu = GetScu(f"PACS@127.0.0.1:{embedded(ct.folder).port}", destination=tmp_path / "to")
    query = {"StudyInstanceUID": ct.study}
    cancels = Cancels()
    nothing: dict[str, str] = {}
    for refused in (
        lambda: scu.get_study(nothing),
        lambda: scu.plan(nothing),
        lambda: scu.find(nothing),
        lambda: scu.find(query, level="PATIENT"),
        lambda: scu.echo(study="none"),
        lambda: scu.echo(profile=tmp_path / "profile"),
    ):
        scu.cancel("before")
        with pytest.raises((InvalidQuery, InvalidOption)):
            refused()
        assert scu.find(query)[0].StudyInstanceUID == ct.study
    assert scu.get_study(query).verdict == "complete"
    compared = VerifyOptions.check({"destination": tmp_path / "to"})
    cancels.cancel("before")
    with pytest.raises(InvalidOption):
        compare(compared, cancels=cancels)
    assert compare(compared, study=ct.study, cancels=cancels).exit_code == 0
    with OddDestination() as node:
        store = StoreScu(node.node, manifest_root=tmp_path / "state")
        store.cancel("before")
        with pytest.raises(InvalidOption):
            store.store()
        assert store.store(ct.folder).verdict == "complete"


def test_a_cancel_ends_a_plan_while_it_finds_out_what_is_held(
    tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs], monkeypatch: pytest.MonkeyPatch
) -> None:
    scu = GetScu(f"PACS@127.0.0.1:{embedded(ct.folder).port}", destination=tmp_path / "to", verify_held="digest")
    query = {"StudyInstanceUID": ct.study}
    assert scu.get_study(query).verdict == "complete"
    inventory = FilesystemSink.inventory

    def cancelled(sink: FilesystemSink, study: str, *patient: Any) -> Any:
        scu.cancel("stop")
        return inventory(sink, study, *patient)

    with monkeypatch.context() as patched:
        patched.setattr(FilesystemSink, "inventory", cancelled)
        with pytest.raises(Cancelled):
            scu.plan(query)
    assert scu.plan(query).held == 40


def test_the_time_of_a_store_ends_it_as_it_ends_a_get(tmp_path: Path, ct: Holding) -> None:
    with OddDestination(delay=lambda number: 0.3) as node:
        scu = StoreScu(node.node, manifest_root=tmp_path / "state", deadlines={"operation": 1.5})
        result = scu.store(ct.folder)
        assert (result.verdict, result.reason, result.transient) == ("partial", "deadline", True)
        assert 0 < result.completed < 40 == result.total
        assert "time allowed for the whole transfer" in result.errors[0]["error"]
        assert ours() == []
        result = StoreScu(node.node, manifest_root=tmp_path / "state").store(ct.folder)
        assert (result.verdict, result.skipped > 0) == ("complete", True)
    with OddDestination(delay=lambda number: 15.0) as node:
        began = time.monotonic()
        scu = StoreScu(node.node, manifest_root=tmp_path / "silent", deadlines={"operation": 1.0})
        result = scu.store(ct.folder)
        assert (result.verdict, result.reason, result.completed) == ("failed", "deadline", 0)
        assert time.monotonic() - began < 12, "the node answers after 15 s"


@pytest.mark.parametrize("tls", [False, True])
def test_a_cancel_ends_the_wait_for_a_connection(tmp_path: Path, tls: bool) -> None:
    """A host behind a firewall that drops everything; one that takes connections and says nothing of TLS."""
    with socket.create_server(("127.0.0.1", 0), backlog=8 if tls else 0) as server, ExitStack() as queue:
        port = server.getsockname()[1]
        for _ in range(0 if tls else 3):  # once the queue is full, the kernel drops what comes
            full = queue.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(("127.0.0.1", port))
        scu = GetScu(f"PACS@127.0.0.1:{port}", destination=tmp_path / "to", tls={} if tls else None)
        began = time.monotonic()
        threading.Timer(0.5, scu.cancel, ["stop"]).start()
        result = scu.get_study({"StudyInstanceUID": "1.2.3"})
        assert (result.verdict, result.reason) == ("cancelled", "stop")
        assert time.monotonic() - began < 8, "the deadline is 10 s"
        assert ours() == []


# --- a service that does not answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["cancel", "cancelled twice", "signal"])
@pytest.mark.parametrize("silent", ["from the start", "in the middle", "byte by byte"])
def test_a_bucket_that_does_not_answer_does_not_keep_a_run(
    tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs], moto: Moto, silent: str, way: str
) -> None:
    reached = threading.Event()

    def fault(number: int, method: str, path: str) -> str | None:
        if silent != "in the middle" or (method == "PUT" and number > 10):
            reached.set()
            return "trickle" if silent == "byte by byte" else "stall"
        return None

    prefix = hashlib.sha256(f"{silent} {way}".encode()).hexdigest()[:12]
    pacs = embedded(ct.folder)
    with FaultProxy(moto, fault) as service:
        place = f"s3://{BUCKET}/{prefix}"
        node = f"PACS@127.0.0.1:{pacs.port}"
        scu = GetScu(node, destination=place, manifest_root=tmp_path / "to", s3_config=service.config)

        def cancel() -> None:
            assert reached.wait(WITHIN)
            for _ in range(("cancel" in way) + ("twice" in way)):
                scu.cancel("stop")

        with meanwhile(cancel):
            if way == "signal":
                with raised_by_signal(reached.is_set), pytest.raises(TaskTimeout):
                    scu.get_study({"StudyInstanceUID": ct.study})
            else:
                result = scu.get_study({"StudyInstanceUID": ct.study})
                assert (result.verdict, result.reason) == ("cancelled", "stop")
                assert result.completed < 40
                assert result.manifest_uri is not None
        assert ours() == []
        assert idle(pacs)
        service.fault = lambda number, method, path: None
        assert scu.get_study({"StudyInstanceUID": ct.study}).verdict == "complete"


# --- a disk that does not return -------------------------------------------------------------------------------


class Hung(files.Disk):
    """Some calls do not return until :attr:`released` is set, from the given one of them on."""

    def __init__(self, calls: set[str], first: int) -> None:
        self.calls, self.left = calls, first
        self.reached, self.released = threading.Event(), threading.Event()
        self.inside = 0

    def _hang(self, name: str) -> None:
        if name in self.calls:
            self.left -= 1
            if self.left < 0:
                self.reached.set()
                self.inside += 1
                assert self.released.wait(60)
                self.inside -= 1

    def sync(self, fd: int) -> None:
        self._hang("sync")
        super().sync(fd)

    def sync_data(self, fd: int) -> None:
        self._hang("sync_data")
        super().sync_data(fd)

    def read_into(self, fd: int, view: memoryview, position: int) -> int:
        self._hang("read")
        return super().read_into(fd, view, position)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._hang("write")
        return super().write(fd, data)

    def rename_new(self, old: str, new: str, folder: int) -> None:
        self._hang("rename")
        if self.reached.is_set():
            raise OSError(5, "Input/output error")
        super().rename_new(old, new, folder)


class SlowFile(files.Disk):
    """Calls of a file do not return until :attr:`released` is set, from the given one of them on; all are counted."""

    def __init__(self, call: str, ending: str, first: int = 1) -> None:
        self._call, self._ending, self._first, self.calls = call, ending, first, 0
        self.reached, self.released = threading.Event(), threading.Event()

    def _wait(self, call: str, fd: int) -> None:
        if call == self._call and os.readlink(f"/proc/self/fd/{fd}").endswith(self._ending):
            self.calls += 1
            if self.calls >= self._first:
                self.reached.set()
                assert self.released.wait(60)

    def read_at(self, fd: int, size: int, position: int) -> bytes:
        self._wait("read", fd)
        return super().read_at(fd, size, position)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        written = super().write(fd, data)
        self._wait("write", fd)
        return written


@pytest.mark.parametrize("durable", [True, False], ids=["compared", "written again"])
@pytest.mark.parametrize("way", ["cancelled twice", "signal"])
def test_who_returns_late_from_what_was_there_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, way: str
) -> None:
    """What a run has left unsynced is written again before it counts; with ``resume=False`` it is compared."""
    with MisbehavingPacs(None, instances=2) as pacs:
        node, to = f"PACS@127.0.0.1:{pacs.port}", tmp_path / "to"
        query = {"StudyInstanceUID": pacs.study_uid}
        assert GetScu(node, destination=to, durable=durable).get_study(query).verdict == "complete"
        scu = GetScu(node, destination=to, resume=not durable)
        disk = SlowFile("read", ".dcm", 3 if durable else 1)  # where it ends; where it begins
        monkeypatch.setattr(files, "disk", disk)

        def cancel() -> None:
            assert disk.reached.wait(WITHIN)
            if way != "signal":
                scu.cancel("stop")
                scu.cancel("stop")

        try:
            with meanwhile(cancel):
                if way == "signal":
                    with raised_by_signal(disk.reached.is_set), pytest.raises(TaskTimeout):
                        scu.get_study(query)
                else:
                    assert scu.get_study(query).verdict == "cancelled"
            assert ours() == ["dicom-get-run"], "the disk holds it"
            before = below(to)
        finally:
            disk.released.set()
        assert_all_end()
        assert below(to) == before
        assert GetScu(node, destination=to).get_study(query).verdict == "complete"


def test_a_cancel_is_heard_while_a_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MisbehavingPacs(None, instances=1, size=8 * files.CHUNK) as pacs:
        node, query = f"PACS@127.0.0.1:{pacs.port}", {"StudyInstanceUID": pacs.study_uid}
        assert GetScu(node, destination=tmp_path, durable=False).get_study(query).verdict == "complete"
        scu = GetScu(node, destination=tmp_path)
        disk = SlowFile("write", ".dcm")
        monkeypatch.setattr(files, "disk", disk)

        def cancel() -> None:
            assert disk.reached.wait(WITHIN)
            scu.cancel("stop")
            disk.released.set()

        with meanwhile(cancel):
            result = scu.get_study(query)
        assert (result.verdict, result.reason, disk.calls) == ("cancelled", "stop", 1)
        assert GetScu(node, destination=tmp_path).get_study(query).verdict == "complete"


def test_who_returns_late_from_an_object_that_was_there_requests_nothing(
    moto: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is copied to be compared; what was recorded of it counts on, since it is not replaced."""
    with MisbehavingPacs(None, instances=1) as pacs, FaultProxy(moto) as service:
        place: dict[str, Any] = {"destination": f"s3://{BUCKET}/late", "s3_config": service.config}
        node, query = f"PACS@127.0.0.1:{pacs.port}", {"StudyInstanceUID": pacs.study_uid}
        assert GetScu(node, **place).get_study(query).verdict == "complete"
        pacs._site.instances[0] = replace(pacs.instances[0], salt=1)
        scu = GetScu(node, resume=False, on_conflict="replace", **place)
        disk = SlowFile("write", "/object")
        monkeypatch.setattr(files, "disk", disk)

        def cancel() -> None:
            assert disk.reached.wait(WITHIN)
            scu.cancel("stop")
            scu.cancel("stop")

        try:
            with meanwhile(cancel):
                assert scu.get_study(query).verdict == "cancelled"
            assert ours(), "the disk holds it"
            made = len(service.requests)
        finally:
            disk.released.set()
        assert_all_end()
        assert service.requests[made:] == []


@pytest.mark.parametrize("way", ["cancel", "cancelled twice", "operation", "signal", "nobody"])
@pytest.mark.parametrize(
    "calls", [{"sync_data"}, {"sync", "sync_data"}, {"rename"}], ids=lambda calls: "+".join(sorted(calls))
)
def test_a_disk_that_does_not_return_does_not_keep_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ct: Holding,
    embedded: Callable[..., EmbeddedPacs],
    calls: set[str],
    way: str,
) -> None:
    if "rename" in calls and way == "cancel":
        pytest.skip("the first cancel waits for what is being taken")
    disk = Hung(calls, 5)
    monkeypatch.setattr(files, "disk", disk)
    pacs = embedded(ct.folder)
    deadlines = {"operation": {"operation": 2.0}, "nobody": {"next_object": 3.0}}.get(way, {})
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to", deadlines=deadlines)
    results: list[Any] = []

    def cancel() -> None:
        assert disk.reached.wait(WITHIN)
        for _ in range(("cancel" in way) + ("twice" in way)):
            scu.cancel("stop")

    try:
        with meanwhile(cancel):
            if way == "signal":
                with raised_by_signal(disk.reached.is_set), pytest.raises(TaskTimeout):
                    scu.get_study({"StudyInstanceUID": ct.study})
            else:
                results.append(scu.get_study({"StudyInstanceUID": ct.study}))
        assert idle(pacs)
        assert len(ours()) == disk.inside <= 2, "those alone that the disk holds"
        before = below(tmp_path / "to")
    finally:
        disk.released.set()
    assert_all_end()
    assert below(tmp_path / "to") == before
    for result in results:
        assert result.verdict == ("partial" if way == "operation" and result.completed else result.verdict)
        assert result.verdict in ("cancelled", "partial", "failed")
        if way == "nobody":
            assert (result.reason, result.transient) == ("destination_error", True)
            assert result.verdict != "cancelled"
        assert result.completed < 40
        frame = result.manifest
        if way in ("operation", "nobody"):
            assert "cancelled" not in set(frame["reason"])
        assert result.completed == frame["state"].isin(["stored", "held"]).sum()
        if "sync" in calls:
            assert result.manifest_uri is None
            assert "no manifest was written" in result.errors[0]["error"]
    monkeypatch.setattr(files, "disk", files.Disk())
    again = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to").get_study({"StudyInstanceUID": ct.study})
    assert again.verdict == "complete"


def test_a_destination_that_refuses_all_is_not_called_one_that_does_not_return(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MisbehavingPacs(None, instances=1, series=12) as pacs:
        (tmp_path / pacs.study_uid).mkdir()
        for instance in pacs.instances:
            (tmp_path / pacs.study_uid / instance.series).write_text("no folder")
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
    assert (result.verdict, result.reason, result.transient) == ("failed", "destination_error", True)
    assert "in a row" in result.errors[0]["error"]
    assert not [said for said in (str(result.errors), caplog.text) if "not returned" in said or "Retrying" in said]


@pytest.mark.parametrize(("verb", "way"), [("verify", "cancel"), ("verify", "signal"), ("export --check", "signal")])
def test_a_disk_that_does_not_return_does_not_keep_those_who_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ct: Holding,
    embedded: Callable[..., EmbeddedPacs],
    verb: str,
    way: str,
) -> None:
    pacs = embedded(ct.folder)
    got = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to").get_study({"StudyInstanceUID": ct.study})
    before = below(tmp_path / "to")
    cancels = Cancels()

    def read() -> None:
        if verb == "export --check":
            export(got.manifest_uri, "sha256sums", tmp_path / "sums", check=True)
        else:
            options = VerifyOptions.check({"destination": tmp_path / "to"})
            compare(options, study=ct.study, cancels=cancels)

    disk = Hung({"read"}, 5)
    monkeypatch.setattr(files, "disk", disk)

    def cancel() -> None:
        if way == "cancel":
            assert disk.reached.wait(WITHIN)
            cancels.cancel("stop")

    try:
        with meanwhile(cancel):
            if way == "signal":
                with raised_by_signal(disk.reached.is_set), pytest.raises(TaskTimeout):
                    read()
            else:
                with pytest.raises(SinkError, match="did not return"):
                    read()
        assert len(ours()) <= disk.inside + 1, "those that the disk holds, and who waits for them"
    finally:
        disk.released.set()
    assert_all_end()
    assert below(tmp_path / "to") == before
    assert not (tmp_path / "sums").exists()


@pytest.mark.parametrize("way", ["cancel", "signal", "callback", "time"])
def test_a_bucket_that_trickles_does_not_keep_a_verify(ct: Holding, moto: Moto, way: str) -> None:
    """A byte a second keeps each read from its own time limit."""
    prefix = hashlib.sha256(f"trickles {way}".encode()).hexdigest()[:12]
    reading = threading.Event()
    client = moto.client()
    for number in range(2, 10):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{ct.study}/1.2/1.{number}.dcm", Body=bytes(5000))
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{ct.study}/1.2/1.1.dcm", Body=b"no instance")

    def fault(number: int, method: str, path: str) -> str | None:
        if method == "GET" and path.partition("?")[0].endswith(".dcm") and not path.endswith("/1.1.dcm"):
            reading.set()
            return "trickle"
        return None

    cancels = Cancels()
    told: list[object] = []

    def callback(difference: object) -> None:
        told.append(difference)
        if way == "callback":
            assert reading.wait(WITHIN)
            raise TaskTimeout

    def cancel() -> None:
        if way == "cancel":
            assert reading.wait(WITHIN)
            cancels.cancel("stop")

    with FaultProxy(moto, fault) as service:
        place = {"destination": f"s3://{BUCKET}/{prefix}", "s3_config": service.config}
        if way == "time":
            place["deadlines"] = {"operation": 3}

        def read() -> None:
            compare(VerifyOptions.check(place), study=ct.study, on_difference=callback, cancels=cancels)

        with meanwhile(cancel):
            if way == "signal":
                with raised_by_signal(reading.is_set), pytest.raises(TaskTimeout):
                    read()
            else:
                with pytest.raises({"callback": TaskTimeout, "time": DeadlineExceeded}.get(way, Cancelled)):
                    read()
        assert ours() == []
        keys = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
        assert not any(".parquet" in item["Key"] for item in keys), "nothing is said of what was half compared"


SCRIPT = """
import sys, threading
from airflow_dicom_get.storage import files
class Hung(files.Disk):
    def sync_data(self, fd):
        print("hung", file=sys.stderr, flush=True)
        threading.Event().wait()
    sync = sync_data
files.disk = Hung()
from airflow_dicom_get.cli.main import run
run()
"""


def test_the_shell_ends_though_the_disk_hangs(
    tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs]
) -> None:
    pacs = embedded(ct.folder)
    command = [sys.executable, "-c", SCRIPT, "get", f"PACS@127.0.0.1:{pacs.port}", "--study", ct.study,
               "--to", str(tmp_path / "to"), "--json"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "hung" not in process.stderr.readline():
            assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < WITHIN
    value = json.loads(out)
    assert (value["verdict"], value["reason"], value["completed"]) == ("cancelled", "SIGINT", 0)
    assert value["manifest"] is None
    assert process.returncode == 130
    assert "Traceback" not in err


# --- what fails at the end -------------------------------------------------------------------------------------


def test_a_destination_that_cannot_be_closed_ends_in_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ct: Holding, embedded: Callable[..., EmbeddedPacs]
) -> None:
    class Failing(files.Disk):
        def sync(self, fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl"):
                raise OSError(5, "Input/output error")
            super().sync(fd)

    monkeypatch.setattr(files, "disk", Failing())
    pacs = embedded(ct.folder)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path)
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.reason, result.completed) == ("partial", "destination_error", 40)
    assert "Input/output error" in result.errors[0]["error"]
    assert result.transient
    assert result.manifest_uri is not None


def test_a_manifest_that_cannot_be_written_ends_in_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ct: Holding, embedded: Callable[..., EmbeddedPacs]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fail(*arguments: Any, **options: Any) -> Any:
        raise pa.ArrowInvalid("no")

    monkeypatch.setattr(pq, "ParquetWriter", fail)
    pacs = embedded(ct.folder)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to")
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.completed, result.manifest_uri) == ("partial", 40, None)
    assert "Unexpected ArrowInvalid" in result.errors[0]["error"]
    with OddDestination() as node:
        stored = StoreScu(node.node, manifest_root=tmp_path / "state").store(ct.folder)
    assert (stored.verdict, stored.completed, stored.manifest_uri) == ("partial", 40, None)


def test_a_file_that_vanishes_before_it_is_sent_again_is_a_row(tmp_path: Path, ct: Holding) -> None:
    shutil.copytree(ct.folder, tmp_path / "from")
    (victim, *_) = sorted((tmp_path / "from").rglob("*.dcm"))

    def status(number: int) -> int:
        victim.unlink(missing_ok=True)
        return 0xA700 if number == 1 else 0

    with OddDestination(status=status) as node:
        result = StoreScu(node.node, manifest_root=tmp_path / "state").store(tmp_path / "from")
    assert (result.verdict, result.completed, result.failed) == ("partial", 39, 1)
    assert any("is not there" in error["error"] or "No such file" in error["error"] for error in result.errors)


# --- each mending is missed ------------------------------------------------------------------------------------

MENDINGS = {
    "store": Mutation("engine.ending:run_beside", "came = came or error", "raise", "threads of a store run on"),
    "callback": Mutation(
        "engine.source:Source.end_at_once",
        "self.cancel.abort(type(error).__name__)",
        "pass",
        "other associations go on after the exception of a callback",
    ),
    "hung, given up": Mutation(
        "sinks.filesystem:FilesystemSink._wait", "self._give_up()", "pass", "a run waits for a sync that hangs"
    ),
    "returns late": Mutation(
        "storage.files:_Shut.__getattr__",
        'if name != "close" and self._left():',
        "if False:",
        "a comparison that returns late goes on to the ledger",
    ),
    "hung, manifest": Mutation(
        "storage.files:replace_whole", "if not go_on():", "if False:", "a manifest appears after the call has ended"
    ),
    "cancel": Mutation("net.association:Cancels.call", "self._running.remove(token)", "pass", "a cancel is lost"),
}


@pytest.mark.parametrize("name", MENDINGS)
def test_each_mending_is_missed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ct: Holding,
    embedded: Callable[..., EmbeddedPacs],
    name: str,
) -> None:
    def show() -> None:
        if name == "store":
            test_after_an_exception_nothing_of_a_store_is_at_work(tmp_path, ct, "signal")
        elif name == "callback":
            place = {"destination": tmp_path / "to"}
            test_after_an_exception_nothing_of_a_retrieval_is_at_work(tmp_path, ct, embedded, place, 3, "callback")
        elif name == "cancel":
            test_each_cancel_is_spent_by_one_call(tmp_path, ct, embedded)
        elif name == "returns late":
            test_who_returns_late_from_what_was_there_changes_nothing(tmp_path, monkeypatch, True, "cancelled twice")
        else:
            calls = {"sync", "sync_data"} if "manifest" in name else {"sync_data"}
            test_a_disk_that_does_not_return_does_not_keep_a_run(
                tmp_path, monkeypatch, ct, embedded, calls, "cancelled twice"
            )

    with taken_out(name, MENDINGS[name]), pytest.raises(AssertionError):
        show()
    assert_all_end()


@pytest.mark.parametrize("by", ["cancel", "operation"])
def test_a_callback_that_does_not_return_ends_with_the_call(by: str, private: Holding, tmp_path: Path) -> None:
    here, go_on = threading.Event(), threading.Event()

    def blocked(_event: object) -> None:
        here.set()
        go_on.wait()

    with EmbeddedPacs(private.folder) as pacs:
        deadlines = {"operation": 1.0} if by == "operation" else {}
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, deadlines=deadlines)
        found: list[str] = []
        query = {"StudyInstanceUID": private.study}
        caller = threading.Thread(target=lambda: found.append(scu.get_study(query, on_sub_operation=blocked).verdict))
        caller.start()
        try:
            assert here.wait(WITHIN)
            if by == "cancel":
                scu.cancel("one")
                scu.cancel("two")
            caller.join(WITHIN)
            assert found, "the call has not ended"
            assert found[0] != "complete"
        finally:
            go_on.set()
            caller.join(WITHIN)


def test_ctrl_c_while_the_work_begins_leaves_nothing_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(clock.Beside[Any]):
        def __init__(self, work: Callable[[], Any], name: str) -> None:
            super().__init__(work, name)
            raise KeyboardInterrupt

    done = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(clock, "Beside", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_beside(done.set, CancelToken())
    assert not done.wait(0.3)
    assert not ours()


@pytest.mark.parametrize("how", ["pages without end", "its time is over", "a listing that trickles"])
def test_a_store_ends_while_it_lists_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto: Moto, how: str
) -> None:
    listing = threading.Event()
    service: AbstractContextManager[Moto | FaultProxy] = nullcontext(moto)
    if how != "a listing that trickles":

        def pages(bucket: Bucket, prefix: str = "") -> Iterator[Listed]:
            for number in itertools.count():
                yield Listed(f"{prefix}{number}.dcm", 1000, "")
                listing.set()
                time.sleep(0.01)

        monkeypatch.setattr(Bucket, "list", pages)
    else:

        def fault(number: int, method: str, path: str) -> str | None:
            listing.set()
            return "trickle"

        service = FaultProxy(moto, fault)
    with service as answers:
        scu = StoreScu(
            "NODE@127.0.0.1:9",
            s3_config=answers.config,
            manifest_root=tmp_path,
            deadlines={"operation": 0.5 if how == "its time is over" else None},
        )

        def cancel() -> None:
            assert listing.wait(WITHIN)
            if how != "its time is over":
                scu.cancel("stop")
            if how == "a listing that trickles":
                scu.cancel("stop at once")

        with meanwhile(cancel):
            result = scu.store(f"s3://{BUCKET}/listed")
    end = ("failed", "deadline", True) if how == "its time is over" else ("cancelled", "stop", False)
    assert (result.verdict, result.reason, result.transient, result.total) == (*end, 0)


@pytest.mark.parametrize("what", ["headers", "sizes", "digests", "data sets"])
def test_what_a_store_could_not_read_before_its_end_is_not_called_changed(
    tmp_path: Path, ct: Holding, embedded: Callable[..., EmbeddedPacs], moto: Moto, what: str
) -> None:
    place = f"s3://{BUCKET}/{hashlib.sha256(f'unread {what}'.encode()).hexdigest()[:12]}"
    got = GetScu(f"PACS@127.0.0.1:{embedded(ct.folder).port}", destination=place, s3_config=moto.config)
    manifest = got.get_study({"StudyInstanceUID": ct.study}).manifest_uri
    source: dict[str, Any] = {"source": place} if what == "headers" else {"manifest": manifest}
    reading = threading.Event()

    def fault(number: int, method: str, path: str) -> str | None:
        if not path.partition("?")[0].endswith(".dcm") or (method == "HEAD") != (what == "sizes"):
            return None
        reading.set()
        return "stall" if method == "HEAD" else "trickle"

    with FaultProxy(moto, fault) as service, OddDestination() as node:
        if what == "digests":
            before = StoreScu(node.node, s3_config=moto.config, manifest_root=tmp_path)
            assert before.store(**source).verdict == "complete"
        scu = StoreScu(node.node, s3_config=service.config, manifest_root=tmp_path, verify_held="digest")

        def cancel() -> None:
            assert reading.wait(WITHIN)
            scu.cancel("stop")
            scu.cancel("stop at once")

        with meanwhile(cancel):
            result = scu.store(**source)
    assert (result.verdict, result.reason) == ("cancelled", "stop")
    assert (result.total, result.completed) == (40, 0)
    assert set(result.manifest["reason"]) <= {"cancelled"}


@pytest.mark.parametrize("way", ["cancel", "operation"])
def test_a_get_ends_while_it_reads_its_manifest(moto: Moto, way: str) -> None:
    moto.client().put_object(Bucket=BUCKET, Key="slow/_manifests/a.parquet", Body=bytes(5000))
    reading = threading.Event()

    def fault(number: int, method: str, path: str) -> str | None:
        reading.set()
        return "trickle" if method == "GET" else None

    with FaultProxy(moto, fault) as service:
        scu = GetScu(
            "PACS@127.0.0.1:9",
            destination=f"s3://{BUCKET}/slow",
            s3_config=service.config,
            deadlines={"operation": 1.0 if way == "operation" else None},
        )

        def cancel() -> None:
            assert reading.wait(WITHIN)
            if way == "cancel":
                scu.cancel("stop")
                scu.cancel("stop at once")

        with meanwhile(cancel, 2 * WITHIN):
            result = scu.get_study(manifest=f"s3://{BUCKET}/slow/_manifests/a.parquet")
    assert (result.verdict, result.total) == (("cancelled" if way == "cancel" else "failed"), 0)
