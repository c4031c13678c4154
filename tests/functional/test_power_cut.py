"""Power cuts under real processes, on a file system of our own that forgets what was not synced.

Here it forgets all of it; what else a power cut may leave is tried by the simulation, on a model of the disk.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.manifest.frames import read_manifest
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from tests.support import forgetful

KILLS = int(os.environ.get("KILLS", "2"))


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if what := forgetful.lacking():
        pytest.skip(f"missing: {what}")
    with forgetful.mounted(tmp_path_factory.mktemp("forgetful") / "mount") as folder:
        yield folder


@pytest.fixture(scope="module")
def pacs() -> Iterator[MisbehavingPacs]:
    with MisbehavingPacs(series=3, instances=8, size=20_000) as server:
        yield server


def retrieve(pacs: MisbehavingPacs, destination: Path) -> Result:
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=destination)
    return scu.get_study({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": pacs.study_uid})


def held(destination: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in destination.rglob("*.dcm")}


def assert_whole(pacs: MisbehavingPacs, destination: Path) -> None:
    found = held(destination)
    assert found.keys() == set(pacs.uids)
    assert all(content.endswith(pacs.dataset(uid)) for uid, content in found.items())


@pytest.mark.parametrize("below", ["", "not/there/yet"])
def test_complete_outlasts_a_power_cut(mount: Path, pacs: MisbehavingPacs, below: str) -> None:
    destination = mount / f"complete{len(below)}" / below if below else mount
    result = retrieve(pacs, destination)
    assert result.verdict == "complete"
    forgetful.cut_power(mount)
    assert_whole(pacs, destination)
    assert set(read_manifest(result.manifest_uri or "").state) == {"stored"}
    before = pacs.sent
    again = retrieve(pacs, destination)
    assert (again.verdict, again.skipped) == ("complete", len(pacs.uids)), "the ledger is there too"
    assert not pacs.sent - before


def begin_and_kill(pacs: MisbehavingPacs, destination: Path, when: Callable[[], bool]) -> None:
    """Kill a run as soon as it has come so far."""
    node, study = f"PACS@127.0.0.1:{pacs.port}", pacs.study_uid
    process = subprocess.Popen(
        [sys.executable, "-m", "airflow_dicom_get.cli", "get", node, "--study", study, "--to", str(destination)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not when() and process.poll() is None:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_run_has_recorded_outlasts_a_power_cut_once_another_counts_on_it(mount: Path) -> None:
    def some_are_durable() -> bool:
        return any('"durable"' in path.read_text() for path in destination.rglob("*.jsonl"))

    destination = mount / "counted"
    with MisbehavingPacs("stall_mid", heal_after=1, series=1, instances=8, size=20_000) as pacs:
        begin_and_kill(pacs, destination, some_are_durable)
        result = retrieve(pacs, destination)
        assert result.verdict == "complete"
        assert result.skipped > 0
        forgetful.cut_power(mount)
        assert_whole(pacs, destination)
        before = pacs.sent
        again = retrieve(pacs, destination)
        assert (again.verdict, again.skipped) == ("complete", len(pacs.uids))
        assert not pacs.sent - before


@pytest.mark.parametrize("number", range(KILLS))
def test_a_power_cut_in_the_midst_of_a_run_is_made_good_by_the_next(
    mount: Path, pacs: MisbehavingPacs, number: int
) -> None:
    chance = random.Random(f"power cut {number}")
    before, destination = pacs.sent, mount / f"killed{number}"
    moment = chance.randrange(len(pacs.uids))
    begin_and_kill(pacs, destination, lambda: sum((pacs.sent - before).values()) > moment)
    forgetful.cut_power(mount)
    left = held(destination)
    result = retrieve(pacs, destination)
    assert result.verdict == "complete"
    forgetful.cut_power(mount)
    assert_whole(pacs, destination)
    # What was confirmed and is no more in the ledger, which was not synced yet, is asked for and compared.
    assert result.skipped <= sum(content.endswith(pacs.dataset(uid)) for uid, content in left.items())
