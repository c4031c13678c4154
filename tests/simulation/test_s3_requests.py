"""Each request to a bucket fails once, in each way, under a whole retrieval: it ends, and tells the truth."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from botocore.response import StreamingBody

from airflow_dicom_get.getscu import GetScu
from airflow_dicom_get.net import transport
from airflow_dicom_get.storage import bucket, files
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from tests.simulation.bucket import Service
from tests.simulation.disk import Volume
from tests.simulation.faults import Fault, Faults, Killed, Process
from tests.simulation.line import Network
from tests.simulation.loop import Loop, looped
from tests.simulation.pacs import Change, Habits, ModelPacs
from tests.simulation.world import DEADLINES, NODE, seams

S3 = {"access_key": "a", "secret_key": "b", "endpoint": "http://s3.example"}
REQUESTS = {"put_object": 8, "list_objects_v2": 5, "list_multipart_uploads": 1}
"""How many of each a quiet retrieval makes, or a few more."""
FAULTS = {
    "answer lost": Fault("closed", after=True),
    "unreachable": Fault("unreachable"),
    "slow down": Fault("SlowDown"),
    "failed and done": Fault("InternalError", after=True),
    "denied": Fault("AccessDenied"),
    "conflict": Fault("ConditionalRequestConflict"),
    "killed before": Fault(ends="kill"),
    "killed after": Fault(ends="kill", after=True),
}


@dataclass
class Bench:
    """A PACS with three instances, a bucket, and the runs of a retrieval from one into the other."""

    loop: Loop
    service: Service
    pacs: ModelPacs
    network: Network
    volume: Volume = field(default_factory=Volume)

    def run(self, faults: dict[tuple[str, int], Fault] | None = None, **options: Any) -> str:
        """A run with these faults; its verdict, or ``killed``. Nothing of it is left at work."""
        process = Process(Faults(faults))
        verdicts: list[str] = []

        def work() -> None:
            scu = GetScu(NODE, destination="s3://dicom/in", s3_config=S3, deadlines=DEADLINES, **options)
            verdicts.append(scu.get_study({"StudyInstanceUID": STUDY_UID}).verdict)

        self.pacs.begin(0, {}, {})
        models: list[tuple[Any, str, object]] = [
            (transport, "connect", self.network.connect),
            (files, "disk", self.volume.disk(process)),
            (bucket, "make_client", self.service.make_client(process)),
        ]
        with seams(models):
            task = self.loop.run(work, process)
            if isinstance(task.error, Killed):
                self.loop.bury(process)
                gc.collect()
                verdicts.append("killed")
            else:
                self.loop.settle(process)
                assert task.error is None, task.error
                assert not self.loop.of(process)
                assert not self.volume.left_open()
                assert not self.service.left_open()
        process.die()
        assert not process.breaches
        return verdicts[0]

    def objects(self) -> dict[str, bytes]:
        return {key: body for key, body in self.service.files().items() if key.endswith(".dcm")}

    def is_whole(self) -> bool:
        """Whether each instance is there as it was sent."""
        sent = {data for contents in self.pacs.sent.values() for data in contents}
        return len(self.objects()) == 3 and all(
            any(body.endswith(data) for data in sent) for body in self.objects().values()
        )


@pytest.fixture
def bench() -> Iterator[Callable[[], Bench]]:
    logging.disable(logging.CRITICAL)
    opened = []

    def make() -> Bench:
        opened.append(looped(1))
        loop = opened[-1].__enter__()
        study = archive.build(series=1, instances=3, size=1500, pairs=((archive.CT, wire.EXPLICIT_LE),))
        pacs = ModelPacs(tuple(study), Habits())
        service = Service("dicom")
        service.latency = 0.01
        return Bench(loop, service, pacs, Network(loop, pacs.accept))

    yield make
    for context in reversed(opened):
        context.__exit__(None, None, None)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_request_that_fails_makes_nothing_false(bench: Callable[[], Bench], request_name: str, kind: str) -> None:
    for number in range(1, REQUESTS[request_name] + 1):
        at = bench()
        verdict = at.run({(request_name, number): FAULTS[kind]})
        assert verdict in ("complete", "partial", "unverified", "failed", "killed"), number
        assert verdict != "complete" or at.is_whole(), number
        assert at.run() == "complete", number
        assert at.is_whole(), number


@pytest.mark.parametrize("lack", [{}, {"conditions": "ignored"}, {"etags": False}, {"metadata": False}])
def test_what_others_did_between_two_runs_is_seen(bench: Callable[[], Bench], lack: dict[str, Any]) -> None:
    def service_of(at: Bench) -> tuple[Service, str, bytes]:
        for name, value in lack.items():
            setattr(at.service, name, value)
        assert at.run() == "complete"
        return at.service, *next(iter(at.objects().items()))

    at = bench()
    service, key, body = service_of(at)
    service.overwrite(key, body[:700])  # and the metadata stay
    assert at.run() == "complete"
    assert at.is_whole(), "what was cut off is fetched again"
    at = bench()
    service, key, body = service_of(at)
    service.remove(key)
    assert at.run() == "complete"
    assert at.is_whole()
    at = bench()
    service, key, body = service_of(at)
    other = body[:-60] + bytes(255 - byte for byte in body[-60:-20]) + body[-20:]
    service.overwrite(key, other)
    for _ in range(2):
        assert at.run(verify_held="digest") == "partial"
        assert at.objects()[key] == other, "the first stays"


@pytest.mark.parametrize("tokens", ["none", "same"])
def test_a_listing_that_does_not_go_on_is_not_taken_for_whole(bench: Callable[[], Bench], tokens: Any) -> None:
    at = bench()
    assert at.run() == "complete"
    before = at.objects()
    at.service.conditions, at.service.page, at.service.tokens = "ignored", 2, tokens
    for which in range(3):
        at.pacs.change(Change(0, "correct", which))
    assert at.run(resume=False) == "failed"
    assert at.objects() == before, "the first stay"


@pytest.mark.parametrize("adopt", [False, True])
def test_an_object_that_is_too_large_is_not_read_and_costs_its_instance(
    bench: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, adopt: bool
) -> None:
    at = bench()
    assert at.run() == "complete"
    key = sorted(at.objects())[0]
    at.service.overwrite(key, bytes(100_000))
    monkeypatch.setattr(files, "LARGEST", 50_000)
    read: list[str] = []

    def iter_chunks(body: StreamingBody, size: int = 0) -> Iterator[bytes]:
        read.append(key)
        return iter(())

    monkeypatch.setattr(StreamingBody, "iter_chunks", iter_chunks)
    ledgers = at.service.files()
    for name in ledgers if adopt else ():
        if name.endswith(".jsonl"):
            at.service.remove(name)
    monkeypatch.setattr(bucket.Bucket, "get", lambda self, key, most=None: ledgers[key])
    assert at.run(adopt=adopt, verify_held="size", resume=True) == "partial"
    assert not read, "nothing of it is read"
    assert len(at.objects()[key]) == 100_000


@pytest.mark.parametrize("adopt", [False, True])
def test_what_an_object_is_compared_by_leaves_the_last_of_the_free_space(
    bench: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch, adopt: bool
) -> None:
    at = bench()
    assert at.run() == "complete"
    key = sorted(at.objects())[0]
    at.service.overwrite(key, bytes(20 << 20))
    for name in at.service.files() if adopt else ():
        if name.endswith(".jsonl"):
            at.service.remove(name)
    written: list[int] = []
    write_all = files.write_all

    def noting(fd: int, data: bytes | memoryview) -> None:
        written.append(len(data))
        write_all(fd, data)

    monkeypatch.setattr(files, "write_all", noting)
    at.volume.capacity = 20 << 20
    assert at.run(adopt=adopt) == "partial"
    assert sum(written) < (1 + adopt) * (20 << 20), "it is copied to be adopted, and to be compared"
    at.volume.capacity = None
    assert at.run(adopt=adopt) == "complete", "it begins with zeros, and is torn"
