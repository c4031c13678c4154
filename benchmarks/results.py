"""What was measured, as data: kept in JSON beside the report, so that the report can be written again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from clients import Run
from sources import in_words

CLIENTS = {
    "warm": "GetScu, warm process",
    "bare": "GetScu, warm, no digest, no sync",
    "no_digest": "GetScu, warm, no digest",
    "process": "dicom-get get, whole process",
    "again": "dicom-get get, the same again when it is complete",
    "tuned": "getscu +B -pdu 131072, TCP_NODELAY=1",
    "shipped": "getscu as shipped",
    "pynetdicom": "pynetdicom, cheapest handler",
    "control": "control: hash, write and sync side by side; no network",
    "one": "GetScu, one association",
    "four": "GetScu, 4 associations",
    "eight": "GetScu, 8 associations",
    "forward": "GetScu to storescp, warm process",
    "forward_process": "dicom-get get to storescp, whole process",
    "two_steps": "getscu, then storescu, both tuned",
    "s3": "GetScu to S3, warm process",
    "s3_process": "dicom-get get to S3, whole process",
    "boto3_8": "boto3 alone from disk, 8 at a time",
    "boto3": "boto3 alone from disk, 32 at a time",
    "s3transfer": "tuned getscu, then s3transfer, 32 at a time",
    "one_by_one": "boto3 alone from disk, one by one",
}
"""Titles of the clients by their keys, in the order of tables and plot."""
SINGLE = {
    "small": "`dicom-get get`, 10 × 512 KiB",
    "help": "`dicom-get --help`",
    "cohort": "`find_cohort`, accession numbers, embedded PACS",
    "tiny": "`dicom-get get`, few tiny instances",
    "many": "`dicom-get get`, many tiny instances",
    "huge": "`dicom-get get`, one huge instance",
}


@dataclass
class Series:
    """Runs by client against one source."""

    title: str
    instances: int
    size: int
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return in_words(self.instances, self.size)

    def wall(self, client: str) -> float | None:
        """The median wall time of a client."""
        runs = self.runs.get(client)
        return median(run.wall for run in runs) if runs else None

    def cpu(self, client: str) -> float | None:
        """The median CPU time of a client, of all its threads."""
        runs = self.runs.get(client)
        return median(run.user + run.system for run in runs) if runs else None

    def ratio(self, over: str, under: str) -> float | None:
        """How many times the one's median is of the other's."""
        a, b = self.wall(over), self.wall(under)
        return None if a is None or b is None else a / b

    def rss(self, client: str) -> int | None:
        """The highest peak of resident memory."""
        peaks = [run.rss for run in self.runs.get(client, ()) if run.rss is not None]
        return max(peaks, default=None)


@dataclass
class Results:
    """All of one session of measuring."""

    about: dict[str, str]
    """Date, command, machine, versions."""
    quick: bool = False
    series: dict[str, Series] = field(default_factory=dict)
    """By source: those with several clients, and under the keys of `SINGLE` those with ``process`` only."""
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all of it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        for key, series in data["series"].items():
            runs = {client: [Run(**run) for run in runs] for client, runs in series.pop("runs").items()}
            data["series"][key] = Series(**series, runs=runs)
        return cls(**data)
