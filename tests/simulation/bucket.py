"""A model S3 in the place of :func:`airflow_dicom_get.storage.bucket.make_client`.

A :class:`Service` keeps buckets, a :class:`ModelClient` is what one process has of boto3's client: the methods that
the package calls, with the answers and the errors of the real one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from io import BytesIO
from typing import Any, Literal, TypeVar, cast

from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ReadTimeoutError
from botocore.response import StreamingBody

from airflow_dicom_get import clock
from tests.simulation.faults import Fault, Process
from tests.simulation.marks import mark

ENDPOINT = "http://s3.example"
_MOST_PARTS = 10_000
_MOST_KEYS = 1000
_STATUSES = {
    "AccessDenied": 403,
    "BadDigest": 400,
    "ConditionalRequestConflict": 409,
    "EntityTooSmall": 400,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidArgument": 400,
    "InvalidPart": 400,
    "InvalidPartOrder": 400,
    "InvalidRange": 416,
    "MalformedXML": 400,
    "NoSuchBucket": 404,
    "NoSuchKey": 404,
    "NoSuchUpload": 404,
    "NotImplemented": 501,
    "PreconditionFailed": 412,
    "RequestTimeout": 400,
    "RequestTimeTooSkewed": 403,
    "ServiceUnavailable": 503,
    "SlowDown": 503,
}
"""HTTP statuses of S3's error codes. A fault may name each of them, or one of these:"""
LINE = {"unreachable": EndpointConnectionError, "closed": ConnectionClosedError, "silent": ReadTimeoutError}
_STORED_AS = frozenset({"ServerSideEncryption", "SSEKMSKeyId", "StorageClass"})

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Object:
    """An object."""

    body: bytes
    etag: str
    metadata: dict[str, str] = field(default_factory=dict)
    content_type: str = "binary/octet-stream"
    checksum: str | None = None
    """Base64 of the sha256, or of those of its parts with their number, where it was given."""
    modified: datetime = field(default_factory=lambda: _now())


@dataclass(slots=True)
class _Part:
    body: bytes
    etag: str
    checksum: str | None


@dataclass(slots=True)
class _Upload:
    """A multipart upload."""

    bucket: str
    key: str
    metadata: dict[str, str]
    content_type: str
    begun: datetime = field(default_factory=lambda: _now())
    parts: dict[int, _Part] = field(default_factory=dict)


def _now() -> datetime:
    return datetime.fromtimestamp(int(clock.now()), UTC)


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


def sha256_of(body: bytes | bytearray) -> str:
    """The checksum of a body, as S3 has it."""
    return base64.b64encode(hashlib.sha256(body).digest()).decode()


class Service:
    """An S3 service.

    Parameters
    ----------
    *buckets : str
        Those that exist.

    Attributes
    ----------
    conditions : {"kept", "ignored", "refused"}
        What becomes of If-None-Match and If-Match on writes; ``refused`` is 501.
    metadata, etags, checksums : bool
        Whether it keeps what an object says of itself, tells ETags in a listing, and verifies and keeps checksums.
    completes_again : bool
        Whether an upload that is complete may be completed again, as some services do where an answer was lost;
        others have forgotten it.
    page : int
        Most keys in an answer.
    tokens : {"new", "none", "same"}
        What a truncated listing tells to go on with: nothing where a service knows version 1 of it alone.
    least_part : int
        Bytes of the smallest part that is not the last one.
    latency : float
        Seconds before a request is served: others get their turn.
    """

    def __init__(self, *buckets: str) -> None:
        self.objects: dict[str, dict[str, Object]] = {name: {} for name in buckets or ("dicom",)}
        self.uploads: dict[str, _Upload] = {}
        self.completed: dict[str, tuple[str, Object]] = {}
        self.conditions: Literal["kept", "ignored", "refused"] = "kept"
        self.metadata = self.etags = self.checksums = True
        self.completes_again = False
        self.page = _MOST_KEYS
        self.tokens: Literal["new", "none", "same"] = "new"
        self.least_part = 5 << 20
        self.latency = 0.0
        self._numbers = 0

    def number(self) -> int:
        """A new number."""
        self._numbers += 1
        return self._numbers

    def client(self, process: Process | None = None) -> ModelClient:
        """The service as a process sees it."""
        return ModelClient(self, process or Process())

    def make_client(self, process: Process) -> Callable[..., ModelClient]:
        """What is put in the place of :func:`~airflow_dicom_get.storage.bucket.make_client`."""

        def make(config: object) -> ModelClient:
            return self.client(process)

        return make

    # --- what others do, and what a history asks -----------------------------------------------

    def put(self, key: str, body: bytes, *, metadata: Mapping[str, str] | None = None, bucket: str = "dicom") -> None:
        """Somebody else stores an object."""
        self.objects[bucket][key] = Object(body, _etag(body), dict(metadata or {}))

    def overwrite(self, key: str, body: bytes, *, bucket: str = "dicom") -> None:
        """Somebody else stores another body under a key, with the metadata that were there."""
        mark("s3: overwritten by another")
        there = self.objects[bucket][key]
        there.body, there.etag, there.modified = body, _etag(body), _now()
        there.checksum = sha256_of(body) if there.checksum else None

    def remove(self, key: str, *, bucket: str = "dicom") -> None:
        """Somebody else removes an object."""
        mark("s3: removed by another")
        del self.objects[bucket][key]

    def files(self, bucket: str = "dicom") -> dict[str, bytes]:
        """The bodies of all objects, by key."""
        return {key: there.body for key, there in sorted(self.objects[bucket].items())}

    def left_open(self) -> list[str]:
        """The keys of multipart uploads that are neither completed nor aborted."""
        return sorted(upload.key for upload in self.uploads.values())


def _request(name: str, *parameters: str) -> Callable[[F], F]:
    """A request, which meets the faults planned for its method."""
    known = frozenset({"Bucket", *parameters})

    def decorate(method: F) -> F:
        @wraps(method)
        def called(self: ModelClient, **given: Any) -> Any:
            if unknown := given.keys() - known:
                raise self.process.breach(f"the model does not know {', '.join(sorted(unknown))} of {name}")
            return self.request(method, name, given)

        return cast(F, called)

    return decorate


def refusal(code: str, operation: str) -> ClientError:
    """The error of a service's answer."""
    status = _STATUSES[code]
    if operation.startswith("Head"):  # an answer without a body: the status is all that is known
        code = str(status)
    response: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, operation)


class ModelClient:
    """The client of one process."""

    def __init__(self, service: Service, process: Process) -> None:
        self.service, self.process = service, process

    def request(self, method: Callable[..., Any], name: str, given: dict[str, Any]) -> Any:
        """Make a request once."""
        if self.service.latency:
            clock.sleep(self.service.latency)
        fault = self.process.call(method.__name__)
        if fault is not None and fault.error is not None and not fault.after:
            raise self._failure(fault, name)
        try:
            answer = method(self, **given)
        finally:
            if fault is not None:
                self.process.end_of_call(fault)
        if fault is None:
            return answer
        if fault.error is not None:
            mark("s3: an answer was lost")
            raise self._failure(fault, name)
        if fault.short:
            if method.__name__ != "get_object":
                raise self.process.breach(f"{method.__name__} cannot be short")
            mark("s3: a body broke off")
            body = answer["Body"].read()
            answer["Body"] = StreamingBody(BytesIO(body[: len(body) // 2]), len(body))
        return answer

    def _failure(self, fault: Fault, name: str) -> Exception:
        code = str(fault.error)
        mark(f"s3: {name} failed by {code}")
        if code in LINE:
            return LINE[code](endpoint_url=ENDPOINT)
        return refusal(code, name)

    def _bucket(self, name: str, operation: str) -> dict[str, Object]:
        try:
            return self.service.objects[name]
        except KeyError:
            raise refusal("NoSuchBucket", operation) from None

    def _check_condition(self, there: Object | None, given: Mapping[str, Any], operation: str) -> None:
        """Whether a write may go on."""
        if not {"IfMatch", "IfNoneMatch"} & given.keys() or self.service.conditions == "ignored":
            return
        if self.service.conditions == "refused":
            raise refusal("NotImplemented", operation)
        wanted = given.get("IfMatch")
        if wanted is not None and there is None:
            raise refusal("NoSuchKey", operation)
        if wanted is not None and there is not None and wanted.strip('"') != there.etag.strip('"'):
            mark("s3: If-Match failed")
            raise refusal("PreconditionFailed", operation)
        if given.get("IfNoneMatch") not in (None, "*"):
            raise refusal("NotImplemented", operation)
        if given.get("IfNoneMatch") is not None and there is not None:
            mark("s3: If-None-Match failed")
            raise refusal("PreconditionFailed", operation)

    def _checked(self, body: bytes, given: Mapping[str, Any], operation: str) -> str | None:
        """The checksum of a body that was sent, if one was given and counts here."""
        told = given.get("ChecksumSHA256")
        if told is None or not self.service.checksums:
            return None
        if told != sha256_of(body):
            raise refusal("BadDigest", operation)
        return str(told)

    def _metadata(self, given: Mapping[str, Any]) -> dict[str, str]:
        said: Mapping[str, str] = given.get("Metadata", {})
        if not all(value.isascii() for value in said.values()):
            raise self.process.breach("boto3 refuses metadata that are not ASCII")
        return {key.lower(): value for key, value in said.items()} if self.service.metadata else {}

    def _store(self, bucket: str, key: str, made: Object, operation: str) -> dict[str, Any]:
        self._bucket(bucket, operation)[key] = made
        return self._made(made)

    @staticmethod
    def _made(made: Object) -> dict[str, Any]:
        return {"ETag": made.etag} | ({"ChecksumSHA256": made.checksum} if made.checksum else {})

    # --- objects -------------------------------------------------------------------------------

    @_request(
        "PutObject", "Key", "Body", "Metadata", "ContentType", "ChecksumSHA256", "IfNoneMatch", "IfMatch", *_STORED_AS
    )
    def put_object(self, *, Bucket: str, Key: str, Body: bytes | bytearray = b"", **given: Any) -> dict[str, Any]:
        """Store an object."""
        body = bytes(Body)
        self._check_condition(self._bucket(Bucket, "PutObject").get(Key), given, "PutObject")
        checksum = self._checked(body, given, "PutObject")
        kind = given.get("ContentType", "binary/octet-stream")
        return self._store(Bucket, Key, Object(body, _etag(body), self._metadata(given), kind, checksum), "PutObject")

    def _there(self, bucket: str, key: str, given: Mapping[str, Any], operation: str) -> Object:
        there = self._bucket(bucket, operation).get(key)
        if there is None:
            raise refusal("NoSuchKey", operation)
        wanted = given.get("IfMatch")
        if wanted is not None and wanted.strip('"') != there.etag.strip('"'):
            raise refusal("PreconditionFailed", operation)
        return there

    def _told(self, there: Object, given: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {
            "ContentLength": len(there.body),
            "ContentType": there.content_type,
            "ETag": there.etag,
            "LastModified": there.modified,
            "Metadata": dict(there.metadata),
        }
        if given.get("ChecksumMode") == "ENABLED" and there.checksum:
            told |= {
                "ChecksumSHA256": there.checksum,
                "ChecksumType": "COMPOSITE" if "-" in there.checksum else "FULL_OBJECT",
            }
        return told

    @_request("HeadObject", "Key", "ChecksumMode", "IfMatch")
    def head_object(self, *, Bucket: str, Key: str, **given: Any) -> dict[str, Any]:
        """What an object says of itself."""
        return self._told(self._there(Bucket, Key, given, "HeadObject"), given)

    @_request("GetObject", "Key", "Range", "ChecksumMode", "IfMatch")
    def get_object(self, *, Bucket: str, Key: str, **given: Any) -> dict[str, Any]:
        """Read an object, or a range of it."""
        there = self._there(Bucket, Key, given, "GetObject")
        told, body = self._told(there, given), there.body
        if "Range" in given:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", given["Range"])
            if match is None:
                raise self.process.breach(f"the model does not know the range {given['Range']}")
            begin, end = int(match[1]), int(match[2] or len(body))
            if begin >= len(body):
                raise refusal("InvalidRange", "GetObject")
            body = body[begin : end + 1]
            told["ContentRange"] = f"bytes {begin}-{begin + len(body) - 1}/{len(there.body)}"
            told["ContentLength"] = len(body)
        told["Body"] = StreamingBody(BytesIO(body), len(body))
        return told

    @_request("DeleteObject", "Key")
    def delete_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        """Remove an object, if it is there."""
        self._bucket(Bucket, "DeleteObject").pop(Key, None)
        return {}

    @_request("ListObjectsV2", "Prefix", "MaxKeys", "ContinuationToken")
    def list_objects_v2(
        self, *, Bucket: str, Prefix: str = "", MaxKeys: int = _MOST_KEYS, ContinuationToken: str = ""
    ) -> dict[str, Any]:
        """Keys in the order of their bytes, a page at a time."""
        there = self._bucket(Bucket, "ListObjectsV2")
        keys = sorted((key for key in there if key.startswith(Prefix)), key=str.encode)
        begin = 0
        if ContinuationToken and self.service.tokens == "new":
            mark("s3: a further page")
            begin = sum(key.encode() <= bytes.fromhex(ContinuationToken) for key in keys)
        page = keys[begin : begin + min(MaxKeys, self.service.page)]
        contents = [
            {"Key": key, "Size": len(there[key].body), "LastModified": there[key].modified, "StorageClass": "STANDARD"}
            | ({"ETag": there[key].etag} if self.service.etags else {})
            for key in page
        ]
        more = begin + len(page) < len(keys)
        return (
            {"IsTruncated": more, "KeyCount": len(page), "Name": Bucket, "Prefix": Prefix, "MaxKeys": MaxKeys}
            | ({"Contents": contents} if contents else {})
            | (
                {"NextContinuationToken": page[-1].encode().hex()}
                if more and page and self.service.tokens != "none"
                else {}
            )
        )

    # --- in parts ------------------------------------------------------------------------------

    def _upload(self, bucket: str, key: str, upload: str, operation: str) -> _Upload:
        self._bucket(bucket, operation)
        found = self.service.uploads.get(upload)
        if found is None or (found.bucket, found.key) != (bucket, key):
            raise refusal("NoSuchUpload", operation)
        return found

    @_request("CreateMultipartUpload", "Key", "Metadata", "ContentType", "ChecksumAlgorithm", *_STORED_AS)
    def create_multipart_upload(self, *, Bucket: str, Key: str, **given: Any) -> dict[str, Any]:
        """Begin an upload in parts."""
        self._bucket(Bucket, "CreateMultipartUpload")
        kind = given.get("ContentType", "binary/octet-stream")
        name = f"upload-{self.service.number()}"
        self.service.uploads[name] = _Upload(Bucket, Key, self._metadata(given), kind)
        return {"UploadId": name, "Bucket": Bucket, "Key": Key}

    @_request("UploadPart", "Key", "UploadId", "PartNumber", "Body", "ChecksumSHA256")
    def upload_part(
        self, *, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes | bytearray, **given: Any
    ) -> dict[str, Any]:
        """Send a part; one of the same number is replaced."""
        upload = self._upload(Bucket, Key, UploadId, "UploadPart")
        if not 1 <= PartNumber <= _MOST_PARTS:
            raise refusal("InvalidArgument", "UploadPart")
        body = bytes(Body)
        checksum = self._checked(body, given, "UploadPart")
        upload.parts[PartNumber] = part = _Part(body, _etag(body), checksum)
        return {"ETag": part.etag} | ({"ChecksumSHA256": checksum} if checksum else {})

    @_request("CompleteMultipartUpload", "Key", "UploadId", "MultipartUpload", "IfNoneMatch", "IfMatch")
    def complete_multipart_upload(
        self, *, Bucket: str, Key: str, UploadId: str, MultipartUpload: Mapping[str, Any], **given: Any
    ) -> dict[str, Any]:
        """Make one object of the parts."""
        operation = "CompleteMultipartUpload"
        key, made = self.service.completed.get(UploadId, ("", None))
        if made is not None and key == Key and self.service.completes_again:
            mark("s3: an upload was completed again")
            return self._made(made)
        upload = self._upload(Bucket, Key, UploadId, operation)
        self._check_condition(self._bucket(Bucket, operation).get(Key), given, operation)
        told = MultipartUpload.get("Parts", ())
        numbers = [item["PartNumber"] for item in told]
        if not told:
            raise refusal("MalformedXML", operation)
        if numbers != sorted(set(numbers)):
            raise refusal("InvalidPartOrder", operation)
        parts = []
        for item in told:
            part = upload.parts.get(item["PartNumber"])
            if part is None or part.etag.strip('"') != item["ETag"].strip('"'):
                raise refusal("InvalidPart", operation)
            if part.checksum and item.get("ChecksumSHA256") not in (None, part.checksum):
                raise refusal("InvalidPart", operation)
            parts.append(part)
        if any(len(part.body) < self.service.least_part for part in parts[:-1]):
            raise refusal("EntityTooSmall", operation)
        body = b"".join(part.body for part in parts)
        digests = b"".join(bytes.fromhex(part.etag.strip('"')) for part in parts)
        etag = f'{_etag(digests)[:-1]}-{len(parts)}"'
        checksum = None
        if all(part.checksum for part in parts):
            checksum = f"{sha256_of(b''.join(base64.b64decode(part.checksum or '') for part in parts))}-{len(parts)}"
        del self.service.uploads[UploadId]
        made = Object(body, etag, upload.metadata, upload.content_type, checksum)
        self.service.completed[UploadId] = Key, made
        return self._store(Bucket, Key, made, operation)

    @_request("AbortMultipartUpload", "Key", "UploadId")
    def abort_multipart_upload(self, *, Bucket: str, Key: str, UploadId: str) -> dict[str, Any]:
        """Forget the parts."""
        self._upload(Bucket, Key, UploadId, "AbortMultipartUpload")
        del self.service.uploads[UploadId]
        return {}

    @_request("ListMultipartUploads", "Prefix")
    def list_multipart_uploads(self, *, Bucket: str, Prefix: str = "") -> dict[str, Any]:
        """Uploads that are neither completed nor aborted."""
        self._bucket(Bucket, "ListMultipartUploads")
        found = [
            {"Key": upload.key, "UploadId": name, "Initiated": upload.begun}
            for name, upload in self.service.uploads.items()
            if upload.bucket == Bucket and upload.key.startswith(Prefix)
        ]
        return {"IsTruncated": False} | ({"Uploads": found} if found else {})
