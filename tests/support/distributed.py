"""What the tests with several workers share: a PACS and an S3 service, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, SECRET_KEY, Juicefs, Moto, S3Server

COUNTING_PACS = Path(__file__).parents[1] / "distributed" / "counting_pacs.py"
IMPATIENT = {
    # By default, what a lost worker had in hand waits for five minutes, and what it had not begun for ten.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "15",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
}
S3_SERVICES: dict[str, type[S3Server]] = {"juicefs": Juicefs, "moto": Moto}


def connection_to(store: S3Server) -> dict[str, Any]:
    """The connection to an S3 service, for Airflow."""
    return {
        "conn_type": "dicom_s3",
        "host": store.host,
        "port": store.port,
        "login": ACCESS_KEY,
        "password": SECRET_KEY,
        "extra": {"scheme": "http", "path_style": "path"},
    }


class CountingPacs:
    """The PACS process, started by what stands before its command; what it counted."""

    def __init__(self, folder: Path, pause: float, before: Sequence[str] = ()) -> None:
        command = [*before, sys.executable, str(COUNTING_PACS), str(folder), str(pause)]
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
