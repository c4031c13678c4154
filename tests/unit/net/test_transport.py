"""How a connection is reached."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from airflow_dicom_get.net import transport


def test_the_addresses_of_a_host_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    waited = transport._waited

    def noted(sock: socket.socket, event: int, limit: float, ended: Callable[[], bool]) -> bool:
        limits.append(limit)
        return waited(sock, event, limit, ended)

    monkeypatch.setattr(transport, "_waited", noted)
    with ExitStack() as queue:
        silent = queue.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        there = queue.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(3):  # once the queue is full, the kernel drops what comes
            full = queue.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(silent.getsockname())
        assert select.select([silent], [], [], 5)[0]
        addresses = [silent.getsockname()] * 3

        def found(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", found)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            transport.connect_socket("pacs.example", 104, 0.6)
        assert max(limits) < began + 0.6 + 0.4, "one that has 0.6 s of its own ends after 1.8 s"
        addresses[2:] = [there.getsockname()]
        transport.connect_socket("pacs.example", 104, 0.6).close()
