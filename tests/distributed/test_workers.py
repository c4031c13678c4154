"""Many studies over a pool and two workers, of which one is lost; the API server is away for a while."""

from __future__ import annotations

import os
import time
from collections import Counter
from importlib.metadata import distributions

import pytest

from airflow_dicom_get.testing.s3_servers import SECRET_KEY
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import ENDED, eventually

STUDIES = int(os.environ.get("STUDIES", "300"))
INSTANCES, PIXELS, PAUSE = 4, 16384, 0.15
SLOTS = 4
WORKERS = ("worker-1", "worker-2")
HAS_CELERY = any(distributions(name="apache-airflow-providers-celery"))
pytestmark = pytest.mark.skipif(not HAS_CELERY, reason="not installed: the extra distributed")


@pytest.fixture
def studies(tmp_path):
    """UIDs of the studies in the folder ``pacs``."""
    folder = tmp_path / "pacs"
    return [big_study(folder / f"{n:03}", INSTANCES, PIXELS, name=f"many {n}") for n in range(STUDIES)]


def begun(airflow, worker):
    """How many tasks a worker has begun."""
    return (airflow.home.LOGS / f"{worker}.log").read_text("utf-8").count("Executing workload")


@pytest.mark.timeout(3000)
def test_a_worker_and_the_api_server_are_lost_in_the_middle(airflow, serve, store, studies, tmp_path):
    pacs = serve(tmp_path / "pacs", PAUSE)
    # Its lists are whole however round the number of studies is.
    whole = {"list_limit": 0}
    airflow.connect("pacs", conn_type="dicom", host="127.0.0.1", port=pacs.port, login="PACS", extra=whole)
    began = time.monotonic()
    run = airflow.trigger("many_workers")

    def share(part):
        def sent():
            enough = len(pacs.counted()["sent"]) >= part * STUDIES * INSTANCES
            assert enough or run.state() not in ENDED, f"the run has ended before: see {airflow.home.AIRFLOW_HOME}/logs"
            return enough

        return sent

    eventually("a third is sent", share(1 / 3), 1200)
    pacs.counted("hold")
    eventually("all slots are retrieving", lambda: pacs.counted()["open"] == SLOTS, 120)
    # More than the other worker's three processes can have in hand.
    airflow.kill("worker-1")
    pacs.counted("go")
    eventually("a half is sent", share(1 / 2), 1200)
    airflow.stop("api-server")
    airflow.start("api-server")
    assert not share(1)(), "the API server was away after the end"
    airflow.start("worker-1")
    assert run.wait(1800) == "success"
    seconds = time.monotonic() - began

    counted, tasks = pacs.counted(), run.tasks("get")
    tries = {one["map_index"]: one["try_number"] for one in tasks}
    sent = Counter(counted["sent"])
    print(
        f"\n{STUDIES} studies of {INSTANCES} on {store.__class__.__name__}: {seconds:.0f} s, "
        f"{sum(sent.values())} C-STOREs for {len(sent)} instances, peak {counted['peak']} associations, "
        f"{counted['total']} in all; tries: {dict(Counter(tries.values()))}; "
        f"taken by the workers: {[begun(airflow, name) for name in WORKERS]}"
    )

    # All is held, and every task says so.
    assert len(tasks) == STUDIES
    assert {one["state"] for one in tasks} == {"success"}
    summaries = [run.summary("get", index) for index in tries]
    assert {(one["verdict"], one["completed"], one["failed"]) for one in summaries} == {("complete", INSTANCES, 0)}
    held = [key.split("/") for key in store.objects("night/") if key.endswith(".dcm")]
    assert Counter(study for _, study, *_ in held) == dict.fromkeys(studies, INSTANCES)
    assert len(sent) == STUDIES * INSTANCES

    # What was lost was retrieved again.
    items = run.xcom("find")
    again = {items[index]["study_instance_uid"] for index, number in tries.items() if number > 1}
    assert again, "no task was lost with the worker"
    assert set(sent.values()) <= {1, 2}
    twice = {uid for uid, times in sent.items() if times == 2}
    if store.metadata:
        # No more than the instance that was under way in each association.
        assert sum(sent.values()) - len(sent) <= sum(tries.values()) - STUDIES
    else:
        # Besides, what no ledger in the bucket told yet: at most five seconds of the studies that were lost.
        assert twice <= {name.removesuffix(".dcm") for _, study, _, name in held if study in again}
    # The limit of the PACS held over both workers and all of their ends.
    assert counted["peak"] == SLOTS
    eventually("no association is left", lambda: pacs.counted()["open"] == 0, 10)
    assert SECRET_KEY not in run.log("get", 1, 0)
