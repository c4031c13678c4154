"""The ``tags`` option: header elements as manifest columns, decoded by their character set."""

from __future__ import annotations

from collections.abc import Sequence

from airflow_dicom_get.dicom.dictionary import find_attribute
from airflow_dicom_get.dicom.header import MANDATORY, MAX_HEADER, SPECIFIC_CHARACTER_SET, HeaderError, HeaderScan
from airflow_dicom_get.dicom.syntaxes import EXPLICIT_BE
from airflow_dicom_get.dicom.values import kept, shown_value
from airflow_dicom_get.records import Stored
from airflow_dicom_get.sinks.base import Sink


class TagDecoder:
    """Decode the raw values of some top-level elements to text.

    Parameters
    ----------
    keywords : sequence of str
        DICOM keywords, checked before.
    """

    def __init__(self, keywords: Sequence[str]) -> None:
        attributes = [find_attribute(keyword) for keyword in keywords]
        self._tags = [(attribute.tag, attribute.vr) for attribute in attributes]
        self.numbers = frozenset(attribute.tag for attribute in attributes)

    def decode(self, values: dict[int, bytes], syntax: str) -> tuple[str | None, ...]:
        """One text per keyword, in their order; None where the element is absent or empty."""
        character_set = values.get(SPECIFIC_CHARACTER_SET, b"")
        return tuple(
            kept(shown_value(values.get(number, b""), vr, character_set, little_endian=syntax != EXPLICIT_BE))
            for number, vr in self._tags
        )


def tags_of(held: Stored, sink: Sink, tags: TagDecoder) -> tuple[str | None, ...] | None:
    """The values of an instance that was there before, read back from its header; None where that cannot be done."""
    data = sink.head(held, MAX_HEADER)[held.dataset_offset :]
    if not data or held.syntax is None:
        return None
    wanted = tags.numbers | MANDATORY | {SPECIFIC_CHARACTER_SET}
    scan = HeaderScan(held.syntax, wanted, max(tags.numbers))
    try:
        scan.feed(data, last=True)
    except HeaderError:
        return None
    return tags.decode(scan.values, held.syntax)
