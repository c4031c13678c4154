"""Plays histories by their seeds: ``python -m tests.simulation.simulate --seeds 0:10000 --processes 2``."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airflow_dicom_get.net.transcript import line_of
from tests.simulation.history import history_of
from tests.simulation.marks import reached
from tests.simulation.world import play


def findings_of(seed: int) -> list[str]:
    """What is wrong with the history of a seed."""
    try:
        return play(history_of(seed)).findings
    except Exception:
        return [f"raised: {traceback.format_exc()}"]


def play_all(seeds: Iterable[int], most: int = 50) -> tuple[dict[int, list[str]], Counter[str], int]:
    """Play histories; those that failed, the marks, and how many were played."""
    reached.clear()
    failed: dict[int, list[str]] = {}
    played = 0
    for seed in seeds:
        found = findings_of(seed)
        played += 1
        if found:
            failed[seed] = found
            if len(failed) >= most:
                break
    return failed, Counter(reached), played


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:1000", metavar="FROM:TO")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--most", type=int, default=50, help="failures after which a process stops")
    parser.add_argument("--marks", action="store_true", help="print how often each case was reached")
    parser.add_argument("--transcript", metavar="FILE", help="write down what was said in the first history that fails")
    given = parser.parse_args()
    first, last = map(int, given.seeds.split(":"))
    began = time.monotonic()
    parts = [range(first + n, last, given.processes) for n in range(given.processes)]
    with multiprocessing.get_context("fork").Pool(given.processes) as pool:
        results = pool.starmap(play_all, [(part, given.most) for part in parts])
    failed = {seed: found for part, _, _ in results for seed, found in part.items()}
    marks = sum((part for _, part, _ in results), Counter[str]())
    played = sum(number for _, _, number in results)
    seconds = time.monotonic() - began
    if given.marks:
        for name, number in sorted(marks.items()):
            print(f"{number / max(played, 1):9.2%}  {name}")
    for seed, found in sorted(failed.items()):
        print(f"seed {seed}: {found[0][:300]}" + ("" if found[0][:6] != "raised" else found[0][-600:]))
    if given.transcript and failed:
        told: list[dict[str, Any]] = []
        play(history_of(min(failed)), told)
        Path(given.transcript).write_bytes(b"".join(map(line_of, told)))
    print(f"{played} histories of {given.seeds} in {seconds:.0f} s, {played / seconds:.0f}/s: {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
