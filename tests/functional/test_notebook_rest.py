"""What a DAG may have left in XCom, as a notebook reads it: by HTTP, from a server that answers as Airflow does."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest import files
from airflow_dicom_get.manifest.frames import frame_of
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.notebook import load_manifests
from airflow_dicom_get.records import Instance

NESTED = "[" * 100_000 + "]" * 100_000
GOOD = '{"verdict": "complete"}'


def a_manifest(rows: int = 1) -> str:
    """What a task returned, as Airflow puts it into XCom."""
    buffer = io.BytesIO()
    table = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")] * rows, source="", destination="")
    pq.write_table(pa.Table.from_pandas(frame_of(table)), buffer)
    return json.dumps({"__classname__": "pandas.DataFrame", "__version__": 1, "__data__": buffer.getvalue().hex()})


@contextmanager
def serving(tasks: dict[str, dict[str, str]], latest: str = "{}") -> Iterator[str]:
    """The address of a server that has these values of tasks, by task and key, as JSON."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path.endswith("/dagRuns"):
                body = f'{{"dag_runs": [{{"dag_run_id": "r", "conf": {latest}}}]}}'
            elif path.endswith("/xcomEntries"):
                key = "summary" if "summary" in query else "return_value"
                found = [
                    {"task_id": task, "map_index": -1, "key": key, "timestamp": "2026-01-01T00:00:00Z"}
                    for task, values in tasks.items()
                    if key in values
                ]
                body = json.dumps({"xcom_entries": found, "total_entries": len(found)})
            else:
                task, key = path.split("/taskInstances/")[1].split("/xcomEntries/")
                body = f'{{"value": {tasks[task][key]}}}'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def load() -> Callable[..., pd.DataFrame]:
    def loaded(tasks: dict[str, dict[str, str]], run_id: str | None = "r", latest: str = "{}") -> pd.DataFrame:
        with serving(tasks, latest) as address:
            return load_manifests("dag", run_id=run_id, base_url=address, token="t")

    return loaded


@pytest.mark.parametrize("odd", ["null", '["x"]', "1", '"x"', '{"verdict": ["x"]}', '{"verdict": {}}', NESTED])
def test_an_odd_summary_has_no_verdict_and_takes_no_manifest_away(load: Any, odd: str) -> None:
    manifest = a_manifest()
    frame = load(
        {"mine": {"return_value": manifest, "summary": GOOD}, "odd": {"return_value": manifest, "summary": odd}}
    )
    assert frame.set_index("task_id")["verdict"].dropna().to_dict() == {"mine": "complete"}
    assert len(frame) == 2


def test_what_nests_without_end_is_no_manifest(load: Any) -> None:
    frame = load({"odd": {"return_value": NESTED}, "mine": {"return_value": a_manifest(), "summary": GOOD}})
    assert frame["task_id"].tolist() == ["mine"]


def test_a_conf_that_nests_without_end_is_an_error_that_names_the_way_on(load: Any) -> None:
    tasks = {"mine": {"return_value": a_manifest(), "summary": GOOD}}
    assert len(load(tasks, run_id=None)) == 1
    with pytest.raises(ManifestError, match=r"nests too deep\. Give run_id"):
        load(tasks, run_id=None, latest=NESTED)


def test_what_all_tasks_of_a_run_returned_is_bounded_together(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_DECODED", 32 << 20)
    tasks = {str(number): {"return_value": a_manifest(10_000)} for number in range(8)}
    assert len(load(dict(list(tasks.items())[:2]))) == 20_000
    with pytest.raises(ManifestError, match="of memory"):
        load(tasks)
