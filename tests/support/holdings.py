"""What a folder of Part 10 files holds, as the tests compare by it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from airflow_dicom_get.testing.archive import Archive, Entry


@dataclass(frozen=True)
class Holding:
    """A folder of Part 10 files, and what is in it."""

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]
    study: str = ""

    def dataset(self, sop: str) -> bytes:
        """The data set bytes of an instance, as they lie in its file."""
        entry = self.entries[sop]
        return entry.path.read_bytes()[entry.offset :]


def hold(folder: Path, study: str = "") -> Holding:
    """What is in a folder."""
    archive = Archive(folder)
    archive.load()
    entries = archive.entries()
    return Holding(folder, tuple(entry.path for entry in entries), {entry.sop: entry for entry in entries}, study)
