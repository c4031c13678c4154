"""The contract of destinations on S3 services."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.dicom.part10 import read_file_meta
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.ledger import OWN
from airflow_dicom_get.sinks.s3 import S3Sink
from airflow_dicom_get.sinks.s3_ledger import BucketLedgers
from airflow_dicom_get.sinks.s3_uploads import Uploads
from airflow_dicom_get.storage.bucket import Bucket
from airflow_dicom_get.testing.s3_servers import BUCKET, FaultProxy, Juicefs, Moto, S3Server
from tests.support.sink_contract import Harness, SinkContract, written

_prefixes = itertools.count(1)


class BucketHarness(Harness):
    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.server, self.proxy = server, proxy
        self.prefix = f"contract/{next(_prefixes)}"
        self.keeps_what_was_confirmed = server.metadata
        self.tells_runs_apart = server.conditional
        self._runs = itertools.count(1)

    def sink(self, *, read_only: bool = False, **options: Any) -> S3Sink:
        # One attempt a request, so that what fails fails soon; the sink's own patience goes on from there.
        bucket = Bucket(BUCKET, S3Config(**self.proxy.config), attempts=1)
        return S3Sink(
            bucket,
            self.prefix,
            BucketLedgers(bucket, f"{self.prefix}/_manifests", OWN),
            f"20260101T000000Z-{next(self._runs):08x}",
            written(**options),
            Uploads(bucket, patience=20.0, outage=1.5),
            read_only=read_only,
            conditional=self.server.conditional,
        )

    def crash(self, sink: Any) -> None:
        sink.uploads._pool.shutdown(cancel_futures=True)

    def _key(self, instance: Instance) -> str:
        return f"{self.prefix}/{instance.study}/{instance.series}/{instance.sop}.dcm"

    def content(self, instance: Instance) -> bytes:
        return self.server.read(self._key(instance))

    def dataset(self, instance: Instance) -> bytes | None:
        if self._key(instance) not in self.server.objects(self._key(instance)):
            return None
        content = self.content(instance)
        meta = read_file_meta(content)
        assert meta is not None
        return content[meta.dataset_offset :]

    def leftovers(self) -> list[str]:
        keys = self.server.objects(f"{self.prefix}/")
        odd = [key for key in keys if not key.endswith(".dcm") and "/_manifests/.ledger/" not in key]
        return odd + [key for key in self.server.uploads() if key.startswith(f"{self.prefix}/")]

    def tamper(self, instance: Instance, content: bytes) -> None:
        self.server.client().put_object(Bucket=BUCKET, Key=self._key(instance), Body=content)

    def break_ledger(self, study: str, line: bytes) -> None:
        key = f"{self.prefix}/_manifests/.ledger/{study}/20250101T000000Z-00000000.000001.jsonl"
        self.server.client().put_object(Bucket=BUCKET, Key=key, Body=line)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        go_on = threading.Event()

        def wait(number: int, method: str, path: str) -> None:
            if method == "PUT" and ".dcm" in path:
                go_on.wait(15)

        with self.faulty(wait):
            try:
                yield
            finally:
                go_on.set()

    @contextlib.contextmanager
    def faulty(self, fault: Callable[[int, str, str], Any]) -> Iterator[None]:
        before, self.proxy.fault = self.proxy.fault, fault
        try:
            yield
        finally:
            self.proxy.fault = before

    def failures(self) -> Any:
        def on(verb: str, part: str, answer: Any) -> Any:
            return self.faulty(lambda number, method, path: answer if method == verb and part in path else None)

        return [
            ("no permission to write", on("PUT", ".dcm", (403, "AccessDenied"))),
            ("no permission to list", on("GET", "list-type=2", (403, "AccessDenied"))),
            ("the service fails", on("PUT", ".dcm", (500, "InternalError"))),
            ("the service is busy", on("PUT", ".dcm", (503, "SlowDown"))),
            ("the credentials have expired", on("PUT", ".dcm", (400, "ExpiredToken"))),
            ("every answer is lost", on("PUT", ".dcm", "late")),
        ]


class OnService(SinkContract):
    server: S3Server

    @pytest.fixture
    def harness(self, service: S3Server) -> Iterator[BucketHarness]:
        with FaultProxy(service) as proxy:
            yield BucketHarness(service, proxy)


class TestJuicefs(OnService):
    @pytest.fixture
    def service(self, juicefs: Juicefs) -> S3Server:
        return juicefs


class TestMoto(OnService):
    @pytest.fixture
    def service(self, moto: Moto) -> S3Server:
        return moto
