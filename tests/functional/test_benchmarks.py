"""The benchmark script runs: a small sample, its report and its plot, and the report written again from its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_dicom_get.testing.servers import require

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("getscu")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    work = tmp_path_factory.mktemp("work")
    done = run("--quick", "--only=ct,far,dcmqrscp,tiny,help,cohort", f"--output={folder}", f"--folder={work}")
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir())
    return folder


@pytest.mark.dcmtk
def test_each_client_is_measured(report: Path) -> None:
    series = json.loads((report / "performance.json").read_text())["series"]
    assert set(series) == {"ct", "far", "dcmqrscp", "tiny", "help", "cohort"}
    assert set(series["ct"]["runs"]) == {"warm", "process", "tuned", "shipped", "pynetdicom"}
    for one in series.values():
        for runs in one["runs"].values():
            assert len(runs) == 1
            assert 0 < runs[0]["wall"] < 60
    # The launcher's own memory is not a part of what it reports.
    assert 2e6 < series["ct"]["runs"]["tuned"][0]["rss"] < 30e6 < series["ct"]["runs"]["process"][0]["rss"]


@pytest.mark.dcmtk
def test_report_has_a_table_for_each_source_and_a_plot(report: Path) -> None:
    page = (report / "performance.md").read_text()
    for text in ("From memory, 20 × 512 KiB", "From dcmqrscp", "| getscu as shipped | 1 |", "A quick run"):
        assert text in page
    # A sample says nothing about the aims.
    assert "## Aims" not in page
    assert (report / "images" / "performance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.dcmtk
def test_report_is_written_again_with_aims_and_keeps_what_was_added_by_hand(report: Path, tmp_path: Path) -> None:
    data = json.loads((report / "performance.json").read_text())
    series = data["series"]
    data["quick"] = False
    series["ct"]["runs"]["warm"] = [{"wall": 2.0, "user": 1.0, "system": 0.5}]
    series["ct"]["runs"]["tuned"] = [{"wall": 1.0, "user": 0.1, "system": 0.5}]
    for key, instances, rss in (("tiny", 1000, 110_000_000), ("many", 20000, 119_500_000)):
        run_of_it = {"wall": 1.0, "user": 0.5, "system": 0.5, "rss": rss}
        series[key] = {"title": key, "instances": instances, "size": 1000, "runs": {"process": [run_of_it]}}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(data))
    page = tmp_path / "performance.md"
    page.write_text((report / "performance.md").read_text() + "\n## Remarks\n\nA word by hand.\n")
    assert run(f"--render={changed}", f"--output={tmp_path}").returncode == 0
    text = page.read_text()
    assert "| ≤ 1.60 × | 2.00 × | **missed by 0.40 ×** (25%) |" in text
    assert "| ≤ 1.00 KB | 0.50 KB | reached |" in text
    assert "| ≤ 0.38 s | – | not measured |" in text
    assert text.endswith("-->\n\n## Remarks\n\nA word by hand.\n")
    assert text.count("## Aims") == 1


def test_an_unknown_part_is_refused() -> None:
    done = run("--quick", "--only=ct,xy")
    assert done.returncode == 2
    assert "xy is none of ct, mr, big" in done.stderr
