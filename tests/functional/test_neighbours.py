"""Runs that share a destination: on one machine, and on several that see no locks of each other."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.errors import SinkError
from airflow_dicom_get.sinks import locks
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.sinks.ledger import OWN, FolderLedgers
from airflow_dicom_get.storage import files
from tests.support.sink_contract import SERIES, STUDY, dataset_of, kept, new, put, send, written

OTHER_HOST = b"elsewhere 11111111-2222-3333-4444-555555555555"


def sink_of(root: Path, run: str, **options: Any) -> FilesystemSink:
    return FilesystemSink(root, FolderLedgers(root / "_manifests", OWN), run, written(**options))


def leave(folder: Path, run: str, holder: bytes) -> Path:
    """What a run that is not here any more leaves behind: its lock file, and an instance on its way."""
    (folder / SERIES).mkdir(parents=True, exist_ok=True)
    (folder / f".{run}.lock").write_bytes(holder)
    part = folder / SERIES / f".1.2.3.{run}.part"
    part.write_bytes(b"half")
    return part


@pytest.mark.parametrize("holder", [b"", files.disk.host().encode(), os.uname().nodename.encode() + b" another-boot"])
def test_what_a_dead_run_of_this_machine_left_goes(tmp_path: Path, holder: bytes) -> None:
    part = leave(tmp_path, "20260101T000000Z-dead0001", holder)
    numbered = part.with_name(f"{part.stem}.12.part")
    numbered.write_bytes(b"half")
    locks.clean_dead_runs(tmp_path, "own", files.disk)
    assert not part.exists()
    assert not numbered.exists()
    assert not list(tmp_path.glob(".*.lock"))


def test_what_is_not_named_as_ours_stays(tmp_path: Path) -> None:
    """The lock file of another program, which may hold it in another way, and its temporary files."""
    leave(tmp_path, "20260101T000000Z-dead0001", b"")
    others = [tmp_path / ".datalad.lock", tmp_path / SERIES / ".1.2.3.copy.part", tmp_path / SERIES / ".1.2.3.7.part"]
    for path in others:
        path.write_bytes(b"")
    locks.clean_dead_runs(tmp_path, "own", files.disk)
    assert sorted(x for x in tmp_path.rglob("*") if x.is_file()) == sorted(others)


def test_what_a_run_of_another_machine_writes_stays_for_a_day(tmp_path: Path) -> None:
    """Its lock may not be seen here: a network file system with local locks tells only those of its own machine."""
    part = leave(tmp_path, "20260101T000000Z-a11fe000", OTHER_HOST)
    locks.clean_dead_runs(tmp_path, "own", files.disk)
    assert part.exists()
    assert list(tmp_path.glob(".*.lock"))
    old = time.time() - 25 * 3600
    for path in (part, *tmp_path.glob(".*.lock")):
        os.utime(path, (old, old))
    locks.clean_dead_runs(tmp_path, "own", files.disk)
    assert not part.exists()


def test_a_live_run_of_this_machine_is_left_alone(tmp_path: Path) -> None:
    lock = locks.hold(tmp_path / ".20260101T000000Z-a11fe000.lock", files.disk)
    (tmp_path / SERIES).mkdir()
    part = tmp_path / SERIES / ".1.2.3.20260101T000000Z-a11fe000.7.part"
    part.write_bytes(b"half")
    locks.clean_dead_runs(tmp_path, "own", files.disk)
    assert part.exists()
    files.disk.close(lock)


def test_who_opens_a_file_that_is_written_again_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A viewer that corrects a file while a run makes it durable: what he writes is not lost."""
    path = tmp_path / "1.dcm"
    path.write_bytes(b"as it came")
    read, go_on, opened = threading.Event(), threading.Event(), threading.Event()

    class Slow(files.Disk):
        def read_at(self, fd: int, size: int, offset: int) -> bytes:
            chunk = super().read_at(fd, size, offset)
            if not offset:
                read.set()
                assert go_on.wait(20)
            return chunk

    def correct() -> None:
        with path.open("r+b") as file:
            opened.set()
            file.write(b"corrected!")

    with path.open("r+b") as probe:
        try:
            fcntl.fcntl(probe, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            pytest.skip("this file system knows no leases")
    monkeypatch.setattr(files, "disk", Slow())
    threads = [threading.Thread(target=work) for work in (lambda: files.write_again(path), correct)]
    threads[0].start()
    assert read.wait(20)
    threads[1].start()
    waited = not opened.wait(0.5)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert waited
    assert path.read_bytes() == b"corrected!"


def test_a_folder_that_another_run_found_empty_is_made_again(tmp_path: Path) -> None:
    """A run removes the folders in which nothing came, also one that the next has just opened."""
    one = sink_of(tmp_path, "20260101T000000Z-00000001")
    writer = one.begin(new(1))
    other = sink_of(tmp_path, "20260101T000000Z-00000002")
    other.begin(new(2)).abort()  # the folder is open in both
    writer.abort()
    one.close()
    assert not (tmp_path / STUDY / SERIES).exists()
    instance, taken = put(other, 2)
    assert taken.reason is None
    assert kept(other.confirmations(wait=True)) == [instance.sop]
    other.close()
    assert (tmp_path / STUDY / SERIES / f"{instance.sop}.dcm").exists()


def test_a_study_that_cannot_be_begun_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(files.Disk):
        full = True

        def open(self, path: files.Where, how: int, folder: int | None = None, mode: int = 0o666) -> int:
            if self.full and str(path).endswith(".jsonl"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().open(path, how, folder, mode)

    disk = Full()
    monkeypatch.setattr(files, "disk", disk)
    sink = sink_of(tmp_path, "20260101T000000Z-00000001")
    with pytest.raises(SinkError):
        sink.begin(new(1))
    disk.full = False
    done = threading.Thread(target=put, args=(sink, 1), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()
    assert len(kept(sink.confirmations(wait=True))) == 1
    sink.close()


@pytest.mark.parametrize("made", [False, True])
def test_a_destination_that_has_no_lock_files_is_an_error(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server may answer that there is no such file to whoever makes one, or hide at once what was made."""

    class NoDots(files.Disk):
        tries = 0

        def open(self, path: files.Where, how: int, folder: int | None = None, mode: int = 0o666) -> int:
            if not str(path).endswith(".lock"):
                return super().open(path, how, folder, mode)
            self.tries += 1
            assert self.tries < 1000, "it is tried for ever"
            if not made:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            fd = super().open(path, how, folder, mode)
            self.remove(path)
            return fd

    (tmp_path / STUDY / SERIES).mkdir(parents=True)
    disk = NoDots()
    monkeypatch.setattr(files, "disk", disk)
    before = len(os.listdir("/proc/self/fd"))
    sink = sink_of(tmp_path, "20260101T000000Z-00000001")
    with pytest.raises(SinkError, match="lock file"):
        sink.begin(new(1))
    sink.close()
    assert disk.tries > 1, "another run may have removed it"
    assert len(os.listdir("/proc/self/fd")) == before


def noting(synced: list[str]) -> files.Disk:
    """A disk that notes what it syncs, by path."""

    class Noting(files.Disk):
        def sync(self, fd: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            super().sync(fd)

    return Noting()


class TestSync:
    """What is confirmed lasts: also where only a folder above it could not be synced."""

    def failing(self, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
        class Failing(files.Disk):
            def sync(self, fd: int) -> None:
                if which in os.readlink(f"/proc/self/fd/{fd}"):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                super().sync(fd)

        monkeypatch.setattr(files, "disk", Failing())

    @pytest.mark.parametrize("which", [SERIES, STUDY])
    def test_of_a_folder(self, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, which)
        sink = sink_of(tmp_path, "20260101T000000Z-00000001")
        _, taken = put(sink, 1)
        assert taken.reason is None
        (confirmation,) = sink.confirmations(wait=True)
        assert confirmation.error is not None
        with suppress(SinkError):
            sink.close()

    def test_of_the_ledger(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, ".jsonl")
        sink = sink_of(tmp_path, "20260101T000000Z-00000001")
        instance, _ = put(sink, 1)
        assert kept(sink.confirmations(wait=True)) == [instance.sop]
        with pytest.raises(SinkError, match="ledger"):
            sink.close()

    def test_a_folder_that_is_synced_the_next_time_is_not_forgotten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The run that made it may have been killed before it was synced."""
        synced: list[str] = []
        (tmp_path / "out" / STUDY / SERIES).mkdir(parents=True)
        monkeypatch.setattr(files, "disk", noting(synced))
        sink = sink_of(tmp_path / "out", "20260101T000000Z-00000001")
        put(sink, 1)
        sink.confirmations(wait=True)
        before = list(synced)
        sink.close()
        out = tmp_path / "out"
        assert {str(out / STUDY / SERIES), str(out / STUDY), str(out), str(tmp_path)} <= set(before)

    @pytest.mark.parametrize("recorded", [True, False])
    def test_what_an_unsynced_run_left_is_synced_with_the_folders_above(
        self, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        out = tmp_path / "archive" / "out"
        before = sink_of(out, "20260101T000000Z-00000001", durable=False)
        assert put(before, 1)[1].reason is None
        before.confirmations(wait=True)
        before.close()
        if not recorded:
            shutil.rmtree(out / "_manifests")
        monkeypatch.setattr(files, "disk", noting(synced))
        sink = sink_of(out, "20260102T000000Z-00000002", adopt=True)
        assert sink.inventory(STUDY).keys() == {new(1).key}
        assert {str(x) for x in (out / STUDY / SERIES, out / STUDY, out, out.parent, tmp_path)} <= set(synced)
        sink.close()


def test_records_that_contradict_each_other_are_decided_by_the_content(tmp_path: Path) -> None:
    """Two runs at a time may leave two records of one instance; of the same size, the size does not tell."""
    sink = sink_of(tmp_path, "20260101T000000Z-00000001")
    instance, _ = put(sink, 1)
    sink.confirmations(wait=True)
    sink.close()
    ledgers = FolderLedgers(tmp_path / "_manifests", OWN)
    wrong = new(1)
    wrong.bytes, wrong.dataset_offset, wrong.sha256 = instance.bytes, instance.dataset_offset, bytes(32)
    later = ledgers.open(STUDY, "20260102T000000Z-00000002")
    later.taken(wrong)
    later.durable([wrong.key])
    later.close()
    again = sink_of(tmp_path, "20260103T000000Z-00000003")
    held = again.inventory(STUDY)
    again.close()
    assert held[instance.key].sha256 == instance.sha256


def test_one_that_a_crash_tore_is_replaced_though_it_has_its_size(tmp_path: Path) -> None:
    """It was recorded as taken and never synced: a file system may have lost any of its pages."""
    dead = sink_of(tmp_path, "20260101T000000Z-00000001", durable=False)
    instance, _ = put(dead, 1)
    dead.confirmations(wait=True)
    dead.close()
    path = tmp_path / STUDY / SERIES / f"{instance.sop}.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(1024) + content[2048:])
    sink = sink_of(tmp_path, "20260102T000000Z-00000002")
    assert sink.inventory(STUDY) == {}
    taken = send(sink, new(1), dataset_of(instance))
    assert (taken.reason, len(kept(sink.confirmations(wait=True)))) == (None, 1)
    sink.close()
    assert path.read_bytes() == content


def test_two_writers_of_one_instance_in_one_run_do_not_touch_each_other(tmp_path: Path) -> None:
    """It comes on two associations at a time: the one that is placed is whole, whatever becomes of the other."""
    sink = sink_of(tmp_path, "20260101T000000Z-00000001")
    one, other = new(1), new(1)
    data = dataset_of(one, 100_000)
    first, second = sink.begin(one), sink.begin(other)
    first.write(memoryview(data)[:5000])
    second.write(memoryview(data)[:2000])
    first.write(memoryview(data)[5000:])
    assert first.take().reason is None
    second.abort()
    assert kept(sink.confirmations(wait=True)) == [one.sop]
    sink.close()
    content = (tmp_path / STUDY / SERIES / f"{one.sop}.dcm").read_bytes()
    assert content.endswith(data)
    assert hashlib.sha256(content).digest() == one.sha256
    assert [path.name for path in tmp_path.rglob("*.part")] == []


@pytest.mark.parametrize("on_conflict", ["keep", "replace"])
@pytest.mark.parametrize("longer", [False, True])
def test_the_second_of_two_that_differ_in_one_run_is_a_conflict(on_conflict: str, longer: bool, tmp_path: Path) -> None:
    """Also where the first is how the second begins: it was whole when it was placed."""
    sink = sink_of(tmp_path, "20260101T000000Z-00000001", on_conflict=on_conflict)
    data = dataset_of(new(1))
    second = data + b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0more" if longer else dataset_of(new(1), variant=1)
    assert send(sink, new(1), data).reason is None
    assert send(sink, new(1), data).reason is None
    assert send(sink, new(1), second).reason == "different_content"
    sink.close()
    assert next(tmp_path.rglob("*.dcm")).read_bytes().endswith(data)


def test_one_that_was_equal_to_what_is_there_is_not_replaced_in_the_same_run(tmp_path: Path) -> None:
    before = sink_of(tmp_path, "20260101T000000Z-00000001")
    put(before, 1)
    before.confirmations(wait=True)
    before.close()
    sink = sink_of(tmp_path, "20260102T000000Z-00000002", on_conflict="replace")
    assert put(sink, 1)[1].reason is None
    assert put(sink, 1, variant=1)[1].reason == "different_content"
    sink.close()
    assert next(tmp_path.rglob("*.dcm")).read_bytes().endswith(dataset_of(new(1)))


def test_what_takes_the_place_of_a_whole_one_is_synced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut between the two may leave zeros under the new name."""
    calls: list[str] = []

    class Noting(files.Disk):
        full = False

        def sync_data(self, fd: int) -> None:
            if self.full:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).suffix)
            super().sync_data(fd)

        def rename_over(self, old: str, new: str, folder: int) -> None:
            calls.append("renamed")
            super().rename_over(old, new, folder)

    disk = Noting()
    monkeypatch.setattr(files, "disk", disk)
    for number in (1, 2):
        sink = sink_of(tmp_path, f"20260101T000000Z-0000000{number}", on_conflict="replace")
        assert put(sink, 1, variant=number)[1].reason is None
        assert len(kept(sink.confirmations(wait=True))) == 1
        sink.close()
    assert calls == [".dcm", ".part", "renamed", ".dcm"]
    disk.full = True
    sink = sink_of(tmp_path, "20260101T000000Z-00000003", on_conflict="replace")
    assert put(sink, 1, variant=3)[1].reason == "destination_error"
    sink.close()
    assert next(tmp_path.rglob("*.dcm")).read_bytes().endswith(dataset_of(new(1), variant=2))
    assert sink_of(tmp_path, "20260101T000000Z-00000004").inventory(STUDY).keys() == {new(1).key}


class Failing(files.Disk):
    """The first sync of a file under its final name fails, once something has happened while it took its time."""

    def __init__(self, happens: Callable[[], object] = lambda: None) -> None:
        self.happens, self.failed, self.written_again = happens, False, 0

    def open(self, path: files.Where, flags: int, folder: int | None = None, mode: int = 0o666) -> int:
        self.written_again += flags == files.CHANGE and str(path).endswith(".dcm")
        return super().open(path, flags, folder, mode)

    def sync_data(self, fd: int) -> None:
        if not self.failed and os.readlink(f"/proc/self/fd/{fd}").endswith(".dcm"):
            self.failed = True
            self.happens()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync_data(fd)


@pytest.mark.parametrize("beside", [False, True])
def test_what_could_not_be_synced_is_written_again_before_it_counts(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a sync that failed the next one succeeds and writes nothing, in this run and in one beside it."""
    disk = Failing()
    monkeypatch.setattr(files, "disk", disk)
    first = sink_of(tmp_path, "20260101T000000Z-00000001")
    second = sink_of(tmp_path, "20260101T000000Z-00000002") if beside else first
    assert second.inventory(STUDY) == {}  # it has read the records before there were any
    assert put(first, 1)[1].reason is None
    assert kept(first.confirmations(wait=True)) == []
    assert put(second, 1)[1].reason is None
    assert len(kept(second.confirmations(wait=True))) == 1
    assert disk.written_again == 1
    first.close()
    second.close()


def test_a_sync_beside_one_that_failed_confirms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One instance comes twice, and the second time while the sync of the first one fails."""
    come = threading.Event()
    monkeypatch.setattr(files, "disk", Failing(lambda: come.wait(10)))
    sink = sink_of(tmp_path, "20260101T000000Z-00000001")
    assert put(sink, 1)[1].reason is None
    assert put(sink, 1)[1].reason is None
    come.set()
    done = sink.confirmations(wait=True)
    assert [one.error is None for one in done] == [False, False]
    assert put(sink, 1)[1].reason is None
    assert len(kept(sink.confirmations(wait=True))) == 1
    sink.close()


class Between(files.Disk):
    """Something happens while the sync of what is to replace a file takes its time, as another run's replacement."""

    def __init__(self, happens: Callable[[], object], often: int = 1) -> None:
        self.happens, self.left = happens, often

    def sync_data(self, fd: int) -> None:
        super().sync_data(fd)
        if self.left and os.readlink(f"/proc/self/fd/{fd}").endswith(".part"):
            self.left -= 1
            self.happens()


@pytest.mark.parametrize(("variant", "on_conflict"), [(0, "keep"), (1, "keep"), (1, "replace")])
def test_what_another_run_put_in_the_place_of_a_torn_file_stays(
    variant: int, on_conflict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the same torn file, and the first has replaced it, and ended, before the second does."""
    names = [f"2026010{day}T000000Z-0000000{day}" for day in range(1, 5)]
    before = sink_of(tmp_path, names[0])
    put(before, 1)
    before.confirmations(wait=True)
    before.close()
    (path,) = tmp_path.rglob("*.dcm")
    path.write_bytes(path.read_bytes()[:-10])
    shutil.rmtree(tmp_path / "_manifests")
    first, second = sink_of(tmp_path, names[2]), sink_of(tmp_path, names[1], on_conflict=on_conflict)

    def happens() -> None:
        assert put(first, 1)[1].reason is None
        assert len(kept(first.confirmations(wait=True))) == 1
        first.close()

    monkeypatch.setattr(files, "disk", Between(happens))
    second.disk = files.disk
    taken = put(second, 1, variant=variant)[1]
    second.confirmations(wait=True)
    second.close()
    replaced = on_conflict == "replace"
    assert (taken.reason, taken.remark) == (
        "different_content" if variant and not replaced else None,
        "replaced" if replaced else None,
    )
    assert path.read_bytes().endswith(dataset_of(new(1), variant=variant if replaced else 0))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    if not replaced:  # of two that replace at the same time each ends what the other one has recorded
        assert sink_of(tmp_path, names[3]).inventory(STUDY).keys() == {new(1).key}


@pytest.mark.parametrize(("often", "reason"), [(3, None), (100, "destination_error")])
def test_a_torn_file_that_is_another_one_each_time_holds_nobody_up(
    often: int, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sink_of(tmp_path, "20260101T000000Z-00000001")
    put(before, 1)
    before.confirmations(wait=True)
    before.close()
    (path,) = tmp_path.rglob("*.dcm")
    torn = path.read_bytes()[:-10]
    path.write_bytes(torn)

    def happens() -> None:
        path.rename(path.with_suffix(".old"))
        path.write_bytes(torn)

    monkeypatch.setattr(files, "disk", Between(happens, often))
    sink = sink_of(tmp_path, "20260102T000000Z-00000002")
    assert put(sink, 1)[1].reason == reason
    sink.close()


@pytest.mark.parametrize("durable", [True, False])
def test_one_that_was_changed_before_it_was_ever_synced_is_kept(durable: bool, tmp_path: Path) -> None:
    """A run without sync leaves no more than a record that it took the file; that another tool has changed it since."""
    before = sink_of(tmp_path, "20260101T000000Z-00000001", durable=False)
    instance, _ = put(before, 1)
    before.confirmations(wait=True)
    before.close()
    path = tmp_path / STUDY / SERIES / f"{instance.sop}.dcm"
    changed = path.read_bytes()[:-16] + b"somebody's pixel"
    path.write_bytes(changed)
    sink = sink_of(tmp_path, "20260102T000000Z-00000002", durable=durable)
    assert sink.inventory(STUDY) == {}
    assert send(sink, new(1), dataset_of(instance)).reason == "different_content"
    sink.close()
    assert path.read_bytes() == changed


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("short", [True, False])
def test_what_came_as_it_is_there_is_not_torn(durable: bool, short: bool, tmp_path: Path) -> None:
    """A source sent it cut off, or has since put something behind it: a correction, for on_conflict=replace."""
    data = dataset_of(new(1))
    before = sink_of(tmp_path, "20260101T000000Z-00000001", durable=durable)
    assert send(before, new(1), data[:-100] if short else data).reason is None
    before.confirmations(wait=True)
    before.close()
    (path,) = tmp_path.rglob("*.dcm")
    content = path.read_bytes()
    later = data if short else data + b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0more"
    sink = sink_of(tmp_path, "20260102T000000Z-00000002")
    assert send(sink, new(1), later).reason == "different_content"
    sink.close()
    assert path.read_bytes() == content
    replacing = sink_of(tmp_path, "20260103T000000Z-00000003", on_conflict="replace")
    taken = send(replacing, new(1), later)
    assert (taken.reason, taken.remark) == (None, "replaced")
    replacing.close()
    assert path.read_bytes().endswith(later)


class TestClose:
    """A network file system may report only at the close of a file that it could not keep it."""

    def failing(self, monkeypatch: pytest.MonkeyPatch, suffix: str, times: int) -> None:
        class Failing(files.Disk):
            left = times

            def close(self, fd: int) -> None:
                name = os.readlink(f"/proc/self/fd/{fd}")
                super().close(fd)
                if name.endswith(suffix) and self.left:
                    self.left -= 1
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(files, "disk", Failing())

    def opened_below(self, folder: Path) -> list[str]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return [link for link in links if link.startswith(str(folder))]

    @pytest.mark.parametrize("durable", [True, False])
    def test_of_an_instance(self, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That one is not confirmed; the others of its batch are, and nothing stays open."""
        self.failing(monkeypatch, ".dcm", 1)
        sink = sink_of(tmp_path, "20260101T000000Z-00000001", durable=durable)
        for number in range(8):
            assert put(sink, number)[1].reason is None
        done = sink.confirmations(wait=True)
        assert [x.error for x in done if x.error is not None] == [f"sync: {os.strerror(errno.EDQUOT)}"]
        assert len(kept(done)) == 7
        sink.close()
        assert self.opened_below(tmp_path) == []

    def test_of_the_ledger(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is told, and lock and folders are given back."""
        self.failing(monkeypatch, ".jsonl", 1000)
        sink = sink_of(tmp_path, "20260101T000000Z-00000001")
        put(sink, 1)
        sink.confirmations(wait=True)
        with pytest.raises(SinkError, match="ledger"):
            sink.close()
        assert self.opened_below(tmp_path) == []
        assert list(tmp_path.rglob(".*.lock")) == []
