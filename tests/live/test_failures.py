"""What goes wrong in a real Airflow: each time the study is held whole in the end, and nothing is fetched twice."""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import eventually

INSTANCES = 60
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def study(tmp_path):
    return big_study(tmp_path / "pacs", INSTANCES, 65536, name="failures", series=3)


@pytest.fixture
def pacs(study, serve, tmp_path):
    """It takes nine seconds for the study; ``pacs.before_send = None`` makes it quick."""
    return serve(tmp_path / "pacs", before_send=lambda uid: time.sleep(0.15))


@pytest.fixture
def begun(airflow, pacs, study, tmp_path):
    """A run whose task has got ten instances."""
    run = airflow.trigger("live_study", study=study, destination=str(tmp_path / "out"))
    eventually("ten instances are sent", lambda: len(pacs.sent) >= 10)
    assert run.task("get")["state"] == "running"
    return run


def hurry(pacs):
    """From now on it takes no time."""
    pacs.before_send = None


def check_end(run, pacs, folder, *, tries, sent_twice=1, seconds=120):
    """The run is a success, all is held, and what was held before was not sent again."""
    assert run.wait(seconds) == "success"
    task = run.task("get")
    assert (task["state"], task["try_number"]) == ("success", tries)
    summary = run.summary()
    assert (summary["verdict"], summary["completed"], summary["failed"]) == ("complete", INSTANCES, 0)
    assert len(list(folder.rglob("*.dcm"))) == INSTANCES
    assert not list(folder.rglob("*.part"))
    assert len(pacs.sent) == INSTANCES
    # What was under way when the line broke.
    assert sum(pacs.sent.values()) <= INSTANCES + sent_twice
    assert pacs.peak_associations == 1
    eventually("no association is left", lambda: pacs.associations == 0, 10)
    return summary


def test_marked_failed_and_cleared(begun, pacs, tmp_path):
    begun.mark("get", "failed")
    eventually("the association is over", lambda: pacs.associations == 0, 20)
    before = sum(pacs.sent.values())
    assert before < INSTANCES
    begun.wait_task("get", ["failed"])
    assert begun.wait() == "failed"
    assert sum(pacs.sent.values()) == before
    # Its last lines reach the log when the association is over already.
    eventually("the log says why", lambda: "cancelled" in begun.log("get", 1), 20)
    hurry(pacs)
    begun.clear("get")
    eventually("it runs again", lambda: begun.task("get")["try_number"] == 2)
    summary = check_end(begun, pacs, tmp_path / "out", tries=2)
    assert summary["skipped"] >= before - 1


def test_cleared_while_it_runs(begun, pacs, tmp_path):
    begun.clear("get")
    eventually("the association is over", lambda: pacs.associations == 0, 20)
    assert len(pacs.sent) < INSTANCES
    hurry(pacs)
    check_end(begun, pacs, tmp_path / "out", tries=2)


def test_the_process_of_the_task_is_killed(begun, pacs, tmp_path):
    os.kill(begun.task("get")["pid"], signal.SIGKILL)
    begun.wait_task("get", ["up_for_retry", "queued", "running"])
    hurry(pacs)
    check_end(begun, pacs, tmp_path / "out", tries=2)


def test_a_scheduler_that_is_stopped_lets_the_task_end(airflow, begun, pacs, tmp_path):
    pacs.before_send = lambda uid: time.sleep(0.05)
    assert len(pacs.sent) < INSTANCES
    airflow.stop("scheduler")
    assert begun.task("get")["state"] == "success"
    airflow.start("scheduler")
    check_end(begun, pacs, tmp_path / "out", tries=1, sent_twice=0)


def test_the_host_of_the_scheduler_is_lost(airflow, begun, pacs, tmp_path):
    airflow.kill("scheduler")
    eventually("the association is over", lambda: pacs.associations == 0, 20)
    assert begun.task("get")["state"] == "running"
    hurry(pacs)
    airflow.start("scheduler")
    check_end(begun, pacs, tmp_path / "out", tries=2, seconds=240)


def test_the_pacs_is_away_for_a_while(airflow, begun, pacs, tmp_path):
    pacs.stop()
    begun.wait_task("get", ["up_for_retry"], seconds=120)
    # By the page: Airflow 3.4 gives no XCom of a try that is over by its REST interface.
    shown = airflow.answer("GET", f"/dicom-get/dags/{begun.dag_id}/runs/{begun.run_id}/tasks/get/-1").text
    assert "partial" in shown
    found = re.search(rf"(\d+) of {INSTANCES}", shown)
    assert found
    completed = int(found[1])
    assert 0 < completed < INSTANCES
    hurry(pacs)
    pacs.start()
    again = check_end(begun, pacs, tmp_path / "out", tries=2)
    assert again["skipped"] >= completed


def test_the_hours_end_in_the_middle(airflow, study, serve, tmp_path):
    # Open but for one minute, which begins soon.
    closes = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    opens = closes + timedelta(minutes=1)
    pause = 1.5 * (closes - datetime.now(UTC)).total_seconds() / INSTANCES
    pacs = serve(
        tmp_path / "pacs",
        extra={"window": f"{opens:%H:%M}-{closes:%H:%M}"},
        before_send=lambda uid: time.sleep(pause),
    )
    run = airflow.trigger("live_study", study=study, destination=str(tmp_path / "out"))
    run.wait_task("get", ["deferred"], seconds=120)
    assert datetime.now(UTC) >= closes
    eventually("no association is left", lambda: pacs.associations == 0, 10)
    before, summary = sum(pacs.sent.values()), run.summary()
    assert (summary["verdict"], summary["reason"]) == ("partial", "window")
    assert datetime.fromisoformat(summary["resume_at"]) == opens
    hurry(pacs)
    assert sum(pacs.sent.values()) == before
    again = check_end(run, pacs, tmp_path / "out", tries=1, seconds=150)
    assert datetime.now(UTC) >= opens
    assert again["skipped"] >= before - 1


def test_a_run_without_a_logical_date(airflow, study, serve, tmp_path):
    pacs = serve(tmp_path / "pacs")
    run = airflow.trigger("live_night", destination=str(tmp_path / "out"))
    assert airflow.call("GET", run.path)["logical_date"] is None
    assert run.wait() == "success"
    assert run.summary("get", 0)["completed"] == INSTANCES
    assert set(pacs.sent.values()) == {1}
    begun = [one["start_date"] for one in (run.task("find"), run.task("get", 0))]
    assert all(first < second for first, second in pairwise(begun))
    assert study in run.task("get", 0)["rendered_map_index"]
