"""What the project wants to reach, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from results import Results

MB = 1e6


@dataclass(frozen=True)
class Aim:
    """One requirement. ``measured`` is None where it was not measured."""

    what: str
    limit: float
    measured: float | None
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        assert self.measured is not None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def verdict(self) -> str:
        """Reached, or by how much not."""
        if self.measured is None:
            return "not measured"
        if self.reached:
            return "reached"
        off = abs(self.measured / self.limit - 1)
        return f"**missed by {self.number(abs(self.measured - self.limit))}** ({off:.0%})"

    def number(self, value: float) -> str:
        """A value with the aim's unit."""
        if self.unit == "×":
            return f"{value:.2f} ×" if value < 10 else f"{value:.1f} ×"
        return f"{value:.2f} {self.unit}" if self.unit in ("s", "KB") else f"{value:.0f} {self.unit}".rstrip()

    @property
    def row(self) -> str:
        bound = "≥" if self.at_least else "≤"
        measured = "–" if self.measured is None else self.number(self.measured)
        return f"| {self.what} | {bound} {self.number(self.limit)} | {measured} | {self.verdict} |"


def aims(results: Results) -> Iterator[Aim]:
    """All requirements."""
    series = results.series
    for key, full, bare in (("ct", 1.6, 1.3), ("mr", 1.6, 1.2), ("big", 2.2, 1.3)):
        if (one := series.get(key)) is None:
            continue
        where = f"from memory, {one.words}"
        yield Aim(f"{where}: `GetScu` over tuned getscu", full, one.ratio("warm", "tuned"), "×")
        yield Aim(f"{where}: without digest and sync", bare, one.ratio("bare", "tuned"), "×")
        if key == "ct":
            yield Aim(f"{where}: over the same without digest", 1.1, one.ratio("warm", "no_digest"), "×")
            yield Aim(f"{where}: over the control", 1.25, one.ratio("warm", "control"), "×")
        if key == "mr":
            cpu = one.cpu("warm")
            yield Aim(f"{where}: CPU for each instance", 200, cpu and cpu / one.instances * 1e6, "µs")
        process, warm = one.wall("process"), one.wall("warm")
        more = None if process is None or warm is None else process - warm
        yield Aim(f"{where}: whole process more than `GetScu`", 0.28, more, "s")
    if (one := series.get("far")) is not None:
        for client, number, factor in (("four", 4, 3.6), ("eight", 8, 6.5)):
            what = f"from {one.title}: one association over {number}"
            yield Aim(what, factor, one.ratio("one", client), "×", at_least=True)
    for key in ("orthanc", "dcmqrscp"):
        if (one := series.get(key)) is None:
            continue
        for peer, name, factor in (
            ("tuned", "tuned getscu", 2.0),
            ("shipped", "getscu as shipped", 20.0),
            ("pynetdicom", "pynetdicom", 4.0),
        ):
            for client, ours in (("warm", "`GetScu`"), ("process", "whole process")):
                yield Aim(f"from {one.title}: {name} over {ours}", factor, one.ratio(peer, client), "×", at_least=True)
    yield from _deliveries(results)
    for key, one in series.items():
        if key not in ("help", "small", "tiny", "many") and (peak := one.rss("process")) is not None:
            yield Aim(f"peak memory of `dicom-get get`, {one.title}", 160, peak / MB, "MB")
    yield Aim("memory for each additional instance of the plan", 1.0, growth(results), "KB")
    for key, what, limit in (("small", "10 instances, end to end", 0.38), ("help", "`dicom-get --help`", 0.25)):
        yield Aim(what, limit, series[key].wall("process") if key in series else None, "s")
    again = series["many"].wall("again") if "many" in series else None
    yield Aim("a complete study of 100,000 instances once more", 3, again, "s")
    if (one := series.get("cohort")) is not None:
        wall = one.wall("process")
        what = f"`find_cohort` with {one.instances} accession numbers, embedded PACS, one association: studies a second"
        yield Aim(what, 500, wall and one.instances / wall, "", at_least=True)


def _deliveries(results: Results) -> Iterator[Aim]:
    series = results.series
    if (one := series.get("forward")) is not None:
        yield Aim(
            f"from {one.title}: tuned getscu to disk over `GetScu`", 1.0, one.ratio("tuned", "forward"), "×", True
        )
        what = f"from {one.title}: `GetScu` over tuned getscu, then tuned storescu"
        yield Aim(what, 0.1, one.ratio("forward", "two_steps"), "×")
        peak = one.rss("forward_process")
        yield Aim(f"peak memory of `dicom-get get`, {one.title}", 160, peak and peak / MB, "MB")
    if (one := series.get("s3")) is not None:
        for peer, number in (("boto3_8", 8), ("boto3", 32)):
            what = f"from {one.title}: boto3 alone, {number} at a time, over `GetScu`"
            yield Aim(what, 0.8, one.ratio(peer, "s3"), "×", True)
        peak = one.rss("s3_process")
        what = f"peak memory of `dicom-get get`, {one.title} (160 MB and ten parts of 8 MiB)"
        yield Aim(what, 160 + 10 * (8 << 20) / MB, peak and peak / MB, "MB")
    if (one := series.get("s3far")) is not None:
        yield Aim(f"from {one.title}: storing one by one over `GetScu`", 10, one.ratio("one_by_one", "s3"), "×", True)
        what = f"from {one.title}: tuned getscu, then s3transfer, over `GetScu`"
        yield Aim(what, 1.0, one.ratio("s3transfer", "s3"), "×", True)


def growth(results: Results) -> float | None:
    """Kilobytes that one more instance takes."""
    few, many = results.series.get("tiny"), results.series.get("many")
    if few is None or many is None:
        return None
    less, more = few.rss("process"), many.rss("process")
    if less is None or more is None:
        return None
    return (more - less) / 1000 / (many.instances - few.instances)
