"""The transcript over real sockets: every verb, every end, and nothing of a patient."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pydicom
import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.net.transcript import MemoryTranscript
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc, Storescp, free_port
from airflow_dicom_get.verify import verify
from tests.support.holdings import Holding

Entries = list[dict[str, Any]]


def read(path: Path) -> Entries:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def messages(entries: Entries) -> Counter[str]:
    return Counter(entry["message"] for entry in entries)


def ends(entries: Entries) -> Entries:
    return [entry for entry in entries if entry["message"] == "end"]


def patient_values(holding: Holding) -> set[str]:
    found = set()
    for path in holding.files:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        found |= {str(header.get(k, "")) for k in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber")}
        found |= {str(header.get(k, "")) for k in ("StudyDescription", "SeriesDescription", "StudyDate", "StudyTime")}
    return {value for value in found if value}


def check(path: Path, holding: Holding, asked: str) -> None:
    """What must hold of the transcript of a get of a whole study."""
    entries, text = read(path), path.read_text("ascii")
    values = patient_values(holding) | {asked}
    assert len(values) > 3
    assert not [value for value in values if f'"{value}"' in text or (not value.isdigit() and value in text)]
    said = messages(entries)
    assert said["connect"] == said["A-ASSOCIATE-RQ"] == said["A-ASSOCIATE-AC"] == said["end"]
    assert {entry["how"] for entry in ends(entries)} == {"released"}
    instances = {entry["sop_instance"] for entry in entries if entry["message"] == "C-STORE-RQ"}
    assert instances == set(holding.entries)
    assert said["C-STORE-RQ"] == said["C-STORE-RSP"] == sum(entry["objects"] for entry in ends(entries))
    assert {entry["status"] for entry in entries if entry["message"] == "C-STORE-RSP"} == {"0000"}
    assert said["C-FIND-RQ"]
    assert said["C-GET-RQ"]
    for number in {entry["association"] for entry in entries}:
        mine = [entry for entry in entries if entry["association"] == number]
        assert [mine[0]["message"], mine[1]["message"], mine[2]["message"], mine[-1]["message"]] == [
            "connect", "A-ASSOCIATE-RQ", "A-ASSOCIATE-AC", "end",
        ]  # fmt: skip


@pytest.mark.dcmtk
def test_a_get_from_dcmqrscp(dcmqrscp: Dcmqrscp, ct: Holding, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    scu = GetScu(dcmqrscp.node, destination=tmp_path / "out", transcript=path)
    patient = str(pydicom.dcmread(ct.files[0], stop_before_pixels=True).PatientID)
    result = scu.get_study({"StudyInstanceUID": ct.study, "PatientID": patient})
    entries = read(path)
    assert patient not in {value for entry in entries for value in map(str, entry.get("keys", {}).values())}
    assert "***" in {entry["keys"].get("PatientID") for entry in entries if entry["message"] == "C-FIND-RQ"}
    came = {e["sop_instance"] for e in entries if e["message"] == "C-STORE-RQ"}
    assert len(came) >= result.completed > 0
    assert {e["implementation"][:6] for e in entries if e["message"] == "A-ASSOCIATE-AC"} == {"OFFIS_"}


@pytest.mark.orthanc
def test_a_get_from_orthanc(orthanc: Orthanc, ct: Holding, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    patient = str(pydicom.dcmread(ct.files[0], stop_before_pixels=True).PatientID)
    query = {"StudyInstanceUID": ct.study, "PatientID": patient}
    result = GetScu(orthanc.node, destination=tmp_path / "out", transcript=path, associations=2).get_study(query)
    assert result.verdict == "complete"
    check(path, ct, patient)
    rows = [e["row"] for e in read(path) if "row" in e]
    assert set(ct.entries) <= {row.get("SOPInstanceUID") for row in rows}


def test_source_and_destination_of_a_forward_number_their_associations_together(
    storescp: Storescp, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    with MisbehavingPacs(series=1, instances=3) as pacs:
        study = pacs.instances[0].study
        scu = GetScu(
            f"PACS@127.0.0.1:{pacs.port}",
            destination=f"dicom://{storescp.node}",
            manifest_root=tmp_path / "state",
            transcript=path,
        )
        assert scu.get_study({"StudyInstanceUID": study}).verdict == "complete"
    entries = read(path)
    assert len({e["run"] for e in entries}) == 1
    assert len(ends(entries)) == messages(entries)["connect"] == len({e["association"] for e in entries})
    ours = [e for e in entries if e["message"] == "C-STORE-RQ" and e["from"] == "us"]
    theirs = [e for e in entries if e["message"] == "C-STORE-RQ" and e["from"] == "peer"]
    assert [e["sop_instance"] for e in ours] == [e["sop_instance"] for e in theirs]
    sizes = {e["from"]: e["bytes"] for e in entries if e["message"] == "C-STORE-RSP"}
    assert sizes["us"] == sizes["peer"] > 0


def test_every_verb_takes_it(storescp: Storescp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MisbehavingPacs(series=1, instances=2) as pacs:
        node, study = f"PACS@127.0.0.1:{pacs.port}", pacs.instances[0].study
        out = str(tmp_path / "out")
        for verb, *arguments in (
            ("echo", node),
            ("find", node, "-k", "PatientName=Doe*"),
            ("plan", node, "--study", study, "--to", out),
            ("get", node, "--study", study, "--to", out),
            ("verify", node, "--study", study, "--to", out),
            ("store", storescp.node, out),
        ):
            path = tmp_path / f"{verb}.jsonl"
            assert main([verb, *arguments, "--transcript", str(path)]) in (0, 5), verb
            entries = read(path)
            assert ends(entries), verb
            assert "Doe" not in path.read_text()
    assert messages(read(tmp_path / "echo.jsonl"))["C-ECHO-RSP"] == 1
    assert messages(read(tmp_path / "store.jsonl"))["C-STORE-RSP"] == 2
    capsys.readouterr()


def test_what_verify_and_store_are_given_in_python(storescp: Storescp, tmp_path: Path) -> None:
    transcript = MemoryTranscript()
    with MisbehavingPacs(series=1, instances=2) as pacs:
        node, study = f"PACS@127.0.0.1:{pacs.port}", pacs.instances[0].study
        out = tmp_path / "out"
        GetScu(node, destination=out, transcript=transcript).get_study({"StudyInstanceUID": study})
        assert verify(study=study, destination=out, addr=node, transcript=transcript).same
    StoreScu(storescp.node, manifest_root=tmp_path / "state", transcript=transcript).store(out)
    entries = transcript.entries
    assert len(ends(entries)) == len({e["association"] for e in entries}) >= 5
    assert messages(entries)["C-STORE-RQ"] == 4


@pytest.mark.parametrize(
    ("mode", "by", "expected"),
    [
        ("abort_mid", "peer", {"how": "aborted", "source": 2}),
        ("drop", "peer", {"how": "closed"}),
        ("release_mid", "peer", {"how": "released"}),
        ("reject_local_limit", "peer", {"how": "rejected", "result": 2, "source": 3, "reason": 2}),
        ("silent", "us", {"how": "aborted", "deadline": "next_object"}),
        ("cmd_garbage", "us", {"how": "aborted", "source": 2}),
    ],
)
def test_how_an_association_ended(mode: str, by: str, expected: dict[str, Any], tmp_path: Path) -> None:
    transcript = MemoryTranscript()
    with MisbehavingPacs(mode, series=1, instances=4) as pacs:
        scu = GetScu(
            f"PACS@127.0.0.1:{pacs.port}",
            destination=tmp_path,
            retries=0,
            transcript=transcript,
            deadlines={"next_object": 0.5},
        )
        scu.get_study({"StudyInstanceUID": pacs.instances[0].study})
    assert [e for e in ends(transcript.entries) if e["from"] == by and expected.items() <= e.items()], ends(
        transcript.entries
    )
    if mode == "abort_mid":
        broken = next(e for e in ends(transcript.entries) if e["how"] == "aborted")
        assert broken["unfinished"]["bytes"] > 0


def test_no_connection() -> None:
    transcript = MemoryTranscript()
    with pytest.raises(DicomGetError):
        GetScu(f"127.0.0.1:{free_port()}", out_dir="unused", transcript=transcript).echo()
    first, *_, last = transcript.entries
    assert (first["message"], last["message"], last["how"]) == ("connect", "end", "not connected")
    assert last["error"] == "connect_failed"


def test_a_cancel(tmp_path: Path) -> None:
    transcript = MemoryTranscript()
    with MisbehavingPacs("slow_objects:0.3", series=1, instances=20) as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, transcript=transcript)
        came = threading.Event()

        def cancel_then() -> None:
            came.wait(20)
            scu.cancel()

        threading.Thread(target=cancel_then, daemon=True).start()
        result = scu.get_study({"StudyInstanceUID": pacs.instances[0].study}, on_sub_operation=lambda event: came.set())
    assert result.verdict == "cancelled"
    (cancel,) = (e for e in transcript.entries if e["message"] == "C-CANCEL-RQ")
    (request,) = (e for e in transcript.entries if e["message"] == "C-GET-RQ")
    assert (cancel["association"], cancel["id"]) == (request["association"], request["id"])
    assert ends(transcript.entries)[-1]["cancelled"]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with MisbehavingPacs("slow_objects:0.2", series=1, instances=50) as pacs:
        command = [
            sys.executable, "-m", "airflow_dicom_get.cli", "get", f"PACS@127.0.0.1:{pacs.port}",
            "--study", pacs.instances[0].study, "--to", str(tmp_path / "out"), "--transcript", str(path),
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and not (path.exists() and b"C-STORE-RSP" in path.read_bytes()):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert path.read_bytes().endswith(b"\n")
    assert messages(read(path))["C-STORE-RSP"] >= 1
