"""Go on, not again: what a cut line, a killed process, a broken ledger or a full disk leaves is built upon.

`make test-cuts` runs the same tests at 200 places and with 20 kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from tests.support.relay import Relay

CUTS, KILLS = int(os.environ.get("CUTS", "12")), int(os.environ.get("KILLS", "3"))
SERIES, INSTANCES, SIZE = 4, 25, 524_288
GET = 1
"""Which connection of a first run is the C-GET's: one resolves the query and lists before it."""


def retrieve(port: int, study: str, destination: Path, **options: Any) -> Result:
    scu = GetScu(f"PACS@127.0.0.1:{port}", destination=destination, **options)
    return scu.get_study({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study})


def files(destination: Path) -> dict[str, Path]:
    return {path.stem: path for path in destination.rglob("*.dcm")}


def assert_whole(pacs: MisbehavingPacs, destination: Path) -> None:
    """All of the study is there byte by byte, and nothing beside it."""
    found = files(destination)
    assert found.keys() == set(pacs.uids)
    for uid, path in found.items():
        assert path.read_bytes().endswith(pacs.dataset(uid))
    beside = [p.name for p in destination.rglob(".*") if p.is_file()]
    assert beside == []


def ledgers(destination: Path) -> list[Path]:
    return sorted(destination.glob("_manifests/.ledger/*/*.jsonl"))


# --- the line is cut ---------------------------------------------------------------------------------


@dataclass
class Line:
    """The large study, and where to cut a C-GET of it."""

    pacs: MisbehavingPacs
    places: list[int]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with MisbehavingPacs(series=SERIES, instances=INSTANCES, size=SIZE) as pacs:
        destination = tmp_path_factory.mktemp("whole")
        with Relay("127.0.0.1", pacs.port, keep_data=False) as relay:
            assert retrieve(relay.port, pacs.study_uid, destination).verdict == "complete"
        shutil.rmtree(destination)
        borders = relay.borders[GET]
        # The association's own, then per instance: command, data in five PDUs, response.
        first_two = borders[:15]
        exact = [border + by for border in first_two for by in (-1, 0, 1)]
        assert exact[-1] > 2 * SIZE
        chooser = random.Random(3)
        if len(exact) > CUTS // 2:
            exact = chooser.sample(exact, CUTS // 2)
        anywhere = [chooser.randrange(1, borders[-1]) for _ in range(CUTS - len(exact))]
        yield Line(pacs, exact + anywhere)


@pytest.mark.parametrize("number", range(CUTS))
def test_a_cut_line_costs_one_instance_at_most(line: Line, tmp_path: Path, number: int) -> None:
    pacs, place = line.pacs, line.places[number]
    before = pacs.sent
    with Relay("127.0.0.1", pacs.port, cut_after=[1 << 40] * GET + [place], keep_data=False) as relay:
        first = retrieve(relay.port, pacs.study_uid, tmp_path, retries=0)
    assert first.verdict in ("partial", "failed"), place
    assert first.errors
    assert len(files(tmp_path)) == first.completed < first.total == SERIES * INSTANCES
    second = retrieve(pacs.port, pacs.study_uid, tmp_path)
    assert second.verdict == "complete"
    assert second.skipped == first.completed
    assert_whole(pacs, tmp_path)
    again = [uid for uid, times in (pacs.sent - before).items() if times > 1]
    assert len(again) <= 1
    assert set((pacs.sent - before).values()) <= {1, 2}
    shutil.rmtree(tmp_path)


def test_the_same_run_goes_on_over_a_new_association(line: Line, tmp_path: Path) -> None:
    pacs = line.pacs
    before = pacs.sent
    cuts = [1 << 40] * GET + [5_000_000, 9_000_000, 700]
    with Relay("127.0.0.1", pacs.port, cut_after=cuts, keep_data=False) as relay:
        result = retrieve(relay.port, pacs.study_uid, tmp_path)
    assert result.verdict == "complete"
    assert result.rounds == 1
    assert_whole(pacs, tmp_path)
    assert sum((pacs.sent - before).values()) <= len(pacs.uids) + 3
    shutil.rmtree(tmp_path)


# --- the process is killed ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_process_costs_an_instance_per_association(line: Line, tmp_path: Path, number: int) -> None:
    pacs = line.pacs
    before = pacs.sent
    chooser = random.Random(f"kill {number}")
    moment = chooser.randrange(0, len(pacs.uids) - 8)
    command = [
        *(sys.executable, "-m", "airflow_dicom_get.cli", "get", f"PACS@127.0.0.1:{pacs.port}"),
        *("--study", pacs.study_uid, "--to", str(tmp_path), "--associations", "4", "--max-associations", "4"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while sum((pacs.sent - before).values()) < moment and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(chooser.uniform(0, 0.004))
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    held = files(tmp_path)
    assert all(held[uid].read_bytes().endswith(pacs.dataset(uid)) for uid in held)
    _wait_for_silence(pacs)
    result = retrieve(pacs.port, pacs.study_uid, tmp_path)
    assert result.verdict == "complete"
    assert result.skipped == len(held)
    assert_whole(pacs, tmp_path)
    again = [uid for uid, times in (pacs.sent - before).items() if times > 1]
    assert len(again) <= 4
    assert set((pacs.sent - before).values()) <= {1, 2}
    shutil.rmtree(tmp_path)


def _wait_for_silence(pacs: MisbehavingPacs) -> None:
    """Until the PACS has noticed that its clients are gone, so that it counts nothing of theirs later."""
    counted = -1
    while (now := sum(pacs.sent.values())) != counted:
        counted = now
        time.sleep(0.05)


# --- ledgers -----------------------------------------------------------------------------------------


@pytest.fixture
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs() as server:
        yield server


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_torn_ledger_loses_nothing_that_it_still_records(pacs: MisbehavingPacs, tmp_path: Path, part: float) -> None:
    retrieve(pacs.port, pacs.study_uid, tmp_path)
    (ledger,) = ledgers(tmp_path)
    content = ledger.read_bytes()
    at = int(len(content) * part)
    at += content[at - 1 : at] == b"\n"  # in the middle of a line
    ledger.write_bytes(content[:at])
    recorded = {
        entry["uid"] for entry in map(json.loads, content[:at].splitlines()[1:-1]) if entry.get("state") == "taken"
    }
    before = pacs.sent
    result = retrieve(pacs.port, pacs.study_uid, tmp_path)
    assert result.verdict == "complete"
    assert (pacs.sent - before) == Counter(set(pacs.uids) - recorded)
    assert_whole(pacs, tmp_path)
    before = pacs.sent
    assert retrieve(pacs.port, pacs.study_uid, tmp_path).verdict == "complete"
    assert not (pacs.sent - before)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content.replace(b'{"ledger": 2}', b'{"ledger": 3}'), "has schema 3"),
        (lambda content: content.replace(b'"state"', b'"sta', 1), "is damaged in line 2"),
        (lambda content: content.replace(b'"size": ', b'"size": "x', 1).replace(b', "dataset', b'", "dataset', 1),
         "contains an unreadable record"),
    ],
    ids=["of a newer version", "broken before its end", "a record of another kind"],
)  # fmt: skip
def test_a_ledger_that_cannot_be_read_is_left_as_it_is(
    pacs: MisbehavingPacs, tmp_path: Path, spoil: Any, words: str
) -> None:
    retrieve(pacs.port, pacs.study_uid, tmp_path)
    (ledger,) = ledgers(tmp_path)
    ledger.write_bytes(spoil(ledger.read_bytes()))
    spoilt, stored = ledger.read_bytes(), {uid: path.stat() for uid, path in files(tmp_path).items()}
    before = pacs.sent
    result = retrieve(pacs.port, pacs.study_uid, tmp_path)
    assert result.verdict == "failed"
    assert words in result.errors[0]["error"]
    assert str(ledger) in result.errors[0]["error"]
    assert result.errors[0]["hint"]
    assert not result.transient
    assert not (pacs.sent - before)
    assert ledger.read_bytes() == spoilt
    assert {uid: path.stat() for uid, path in files(tmp_path).items()} == stored
    ledger.unlink()
    assert retrieve(pacs.port, pacs.study_uid, tmp_path, adopt=True).verdict == "complete"
    assert not (pacs.sent - before)


def test_a_ledger_of_another_study_vouches_for_nothing(pacs: MisbehavingPacs, tmp_path: Path) -> None:
    with MisbehavingPacs(series=1, instances=3) as other:
        other_study = "2.25.77"
        retrieve(other.port, other.study_uid, tmp_path / "other")
    (stray,) = ledgers(tmp_path / "other")
    here = tmp_path / "here" / "_manifests" / ".ledger" / pacs.study_uid
    here.mkdir(parents=True)
    renamed = stray.read_text().replace(pacs.study_uid, other_study)
    (here / stray.name).write_text(renamed)
    result = retrieve(pacs.port, pacs.study_uid, tmp_path / "here")
    assert (result.verdict, result.skipped) == ("complete", 0)
    assert_whole(pacs, tmp_path / "here")


def test_a_file_that_no_longer_is_what_the_ledger_says_is_fetched_again(pacs: MisbehavingPacs, tmp_path: Path) -> None:
    retrieve(pacs.port, pacs.study_uid, tmp_path)
    short, other = pacs.uids[1], pacs.uids[5]
    path = files(tmp_path)[short]
    path.write_bytes(path.read_bytes()[:-100])
    path = files(tmp_path)[other]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    before = pacs.sent
    assert retrieve(pacs.port, pacs.study_uid, tmp_path).verdict == "complete"
    assert (pacs.sent - before) == Counter([short])
    before = pacs.sent
    kept = retrieve(pacs.port, pacs.study_uid, tmp_path, verify_held="digest")
    assert (kept.verdict, kept.conflicts) == ("partial", 1)  # it is whole
    assert (pacs.sent - before) == Counter([other])
    again = retrieve(pacs.port, pacs.study_uid, tmp_path, verify_held="digest", on_conflict="replace")
    assert (again.verdict, again.warning) == ("complete", 1)
    assert_whole(pacs, tmp_path)


# --- places --------------------------------------------------------------------------------------------


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own below ``folder``; the test is skipped where we may not mount one."""
    place = folder / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_place_for_ledgers_is_refused_before_traffic(pacs: MisbehavingPacs, tmp_path: Path) -> None:
    from airflow_dicom_get.errors import InvalidOption

    state = tmp_path / "state"
    if os.geteuid():
        state.mkdir(mode=0o555)
        with pytest.raises(InvalidOption, match=r"manifest_root: .* cannot be written to"):
            retrieve(pacs.port, pacs.study_uid, tmp_path / "to", manifest_root=state)
    else:  # root may write whatever the mode says, but not on a read-only disk
        with tmpfs(tmp_path, "1m") as disk:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            with pytest.raises(InvalidOption, match=r"manifest_root: .* cannot be written to"):
                retrieve(pacs.port, pacs.study_uid, tmp_path / "to", manifest_root=disk / "state")
            with pytest.raises(InvalidOption, match=r"destination: .* cannot be written to"):
                retrieve(pacs.port, pacs.study_uid, disk / "to")
    assert not pacs.associations
    assert not (tmp_path / "to").exists()


def test_a_destination_that_vanishes_is_no_success(tmp_path: Path) -> None:
    to, gone = tmp_path / "to", tmp_path / "gone"
    state = tmp_path / "state"
    with MisbehavingPacs(series=2, instances=40) as pacs:
        seen = Counter[str]()

        def vanish(event: Any) -> None:
            seen["taken" if event.error is None else "refused"] += 1
            if seen.total() == 10:
                to.rename(gone)

        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=to, manifest_root=state)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid}, on_sub_operation=vanish)
        assert result.verdict in ("partial", "failed")
        assert result.reason == "destination_error"
        assert result.completed <= 10
        assert not to.exists() or not files(to)
        assert sum(pacs.sent.values()) < 80, "asked for the whole study in vain"
        assert result.errors
        shutil.rmtree(to, ignore_errors=True)
        gone.rename(to)
        kept = len(files(to))
        before = pacs.sent
        result = retrieve(pacs.port, pacs.study_uid, to, manifest_root=state)
        assert result.verdict == "complete"
        assert sum((pacs.sent - before).values()) == 80 - kept
        assert files(to).keys() == set(pacs.uids)


@pytest.mark.parametrize("associations", [1, 4])
def test_a_full_disk_ends_the_run_in_order_and_it_goes_on_after_room_is_made(tmp_path: Path, associations: int) -> None:
    together = {"associations": associations, "max_associations": 4}
    with MisbehavingPacs(series=4, instances=25, size=1 << 20) as pacs, tmpfs(tmp_path, "80m") as disk:
        result = retrieve(pacs.port, pacs.study_uid, disk, **together)
        assert (result.verdict, result.reason) == ("partial", "destination_full")
        assert 60 < result.completed < 80
        assert result.transient
        assert any("are not used" in e["error"] for e in result.errors), result.errors
        assert any("Free space" in e["hint"] for e in result.errors)
        assert 0xA700 in pacs.statuses
        assert 0xFE00 in pacs.finals  # cancelled, not cut off
        assert sum(pacs.sent.values()) <= result.completed + 2 * associations
        held = files(disk)
        assert all(held[uid].read_bytes().endswith(pacs.dataset(uid)) for uid in held)
        assert not list(disk.rglob("*.part"))
        # Still full: refused at once, nothing is asked for.
        before = pacs.sent
        result = retrieve(pacs.port, pacs.study_uid, disk, **together)
        assert result.verdict in ("partial", "failed")
        assert result.reason == "destination_full"
        assert not (pacs.sent - before)
        subprocess.run(["mount", "-o", "remount,size=250m", str(disk)], check=True)
        before = pacs.sent
        result = retrieve(pacs.port, pacs.study_uid, disk, **together)
        assert result.verdict == "complete"
        assert result.skipped == len(held)
        assert (pacs.sent - before) == Counter(set(pacs.uids) - held.keys())
        assert_whole(pacs, disk)


# --- two runs at once ------------------------------------------------------------------------------------


def test_two_runs_may_write_the_same_study(tmp_path: Path) -> None:
    with MisbehavingPacs("slow_objects", param=0.004, series=2, instances=40, size=20_000) as pacs:
        results: list[Result] = []
        threads = [
            threading.Thread(target=lambda: results.append(retrieve(pacs.port, pacs.study_uid, tmp_path)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.verdict for result in results] == ["complete", "complete"]
        assert [result.conflicts for result in results] == [0, 0]
        assert len(ledgers(tmp_path)) == 2
        assert len(list(tmp_path.glob("_manifests/*.parquet"))) == 2
        assert_whole(pacs, tmp_path)
        before = pacs.sent
        assert retrieve(pacs.port, pacs.study_uid, tmp_path).skipped == 80
        assert not (pacs.sent - before)


def test_a_run_keeps_its_hands_off_what_a_living_one_is_writing(tmp_path: Path) -> None:
    with MisbehavingPacs("slow_line", param=40_000, series=1, instances=1, size=60_000) as slow:
        results: list[Result] = []
        thread = threading.Thread(target=lambda: results.append(retrieve(slow.port, slow.study_uid, tmp_path)))
        thread.start()
        deadline = time.monotonic() + 5
        while not (parts := list(tmp_path.rglob("*.part"))) and time.monotonic() < deadline:
            time.sleep(0.005)
        dead = parts[0].with_name(parts[0].name.replace(parts[0].name.split(".")[-3], "20200101T000000Z-deadbeef"))
        dead.write_bytes(b"half")
        with MisbehavingPacs(series=1, instances=1, size=60_000) as quick:
            assert retrieve(quick.port, quick.study_uid, tmp_path).verdict == "complete"
        assert parts[0].exists()
        assert not dead.exists()
        thread.join()
        assert results[0].verdict == "complete"
        assert_whole(slow, tmp_path)
