"""A viewer of the DAG sees nothing of a patient, wherever he looks; nor do the database and the logs hold it."""

from __future__ import annotations

import io
import re

import pyarrow.parquet as pq
import pytest

from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study, set_elements

pytestmark = pytest.mark.timeout(600)

PATIENT = {
    0x00080050: "ACCNR90210",
    0x00080090: "Hasenfratz^Ottilie",
    0x00081030: "Geheimbefund",
    0x00100010: "Zwiebelmann^Xaver",
    0x00100020: "PQ7431ZW",
    0x00100030: "19331107",
    0x00104000: "Klosterhof 17",
}
NEEDLES = re.compile(
    "|".join(["ACCNR90210", "Hasenfratz", "Geheimbefund", "Zwiebelmann", "PQ7431ZW", "1933-?11-?07", "Klosterhof"])
    + "|HOSTILE.?PATIENT",
    re.IGNORECASE,
)
TASKS = ("wait", "find", "get", "by_query", "forward", "store", "verify", "hostile")


@pytest.fixture
def held(tmp_path):
    """Two studies of the patient, 12 instances each; gives the UIDs of the first."""
    from pydicom import dcmread

    folder = tmp_path / "pacs"
    for name in ("one", "two"):
        big_study(folder / name, 12, 8192, name=f"private {name}", series=2)
    for path in folder.rglob("*.dcm"):
        path.write_bytes(set_elements(path.read_bytes(), PATIENT))
    return [str(dcmread(path).SOPInstanceUID) for path in sorted((folder / "one").iterdir())]


def places(airflow, run):
    """What to put for the names in the addresses of the REST interface: one set for each task instance and XCom."""
    fixed = {
        "dag_id": run.dag_id,
        "dag_run_id": run.run_id,
        "pool_name": "pacs",
        "connection_id": "pacs",
        "variable_key": "who",
    }
    for task_id in TASKS:
        for one in run.tasks(task_id):
            index = one["map_index"]
            task = {"task_id": task_id, "map_index": str(index), "try_number": "1", "task_try_number": "1"}
            path = f"{run.path}/taskInstances/{task_id}/xcomEntries"
            keys = airflow.call("GET", path, params={"map_index": index})["xcom_entries"]
            stored = f"{run.path}/taskInstances/{task_id}/state-store"
            states = airflow.answer("GET", f"/api/v2{stored}", params={"map_index": index})
            names = [entry["key"] for entry in keys] or ["none"]
            kept = [entry["key"] for entry in states.json().get("task_state_store", ())] or ["none"]
            for number in range(max(len(names), len(kept))):
                name, key = names[number % len(names)], kept[number % len(kept)]
                yield {**fixed, **task, "xcom_key": name, "key": key}


def answers(airflow, run, user):
    """Every answer of the REST interface and of the page that is about this run; by address."""
    found = {}
    paths = airflow.answer("GET", "/openapi.json").json()["paths"]
    readable = [path for path, methods in paths.items() if "get" in methods]
    # The first lasts as long as the run, the second would end the token.
    readable = [path for path in readable if not path.endswith(("/wait", "/auth/logout"))]
    for place in places(airflow, run):
        index = place["map_index"]
        for path in readable:
            if all(name in place for name in re.findall(r"{(\w+)}", path)):
                for more in ("", "&deserialize=true", "&stringify=true") if "xcomEntries/" in path else ("",):
                    which = f"map_index={index}&full_content=true" if "taskInstances/" in path else ""
                    address = path.format(**place) + f"?limit=100&{which}{more}"
                    if address not in found:
                        found[address] = airflow.answer("GET", address, user=user)
        page = f"/dicom-get{run.path.replace('dagRuns', 'runs')}/tasks/{place['task_id']}/{index}"
        for address in (page, f"{page}/progress", f"{page}/manifest.csv", "/dicom-get/"):
            found[address] = airflow.answer("GET", address, user=user)
    return found


def decoded(answer):
    """The text of an answer, and what a DataFrame in it says."""
    text = answer.text
    for content in re.findall(r"50415231[0-9a-f]{100,}", text):
        text += pq.read_table(io.BytesIO(bytes.fromhex(content))).to_pandas().to_csv()
    return text


def leaks(text):
    """The needles with what stands around them."""
    return [text[max(0, found.start() - 60) : found.end() + 30] for found in NEEDLES.finditer(text)]


def leaking_rows(airflow):
    """The rows of the database that hold a needle, by table."""
    from sqlalchemy import MetaData, create_engine, select

    engine = create_engine(airflow.environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    tables = MetaData()
    tables.reflect(engine)
    found = {}
    with engine.connect() as connection:
        for table in tables.sorted_tables:
            rows = [leaks(str(tuple(row))) for row in connection.execute(select(table))]
            if any(rows):
                found[table.name] = [row for row in rows if row]
    engine.dispose()
    return found


def test_nobody_sees_the_patient(airflow, serve, held, tmp_path, record):
    out = tmp_path / "out"
    pacs = serve(tmp_path / "pacs", fail=held[3:5])
    (tmp_path / "archive").mkdir()
    for key, value in {"who": "PQ7431ZW", "name": "Zwiebelmann^Xaver"}.items():
        airflow.answer("DELETE", f"/api/v2/variables/{key}")
        airflow.call("POST", "/variables", json={"key": key, "value": value})
    with (
        EmbeddedPacs(tmp_path / "archive", ae_title="ARCHIVE") as archive,
        MisbehavingPacs("error_comment") as hostile,
    ):
        for name, port in {"archive": archive.port, "hostile": hostile.port}.items():
            airflow.connect(name, conn_type="dicom", host="127.0.0.1", port=port, login=name.upper())
        run = airflow.trigger("live_private", destination=str(out), hostile=hostile.study_uid)
        run.wait_task("wait", ["deferred"])
        # First, since on a busy machine the sensor may not wait until all is asked for.
        waiting = leaking_rows(airflow)
        seen = answers(airflow, run, "viewer")
        run.wait(240)
    assert {task_id: {one["state"] for one in run.tasks(task_id)} for task_id in TASKS} == {
        "wait": {"success"},
        "find": {"success"},
        "get": {"success"},
        "by_query": {"failed"},
        "forward": {"failed"},
        "store": {"success"},
        "verify": {"success"},
        "hostile": {"failed"},
    }
    # The patient was asked for, and his studies came: there is something to be seen.
    assert any(keys.get(0x00100020) == "PQ7431ZW" for _, _, keys in pacs.requests)
    assert b"Zwiebelmann" in next(out.rglob("*.dcm")).read_bytes()
    later = answers(airflow, run, "viewer")
    for asked in (seen, later):
        shown = {address: leaks(decoded(answer)) for address, answer in asked.items()}
        assert {address: found for address, found in shown.items() if found} == {}
    for kind in ("xcomEntries/return_value", "/logs/1", "state-store/progress", "/dicom-get/dags", "manifest.csv"):
        assert [one for address, one in later.items() if kind in address and one.status_code == 200], kind
    rendered = [
        one.json().get("rendered_fields", {}).get("query") for one in later.values() if "/find/-1?" in str(one.url)
    ]
    assert rendered == [{"PatientID": "***", "PatientName": "***"}]
    # While the sensor waits, Airflow keeps its query as it is, where no viewer gets at it; then it is gone.
    assert {table: len(found) for table, found in waiting.items()} == {"trigger": 1}
    assert leaking_rows(airflow) == {}
    # What is on the disk, but for the instances themselves. The database was read row by row: its file keeps for a
    # while what is deleted.
    folders = (airflow.home.AIRFLOW_HOME, airflow.home.LOGS, out)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    looked = [path for path in files if path.suffix != ".dcm" and not path.name.startswith("airflow.db")]
    on_disk = {str(path): leaks(path.read_text(errors="replace")) for path in looked}
    assert {name: found for name, found in on_disk.items() if found} == {}
    for path in out.rglob("*.parquet"):
        assert leaks(pq.read_table(path).to_pandas().to_csv()) == []
    states = [answer.status_code for answer in later.values()]
    record(answers=len(seen) + len(later), good=states.count(200), refused=states.count(403), files=len(looked))
