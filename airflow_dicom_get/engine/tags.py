"""The ``tags`` option: header elements as manifest columns, decoded by their character set."""

from __future__ import annotations

from collections.abc import Sequence

from airflow_dicom_get.dicom.header import MANDATORY, MAX_HEADER, SPECIFIC_CHARACTER_SET, HeaderError, HeaderScan
from airflow_dicom_get.dicom.syntaxes import EXPLICIT_BE
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
        from pydicom.datadict import tag_for_keyword

        self._tags = [int(tag_for_keyword(keyword) or 0) for keyword in keywords]
        self.numbers = frozenset(self._tags)

    def decode(self, values: dict[int, bytes], syntax: str) -> tuple[str | None, ...]:
        """One text per keyword, in their order; None where the element is absent or empty."""
        from pydicom.charset import convert_encodings
        from pydicom.datadict import dictionary_VR
        from pydicom.dataelem import RawDataElement, convert_raw_data_element
        from pydicom.tag import Tag

        charset = values.get(SPECIFIC_CHARACTER_SET, b"").decode("ascii", "replace").strip("\0 ").split("\\")
        out: list[str | None] = []
        for number in self._tags:
            raw = values.get(number)
            if not raw:
                out.append(None)
                continue
            tag = Tag(number)
            try:
                element = convert_raw_data_element(
                    RawDataElement(tag, dictionary_VR(tag), len(raw), raw, 0, False, syntax != EXPLICIT_BE),
                    encoding=convert_encodings(charset),
                )
                value = element.value
                text = "\\".join(map(str, value)) if element.VM > 1 else str(value)
            except Exception:  # a value that cannot be decoded must not lose the instance
                text = raw.decode("ascii", "replace")
            out.append(text.strip("\0 ") or None)
        return tuple(out)


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
