"""UID rules (PS3.5 9.1) as far as they protect a path."""

from __future__ import annotations

import re

from airflow_dicom_get.errors import peer_text

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")


def is_uid(text: str) -> bool:
    """Whether ``text`` may be a path component: 1 to 64 digits and dots, no empty component.

    Leading zeros in a component are not standard, but common, and do no harm.
    """
    return 0 < len(text) <= 64 and _UID.fullmatch(text) is not None


def uid_or_blank(text: str) -> str:
    """A UID that is named, to be kept; blank for any other text, which may be of any length."""
    return text if is_uid(text) else ""


def uid_value(raw: bytes) -> str | None:
    """A UI value with one trailing NUL or space taken off; None if it is not a valid UID of :func:`is_uid`."""
    if raw[-1:] in (b"\0", b" "):
        raw = raw[:-1]
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        return None
    return text if is_uid(text) else None


def shown_uid(raw: bytes | None) -> str:
    """A UID as it was received; one that is malformed escaped, and cut to 64 characters; empty where there is none."""
    text = (raw or b"").strip(b"\0 ").decode("latin-1")
    return text if is_uid(text) else peer_text(text, 64)
