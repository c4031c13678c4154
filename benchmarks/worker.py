"""A process that has imported everything and retrieves on demand: one JSON job a line in, one result a line out.

A job: ``{"node", "study", "destination", "options": {...}, "profile": false}`` to retrieve; ``{"control": {"instances",
"size"}, "folder"}`` for what the machine needs to hash, write and sync as much without any network; ``{"upload": {...},
"folder"}`` for boto3 alone; ``{"node", "cohort": n}`` to find the studies of so many accession numbers.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from s3transfer.manager import TransferConfig, TransferManager  # type: ignore[import-untyped]
from sampler import Sampler
from sources import accession_number

from airflow_dicom_get import GetScu
from airflow_dicom_get.engine.study_list import ACCESSION, ListedStudy


def import_everything() -> None:
    """What the package imports when it is first needed."""
    for name in (
        "engine.report",
        "engine.study",
        "manifest.files",
        "sinks.places",
        "sinks.s3_places",
        "sinks.filesystem",
        "sinks.forward",
        "sinks.s3",
    ):
        importlib.import_module(f"airflow_dicom_get.{name}")


def retrieve(job: dict[str, Any]) -> str:
    """Retrieve a study; returns the verdict."""
    result = GetScu(job["node"], destination=job["destination"], **job.get("options", {})).get_study(
        {"StudyInstanceUID": job["study"]}
    )
    return str(result.verdict)


def find(job: dict[str, Any]) -> str:
    """Find the studies of a list of accession numbers, as the task ``find_cohort`` does."""
    listed = [ListedStudy(n + 2, ACCESSION, accession_number(n)) for n in range(job["cohort"])]
    found = GetScu(job["node"], destination=job["folder"]).find_listed(listed)
    return "complete" if all(len(entry.uids) == 1 for entry in found.entries) else "not all were found"


def control(job: dict[str, Any]) -> str:
    """Hash and write so many files of so many bytes, and sync them beside that."""
    data = bytes(job["control"]["size"])
    with ThreadPoolExecutor(4) as pool:
        syncs = []
        for number in range(job["control"]["instances"]):
            fd = os.open(f"{job['folder']}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            hashlib.sha256(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            syncs.append(pool.submit(_sync, fd))
        for sync in syncs:
            sync.result()
    folder = os.open(job["folder"], os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return "complete"


def upload(job: dict[str, Any]) -> str:
    """Put the files of a folder: ``at_a_time`` by plain requests, or where that is 0 all by s3transfer."""
    how = job["upload"]
    config = how["config"]
    client = boto3.client(
        "s3",
        endpoint_url=config["endpoint"],
        aws_access_key_id=config["access_key"],
        aws_secret_access_key=config["secret_key"],
        region_name=config["region"],
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=how["threads"]),
    )
    paths = sorted(Path(job["folder"]).iterdir())
    if how["at_a_time"] == 0:
        settings = TransferConfig(max_request_concurrency=how["threads"])
        with TransferManager(client, settings) as manager:
            for future in [manager.upload(str(path), how["bucket"], f"run/{path.name}") for path in paths]:
                future.result()
        return "complete"

    def put(path: Path) -> None:
        client.put_object(Bucket=how["bucket"], Key=f"run/{path.name}", Body=path.read_bytes())

    with ThreadPoolExecutor(how["at_a_time"]) as pool:
        list(pool.map(put, paths))
    return "complete"


def _sync(fd: int) -> None:
    os.fdatasync(fd)
    os.close(fd)


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


_CALLS = {"control": control, "upload": upload, "cohort": find}


def main() -> None:
    """Serve jobs until the end of the input."""
    import_everything()
    for line in sys.stdin:
        job = json.loads(line)
        call = next((call for name, call in _CALLS.items() if name in job), retrieve)
        if job.get("profile"):
            with Sampler() as sampler:
                answer = measure(call, job)
            answer["profile"] = sampler.top()
        else:
            answer = measure(call, job)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
