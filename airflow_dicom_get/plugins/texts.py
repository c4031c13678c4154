"""Numbers, times and words as the page shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from airflow_dicom_get.plugins.outcomes import LABELS
from airflow_dicom_get.result import size_text
from airflow_dicom_get.vocabulary import REASONS, noun

NOTHING = "–"


def number(value: Any) -> str:
    """A whole number with thousands apart."""
    return f"{value:,}" if isinstance(value, int | float) else NOTHING


def size(value: Any) -> str:
    """A number of bytes."""
    return size_text(value) if isinstance(value, int | float) else NOTHING


def speed(value: Any) -> str:
    """Bytes per second."""
    return f"{size_text(value)}/s" if isinstance(value, int | float) and value else NOTHING


def duration(seconds: Any) -> str:
    """A length of time, in its two largest units."""
    if not isinstance(seconds, int | float):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(value: Any) -> str:
    """A moment in UTC; the page says once that it is."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return NOTHING
    if not isinstance(value, datetime):
        return NOTHING
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    try:
        return f"{aware.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
    except OverflowError:  # of the first year, or the last
        return NOTHING


def status(value: Any) -> str:
    """A DIMSE status, as the standard writes it."""
    return f"{value:04X}H" if isinstance(value, int) else NOTHING


def label(outcome: str) -> str:
    """An outcome in words."""
    return LABELS.get(outcome, outcome)


def reason(word: str | None) -> str:
    """What a reason means."""
    known = REASONS.get(word or "")
    return known.text.replace("`", "") if known is not None else ""


FILTERS: Mapping[str, Callable[..., str]] = {
    "number": number,
    "noun": noun,
    "size": size,
    "speed": speed,
    "duration": duration,
    "moment": moment,
    "status": status,
    "label": label,
    "reason": reason,
}
