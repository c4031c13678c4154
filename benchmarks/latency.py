"""A source at a distance: a relay that delays bytes, each way by half of the round trip.

Each object waits for the response to the one before, so one association carries one object a round
trip. Every connection of the relay is served by a process of its own.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from sources import Source

ROUND_TRIP = 0.020
"""Seconds."""


@contextmanager
def far_away(source: Source) -> Iterator[Source]:
    """The same source, behind a relay with `ROUND_TRIP`."""
    pid, port = relay((source.host, source.port), ROUND_TRIP / 2)
    try:
        yield replace(source, port=port, title=f"{source.title}, {ROUND_TRIP * 1000:.0f} ms away")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def relay(target: tuple[str, int], seconds: float) -> tuple[int, int]:
    """Fork a relay that delays each way by ``seconds``; its process id and port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    pid = os.fork()
    if pid:
        listener.close()
        return pid, port
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            server = socket.create_connection(target)
            try:
                pass_on(client, server, seconds)
            except OSError:
                pass
            os._exit(0)
        client.close()


def pass_on(client: socket.socket, server: socket.socket, seconds: float) -> None:
    """Pass bytes both ways, each after a delay, until both sides have ended."""
    waiting: dict[socket.socket, deque[tuple[float, bytes]]] = {client: deque(), server: deque()}
    other = {client: server, server: client}
    reading = {client, server}
    for sock in (client, server):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while reading or any(waiting.values()):
        now = time.monotonic()
        due = [queue[0][0] for queue in waiting.values() if queue]
        for sock in select.select(list(reading), [], [], max(min(due) - now, 0) if due else None)[0]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            data = sock.recv(1 << 18)
            waiting[other[sock]].append((time.monotonic() + seconds, data))
            if not data:
                reading.discard(sock)
        for sock, queue in waiting.items():
            while queue and queue[0][0] <= time.monotonic():
                data = queue.popleft()[1]
                if data:
                    sock.sendall(data)
                else:
                    sock.shutdown(socket.SHUT_WR)
