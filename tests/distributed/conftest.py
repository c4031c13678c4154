"""Airflow with two Celery workers, on PostgreSQL and Redis; a PACS and an S3 service, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, SECRET_KEY, Juicefs, Moto, S3Server
from tests.support.live_airflow import LiveAirflow
from tests.support.postgres import Postgres
from tests.support.redis_server import Redis

HERE = Path(__file__).parent
WORKERS = ("worker-1", "worker-2")
CONCURRENCY = 3
SLOTS = 4
IMPATIENT = {
    # By default, what a lost worker had in hand waits for five minutes, and what it had not begun for ten.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "15",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
}
HAS_CELERY = any(distributions(name="apache-airflow-providers-celery"))


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if HERE in item.path.parents]
    if "distributed" not in config.option.markexpr:
        # They take minutes: they are for `make test-distributed`.
        items[:] = [item for item in items if item not in mine]
        config.hook.pytest_deselected(items=mine)
    for item in mine:
        item.add_marker(pytest.mark.distributed)
        item.add_marker(pytest.mark.airflow)
        item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        if not HAS_CELERY:
            item.add_marker(pytest.mark.skip(reason="not installed: the extra distributed"))


class CountingPacs:
    """The PACS process; what it counted."""

    def __init__(self, folder: Path, pause: float) -> None:
        command = [sys.executable, str(HERE / "counting_pacs.py"), str(folder), str(pause)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def counted(self, order: str = "") -> dict[str, Any]:
        """``sent`` by SOP Instance UID; associations ``open``, at the ``peak``, and in ``total``.

        ``order`` is ``hold`` or ``go``: see counting_pacs.py.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        counted: dict[str, Any] = json.loads(self._process.stdout.readline())
        return counted

    def stop(self) -> None:
        """The end of its input is its end."""
        self._process.communicate(timeout=20)


@pytest.fixture
def serve() -> Iterator[Callable[[Path, float], CountingPacs]]:
    """Serve a folder with a pause before each instance."""
    with ExitStack() as stack:

        def start(folder: Path, pause: float) -> CountingPacs:
            pacs = CountingPacs(folder, pause)
            stack.callback(pacs.stop)
            return pacs

        yield start


@pytest.fixture(params=["juicefs", "moto"])
def store(request, tmp_path) -> Iterator[S3Server]:
    """An S3 service with the bucket ``dicom``."""
    with {"juicefs": Juicefs, "moto": Moto}[request.param](tmp_path / "s3") as server:
        yield server


@pytest.fixture
def airflow(tmp_path, store) -> Iterator[LiveAirflow]:
    """Airflow with two workers, a pool ``pacs`` of four slots, and the connection ``bucket``."""
    with ExitStack() as stack:
        environment = IMPATIENT | stack.enter_context(Postgres()).environment
        environment |= stack.enter_context(Redis()).environment
        environment |= {
            "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
            "AIRFLOW__CORE__PARALLELISM": str(2 * CONCURRENCY),
            # One process keeps all connections to the broker open for as long as it lives.
            "AIRFLOW__CELERY__SYNC_PARALLELISM": "1",
            "AIRFLOW_CONN_BUCKET": json.dumps(
                {
                    "conn_type": "dicom_s3",
                    "host": "127.0.0.1",
                    "port": store.port,
                    "login": ACCESS_KEY,
                    "password": SECRET_KEY,
                    "extra": {"scheme": "http", "path_style": True},
                }
            ),
        }
        folder = tmp_path / "airflow"
        folder.mkdir()
        live = LiveAirflow(folder, dags=HERE / "dags", environment=environment)
        for name in WORKERS:
            live.home.COMPONENTS[name] = [
                *("celery", "worker", "--skip-serve-logs", "--concurrency", str(CONCURRENCY)),
                *("--celery-hostname", f"{name}@localhost", "--pid", str(folder / f"{name}.pid")),
            ]
        stack.enter_context(live)
        live.make_pool("pacs", SLOTS)
        yield live
