"""Airflow with two workers, by Celery or at two sites; PACSs and an S3 service, each a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from airflow_dicom_get.testing.s3_servers import S3Server
from tests.support.distributed import IMPATIENT, S3_SERVICES, CountingPacs, connection_to
from tests.support.live_airflow import LiveAirflow
from tests.support.postgres import Postgres
from tests.support.redis_server import Redis

HERE = Path(__file__).parent
WORKERS = ("worker-1", "worker-2")
CONCURRENCY = 3
SLOTS = 4


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


@pytest.fixture
def serve() -> Iterator[Callable[..., CountingPacs]]:
    """Serve a folder with a pause before each instance: ``serve(folder, seconds, before)``."""
    with ExitStack() as stack:

        def start(folder: Path, pause: float, before: Sequence[str] = ()) -> CountingPacs:
            pacs = CountingPacs(folder, pause, before)
            stack.callback(pacs.stop)
            return pacs

        yield start


@pytest.fixture(params=S3_SERVICES)
def store(request, tmp_path) -> Iterator[S3Server]:
    """An S3 service with the bucket ``dicom``."""
    with S3_SERVICES[request.param](tmp_path / "s3") as server:
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
            "AIRFLOW_CONN_BUCKET": json.dumps(connection_to(store)),
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
