"""The records that the layers hand to each other: one per instance, one per event."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_dicom_get.vocabulary import Exactness, State


def object_uri(where: str | None, series: str, sop: str) -> str | None:
    """Where an object lies: ``where`` itself or, if that ends with a slash, its name below that study's place."""
    return f"{where}{series}/{sop}.dcm" if where and where.endswith("/") else where


class Instance:
    """One SOP instance: what the source lists, what became of it. One manifest row.

    All attributes may be ``None`` until known. ``sha256`` is the raw digest (32 bytes) of the
    object at ``uri``; ``received_at`` is seconds since the epoch, UTC; sizes are bytes.
    """

    __slots__ = (
        "association",
        "attempt",
        "bytes",
        "dataset_offset",
        "dimse_status",
        "duration_ms",
        "error",
        "exactness",
        "forward_error",
        "forward_status",
        "forwarded_to",
        "instance_number",
        "listed_syntax",
        "modality",
        "reason",
        "received_at",
        "series",
        "series_number",
        "sha256",
        "sop",
        "sop_class",
        "state",
        "study",
        "syntax",
        "tags",
        "where",
    )

    study: str
    series: str
    sop: str
    sop_class: str | None
    listed_syntax: str | None
    syntax: str | None
    modality: str | None
    series_number: int | None
    instance_number: int | None
    state: State | None
    reason: str | None
    exactness: Exactness | None
    dimse_status: int | None
    error: str | None
    where: str | None
    sha256: bytes | None
    bytes: int | None
    dataset_offset: int | None
    forwarded_to: str | None
    forward_status: str | None
    forward_error: str | None
    attempt: int | None
    association: int | None
    received_at: float | None
    duration_ms: int | None
    tags: tuple[str | None, ...] | None

    def __init__(self, study: str, series: str, sop: str, sop_class: str | None = None) -> None:
        for name in self.__slots__:
            setattr(self, name, None)
        self.study, self.series, self.sop, self.sop_class = study, series, sop, sop_class

    @property
    def uri(self) -> str | None:
        """Where the object lies. Set with a slash at its end it is the study's place, one string for all of them."""
        return object_uri(self.where, self.series, self.sop)

    @uri.setter
    def uri(self, where: str | None) -> None:
        self.where = where

    @property
    def dataset_bytes(self) -> int | None:
        """Size of the data set alone, without preamble and file meta information."""
        return None if self.bytes is None else self.bytes - (self.dataset_offset or 0)

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
