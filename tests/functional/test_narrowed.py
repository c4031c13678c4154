"""The manifest of a part of a study says of which: what the PACS lists beyond it was not asked for."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom.part10 import file_header
from airflow_dicom_get.engine.narrowed import that_can_be_asked
from airflow_dicom_get.manifest.files import read_table, write_manifest
from airflow_dicom_get.manifest.frames import combine_manifests, load_manifest, one_table
from airflow_dicom_get.manifest.schema import as_metadata, manifest_table, metadata_of
from airflow_dicom_get.manifest.scopes import Scopes, scopes_of
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks.objects import load_listed
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.verify import Verification, verify
from tests.support.listing_node import ListingNode, honest

Embedded = Callable[..., EmbeddedPacs]
STUDY = archive.STUDY_UID


def made(number: int, sop_class: str, modality: str) -> list[archive.Instance]:
    """A series of three instances."""
    whole = archive.build(series=number, instances=3, size=500, pairs=((sop_class, wire.EXPLICIT_LE),))
    return [replace(x, modality=modality) for x in whole if x.series_number == number]


CTS, MRS, OTHERS = made(1, archive.CT, "CT"), made(2, archive.MR, "MR"), made(3, archive.CT, "CT")
SERIES = {"SeriesInstanceUID": CTS[0].series}
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "series": (SERIES, {}),
    "instances": ({**SERIES, "SOPInstanceUID": [x.sop for x in CTS]}, {}),
    "modality": ({"Modality": "CT"}, {}),
    "classes": ({}, {"sop_classes": [archive.CT]}),
}


class Pacs:
    """Those instances that it has by now."""

    def __init__(self, embedded: Embedded, folder: Path) -> None:
        self._embedded, self._folder, self._number = embedded, folder, 0

    def of(self, instances: list[archive.Instance]) -> str:
        """The node of one that has these."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir(parents=True)
        for x in instances:
            head = file_header(x.sop_class, x.sop, x.syntax, calling="A", called="B")
            (folder / f"{x.sop}.dcm").write_bytes(head + x.dataset())
        return f"PACS@127.0.0.1:{self._embedded(folder).port}"


@pytest.fixture
def pacs(embedded: Embedded, tmp_path: Path) -> Pacs:
    return Pacs(embedded, tmp_path / "pacs")


def get(node: str, folder: Path, query: dict[str, Any], **options: Any) -> Result:
    return GetScu(node, destination=folder, **options).get_study({"StudyInstanceUID": STUDY, **query})


def told(found: Verification) -> tuple[int, dict[str, int]]:
    return found.exit_code, dict(found.counts)


@pytest.mark.parametrize("part", PARTS)
def test_it_is_the_same(pacs: Pacs, tmp_path: Path, part: str) -> None:
    """As a frame too, beside other parts in one folder, and by the manifests of a verify and of a get by that."""
    node, to = pacs.of(CTS + MRS), tmp_path / "to"
    query, options = PARTS[part]
    get(node, to, {})
    got = get(node, to, query, **options)
    assert (got.verdict, got.skipped, got.total) == ("complete", 3, 3)
    assert got.manifest_uri is not None
    found = verify(got.manifest_uri, addr=node)
    by_manifest = GetScu(node, destination=to).get_study(manifest=found.manifest_uri)
    for manifest in (got.manifest_uri, load_manifest(got.manifest_uri), found.manifest_uri, by_manifest.manifest_uri):
        for place in (None, to):
            found = verify(manifest, addr=node, destination=place, manifest_root=tmp_path / "v")
            assert told(found) == (0, {"=": 3})
            assert found.summary() == "same: 3 of 3 instances are the same; of 1 study a part was asked for"
            assert found.to_json()["in_part"] == 1


def test_so_it_is_of_what_a_store_says(pacs: Pacs, tmp_path: Path) -> None:
    source = pacs.of(CTS + MRS)
    got = get(source, tmp_path / "to", SERIES)
    with ListingNode(honest) as node:
        stored = StoreScu(f"LISTS@127.0.0.1:{node.port}", manifest_root=tmp_path).store(manifest=got.manifest_uri)
        assert stored.verdict == "complete"
        to = f"dicom://LISTS@127.0.0.1:{node.port}"
        found = verify(stored.manifest_uri, addr=source, destination=to, manifest_root=tmp_path)
    assert told(found) == (0, {"=": 3})


def test_so_it_is_of_several_that_a_get_is_given(pacs: Pacs, tmp_path: Path) -> None:
    node, to = pacs.of(CTS + MRS + OTHERS), tmp_path / "to"
    parts = [load_listed(get(node, to, {"SeriesInstanceUID": x[0].series}).manifest_uri).table for x in (CTS, MRS)]
    got = GetScu(node, destination=to).get_study(manifest=one_table(parts))
    assert (got.verdict, got.total) == ("complete", 6)
    assert told(verify(got.manifest_uri, addr=node)) == (0, {"=": 6})


def test_metadata_of_many_studies_and_parts_cost_no_more_than_their_text() -> None:
    studies = [f"2.25.{number}" for number in range(1, 5001)]
    parts = [[[["SeriesInstanceUID", f"1.2.{number}"]], []] for number in range(2000)]
    rows = [Instance(study, "1.2", f"{study}.1") for study in studies]
    table = manifest_table(rows, source="", destination="")

    def scopes(said: list[Any]) -> Scopes:
        facts = {**metadata_of(table), "scopes": json.dumps(said)}
        return scopes_of([table.replace_schema_metadata(as_metadata(facts))] * 2)

    tracemalloc.start()
    assert scopes([[parts, [*studies, "2.25.9999"]]]) == {}, "more parts than are asked for one after the other"
    found = scopes([[parts[:100], [*studies, "2.25.9999"]]])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(found) == set(studies)
    assert that_can_be_asked(found) == found
    assert most < 16 << 20


@pytest.mark.parametrize("part", ["series", "modality", "classes"])
def test_what_comes_to_it_and_what_is_lost_of_it_is_a_difference(pacs: Pacs, tmp_path: Path, part: str) -> None:
    query, options = PARTS[part]
    got = get(pacs.of(CTS[:2] + MRS), tmp_path, query, **options)
    assert (got.verdict, got.total) == ("complete", 2)
    node = pacs.of(CTS + MRS)
    assert told(verify(got.manifest_uri, addr=node)) == (3, {"=": 2, "+": 1})
    Path(got.manifest["uri"][0]).unlink()
    assert told(verify(got.manifest_uri, addr=pacs.of(MRS)))[0] == 3
    assert told(verify(got.manifest_uri, addr=node)) == (3, {"=": 1, "+": 2})


def test_an_instance_of_the_query_that_is_nowhere_is_not_the_same(pacs: Pacs, tmp_path: Path) -> None:
    """No more than the next get is complete."""
    node = pacs.of(CTS[:2])
    got = get(node, tmp_path, PARTS["instances"][0])
    assert got.verdict != "complete"
    assert verify(got.manifest_uri, addr=node).exit_code == 4


def test_a_key_that_may_say_something_of_a_patient_is_not_kept(pacs: Pacs, tmp_path: Path) -> None:
    """Nor is any of the study: its studies are named."""
    node = pacs.of(CTS + MRS)
    got = get(node, tmp_path, {"Modality": "CT", "SeriesDescription": "*"})
    assert (got.verdict, got.total) == ("complete", 3)
    for text in (b"SeriesDescription", b"SERIES"):
        assert text not in b"".join(read_table(got.manifest_uri).schema.metadata.values())
    with_id = get(node, tmp_path, {"Modality": "CT", "PatientID": CTS[0].patient_id})
    assert CTS[0].patient_id.encode() not in b"".join(read_table(with_id.manifest_uri).schema.metadata.values())
    assert told(verify(got.manifest_uri, addr=node))[0] == 3
    assert told(verify(with_id.manifest_uri, addr=node)) == (0, {"=": 3})


def test_several_manifests_mean_what_any_of_them_means(pacs: Pacs, tmp_path: Path) -> None:
    """One of the whole study means all of it."""
    before, node = pacs.of(CTS[:2] + MRS), pacs.of(CTS + MRS)
    one = get(before, tmp_path, SERIES).manifest_uri
    other = get(before, tmp_path, {"SeriesInstanceUID": MRS[0].series}).manifest_uri
    both = combine_manifests([one, other], tmp_path / "both.parquet")["manifest_uri"]
    whole = combine_manifests([other, get(pacs.of(MRS), tmp_path, {}).manifest_uri], tmp_path / "whole.parquet")
    assert told(verify(both, addr=before, root=tmp_path)) == (0, {"=": 5})
    assert told(verify(both, addr=node, root=tmp_path)) == (3, {"=": 5, "+": 1})
    assert told(verify(other, addr=node)) == (0, {"=": 3})
    assert told(verify(whole["manifest_uri"], addr=node, root=tmp_path)) == (3, {"=": 3, "+": 3})


@pytest.mark.parametrize(
    "scope",
    [
        "[",
        "7",
        json.dumps([[[], [STUDY]]]),
        json.dumps([[[[[], []]], [STUDY]]]),
        json.dumps([[[[[["Modality", "*"]], ["x"]]], [STUDY]]]),
        json.dumps([[[[[["StudyInstanceUID", "1.2"]], []]], [STUDY]]]),
        json.dumps([[[[[["SeriesDate", "20990101"]], []]], [STUDY]]]),
        json.dumps([[[[[["PatientID", "X"]], []]], [STUDY]]]),
        json.dumps([[[[[["QueryRetrieveLevel", "IMAGE"], ["SOPInstanceUID", "1.2"]], []]], [STUDY]]]),
        json.dumps([[[[[["SeriesInstanceUID", "*"]], []]], [STUDY]]]),
        json.dumps([[[[[["SeriesInstanceUID", CTS[0].series]], []]], ["1.2.3"]]]),
        "[" * 100_000,
    ],
)
def test_what_no_run_has_written_means_the_whole_study(pacs: Pacs, tmp_path: Path, scope: str) -> None:
    node = pacs.of(CTS + MRS)
    got = get(node, tmp_path, SERIES)
    assert got.manifest_uri is not None
    rows, path = read_table(got.manifest_uri), tmp_path / "_manifests" / "forged.parquet"
    write_manifest(rows, path, verdict="complete", evidence="list", run="r", extra={"scopes": scope})
    assert told(verify(path, addr=node)) == (3, {"=": 3, "+": 3})


def test_no_scope_makes_a_row_the_same(pacs: Pacs, tmp_path: Path) -> None:
    """A forged one narrows what the PACS lists beyond the rows, and none of the rows."""
    node = pacs.of(CTS + MRS)
    got = get(node, tmp_path, {})
    path = tmp_path / "_manifests" / "forged.parquet"
    scope = json.dumps([[[[[["SeriesInstanceUID", CTS[0].series]], []]], [STUDY]]])
    write_manifest(
        read_table(got.manifest_uri), path, verdict="complete", evidence="list", run="r", extra={"scopes": scope}
    )
    assert load_listed(path).scopes
    files = {x.sop: tmp_path / STUDY / x.series / f"{x.sop}.dcm" for x in MRS}
    files[MRS[0].sop].unlink()
    files[MRS[1].sop].write_bytes(files[MRS[1].sop].read_bytes()[:-1])
    found = verify(path, addr=node)
    assert (found.exit_code, found.counts["+"], found.counts["*"]) == (3, 1, 1)
