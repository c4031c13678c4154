"""Where instances go: a path, ``s3://[CONN_ID@]bucket[/prefix]`` or ``dicom://[AE@]host:port``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.config.node import Node, password_in
from airflow_dicom_get.errors import InvalidOption

# Capitals and underscores: buckets of old, and of other services, have them.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
_CONN_ID = re.compile(r"[\w.-]{1,250}", re.ASCII)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_FORMS = "Give a path, file:///path, s3://bucket/prefix or dicom://[AE@]host:port."


@dataclass(frozen=True, slots=True)
class FilesystemDestination:
    """A folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def uri(self) -> str:
        """Its address as manifests and ledgers have it."""
        return self.path.absolute().as_uri()


@dataclass(frozen=True, slots=True)
class S3Destination:
    """A bucket, a prefix without slashes at its ends, and the Airflow connection if one is named."""

    bucket: str
    prefix: str = ""
    conn_id: str | None = None

    def __str__(self) -> str:
        at = f"{self.conn_id}@" if self.conn_id else ""
        return f"s3://{at}{self.bucket}/{self.prefix}" if self.prefix else f"s3://{at}{self.bucket}"

    @property
    def uri(self) -> str:
        """Its address as manifests have it."""
        return f"s3://{self.bucket}/{quote(self.prefix)}".rstrip("/")


@dataclass(frozen=True, slots=True)
class ForwardDestination:
    """A DICOM node, or the Airflow connection that says which."""

    node: Node | None = None
    conn_id: str | None = None

    def __str__(self) -> str:
        return f"dicom://{self.node or self.conn_id}"


_LONGEST_PATH = 4096
"""Characters of a path: a longer one leads nowhere, and to find that out takes the square of its length."""
_LONGEST = 4 * _LONGEST_PATH
"""Characters of an address, percent-encoded."""

Destination = FilesystemDestination | S3Destination | ForwardDestination


def parse_destination(value: Any, option: str = "destination") -> Destination:
    """Tell the destinations apart by their scheme. The case is kept, the parts are percent-decoded.

    A plain path is taken as it is, without decoding; ``~/`` at its start is the home folder.

    Raises
    ------
    InvalidOption
        The destination is malformed; the message names ``option``.
    """
    if isinstance(value, FilesystemDestination | S3Destination | ForwardDestination):
        return value
    if isinstance(value, Path):
        return FilesystemDestination(_folder(value, option))
    if isinstance(value, str) and not value.isprintable():  # without the text, which may be a rendered DataFrame
        raise invalid(option, "has a line break or a control character, and is no address", _FORMS)
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST:
        raise invalid(option, f"{shown_path(value)} is not a valid destination", _FORMS)
    scheme, _, rest = value.partition("://")
    match scheme.lower() if "://" in value and "/" not in scheme else "":
        case "s3":
            return _s3(value, rest, option)
        case "dicom":
            return _forward(value, rest, option)
        case "file":
            host, slash, path = rest.partition("/")
            if not slash or host not in ("", "localhost"):
                raise invalid(
                    option, f"{shown_path(value)} names a host", "Write three slashes: file:///absolute/path."
                )
            return FilesystemDestination(_folder(Path("/" + unquote(path)), option))
        case "":
            if _SCHEME.match(value):
                raise invalid(option, f"{shown_path(value)} has only one slash after the scheme", _FORMS)
            return FilesystemDestination(_folder(Path(value), option))
    raise invalid(option, f"the scheme {shown(scheme)} is unknown", _FORMS)


def _folder(path: Path, option: str) -> Path:
    if len(str(path)) >= _LONGEST_PATH:
        raise invalid(option, f"{shown_path(path)} is longer than a path may be", "Give a path.")
    if "\0" in str(path):
        raise invalid(option, "contains a NUL character", "Give a path.")
    return path.expanduser() if str(path).startswith("~/") or str(path) == "~" else path


def is_bucket(name: str) -> bool:
    """Whether a bucket may have this name."""
    return bool(_BUCKET.fullmatch(name)) and ".." not in name and not _ADDRESS.fullmatch(name)


def _s3(value: str, rest: str, option: str) -> S3Destination:
    # The connection stands before the first slash: a prefix may hold an "@" of its own.
    authority, _, prefix = rest.partition("/")
    conn_id, at, bucket = (unquote(part) for part in authority.rpartition("@"))
    if ":" in conn_id:
        raise password_in(option, "Write s3://bucket/prefix, and give the keys as s3_config or in a connection.")
    prefix = unquote(prefix).removesuffix("/")
    if not is_bucket(bucket) or (at and not _CONN_ID.fullmatch(conn_id)):
        raise invalid(option, f"{shown_path(value)} does not name a valid bucket", "Write s3://bucket/prefix.")
    if any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise invalid(option, f"{shown_path(value)} contains an empty part, . or ..", "Write s3://bucket/prefix.")
    return S3Destination(bucket, prefix, conn_id or None)


def _forward(value: str, rest: str, option: str) -> ForwardDestination:
    text = unquote(rest.rstrip("/"))
    if ":" not in text and "@" not in text and _CONN_ID.fullmatch(text):
        return ForwardDestination(conn_id=text)
    if "/" in rest.rstrip("/"):
        raise invalid(option, f"{shown_path(value)} contains a path", "Write dicom://[AE@]host:port.")
    return ForwardDestination(Node.parse(text, option))


def check_folder(path: Path, option: str) -> None:
    """Refuse a folder that cannot be written to, as far as that shows without writing.

    Raises
    ------
    InvalidOption
        It is a file, lies below one, or the nearest folder that exists cannot be written to.
    """
    import os

    for place in (path, *path.absolute().parents):
        try:
            is_folder = place.is_dir()
            if not is_folder and not os.path.lexists(place):
                continue
        except OSError as error:
            raise invalid(option, f"{shown_path(path)}: {error.strerror}", "Give another folder.") from None
        if not is_folder:
            raise _unusable(option, path, f"{shown_path(place)} is not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise _unusable(option, path, f"{shown_path(place)} cannot be written to")
        return


def check_own(path: Path, option: str) -> None:
    """Refuse a file that another user made, or a path with a link of his: he would choose where it is written to.

    Those of root are taken, as :file:`/dev/stderr` is one.

    Raises
    ------
    InvalidOption
        There is one.
    """
    import os
    import stat

    whole = path.absolute()
    for place in (whole, *whole.parents):
        try:
            found = place.lstat()
        except OSError:
            continue
        link = stat.S_ISLNK(found.st_mode)
        if (link or place == whole) and found.st_uid not in (0, os.geteuid()):
            what = "is a link that belongs to another user" if link else "belongs to another user"
            raise invalid(option, f"{shown_path(place)} {what}", "Remove it, or give a file of your own.")


def _unusable(option: str, path: Path, what: str) -> InvalidOption:
    return invalid(option, f"{shown_path(path)} cannot be used, {what}", "Give another folder, or correct this one.")
