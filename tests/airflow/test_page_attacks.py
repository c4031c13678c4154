"""The page against viewers and DAGs that mean harm: by HTTP, against an API server in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from airflow_dicom_get.manifest.files import task_run_name, write_manifest
from airflow_dicom_get.manifest.schema import manifest_rows
from airflow_dicom_get.plugins.database import Task
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.servers import free_port
from tests.support import forgetful, hanging_disk
from tests.support.kept_runs import summary
from tests.support.live_airflow import eventually

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::ResourceWarning")]

RUN, MINE, THEIRS, SECRET = "manual__1", "mine", "theirs", "secret"
SECRET_UID, OPEN_UID = "1.2.3.99", "1.2.3.11"
ATTACKERS = 45
"""More requests than the API server has threads for all its pages."""


@dataclass
class Server:
    """The API server as its users reach it."""

    address: str
    pid: int
    tokens: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, user: str) -> Any:
        """Ask for a page."""
        import httpx

        headers = {"Authorization": f"Bearer {self.tokens[user]}", "Accept": "text/html"}
        return httpx.get(f"{self.address}{path}", headers=headers, timeout=60)

    def manifest(self, index: int, user: str = "viewer", dag_id: str = MINE, *, end: str = "") -> Any:
        """Ask for the manifest of one task."""
        return self.get(f"/dicom-get/dags/{dag_id}/runs/{RUN}/tasks/get/{index}{end}", user)

    def memory(self) -> int:
        """The most that the process of the server ever held, in MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) >> 10

    def readers(self) -> list[int]:
        """What the processes hold that it has begun, in MiB."""
        found = []
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(OSError, IndexError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    found.append(int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) >> 10)
        return found


@pytest.fixture(scope="module")
def silent_bucket() -> Iterator[socket.socket]:
    """A service that would take connections and never say a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


@pytest.fixture(scope="module")
def server(tmp_path_factory, silent_bucket) -> Iterator[Server]:
    """An API server of Airflow with three users: the administrator, a viewer, and another viewer."""
    import httpx

    users = ("admin", "viewer", "other")
    folder = tmp_path_factory.mktemp("server")
    passwords = folder / "passwords.json"
    passwords.write_text(json.dumps(dict.fromkeys(users, "secret")))
    port = free_port()
    environment = {
        **os.environ,
        "AIRFLOW_CONN_SILENT": f"dicom-s3://key:key@127.0.0.1:{silent_bucket.getsockname()[1]}/?scheme=http",
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API_AUTH__JWT_SECRET": "for the tests alone, long enough for a key" * 2,
        "AIRFLOW__CORE__AUTH_MANAGER": "tests.support.by_dag.ByDag",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,viewer:viewer,other:viewer",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "airflow", "api-server", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(
            [*command, "--workers", "1"], env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    try:
        site = Server(f"http://127.0.0.1:{port}", process.pid)

        def is_well() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{site.address}/api/v2/version", timeout=5).status_code == 200
            return False

        eventually("the API server answers", is_well, 120)
        for user in users:
            answer = httpx.post(f"{site.address}/auth/token", json={"username": user, "password": "secret"}, timeout=30)
            site.tokens[user] = answer.json()["access_token"]
        yield site
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write(root: Path, dag_id: str, index: int, uid: str, *, modality: str = "CT", rows: int = 1) -> Path:
    """The manifest of a task of one of the DAGs, with a row that is not held."""

    def instances() -> Iterator[Instance]:
        for number in range(rows):
            row = Instance("1.2", "1.2.3", uid if rows == 1 else f"{uid}.{number}")
            row.state, row.reason, row.modality = "missing", "not_sent", modality
            yield row

    name = task_run_name(dag_id=dag_id, run_id=RUN, task_id="get", map_index=index, try_number=1)
    path = root / f"{name}.parquet"
    table = manifest_rows(instances(), source="A@h:1", destination="/d")
    write_manifest(table, path, verdict="partial", evidence="list", run=name)
    return path


def task(uri: object, **more: Any) -> dict[str, Any]:
    """A task whose XComs name a manifest."""
    uri = str(uri) if isinstance(uri, Path) else uri
    reference = {"kind": "dicom-manifest", "schema": 1, "manifest_uri": uri, "rows": 1, "bytes": 1, "sha256": "0" * 64}
    return {"state": "success", "summary": summary(manifest_uri=uri), "return_value": reference, **more}


def bomb(root: Path) -> Path:
    """A manifest of a few kilobytes that is four gigabytes when it is decoded: one long text, over and over."""
    path = write(root, MINE, 0, "1.2.4", rows=4000)
    table = pq.read_table(path)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * table.num_rows, pa.int32()), ["M" * 1_000_000])
    table = table.set_column(table.column_names.index("modality"), "modality", texts)
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 100_000
    return path


# --- what is opened ------------------------------------------------------------------------------------


def test_nothing_of_another_dag_can_be_read_through_one_of_ones_own(server, kept, tmp_path):
    root = tmp_path / "_manifests"
    theirs = write(root, SECRET, 0, SECRET_UID)
    mine = [write(root, MINE, index, OPEN_UID) for index in range(10)]
    kept(SECRET, [task(theirs)])
    assert server.manifest(0, dag_id=SECRET).status_code == 403
    assert server.manifest(0, "admin", SECRET).status_code == 200
    assert SECRET_UID in server.manifest(0, "admin", SECRET).text

    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / MINE).symlink_to(theirs.parents[2])
    for path, target in ((mine[2], theirs), (mine[3], Path("/dev/zero"))):
        path.unlink()
        path.symlink_to(target)
    mine[4].unlink()
    os.mkfifo(mine[4])
    mine[5].unlink()
    mine[5].mkdir()
    mine[6].write_bytes(b"PAR1 and nothing that makes sense PAR1")
    (tmp_path / "else.txt").write_text(SECRET_UID)
    named: list[object] = [
        mine[0],
        root / MINE / RUN / "get" / "1-2.parquet",  # there is none: what all the others are compared with
        mine[2],
        mine[3],
        mine[4],
        mine[5],
        mine[6],
        theirs,
        f"file://{theirs}",
        f"{mine[0].parent}/../../../{SECRET}/{RUN}/get/0-1.parquet",
        linked / MINE / RUN / "get" / "10-1.parquet",
        mine[0],  # of another task of the same DAG
        "/etc/passwd",
        "/no/such/file",
        tmp_path / "else.txt",
        "relative/mine/manual__1/get/15-1.parquet",
        "\0",
        "/" + "x" * 5000,
        ["a", "list"],
        f"{root}/{MINE}/{RUN}/get/19-1.parquet\0",
    ]  # fmt: skip
    kept(MINE, [task(uri) for uri in named])
    assert OPEN_UID in server.manifest(0).text
    assert OPEN_UID in server.manifest(0, end="/manifest.csv").text
    answers = {}
    for index in range(1, len(named)):
        page, csv = server.manifest(index), server.manifest(index, end="/manifest.csv")
        assert page.status_code == 200
        alert = re.findall(r'role="alert">(.*?)</p>', page.text)
        assert SECRET_UID not in page.text + csv.text
        assert OPEN_UID not in page.text + csv.text
        answers[index] = (alert, csv.status_code, csv.text)
    assert len(answers[1][0]) == 1
    assert [index for index, answer in answers.items() if answer != answers[1]] == []


@pytest.fixture
def task_of_dag(monkeypatch) -> Callable[..., Task]:
    """A task instance as the database has it; there are two DAGs."""
    from airflow_dicom_get.plugins import database

    monkeypatch.setattr(database, "dag_ids", lambda: ["night", "n_chte", "nächte"])

    def make(dag_id: str = "night", run_id: str = "r:1", map_index: int = -1) -> Task:
        return Task(
            uuid4(), dag_id, run_id, "get", map_index, None, "DicomGetOperator", "success", 1, 0, None, None, None
        )

    return make


def test_the_file_is_that_of_the_task_instance(task_of_dag, monkeypatch):
    from airflow_dicom_get.plugins.reading import own_file

    below = ("night", "r_1", "get", "-1-1.parquet")
    good = "/data/_manifests/night/r_1/get/-1-1.parquet"
    assert own_file(task_of_dag(), good) == ("/data/_manifests", *below)
    assert own_file(task_of_dag(), f"file://{good}") == ("/data/_manifests", *below)
    assert own_file(task_of_dag(map_index=3), "/m/night/r_1/get/3-12.parquet") is not None
    for bad in (
        "/data/_manifests/night/r_1/get/0-1.parquet",
        "/data/_manifests/night/r_1/get/-1-1.txt",
        "/data/_manifests/night/r_1/other/-1-1.parquet",
        "/data/_manifests/night/r_1/get/x/../-1-1.parquet",
        "_manifests/night/r_1/get/-1-1.parquet",
        "night/r_1/get/-1-1.parquet",
        "s3://store@bucket/night/r_1/get/-1-1.parquet",
        "dicom://A@h:1",
        "",
        None,
        {"a": 1},
    ):
        assert own_file(task_of_dag(), bad) is None, bad
    # Names that a file system cannot tell apart are nobody's.
    assert own_file(task_of_dag("n_chte"), "/m/n_chte/r_1/get/-1-1.parquet") is None
    assert own_file(task_of_dag("nächte"), "/m/n_chte/r_1/get/-1-1.parquet") is None


def test_below_the_manifest_root_alone_where_there_is_one(task_of_dag, monkeypatch):
    from airflow_dicom_get.plugins.reading import own_file

    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", "/data/manifests/")
    assert own_file(task_of_dag(), "/data/manifests/night/r_1/get/-1-1.parquet") is not None
    for elsewhere in ("/data/_manifests", "/data/manifests/more", "/data/manifests/../x", "/"):
        assert own_file(task_of_dag(), f"{elsewhere}/night/r_1/get/-1-1.parquet") is None
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", "s3://store@bucket/manifests")
    assert own_file(task_of_dag(), "/data/manifests/night/r_1/get/-1-1.parquet") is None


# --- what it costs -------------------------------------------------------------------------------------


def read_apart(path: Path, form: str = "contents") -> subprocess.CompletedProcess[bytes]:
    """What the process says that reads for the page."""
    command = [sys.executable, "-m", "airflow_dicom_get.plugins.reader", form, str(path.parent), path.name]
    return subprocess.run(command, capture_output=True, timeout=120)


def test_claims_of_a_footer_are_bounded_before_anything_is_read(tmp_path):
    from airflow_dicom_get.plugins import reader

    def claims(table: pa.Table, **more: Any) -> Any:
        pq.write_table(table, tmp_path / "x.parquet", **more)
        return pq.ParquetFile(tmp_path / "x.parquet").metadata

    reader.check_claims(claims(pa.table({"a": ["x"]})))
    nulls = pa.nulls(reader.MAX_MANIFEST_ROWS + 1, pa.string())
    wide = pa.table({f"c{number}": ["x"] for number in range(reader.MAX_COLUMNS + 1)})
    long = pa.table({"a": ["x" * (reader.MAX_COLUMN_BYTES + 1)]})
    parts = pa.table({"a": ["x"] * (reader.MAX_ROW_GROUPS + 1)})
    for table, more in ((pa.table({"a": nulls}), {}), (wide, {}), (long, {}), (parts, {"row_group_size": 1})):
        with pytest.raises(reader.TooLarge):
            reader.check_claims(claims(table, **more))


@pytest.mark.parametrize("form", ["contents", "csv"])
def test_a_file_that_lies_about_its_size_ends_its_reader_alone(tmp_path, form):
    path = bomb(tmp_path)
    done = read_apart(path, form)
    assert done.returncode != 0
    assert len(done.stdout) < 1 << 20
    deep = tmp_path / "deep.parquet"
    nested = pa.array([1])
    for _ in range(900):
        nested = pa.StructArray.from_arrays([nested], ["x"])
    pq.write_table(pa.table({"a": nested}), deep)
    assert read_apart(deep, form).returncode != 0


def besieged(server: Server, kept: Any, tmp_path: Path, attacks: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What another viewer's pages take in seconds, while one asks for all of these tasks and for nothing else."""
    kept(MINE, attacks)
    kept(THEIRS, [task(write(tmp_path / "theirs", THEIRS, 0, OPEN_UID))])
    paths = {
        "list": f"/dicom-get/?dag_id={THEIRS}",
        "manifest": f"/dicom-get/dags/{THEIRS}/runs/{RUN}/tasks/get/0",
        "Airflow's own": "/api/v2/dags",
    }
    took: dict[str, list[float]] = {name: [] for name in paths}
    held: list[int] = []
    before = server.memory()
    over = threading.Event()

    def attack(number: int) -> int:
        end = "/manifest.csv" if number % 3 == 0 else ""
        return int(server.manifest(number % len(attacks), end=end).status_code)

    def watch() -> None:
        while not over.wait(0.2):
            held.extend(server.readers())

    with ThreadPoolExecutor(ATTACKERS + 1) as pool:
        watching = pool.submit(watch)
        attacking = [pool.submit(attack, number) for number in range(ATTACKERS)]
        try:
            time.sleep(0.3)
            while not all(one.done() for one in attacking):
                for name, path in paths.items():
                    began = time.monotonic()
                    answer = server.get(path, "other")
                    took[name].append(round(time.monotonic() - began, 2))
                    assert answer.status_code == 200
            answers = {one.result() for one in attacking}
        finally:
            over.set()
        watching.result()
    after = server.memory()
    print(f"\nwhile {ATTACKERS} requests hang: {took}; server {before} to {after} MiB, reader {max(held)} MiB")
    assert took["manifest"]
    # While it is besieged, a busy machine may not start the process that reads it in time; the page says so then.
    assert OPEN_UID in server.get(paths["manifest"], "other").text
    assert answers == {200, 409}
    assert after - before < 200
    assert max(held) < 700
    return took


def test_others_do_not_wait_for_one_who_asks_for_a_fifo_a_bucket_and_a_bomb(server, silent_bucket, kept, tmp_path):
    root = tmp_path / "_manifests"
    file = bomb(root)
    fifo = root / MINE / RUN / "get" / "1-1.parquet"
    os.mkfifo(fifo)
    frame = {"__classname__": "pandas.DataFrame", "__version__": 1, "__data__": file.read_bytes().hex()}
    named = f"s3://silent@bucket/{MINE}/{RUN}/get/2-1.parquet"
    took = besieged(server, kept, tmp_path, [task(file), task(fifo), task(named), task("", return_value=frame)])
    with pytest.raises(BlockingIOError):
        silent_bucket.accept()
    # Well below a second on a machine that is not busy. Before, the server answered nobody for as long as it took.
    assert max(max(times) for times in took.values()) < 30


@pytest.mark.skipif(forgetful.lacking() is not None, reason=f"not installed: {forgetful.lacking()}")
def test_others_do_not_wait_for_one_who_asks_for_a_disk_that_hangs(server, kept, tmp_path):
    with hanging_disk.mounted(tmp_path / "hanging") as disk:
        files = [disk / MINE / RUN / "get" / f"{index}-1.parquet" for index in range(3)]
        took = besieged(server, kept, tmp_path, list(map(task, files)))
        assert max(max(times) for times in took.values()) < 30
        # Even one that cannot be killed keeps but the place of the one who asked.
        assert len(server.readers()) <= 2
    eventually("the readers are gone", lambda: not server.readers(), 30)
