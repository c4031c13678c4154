"""Forwards, what they send, and what became of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from airflow_dicom_get import Deadlines, GetScu, Result
from airflow_dicom_get.testing.archive import Archive
from tests.support.holdings import Holding


def forward(source: Any, destination: Any, state: Path, study: str | None = None, **options: Any) -> Result:
    """Forward a study, or all that ``study`` names."""
    deadlines = options.pop("deadlines", Deadlines())
    if isinstance(deadlines, dict):
        deadlines = Deadlines(**deadlines)
    events = options.pop("events", None)
    scu = GetScu(
        f"{getattr(source, 'ae_title', 'ANY-SCP')}@127.0.0.1:{source.port}",
        destination=f"dicom://{destination.ae_title}@127.0.0.1:{destination.port}",
        manifest_root=state,
        deadlines=deadlines,
        **options,
    )
    return scu.get_study({"StudyInstanceUID": study}, on_sub_operation=events)


def datasets(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Transfer syntax and data set by SOP Instance UID of the files below a folder."""
    archive = Archive(folder)
    archive.load()
    return {x.sop: (x.syntax, x.path.read_bytes()[x.offset :]) for x in archive.entries()}


def sent_by(holding: Holding, study: str = "") -> dict[str, tuple[str, bytes]]:
    return {
        sop: (x.syntax, holding.dataset(sop))
        for sop, x in holding.entries.items()
        if not study or x.keys[0x0020000D] == study
    }


def states(result: Result) -> Counter[tuple[str, str | None, str | None]]:
    frame = result.manifest
    columns = [
        frame[name].astype(object).where(frame[name].notna(), None) for name in ("state", "reason", "forward_status")
    ]
    return Counter(zip(*columns, strict=True))
