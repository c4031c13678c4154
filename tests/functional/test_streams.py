"""The shell where nobody reads what it prints, or where its streams are not open: the status is the verdict's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs

MODULE = (sys.executable, "-m", "airflow_dicom_get.cli")
SCRIPT = (str(Path(sys.executable).with_name("dicom-get")),)

# What stands behind stdout and stderr, for every verb,
STREAMS = {
    "stdout_unread": ("unread", "read"),
    "stderr_unread": ("read", "unread"),
    "stdout_closed": ("closed", "read"),
    "stderr_closed": ("read", "closed"),
    "both_closed": ("closed", "closed"),
    "stdout_full": ("full", "read"),
}
# and for one of them.
MORE_STREAMS = {
    "both_unread": ("unread", "unread"),
    "stderr_full": ("read", "full"),
    "both_full": ("full", "full"),
    "stdout_for_reading": ("for reading", "read"),
}


class Streams:
    """Starts the command with streams of this kind."""

    def __init__(self, folder: Path, out: str, err: str) -> None:
        self.folder, self.out, self.err = folder, out, err
        # An unbuffered Python has nothing left to flush at its exit.
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.environment |= {"XDG_CONFIG_HOME": str(folder / "config"), "HOME": str(folder)}

    def start(self, stack: ExitStack, *argv: str) -> subprocess.Popen[str]:
        closing = " ".join(
            f"{number}>&-" for number, kind in ((0, self.out), (1, self.out), (2, self.err)) if kind == "closed"
        )
        return stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", f'exec "$@" {closing}', "bash", *argv],
                stdin=subprocess.DEVNULL, stdout=_end(stack, self.out), stderr=_end(stack, self.err),
                env=self.environment, cwd=self.folder, text=True,
            )
        )  # fmt: skip

    def run(self, *argv: str) -> tuple[int, str, str]:
        """The exit status, and what was read of both streams."""
        with ExitStack() as stack:
            out, err = (process := self.start(stack, *argv)).communicate(timeout=60)
        return process.returncode, out or "", err or ""

    def expected(self, code: int) -> int:
        return 1 if self.out == "full" else code


def _end(stack: ExitStack, kind: str) -> Any:
    if kind == "unread":
        reading, writing = os.pipe()
        os.close(reading)
        stack.callback(os.close, writing)
        return writing
    if kind in ("full", "for reading"):
        return stack.enter_context(open("/dev/full", "r" if kind == "for reading" else "w"))
    return subprocess.DEVNULL if kind == "closed" else subprocess.PIPE


@pytest.fixture(params=STREAMS)
def streams(request: pytest.FixtureRequest, tmp_path: Path) -> Streams:
    return Streams(tmp_path, *STREAMS[request.param])


@pytest.fixture
def well(tmp_path: Path) -> Streams:
    return Streams(tmp_path, "read", "read")


@pytest.fixture
def pacs(ct: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPacs]:
    # A copy: what is stored at it lies in its folder, and the study of the session is for all tests.
    folder = shutil.copytree(ct.folder, tmp_path_factory.mktemp("streams") / "ct")
    with EmbeddedPacs(folder) as server:
        yield server


def node_of(server: Any) -> str:
    return f"PACS@{server.host}:{server.port}"


def check(streams: Streams, code: int, done: tuple[int, str, str]) -> None:
    """The status is the verdict's; what can be read has no traceback, and says where a result is lost."""
    status, _, err = done
    assert status == streams.expected(code), err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if streams.err == "read":
        assert ("could not be written to stdout: No space left on device" in err) == (streams.out == "full")


@pytest.mark.parametrize("kinds", [*STREAMS.values(), *MORE_STREAMS.values()], ids=[*STREAMS, *MORE_STREAMS])
@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_find(tmp_path: Path, pacs: EmbeddedPacs, command: tuple[str, ...], kinds: tuple[str, str]) -> None:
    streams = Streams(tmp_path, *kinds)
    check(streams, 0, streams.run(*command, "find", node_of(pacs), "-k", "StudyDate=20240115"))


LOOKING = {
    "help": (["get", "--help"], 0),
    "echo": (["echo", "NODE"], 0),
    "plan": (["plan", "NODE", "--study", "STUDY"], 0),
}


@pytest.mark.parametrize("name", LOOKING)
def test_looking(streams: Streams, pacs: EmbeddedPacs, ct: Any, name: str) -> None:
    words, code = LOOKING[name]
    check(streams, code, streams.run(*MODULE, *({"NODE": node_of(pacs), "STUDY": ct.study}.get(w, w) for w in words)))


NO_RESULT = {
    "usage": (["find", "NODE"], 2),
    "bad_node": (["find", "no-port", "-k", "StudyDate=20240115"], 2),
    "nobody_there": (["echo", "PACS@127.0.0.1:1"], 1),
    "empty": (["find", "NODE", "-k", "StudyDate=19000101"], 5),
}


@pytest.mark.parametrize("name", NO_RESULT)
def test_what_prints_no_result(streams: Streams, pacs: EmbeddedPacs, name: str) -> None:
    words, code = NO_RESULT[name]
    status, out, err = streams.run(*MODULE, *(node_of(pacs) if word == "NODE" else word for word in words))
    assert (status, out) == (code, "")
    assert "Traceback" not in err


def test_get_and_verify(streams: Streams, well: Streams, pacs: EmbeddedPacs, ct: Any, tmp_path: Path) -> None:
    check(streams, 0, streams.run(*MODULE, "get", node_of(pacs), "--study", ct.study, "--to", "out", "--verbose"))
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 40
    (manifest,) = (tmp_path / "out").rglob("*.parquet")
    # The descriptors of the streams went to no file and no socket: every byte is there, and nothing else.
    status, _, err = well.run(*MODULE, "verify", node_of(pacs), "--manifest", str(manifest))
    assert status == 0, err
    next((tmp_path / "out").rglob("*.dcm")).unlink()
    check(streams, 3, streams.run(*MODULE, "verify", "--manifest", str(manifest)))


def test_get_of_a_part(streams: Streams, tmp_path: Path) -> None:
    with MisbehavingPacs("success_partial") as server:
        done = streams.run(*MODULE, "get", node_of(server), "--study", server.study_uid, "--to", "out")
    check(streams, 3, done)
    assert list((tmp_path / "out").rglob("*.parquet"))


def test_store(streams: Streams, pacs: EmbeddedPacs, ct: Any) -> None:
    check(streams, 0, streams.run(*MODULE, "store", node_of(pacs), str(ct.folder)))


def test_pacs(streams: Streams, ct: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        process = streams.start(stack, *MODULE, "pacs", "--dir", str(ct.folder), "--port", str(port))
        wait_for(lambda: process.poll() is not None or answers(port))
        process.terminate()
        out, err = process.communicate(timeout=30)
    check(streams, 0, (process.returncode, out or "", err or ""))


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_signal_where_nobody_reads_stderr(tmp_path: Path) -> None:
    streams = Streams(tmp_path, "read", "unread")
    with MisbehavingPacs("silent") as server, ExitStack() as stack:
        process = streams.start(
            stack, *MODULE, "get", node_of(server), "--study", server.study_uid, "--to", "out", "--json"
        )
        # The handlers are set before it connects.
        wait_for(lambda: process.poll() is not None or server.associations > 0)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (json.loads(out)["verdict"], json.loads(out)["reason"]) == ("cancelled", "SIGINT")


def test_a_reader_that_goes_away_in_the_middle(well: Streams, pacs: EmbeddedPacs, ct: Any) -> None:
    """As ``head`` does: of a table that fills more than one pipe, one line is read."""
    find = f"{sys.executable} -m airflow_dicom_get.cli find {node_of(pacs)} --study {ct.study} --level image"
    keys = " ".join(f"--return-key {key}" for key in ("SOPClassUID", "InstanceNumber", "Rows", "Columns"))
    status, out, err = well.run("bash", "-c", f"{find} {keys} --json | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert (status, out) == (0, "["), err


def test_a_signal_where_stderr_is_full(tmp_path: Path) -> None:
    """Whoever holds the other end of the pipe has stopped reading."""
    with MisbehavingPacs("silent") as server, ExitStack() as stack:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        command = [
            *MODULE,
            "get",
            node_of(server),
            "--study",
            server.study_uid,
            "--to",
            str(tmp_path / "out"),
            "--json",
        ]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writing))
        os.close(writing)
        stack.callback(os.close, reading)
        wait_for(lambda: process.poll() is not None or server.associations > 0)
        for _ in range(3):  # the third ends it at once, and none waits for the reader
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert process.wait(30) in (143, -signal.SIGTERM)
