"""One Airflow for all tests here, and a PACS for each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from tests.support.live_airflow import LiveAirflow
from tests.support.postgres import Postgres

HERE = Path(__file__).parent
POSTGRESQL = os.environ.get("LIVE_DATABASE") == "postgresql"
SLOTS = 2
LINEAGE = "lineage.jsonl"
"""In the folder of Airflow: what OpenLineage's own transport writes, where its provider is installed."""
IMPATIENT = {
    # By default, what a lost host had in hand waits for five minutes.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
    # As much shorter than the heartbeat's time as by default: 3.4.0b2 may wait for all of it although a task has ended,
    # and its scheduler ends by an IntegrityError where it misses the heartbeat of one that was cleared.
    "AIRFLOW__CORE__KILLED_TASK_CLEANUP_TIME": "10",
}
HAS_AIRFLOW = any(distributions(name="apache-airflow-core"))


def pytest_collection_modifyitems(config, items):
    if "live" not in config.option.markexpr:
        # All of them take minutes: they are for `make test-live`.
        left_out = [item for item in items if HERE in item.path.parents]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)
            item.add_marker(pytest.mark.airflow)
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            if not HAS_AIRFLOW:
                item.add_marker(pytest.mark.skip(reason="not installed: the extra airflow"))


@pytest.fixture(scope="session")
def here() -> Path:
    """The folder of these tests."""
    return HERE


@pytest.fixture(scope="session")
def airflow(tmp_path_factory) -> Iterator[LiveAirflow]:
    """Airflow with a pool ``pacs`` of two slots, on SQLite or, with LIVE_DATABASE=postgresql, on that."""
    with ExitStack() as stack:
        environment = dict(IMPATIENT)
        if POSTGRESQL:
            environment |= stack.enter_context(Postgres()).environment
        folder = tmp_path_factory.mktemp("live")
        lineage = {"type": "file", "log_file_path": str(folder / LINEAGE), "append": True}
        environment["AIRFLOW__OPENLINEAGE__TRANSPORT"] = json.dumps(lineage)
        live = stack.enter_context(LiveAirflow(folder, dags=HERE / "dags", environment=environment))
        live.make_pool("pacs", SLOTS)
        yield live


@pytest.fixture
def lineage(airflow) -> Path:
    """The file of OpenLineage's events."""
    return Path(airflow.home.FOLDER / LINEAGE)


@pytest.fixture
def serve(airflow) -> Iterator[Callable[..., EmbeddedPacs]]:
    """Serve a folder, and connect ``pacs`` to it: ``serve(folder, extra={…}, through=relay, **options)``."""
    with ExitStack() as stack:
        stack.callback(airflow.end_runs)

        def start(folder: Path, *, extra: Any = None, through: Any = None, **options: Any) -> EmbeddedPacs:
            pacs = stack.enter_context(EmbeddedPacs(folder, ae_title="PACS", require_called_ae=True, **options))
            front = through(pacs) if through else pacs
            airflow.connect(
                "pacs", conn_type="dicom", host="127.0.0.1", port=front.port, login="PACS", extra=extra or {}
            )
            return pacs

        yield start


@pytest.fixture
def record(request) -> Callable[..., None]:
    """Print what was measured; ``pytest -s`` or a failure shows it."""

    def say(**figures: Any) -> None:
        print(f"\n{request.node.name}: {figures}")

    return say
