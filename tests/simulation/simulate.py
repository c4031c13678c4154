"""Plays histories by their seeds: ``python -m tests.simulation.simulate --seeds 0:10000 --processes 2``."""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from airflow_dicom_get.net.transcript import line_of
from tests.simulation import coverage
from tests.simulation.history import BREAKS, MATCHING, history_of
from tests.simulation.marks import reached
from tests.simulation.world import play

_ENOUGH = 1000
"""Histories from which on what happens too seldom is seen."""
_MANY = 100_000
"""Histories from which on each combination has to be met."""
TWICE = 50
"""Each so many-th seed is played twice, and the two are compared."""

CLASSES: Mapping[str, tuple[str, ...]] = {
    "a listed UID is malformed": ("list: a malformed UID",),
    "a list is cut": ("list: cut at SERIES", "list: cut at IMAGE"),
    "a PACS answers more than it was asked": ("list: another study",),
    "a key is matched loosely": tuple(f"list: a key is matched loosely ({how})" for how in sorted(set(MATCHING))),
    "a PACS of Patient Root": ("list: in Patient Root", "get: in Patient Root"),
    "some classes alone are wanted": ("sop_classes", "sop_classes, and lists tell none"),
    "an instance moves, or two have one UID": ("archive: move", "archive: twin"),
    "a study grows and shrinks": ("archive: add", "archive: add series", "archive: remove", "archive: unlist"),
    "an instance is sent again with other bytes": ("archive: correct", "pacs: other bytes of one instance"),
    "somebody changes what lies there": ("between: overwrite", "between: tear", "between: delete"),
    "a file may not be written": ("between: read-only",),
    "an object is overwritten": ("s3: overwritten by another",),
    "an answer of S3 is lost": ("s3: an answer was lost",),
    "a run that is not durable, and then one that is": ("durable after a run that was not",),
    "a sync fails": ("disk: sync failed by EIO",),
    "the disk is full": ("disk: write failed by ENOSPC",),
    "a run is killed": ("verdict: killed",),
    "power is lost": ("between: power", "disk: a page was torn", "disk: a name was lost"),
    "the line ends": tuple(f"break: {how}" for how in BREAKS),
    "verify": ("verify: 0", "verify: 3", "verify: 4", "verify --quick: 0", "verify --quick: 3"),
    "verify of a node": ("verify of a node: 0", "verify of a node: 4"),
    "a node is the destination": ("node: breaks off", "node: C-FIND fails", "node: stored again"),
    "the node cannot be reached": ("node: down",),
    "what was retrieved is stored at a node": ("store: complete", "store: partial"),
    "a manifest is asked for": ("get: by a manifest",),
    "a data set is truncated": ("mode: ds_truncated", "truncated: stored", "truncated: held"),
    "a second list is not had": ("a second list was not had", "a second list was not had: the hours are over"),
    "two studies": ("get: of two studies", "the hours are over in one of two studies"),
    "a failure before the second study": ("a failure before the second of two studies",),
    "two runs at once": (
        "get: two at once, and nothing goes wrong in one",
        "get: two at once, and one is killed",
    ),
    "a cancel": ("cancel: between two calls", "cancel: while a run is on", "verdict: cancelled"),
    "a correction takes the place of what is held": ("replaced",),
    "ends": ("verdict: complete", "verdict: partial", "verdict: unverified", "verdict: failed", "verdict: empty"),
}
"""What has to happen in at least one of a hundred histories, and the marks that say so."""


def _played(seed: int) -> tuple[list[str], object]:
    """What is wrong with the history of a seed, and all that was done in it."""
    world = play(history_of(seed))
    coverage.note(world.history)
    return world.findings, (world.trace, world.pacs.log)


def findings_of(seed: int) -> list[str]:
    """What is wrong with the history of a seed."""
    try:
        found, told = _played(seed)
        if seed % TWICE == 0 and _played(seed) != (found, told):
            return ["the same seed gave another history"]
        return found
    except Exception:
        return [f"raised: {traceback.format_exc()}"]


def seldom(marks: Counter[str], played: int) -> list[str]:
    """The marks of :data:`CLASSES` that too few histories reached."""
    return [name for names in CLASSES.values() for name in names if marks[name] * 100 < played]


def play_all(
    seeds: Iterable[int], most: int = 50
) -> tuple[dict[int, list[str]], Counter[str], Counter[coverage.Cell], int]:
    """Play histories; those that failed, the marks, what they met together, and how many were played."""
    logging.disable(logging.CRITICAL)
    gc.disable()  # each history does so at its beginning; not by chance between two
    reached.clear()
    coverage.met.clear()
    failed: dict[int, list[str]] = {}
    played = 0
    for seed in seeds:
        found = findings_of(seed)
        played += 1
        if found:
            failed[seed] = found
            if len(failed) >= most:
                break
    return failed, Counter(reached), Counter(coverage.met), played


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:1000", metavar="FROM:TO")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--most", type=int, default=50, help="failures after which a process stops")
    parser.add_argument("--marks", action="store_true", help="print how often each case was reached")
    parser.add_argument("--coverage", action="store_true", help="print how many histories met what together")
    parser.add_argument("--transcript", metavar="FILE", help="write down what was said in the first history that fails")
    given = parser.parse_args()
    first, last = map(int, given.seeds.split(":"))
    began = time.monotonic()
    seeds = range(first, last)
    parts = [seeds[n :: given.processes] for n in range(given.processes)]
    with multiprocessing.get_context("fork").Pool(given.processes) as pool:
        results = pool.starmap(play_all, [(part, given.most) for part in parts])
        pool.close()
        pool.join()  # so that what they used is known
    failed = {seed: found for part, *_ in results for seed, found in part.items()}
    marks = sum((part for _, part, _, _ in results), Counter[str]())
    together = sum((part for _, _, part, _ in results), Counter[coverage.Cell]())
    played = sum(number for *_, number in results)
    seconds = time.monotonic() - began
    too_seldom = seldom(marks, played) if played >= _ENOUGH else []
    if too_seldom:
        print(f"met in less than 1 % of the histories: {', '.join(too_seldom)}")
    unmet = coverage.empty(together)
    if given.coverage:
        print(coverage.table(together))
    if unmet and (given.coverage or played >= _MANY):
        print(f"met by no history: {'; '.join(map(' / '.join, ((*map(str, cell),) for cell in unmet)))}")
    if given.marks:
        for name, number in sorted(marks.items()):
            print(f"{number / max(played, 1):9.2%}  {name}")
    for seed, found in sorted(failed.items()):
        print(f"seed {seed}: {found[0][:300]}" + ("" if found[0][:6] != "raised" else found[0][-600:]))
    if given.transcript and failed:
        told: list[dict[str, Any]] = []
        play(history_of(min(failed)), told)
        Path(given.transcript).write_bytes(b"".join(map(line_of, told)))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    each = 1000 * (used.ru_utime + used.ru_stime) / max(played, 1)
    print(
        f"{played} histories of {given.seeds} in {seconds:.0f} s, {played / seconds:.0f}/s, "
        f"{each:.0f} ms of a core each: {len(failed)} failed"
    )
    return bool(failed or too_seldom or (unmet and played >= _MANY))


if __name__ == "__main__":
    sys.exit(main())
