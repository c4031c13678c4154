"""What comes from outside comes through four modules: sockets, the disk, the bucket, and time, chance and helpers."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

import airflow_dicom_get
from airflow_dicom_get import clock
from airflow_dicom_get.net import transport
from airflow_dicom_get.storage import files

PACKAGE = Path(airflow_dicom_get.__file__).parent
PARTS = ("net", "engine", "sinks", "manifest", "storage")
SEAMS = frozenset({"net/transport.py", "storage/files.py", "storage/bucket.py"})
MODULES = [
    name
    for part in PARTS
    for path in sorted((PACKAGE / part).rglob("*.py"))
    if (name := str(path.relative_to(PACKAGE))) not in SEAMS
]

INPUT = {"engine/study_list.py": ["Path(self._path).open"]}
"""What a person names to be read, which may be a pipe, is no destination."""

MODULES_OF_SEAMS = frozenset(
    {"boto3", "botocore", "fcntl", "mmap", "random", "secrets", "select", "selectors", "shutil", "socket", "tempfile"}
    | {"time", "uuid"}
)
THREADS = frozenset({"Barrier", "Condition", "Event", "Thread", "ThreadPoolExecutor", "Timer", "ProcessPoolExecutor"})
"""Who waits for another, and who begins one. A lock that is held for a moment is no seam."""
PURE = frozenset({"PathLike", "DirEntry", "environ", "fspath", "path", "sep", "strerror"})
"""What is there in ``os`` and calls nothing."""
PURE_PATHS = frozenset({"basename", "dirname", "isabs", "join", "normpath"})
OF_PATHS = frozenset(
    {"chmod", "exists", "glob", "is_dir", "is_file", "iterdir", "lstat", "mkdir", "read_bytes", "read_text", "rglob"}
    | {"rmdir", "samefile", "stat", "touch", "unlink", "walk", "write_bytes", "write_text"}
)
"""Methods of ``pathlib.Path`` that ask the disk."""
DISK = frozenset({"disk", "_disk", "files", "entry", "series"})
"""Receivers of such names that are the seam itself, or an entry that it gave."""


def name_of(node: ast.expr) -> str:
    """The last name of what something is called on."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def breaches(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names if x.name.partition(".")[0] in MODULES_OF_SEAMS)
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module).partition(".")[0]
            if module in MODULES_OF_SEAMS:
                yield str(node.module)
            if module in ("threading", "concurrent", "os"):
                yield from (f"{module}.{x.name}" for x in node.names if x.name in THREADS or module == "os")
        elif isinstance(node, ast.Attribute):
            owner = name_of(node.value)
            if owner == "os" and node.attr not in PURE:
                yield f"os.{node.attr}"
            elif owner == "path" and ast.unparse(node.value) == "os.path" and node.attr not in PURE_PATHS:
                yield f"os.path.{node.attr}"
            elif owner == "threading" and node.attr in THREADS:
                yield f"threading.{node.attr}"
            elif owner in ("datetime", "date") and node.attr in ("now", "today", "utcnow"):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("open", "input", "print"):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                on, attribute = name_of(node.func.value), node.func.attr
                opens = attribute == "open" and (on == "path" or ast.unparse(node.func.value).startswith("Path("))
                if on not in DISK and (attribute in OF_PATHS or opens):
                    yield ast.unparse(node.func)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_passes_the_seams_by(module: str) -> None:
    assert sorted(set(breaches(ast.parse((PACKAGE / module).read_text())))) == INPUT.get(module, [])


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import socket", ["socket"]),
        ("from time import monotonic", ["time"]),
        ("import botocore.exceptions", ["botocore.exceptions"]),
        ("import threading\nthreading.Thread(target=f).start()", ["threading.Thread"]),
        ("from concurrent.futures import ThreadPoolExecutor", ["concurrent.ThreadPoolExecutor"]),
        ("import os\nos.unlink(x)", ["os.unlink"]),
        ("import os\nos.path.exists(x)", ["os.path.exists"]),
        ("datetime.now(UTC)", ["datetime.now"]),
        ("path.read_bytes()", ["path.read_bytes"]),
        ("path.parent.mkdir()", ["path.parent.mkdir"]),
        ("with open(x) as f: pass", ["open"]),
        ("with Path(x).open() as f: pass", ["Path(x).open"]),
        ("import threading\nthreading.Lock()\nos.path.dirname(x)\nself._disk.unlink(a, b)", []),
    ],
)
def test_what_would_pass_them_by_is_seen(code: str, found: list[str]) -> None:
    assert sorted(set(breaches(ast.parse(code)))) == found


# --- they can be replaced ------------------------------------------------------------------------------


class Still:
    """A clock that moves only when somebody waits, and does at once what is to be done beside."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return 1_700_000_000 + self.at

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float, /) -> None:
        self.at += seconds

    def jitter(self, least: float, most: float) -> float:
        return (least + most) / 2

    def token(self) -> str:
        return "00000000"

    def lock(self) -> threading.Lock:
        return threading.Lock()

    def condition(self, lock: threading.Lock | None = None, /) -> threading.Condition:
        return threading.Condition(lock)

    def event(self) -> threading.Event:
        return threading.Event()

    def spawn(self, work: Callable[[], object], name: str) -> clock.Worker:
        work()
        return threading.current_thread()

    def pool(self, workers: int, name: str) -> Executor:
        return ThreadPoolExecutor(workers)


def test_another_clock_holds_for_all_that_ask_and_only_for_a_while() -> None:
    from airflow_dicom_get.engine.limits import RateLimit

    still = Still()
    with clock.replaced(still):
        limit = RateLimit(1000)
        for _ in range(10):
            limit(1000)
        done: list[str] = []
        clock.spawn(lambda: done.append(threading.current_thread().name), "beside")
        assert done == [threading.current_thread().name]
        assert clock.run_name() == "20231114T221330Z-00000000"
    assert still.at == pytest.approx(10, abs=0.2)
    assert clock.now() > 1_700_000_100
    assert not clock.run_name().endswith("-00000000")


def test_another_disk_holds_for_ledgers_that_are_opened_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow_dicom_get.records import Instance
    from airflow_dicom_get.sinks.ledger import FolderLedgers

    class Torn(files.Disk):
        """Every write takes half of what it is given."""

        def write(self, fd: int, data: bytes | memoryview) -> int:
            return super().write(fd, data[: (len(data) + 1) // 2])

    monkeypatch.setattr(files, "disk", Torn())
    ledgers = FolderLedgers(tmp_path, "file:///d")
    writer = ledgers.open("1.2", "run")
    with pytest.raises(OSError, match="No space"):
        writer.taken(Instance("1.2", "1.2.3", "1.2.3.4"))
    writer.close()
    assert ledgers.read("1.2") == {}
    files.replace_whole(tmp_path / "whole", lambda file: file.write(bytes(1001)), temporary=".part")
    assert [(x.name, x.stat().st_size) for x in tmp_path.iterdir() if x.is_file()] == [("whole", 1001)]


def test_another_network_holds_for_associations(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_dicom_get.config.groups import Deadlines
    from airflow_dicom_get.config.node import Node
    from airflow_dicom_get.errors import AssociationAborted
    from airflow_dicom_get.net.acse import Proposal
    from airflow_dicom_get.net.association import CancelToken
    from airflow_dicom_get.net.peer import Peer

    class Dead:
        """Takes the request, stays silent for two slices of time, and hangs up."""

        def __init__(self) -> None:
            self.sent = bytearray()
            self.silent = 2

        def receive(self, view: memoryview) -> int:
            if self.silent:
                self.silent -= 1
                raise TimeoutError
            return 0

        def send(self, view: memoryview) -> int:
            self.sent += view[:7]
            return min(len(view), 7)

        def wait(self, seconds: float) -> bool:
            return False

        def said(self) -> OSError | None:
            return None

        def hang_up(self, last: bytes, seconds: float) -> None:
            self.close()

        def close(self) -> None:
            self.sent.clear()

    dead, asked = Dead(), []

    def connect(host: str, port: int, *rest: object) -> transport.Transport:
        asked.append((host, port))
        return dead

    monkeypatch.setattr(transport, "connect", connect)
    with pytest.raises(AssociationAborted, match="closed the connection"):
        Peer(Node("pacs.example", 104), "US", "THEM", Deadlines()).open(
            [Proposal("1.2.840.10008.1.1", "1.2.840.10008.1.2")], CancelToken()
        )
    assert asked == [("pacs.example", 104)]
    assert dead.silent == 0
    assert not dead.sent, "closed"
