"""A process that has imported everything and retrieves on demand: one JSON job a line in, one result a line out.

A job: ``{"node", "study", "folder", "options": {...}, "profile": false}``, or ``{"floor": {"instances", "size"},
"folder"}`` for what the machine needs to hash, write and sync as much without any network.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from sampler import Sampler

from airflow_dicom_get import GetScu


def retrieve(job: dict[str, Any]) -> str:
    """Retrieve a study; returns the verdict."""
    result = GetScu(job["node"], out_dir=job["folder"], **job.get("options", {})).get_study(
        {"StudyInstanceUID": job["study"]}
    )
    return str(result.verdict)


def floor(job: dict[str, Any]) -> str:
    """Hash, write and sync so many files of so many bytes, one after the other and the syncs at the end."""
    data = bytes(job["floor"]["size"])
    opened = []
    for number in range(job["floor"]["instances"]):
        hashlib.sha256(data)
        fd = os.open(f"{job['folder']}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        opened.append(fd)
        if len(opened) == 64:
            _sync(opened)
    _sync(opened)
    folder = os.open(job["folder"], os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return "complete"


def _sync(opened: list[int]) -> None:
    for fd in opened:
        os.fdatasync(fd)
        os.close(fd)
    opened.clear()


def measure(call: Callable[[dict[str, Any]], str], job: dict[str, Any]) -> dict[str, Any]:
    """What one call took."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.monotonic()
    verdict = call(job)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "verdict": verdict,
    }


def main() -> None:
    """Serve jobs until the end of the input."""
    for line in sys.stdin:
        job = json.loads(line)
        call = floor if "floor" in job else retrieve
        if job.get("profile"):
            with Sampler() as sampler:
                answer = measure(call, job)
            answer["profile"] = sampler.top()
        else:
            answer = measure(call, job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
