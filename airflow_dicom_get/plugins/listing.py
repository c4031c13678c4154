"""The list of retrievals: what is asked for, chosen, counted and put in order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from statistics import median
from urllib.parse import urlencode

from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.plugins import database
from airflow_dicom_get.plugins.chart import Chart, chart_of
from airflow_dicom_get.plugins.database import Run, Task
from airflow_dicom_get.plugins.outcomes import ENDED_BADLY, ENDED_WELL, INCOMPLETE, LIVE, OUTCOMES

PAGE_ROWS = 50
CHOICES = (INCOMPLETE, *OUTCOMES)


@dataclass(frozen=True)
class Choice:
    """What the address asks for."""

    begin: datetime
    end: datetime
    dag_id: str = ""
    verdict: str = ""
    source: str = ""
    since: str = ""
    until: str = ""
    page: int = 1
    days: int = 30
    complaint: str = ""

    @classmethod
    def of(cls, *, dag_id: str, verdict: str, source: str, since: str, until: str, page: str) -> Choice:
        """Read the address. What makes no sense is left out, and said."""
        days = max(1, configuration.integer("page_days"))
        complaints = []
        dates: dict[str, date | None] = {}
        for name, text in (("since", since), ("until", until)):
            try:
                dates[name] = _date(text.strip()) if text.strip() else None
            except ValueError:
                dates[name] = None
                complaints.append(f"{name} is not a valid date: write it like 2026-01-31.")
        if verdict and verdict not in CHOICES:
            complaints.append("This verdict does not exist.")
            verdict = ""
        if not re.fullmatch("[1-9][0-9]{0,5}", page):
            complaints.append("This is not the number of a page.")
            page = "1"
        # A day more than now: clocks of workers and database differ.
        end = _midnight(dates["until"], 1) if dates["until"] else datetime.now(UTC) + timedelta(days=1)
        begin = _midnight(dates["since"], 0) if dates["since"] else end - timedelta(days=days + 1)
        return cls(
            begin=begin,
            end=end,
            dag_id=dag_id.strip(),
            verdict=verdict,
            source=source.strip(),
            since=dates["since"].isoformat() if dates["since"] else "",
            until=dates["until"].isoformat() if dates["until"] else "",
            page=int(page),
            days=days,
            complaint=" ".join(complaints),
        )

    def address(self, verdict: str | None = None, page: int = 1) -> str:
        """The part of an address after the question mark, with another verdict or page."""
        values = {name: getattr(self, name) for name in ("dag_id", "verdict", "source", "since", "until")}
        values |= {"verdict": verdict or self.verdict, "page": page if page > 1 else None}
        return urlencode({name: value for name, value in values.items() if value})

    @property
    def filtered(self) -> bool:
        """Whether anything is asked for."""
        return any((self.dag_id, self.verdict, self.source, self.since, self.until))


def _date(text: str) -> date:
    """A date of this age, with days before and after it. Raises :class:`ValueError`."""
    day = date.fromisoformat(text)
    if not 1970 <= day.year < 9999:
        raise ValueError
    return day


def _midnight(day: date, days: int) -> datetime:
    return datetime.combine(day + timedelta(days=days), time(), UTC)


@dataclass(frozen=True)
class View:
    """What the page of the list shows."""

    choice: Choice
    dag_ids: Sequence[str]
    sources: Sequence[str]
    counts: Counter[str]
    total: int
    incomplete: int
    live: int
    complete: int
    instances: int
    bytes: int
    speed: float | None
    chart: Chart | None
    tasks: Sequence[Task]
    pages: int
    verdicts: Sequence[str] = CHOICES
    cut: int = 0


def view_of(choice: Choice, dag_ids: Sequence[str]) -> View:
    """Collect the list for a user who may see these DAGs."""
    asked = [dag_id for dag_id in dag_ids if not choice.dag_id or dag_id == choice.dag_id]
    everything = database.runs(asked, choice.begin, choice.end)
    chosen = [one for one in everything if not choice.source or one.source == choice.source]
    counts = Counter(one.outcome for one in newest(chosen))
    # The tiles count all verdicts, so that each can be chosen by them; chart and table show the chosen one.
    shown = [one for one in chosen if _has(one, choice.verdict)]
    pages = max(1, -(-len(shown) // PAGE_ROWS))
    choice = replace(choice, page=min(max(choice.page, 1), pages))
    # Newest first already, and sorting keeps that order.
    ordered = sorted(shown, key=_urgency)[(choice.page - 1) * PAGE_ROWS : choice.page * PAGE_ROWS]
    gets = [one for one in shown if one.retrieves]
    speeds = [one.bytes / one.seconds for one in gets if one.bytes and one.seconds]
    return View(
        choice=choice,
        dag_ids=dag_ids,
        sources=sorted({one.source for one in everything if one.source}),
        counts=counts,
        total=len(shown),
        incomplete=sum(counts[name] for name in ENDED_BADLY),
        live=sum(counts[name] for name in LIVE),
        complete=sum(counts[name] for name in ENDED_WELL),
        instances=sum(one.instances for one in newest(shown)),
        bytes=sum(one.bytes for one in gets),
        speed=median(speeds) if speeds else None,
        chart=chart_of(gets),
        tasks=database.tasks(one.id for one in ordered),
        pages=pages,
        cut=database.MAX_RUNS if len(everything) == database.MAX_RUNS else 0,
    )


def newest(runs: Iterable[Run]) -> list[Run]:
    """The retrievals among some runs, newest first, each once: the newest of several of the same studies to one place.

    What is not known of a run, as while it is under way, it does not share with others.
    """
    found: dict[object, Run] = {}
    for one in runs:
        if one.retrieves:
            found.setdefault(one.scope or one.id, one)
    return list(found.values())


def _has(one: Run, verdict: str) -> bool:
    return not verdict or one.outcome == verdict or (verdict == INCOMPLETE and one.outcome in ENDED_BADLY)


def _urgency(one: Run) -> int:
    if one.outcome in ENDED_BADLY:
        return 0
    return 1 if one.outcome in LIVE else 2
