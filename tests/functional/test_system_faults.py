"""System calls that fail, or end the process, under a real retrieval.

``strace`` fails the n-th call of a kind in each thread, or kills the process at it (libfiu, which is preloaded, is no
help: it and pyarrow wait for each other for ever while pyarrow is imported). Where a file system of our own that
forgets can be mounted, the power is cut afterwards too: what was called complete must have outlasted it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from tests.support import forgetful

FAULTS = int(os.environ.get("FAULTS", "2"))
SEED = os.environ.get("FAULT_SEED", "1")
WITHIN = 90.0
"""Seconds that tell an end from a hang."""
ERRORS = {
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "writev": ("EIO", "ENOSPC", "EDQUOT"),
    "renameat2": ("EIO", "ENOSPC", "EROFS", "EINVAL"),
    "link,linkat": ("EIO", "EMLINK"),
    "mkdir": ("EIO", "ENOSPC", "EACCES"),
    "flock": ("ENOLCK", "EOPNOTSUPP"),
    "pread64": ("EIO", "ESTALE"),
    "unlink,unlinkat": ("EIO", "EBUSY"),
}
"""What fails, and how: calls that the interpreter does not make for itself, or can do without."""
KILLED_AT = ("fsync", "fdatasync", "renameat2", "writev", "mkdir", "flock", "unlink,unlinkat")


def lacking() -> str | None:
    if shutil.which("strace") is None:
        return "strace (Debian package strace)"
    tried = subprocess.run(["strace", "-o", os.devnull, "-e", "trace=fsync", "true"], check=False, capture_output=True)
    return None if tried.returncode == 0 else "the right to trace a process (ptrace)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if what := lacking():
        pytest.skip(f"missing: {what}")
    folder = tmp_path_factory.mktemp("faults")
    if forgetful.lacking():
        yield folder
        return
    with forgetful.mounted(folder / "mount") as mount:
        yield mount


@pytest.fixture(scope="module")
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs(series=3, instances=6, size=20_000) as server:
        yield server


def cut_power(place: Path) -> None:
    if place.name == "mount":
        forgetful.cut_power(place)


def retrieve(pacs: MisbehavingPacs, destination: Path, fault: str | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of a retrieval, perhaps with a fault (``call:what``) under it."""
    traced = ["-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}"] if fault else []
    command = ["strace", "-f", "-q", "-o", os.devnull, *traced] if fault else []
    command += [sys.executable, "-m", "airflow_dicom_get.cli", "get", f"PACS@127.0.0.1:{pacs.port}"]
    command += ["--study", pacs.study_uid, "--to", str(destination), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=WITHIN)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said, errors


def held(destination: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in destination.rglob("*.dcm")}


def fault_of(number: int) -> str:
    chance = random.Random(f"{SEED} {number}")
    when = f"when={chance.randint(1, 12)}{chance.choice(('', '+'))}"
    if chance.random() < 0.4:
        return f"{chance.choice(KILLED_AT)}:signal=KILL:{when}"
    call = chance.choice(list(ERRORS))
    return f"{call}:error={chance.choice(ERRORS[call])}:{when}"


@pytest.mark.parametrize("number", range(FAULTS))
def test_whatever_fails_it_ends_tells_the_truth_and_the_next_run_makes_it_good(
    place: Path, pacs: MisbehavingPacs, number: int
) -> None:
    fault, destination = fault_of(number), place / f"{number}"
    status, said, errors = retrieve(pacs, destination, fault)
    assert "Traceback" not in errors, (fault, errors)
    not_begun = status == 127 and "while loading shared libraries" in errors
    assert not_begun or status in (0, 1, 2, 3, 4, -signal.SIGKILL, 128 + signal.SIGKILL), (fault, status, errors)
    verdict = json.loads(said)["verdict"] if said else None
    assert (status == 0) == (verdict == "complete"), (fault, status, said)
    for uid, content in held(destination).items():
        assert content.endswith(pacs.dataset(uid)), (fault, uid)
    cut_power(place)
    if verdict == "complete":
        assert held(destination).keys() == set(pacs.uids), fault
    status, said, errors = retrieve(pacs, destination)
    assert status == 0, (fault, said, errors)
    beside = [path.name for path in destination.rglob(".*") if path.is_file() and path.suffix != ".jsonl"]
    assert beside == [], fault
    cut_power(place)
    found = held(destination)
    assert found.keys() == set(pacs.uids), fault
    assert all(content.endswith(pacs.dataset(uid)) for uid, content in found.items()), fault
