"""The limits of the PACS's admin: associations, bytes per second, hours.

`LIMIT_SECONDS=30` makes the measurement of the rate as long as that.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from airflow_dicom_get import GetScu, clock
from airflow_dicom_get.config.groups import Deadlines, Window
from airflow_dicom_get.engine import study as study_run
from airflow_dicom_get.engine.limits import RateLimit
from airflow_dicom_get.errors import IncompleteRetrieval
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from tests.support.holdings import Holding
from tests.support.relay import Relay

Embedded = Callable[..., EmbeddedPacs]
SECONDS = float(os.environ.get("LIMIT_SECONDS", "6"))
BERLIN = ZoneInfo("Europe/Berlin")


# --- bytes per second ----------------------------------------------------------------------------------


@pytest.mark.parametrize("associations", [4, 1])
def test_the_rate_is_that_of_the_run(tmp_path: Path, associations: int) -> None:
    """Whole, however many associations the source allows and the run uses: only Airflow's tasks take shares."""
    rate = 8_000_000
    seconds = SECONDS if associations == 4 else min(SECONDS, 3.0)
    size = 262_144
    count = max(int(rate * seconds / size / 4), 1)
    with MisbehavingPacs(series=4, instances=count, size=size) as pacs, Relay("127.0.0.1", pacs.port) as relay:
        relay.keep_data = False
        samples: list[tuple[float, int]] = []
        scu = GetScu(
            f"PACS@127.0.0.1:{relay.port}",
            destination=tmp_path,
            associations=associations,
            max_associations=4,
            bytes_per_second=rate,
        )
        result = scu.get_study(
            {"StudyInstanceUID": pacs.study_uid},
            on_sub_operation=lambda event: samples.append((time.monotonic(), relay.down)),
        )
    assert result.verdict == "complete"
    # Seen on the line, beyond the first moments in which the sockets' buffers fill.
    (begun, before), (ended, after) = samples[len(samples) // 8], samples[-1]
    measured = (after - before) / (ended - begun)
    assert measured < 1.05 * rate
    # A machine with other work may be slower than it may be; half a minute, measured alone, is not.
    assert measured > (0.95 if SECONDS >= 30 else 0.3) * rate


def test_the_rate_leaves_no_source_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four associations at 2 KB/s: each is read every few moments, whatever the sum of their debts is."""
    now, longest = [0.0], [0.0]

    def sleep(seconds: float) -> None:
        longest[0] = max(longest[0], seconds)
        slept[0] = seconds

    slept = [0.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "sleep", sleep)
    limit = RateLimit(2000)
    ready = [0.0] * 4
    total = 0
    while now[0] < 600:
        turn = min(range(4), key=lambda number: ready[number])
        now[0] = max(now[0], ready[turn])
        slept[0] = 0.0
        limit(limit.most)
        total += limit.most
        ready[turn] = now[0] + slept[0]
    assert longest[0] < Deadlines().stall / 25
    assert total == pytest.approx(2000 * 600, rel=0.01)


def test_a_slow_rate_does_not_break_deadlines(tmp_path: Path) -> None:
    """Time that we spend holding the rate is not counted against the source."""
    with MisbehavingPacs(series=1, instances=3, size=6000) as pacs:
        scu = GetScu(
            f"PACS@127.0.0.1:{pacs.port}",
            destination=tmp_path,
            associations=1,
            max_associations=1,
            bytes_per_second=8000,
            deadlines={"idle": 0.5, "next_object": 0.5, "min_rate": 20_000, "min_rate_window": 0.5},
            retries=0,
        )
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
    assert result.verdict == "complete"
    assert result.duration_seconds > 2


def test_a_wait_for_the_source_is_caught_up_a_little_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    slept: list[float] = []
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "sleep", slept.append)
    limit = RateLimit(1000)
    now[0] = 60.0
    for _ in range(100):
        limit(50)
    assert slept[0] <= 0.05
    assert slept[-1] == pytest.approx(4.9)


# --- associations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_associations_than_allowed_lists_included(embedded: Embedded, tmp_path: Path, limit: int) -> None:
    folder = tmp_path / "pacs"
    studies = [big_study(folder / str(n), 60, 2000, name=f"limited {n}", series=3) for n in range(3)]
    pacs = embedded(folder, max_associations=limit)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to", associations=limit, max_associations=limit)
    result = scu.get_study({"StudyInstanceUID": studies})
    assert (result.verdict, result.completed) == ("complete", 180)
    assert pacs.peak_associations == limit
    assert result.associations == pacs.total_associations  # none was rejected: we never asked for one too many
    assert not any(run for run in result.errors)


def test_a_limit_of_the_pacs_lowers_the_number_for_the_run(embedded: Embedded, tmp_path: Path) -> None:
    folder = tmp_path / "pacs"
    study = big_study(folder, 200, 2000, name="lowered", series=8)
    pacs = embedded(folder, max_associations=2)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "to", associations=8, max_associations=8)
    begun = time.monotonic()
    result = scu.get_study({"StudyInstanceUID": study})
    assert result.verdict == "complete"
    assert max(pacs.sent.values()) == 1
    assert time.monotonic() - begun < 5, "each of the others waited and asked again"


# --- hours -----------------------------------------------------------------------------------------------


class Clock:
    """The time of day as a test sets it."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def goes_to(self, then: datetime, after: int) -> Callable[[Any], None]:
        """A callback that sets the clock when ``after`` instances have come."""
        seen: list[Any] = []

        def arrived(event: Any) -> None:
            seen.append(event)
            if len(seen) == after:
                self.now = then

        return arrived


def scu_at(pacs: EmbeddedPacs, to: Path, clock: Clock, **options: Any) -> GetScu:
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=to, **{"timezone": "Europe/Berlin", **options})
    scu._clock = clock
    return scu


@pytest.mark.parametrize(
    ("now", "closes", "opens"),
    [
        # An ordinary winter's night, and the two nights on which the clock is changed.
        ("2026-01-20T23:00+01:00", "2026-01-21T06:00+01:00", "2026-01-21T22:00+01:00"),
        ("2026-03-28T23:00+01:00", "2026-03-29T06:00+02:00", "2026-03-29T22:00+02:00"),
        ("2026-03-29T01:59+01:00", "2026-03-29T06:00+02:00", "2026-03-29T22:00+02:00"),
        ("2026-03-29T03:01+02:00", "2026-03-29T06:00+02:00", "2026-03-29T22:00+02:00"),
        ("2026-10-24T23:00+02:00", "2026-10-25T06:00+01:00", "2026-10-25T22:00+01:00"),
        ("2026-10-25T02:30+02:00", "2026-10-25T06:00+01:00", "2026-10-25T22:00+01:00"),
        ("2026-10-25T02:30+01:00", "2026-10-25T06:00+01:00", "2026-10-25T22:00+01:00"),
    ],
)
def test_the_run_ends_when_the_window_closes(
    ct: Holding, embedded: Embedded, tmp_path: Path, now: str, closes: str, opens: str
) -> None:
    begins, end = datetime.fromisoformat(now), datetime.fromisoformat(closes)
    pacs = embedded(ct.folder)
    clock = Clock(begins)
    # A moment before it closes nothing ends, and a moment after it all does.
    scu = scu_at(pacs, tmp_path, clock, window="22:00-06:00")
    result = scu.get_study(
        {"StudyInstanceUID": ct.study}, on_sub_operation=clock.goes_to(end - timedelta(seconds=1), 5)
    )
    assert result.verdict == "complete"
    clock = Clock(begins)
    scu = scu_at(pacs, tmp_path / "again", clock, window="22:00-06:00")
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=clock.goes_to(end, 5))
    assert (result.verdict, result.reason) == ("partial", "window")
    kept = result.completed
    assert 5 <= kept <= 6  # one was under way
    assert result.resume_at == datetime.fromisoformat(opens)
    assert result.transient
    reasons = {row["reason"] for row in result.manifest.to_dict("records") if row["state"] == "missing"}
    assert reasons == {"window"}
    # Closed now: nothing is asked at all.
    pacs.total_associations = 0
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.reason, result.resume_at) == (
        "partial", "window", datetime.fromisoformat(opens),
    )  # fmt: skip
    assert pacs.total_associations == 0
    assert result.exit_code == 3
    # It opens again.
    clock.now = datetime.fromisoformat(opens)
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.skipped) == ("complete", kept)


@pytest.mark.parametrize(
    ("window", "day", "hours"),
    [
        ("22:00-06:00", "2026-03-28", 7),
        ("22:00-06:00", "2026-10-24", 9),
        ("01:00-04:00", "2026-03-29", 2),
        ("01:00-04:00", "2026-10-25", 4),
        ("02:30-04:00", "2026-03-29", 0.5),  # there is no 02:30 on that day: it is 03:30 then
        ("02:30-04:00", "2026-10-25", 2.5),  # and two of them on this one: the first counts
        ("08:00-18:00", "2026-03-29", 10),
    ],
)
def test_a_window_is_as_long_as_the_clock_on_the_wall_makes_it(window: str, day: str, hours: float) -> None:
    parsed = Window.parse("window", window)
    before = datetime.combine(datetime.fromisoformat(day).date(), parsed.start, BERLIN).astimezone(UTC)
    opens = parsed.opens_at(before - timedelta(minutes=1), BERLIN)
    closes = parsed.closes_at(opens, BERLIN)
    assert closes is not None
    assert (closes - opens) / timedelta(hours=1) == hours


def test_a_clock_that_jumps_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is put back and forth by a year while instances come; no wait goes by it."""
    jumps = itertools.cycle([0.0, -86400.0 * 400, 86400.0 * 400])
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + next(jumps))
    with MisbehavingPacs(instances=20) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, associations=2)
        result = scu.get_study({"StudyInstanceUID": pacs.study_uid})
        again = scu.get_study({"StudyInstanceUID": pacs.study_uid})
    monkeypatch.undo()
    assert result.verdict == "complete"
    assert (again.verdict, again.skipped) == ("complete", 40)
    assert 0 <= result.duration_seconds < 60


@pytest.mark.parametrize(
    ("jump", "verdict"), [(timedelta(hours=-2), "complete"), (timedelta(days=-3), "complete"),
                          (timedelta(hours=2), "complete"), (timedelta(days=1), "partial")],
)  # fmt: skip
def test_a_clock_that_jumps_within_a_window(
    ct: Holding, embedded: Embedded, tmp_path: Path, jump: timedelta, verdict: str
) -> None:
    begins = datetime(2026, 1, 20, 23, 0, tzinfo=BERLIN)
    pacs = embedded(ct.folder)
    clock = Clock(begins)
    scu = scu_at(pacs, tmp_path, clock, window="22:00-06:00")
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=clock.goes_to(begins + jump, 3))
    assert result.verdict == verdict
    if verdict == "partial":
        assert result.resume_at is not None
        assert result.resume_at > clock.now


def test_a_window_that_closes_stops_all_associations_and_later_studies(embedded: Embedded, tmp_path: Path) -> None:
    folder = tmp_path / "pacs"
    studies = [big_study(folder / str(n), 120, 2000, name=f"evening {n}", series=4) for n in range(3)]
    pacs = embedded(folder, before_send=lambda sop: time.sleep(0.002))
    clock = Clock(datetime(2026, 1, 20, 23, 0, tzinfo=BERLIN))
    scu = scu_at(pacs, tmp_path / "to", clock, window="22:00-06:00", associations=4, max_associations=4)
    closing = clock.goes_to(datetime(2026, 1, 21, 6, 0, tzinfo=BERLIN), 160)
    result = scu.get_study({"StudyInstanceUID": studies}, on_sub_operation=closing)
    assert (result.verdict, result.reason) == ("partial", "window")
    assert len(result.studies) == 3
    assert [study.verdict for study in result.studies] == ["complete", "partial", "partial"]
    assert sum(pacs.sent.values()) <= 160 + 60  # what is under way still comes
    assert result.completed == sum(study.completed for study in result.studies)
    deadline = time.monotonic() + 2
    while pacs.associations and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not pacs.associations
    assert threading.active_count() < 60


# --- a second list that cannot be had --------------------------------------------------------------


def test_the_hours_end_before_the_second_list(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    """All that was listed is held: nothing is missing, nothing is proven, and it may go on."""
    pacs = embedded(ct.folder)
    clock = Clock(datetime(2026, 1, 20, 23, 0, tzinfo=BERLIN))
    scu = scu_at(pacs, tmp_path, clock, window="22:00-06:00")
    ends = datetime(2026, 1, 21, 6, 0, tzinfo=BERLIN)
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=clock.goes_to(ends, 40))
    assert (result.verdict, result.reason, result.completed) == ("unverified", "list_not_repeated", 40)
    assert result.transient
    assert result.resume_at == datetime(2026, 1, 21, 22, 0, tzinfo=BERLIN)
    with pytest.raises(IncompleteRetrieval) as raised:
        result.raise_for_verdict()
    assert raised.value.transient
    clock.now = result.resume_at
    again = scu_at(pacs, tmp_path, clock, window="22:00-06:00").get_study({"StudyInstanceUID": ct.study})
    assert (again.verdict, again.skipped) == ("complete", 40)


def test_the_hours_end_while_the_pacs_refuses_the_second_list(
    embedded: Embedded, ct: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not for the hours that it ended, but in them alone it may go on."""
    pacs = embedded(ct.folder)
    clock = Clock(datetime(2026, 1, 20, 23, 0, tzinfo=BERLIN))
    seen: list[Any] = []

    def leave(event: Any) -> None:
        seen.append(event)
        pacs.no_find = len(seen) == 40

    def refused(text: str, *_: object) -> None:
        assert "cannot be listed" in text
        clock.now = datetime(2026, 1, 21, 6, 0, tzinfo=BERLIN)

    monkeypatch.setattr(study_run.log, "warning", refused)
    scu = scu_at(pacs, tmp_path, clock, window="22:00-06:00")
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=leave)
    assert (result.verdict, result.reason, result.completed) == ("unverified", "list_not_repeated", 40)
    assert (result.transient, result.resume_at) == (True, datetime(2026, 1, 21, 22, 0, tzinfo=BERLIN))


@pytest.mark.parametrize("gone", ["no_find", "max_associations"])
def test_the_pacs_is_gone_before_the_second_list(embedded: Embedded, ct: Holding, tmp_path: Path, gone: str) -> None:
    pacs = embedded(ct.folder)
    seen: list[Any] = []

    def leave(event: Any) -> None:
        seen.append(event)
        if len(seen) == 40:
            setattr(pacs, gone, 0 if gone == "max_associations" else True)

    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, retries=0)
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=leave)
    assert (result.verdict, result.reason, result.completed) == ("unverified", "list_not_repeated", 40)
    assert (result.transient, result.resume_at) == (True, None)
    assert "Run it again" in result.hint()


def test_the_hours_end_while_the_query_is_resolved(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    pacs = embedded(ct.folder)
    moments = iter([datetime(2026, 1, 21, 5, 59, tzinfo=BERLIN)])
    scu = scu_at(pacs, tmp_path, Clock(datetime(2026, 1, 21, 6, 1, tzinfo=BERLIN)), window="22:00-06:00")
    late = scu._clock
    scu._clock = lambda: next(moments, None) or late()
    result = scu.get_study({"StudyInstanceUID": ct.study})
    assert (result.verdict, result.reason, result.completed) == ("partial", "window", 0)
    assert result.resume_at == datetime(2026, 1, 21, 22, 0, tzinfo=BERLIN)
    assert pacs.sent == {}


def test_hours_that_end_are_read_of_every_study(embedded: Embedded, tmp_path: Path) -> None:
    """The first study decides on the verdict; the others wait all the same."""
    folder = tmp_path / "pacs"
    for n in range(3):
        big_study(folder / str(n), 4, 2000, name=f"two {n}")
    pacs = embedded(folder)
    studies = pacs.archive.studies()
    pacs.fail = {entry.sop for entry in pacs.archive.entries(studies[0])}
    clock = Clock(datetime(2026, 1, 20, 23, 0, tzinfo=BERLIN))
    scu = scu_at(pacs, tmp_path / "to", clock, window="22:00-06:00")
    ends = datetime(2026, 1, 21, 6, 0, tzinfo=BERLIN)
    result = scu.get_study({"StudyInstanceUID": studies}, on_sub_operation=clock.goes_to(ends, 2))
    verdicts = {study.study_instance_uid: (study.verdict, study.reason) for study in result.studies}
    assert verdicts[studies[0]] == ("failed", "sub_operation_failed")
    assert ("partial", "window") in verdicts.values()
    assert (result.verdict, result.transient) == ("failed", True)
    assert result.resume_at == datetime(2026, 1, 21, 22, 0, tzinfo=BERLIN)
