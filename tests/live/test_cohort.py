"""A cohort of the size that a researcher brings: thousands of accession numbers, each of a small study."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
from pydicom import dcmread

from airflow_dicom_get import load_manifest
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import LiveAirflow, eventually

STUDIES = int(os.environ.get("COHORT_STUDIES") or 0)
INSTANCES, PIXELS, SLOTS = 2, 2048, 4
SHARDS = max(4, min(200, STUDIES // 25))
DAG = Path(__file__).parents[2] / "dags" / "cohort_from_csv.py"

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not STUDIES, reason="not named: COHORT_STUDIES, for make test-cohort"),
]


def listed(folder: Path) -> tuple[dict[str, str], Counter[tuple[str, ...]]]:
    """Of the files of a PACS: the label of each accession number, and every row that the cohort is to have."""
    labels: dict[str, str] = {}
    rows: Counter[tuple[str, ...]] = Counter()
    for path in sorted(folder.rglob("*.dcm")):
        ds = dcmread(path, stop_before_pixels=True)
        label = labels.setdefault(ds.AccessionNumber, ("case", "control")[len(labels) % 2])
        size = path.stat().st_size - 144 - ds.file_meta.FileMetaInformationGroupLength
        rows[ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, str(size), label] += 1
    return labels, rows


class Watch:
    """Once a second: the machine's load, and the most that one process of each component has held, in MiB."""

    def __init__(self, live: LiveAirflow) -> None:
        self._live = live
        self._over = threading.Event()
        self.most: dict[str, int] = {}
        self.load: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(1):
            self.load.append(os.getloadavg()[0])
            for name, process in list(self._live.processes.items()):
                for pid in self._live.home.session_members(process.pid):
                    # What the scheduler has started are the tasks and what watches over them.
                    who = "task" if name == "scheduler" and pid != process.pid else name
                    with contextlib.suppress(OSError, IndexError, ValueError):
                        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                        self.most[who] = max(self.most.get(who, 0), pages * os.sysconf("SC_PAGE_SIZE") >> 20)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def kill_one(run) -> int:
    """SIGKILL to the process of a task that retrieves; gives its map index."""
    for one in run.tasks("get"):
        if one["state"] == "running" and one["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one["pid"], signal.SIGKILL)
                return int(one["map_index"])
    return -1


def test_a_cohort_of_thousands(tmp_path, record):
    source, dags = tmp_path / "pacs", tmp_path / "dags"
    for n in range(STUDIES):
        big_study(source / f"{n // 100:03}" / f"{n:06}", INSTANCES, PIXELS, name=f"cohort {n}")
    labels, expected = listed(source)
    file = tmp_path / "cohort.csv"
    file.write_text("".join(f"{key},{label}\n" for key, label in [("AccessionNumber", "Cohort"), *labels.items()]))
    dags.mkdir()
    text = DAG.read_text("utf-8")
    for usual, changed in (("max_active_tis_per_dag=2", f"max_active_tis_per_dag={SLOTS}"), ("minutes=5", "seconds=5")):
        assert usual in text
        text = text.replace(usual, changed)
    (dags / DAG.name).write_text(text, "utf-8")
    with EmbeddedPacs(source, ae_title="PACS", require_called_ae=True) as pacs:
        asked: Counter[str] = Counter()
        find = pacs.archive.find

        def counting(level, *args, **kwargs):
            asked[level] += 1
            return find(level, *args, **kwargs)

        pacs.archive.find = counting  # type: ignore[method-assign]
        environment = {
            "AIRFLOW_CONN_DICOM_DEFAULT": f"dicom://PACS@127.0.0.1:{pacs.port}/?max_associations={SLOTS}",
            "AIRFLOW__CORE__MAX_MAP_LENGTH": str(SHARDS),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
            "DICOM_DESTINATION": str(tmp_path / "held"),
            "DICOM_LISTS": str(tmp_path),
        }
        folder = tmp_path / "live"
        folder.mkdir()
        with LiveAirflow(folder, dags=dags, environment=environment) as live, Watch(live) as watch:
            live.make_pool("pacs", SLOTS)
            run = live.trigger("cohort_from_csv", csv=str(file), destination=str(tmp_path / "held"))
            found = run.wait_task("find", ["success", "failed"], seconds=1200)
            assert found["state"] == "success", run.log("find")[-3000:]
            to_find = {"seconds": round(found["duration"], 1), **asked, "associations": pacs.total_associations}
            assert asked["STUDY"] <= len(labels) + 1
            assert pacs.total_associations <= 2
            begun = time.monotonic()
            eventually("a tenth is sent", lambda: len(pacs.sent) >= sum(expected.values()) // 10, 600)
            killed = eventually("a task is killed", lambda: kill_one(run) + 1, 60) - 1
            assert run.wait(2400) == "success"
            seconds = time.monotonic() - begun
            tasks = run.tasks("get")
            assert {one["map_index"] for one in tasks if one["try_number"] > 1} == {killed}
            frame = load_manifest(run.xcom("label")["manifest_uri"])
            columns = ["study_instance_uid", "series_instance_uid", "sop_instance_uid", "dataset_bytes", "cohort"]
            assert Counter(tuple(map(str, row)) for row in frame[columns].itertuples(index=False)) == expected
            assert set(frame["state"]) <= {"stored", "held"}
            assert sum(1 for _ in (tmp_path / "held").rglob("*.dcm")) == sum(expected.values())
            # What was under way in the task that was killed.
            assert sum(pacs.sent.values()) <= sum(expected.values()) + 1
            assert pacs.peak_associations <= SLOTS
            report = run.xcom("report")
            assert (report["studies"], report["instances"]) == (STUDIES, sum(expected.values()))
            page = [live.answer("GET", "/dicom-get/").elapsed.total_seconds() for _ in range(5)]
            engine = sum(run.summary("get", one["map_index"])["duration_seconds"] for one in tasks)
            record(
                studies=STUDIES,
                instances=sum(expected.values()),
                tasks=len(tasks),
                to_find=to_find,
                get_seconds=round(seconds, 1),
                task_median=round(median(one["duration"] for one in tasks), 2),
                task_seconds_per_study=round(sum(one["duration"] for one in tasks) / STUDIES, 3),
                engine_seconds_per_study=round(engine / STUDIES, 3),
                finds={level: count - to_find.get(level, 0) for level, count in asked.items()},
                associations=pacs.total_associations,
                memory_mib=watch.most,
                load=(round(median(watch.load), 1), round(max(watch.load), 1)),
                page=round(median(page), 2),
            )
