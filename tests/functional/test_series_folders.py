"""The folders of a study's series: however many there are, few are open, and each is the one that it was."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import SinkError
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks import filesystem
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.sinks.ledger import OWN, FolderLedgers
from airflow_dicom_get.storage import files
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.sample_data import make_uid
from tests.support.sink_contract import STUDY, dataset_of, kept, new, send, written

MANY = 80


def sink_of(root: Path, number: int = 1, **options: Any) -> FilesystemSink:
    return FilesystemSink(
        root, FolderLedgers(root / "_manifests", OWN), f"20260101T000000Z-0000000{number}", written(**options)
    )


def of_series(series: int, number: int = 1) -> Instance:
    return new(number, series=make_uid(f"folders.{series}"))


def put(sink: FilesystemSink, instance: Instance) -> list[str]:
    """Write one instance; what is confirmed by then."""
    assert send(sink, instance, dataset_of(instance)).reason is None
    return kept(sink.confirmations(wait=True))


def open_below(root: Path) -> list[str]:
    """What this process has open in the folders of a destination."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread closed it meanwhile
            found.append(os.readlink(path))
    return [path for path in found if path.startswith(f"{root}/")]


def test_what_is_open_does_not_grow_with_the_series_of_a_study(tmp_path: Path) -> None:
    opened: list[int] = []
    with MisbehavingPacs(series=400, instances=1, size=300) as server:
        result = GetScu(f"PACS@127.0.0.1:{server.port}", destination=tmp_path).get_study(
            {"StudyInstanceUID": server.study_uid},
            on_sub_operation=lambda event: opened.append(len(open_below(tmp_path))),
        )
    assert (result.verdict, result.completed) == ("complete", 400)
    # A folder and a file for each that waits for its sync.
    assert max(opened) < filesystem._MAX_FOLDERS + 2 * filesystem._MAX_QUEUED


def test_the_folder_of_each_series_is_synced_before_its_instance_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    class Noting(files.Disk):
        def sync(self, fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            super().sync(fd)

    monkeypatch.setattr(files, "disk", Noting())
    sink = sink_of(tmp_path)
    for number in (1, 2):
        for series in range(MANY):
            instance = of_series(series, number)
            synced.clear()
            assert put(sink, instance) == [instance.sop]
            assert str(tmp_path / STUDY / instance.series) in synced
            assert (str(tmp_path / STUDY) in synced) == (number == 1), "the second time it was made durable already"
            assert len(open_below(tmp_path / STUDY)) <= filesystem._MAX_FOLDERS + 1  # and the lock
    sink.close()
    assert open_below(tmp_path) == []
    assert len(sink_of(tmp_path, 2).inventory(STUDY)) == 2 * MANY


def test_no_folder_is_closed_under_a_writer(tmp_path: Path) -> None:
    sink = sink_of(tmp_path)
    writers = []
    for series in range(MANY):
        instance = of_series(series)
        writer = sink.begin(instance)
        writer.write(memoryview(dataset_of(instance)))
        writers.append(writer)
    for writer in writers[1:]:
        assert writer.take().reason is None
    writers[0].abort()
    assert len(kept(sink.confirmations(wait=True))) == MANY - 1
    put(sink, of_series(0, 2))
    assert len(open_below(tmp_path / STUDY)) <= filesystem._MAX_FOLDERS + 1
    sink.close()
    assert open_below(tmp_path) == []
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("now", ["another", "none", "a link"])
def test_a_folder_that_is_not_what_it_was_takes_nothing_more(now: str, tmp_path: Path) -> None:
    """What was confirmed lies elsewhere by then: another beside it would make the series look whole."""
    sink = sink_of(tmp_path)
    first, second = of_series(0), of_series(0, 2)
    put(sink, first)
    for series in range(1, MANY):
        put(sink, of_series(series))
    folder = tmp_path / STUDY / first.series
    folder.rename(tmp_path / "moved")
    if now == "another":
        folder.mkdir()
    elif now == "a link":
        folder.symlink_to(tmp_path / "moved")
    with pytest.raises(SinkError):
        sink.begin(second)
    put(sink, of_series(1, 2))
    sink.close()
    assert open_below(tmp_path) == []
    assert [path.name for path in (tmp_path / "moved").iterdir()] == [f"{first.sop}.dcm"]
    assert now != "another" or not list(folder.iterdir())


def test_a_folder_in_which_nothing_is_confirmed_may_be_made_anew(tmp_path: Path) -> None:
    """Another run removes what is empty at its end, also between two times that it is open in this one."""
    sink = sink_of(tmp_path)
    sink.begin(of_series(0)).abort()
    for series in range(1, MANY):
        put(sink, of_series(series))
    (tmp_path / STUDY / of_series(0).series).rmdir()
    (tmp_path / STUDY / "in its inode").mkdir()
    assert put(sink, of_series(0)) == [of_series(0).sop]
    sink.begin(of_series(MANY)).abort()
    sink.close()
    assert not (tmp_path / STUDY / of_series(MANY).series).exists()
    assert open_below(tmp_path) == []


def test_several_associations_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_MAX_FOLDERS", 3)
    sink = sink_of(tmp_path)
    done: list[str] = []
    mutex = threading.Lock()

    def receive(thread: int) -> None:
        chance = Random(thread)
        for number in range(60):
            instance = of_series(chance.randrange(12), 100 * thread + number)
            if chance.random() < 0.2:
                sink.begin(instance).abort()
                continue
            assert send(sink, instance, dataset_of(instance)).reason is None
            with mutex:
                done.append(instance.sop)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(receive, range(4)))
    assert sorted(kept(sink.confirmations(wait=True))) == sorted(done)
    sink.close()
    assert open_below(tmp_path) == []
    assert sorted(sop for _, sop in sink_of(tmp_path, 2).inventory(STUDY)) == sorted(done)
