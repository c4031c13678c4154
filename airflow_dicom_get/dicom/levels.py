"""The levels of a query, and the keys on them (PS3.4 C.6)."""
# ruff: noqa: SIM905 - long lists of words read better as text.

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Level = Literal["PATIENT", "STUDY", "SERIES", "IMAGE"]
FilterLevel = Literal["STUDY", "SERIES", "IMAGE"]

LEVELS: tuple[Level, ...] = ("PATIENT", "STUDY", "SERIES", "IMAGE")
"""From the top of the hierarchy to its bottom."""

UNIQUE_KEYS: Mapping[str, Level] = {
    "PatientID": "PATIENT",
    "StudyInstanceUID": "STUDY",
    "SeriesInstanceUID": "SERIES",
    "SOPInstanceUID": "IMAGE",
}
"""Keywords of the unique keys, and their levels."""

_SERIES_KEYS = frozenset(
    "AcquisitionDeviceTypeCodeSequence BodyPartExamined Laterality Manufacturer ManufacturerModelName Modality "
    "OperatorsName PatientPosition PerformedProcedureStepDescription PerformedProcedureStepID "
    "PerformedProcedureStepStartDate PerformedProcedureStepStartTime PerformedStationAETitle PerformingPhysicianName "
    "PresentationIntentType ProtocolName SeriesDate SeriesDescription SeriesNumber SeriesTime StationName "
    "InstitutionalDepartmentName DeviceSerialNumber FrameOfReferenceUID SoftwareVersions SpatialResolution".split()
)
_IMAGE_KEYS = frozenset(
    "AcquisitionDate AcquisitionDateTime AcquisitionNumber AcquisitionTime CompletionFlag ContentDate ContentLabel "
    "ContentTime ContentDescription ContentCreatorName DocumentTitle EchoNumbers ImageComments ImageType "
    "InstanceCreationDate InstanceCreationTime InstanceNumber InstanceCreatorUID NumberOfFrames "
    "OverlayNumber PresentationCreationDate PresentationCreationTime SliceLocation SOPClassUID "
    "VerificationFlag VerificationDateTime".split()
)


def level_of(keyword: str) -> FilterLevel:
    """The level on which a keyword is a key; those of the patient count as the study's."""
    if keyword in _SERIES_KEYS or keyword == "SeriesInstanceUID":
        return "SERIES"
    return "IMAGE" if keyword in _IMAGE_KEYS or keyword == "SOPInstanceUID" else "STUDY"
