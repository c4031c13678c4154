"""The model disk against real ones: the same calls, the same outcomes; and what a power cut may leave."""

from __future__ import annotations

import errno
import inspect
import os
import stat
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from airflow_dicom_get.storage import files
from tests.simulation.disk import PAGE, ModelDisk, Volume
from tests.simulation.faults import Fault, Faults, Killed, ModelError, Process
from tests.simulation.marks import in_history, reached
from tests.support import forgetful

ROOT = Path("/data")
NAMES = ("x", "y", "a", "b", "n" * 256)
PATHS = (*NAMES, "b/x", "a/x", "a/y", "a/b", "a/b/x")
WAYS = (files.READ, files.CREATE, files.APPEND, files.CHANGE, files.REPLACE, files.NEW)


# --- against a real folder -----------------------------------------------------------------------------


class Side:
    """A disk, and what was opened on it."""

    def __init__(self, disk: files.Disk, root: Path) -> None:
        self.disk, self.root = disk, files.Below(root)
        self.fds: list[int] = []

    def opened(self, fd: int) -> str:
        self.fds.append(fd)
        return "opened"


Call = Callable[[Side], Any]


class Pair:
    """The model and a real folder, asked the same."""

    def __init__(self, folder: Path) -> None:
        self.volume = Volume()
        self.volume.make(ROOT)
        self.sides = (Side(self.volume.disk(), ROOT), Side(files.Disk(), folder))

    def both(self, call: Call, told: object) -> None:
        model, real = (outcome(call, side) for side in self.sides)
        assert model == real, told

    def of_kind(self, folder: bool) -> list[int]:
        """The open files, or folders, by their place in the list."""
        model = self.sides[0]
        assert isinstance(model.disk, ModelDisk)
        return [n for n, fd in enumerate(model.fds) if folder == stat.S_ISDIR(model.disk.handles[fd].node.mode)]

    def close_all(self) -> None:
        for side in self.sides:
            for fd in side.fds:
                side.disk.close(fd)
            side.fds.clear()


def outcome(call: Call, side: Side) -> Any:
    try:
        return call(side)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def kind_and_size(status: os.stat_result) -> tuple[int, int]:
    return stat.S_IFMT(status.st_mode), 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def listed(side: Side, path: str) -> list[tuple[Any, ...]]:
    return sorted(
        (entry.name, entry.is_dir(), kind_and_size(entry.stat())) for entry in side.disk.scan(side.root / path)
    )


def closed(side: Side, number: int) -> None:
    side.disk.close(side.fds.pop(number))


def any_call(pair: Pair, chance: Random) -> tuple[str, Call]:
    """A call that could be made now."""
    path, how = chance.choice(PATHS), chance.choice(WAYS)
    data = chance.randbytes(chance.choice((0, 1, 7, PAGE, 3 * PAGE + 5)))
    position = chance.choice((0, 1, PAGE, 2000))
    calls: dict[str, Call] = {
        "open": lambda at: at.opened(at.disk.open(at.root / path, how)),
        "open_folder": lambda at: at.opened(at.disk.open_folder(at.root / path)),
        "make_folders": lambda at: at.disk.make_folders(at.root / path),
        "make_folder": lambda at: at.disk.make_folder(at.root / path),
        "remove_folder": lambda at: at.disk.remove_folder(at.root / path),
        "remove": lambda at: at.disk.remove(at.root / path),
        "status": lambda at: kind_and_size(at.disk.status(at.root / path)),
        "scan": lambda at: listed(at, path),
        "is_writable": lambda at: at.disk.is_writable(at.root / path),
    }
    if pair.sides[0].fds:
        n = chance.randrange(len(pair.sides[0].fds))
        calls |= {
            "write": lambda at: at.disk.write(at.fds[n], data),
            "writev": lambda at: at.disk.writev(at.fds[n], (data, b"and")),
            "read_at": lambda at: at.disk.read_at(at.fds[n], 700, position),
            "truncate": lambda at: at.disk.truncate(at.fds[n], position),
            "sync": lambda at: at.disk.sync(at.fds[n]),
            "is_at": lambda at: at.disk.is_at(at.fds[n], at.root / path),
            "lock": lambda at: at.disk.lock(at.fds[n], wait=False),
            "close": lambda at: closed(at, n),
        }
    if on_files := pair.of_kind(folder=False):
        file = chance.choice(on_files)
        calls |= {
            "size": lambda at: at.disk.size(at.fds[file]),
            "write more": lambda at: at.disk.write(at.fds[file], memoryview(data)),
            "sync_data": lambda at: at.disk.sync_data(at.fds[file]),
        }
    if folders := pair.of_kind(folder=True):
        folder = chance.choice(folders)
        old, new = chance.choice(NAMES), chance.choice(NAMES)
        calls |= {
            "open in": lambda at: at.opened(at.disk.open(old, how, at.fds[folder])),
            "open below": lambda at: at.opened(at.disk.open(path, how, at.fds[folder])),
            "rename_new": lambda at: at.disk.rename_new(old, new, at.fds[folder]),
            "rename_over": lambda at: at.disk.rename_over(old, new, at.fds[folder]),
            "has": lambda at: at.disk.has(old, at.fds[folder]),
            "unlink": lambda at: at.disk.unlink(old, at.fds[folder]),
        }
    name = chance.choice(list(calls))
    return name, calls[name]


@pytest.mark.parametrize("seed", range(40))
def test_the_model_does_what_a_real_file_system_does(tmp_path: Path, seed: int) -> None:
    chance, pair, told = Random(seed), Pair(tmp_path), list[str]()
    try:
        for _ in range(100):
            name, call = any_call(pair, chance)
            told.append(name)
            pair.both(call, f"seed {seed}: {told}")
        below = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert pair.volume.files() == {str(ROOT / path.relative_to(tmp_path)): path.read_bytes() for path in below}
    finally:
        pair.close_all()
    assert not pair.volume.left_open()


def test_the_model_stands_for_every_call() -> None:
    calls = {name for name, _ in inspect.getmembers(files.Disk, inspect.isfunction) if not name.startswith("_")}
    assert calls <= vars(ModelDisk).keys()
    for name in calls:
        assert inspect.signature(getattr(files.Disk, name)) == inspect.signature(getattr(ModelDisk, name)), name


# --- against a real file system that forgets -------------------------------------------------------------


def close_what_has_no_name(pair: Pair) -> None:
    """FUSE cannot tell everything of a file that is open and has no name any more."""
    model = pair.sides[0]
    assert isinstance(model.disk, ModelDisk)
    named = {id(pair.volume.find(path)) for path in ("/", *pair.volume.files(), *pair.volume.folders())}
    for n in reversed(range(len(model.fds))):
        if id(model.disk.handles[model.fds[n]].node) not in named:
            for side in pair.sides:
                closed(side, n)


def sync_some(pair: Pair, chance: Random) -> None:
    """Sync what is open, and folders by their names, often enough that something is left."""
    for n in range(len(pair.sides[0].fds)):
        if chance.random() < 0.2:
            pair.both(lambda at, n=n: at.disk.sync(at.fds[n]), "sync")  # type: ignore[misc]
    for path in pair.volume.folders():
        if chance.random() < 0.1:
            below = path.removeprefix(str(ROOT)).strip("/")
            for side in pair.sides:
                fd = side.disk.open_folder(side.root / below if below else side.root)
                side.disk.sync(fd)
                side.disk.close(fd)


def test_after_a_power_cut_the_model_has_what_a_real_file_system_has_that_forgets(tmp_path: Path) -> None:
    if what := forgetful.lacking():
        pytest.skip(f"missing: {what}")
    left = 0
    with forgetful.mounted(tmp_path / "mount") as mount:
        for seed in range(30):
            (mount / str(seed)).mkdir()
            files.sync_path(mount)
            chance, pair, told = Random(seed), Pair(mount / str(seed)), list[str]()
            try:
                for _ in range(60):
                    name, call = any_call(pair, chance)
                    told.append(name)
                    pair.both(call, f"seed {seed}: {told}")
                    close_what_has_no_name(pair)
                    sync_some(pair, chance)
            finally:
                pair.close_all()
            sure = pair.volume.durable()
            pair.volume.cut(Always(LOST))
            forgetful.cut_power(mount)
            below = [path for path in (mount / str(seed)).rglob("*") if path.is_file()]
            real = {str(ROOT / path.relative_to(mount / str(seed))): path.read_bytes() for path in below}
            assert pair.volume.files() == real, f"seed {seed}: {told}"
            assert sure.items() <= real.items()
            left += len(real)
    assert left > 20, "else it says little"


# --- power cuts ----------------------------------------------------------------------------------------


class Always:
    """Chooses always the same, as far as there is so much to choose from."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def randrange(self, stop: int, /) -> int:
        return min(self.numbers.pop(0) if len(self.numbers) > 1 else self.numbers[0], stop - 1)


LOST, KEPT, TORN = 0, 1, 2


def fresh(chance: Any = None) -> tuple[Volume, ModelDisk]:
    volume = Volume(chance)
    volume.make(ROOT)
    return volume, volume.disk()


def store(disk: ModelDisk, name: str, content: bytes, *, data: bool = True, names: bool = True) -> None:
    """Write a file as the sink does, and sync what is asked for."""
    folder = disk.open_folder(ROOT)
    fd = disk.open(".part", files.REPLACE, folder)
    files_written = disk.write(fd, content)
    assert files_written == len(content)
    disk.rename_new(".part", name, folder)
    if data:
        disk.sync_data(fd)
    if names:
        disk.sync(folder)
    disk.close(fd)
    disk.close(folder)


@pytest.mark.parametrize("choice", [(LOST,), (KEPT,), (TORN, TORN, 0), (TORN, TORN, 1), (TORN,)])
def test_what_is_synced_with_its_folder_outlasts_a_power_cut(choice: tuple[int, ...]) -> None:
    volume, disk = fresh()
    store(disk, "whole", b"1" * 2000)
    assert volume.durable() == {"/data/whole": b"1" * 2000}
    volume.cut(Always(*choice))
    assert volume.files() == volume.durable() == {"/data/whole": b"1" * 2000}


def test_a_name_is_durable_only_with_its_folder_and_content_only_with_its_file() -> None:
    for data, names, choice, left in (
        (True, False, (LOST, KEPT), {}),
        (True, False, (KEPT, LOST), {"/data/whole": b"1" * 2000}),
        (False, True, (LOST, LOST), {"/data/whole": b""}),
        (False, True, (LOST, KEPT), {"/data/whole": b"1" * 2000}),
        (False, False, (KEPT, LOST), {"/data/whole": b""}),
    ):
        volume, disk = fresh()
        store(disk, "whole", b"1" * 2000, data=data, names=names)
        assert volume.durable() == {}
        volume.cut(Always(*choice))
        assert volume.files() == left


def test_a_power_cut_tears_what_was_being_written() -> None:
    seen = set()
    for seed in range(300):
        volume, disk = fresh()
        store(disk, "whole", b"1" * (3 * PAGE))
        fd = disk.open(ROOT / "whole", files.CHANGE)
        disk.write(fd, b"2" * (4 * PAGE))
        volume.cut(Random(seed))
        (content,) = volume.files().values()
        assert len(content) in (3 * PAGE, 4 * PAGE)
        assert set(content) <= set(b"\x0012")
        seen.add(content)
    assert {b"1" * 3 * PAGE, b"2" * 4 * PAGE} <= seen
    assert any(b"21" in content for content in seen), "in the midst of a page too"
    assert any(content.endswith(bytes(PAGE)) for content in seen), "a size without content"


def test_of_a_folder_any_changes_may_be_lost_each_as_a_whole() -> None:
    seen = set()
    for seed in range(100):
        volume, disk = fresh()
        volume.put(ROOT / "old", b"old")
        folder = disk.open_folder(ROOT)
        disk.close(disk.open("new", files.NEW, folder))
        disk.rename_over("new", "old", folder)
        disk.make_folder(ROOT / "below")
        volume.cut(Random(seed))
        seen.add((tuple(sorted(volume.files().items())), *volume.folders()[1:]))
    assert {
        ((("/data/old", b"old"),),),
        ((("/data/old", b""),), "/data/below"),
        ((("/data/new", b""), ("/data/old", b"old")),),
    } <= seen
    assert not any(("/data/new", b"") in found[0] and ("/data/old", b"") in found[0] for found in seen)


def test_a_folder_that_was_not_synced_into_the_one_above_takes_all_below_with_it() -> None:
    volume, disk = fresh()
    disk.make_folder(ROOT / "study")
    folder = disk.open_folder(ROOT / "study")
    fd = disk.open("x", files.NEW, folder)
    disk.write(fd, b"content")
    disk.sync(fd)
    disk.sync(folder)
    assert volume.durable() == {}
    above = disk.open_folder(ROOT)
    disk.sync(above)
    assert volume.durable() == {"/data/study/x": b"content"}
    disk.unlink("x", folder)
    assert volume.durable() == {}, "it may be gone, or not"
    volume.cut(Always(LOST))
    assert volume.files() == {"/data/study/x": b"content"}


# --- failures ------------------------------------------------------------------------------------------


def test_after_a_failed_sync_the_pages_count_as_clean_and_the_next_sync_says_nothing() -> None:
    volume, _ = fresh()
    disk = volume.disk(Process(Faults({("sync", 1): Fault(errno.EIO)})))
    first, second = (disk.open(ROOT / "x", files.CREATE) for _ in range(2))
    disk.write(first, b"lost")
    with pytest.raises(OSError, match="Input/output"):
        disk.sync(first)
    disk.sync(first)
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_data(second)  # who had it open is told once
    disk.sync_data(second)
    third = disk.open(ROOT / "x", files.READ)
    disk.sync(third)
    disk.sync(disk.open_folder(ROOT))
    assert disk.read_at(third, 10, 0) == b"lost"
    assert volume.durable() == {"/data/x": bytes(4)}, "the size alone was written since"
    volume.evict()
    assert disk.read_at(third, 10, 0) == bytes(4)
    volume.cut(Always(KEPT))
    assert volume.files() == {"/data/x": bytes(4)}


def test_a_full_disk_takes_a_part_and_then_none() -> None:
    volume, disk = fresh()
    volume.put(ROOT / "first", bytes(700))
    volume.capacity = 1000
    fd = disk.open(ROOT / "x", files.NEW)
    assert disk.free(ROOT) == (300, 1000, 1, 0, 0)
    assert disk.write(fd, bytes(500)) == 300
    with pytest.raises(OSError, match="No space"):
        disk.write(fd, bytes(500))
    disk.remove(ROOT / "first")
    files_left = volume.files()
    assert disk.write(fd, bytes(500)) == 500
    assert files_left == {"/data/x": bytes(300)}


def test_faults_come_where_they_are_planned() -> None:
    volume, _ = fresh()
    faults = Faults({("write", 1): Fault(short=True), ("rename", 1): Fault(errno.EIO, after=True),
                     ("close", 1): Fault(errno.EIO), ("unlink", 1): Fault(errno.EROFS)})  # fmt: skip
    disk = volume.disk(Process(faults))
    folder = disk.open_folder(ROOT)
    fd = disk.open("x", files.NEW, folder)
    assert disk.write(fd, b"123456") == 3
    with pytest.raises(OSError, match="Input/output"):
        disk.rename_new("x", "y", folder)
    with pytest.raises(OSError, match="Read-only"):
        disk.unlink("y", folder)
    with pytest.raises(OSError, match="Input/output"):
        disk.close(fd)
    assert volume.files() == {"/data/y": b"123"}
    assert volume.left_open() == ["open: /data"]
    assert faults.trace == ["open_folder", "open", "write", "rename", "unlink", "close"]
    assert [operation for operation, _, _ in faults.met] == ["write", "rename", "unlink", "close"]


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_process_loses_its_descriptors_and_locks_and_nothing_else(after: bool) -> None:
    volume, _ = fresh()
    process = Process(Faults({("rename", 1): Fault(ends="kill", after=after)}))
    disk, other = volume.disk(process), volume.disk()
    folder, lock = disk.open_folder(ROOT), disk.open(ROOT / "lock", files.CREATE)
    assert disk.lock(lock, wait=True)
    seen = other.open(ROOT / "lock", files.CHANGE)
    assert not other.lock(seen, wait=False)
    fd = disk.open("part", files.NEW, folder)
    disk.write(fd, b"content")
    with pytest.raises(Killed):
        disk.rename_new("part", "final", folder)
    with pytest.raises(Killed):
        disk.unlink("part", folder)  # as in a finally block
    assert process.dead
    assert not process.breaches
    assert volume.files() == {"/data/lock": b"", ("/data/final" if after else "/data/part"): b"content"}
    assert other.lock(seen, wait=False)
    assert volume.left_open() == ["open: /data/lock", "locked: /data/lock"]


def test_a_lost_power_ends_every_process_of_the_machine() -> None:
    volume, other = fresh()
    disk = volume.disk(Process(Faults({("write", 2): Fault(ends="power", short=True)})))
    fd = disk.open(ROOT / "x", files.NEW)
    disk.write(fd, b"12")
    with pytest.raises(Killed):
        disk.write(fd, b"3456")
    with pytest.raises(Killed):
        other.status(ROOT)
    assert volume.cuts == 1
    assert volume.files() == {}
    assert not volume.left_open()


def test_a_descriptor_is_used_only_while_it_is_open() -> None:
    volume, disk = fresh()
    fd = disk.open(ROOT / "x", files.NEW)
    disk.close(fd)
    assert disk.open(ROOT / "y", files.NEW) != fd, "a number is given once"
    for use in (lambda: disk.write(fd, b"?"), lambda: disk.close(fd), lambda: disk.close(99)):
        with pytest.raises(ModelError, match="descriptor"):
            use()
    assert len(disk.process.breaches) == 3
    assert volume.left_open() == ["open: /data/y"]


def test_locks_of_one_host_are_not_seen_from_another_where_the_file_system_has_local_ones() -> None:
    volume, _ = fresh()
    volume.locks = "host"
    here, beside, there = volume.disk(host="a"), volume.disk(host="a"), volume.disk(host="b")
    fds = [disk.open(ROOT / "lock", files.CREATE) for disk in (here, beside, there)]
    assert here.lock(fds[0], wait=False)
    assert not beside.lock(fds[1], wait=False)
    assert there.lock(fds[2], wait=False)
    here.close(fds[0])
    assert beside.lock(fds[1], wait=False)
    volume.locks = "none"
    with pytest.raises(OSError, match="not supported"):
        beside.lock(fds[1], wait=False)


def test_somebody_else_removes_a_folder_under_our_hands() -> None:
    volume, _ = fresh()
    disk = volume.disk(Process(Faults({("open", 2): Fault(first=lambda: volume.remove(ROOT / "study"))})))
    disk.make_folders(ROOT / "study" / "series")
    folder = disk.open_folder(ROOT / "study" / "series")
    fd = disk.open("x", files.NEW, folder)
    with pytest.raises(FileNotFoundError):
        disk.open("y", files.NEW, folder)
    assert disk.write(fd, b"into nowhere") == 12
    with pytest.raises(FileNotFoundError):
        disk.is_at(folder, ROOT / "study" / "series")


def test_permissions_and_a_read_only_volume() -> None:
    volume, disk = fresh()
    volume.put(ROOT / "whole", b"1")
    volume.set_mode(ROOT / "whole", 0o444)
    with pytest.raises(PermissionError):
        disk.open(ROOT / "whole", files.CHANGE)
    assert disk.read_at(disk.open(ROOT / "whole", files.READ), 9, 0) == b"1"
    volume.set_mode(ROOT, 0o555)
    assert not disk.is_writable(ROOT)
    with pytest.raises(PermissionError):
        disk.remove(ROOT / "whole")
    volume.set_mode(ROOT, 0o755)
    volume.read_only = True
    with pytest.raises(OSError, match="Read-only"):
        disk.make_folder(ROOT / "study")
    assert not disk.is_writable(ROOT)
    assert volume.files() == {"/data/whole": b"1"}


def test_without_renameat2_a_kill_may_leave_both_names() -> None:
    volume, disk = fresh()
    volume.renames = "link"
    store(disk, "whole", b"1", names=False)
    seen = set()
    for numbers in ((0, 0), (0, 1), (1, 0), (1, 1)):
        volume, disk = fresh()
        volume.renames = "link"
        store(disk, "whole", b"1", names=False)
        volume.cut(Always(TORN, KEPT, 1, *numbers))
        seen.add(tuple(sorted(volume.files())))
    assert seen == {("/data/.part",), (), ("/data/.part", "/data/whole"), ("/data/whole",)}


def test_the_same_seed_gives_the_same_history() -> None:
    def history(seed: int) -> tuple[list[str], dict[str, bytes]]:
        chance = Random(seed)
        volume, disk = fresh(chance)
        for number in range(8):
            store(disk, f"{number}", chance.randbytes(900), data=chance.random() < 0.5, names=chance.random() < 0.5)
        volume.cut()
        return disk.process.faults.trace, volume.files()

    assert all(history(seed) == history(seed) for seed in range(20))
    assert history(1) != history(2)


def test_marks_tell_what_was_reached() -> None:
    reached.clear()
    in_history.clear()
    volume, disk = fresh()
    store(disk, "x", bytes(5 * PAGE), data=False)
    volume.cut(Always(LOST, TORN, 0))
    assert reached["disk: power cut, names lost, content torn"] == 1
    assert reached["disk: a file lost its size"] == 1
