"""How much several associations bring over a line with a round trip of 20 ms.

    python benchmarks/latency.py --associations 1 2 4 8

Each object waits for the response to the one before, so one association carries one object a round
trip. Retrieves a study from ``memory_scp.py`` through a relay that delays bytes, each way by half of
the round trip, and prints the throughput for each number of associations. Every connection of the
relay is served by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from memory_scp import STUDY

_CLIENT = """
import json, sys, time
from airflow_dicom_get import GetScu
node, to, associations, durable = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"
scu = GetScu(node, destination=to, associations=associations, max_associations=max(associations, 1), durable=durable)
scu.echo()
# What is loaded on first use is not a part of the throughput.
import airflow_dicom_get.engine.report, airflow_dicom_get.manifest.files, airflow_dicom_get.sinks.places
import pyarrow.parquet
import airflow_dicom_get.engine.study, airflow_dicom_get.engine.verdict, airflow_dicom_get.sinks.filesystem
began = time.monotonic()
result = scu.get_study({"StudyInstanceUID": "%s"})
seconds = time.monotonic() - began
print(json.dumps({"verdict": result.verdict, "seconds": seconds, "bytes": result.bytes, "opened": result.associations}))
"""


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


def retrieve(node: str, to: Path, associations: int, durable: bool) -> dict[str, float]:
    """One retrieval in a process of its own."""
    shutil.rmtree(to, ignore_errors=True)
    command = [sys.executable, "-c", _CLIENT % STUDY, node, str(to), str(associations), "1" if durable else "0"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(out)
    if result["verdict"] != "complete":
        raise SystemExit(f"the retrieval ended as {result['verdict']}")
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--associations", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--size", type=int, default=524288)
    parser.add_argument("--series", type=int, default=4)
    parser.add_argument("--round-trip-ms", type=float, default=20)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--to", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--not-durable", action="store_true")
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = Path(__file__).parent
    scp = subprocess.Popen(
        [sys.executable, str(here / "memory_scp.py"), "--port", str(port), "--instances", str(args.instances),
         "--size", str(args.size), "--series", str(args.series)], stdout=subprocess.PIPE,
    )  # fmt: skip
    relay_pid = 0
    to = Path(tempfile.mkdtemp(dir=args.to))
    try:
        assert scp.stdout is not None
        scp.stdout.readline()
        relay_pid, relay_port = relay(("127.0.0.1", port), args.round_trip_ms / 2000)
        single = 0.0
        print(f"{args.instances} x {args.size} bytes in {args.series} series, round trip {args.round_trip_ms:g} ms")
        for associations in args.associations:
            best = min(
                (retrieve(f"PACS@127.0.0.1:{relay_port}", to / "study", associations, not args.not_durable)
                 for _ in range(args.repeat)), key=lambda r: r["seconds"],
            )  # fmt: skip
            rate = best["bytes"] / best["seconds"] / 1e6
            single = single or rate
            print(f"{associations} associations: {best['seconds']:6.2f} s  {rate:6.1f} MB/s  {rate / single:4.2f} x")
    finally:
        if relay_pid:
            os.kill(relay_pid, signal.SIGKILL)
        scp.terminate()
        scp.wait()
        shutil.rmtree(to)


if __name__ == "__main__":
    main()
