"""One task instance: its result, its manifest, and where it stands while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_dicom_get.plugins import database, texts
from airflow_dicom_get.plugins.contents import Contents
from airflow_dicom_get.plugins.database import Task
from airflow_dicom_get.plugins.outcomes import ENDED_BADLY, KINDS, LIVE

_COUNTS = ("done", "total", "failed", "bytes", "bytes_per_second", "associations")


@dataclass(frozen=True)
class View:
    """What the page of a task shows."""

    task: Task
    kind: str
    """``transfer``, ``find`` or ``other``."""
    meaning: str = ""
    live: bool = False
    bad: bool = False
    progress: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    contents: Contents | None = None
    complaint: str = ""

    @property
    def has_manifest(self) -> bool:
        """Whether there is a manifest to be shown."""
        return self.kind == "transfer" and bool(self.summary)

    @property
    def name(self) -> str:
        """The study, where it is known."""
        if self.task.label is None and self.contents is not None and self.contents.studies == 1:
            return self.contents.series[0].study
        return self.task.name


def view_of(task: Task) -> View:
    """Collect what is known of a task, but for its manifest."""
    summary = task.summary or {}
    if "matched" in summary:
        return View(task, "find", summary=summary)
    if task.operator not in KINDS and "verdict" not in summary:
        return View(task, "other")
    live = task.outcome in LIVE
    return View(
        task,
        "transfer",
        meaning=task.kind.meaning(task.outcome),
        live=live,
        bad=task.outcome in ENDED_BADLY,
        progress=progress_of(task) if live else {},
        summary=summary,
    )


def progress_of(task: Task) -> dict[str, Any]:
    """Where a task stands, for the page that shows it live."""
    live = task.outcome in LIVE
    shown = database.shown_while_running(task) if live else {}
    stored = shown.get("progress", {})
    counts = {name: stored[name] for name in _COUNTS if database.is_number(stored.get(name))}
    resume_at = shown.get("window", {}).get("resume_at") if task.state == "deferred" else None
    return {
        "outcome": task.outcome,
        "state": task.state,
        "live": live,
        "try_number": task.try_number,
        "progress": counts or None,
        "updated_at": database.shown(str(stored.get("updated_at") or "")) or None,
        "resume_at": database.shown(resume_at) if isinstance(resume_at, str) else None,
        "text": _sentence(task, counts, resume_at),
    }


def _sentence(task: Task, counts: Mapping[str, Any], resume_at: Any) -> str:
    if task.outcome not in LIVE:
        return f"The task has ended: {texts.label(task.outcome)}."
    if resume_at:
        return f"Waiting for the window of the PACS to open; resumes at {texts.moment(resume_at)} UTC."
    if task.state == "deferred":
        return "Waits."
    if task.state not in ("running", "restarting"):
        return "Waiting to be scheduled."
    if not counts.get("total"):
        return "Running. The first numbers appear after a few seconds."
    parts = [f"{texts.number(counts.get('done', 0))} of {texts.number(counts['total'])} instances"]
    if counts.get("failed"):
        parts.append(f"{texts.number(counts['failed'])} failed")
    parts += [texts.size(counts.get("bytes", 0)), texts.speed(counts.get("bytes_per_second"))]
    return ", ".join(parts)
