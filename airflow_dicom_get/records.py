"""The records that the layers hand to each other: one per instance, one per event."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from airflow_dicom_get.vocabulary import REMARKS, Exactness, State

_OF_ITSELF = ("sop_class", "syntax", "modality", "series_number", "instance_number")
"""What both records say of the instance itself, wherever it lies."""


Key = tuple[str, str]
"""What makes an instance within its study: Series and SOP Instance UID. One SOP UID in two series is two instances."""


def _uri(where: str | None, series: str, sop: str) -> str | None:
    return f"{where}{series}/{sop}.dcm" if where and where.endswith("/") else where


@dataclass(slots=True)
class Stored:
    """One instance that is there: as a ledger recorded it, as its object says, or as it was found at a destination.

    Attributes
    ----------
    bytes : int or None
        Size of the object; for a forward of the data set that was sent.
    sha256 : bytes or None
        Raw digest of these bytes.
    dataset_offset : int
        Where the data set begins in the object.
    where : str or None
        As :attr:`Instance.where`.
    forwarded_to : str or None
        The node that holds it, if it was sent on.
    durable : bool
        A sync, the service's answer or the destination's response is recorded; else it was only taken.
    etag : str or None
        The mark that a bucket gave to its content.
    truncated : bool
        Its data set runs past its end: so it came.
    other_patient : bool
        It came with another Patient ID than was asked for.
    """

    series: str
    sop: str
    sop_class: str | None = None
    syntax: str | None = None
    sha256: bytes | None = None
    bytes: int | None = None
    dataset_offset: int = 0
    modality: str | None = None
    series_number: int | None = None
    instance_number: int | None = None
    where: str | None = None
    forwarded_to: str | None = None
    durable: bool = False
    etag: str | None = None
    truncated: bool = False
    other_patient: bool = False

    @property
    def key(self) -> Key:
        """What makes it an instance of its study."""
        return self.series, self.sop

    @property
    def uri(self) -> str | None:
        """Where the object lies."""
        return _uri(self.where, self.series, self.sop)


@dataclass(slots=True, eq=False, repr=False)
class Instance:
    """One SOP instance: what the source lists, what became of it. One manifest row.

    All attributes may be ``None`` until known. ``sha256`` is the raw digest (32 bytes) of the
    object at ``uri``; ``received_at`` is seconds since the epoch, UTC; sizes are bytes.
    """

    study: str
    series: str
    sop: str
    sop_class: str | None = None
    listed_syntax: str | None = None
    syntax: str | None = None
    modality: str | None = None
    series_number: int | None = None
    instance_number: int | None = None
    state: State | None = None
    reason: str | None = None
    exactness: Exactness | None = None
    dimse_status: int | None = None
    error: str | None = None
    where: str | None = None
    sha256: bytes | None = None
    bytes: int | None = None
    dataset_offset: int | None = None
    forwarded_to: str | None = None
    forward_status: str | None = None
    forward_error: str | None = None
    availability: str | None = None
    attempt: int | None = None
    association: int | None = None
    received_at: float | None = None
    duration_ms: int | None = None
    tags: tuple[str | None, ...] | None = None
    truncated: bool | None = None
    other_patient: bool | None = None
    other_syntax: bool | None = None
    """It was sent again in another transfer syntax, in which it cannot be compared with the first."""
    key: Key = field(init=False)
    """What makes it an instance of its study: Series and SOP Instance UID."""

    def __post_init__(self) -> None:
        self.key = self.series, self.sop

    @property
    def uri(self) -> str | None:
        """Where the object lies. Set with a slash at its end it is the study's place, one string for all of them."""
        return _uri(self.where, self.series, self.sop)

    @uri.setter
    def uri(self, where: str | None) -> None:
        self.where = where

    @property
    def dataset_bytes(self) -> int | None:
        """Size of the data set alone, without preamble and file meta information."""
        return None if self.bytes is None else self.bytes - (self.dataset_offset or 0)

    @property
    def remark(self) -> str | None:
        """The reason that its row shows though it is held."""
        if self.other_patient:
            return "other_patient_id"
        if self.truncated:
            return "truncated_dataset"
        return "other_transfer_syntax" if self.other_syntax else None

    @property
    def remarked(self) -> bool:
        """Whether there is something to say of it where it is held: what ``warning`` counts."""
        return self.exactness == "converted" or self.forward_status == "warning" or self.reason in REMARKS

    def fill(self, other: Instance | Stored) -> None:
        """Take what ``other`` says of the instance itself, where nothing is known yet."""
        for name in _OF_ITSELF:
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))

    def adopt(self, stored: Stored) -> None:
        """Be the instance that is there: its content is what was stored, whatever the list says of it."""
        self.attempt = 0
        self.sop_class = stored.sop_class or self.sop_class
        self.syntax = stored.syntax or self.syntax
        self.where, self.forwarded_to = stored.where, stored.forwarded_to
        self.bytes, self.sha256, self.dataset_offset = stored.bytes, stored.sha256, stored.dataset_offset
        self.truncated, self.other_patient = stored.truncated, stored.other_patient
        self.fill(stored)

    def become(self, other: Instance) -> None:
        """Be another record of the same instance, which took its place."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

    def sent_again(self, first: str) -> None:
        """It came again in another transfer syntax than ``first``, in which it is there, and stays."""
        self.syntax, self.other_syntax = first, True
        self.exactness = None
        if self.listed_syntax:
            self.exactness = "as_listed" if self.listed_syntax == first else "converted"

    def forget_content(self) -> None:
        """What came for it is not what lies at :attr:`uri`."""
        self.bytes = self.sha256 = self.dataset_offset = None

    def __repr__(self) -> str:
        return f"<Instance {self.sop} {self.state or 'planned'}>"


@dataclass(slots=True)
class SubOperation:
    """One instance that arrived, or failed to be taken. Numbers are counted here, never the peer's."""

    remaining: int
    completed: int
    failed: int
    warning: int
    file: str | None
    sop_instance_uid: str
    forwarded_to: str | None = None
    forward_status: str | None = None
    forward_error: str | None = None
    error: str | None = None
    bytes: int = 0
    elapsed_seconds: float = 0.0


@dataclass(slots=True)
class Completed:
    """The end of a retrieval, whatever the end."""

    total: int
    completed: int
    failed: int
    warning: int
    duration_seconds: float
    verdict: str
    error: str | None = None
    bytes: int = 0
    skipped: int = 0


class Written(NamedTuple):
    """A manifest as it was written: who reads it later can tell whether it still is that one."""

    rows: int
    bytes: int
    sha256: str
    verdict: str
