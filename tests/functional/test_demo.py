"""The demo, as `make demo` runs it twice: what it prints, and what stands in its logs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="needs the airflow extra"),
]

PATH = os.pathsep.join(folder for folder in os.get_exec_path() if Path(folder) != Path(sys.executable).parent)
SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """What two runs print, one after the other."""
    texts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(SCRIPT)],
            # As in an activated environment, in which pynetdicom has a getscu too.
            env={
                **os.environ,
                "DICOM_DEMO_FOLDER": str(folder),
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), PATH]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        texts.append(done.stdout)
    return texts


def test_the_second_run_says_that_all_was_there_before(printed: list[str]) -> None:
    first, second = printed
    assert "Verdict   complete: 7 of 7 studies complete" in first
    assert "58 of 58 instances held and verified" in first
    assert "; 58 fetched, 0 already there" in first
    assert "all of them already there: nothing was fetched" in second
    assert "creating its database" in first
    assert "creating its database" not in second


def test_half_a_study_is_noticed_and_getscu_does_not(printed: list[str], folder: Path) -> None:
    for text in printed:
        half = text.partition("Half a study")[2].partition("Files ")[0]
        ours = half.partition("$ dicom-get get")[2]
        assert "4 of 8 instances listed are held, 4 not held" in ours
        assert ours.rstrip().endswith("exit status 3")
        if shutil.which("getscu", path=PATH):
            theirs = half.partition("$ getscu")[2].partition("$ dicom-get")[0]
            assert "exit status 0, no output" in theirs
            assert "4 files in " in theirs
        else:
            assert "sudo apt-get install dcmtk" in half


@pytest.mark.usefixtures("printed")
def test_logs_of_a_good_run_complain_of_nothing(folder: Path) -> None:
    logs = [*(folder / "logs").glob("*.log"), *(folder / "airflow" / "logs").rglob("*.log")]
    assert (folder / "logs" / "airflow.log") in logs
    complaints = [
        line
        for log in logs
        for line in log.read_text("utf-8").splitlines()
        if re.search(r"\[(warning|error|critical) *\]|Traceback|default_pool", line)
    ]
    assert complaints == []
