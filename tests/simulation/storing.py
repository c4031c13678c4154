"""What a retrieval has brought is stored at a node, and what must hold then."""

from __future__ import annotations

from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.result import Result
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from tests.simulation.destinations import ROOT
from tests.simulation.faults import Faults, Killed, Process
from tests.simulation.history import Run
from tests.simulation.invariants import data_set, final_files
from tests.simulation.manifests import plain_rows
from tests.simulation.marks import mark
from tests.simulation.world import DEADLINES, PAUSE, World, fault_of, key_of

NODE = "STORE@node.example:11112"
_HEALED = 3
"""Runs without faults in which it has to come to its end."""


def store(world: World) -> None:
    """Store all that lies at the destination: in the runs of the history, and then until all is there."""
    confirmed: set[str] = set()
    for run in (*world.history.store, *[Run({})] * _HEALED):
        files, held = world.place.files(), dict(world.node.held)
        lasting = world.place.durable() if any(fault.what.startswith("power") for fault in run.faults) else files
        result = _run(world, run)
        if world.findings:
            return
        _nothing_changed(world, files, lasting, {sop for sop in confirmed if world.node.held.get(sop) != held[sop]})
        if result is not None:
            rows = plain_rows(result.rows()) if result.rows is not None else []
            if not run.faults:  # else our records may not have all
                confirmed |= {key_of(row)[1] for row in rows if row["state"] in ("held", "forwarded")}
            _said(world, result)
            if world.findings or (result.verdict == "complete" and run not in world.history.store):
                return
            if run not in world.history.store and all(
                row["state"] != "failed" and (row["state"] != "conflict" or _is_twin(files, key_of(row)[1]))
                for row in rows
            ):
                return
    world.finding("a store never comes to an end")


def _run(world: World, run: Run) -> Result | None:
    results: list[Result] = []
    options = {**world.place.options, **run.options}
    root = "/state" if world.history.destination == "folder" else "s3://dicom/state"

    def work() -> None:
        scu = StoreScu(NODE, deadlines=DEADLINES, manifest_root=root, **options)
        results.append(scu.store(world.place.address))

    world.node.begin(run.node)
    world.loop.at += PAUSE
    process = Process(Faults({(f.operation, f.number): fault_of(f) for f in run.faults}))
    error = world.call(work, process)
    if error is not None and not isinstance(error, Killed | DicomGetError):
        raise error
    result = results[0] if results and error is None else None
    verdict = result.verdict if result is not None else type(error).__name__
    mark(f"store: {verdict}")
    world.trace.append(("store", verdict, world.loop.at, process.faults.trace))
    world.sends.append(0)
    return result


def _nothing_changed(world: World, before: dict[str, bytes], lasting: dict[str, bytes], changed: set[str]) -> None:
    now = {path: content for path, _, _, content in final_files(world.place.files())}
    for path, _, _, content in final_files(before):
        if now.pop(path, None) != content and lasting.get(path) == content:  # the rest a power cut may take
            world.finding("a store changed its source", path)
    if now:
        world.finding("a store put something into its source", *now)
    for sop in sorted(changed):
        world.finding("a store changed what the node had confirmed", sop)


def _said(world: World, result: Result) -> None:
    if result.completed + result.failed != result.total:
        world.finding("numbers of a store do not add up", result.total, result.completed, result.failed)
    for error in result.errors:
        if "nexpected" in str(error):
            world.finding("an error of a store that nobody expected", error)
    if result.verdict != "complete":
        return
    for path, _, (series, sop), content in final_files(world.place.files()):
        there = world.node.held.get(sop)
        if there is None:
            world.finding("a complete store, and not at the node", path)
        elif there.data != data_set(content) or (there.study, there.series) != (STUDY_UID, series):
            world.finding("a complete store, and other bytes at the node", path)


def _is_twin(files: dict[str, bytes], sop: str) -> bool:
    return sum(path.startswith(ROOT) and path.endswith(f"/{sop}.dcm") for path in files) > 1
