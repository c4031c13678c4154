"""Many studies over a pool: the limits of the PACS hold over all tasks together, and a task costs little."""

from __future__ import annotations

import os
import threading
import time
from statistics import median

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.relay import Relay

STUDIES, INSTANCES, PIXELS = int(os.environ.get("LIVE_STUDIES", "200")), 3, 32768


def studies(folder, count, instances, pixels):
    """Fill a folder, one study a sub-folder."""
    return [big_study(folder / f"{n:03}", instances, pixels, name=f"live {n}") for n in range(count)]


class Meter:
    """How many bytes a relay had passed on, ten times a second."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._over = threading.Event()
        self.seen: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.seen.append((time.monotonic(), self._relay.down))

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def fastest(self, seconds: float) -> float:
        """The most bytes per second over any span of so many seconds."""
        most, first = 0.0, 0
        for last, (at, down) in enumerate(self.seen):
            while at - self.seen[first + 1][0] >= seconds if first + 1 < last else False:
                first += 1
            begun, before = self.seen[first]
            if at - begun >= seconds:
                most = max(most, (down - before) / (at - begun))
        return most


@pytest.mark.timeout(900)
def test_many_studies_over_a_pool_of_two(airflow, serve, tmp_path, record):
    uids = studies(tmp_path / "pacs", STUDIES, INSTANCES, PIXELS)
    # It never cuts a list, and they all have one date and time, by which a list of 200 rows could not be confirmed.
    pacs = serve(tmp_path / "pacs", extra={"list_limit": 0})
    begun = time.monotonic()
    run = airflow.trigger("live_night", destination=str(tmp_path / "out"))
    assert run.wait(800) == "success"
    seconds = time.monotonic() - begun
    peak, sent = pacs.peak_associations, dict(pacs.sent)
    tasks = run.tasks("get")
    assert len(tasks) == STUDIES
    assert {one["try_number"] for one in tasks} == {1}
    assert peak == 2
    assert len(sent) == STUDIES * INSTANCES
    assert set(sent.values()) == {1}
    assert pacs.associations == 0
    assert {file.parent.parent.name for file in (tmp_path / "out").rglob("*.dcm")} == set(uids)
    # The same studies by the engine alone, one after the other.
    bare = []
    for uid in uids[:20]:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=str(tmp_path / "bare"))
        at = time.monotonic()
        assert scu.get_study({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": uid}).verdict == "complete"
        bare.append(time.monotonic() - at)
    summaries = [run.summary("get", one["map_index"]) for one in tasks]
    durations = [one["duration"] for one in tasks]
    record(
        studies=STUDIES,
        seconds=round(seconds, 1),
        peak_associations=peak,
        task_median=round(median(durations), 2),
        task_p95=round(sorted(durations)[int(0.95 * STUDIES)], 2),
        engine_in_task_median=round(median(one["duration_seconds"] for one in summaries), 3),
        engine_bare_median=round(median(bare), 3),
        overhead_median=round(median(durations) - median(bare), 2),
    )


@pytest.mark.timeout(600)
def test_the_rate_of_the_connection_holds_over_all_tasks(airflow, serve, tmp_path, record):
    rate, count = 2_000_000, 6
    studies(tmp_path / "pacs", count, 64, 65536)
    relays = []

    def through(pacs):
        relays.append(Relay(pacs.host, pacs.port, keep_data=False).__enter__())
        return relays[0]

    pacs = serve(tmp_path / "pacs", through=through, extra={"bytes_per_second": rate, "max_associations": 2})
    try:
        with Meter(relays[0]) as meter:
            run = airflow.trigger("live_night", destination=str(tmp_path / "out"))
            assert run.wait(500) == "success"
    finally:
        relays[0].__exit__()
    assert pacs.peak_associations == 2
    assert set(pacs.sent.values()) == {1}
    fastest = meter.fastest(5)
    record(rate=rate, studies=count, bytes=relays[0].down, fastest_5_seconds=round(fastest))
    assert fastest <= 1.03 * rate
    # With less than this, one task alone would do, and nothing be shown.
    assert fastest > 0.6 * rate
