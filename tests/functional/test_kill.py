"""The end by force: kill -9 at any moment costs one instance at most, and signals end a run in order.

A relay counts what the PACS sends. Three kills are made here, one for each kind of PACS; `make
test-kills` makes twenty for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.dicom.part10 import read_file_meta
from airflow_dicom_get.manifest.files import read_table, write_manifest
from airflow_dicom_get.manifest.frames import read_manifest
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.testing.archive import STUDY_UID, read_header
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.holdings import Holding, hold
from tests.support.relay import Relay

KILLS = int(os.environ.get("KILLS", "1"))
SEED = os.environ.get("KILL_SEED", "1")
COMMAND = (sys.executable, "-m", "airflow_dicom_get.cli")
C_STORE_RQ, C_CANCEL_RQ = 0x0001, 0x0FFF
WITHIN = 30.0
"""Seconds that tell an end in order from a hang. Two are promised; a busy machine may need longer."""

Relays = Callable[..., Relay]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """Thirty instances of 256 KiB and four of 8 MiB, which are digested in another way, as two studies."""
    folder = tmp_path_factory.mktemp("large")
    small = big_study(folder / "small", 30, 256 << 10, name="small")
    big_study(folder / "large", 4, 8 << 20, name="large")
    return hold(folder, small)


@pytest.fixture(scope="module")
def embedded_large(large: Holding) -> Iterator[EmbeddedPacs]:
    # A few milliseconds for each: else half of the run is its start.
    with EmbeddedPacs(large.folder, before_send=lambda sop: time.sleep(0.01)) as pacs:
        yield pacs


@dataclass
class Source:
    """A PACS behind a relay, and the studies to get from it."""

    relay: Relay
    title: str
    holding: Holding
    studies: list[str]
    exact: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, destination: Path, *options: str) -> list[str]:
        studies = [part for study in self.studies for part in ("--study", study)]
        node = f"{self.title}@127.0.0.1:{self.relay.port}"
        return [*COMMAND, "get", node, *studies, "--to", str(destination), "--json", *options]

    def begun(self) -> Counter[str]:
        """How often the PACS began to send each instance."""
        return Counter(
            elements[0x1000].decode().strip("\0 ")
            for direction, kind, elements in list(self.relay.commands)
            if (direction, kind) == ("down", C_STORE_RQ)
        )

    def uids(self) -> set[str]:
        """What the studies hold."""
        return {sop for sop in self.holding.entries if read_study(self.holding, sop) in self.studies}


@pytest.fixture(params=["embedded", pytest.param("orthanc", marks=pytest.mark.orthanc),
                        pytest.param("dcmqrscp", marks=pytest.mark.dcmtk)])  # fmt: skip
def source(request: pytest.FixtureRequest, relay: Relays, ct: Holding, large: Holding) -> Source:
    if request.param == "embedded":
        pacs = request.getfixturevalue("embedded_large")
        studies = sorted({read_study(large, sop) for sop in large.entries})
        return Source(relay(pacs, keep_data=False), "PACS", large, studies, True)
    name, title = ("orthanc", "ORTHANC") if request.param == "orthanc" else ("dcmqrscp_all", "QRALL")
    pacs = request.getfixturevalue(name)
    # It is a small study: a slower line makes room for moments.
    return Source(relay(pacs, latency=0.002), title, ct, [ct.study], False)


def read_study(holding: Holding, sop: str) -> str:
    return read_header(holding.entries[sop].path)[3][STUDY_UID]


def assert_whole_files(source: Source, destination: Path) -> set[str]:
    """Every file under a final name is a whole instance; returns the UIDs."""
    recorded = source.relay.by_sop()
    found = set()
    for path in destination.glob("*/*/*.dcm"):
        content = path.read_bytes()
        meta = read_file_meta(content[: 1 << 16])
        assert meta is not None, path
        assert meta.sop_instance == path.stem
        data = content[meta.dataset_offset :]
        assert data == (source.holding.dataset(path.stem) if source.exact else recorded[path.stem].data), path
        found.add(path.stem)
    return found


def hidden(destination: Path) -> list[str]:
    """Temporary files and locks beside the instances."""
    studies = (folder for folder in destination.iterdir() if folder.name != "_manifests")
    return [path.name for folder in studies for path in folder.rglob(".*")]


def measure(source: Source, destination: Path) -> float:
    """Seconds from the first connection to the end of a whole run."""
    process = subprocess.Popen(source.command(destination), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: source.relay.connections > 0)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 0
    return time.monotonic() - began


def wait_until(true: Callable[[], object], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


def killed(source: Source, destination: Path, seconds: float) -> bool:
    """Start a run and kill it so many seconds after its first connection; False if it was over before."""
    connections = source.relay.connections
    process = subprocess.Popen(source.command(destination), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: source.relay.connections > connections)
        time.sleep(seconds)
    finally:
        process.kill()
    process.communicate(timeout=10)
    return process.returncode == -signal.SIGKILL


def wait_for_silence(relay: Relay) -> None:
    """Until nothing is under way any more, so that what is counted is over."""
    passed = -1
    while passed != relay.down:
        passed = relay.down
        time.sleep(0.1)


def complete(source: Source, destination: Path) -> dict[str, Any]:
    """A run to the end, which must be a good one."""
    done = subprocess.run(source.command(destination), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["verdict"] == "complete"
    assert value["completed"] == value["total"] == len(source.uids())
    return value


def test_kill_at_random_moments(source: Source, tmp_path: Path) -> None:
    chooser = random.Random(f"{SEED} {source.title}")
    seconds = measure(source, tmp_path / "measured")
    left = KILLS
    number = 0
    halves = 0
    while left:
        number += 1
        destination = tmp_path / str(number)
        moment = chooser.uniform(0, seconds)
        before = source.begun()
        if not killed(source, destination, moment):
            assert number < 3 * KILLS + 10, "it is always too late"
            continue
        left -= 1
        wait_for_silence(source.relay)
        held = assert_whole_files(source, destination)
        halves += any(destination.rglob(".*.part"))
        begun = source.begun() - before
        result = complete(source, destination)
        assert result["skipped"] == len(held)
        assert assert_whole_files(source, destination) == source.uids()
        assert hidden(destination) == []
        counted = source.begun() - before
        again = {sop: times for sop, times in counted.items() if times > 1}
        print(
            f"{source.title}: killed {1000 * moment:.0f} ms after the first connection, {len(begun)} begun, "
            f"{len(held)} held, {len(again)} sent again"
        )
        assert counted.keys() == source.uids()
        assert len(again) <= 1
        assert set(again.values()) <= {2}
    print(f"{source.title}: {KILLS} kills, {halves} left a temporary file")


def test_kill_again_and_again(large: Holding, embedded_large: EmbeddedPacs, relay: Relays, tmp_path: Path) -> None:
    """Each run goes on where the one before it was killed: an instance for each kill is all it costs."""
    source = Source(relay(embedded_large, keep_data=False), "PACS", large, [large.study], True)
    kills = 0
    while killed(source, tmp_path, 0.25):
        kills += 1
        held = assert_whole_files(source, tmp_path)
        assert kills < 100  # on a busy machine most are killed before they have begun
        if len(held) > 20:
            break
    assert kills > 1
    source.studies = sorted({read_study(large, sop) for sop in large.entries})
    complete(source, tmp_path)
    assert assert_whole_files(source, tmp_path) == source.uids()
    assert hidden(tmp_path) == []
    assert sum(source.begun().values()) <= len(source.uids()) + kills


def test_what_was_left_of_a_manifest_goes_after_a_day(tmp_path: Path) -> None:
    """Sooner it may be that of a living run."""
    names = (".a.parquet.1-00000000.part", ".b.parquet.2-00000000.part", "c.parquet", "notes.part")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / names[0], (0, time.time() - 25 * 3600))
    write_manifest(
        manifest_table([], source="a", destination="b"),
        tmp_path / "m.parquet",
        verdict="complete",
        evidence="list",
        run="r",
    )
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:], "m.parquet"}


# --- signals -------------------------------------------------------------------------------------------


def signalled(command: list[str], ready: Callable[[], object], number: signal.Signals) -> tuple[dict[str, Any], float]:
    """Send a signal as soon as ``ready``; the result that is printed, and the seconds that the end took."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(ready)
        began = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        seconds = time.monotonic() - began
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 143), err
    assert "Traceback" not in err
    value = json.loads(out)
    assert (value["verdict"], value["reason"]) == ("cancelled", number.name)
    assert read_manifest(value["manifest"]).attrs["verdict"] == "cancelled"
    value["rows"] = read_table(value["manifest"]).to_pylist()
    return value, seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_in_order(source: Source, tmp_path: Path, number: signal.Signals) -> None:
    """By C-CANCEL, between two instances or after the one that is under way."""
    source.studies = [source.holding.study]
    command = source.command(tmp_path, "--rate", "2M")
    value, seconds = signalled(command, lambda: len(list(tmp_path.glob("*/*/*.dcm"))) >= 2, number)
    assert seconds < WITHIN
    assert ("up", C_CANCEL_RQ) in {(direction, kind) for direction, kind, _ in source.relay.commands}
    held = assert_whole_files(source, tmp_path)
    states = Counter(row["state"] for row in value["rows"])
    assert states == {"stored": len(held), "missing": len(value["rows"]) - len(held)}
    reasons = {row["reason"] for row in value["rows"] if row["state"] == "missing"}
    # What dcmqrscp failed at on its first context would have been asked for in another way.
    assert reasons - ({"sub_operation_failed"} if source.title == "QRALL" else set()) == {"cancelled"}
    assert value["completed"] == len(held) >= 2
    assert hidden(tmp_path) == []
    assert complete(source, tmp_path)["skipped"] == len(held)
    assert sum(times > 1 for times in source.begun().values()) <= 1


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("assoc_silent", signal.SIGINT),
        ("find_silent", signal.SIGTERM),
        ("stall_mid", signal.SIGINT),
        ("slow_line", signal.SIGTERM),
        ("cancel_ignored", signal.SIGINT),
    ],
)
def test_a_signal_ends_a_run_whatever_the_pacs_does(mode: str, number: signal.Signals, tmp_path: Path) -> None:
    """While nothing is answered, in the middle of an instance, and though C-CANCEL is ignored."""
    with MisbehavingPacs(mode, size=200_000) as pacs, Relay("127.0.0.1", pacs.port) as relay:
        wanted = 1 if mode in ("assoc_silent", "find_silent") else 2
        node = f"PACS@127.0.0.1:{relay.port}"
        command = [*COMMAND, "get", node, "--study", pacs.study_uid, "--to", str(tmp_path), "--json"]

        def ready() -> bool:
            if relay.connections < wanted:
                return False
            time.sleep(0.3)
            return True

        value, seconds = signalled(command, ready, number)
        assert seconds < WITHIN
        assert hidden(tmp_path) == []
        held = len(list(tmp_path.glob("*/*/*.dcm")))
        assert held == value["completed"] < len(pacs.uids)
        if wanted == 2:
            assert len(value["rows"]) == len(pacs.uids)


def test_a_second_signal_aborts_at_once(tmp_path: Path) -> None:
    with MisbehavingPacs("stall_mid") as pacs:
        command = [*COMMAND, "get", f"PACS@127.0.0.1:{pacs.port}", "--study", pacs.study_uid]
        command += ["--to", str(tmp_path), "--json"]

        def ready() -> bool:
            if pacs.associations < 2:
                return False
            time.sleep(0.3)
            # The second one comes a moment after the first.
            threading.Timer(0.1, lambda: os.kill(pid(), signal.SIGINT)).start()
            return True

        def pid() -> int:
            return process.pid

        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(ready)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            assert time.monotonic() - began < WITHIN
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert json.loads(out)["verdict"] == "cancelled"
    assert hidden(tmp_path) == []
