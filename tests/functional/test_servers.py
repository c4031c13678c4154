"""The real PACS of the tests start, hold their data, and send it: the ground that later tests stand on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.archive import SERIES_UID, STUDY_UID, read_header
from airflow_dicom_get.testing.sample_data import CT, PRIVATE_CLASS, RLE
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc, Storescp, echo, require
from tests.support.holdings import Holding
from tests.support.reference_client import EXPLICIT, find, get
from tests.support.relay import Relay

Relays = Callable[..., Relay]


def fetch_each(server: Any, holding: Holding, relays: Relays) -> tuple[Relay, dict[str, tuple[str, bytes]]]:
    """Every instance in a C-GET of its own, with no context but its own."""
    through = relays(server)
    through.ae_title = server.ae_title  # type: ignore[attr-defined]
    came: dict[str, tuple[str, bytes]] = {}
    for sop, entry in holding.entries.items():
        row = read_header(entry.path)[3]
        keys = {"StudyInstanceUID": row[STUDY_UID], "SeriesInstanceUID": row[SERIES_UID], "SOPInstanceUID": sop}
        came |= get(through, "IMAGE", keys, [(entry.sop_class, entry.syntax)]).datasets
    return through, came


def assert_as_recorded(through: Relay, came: dict[str, tuple[str, bytes]], holding: Holding) -> int:
    """That the relay recorded what came; returns how many are the source's bytes."""
    recorded = through.by_sop()
    for sop, (syntax, data) in came.items():
        assert syntax == recorded[sop].syntax == holding.entries[sop].syntax
        assert data == recorded[sop].data
    return sum(data == holding.dataset(sop) for sop, (_, data) in came.items())


@pytest.mark.dcmtk
def test_dcmqrscp_as_it_comes(dcmqrscp: Dcmqrscp, ct: Holding, private: Holding) -> None:
    assert echo(dcmqrscp.port, dcmqrscp.ae_title)
    assert not echo(dcmqrscp.port, "SOMEONE")
    # One row for each study: it tells neither classes nor counts.
    asked = ("StudyInstanceUID", "SOPClassesInStudy", "NumberOfStudyRelatedInstances")
    rows = find(dcmqrscp, "STUDY", dict.fromkeys(asked))
    assert {row.StudyInstanceUID for row in rows} == {ct.study, private.study}
    assert not any(keyword in row for row in rows for keyword in asked[1:])
    result = get(dcmqrscp, "STUDY", {"StudyInstanceUID": private.study}, [(CT, EXPLICIT)])
    assert len(result.datasets) == 10
    assert result.final.Status == 0xB000


@pytest.mark.dcmtk
def test_dcmqrscp_does_not_accept_rle_without_a_profile(dcmqrscp: Dcmqrscp, ct: Holding) -> None:
    result = get(dcmqrscp, "STUDY", {"StudyInstanceUID": ct.study}, [(CT, RLE)])
    assert (result.final.Status, result.datasets) == (0xA702, {})


@pytest.mark.dcmtk
def test_dcmqrscp_with_a_profile_sends_every_syntax(dcmqrscp_all: Dcmqrscp, real: Holding, relay: Relays) -> None:
    through, came = fetch_each(dcmqrscp_all, real, relay)
    assert came.keys() == real.entries.keys()
    exact = assert_as_recorded(through, came, real)
    # The rest is encoded again: padding, group lengths.
    assert len(real.entries) * 0.75 < exact < len(real.entries)


@pytest.mark.dcmtk
def test_dcmqrscp_holds_the_mixed_study(dcmqrscp_mixed: Dcmqrscp, mixed: Holding) -> None:
    keys = {"StudyInstanceUID": mixed.study, "SeriesInstanceUID": "", "SOPInstanceUID": ""}
    rows = find(dcmqrscp_mixed, "IMAGE", keys)
    assert {row.SOPInstanceUID for row in rows} == mixed.entries.keys()


@pytest.mark.orthanc
def test_orthanc_sends_every_syntax(orthanc: Orthanc, real: Holding, relay: Relays) -> None:
    through, came = fetch_each(orthanc, real, relay)
    assert came.keys() == real.entries.keys()
    exact = assert_as_recorded(through, came, real)
    assert len(real.entries) * 0.75 < exact < len(real.entries)


@pytest.mark.orthanc
def test_orthanc_without_unknown_classes_ends_at_the_misfit(orthanc: Orthanc, private: Holding) -> None:
    pairs = sorted({(entry.sop_class, entry.syntax) for entry in private.entries.values()})
    result = get(orthanc, "STUDY", {"StudyInstanceUID": private.study}, pairs)
    assert result.final.Status == 0xC000
    assert len(result.datasets) < 12


@pytest.mark.orthanc
def test_orthanc_with_unknown_classes_sends_without_a_role(
    orthanc_mixed: Orthanc, private: Holding, relay: Relays
) -> None:
    through = relay(orthanc_mixed)
    pairs = sorted({(entry.sop_class, entry.syntax) for entry in private.entries.values()})
    get(through, "STUDY", {"StudyInstanceUID": private.study}, pairs)
    # It answers no role for such a class, which the reference client takes ill; the instance is sent all the same.
    assert through.by_sop().keys() == private.entries.keys()
    assert PRIVATE_CLASS in {sent.sop_class for sent in through.sent}


@pytest.mark.orthanc
def test_orthanc_holds_the_mixed_study(orthanc_mixed: Orthanc, mixed: Holding) -> None:
    (row,) = find(
        orthanc_mixed, "STUDY", {"StudyInstanceUID": mixed.study, "NumberOfStudyRelatedInstances": "", "PatientID": ""}
    )
    assert (row.NumberOfStudyRelatedInstances, row.PatientID) == (len(mixed.entries), "MIXED")


@pytest.mark.dcmtk
def test_storescp_takes_what_it_is_started_for(storescp: Storescp, storescp_all: Storescp, ct: Holding) -> None:
    rle = next(entry.path for entry in ct.entries.values() if entry.syntax == RLE)
    for server, taken in ((storescp, 0), (storescp_all, 1)):
        subprocess.run(
            [require("dcmsend"), "-q", "-aec", server.ae_title, "-dn", "127.0.0.1", str(server.port), rle], check=False
        )
        assert len(list(server.received.iterdir())) == taken


@pytest.mark.dcmtk
def test_stopped_servers_are_gone(tmp_path: Path) -> None:
    with Dcmqrscp(tmp_path / "q") as server:
        process = server.process
        assert process is not None
        port = server.port
        assert echo(port, server.ae_title)
    assert process.returncode is not None
    assert not echo(port, server.ae_title)
