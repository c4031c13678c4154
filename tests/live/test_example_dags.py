"""The DAGs of the repository in a real Airflow: what only a scheduler and a triggerer do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, Moto
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.live_airflow import LiveAirflow, Run, eventually
from tests.support.mailbox_server import Mailbox, texts

DAGS = Path(__file__).parents[2] / "dags"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a study of sixty instances, and its UID."""
    folder = tmp_path_factory.mktemp("pacs")
    return folder, big_study(folder / "one", 60, 8192, series=3)


@pytest.fixture(scope="module")
def pacs(archive) -> Iterator[EmbeddedPacs]:
    with EmbeddedPacs(archive[0]) as server:
        yield server


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    with Mailbox() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory, pacs, mailbox) -> Iterator[LiveAirflow]:
    """All DAGs, of which the nightly one is triggered, late after a second and soon tried again; no pool, no bucket."""
    folder = tmp_path_factory.mktemp("examples")
    dags = folder / "dags"
    shutil.copytree(DAGS, dags, ignore=shutil.ignore_patterns("__pycache__"))
    nightly = dags / "nightly_to_s3.py"
    text = nightly.read_text("utf-8")
    for usual, changed in (
        ("timedelta(hours=5)", "timedelta(seconds=1)"),
        ('"retry_delay": timedelta(minutes=5)', '"retry_delay": timedelta(seconds=1)'),
        ('SCHEDULE = "0 1 * * *"', "SCHEDULE = None"),
    ):
        assert usual in text
        text = text.replace(usual, changed)
    nightly.write_text(text, "utf-8")
    environment = {
        "AIRFLOW_CONN_DICOM_DEFAULT": f"dicom://PACS@127.0.0.1:{pacs.port}",
        "AIRFLOW_CONN_SMTP_DEFAULT": mailbox.connection,
        "DICOM_BUCKET": f"{BUCKET}/night",
        "DICOM_DESTINATION": str(folder / "held"),
        "DICOM_REPORTS": str(folder / "reports"),
        "DICOM_SETTLED_MINUTES": "0.05",
        "DICOM_LOOKBACK_DAYS": "20000",
    }
    with LiveAirflow(folder, dags=dags, environment=environment) as live:
        yield live


def unpause(home: LiveAirflow, *names: str) -> None:
    for name in names:

        def known(path: str = f"/api/v2/dags/{name}") -> bool:
            return bool(home.answer("GET", path).status_code == 200)

        eventually(name, known)
        home.call("PATCH", f"/dags/{name}", json={"is_paused": False})


def test_without_its_pool_the_night_waits_and_a_mail_names_it(home, mailbox):
    unpause(home, "nightly_to_s3", "analyse_manifest")
    run = home.trigger("nightly_to_s3", study_date="2024-01-15")
    (letter,) = eventually("a mail", lambda: mailbox.letters)
    assert letter["subject"] == "nightly_to_s3: not over by the morning"
    assert run.run_id in texts(letter)
    assert "the pool pacs is full or missing" in texts(letter)
    assert run.task("find")["state"] in (None, "scheduled")


def test_without_a_bucket_the_night_says_how_to_connect_one_and_writes_a_mail(home, mailbox):
    home.make_pool("pacs", 2)
    (waiting,) = home.call("GET", "/dags/nightly_to_s3/dagRuns", params={"state": "running"})["dag_runs"]
    run = Run(home, "nightly_to_s3", waiting["dag_run_id"])
    assert run.wait() == "failed"
    # A connection may only seem to be missing: all tries are used, and the log of each says how to make one.
    assert run.task("get", 0)["try_number"] == 4
    for number in range(1, 5):
        log = run.log("get", number, map_index=0)
        assert "Create it under Admin, Connections, with the type DICOM storage (S3)." in log
    assert "1 task left no summary; its log says why." in run.log("report")
    assert run.task("publish")["state"] == "skipped"
    _, letter = eventually("another mail", lambda: mailbox.letters[1:] and mailbox.letters)
    assert letter["subject"] == "nightly_to_s3: report failed"
    assert run.run_id in texts(letter)


def test_a_night_sets_off_its_report(home, tmp_path):
    with Moto(tmp_path / "s3") as service:
        keys = {"login": ACCESS_KEY, "password": SECRET_KEY, "extra": {"scheme": "http"}}
        home.connect("dicom_s3_default", conn_type="dicom_s3", host="127.0.0.1", port=service.port, **keys)
        run = home.trigger("nightly_to_s3", study_date="2024-01-15", bucket=f"{BUCKET}/night")
        assert run.wait() == "success"
        assert "60 of 60 instances of 1 study are held (1 complete)." in run.log("report")
        found = eventually(
            "a run of analyse_manifest", lambda: home.call("GET", "/dags/analyse_manifest/dagRuns")["dag_runs"]
        )
        (looked,) = [Run(home, "analyse_manifest", one["dag_run_id"]) for one in found]
        assert found[0]["run_type"] == "asset_triggered"
        assert looked.wait() == "success"
        entry = home.call("GET", f"{looked.path}/taskInstances/analyse/xcomEntries/return_value")["value"]
        summary = json.loads(entry) if isinstance(entry, str) else entry
        assert (summary["studies"], summary["instances"], summary["missing"]) == (1, 60, 0)
        assert "60 of 60 instances are held" in Path(summary["report"]).read_text("utf-8")


def test_a_new_study_is_waited_for_in_the_triggerer(home, archive):
    unpause(home, "on_new_study")
    home.make_pool("pacs", 2)
    run = home.trigger("on_new_study", study=archive[1])
    run.wait_task("arrived", ["deferred"])
    assert run.wait() == "success"
    assert sum(1 for _ in (home.home.FOLDER / "held").glob("[0-9]*/*/*.dcm")) == 60


def test_new_studies_start_a_dag_by_themselves(home):
    home.make_pool("pacs", 2)
    unpause(home, "on_new_study_event")
    path = "/dags/on_new_study_event/dagRuns"
    (found,) = eventually("a run of on_new_study_event", lambda: home.call("GET", path)["dag_runs"])
    run = Run(home, "on_new_study_event", found["dag_run_id"])
    assert run.wait() == "success"
    summary = run.summary("get", 0)
    assert (summary["verdict"], summary["total"]) == ("complete", 60)
