"""A Redis of its own, on a folder and a loopback port of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from typing import Self

from airflow_dicom_get.testing.servers import HOST, find_binary, free_port


class Redis:
    """Redis as a process, in memory alone."""

    def __init__(self) -> None:
        binary = find_binary("redis-server")
        if binary is None:
            raise RuntimeError("Redis is missing: apt-get install redis-server")
        self._binary = binary
        self._folder = tempfile.mkdtemp(prefix="redis-")
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        serve = [self._binary, "--bind", HOST, "--port", str(self.port), "--save", "", "--dir", self._folder]
        self._process = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("Redis does not start")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Airflow's CeleryExecutor uses it."""
        return {"AIRFLOW__CELERY__BROKER_URL": f"redis://{HOST}:{self.port}/0"}
