"""The model S3 against a real service: the same requests, the same answers; and what a lost answer leads to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError

from airflow_dicom_get import clock
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.errors import S3Error, SinkError
from airflow_dicom_get.sinks.s3_objects import digest_of
from airflow_dicom_get.storage import bucket as seam
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from tests.simulation.bucket import Service, sha256_of
from tests.simulation.faults import Fault, Faults, Killed, ModelError, Process

KEYS = ("a", "a/x", "a/y", "b", "b/é")
TOLD = ("ETag", "ContentLength", "ContentType", "Metadata", "ContentRange", "IsTruncated", "KeyCount")


# --- against a real service ----------------------------------------------------------------------------


class Side:
    """A service, as its client sees it below a prefix of its own."""

    def __init__(self, client: Any, prefix: str) -> None:
        self.client, self.prefix = client, prefix
        self.uploads: list[str] = []
        self.token: str | None = None

    def ask(self, operation: str, key: str, **given: Any) -> Any:
        return getattr(self.client, operation)(Bucket=BUCKET, Key=f"{self.prefix}/{key}", **given)

    def list(self, most: int) -> Any:
        more = {"ContinuationToken": self.token} if self.token else {}
        answer = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/", MaxKeys=most, **more)
        self.token = answer.get("NextContinuationToken")
        return answer


Call = Callable[[Side], Any]


def outcome(call: Call, side: Side) -> Any:
    """What can be compared of an answer or an error."""
    try:
        answer = call(side)
    except ClientError as error:
        return error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
    if not isinstance(answer, dict):
        return answer
    said = {name: answer[name] for name in TOLD if name in answer}
    if "Body" in answer:
        said["Body"] = answer["Body"].read()
    if "Contents" in answer:
        said["Contents"] = [
            (item["Key"].removeprefix(side.prefix), item["Size"], item["ETag"]) for item in answer["Contents"]
        ]
    if "Uploads" in answer:
        said["Uploads"] = sorted(item["Key"].removeprefix(side.prefix) for item in answer["Uploads"])
    return said


def begin(side: Side, key: str) -> str:
    side.uploads.append(side.ask("create_multipart_upload", key, Metadata={"of": "x"})["UploadId"])
    return "begun"


def any_call(service: Service, uploads: list[str], chance: Random) -> tuple[str, Call]:
    """A request; ``uploads`` are the keys of those that were begun.

    Nothing is asked of an upload that is over: moto fails there, or takes it.
    """
    key, body = chance.choice(KEYS), chance.randbytes(chance.choice((0, 1, 40)))
    etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
    first, last, most = chance.randrange(5), chance.randrange(5, 60), chance.randrange(1, 4)
    calls: dict[str, Call] = {
        "put": lambda at: at.ask("put_object", key, Body=body, Metadata={"Sum": key[:1]}, ContentType="text/x"),
        "put new": lambda at: at.ask("put_object", key, Body=body, IfNoneMatch="*"),
        "put with a checksum": lambda at: at.ask("put_object", key, Body=body, ChecksumSHA256=sha256_of(body)),
        "head": lambda at: at.ask("head_object", key),
        "get": lambda at: at.ask("get_object", key),
        "get a range": lambda at: at.ask("get_object", key, Range=f"bytes={first}-{last}"),
        "delete": lambda at: at.ask("delete_object", key),
        "list": lambda at: at.list(most),
        "begin": lambda at: begin(at, key),
        "head if": lambda at: at.ask("head_object", key, IfMatch=etag),
        "list uploads": lambda at: at.client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{at.prefix}/"),
    }
    if uploads:
        n, number = chance.randrange(len(uploads)), chance.randrange(1, 4)
        of, condition = uploads[n], chance.choice(({}, {"IfNoneMatch": "*"}))

        def send(at: Side) -> Any:
            return at.ask("upload_part", of, UploadId=at.uploads[n], PartNumber=number, Body=body)

        def complete(at: Side) -> Any:
            parts = {"Parts": [{"PartNumber": number, "ETag": etag}]}
            return at.ask("complete_multipart_upload", of, UploadId=at.uploads[n], MultipartUpload=parts, **condition)

        if f"upload-{n + 1}" in service.uploads:
            calls |= {
                "part": send,
                "complete": complete,
                "part, complete": lambda at: (outcome(send, at), outcome(complete, at)),
                "abort": lambda at: at.ask("abort_multipart_upload", of, UploadId=at.uploads[n]),
            }
    name = chance.choice(list(calls))
    if name == "begin":
        uploads.append(key)
    return name, calls[name]


@pytest.mark.parametrize("seed", range(2))
def test_the_model_answers_as_a_real_service_does(moto: Moto, seed: int) -> None:
    chance = Random(seed)
    service = Service(BUCKET)
    sides = (Side(service.client(), f"model/{seed}"), Side(moto.client(), f"model/{seed}"))
    uploads: list[str] = []
    told = []
    for _ in range(100):
        name, call = any_call(service, uploads, chance)
        told.append(name)
        model, real = (outcome(call, side) for side in sides)
        assert model == real, f"seed {seed}: {told[-8:]}"


def test_an_upload_in_several_parts_is_one_object(moto: Moto) -> None:
    service = Service(BUCKET)
    bodies = {1: b"1" * (5 << 20), 2: b"2"}

    def upload(at: Side) -> list[Any]:
        begun = at.ask("create_multipart_upload", "large", ChecksumAlgorithm="SHA256", Metadata={"of": "x"})["UploadId"]
        parts = []
        for number, body in bodies.items():
            checksum = sha256_of(body)
            part = at.ask("upload_part", "large", UploadId=begun, PartNumber=number, Body=body, ChecksumSHA256=checksum)
            parts.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum})

        def completed(parts: list[Any]) -> Any:
            told = {"UploadId": begun, "MultipartUpload": {"Parts": parts}}
            return outcome(lambda at: at.ask("complete_multipart_upload", "large", **told), at)

        return [
            completed([{**parts[0], "ETag": '"0"'}]),
            completed(parts),
            outcome(lambda at: at.ask("head_object", "large"), at),
            at.client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{at.prefix}/").get("Uploads"),
        ]

    said = upload(Side(service.client(), "parted"))
    assert said == upload(Side(moto.client(), "parted"))
    assert said[0] == ("InvalidPart", 400)
    head = service.client().head_object(Bucket=BUCKET, Key="parted/large", ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"].endswith("-2")
    assert head["ChecksumType"] == "COMPOSITE"


# --- through the seam ----------------------------------------------------------------------------------


@pytest.fixture
def service() -> Service:
    return Service(BUCKET)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "sleep", lambda seconds: None)


@pytest.fixture
def opened(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., seam.Bucket]]:
    """A bucket of the package on the model, for a process whose requests meet these faults."""
    processes: list[Process] = []

    def open_bucket(faults: dict[tuple[str, int], Fault] | None = None, attempts: int | None = None) -> seam.Bucket:
        processes.append(Process(Faults(faults)))
        monkeypatch.setattr(seam, "make_client", service.make_client(processes[-1]))
        return seam.Bucket(BUCKET, S3Config(), attempts=attempts)

    yield open_bucket
    assert not any(process.breaches for process in processes)


@pytest.mark.parametrize(("tokens", "said"), [("none", "missing"), ("same", "that of an earlier answer")])
def test_a_listing_without_an_end_or_a_token_is_an_error(
    service: Service, opened: Callable[..., seam.Bucket], tokens: Any, said: str
) -> None:
    bucket = opened()
    for number in range(5):
        bucket.put(f"study/{number}", b"")
    service.page, service.tokens = 2, tokens
    with pytest.raises(S3Error, match=said) as raised:
        list(bucket.list("study/"))
    assert not raised.value.transient
    service.page = 5
    assert len(list(bucket.list("study/"))) == 5


def test_a_run_that_is_to_end_reads_no_object_to_its_end(service: Service, opened: Callable[..., seam.Bucket]) -> None:
    class Ended:
        hard = left = False

        def ending(self) -> bool:
            return True

        def pause(self, seconds: float) -> None:
            """Nothing is waited for."""

        def attend(self, hasten: Callable[[], object]) -> None:
            """Nothing is to be hastened."""

    bucket = opened()
    bucket.put("study/1", b"content")
    assert digest_of(bucket, "study/1") == hashlib.sha256(b"content").digest()
    bucket.attend(Ended())
    with pytest.raises(SinkError, match="ended"):
        digest_of(bucket, "study/1")


def test_what_was_put_is_listed_read_and_asked_for(service: Service, opened: Callable[..., seam.Bucket]) -> None:
    bucket = opened()
    etags = [bucket.put(f"study/{number:03}", bytes(number)) for number in range(25)]
    service.page = 10
    assert [item.etag for item in bucket.list("study/")] == etags
    assert [item.size for item in bucket.list("study/01")] == list(range(10, 20))
    assert bucket.get("study/024") == bytes(24)
    with pytest.raises(S3Error, match="NoSuchKey") as raised:
        bucket.get("study/025")
    assert raised.value.facts["status"] == 404
    service.etags = False
    assert {item.etag for item in bucket.list("study/")} == {""}


def test_a_lost_answer_makes_the_client_meet_its_own_object(
    service: Service, opened: Callable[..., seam.Bucket]
) -> None:
    bucket = opened({("put_object", 1): Fault("closed", after=True)})
    with pytest.raises(S3Error, match="PreconditionFailed") as raised:
        bucket.put("x", b"1", IfNoneMatch="*")
    assert raised.value.facts["status"] == 412
    assert service.files() == {"x": b"1"}
    assert opened({("put_object", 1): Fault("silent", after=True)}).put("x", b"2") == service.objects[BUCKET]["x"].etag


def test_outages_are_outlasted_and_then_told(service: Service, opened: Callable[..., seam.Bucket]) -> None:
    passing = {("put_object", number): Fault("SlowDown") for number in range(1, 5)}
    opened(passing).put("x", b"1")
    with pytest.raises(S3Error, match="SlowDown") as raised:
        opened({**passing, ("put_object", 5): Fault("SlowDown")}).put("y", b"1")
    assert raised.value.transient
    with pytest.raises(S3Error, match="EndpointConnectionError"):
        opened({("put_object", 1): Fault("unreachable")}, attempts=1).put("y", b"1")
    with pytest.raises(S3Error, match="AccessDenied") as raised:
        opened({("put_object", 1): Fault("AccessDenied")}).put("y", b"1")
    assert not raised.value.transient
    assert service.files() == {"x": b"1"}


def test_a_body_that_breaks_off_is_told(service: Service, opened: Callable[..., seam.Bucket]) -> None:
    service.put("x", bytes(100))
    with pytest.raises(S3Error, match="get_object"):
        opened({("get_object", 1): Fault(short=True)}).get("x")
    with pytest.raises(IncompleteReadError):
        service.client(Process(Faults({("get_object", 1): Fault(short=True)}))).get_object(Bucket=BUCKET, Key="x")[
            "Body"
        ].read()


@pytest.mark.parametrize(("kind", "works"), [("kept", True), ("ignored", False), ("refused", False)])
def test_services_differ_in_conditional_writes(
    service: Service, opened: Callable[..., seam.Bucket], kind: Any, works: bool
) -> None:
    service.conditions = kind
    bucket = opened()
    assert bucket.writes_conditionally("probe") is works
    bucket.put("x", b"1")
    if kind == "kept":
        etag = service.objects[BUCKET]["x"].etag
        service.overwrite("x", b"")
        with pytest.raises(S3Error, match="PreconditionFailed"):
            bucket.put("x", b"2", IfMatch=etag)
        with pytest.raises(S3Error, match="NoSuchKey"):
            bucket.put("y", b"2", IfMatch=etag)
        assert bucket.put("x", b"2", IfMatch=service.objects[BUCKET]["x"].etag)


def test_another_overwrites_with_fewer_bytes_and_the_metadata_stay(
    service: Service, opened: Callable[..., seam.Bucket]
) -> None:
    bucket = opened()
    bucket.put("x", b"123", Metadata={"sha256": "of 123"}, ChecksumSHA256=sha256_of(b"123"))
    service.overwrite("x", b"1")
    head = bucket.call("head_object", "x", ChecksumMode="ENABLED")
    assert (head["ContentLength"], head["Metadata"]) == (1, {"sha256": "of 123"})
    assert head["ChecksumSHA256"] == sha256_of(b"1")
    service.metadata = False
    bucket.put("x", b"123", Metadata={"sha256": "of 123"})
    assert bucket.call("head_object", "x")["Metadata"] == {}
    service.remove("x")
    with pytest.raises(S3Error, match="NotFound"):
        bucket.call("head_object", "x")


def test_a_body_that_changed_in_transit_is_refused(service: Service, opened: Callable[..., seam.Bucket]) -> None:
    with pytest.raises(S3Error, match="BadDigest"):
        opened().put("x", b"1", ChecksumSHA256=sha256_of(b"2"))
    service.checksums = False
    opened().put("x", b"1", ChecksumSHA256=sha256_of(b"2"))
    assert "ChecksumSHA256" not in opened().call("head_object", "x", ChecksumMode="ENABLED")


@pytest.mark.parametrize(("again", "outcome"), [(False, "NoSuchUpload"), (True, None)])
def test_the_lost_answer_of_a_completion(
    service: Service, opened: Callable[..., seam.Bucket], again: bool, outcome: str | None
) -> None:
    service.completes_again = again
    bucket = opened({("complete_multipart_upload", 1): Fault("InternalError", after=True)})
    upload = bucket.call("create_multipart_upload", "x")["UploadId"]
    assert service.left_open() == ["x"]
    part = bucket.call("upload_part", "x", UploadId=upload, PartNumber=1, Body=b"1")
    told = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    if outcome is None:
        assert bucket.call("complete_multipart_upload", "x", UploadId=upload, MultipartUpload=told)["ETag"]
    else:
        with pytest.raises(S3Error, match=outcome):
            bucket.call("complete_multipart_upload", "x", UploadId=upload, MultipartUpload=told)
    assert service.files() == {"x": b"1"}
    assert not service.left_open()


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_process_makes_no_further_request(
    service: Service, opened: Callable[..., seam.Bucket], after: bool
) -> None:
    bucket = opened({("put_object", 2): Fault(ends="kill", after=after)})
    bucket.put("x", b"1")
    with pytest.raises(Killed):
        bucket.put("y", b"1")
    with pytest.raises(Killed):
        bucket.call("delete_object", "x")
    assert service.files() == {"x": b"1"} | ({"y": b"1"} if after else {})


def test_what_the_model_does_not_know_is_said(service: Service) -> None:
    client = service.client()
    with pytest.raises(ModelError, match="Tagging"):
        client.put_object(Bucket=BUCKET, Key="x", Body=b"", Tagging="a=b")
    with pytest.raises(ModelError, match="ASCII"):
        client.put_object(Bucket=BUCKET, Key="x", Body=b"", Metadata={"of": "é"})
    assert len(client.process.breaches) == 2
    assert not service.files()
    with pytest.raises(ClientError, match="NoSuchBucket"):
        client.put_object(Bucket="other", Key="x", Body=b"")
    with pytest.raises(EndpointConnectionError, match="Could not connect"):
        service.client(Process(Faults({("list_objects_v2", 1): Fault("unreachable")}))).list_objects_v2(Bucket=BUCKET)
