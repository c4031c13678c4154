"""A storage SCP that lists what it holds as it is told to: not at all, cut off, or beside the keys. In memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from pydicom.dataset import Dataset
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt

_VERIFICATION, _CT = "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2"
STUDY_ROOT, PATIENT_ROOT = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.1.1"

Held = dict[str, tuple[str, str, bytes]]
"""Study, series and data set by SOP Instance UID."""


class ListingNode:
    """It takes CT images, one of a UID; ``rows`` gives what it answers to an identifier, by what it holds."""

    ae_title = "LISTS"

    def __init__(
        self,
        rows: Callable[[Held, Dataset], Iterator[Dataset]],
        *,
        duplicate: int = 0x0000,
        model: str = STUDY_ROOT,
        refuses: int = 0x0000,
    ) -> None:
        self.held: Held = {}
        self.stores = 0
        self._model, self._refuses = model, refuses
        self._rows, self._duplicate = rows, duplicate

    def __enter__(self) -> Self:
        ae = AE(self.ae_title)
        for sop_class in (self._model, _VERIFICATION):
            ae.add_supported_context(sop_class)
        ae.add_supported_context(_CT, ALL_TRANSFER_SYNTAXES)
        handlers: Any = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)]
        server: Any = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self._server = server
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _store(self, event: evt.Event) -> int:
        self.stores += 1
        dataset = event.dataset
        uid = str(dataset.SOPInstanceUID)
        if uid in self.held and self._duplicate:
            return self._duplicate
        request: Any = event.request
        content = request.DataSet.getvalue()
        self.held[uid] = (str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID), content)
        return 0x0000

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset]]:
        wanted = event.identifier
        if self._refuses and not wanted.get("PatientID"):
            yield self._refuses, Dataset()
            return
        for row in self._rows(dict(self.held), wanted):
            yield 0xFF00, row


def honest(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """What is held of the study and series that are asked for."""
    level, seen = wanted.QueryRetrieveLevel, set()
    for sop, (study, series, _) in held.items():
        if str(wanted.StudyInstanceUID) != study or (level == "IMAGE" and str(wanted.SeriesInstanceUID) != series):
            continue
        uid = series if level == "SERIES" else sop
        if uid not in seen:
            seen.add(uid)
            yield _row(level, study, series, sop)


def of_patient(patient_id: str, *, needed: bool = True) -> Callable[[Held, Dataset], Iterator[Dataset]]:
    """What is held of one patient, at every level; ``needed``: where the Patient ID is asked for alone."""

    def rows(held: Held, wanted: Dataset) -> Iterator[Dataset]:
        asked = wanted.get("PatientID") or ("" if needed else patient_id)
        if asked != patient_id:
            return
        for row in studies_alone(held, wanted) if wanted.QueryRetrieveLevel == "STUDY" else honest(held, wanted):
            row.PatientID = patient_id
            yield row

    return rows


def nameless(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """All that is held, whatever series is asked for, without a word of its series."""
    level = wanted.QueryRetrieveLevel
    if level == "SERIES":
        yield from honest(held, wanted)
        return
    for sop in held:
        row = Dataset()
        row.QueryRetrieveLevel, row.SOPInstanceUID = level, sop
        yield row


def nothing(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """No row at all."""
    return iter(())


def cut(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """One row of each answer."""
    yield from list(honest(held, wanted))[:1]


def capped(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """A hundred rows of each answer, and no more."""
    yield from list(honest(held, wanted))[:100]


def imageless(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """The series, and none of their instances, as some gateways do."""
    if wanted.QueryRetrieveLevel == "SERIES":
        yield from honest(held, wanted)


def studies_alone(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """The study, and nothing below it."""
    if wanted.QueryRetrieveLevel == "STUDY":
        yield from list(honest(held, wanted))[:1]


def miscounted(held: Held, wanted: Dataset) -> Iterator[Dataset]:
    """One row of each answer, and how many there are."""
    for row in cut(held, wanted):
        if wanted.QueryRetrieveLevel == "SERIES":
            row.NumberOfSeriesRelatedInstances = sum(series == row.SeriesInstanceUID for _, series, _ in held.values())
        yield row


def _row(level: str, study: str, series: str, sop: str) -> Dataset:
    row = Dataset()
    row.QueryRetrieveLevel, row.StudyInstanceUID, row.SeriesInstanceUID = level, study, series
    if level == "IMAGE":
        row.SOPInstanceUID = sop
    return row
