"""The chart of the page: how fast retrievals were over time, and how many runs complete. Plain numbers for an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from airflow_dicom_get.plugins.database import Run
from airflow_dicom_get.plugins.outcomes import ENDED_BADLY, ENDED_WELL
from airflow_dicom_get.vocabulary import noun

WIDTH, LEFT, RIGHT = 960, 64, 8
SPEED_TOP, SPEED_HEIGHT = 24, 84
COUNT_TOP, COUNT_HEIGHT = 144, 42
HEIGHT = COUNT_TOP + COUNT_HEIGHT + 22

_MOST_SPANS = 60
_STEPS = (60, 300, 900, 3600, 3 * 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600, 28 * 24 * 3600)
_DAY = 24 * 3600


@dataclass
class Span:
    """A span of time, and what began in it."""

    start: int
    seconds: float = 0.0
    bytes: int = 0
    complete: int = 0
    incomplete: int = 0
    other: int = 0

    @property
    def speed(self) -> float | None:
        """Bytes per second while retrieving; None if nothing came."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None

    @property
    def count(self) -> int:
        """How many runs."""
        return self.complete + self.incomplete + self.other


@dataclass
class Chart:
    """Shapes and texts, in the units of the view box."""

    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    count_top: int = COUNT_TOP
    count_bottom: int = COUNT_TOP + COUNT_HEIGHT
    lines: list[str] = field(default_factory=list)
    """Points of lines through neighbouring spans that have a speed."""
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    bars: list[tuple[float, float, float, float, str, str]] = field(default_factory=list)
    """x, y, width, height, class, text."""
    speed_ticks: list[tuple[float, str]] = field(default_factory=list)
    count_ticks: list[tuple[float, str]] = field(default_factory=list)
    time_ticks: list[tuple[float, str]] = field(default_factory=list)
    step: str = ""
    summary: str = ""


def chart_of(retrievals: Sequence[Run]) -> Chart | None:
    """Draw some retrievals; None if there are none."""
    if not retrievals:
        return None
    step, spans = _spans(retrievals)
    chart = Chart(step=_step_text(step))
    width = (WIDTH - LEFT - RIGHT) / len(spans)
    _draw_speed(chart, spans, step, width)
    _draw_counts(chart, spans, step, width)
    _draw_time(chart, spans, step, width)
    return chart


def _spans(retrievals: Sequence[Run]) -> tuple[int, list[Span]]:
    times = [int(one.moment.timestamp()) for one in retrievals]
    first, last = min(times), max(times)
    step = next((step for step in _STEPS if (last - first) / step < _MOST_SPANS - 1), _STEPS[-1])
    begin = first - first % step
    spans = [Span(start) for start in range(begin, last + 1, step)]
    for one, moment in zip(retrievals, times, strict=True):
        span = spans[(moment - begin) // step]
        span.seconds += one.seconds if one.bytes else 0.0
        span.bytes += one.bytes
        if one.outcome in ENDED_WELL:
            span.complete += 1
        elif one.outcome in ENDED_BADLY:
            span.incomplete += 1
        else:
            span.other += 1
    return step, spans


def _draw_speed(chart: Chart, spans: Sequence[Span], step: int, width: float) -> None:
    speeds = [span.speed for span in spans]
    known = [speed / 1e6 for speed in speeds if speed is not None]
    top = _round_up(max(known, default=1.0))
    digits = max(0, 1 - math.floor(math.log10(top)))
    for part in (0.0, 0.5, 1.0):
        chart.speed_ticks.append((_y(part, SPEED_TOP, SPEED_HEIGHT), f"{top * part:.{digits}f}" if part else "0"))
    line: list[str] = []
    for position, (span, speed) in enumerate(zip(spans, speeds, strict=True)):
        if speed is None:
            continue
        x = LEFT + (position + 0.5) * width
        y = _y(speed / 1e6 / top, SPEED_TOP, SPEED_HEIGHT)
        line.append(f"{x:.1f},{y:.1f}")
        chart.dots.append((round(x, 1), round(y, 1), f"{_when(span.start, step)}: {speed / 1e6:.1f} MB/s"))
    if len(line) > 1:
        chart.lines.append(" ".join(line))
    seconds = sum(span.seconds for span in spans)
    mean = sum(span.bytes for span in spans) / seconds / 1e6 if seconds else None
    chart.summary = "Nothing was received." if mean is None else f"{mean:.1f} MB/s on average."


def _draw_counts(chart: Chart, spans: Sequence[Span], step: int, width: float) -> None:
    top = max(span.count for span in spans)
    chart.count_ticks = [(_y(0, COUNT_TOP, COUNT_HEIGHT), "0"), (_y(1, COUNT_TOP, COUNT_HEIGHT), str(top))]
    gap = min(2.0, width * 0.15)
    wide = min(width - gap, 48)
    for position, span in enumerate(spans):
        x = LEFT + position * width + (width - wide) / 2
        below = 0
        for name, count, what in (
            ("bad", span.incomplete, "not complete"),
            ("live", span.other, "under way"),
            ("good", span.complete, "complete"),
        ):
            if count:
                # A single one among thousands is to be seen too.
                height = max(COUNT_HEIGHT * count / top, 2.0)
                y = COUNT_TOP + COUNT_HEIGHT * (1 - below / top) - height
                text = f"{_when(span.start, step)}: {count} {what}"
                chart.bars.append((round(x, 1), round(y, 1), round(wide, 1), round(height, 1), name, text))
            below += count
    bad = sum(span.incomplete for span in spans)
    count = sum(span.count for span in spans)
    chart.summary += f" {count} {noun(count, 'run')}, {bad} not complete."


def _draw_time(chart: Chart, spans: Sequence[Span], step: int, width: float) -> None:
    every = max(1, math.ceil(len(spans) / 8))
    days = (spans[-1].start - spans[0].start) >= _DAY
    for position in range(0, len(spans), every):
        moment = datetime.fromtimestamp(spans[position].start, UTC)
        form = "%b %d" if step >= _DAY else "%b %d %H:%M" if days else "%H:%M"
        chart.time_ticks.append((round(LEFT + (position + 0.5) * width, 1), f"{moment:{form}}"))


def _y(part: float, top: int, height: int) -> float:
    return round(top + height * (1 - part), 1)


def _round_up(value: float) -> float:
    """The next number that is no smaller, and half of which is short too."""
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.6, 2, 3, 4, 5, 6, 8, 10) if power * factor >= value * 0.999)


def _when(start: int, step: int) -> str:
    begin, end = datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(start + step, UTC)
    if step == _DAY:
        return f"{begin:%b %d}"
    if step > _DAY:
        return f"{begin:%b %d} to {end:%b %d}"
    return f"{begin:%b %d %H:%M} to {end:%H:%M}"


def _step_text(step: int) -> str:
    for size, word in ((7 * _DAY, "week"), (_DAY, "day"), (3600, "hour"), (60, "minute")):
        if step % size == 0:
            return word if step == size else f"{step // size} {word}s"
    return f"{step} seconds"
