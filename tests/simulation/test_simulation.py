"""Whole retrievals in one thread, from a seed: quiet ones, and any (DESIGN, section 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.net.transcript import line_of
from airflow_dicom_get.testing.misbehaving import archive, wire
from tests.simulation.history import History, Run, history_of
from tests.simulation.mutations import MUTATIONS, SEEDS, taken_out
from tests.simulation.pacs import Habits
from tests.simulation.shrink import failure
from tests.simulation.world import World, play


def quiet(*runs: Run, **parts: object) -> World:
    """A history of an honest PACS with three instances."""
    study = archive.build(series=1, instances=3, size=1500, pairs=((archive.CT, wire.EXPLICIT_LE),))
    given = {"instances": tuple(study), "habits": Habits(), "query": {"StudyInstanceUID": archive.STUDY_UID}}
    return play(History(1, steps=runs, **{**given, **parts}))  # type: ignore[arg-type]


def test_an_honest_pacs_and_a_good_disk_make_a_complete_retrieval() -> None:
    world = quiet(Run({}))
    assert world.findings == []
    assert [run.verdict for run in world.runs] == ["complete", "complete"]
    assert [get.level for get in world.pacs.gets] == ["SERIES"]


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_the_same_seed_gives_the_same_history(seed: int) -> None:
    one, other = play(history_of(seed)), play(history_of(seed))
    assert one.trace == other.trace
    assert one.pacs.log == other.pacs.log
    assert one.findings == other.findings


@pytest.mark.parametrize("seed", range(2, 40, 8))
def test_a_transcript_changes_nothing_and_tells_what_was_said(seed: int) -> None:
    told: list[dict[str, Any]] = []
    one, other = play(history_of(seed)), play(history_of(seed), told)
    assert one.trace == other.trace
    assert one.pacs.log == other.pacs.log
    entries = [json.loads(line_of(entry)) for entry in told]
    assert {"connect", "A-ASSOCIATE-RQ", "C-FIND-RQ"} <= {entry["message"] for entry in entries}
    assert len({entry["run"] for entry in entries}) <= len(one.runs)


@pytest.mark.parametrize("seed", range(20))
def test_a_history_is_kept_as_text(seed: int) -> None:
    history = history_of(seed)
    assert History.from_json(history.to_json()) == history


# --- what failed once, and what would fail again ---------------------------------------------------


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*.json")), ids=lambda path: path.stem)
def test_what_failed_once_does_no_more(path: Path) -> None:
    assert play(History.from_json(path.read_text())).findings == []


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_a_mending_that_is_taken_out_is_missed(name: str) -> None:
    history = History.from_json((SEEDS / f"{name}.json").read_text())
    with taken_out(name) as mutation:
        assert failure(history) == mutation.shows


def test_the_page_of_proofs_names_each_mending_that_is_taken_out() -> None:
    text = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
    assert [name for name in MUTATIONS if f"`{name}`" not in text] == []
