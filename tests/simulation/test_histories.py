"""A sample of histories by chance, and all of one fault: what `make test-simulation` plays in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.exhaustive import POINTS
from tests.simulation.history import History
from tests.simulation.mutations import SEEDS
from tests.simulation.world import play

KEPT = SEEDS / "kept"
HISTORIES = int(os.environ.get("HISTORIES", "2000"))


def run(*command: str) -> str:
    """Run a module of the simulation; its output."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sample_of_histories_holds_what_is_promised() -> None:
    out = run("tests.simulation.simulate", "--seeds", f"0:{HISTORIES}", "--processes", "2")
    assert f"{HISTORIES} histories" in out


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_what_failed_once_does_not_any_more(path: Path) -> None:
    assert not play(History.from_json(path.read_text())).findings


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("destination", sorted(POINTS))
def test_one_fault_wherever_it_comes_makes_nothing_false(destination: str) -> None:
    out = run("tests.simulation.exhaustive", "--faults", "1", "--destination", destination)
    assert out.endswith(": 0 failed\n")
