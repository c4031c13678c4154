"""Groups of settings that the layers share: deadlines, TLS, identity, storage targets, the time window.

A leaf module: ``net``, ``sinks`` and ``engine`` take these objects as they are.
"""
# ruff: noqa: RUF009 - setting() makes dataclass fields, as dataclasses.field() does.

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from typing import Any, ClassVar, Literal
from zoneinfo import ZoneInfo

from airflow_dicom_get.config.checks import (
    AETitle,
    Bytes,
    Checked,
    Choice,
    Flag,
    Group,
    Integer,
    Parsed,
    Seconds,
    Secret,
    Text,
    invalid,
    reworded,
    setting,
    shown,
)
from airflow_dicom_get.config.destination import is_bucket
from airflow_dicom_get.config.node import Node, password_in
from airflow_dicom_get.errors import InvalidOption

MAX_PDU_LENGTH = 131072
"""The largest P-DATA-TF we ask for; larger ones measured slower, and DCMTK sends no larger ones."""


@dataclass(frozen=True, slots=True)
class Deadlines(Checked):
    """How long each wait may last, in seconds. The error that ends a wait carries the name.

    ``sub_operation`` and ``stall`` keep us from answering late: Orthanc gives up on a C-STORE after
    30 s and dcmqrscp after 60 s, so we abort before that and continue over a new association.
    """

    group: ClassVar[str] = "deadlines."

    connect: float = setting(
        10.0,
        Seconds(),
        "TCP connection and TLS handshake.",
        unit="s",
        shell=("--connect-timeout",),
        connection="connect_timeout",
    )
    acse: float = setting(
        30.0,
        Seconds(),
        "Answer to an association request, and to a C-ECHO.",
        unit="s",
        shell=("--acse-timeout",),
        connection="acse_timeout",
    )
    find_response: float = setting(
        120.0, Seconds(), "Each response to a C-FIND.", unit="s", shell=("--find-response-timeout",)
    )
    next_object: float = setting(
        300.0,
        Seconds(),
        "Until the next instance arrives, and the first one; four times as long for a first one listed as NEARLINE.",
        unit="s",
        shell=("--next-object-timeout",),
        connection="next_object_timeout",
    )
    idle: float = setting(
        60.0,
        Seconds(),
        "Silence in the middle of a message.",
        unit="s",
        shell=("--idle-timeout",),
        connection="idle_timeout",
    )
    min_rate: int = setting(
        1000,
        Bytes(0),
        "Minimum rate inside a message, counted only while waiting for the peer; 0 switches it off.",
        unit="bytes/s",
        shell=("--min-rate",),
        metavar="RATE",
    )
    min_rate_window: float = setting(
        60.0, Seconds(), "Time over which the minimum rate is measured.", unit="s", shell=("--min-rate-window",)
    )
    sub_operation: float = setting(
        25.0,
        Seconds(),
        "From the last fragment of an instance to our C-STORE response.",
        unit="s",
        shell=("--sub-operation-timeout",),
    )
    stall: float = setting(
        25.0,
        Seconds(),
        "Longest time that a sending peer is not read from, while the destination is slow.",
        unit="s",
        shell=("--stall-timeout",),
    )
    operation: float | None = setting(
        None,
        Seconds(optional=True),
        "The whole operation. Default: no limit.",
        unit="s",
        shell=("--deadline", "--operation-timeout"),
        connection="operation_timeout",
    )
    release: float = setting(5.0, Seconds(), "Answer to a release request.", unit="s", shell=("--release-timeout",))


@dataclass(frozen=True, slots=True)
class Tls(Checked):
    """TLS towards a node. Without ``ca`` the certificate authorities of the system are trusted.

    The flags of the shell are those of the source; of another node they begin as its own one does.
    """

    group: ClassVar[str] = "tls."

    ca: str | None = setting(
        None,
        Text(optional=True),
        "PEM file of the certificate authorities to trust. Default: those of the system.",
        shell=("--tls-ca",),
        metavar="FILE",
        connection="tls_ca_file",
    )
    cert: str | None = setting(
        None,
        Text(optional=True),
        "PEM file of our certificate.",
        shell=("--tls-cert",),
        metavar="FILE",
        connection="tls_cert_file",
    )
    key: str | None = setting(
        None,
        Text(optional=True),
        "PEM file of the private key of our certificate.",
        shell=("--tls-key",),
        metavar="FILE",
        connection="tls_key_file",
    )
    key_password: str | None = setting(None, Secret(optional=True), "Passphrase of the private key.")
    server_name: str | None = setting(
        None,
        Text(optional=True),
        "Name that the certificate of the peer must have. Default: the host.",
        shell=("--tls-server-name",),
        metavar="NAME",
        connection="tls_server_name",
    )
    check_hostname: bool = setting(
        True,
        Flag(),
        "Check the name in the certificate of the peer.",
        off=("--tls-no-check-hostname",),
        off_doc="Accept a certificate with any name.",
        connection="tls_check_hostname",
    )
    min_version: Literal["1.2", "1.3"] = setting(
        "1.2",
        Choice("1.2", "1.3"),
        "Oldest TLS version to accept.",
        shell=("--tls-min-version",),
        connection="tls_min_version",
    )

    def __post_init__(self) -> None:
        # super() without arguments does not find the class that slots=True creates.
        Checked.__post_init__(self)
        if self.key and not self.cert:
            raise invalid("tls.key", "is given without tls.cert", "Give both, or neither.")


_IDENTITY_TYPES = {"username": 1, "username_password": 2, "kerberos": 3, "saml": 4, "jwt": 5}


@dataclass(frozen=True, slots=True)
class UserIdentity(Checked):
    """User identity of the association (PS3.7 D.3.3.7): a user name, with a passcode or not, or a token."""

    group: ClassVar[str] = "user_identity."

    username: str | None = setting(None, Text(optional=True), "User name.")
    password: str | None = setting(None, Secret(optional=True), "Passcode of the user.")
    token: str | None = setting(None, Secret(optional=True), "Token, instead of a user name.")
    token_type: Literal["kerberos", "saml", "jwt"] | None = setting(
        None, Choice("kerberos", "saml", "jwt", optional=True), "Type of the token."
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if (self.username is None) == (self.token is None):
            raise invalid("user_identity", "needs either a username or a token", "Give one of the two.")
        if self.password is not None and self.username is None:
            raise invalid("user_identity.password", "is given without a username", "Give a username as well.")
        if (self.token is None) != (self.token_type is None):
            raise invalid("user_identity.token_type", "and token belong together", "Give both, or neither.")

    @property
    def identity_type(self) -> int:
        """User-Identity-Type as it goes over the wire."""
        if self.token_type:
            return _IDENTITY_TYPES[self.token_type]
        return _IDENTITY_TYPES["username" if self.password is None else "username_password"]

    @property
    def primary_field(self) -> bytes:
        return (self.username or self.token or "").encode()

    @property
    def secondary_field(self) -> bytes:
        return (self.password or "").encode()


def _parse_endpoint(option: str, value: Any) -> str:
    """An address with its scheme, without a path: the bucket is named elsewhere."""
    hint = "Write https://host or http://host:port."
    if isinstance(value, str) and "@" in value:
        raise password_in(option, "Give access_key and secret_key.")
    if not isinstance(value, str) or not value.isprintable():
        raise invalid(option, f"{shown(value)} is not a valid address", hint)
    scheme, mark, rest = value.strip().partition("://")
    host, _, path = rest.rstrip("/").partition("/")
    if not mark or scheme.lower() not in ("http", "https"):
        raise invalid(option, f"{shown(value)} has no scheme", hint)
    port = host.rpartition(":")[2] if ":" in host and not host.endswith("]") else "1"
    if not host or path or "?" in host or "#" in host or any(c.isspace() for c in host) or not port.isdecimal():
        raise invalid(option, f"{shown(value)} is not the address of an S3 service", hint)
    return f"{scheme.lower()}://{host}"


def _parse_prefix(option: str, value: Any) -> str:
    """Parts of a key between single slashes, without the slashes at its ends."""
    if not isinstance(value, str) or not value.isprintable():
        raise invalid(option, f"{shown(value)} is not a valid prefix", "Write parts with slashes between them.")
    prefix = value.removeprefix("/").removesuffix("/")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise invalid(
            option, f"{shown(value)} contains an empty part, . or ..", "Write parts with slashes between them."
        )
    return prefix


def _parse_bucket(option: str, value: Any) -> str:
    if not isinstance(value, str) or not is_bucket(value):
        raise invalid(
            option, f"{shown(value)} is not a valid name of a bucket", "Give 3 to 63 letters, digits, dots and hyphens."
        )
    return value


@dataclass(frozen=True, slots=True)
class S3Config(Checked):
    """An S3 bucket and how to reach it."""

    group: ClassVar[str] = "s3_config."

    bucket: str | None = setting(
        None, Parsed(_parse_bucket, "the name of a bucket", optional=True), "Name of the bucket."
    )
    access_key: str | None = setting(
        None, Secret(optional=True), "Access key. Default: the usual AWS credential sources."
    )
    secret_key: str | None = setting(None, Secret(optional=True), "Secret key.")
    endpoint: str | None = setting(
        None,
        Parsed(_parse_endpoint, "an address such as https://host:port", optional=True),
        "Endpoint URL of the S3 service. Default: AWS.",
        shell=("--s3-endpoint-url",),
        metavar="URL",
    )
    region: str | None = setting(
        None, Text(optional=True), "Region. Default: that of the profile, else us-east-1.", shell=("--s3-region",)
    )
    prefix: str | None = setting(None, Parsed(_parse_prefix, "a key prefix", optional=True), "Prefix of every key.")
    path_style: bool | None = setting(
        None, Flag(optional=True), "Put the bucket into the path of the URL. Default: only if an endpoint is given."
    )
    session_token: str | None = setting(None, Secret(optional=True), "Session token of temporary credentials.")
    profile: str | None = setting(
        None, Text(optional=True), "Profile of the AWS configuration to use.", shell=("--s3-profile",), metavar="NAME"
    )
    sse: Literal["AES256", "aws:kms"] | None = setting(
        None, Choice("AES256", "aws:kms", optional=True), "Server-side encryption."
    )
    kms_key_id: str | None = setting(None, Text(optional=True), "KMS key for aws:kms. Default: that of the account.")
    storage_class: str | None = setting(None, Text(optional=True), "Storage class of the objects.")
    ca_bundle: str | None = setting(None, Text(optional=True), "PEM file of the certificate authorities to trust.")
    max_concurrency: int = setting(8, Integer(1, 64), "Parts of 8 MiB in flight at a time; bounds memory and requests.")

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if (self.access_key is None) != (self.secret_key is None):
            missing = "secret_key" if self.secret_key is None else "access_key"
            raise invalid(f"s3_config.{missing}", "is missing: the two keys are a pair", "Give both, or neither.")
        if self.session_token is not None and self.access_key is None:
            raise invalid(
                "s3_config.session_token", "is given without its keys", "Give access_key and secret_key as well."
            )
        if self.profile is not None and self.access_key is not None:
            raise invalid("s3_config.profile", "is given together with keys", "Give one of the two.")
        if self.kms_key_id is not None and self.sse != "aws:kms":
            raise invalid("s3_config.kms_key_id", "needs the encryption aws:kms", "Give sse='aws:kms' as well.")

    def session(self) -> Any:
        """A boto3 session with these credentials, or with those of the usual AWS places."""
        from boto3.session import Session

        return Session(
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            aws_session_token=self.session_token,
            profile_name=self.profile,
        )

    def client_options(self) -> dict[str, Any]:
        """Options of botocore's ``Config`` that take precedence over ours."""
        return {}


def _parse_node(option: str, value: Any) -> Node:
    if isinstance(value, Node):
        return value
    if not isinstance(value, str):
        raise invalid(
            option, f"{shown(value)} is not a valid address", "Write [AE@]host:port, for example PACS@10.0.0.5:104."
        )
    return Node.parse(value.strip(), option)


NODE = Parsed(_parse_node, "an address [AE@]host:port")
OPTIONAL_NODE = Parsed(_parse_node, "an address [AE@]host:port", optional=True)


@dataclass(frozen=True, slots=True)
class ForwardTarget(Checked):
    """A node that every instance is stored at."""

    group: ClassVar[str] = "forward_target."

    addr: Node | None = setting(None, OPTIONAL_NODE, "Address of the target.")
    calling_ae_title: str = setting(
        "FORWARD-SCU",
        AETitle(),
        "Our AE title for the target.",
        shell=("--forward-calling-ae",),
        metavar="AE",
    )
    called_ae_title: str | None = setting(
        None, AETitle(optional=True), "AE title of the target, if its address has none. Default: ANY-SCP."
    )
    max_pdu_length: int = setting(MAX_PDU_LENGTH, Integer(4096, MAX_PDU_LENGTH), "Largest PDU to send.", unit="bytes")
    tls: Tls | None = setting(None, Group(Tls, optional=True), "TLS for the target.", shell=("--forward-tls",))

    def __post_init__(self) -> None:
        try:
            Checked.__post_init__(self)
        except InvalidOption as error:  # of TLS, which takes itself for that of the source
            raise reworded(error, lambda text: re.sub(r"(?<![\w.])tls\.", "forward_target.tls.", text)) from None


def parse_timezone(option: str, value: Any) -> tzinfo:
    """A time zone by its IANA name. UTC needs no time zone database."""
    if isinstance(value, tzinfo):
        return value
    if value == "UTC":
        return UTC
    try:
        return ZoneInfo(value)
    except (TypeError, ValueError, OSError, KeyError):
        raise invalid(
            option, f"{shown(value)} is not a time zone", "Give an IANA name such as Europe/Berlin, or UTC."
        ) from None


@dataclass(frozen=True, slots=True)
class Window:
    """The hours of the day in which the source may be used; past midnight if the end is not later than the start."""

    start: time
    end: time

    @classmethod
    def parse(cls, option: str, value: Any) -> Window:
        """Parse ``22:00-06:00``."""
        if isinstance(value, Window):
            return value
        match = isinstance(value, str) and re.fullmatch(r"(\d\d?):(\d\d)\s*-\s*(\d\d?):(\d\d)", value.strip(), re.ASCII)
        try:
            if not match:
                raise ValueError
            start, end = time(int(match[1]), int(match[2])), time(int(match[3]) % 24, int(match[4]))
        except ValueError:
            raise invalid(
                option, f"{shown(value)} is not a time window", "Write HH:MM-HH:MM, for example 22:00-06:00."
            ) from None
        if (int(match[3]), int(match[4])) > (24, 0):
            raise invalid(option, f"{shown(value)} ends after 24:00", "Write HH:MM-HH:MM, for example 22:00-06:00.")
        if start == end:
            raise invalid(
                option, f"{shown(value)} begins and ends at the same time", "Leave the window out to allow every hour."
            )
        return cls(start, end)

    def __str__(self) -> str:
        return f"{self.start:%H:%M}-{self.end:%H:%M}"

    def closes_at(self, moment: datetime, zone: tzinfo) -> datetime | None:
        """When the window that is open at ``moment`` closes, in UTC; None if it is closed then."""
        return next((end for start, end in self._around(moment, zone) if start <= moment < end), None)

    def opens_at(self, moment: datetime, zone: tzinfo) -> datetime:
        """When the window next opens after ``moment``, in UTC."""
        return next(start for start, _ in self._around(moment, zone) if start > moment)

    def _around(self, moment: datetime, zone: tzinfo) -> list[tuple[datetime, datetime]]:
        # Wall-clock times, each turned to UTC by itself: on the days of a clock change the window
        # is an hour longer or shorter, as the clock on the wall is.
        today = moment.astimezone(zone).date()
        spans = []
        for offset in (-1, 0, 1, 2):
            day = today + timedelta(days=offset)
            last = day + timedelta(days=1) if self.end <= self.start else day
            start = datetime.combine(day, self.start, zone).astimezone(UTC)
            spans.append((start, datetime.combine(last, self.end, zone).astimezone(UTC)))
        return spans
