"""A PostgreSQL of its own, on a folder and a loopback port of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from airflow_dicom_get.testing.servers import free_port

_SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


class Postgres:
    """PostgreSQL as a process; started by root it runs as ``postgres``, since it refuses root."""

    def __init__(self) -> None:
        if not _SERVERS:
            raise RuntimeError("PostgreSQL is missing: apt-get install postgresql")
        self._bin = _SERVERS[-1]
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def _program(self, name: str, *arguments: str) -> list[str]:
        return [str(self._bin / name), *arguments]

    def __enter__(self) -> Self:
        if self._user:
            shutil.chown(self._folder, self._user)
        data = self._folder / "data"
        make = self._program("initdb", "-D", str(data), "-U", "airflow", "-A", "trust", "-E", "UTF8", "--no-sync")
        subprocess.run(make, check=True, capture_output=True, user=self._user, cwd=self._folder)
        serve = self._program("postgres", "-D", str(data), "-p", str(self.port), "-h", "127.0.0.1")
        serve += ["-k", str(self._folder)]
        self._process = subprocess.Popen(
            serve, user=self._user, cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        ready = self._program("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "airflow", "airflow")
        for _ in range(100):
            if subprocess.run(ready, capture_output=True, check=False, cwd=self._folder).returncode == 0:
                return self
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("PostgreSQL does not start")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            # SIGINT: it ends the connections that are open, and shuts down in order.
            self._process.send_signal(2)
            self._process.wait(20)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Airflow uses it."""
        return {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://airflow@127.0.0.1:{self.port}/airflow",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": f"postgresql+asyncpg://airflow@127.0.0.1:{self.port}/airflow",
        }
