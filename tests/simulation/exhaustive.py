"""All schedules of up to two faults on a study of three instances.

A run without faults tells its calls. Every call of those after which programs break (sync, rename, writes of instances
and of the ledger, requests to S3), and everything that the PACS sends, is then met by every fault that there is for it;
and each of these histories again by a second one, in the same run behind the first, or in the run that goes on after
it.

``python -m tests.simulation.exhaustive --faults 2 --destination folder`` plays all of them.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from tests.simulation.history import DISK_FAULTS, S3_FAULTS, History, Planned, Run
from tests.simulation.pacs import Habits
from tests.simulation.world import World, play

POINTS = {
    "folder": {name: DISK_FAULTS[name] for name in ("sync", "rename", "write")} | {"unlink": ("power after",)},
    "bucket": {name: S3_FAULTS[name] for name in ("put_object", "list_objects_v2", "head_object", "get_object")},
}
"""By destination the operations that are met, and what becomes of them."""
BREAKS = ("before close", "half reset", "after silence")


def quiet(destination: str, *runs: Run) -> History:
    """Three instances of an honest PACS, in these runs."""
    study = archive.build(series=1, instances=3, size=1500, pairs=((archive.CT, wire.EXPLICIT_LE),))
    query = {"StudyInstanceUID": STUDY_UID}
    return History(1, tuple(study), Habits(), query, steps=runs, destination=destination)


def points(destination: str, trace: list[str], sends: int) -> Iterator[tuple[Planned | None, tuple[int, str] | None]]:
    """Each fault that a run with this trace can meet: one of ours, or a break of the PACS."""
    known, counts = POINTS[destination], Counter[str]()
    for operation in trace:
        counts[operation] += 1
        for what in known.get(operation, ()):
            yield Planned(operation, counts[operation], what), None
    for number, how in itertools.product(range(1, sends + 1), BREAKS):
        yield None, (number, how)


def met_by(run: Run, point: tuple[Planned | None, tuple[int, str] | None]) -> Run:
    """A run that meets one fault more."""
    fault, broken = point
    if fault is not None:
        return replace(run, faults=(*run.faults, fault))
    assert broken is not None
    return replace(run, breaks=(*run.breaks, broken))


def traces(world: World) -> list[tuple[list[str], int]]:
    """By run its calls, and how much the PACS sent."""
    return [(calls, sends) for (*_, calls), sends in zip(world.trace, world.sends, strict=True)]


def with_one(destination: str) -> list[History]:
    """All histories of one fault."""
    calls, sends = traces(play(quiet(destination, Run({}))))[0]
    return [quiet(destination, met_by(Run({}), point)) for point in points(destination, calls, sends)]


def with_another(history: History) -> Iterator[History]:
    """All histories that meet one fault more after those of this one: in its last run, or in one after it."""
    world = play(history)
    *before, last = history.steps
    assert isinstance(last, Run)
    at = len(before)
    for number, run in ((at, last), (at + 1, Run({}))):
        if number >= len(world.trace):
            return
        calls, sends = traces(world)[number]
        steps = (*before, last) if number > at else tuple(before)
        for point in points(history.destination, calls, sends):
            if number > at or _is_later(point, last):
                yield replace(history, steps=(*steps, met_by(run, point)))


def _is_later(point: tuple[Planned | None, tuple[int, str] | None], run: Run) -> bool:
    """Whether a point is not before the fault that a run meets already: that pair comes the other way round."""
    fault, broken = point
    if fault is not None:
        same = [f for f in run.faults if f.operation == fault.operation]
        return all(fault.number > f.number for f in same)
    assert broken is not None
    return all(broken[0] > number for number, _ in run.breaks)


def play_from(history: History, faults: int) -> tuple[int, list[tuple[str, str]]]:
    """Play a history, and all of more faults after it, up to so many; how many were played, and what failed."""
    played, failed = 1, []
    found = play(history).findings
    if found:
        failed.append((found[0], history.to_json()))
    elif faults > 1:
        for further in with_another(history):
            number, wrong = play_from(further, faults - 1)
            played, failed = played + number, failed + wrong
    return played, failed


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1)
    parser.add_argument("--destination", choices=sorted(POINTS), default="folder")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--part", default="0/1", metavar="N/M", help="every M-th first fault, from the N-th on")
    given = parser.parse_args()
    first, step = map(int, given.part.split("/"))
    began = time.monotonic()
    firsts = with_one(given.destination)[first::step]
    with multiprocessing.get_context("fork").Pool(given.processes) as pool:
        results = pool.starmap(play_from, [(history, given.faults) for history in firsts], chunksize=1)
    played = sum(number for number, _ in results)
    failed = [one for _, wrong in results for one in wrong]
    for what, history in failed[:20]:
        print(f"{what[:200]}\n{history}" if given.faults > 1 else what[:200])
    seconds = time.monotonic() - began
    print(f"{played} histories of up to {given.faults} faults in {seconds:.0f} s: {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
