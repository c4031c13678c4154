"""A bucket: requests to an S3 service, and its failures as errors that say what to check."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakSet

from airflow_dicom_get import clock
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.errors import S3Error, peer_text
from airflow_dicom_get.storage import files

REQUESTS_PER_SLOT = 4
"""Requests at a time per ``max_concurrency``: small objects wait for the answer rather than for the line."""
CONNECT_TIMEOUT = 5
READ_TIMEOUT = 20
"""Seconds without a byte, after which a request is made again."""
ATTEMPTS = 5
_OUTLASTED = 45.0
"""Seconds after the first try of a request in which another one is begun."""
_LEAST_GAP, _LONGEST_GAP = 0.05, 1.0
"""Seconds between two requests while the service asks to slow down."""
_ENDING, _AT_ONCE = 5.0, 1.5
"""Seconds that an answer may take in a run that is to end, and a request in one that is to end at once."""
_CHUNK = 1 << 20
_LONGEST_ETAG = 256
"""Characters of an ETag; those of services have some forty."""
_LONGEST_URI = 1 << 10
"""Characters of an address in an error."""
_AWS = (".amazonaws.com", ".amazonaws.com.cn", ".amazonaws.eu", ".api.aws")
"""Ends of the names of hosts of AWS."""

_CREDENTIALS = "Check the credentials: the access key, the secret key, and the session token if there is one."
_CLOCK = "Check the clock of this machine."
_REGION = "Check the region{expected}, and the endpoint."
_LINE = "The body changed in transit: check the network, and any proxy in between."
_POLICY = "Check the policy of bucket and user: PutObject, GetObject, ListBucket and AbortMultipartUpload are needed."
_BUCKET = "Check the bucket's name, the endpoint and the region; the bucket is not created automatically."
_ENDPOINT = "Check the endpoint, the network, and that the service is running."
_HINTS = {
    "NoSuchBucket": _BUCKET,
    "InvalidBucketName": _BUCKET,
    "AccessDenied": _POLICY,
    "AllAccessDisabled": _POLICY,
    "Forbidden": f"{_CREDENTIALS} {_POLICY}",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": f"{_CREDENTIALS} {_CLOCK}",
    "ExpiredToken": "The credentials have expired: obtain new ones.",
    "ExpiredTokenException": "The credentials have expired: obtain new ones.",
    "InvalidToken": _CREDENTIALS,
    "InvalidTokenId": _CREDENTIALS,
    "TokenRefreshRequired": "The credentials have expired: obtain new ones.",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "NotImplemented": "The service does not support one of sse, kms_key_id and storage_class: omit it.",
    "InvalidStorageClass": "The service does not support this storage_class: omit it.",
    "InvalidEncryptionAlgorithmError": "Check sse.",
    "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give s3_config.profile.",
    "PartialCredentialsError": _CREDENTIALS,
    "CredentialRetrievalError": _CREDENTIALS,
    "UnauthorizedSSOTokenError": "Log in again: the session of the profile has expired.",
    "SSOTokenLoadError": "Log in again: the session of the profile has expired.",
    "ProfileNotFound": "Check the name of the profile, and the AWS configuration files.",
    "ParamValidationError": "Check bucket, prefix and options.",
    "ValueError": _ENDPOINT,
    "BadDigest": _LINE,
    "XAmzContentSHA256Mismatch": _LINE,
    "XAmzContentChecksumMismatch": _LINE,
    "SSLError": "Check the scheme of the endpoint (https or http) and its certificate; "
    "ca_bundle names the certificate authorities to trust.",
    "InvalidRegionError": _REGION,
}
_ELEMENTS = {"head_object": ("ContentLength",), "create_multipart_upload": ("UploadId",)}
_OF_EACH_LISTED = ("Key", "Size")
"""What an answer says at least."""
_WORDS = {"NoCredentialsError": "no credentials were found"}
"""Names of boto3's exceptions that say too little."""
_PASSING_STATUSES = frozenset({408, 409, 425, 429})
_PASSING_CODES = frozenset(code for code, hint in _HINTS.items() if hint is _LINE) | {"RequestTimeout"}
"""Answered with 400, and another try may do better."""
_FINAL_EXCEPTIONS = frozenset(name for name in _HINTS if name.endswith(("Error", "NotFound")))


class Listed(NamedTuple):
    """An object as a listing tells it; some services leave the ETag empty."""

    key: str
    size: int
    etag: str


class Ending(Protocol):
    """Whether a run is to end: its :class:`~airflow_dicom_get.net.association.CancelToken`."""

    hard: bool
    left: bool

    def ending(self) -> bool:
        """Whether nothing new is to be begun."""

    def pause(self, seconds: float) -> None:
        """Wait so many seconds, or until it is to end."""

    def attend(self, hasten: Callable[[], object]) -> None:
        """Have something called again and again once it is to end."""


class Bucket:
    """One bucket of one service. Thread-safe; the client is made at the first request.

    Parameters
    ----------
    name : str
        The bucket.
    config : S3Config, optional
        How to reach it; the usual AWS places by default.
    attempts : int, optional
        How often a request is made while it fails by something that may pass: after longer waits each time, and in a
        run that is to end no more. Once no answer came at all, the next request is made once.
    """

    def __init__(self, name: str, config: S3Config | None = None, *, attempts: int | None = None) -> None:
        self.name = name
        self.config = config or S3Config()
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._silent = False
        self.pace = Pace()
        self._ending: Ending | None = None
        self._lines = _Lines()
        self._making = threading.Lock()
        self._made: Any = None
        self._probe: str | None = None
        self._replaces: bool | None = None

    def uri(self, key: str) -> str:
        """Address of an object, fit for :func:`~airflow_dicom_get.config.destination.parse_destination`."""
        return f"s3://{self.name}/{quote(key)}"

    def _named(self, key: str) -> str:
        """The address of an object as errors tell it: its key may come from the service's own listing."""
        return peer_text(self.uri(key), _LONGEST_URI)

    def key_of(self, uri: str) -> str:
        """The key of an object, given by its address."""
        return unquote(uri.removeprefix(self.uri("")))

    def recorded_as(self, prefix: str) -> str:
        """What a prefix is called in ledgers: its address, and before it the service, unless that is AWS.

        Bucket names are unique within AWS; two other services may each have one of the same name.
        """
        parts = [part for part in (self._service(), self.name, quote(prefix)) if part]
        return f"s3://{'/'.join(parts)}"

    def _service(self) -> str | None:
        """Host and port of the service, which a profile or the environment may name; None for AWS."""
        from botocore.exceptions import BotoCoreError

        try:
            endpoint = self._client().meta.endpoint_url
        except (AttributeError, BotoCoreError, ValueError):  # requests will say what is wrong
            endpoint = self.config.endpoint
        address = urlsplit(endpoint or "")
        host = address.hostname or ""
        if not host or host.endswith(_AWS):
            return None
        # The port is always there: no bucket is called so.
        return f"{f'[{host}]' if ':' in host else host}:{address.port or (80 if address.scheme == 'http' else 443)}"

    def attend(self, ending: Ending) -> None:
        """Let the end of a run end the requests: they fail as soon as the service keeps it waiting.

        Once it was left to itself, or has returned, none is made any more.
        """
        self._ending = ending
        ending.attend(lambda: self._lines.hang_up(at_once=ending.hard))

    def is_ending(self) -> bool:
        """Whether the run is to end."""
        return self._ending is not None and self._ending.ending()

    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = make_client(self.config)
                self._lines.note(self._made)
            return self._made

    def call(self, operation: str, key: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Make a request: a method of boto3's client, with its parameters.

        Raises
        ------
        S3Error
            It failed, also when tried again.
        """
        if key is not None:
            parameters["Key"] = key
        from botocore.exceptions import BotoCoreError, ClientError

        pause = self._ending.pause if self._ending is not None else clock.sleep
        began = clock.monotonic()
        for attempt in count(1):
            if self._ending is not None and self._ending.left:
                raise S3Error("The run has ended.", bucket=self.name, key=key, operation=operation, code="", status=0)
            asked = clock.monotonic()
            try:
                answer: dict[str, Any] = getattr(self._client(), operation)(Bucket=self.name, **parameters)
            except (ClientError, BotoCoreError, ValueError) as raised:
                error = self._error(raised, operation, key or parameters.get("Prefix"))
                if error.facts["status"] == 429 or error.facts["code"].startswith("SlowDown"):
                    self.pace.slower(asked)
                last = attempt >= self._attempts or self._silent or clock.monotonic() - began > _OUTLASTED
                last = last or not error.transient
                if not last:
                    pause(max(clock.jitter(0.0, 1.0) * 2 ** (attempt - 1), self.pace.place() - clock.monotonic()))
                if last or self.is_ending():
                    self._silent = not error.facts["status"]
                    raise error from raised
            else:
                self._silent = False
                self.pace.faster()
                self._check_elements(answer, operation, key or parameters.get("Prefix"))
                return _without_long_etags(answer)
        raise AssertionError  # pragma: no cover - the loop has no end

    def _check_elements(self, answer: dict[str, Any], operation: str, key: str | None) -> None:
        absent = [name for name in _ELEMENTS.get(operation, ()) if name not in answer]
        absent += [name for item in answer.get("Contents", ()) for name in _OF_EACH_LISTED if name not in item]
        if absent:
            raise S3Error(
                f"The answer to S3 {operation} on {self._where(key)} has no {absent[0]}.",
                hint="The service does not answer as S3 does: check the endpoint, and any proxy in between.",
                bucket=self.name,
                key=key,
                operation=operation,
                code="",
                status=200,
                passing=False,
            )

    def _where(self, key: str | None) -> str:
        return self._named(key) if key else f"s3://{self.name}"

    def stored_as(self) -> dict[str, str]:
        """What is said of every object that is made: encryption and storage class."""
        config = self.config
        wanted = {
            "ServerSideEncryption": config.sse,
            "SSEKMSKeyId": config.kms_key_id,
            "StorageClass": config.storage_class,
        }
        return {name: value for name, value in wanted.items() if value is not None}

    def put(self, key: str, body: bytes | bytearray, **parameters: Any) -> str:
        """Store an object whole, and give its ETag."""
        answer = self.call("put_object", key, Body=body, **self.stored_as(), **parameters)
        return str(answer.get("ETag", ""))

    def get(self, key: str, most: int | None = None) -> bytes:
        """Read an object whole. Raises :class:`S3Error` where it is larger than ``most`` bytes."""

        def check(size: int) -> None:
            if most is not None and size > most:
                what = f"The object {self._named(key)} is larger than {most >> 20} MiB."
                raise S3Error(what, hint="It was not changed.", bucket=self.name, key=key, passing=False)

        content = bytearray()
        for chunk in self.read(key, check):
            content += chunk
            check(len(content))
        return bytes(content)

    def read(
        self, key: str, check: Callable[[int], object] = files.check_size, first: int | None = None
    ) -> Iterator[bytes]:
        """Read an object piece by piece.

        Parameters
        ----------
        check : callable
            Is given its size before anything of it is read, and raises where that is too much.
        first : int, optional
            Asks for so many bytes from its beginning alone; a service may give more.

        Raises
        ------
        S3Error
            It cannot be read.
        OSError
            It is too large for an instance.
        """
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        part = {} if first is None else {"Range": f"bytes=0-{first - 1}"}
        answer = self.call("get_object", key, **part)
        body = answer["Body"]
        try:
            check(int(answer.get("ContentLength", 0)))
        except BaseException:
            body.close()
            raise
        try:
            yield from body.iter_chunks(_CHUNK)
        except (BotoCoreError, HTTPError, OSError) as error:
            raise self._error(error, "get_object", key) from error
        finally:
            body.close()

    def list(self, prefix: str) -> Iterator[Listed]:
        """All objects whose keys begin so.

        Raises
        ------
        S3Error
            It cannot be listed, or not to its end: an answer is truncated, and does not tell where to go on.
        """
        more: dict[str, str] = {}
        seen: set[str] = set()
        while True:
            answer = self.call("list_objects_v2", Prefix=prefix, **more)
            for item in answer.get("Contents", ()):
                yield Listed(item["Key"], item["Size"], item.get("ETag", ""))
            if not answer.get("IsTruncated"):
                return
            token = answer.get("NextContinuationToken")
            if not token or token in seen:
                raise S3Error(
                    f"The listing of s3://{self.name}/{prefix} is truncated, and its continuation token is "
                    f"{'that of an earlier answer' if token else 'missing'}.",
                    hint="The service does not know version 2 of ListObjects: use a newer version of it.",
                    bucket=self.name,
                    key=prefix,
                    operation="list_objects_v2",
                    passing=False,
                )
            seen.add(token)
            more = {"ContinuationToken": token}

    def reach(self, prefix: str) -> None:
        """Find out whether the bucket can be listed. Raises :class:`S3Error`."""
        self.call("list_objects_v2", Prefix=prefix, MaxKeys=1)

    def writes_conditionally(self, key: str) -> bool:
        """Write a small object, and find out whether the service can be told not to replace one.

        Raises
        ------
        S3Error
            It cannot be written.
        """
        self._probe = key
        for _ in range(2):
            try:
                self.put(key, b"Says which conditional writes work here.\n", IfNoneMatch="*")
            except S3Error as error:
                if error.facts["status"] in (409, 412):
                    return True
                if error.facts["status"] == 501 and not self.stored_as():
                    return False
                raise
        return False

    def replaces_conditionally(self) -> bool:
        """Whether the service can be told to replace one certain object and no other (``If-Match``).

        It is tried once, at the object that :meth:`writes_conditionally` wrote; without that the answer is no. Uploads
        that ask at the same time may each try it: behind a lock they would wait for one request, and hear no cancel.
        """
        if self._replaces is None and self._probe is not None:
            try:
                self.put(self._probe, b"", IfMatch='"00000000000000000000000000000000"')
                self._replaces = False
            except S3Error as error:
                self._replaces = error.facts["status"] == 412
        return bool(self._replaces)

    def _error(self, error: Exception, operation: str, key: str | None) -> S3Error:
        response = getattr(error, "response", None) or {}
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        told = response.get("Error", {})
        code = str(told.get("Code") or type(error).__name__)
        code = {"403": "Forbidden", "404": "NotFound", "301": "PermanentRedirect"}.get(code, code)
        hint = _HINTS.get(code)
        if hint is None and not response:
            hint = _ENDPOINT
        elif hint is None:
            hint = "" if status >= 500 or status in (404, 412, *_PASSING_STATUSES) else f"{_CREDENTIALS} {_POLICY}"
        if "{expected}" in hint:
            found = told.get("Region") or _expected_region(str(told.get("Message", "")))
            hint = hint.format(expected=f": the service expects {peer_text(found, 32)}" if found else "")
        passing = (
            status >= 500
            or status in _PASSING_STATUSES
            or code in _PASSING_CODES
            or (not response and code not in _FINAL_EXCEPTIONS)
        )
        return S3Error(
            f"S3 {operation} on {self._where(key)} failed: "
            f"{_WORDS.get(code) or peer_text(code, 48)}{f' (HTTP {status})' if status else ''}.",
            hint=hint,
            bucket=self.name,
            key=key,
            operation=operation,
            code=peer_text(code, 48),
            status=status,
            passing=passing and code != "NotImplemented",
        )


def _without_long_etags(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer, of a listing too, without what is longer than any ETag: each one is kept, and goes into a ledger."""
    for told in (answer, *answer.get("Contents", ())):
        if len(told.get("ETag") or "") > _LONGEST_ETAG:
            del told["ETag"]
    return answer


def _expected_region(message: str) -> str | None:
    match = re.search(r"expecting '([a-z0-9-]+)'", message)
    return match[1] if match else None


class Pace:
    """How soon one of many requests may be begun: at once, until the service asks to slow down.

    botocore's own, of ``adaptive`` retries, waits in the request itself, and hears no end of a run there.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._gap = 0.0
        self._next = self._slowed_at = float("-inf")

    def place(self) -> float:
        """When the next request may be begun, which has that place."""
        with self._mutex:
            at = max(clock.monotonic(), self._next)
            self._next = at + self._gap
            return at

    def slower(self, asked: float) -> None:
        """One that was begun at ``asked`` was too much: half as many from now on, unless that was done since."""
        with self._mutex:
            if asked >= self._slowed_at:
                self._gap = min(max(2 * self._gap, _LEAST_GAP), _LONGEST_GAP)
                self._slowed_at = clock.monotonic()

    def faster(self) -> None:
        """One was answered."""
        with self._mutex:
            self._gap = 0.95 * self._gap if self._gap > _LEAST_GAP / 2 else 0.0


class _Lines:
    """The connections of a client, to be hung up on: botocore's own end of one leaves those alone that are in use."""

    def __init__(self) -> None:
        self._open: WeakSet[Any] = WeakSet()
        self._mutex = threading.Lock()

    def note(self, client: Any) -> None:
        """Note each connection that a client makes; where it is not botocore's as we know it, its timeouts do."""
        session = getattr(getattr(client, "_endpoint", None), "http_session", None)
        kinds = getattr(session, "_pool_classes_by_scheme", {})
        kinds.update({scheme: self._noting(pool) for scheme, pool in kinds.items()})

    def _noting(self, pool: Any) -> Any:
        lines = self

        class Line(pool.ConnectionCls):  # type: ignore[misc]
            began = asked = float("inf")
            wire: Any = None
            """Its socket: an answer that closes the connection has it to the end of its body, and ``sock`` is None."""

            def connect(self) -> None:
                super().connect()
                self.wire = self.sock
                with lines._mutex:
                    lines._open.add(self)

            def putrequest(
                self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
            ) -> None:
                self.began = clock.monotonic()
                super().putrequest(method, url, skip_host, skip_accept_encoding)

            def getresponse(self) -> Any:
                self.asked = clock.monotonic()
                return super().getresponse()

        def put_back(self: Any, line: Any) -> None:
            """Its answer is read to the end."""
            if line is not None:
                line.began = line.asked = float("inf")
            pool._put_conn(self, line)

        return type(pool.__name__, (pool,), {"ConnectionCls": Line, "_put_conn": put_back})

    def hang_up(self, *, at_once: bool) -> None:
        """Hang up where a request lasts for long, or unless ``at_once`` only its answer; any thread."""
        now = clock.monotonic()
        with self._mutex:
            lines = list(self._open)
        for line in lines:
            if now - (line.began if at_once else line.asked) > (_AT_ONCE if at_once else _ENDING):
                # The TLS session is in the hands of another thread, and it is the line below it that is closed.
                with suppress(OSError, TypeError):
                    socket.socket.shutdown(line.wire, socket.SHUT_RDWR)


def make_client(config: S3Config) -> Any:
    """A boto3 client of a service, set up for many uploads at a time.

    :class:`Bucket` asks for it by this name, and calls nothing but its methods: another may be put in its place.
    """
    from botocore.config import Config

    session = config.session()
    own_path = config.path_style if config.path_style is not None else config.endpoint is not None
    own: dict[str, Any] = {
        "signature_version": "s3v4",
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "max_pool_connections": config.max_concurrency * REQUESTS_PER_SLOT,
        # What is made again, how often and how fast, is decided here.
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "tcp_keepalive": True,
        # The digest of each body is given here; what is signed is verified by services that ignore checksums.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    s3 = {"addressing_style": "path" if own_path else "auto", "payload_signing_enabled": True}
    more = config.client_options()
    return session.client(
        "s3",
        region_name=config.region or session.region_name or "us-east-1",
        endpoint_url=config.endpoint,
        verify=config.ca_bundle,
        config=Config(**{**own, **more, "s3": {**s3, **(more.get("s3") or {})}}),
    )
