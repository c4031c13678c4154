"""A manifest is data: it does not say what is opened, and its UIDs are held against the objects."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

from airflow_dicom_get import GetScu
from airflow_dicom_get.dicom.part10 import file_header
from airflow_dicom_get.dicom.syntaxes import DEFLATED_LE, EXPLICIT_BE, EXPLICIT_LE
from airflow_dicom_get.errors import InvalidOption, ManifestError, NotProven
from airflow_dicom_get.exports.verb import export
from airflow_dicom_get.manifest import files as manifests
from airflow_dicom_get.manifest import frames
from airflow_dicom_get.manifest.files import manifest_content, read_table, write_manifest
from airflow_dicom_get.manifest.frames import (
    combine_manifests,
    frame_of,
    load_manifest,
    load_manifests,
    one_table,
    table_of,
)
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.notebook import read_instances, read_manifests
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks import ledger, objects
from airflow_dicom_get.storage import files
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.verify import verify
from tests.support.holdings import Holding
from tests.support.references import reference as reference_now

Embedded = Callable[..., EmbeddedPacs]


def a_row(**values: Any) -> Instance:
    row = Instance("1.2", "1.2.3", "1.2.3.4")
    for name, value in values.items():
        setattr(row, name, value)
    return row


class Retrieved:
    """A study that was retrieved to a folder, with the manifest to forge."""

    def __init__(self, embedded: Embedded, holding: Holding, folder: Path, **options: Any) -> None:
        self.folder = folder
        pacs = embedded(holding.folder)
        self.node = f"PACS@127.0.0.1:{pacs.port}"
        scu = GetScu(self.node, destination=folder, **options)
        result = scu.get_study({"StudyInstanceUID": holding.study})
        assert result.verdict == "complete"
        self.uri = str(result.manifest_uri)
        self.frame = frame_of(read_table(self.uri))
        self.file = self.frame["uri"][0].removeprefix("file://")

    def forged(self, name: str = "forged", **changes: Any) -> Path:
        """The manifest with another first row, where the true one lies."""
        frame = self.frame.copy()
        for column, value in changes.items():
            frame.loc[0, column] = value
        path = self.folder / "_manifests" / f"{name}.parquet"
        write_manifest(table_of(frame), path, verdict="complete", evidence="list", run="r")
        return path


@pytest.fixture
def got(embedded: Embedded, private: Holding, tmp_path: Path) -> Retrieved:
    return Retrieved(embedded, private, tmp_path / "data")


@pytest.fixture
def target(embedded: Embedded, tmp_path: Path) -> EmbeddedPacs:
    (tmp_path / "target").mkdir()
    return embedded(tmp_path / "target", ae_title="DEST")


def stored(target: EmbeddedPacs, tmp_path: Path, manifest: Any, **calls: Any) -> Result:
    scu = StoreScu(f"DEST@127.0.0.1:{target.port}", manifest_root=tmp_path / "state")
    return scu.store(manifest=manifest, **calls)


def reasons(result: Result) -> dict[str, int]:
    rows = result.manifest
    return {str(reason): int(n) for reason, n in rows[rows["state"] == "failed"]["reason"].value_counts().items()}


def outside(got: Retrieved, tmp_path: Path, way: str) -> dict[str, Any]:
    """A row that names the same bytes in another folder."""
    secret = tmp_path / "secret" / "one.dcm"
    secret.parent.mkdir()
    secret.write_bytes(Path(got.file).read_bytes())
    link = got.folder / "1.2.3"
    match way:
        case "path":
            return {"uri": str(secret)}
        case "uri":
            return {"uri": secret.as_uri()}
        case "dots":
            return {"uri": f"{got.folder}/../secret/one.dcm"}
        case "encoded":
            return {"uri": f"file://{got.folder}/%2e%2e/secret/one.dcm"}
        case "link to a file":
            link.symlink_to(secret)
            return {"uri": str(link)}
        case "link to a folder":
            link.symlink_to(secret.parent)
            return {"uri": str(link / "one.dcm")}
        case "a bucket":
            return {"uri": f"s3://CONN@{BUCKET}/one.dcm"}
        case "a node":
            return {"uri": "dicom://X@127.0.0.1:1"}
        case "nonsense":
            return {"uri": "gopher://127.0.0.1/one.dcm"}
        case "a path as UID":
            return {"study_instance_uid": "../secret"}
        case "no UID":
            return {"sop_instance_uid": None}
    raise AssertionError(way)


WAYS = (
    "path", "uri", "dots", "encoded", "link to a file", "link to a folder", "a bucket", "a node", "nonsense",
    "a path as UID", "no UID",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_lies_outside_is_not_opened(got: Retrieved, target: EmbeddedPacs, tmp_path: Path, way: str) -> None:
    forged = got.forged(**outside(got, tmp_path, way))
    result = stored(target, tmp_path, forged)
    assert (result.verdict, result.exit_code, result.completed, result.failed) == ("partial", 3, 11, 1)
    assert (reasons(result), result.transient) == ({"outside_root": 1}, False)
    assert len(list((tmp_path / "target").rglob("*.dcm"))) == 11
    found = verify(forged)
    assert (found.exit_code, found.counts["="], found.counts["!"]) == (3, 11, 1)
    frame = found.frame()
    assert frame["symbol"].tolist() == ["!"]
    assert verify(forged, quick=True).exit_code == 3


@pytest.mark.parametrize("way", ["path", "a path as UID", "no UID"])
def test_what_lies_outside_is_a_difference_also_where_the_pacs_does_not_list_it(
    got: Retrieved, tmp_path: Path, way: str
) -> None:
    unlisted = {"sop_instance_uid": "1.2.3.4", "bytes": None, "sha256": None, **outside(got, tmp_path, way)}
    one_more = pd.concat([got.frame, frame_of(read_table(got.forged(**unlisted)))[:1]])
    path = got.folder / "_manifests" / "one-more.parquet"
    write_manifest(table_of(one_more), path, verdict="complete", evidence="list", run="r")
    for quick in (False, True):
        found = verify(path, addr=got.node, quick=quick)
        assert (found.exit_code, found.counts) == (3, {"=": 12, "!": 1})


def test_a_root_that_the_caller_names_counts(got: Retrieved, target: EmbeddedPacs, tmp_path: Path) -> None:
    forged = got.forged(**outside(got, tmp_path, "path"))
    assert verify(forged, root=tmp_path / "secret").same
    assert stored(target, tmp_path, forged, root=[str(tmp_path / "secret"), "/nowhere"]).verdict == "complete"
    shell = [sys.executable, "-m", "airflow_dicom_get.cli"]
    said = subprocess.run([*shell, "verify", "--manifest", forged, "--json"], capture_output=True, timeout=60)
    assert (said.returncode, json.loads(said.stdout)["counts"]["!"]) == (3, 1)
    said = subprocess.run(
        [*shell, "verify", "--manifest", forged, "--root", tmp_path / "secret"], capture_output=True, timeout=60
    )
    assert said.returncode == 0, said.stderr
    node = f"DEST@127.0.0.1:{target.port}"
    stores = [*shell, "store", node, "--manifest", str(forged), "--state", str(tmp_path / "other")]
    assert subprocess.run(stores, capture_output=True, timeout=60).returncode == 3
    named = subprocess.run([*stores, "--root", str(tmp_path / "secret")], capture_output=True, timeout=60)
    assert named.returncode == 0, named.stderr
    with pytest.raises(InvalidOption, match="is a DICOM node"):
        verify(forged, root="dicom://X@127.0.0.1:1")


CLEAR = "\x1b[2J\x1b]0;owned\x07\n\u202e"


@pytest.mark.parametrize("column", ["sop_instance_uid", "uri", "sha256", "forwarded_to", "destination", "error"])
def test_what_a_manifest_says_does_not_reach_the_terminal(
    got: Retrieved, target: EmbeddedPacs, tmp_path: Path, column: str
) -> None:
    changes: dict[str, Any] = {column: CLEAR}
    if column == "uri":
        odd = got.folder / f"odd{CLEAR}.dcm"
        odd.write_bytes(b"")
        changes = {"uri": odd.as_uri()}
    elif column == "forwarded_to":
        changes |= {"uri": None, "state": "forwarded"}
    elif column == "error":
        changes |= {"uri": None, "state": "missing", "reason": CLEAR}
    forged = got.forged(**changes)
    shell = [sys.executable, "-m", "airflow_dicom_get.cli"]
    node = f"DEST@127.0.0.1:{target.port}"
    for words in (
        ["verify", "--manifest", str(forged)],
        ["store", node, "--manifest", str(forged), "--state", str(tmp_path / "state"), "--verbose"],
        ["store", node, str(got.folder), "--state", str(tmp_path / "other")],
    ):
        done = subprocess.run([*shell, *words], capture_output=True, timeout=60)
        for line in (done.stdout + done.stderr).decode().splitlines():
            assert line.isprintable(), line
        assert b"Traceback" not in done.stderr


WRONG: dict[str, Any] = {
    "bytes": pa.string(), "study_instance_uid": pa.int64(), "state": pa.list_(pa.string()),
    "uri": pa.binary(), "received_at": pa.string(), "dataset_offset": pa.float64(),
}  # fmt: skip
"""Columns, and another type than theirs."""


def of_type(table: pa.Table, column: str, kind: Any) -> pa.Table:
    values: list[Any] = [{pa.int64(): 1, pa.binary(): b"\xff", pa.float64(): 0.5}.get(kind, "zz")] * table.num_rows
    if pa.types.is_list(kind):
        values = [["zz"]] * table.num_rows
    return table.set_column(table.schema.get_field_index(column), column, pa.array(values, kind))


@pytest.mark.parametrize("column", WRONG)
def test_a_manifest_of_other_types_is_none(got: Retrieved, target: EmbeddedPacs, tmp_path: Path, column: str) -> None:
    table = of_type(read_table(got.uri), column, WRONG[column])
    path = got.folder / "_manifests" / "types.parquet"
    pq.write_table(table, path)
    for call in (
        lambda: verify(path),
        lambda: stored(target, tmp_path, path),
        lambda: combine_manifests([path], tmp_path / "all.parquet"),
        lambda: load_manifests([got.uri, path]),
        lambda: GetScu("PACS@127.0.0.1:1", destination=got.folder).get_study(manifest=path),
    ):
        with pytest.raises(ManifestError, match=f"column {column}"):
            call()


@pytest.mark.parametrize(
    ("column", "uid"),
    [
        *(("study_instance_uid", uid) for uid in ("../outside", "/outside", "..", CLEAR, "x" * 100_000)),
        ("series_instance_uid", "../../outside"), ("sop_instance_uid", "../../../outside/x"),
    ],
)  # fmt: skip
def test_a_get_goes_nowhere_for_a_malformed_uid(
    got: Retrieved, embedded: Embedded, private: Holding, tmp_path: Path, column: str, uid: str
) -> None:
    """A row that says of itself that its UIDs are malformed is missing; no folder is made, read or cleaned for it."""
    part = tmp_path / "outside" / "1.2" / ".1.2.3.20260101T000000Z-dead0001.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"")
    changes: dict[str, Any] = {column: uid, "state": "missing", "reason": "bad_uid", "uri": None}
    forged = got.forged(**changes)
    scu = GetScu(f"PACS@127.0.0.1:{embedded(private.folder).port}", destination=got.folder)
    result = scu.get_study(manifest=forged)
    assert (result.verdict, result.completed, result.failed) == (
        "failed" if column == "study_instance_uid" else "partial", 11, 1,
    )  # fmt: skip
    assert [str(x.relative_to(tmp_path / "outside")) for x in part.parents[1].rglob("*.*")] == [
        str(part.parent.relative_to(tmp_path / "outside")), str(part.relative_to(tmp_path / "outside")),
    ]  # fmt: skip
    assert {x.name for x in got.folder.iterdir()} == {"_manifests", private.study}


def test_a_digest_that_is_none_is_that_of_no_object(got: Retrieved, target: EmbeddedPacs, tmp_path: Path) -> None:
    forged = got.forged(sha256="zz")
    assert verify(forged).counts == {"=": 11, "*": 1}
    assert reasons(stored(target, tmp_path, forged)) == {"size_changed": 1}


def test_a_bare_data_set_whose_row_is_malformed_costs_that_row(
    embedded: Embedded, private: Holding, target: EmbeddedPacs, tmp_path: Path
) -> None:
    got = Retrieved(embedded, private, tmp_path / "data", store_with_file_meta=False)
    result = stored(target, tmp_path, got.forged(transfer_syntax_uid=f"1.2{CLEAR}"))
    assert (result.verdict, result.completed, reasons(result)) == ("partial", 11, {"size_changed": 1})


@pytest.mark.parametrize(
    "changes", [{"sha256": ""}, {"bytes": -(2**63)}, {"dataset_offset": -(2**63)}, {"bytes": -1, "dataset_offset": -1}]
)
def test_a_size_or_digest_that_is_none_says_nothing(got: Retrieved, changes: dict[str, Any]) -> None:
    assert verify(got.forged(**changes)).same


def test_no_node_is_called_because_a_row_names_it(got: Retrieved, target: EmbeddedPacs, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = f"X@127.0.0.1:{server.getsockname()[1]}"
        sent: dict[str, Any] = {"uri": None, "state": "forwarded", "forwarded_to": node}
        for number, changes in enumerate([{"source": node}, {"destination": f"dicom://{node}"}, sent]):
            forged = got.forged(f"forged{number}", **changes)
            verify(forged)
            verify(frame_of(read_table(forged)), manifest_root=tmp_path / "v")
            stored(target, tmp_path, forged)
            scu = GetScu(f"DEST@127.0.0.1:{target.port}", destination=got.folder, retries=0)
            assert scu.get_study(manifest=forged).skipped == 12
            combine_manifests([got.uri, forged], tmp_path / "all.parquet")
            read_instances(frame_of(read_table(forged)), root=got.folder)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1]),
        pa.array([1], pa.timestamp("us", "Not/AZone")),
        pa.array(["x"], pa.large_string()),
        pa.array(["x"]).dictionary_encode(),
    ],
    ids=["number", "time", "large", "dictionary"],
)
def test_a_column_of_tags_that_are_no_texts_is_refused(tmp_path: Path, values: pa.Array) -> None:
    rows = manifest_table([a_row(state="missing", reason="not_sent")], source="", destination="")
    honest, odd = tmp_path / "honest.parquet", tmp_path / "odd.parquet"
    for path, tags in ((honest, pa.array(["1"])), (odd, values)):
        write_manifest(rows.append_column("PatientID", tags), path, verdict="partial", evidence="list", run="r")
    for read in (
        lambda: export([honest, odd], "series", accept=("partial",)),
        lambda: load_manifests([honest, odd]),
        lambda: combine_manifests([honest, odd], tmp_path / "all.parquet"),
        lambda: read_manifests(tmp_path),
    ):
        with pytest.raises(ManifestError, match=r"odd\.parquet.*column 'PatientID' does not hold texts"):
            read()


def test_texts_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    rows = manifest_table([a_row(state="missing", reason="not_sent")], source="", destination="")
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    path = tmp_path / "odd.parquet"
    write_manifest(rows.append_column("PatientID", text), path, verdict="partial", evidence="list", run="r")
    for read in (lambda: read_table(path), lambda: load_manifest(path), lambda: read_manifests(tmp_path)):
        with pytest.raises(ManifestError, match=r"odd\.parquet' is damaged"):
            read()


def test_columns_named_as_those_that_a_notebook_adds_take_no_folder_away(tmp_path: Path) -> None:
    rows = manifest_table([a_row(state="missing", reason="not_sent")], source="", destination="")
    odd = rows.append_column("run", pa.array(["1"])).append_column("verdict", pa.array(["complete"]))
    for name, table in (("20260101T000000Z-deadbeef", rows), ("20260102T000000Z-deadbeef", odd)):
        write_manifest(table, tmp_path / f"{name}.parquet", verdict="partial", evidence="list", run=name)
    frame = read_manifests(tmp_path)
    assert frame["run"].str[:8].tolist() == ["20260101", "20260102"]
    assert frame["verdict"].tolist() == ["partial"] * 2


def test_a_column_that_is_there_twice_is_refused(got: Retrieved) -> None:
    table = read_table(got.uri)
    path = got.folder / "_manifests" / "twice.parquet"
    pq.write_table(table.append_column("uri", table["uri"]), path)
    with pytest.raises(ManifestError, match="uri is there twice"):
        verify(path)


def test_a_verdict_that_is_none_proves_nothing(got: Retrieved, tmp_path: Path) -> None:
    path = got.folder / "_manifests" / "word.parquet"
    write_manifest(read_table(got.uri), path, verdict="\x1b[32mcomplete", evidence="much", run="r")
    assert combine_manifests([got.uri, path], tmp_path / "all.parquet")["verdict"] == "unverified"


@pytest.mark.parametrize(
    "facts",
    [
        *({"run": f"{stamp}-deadbeef"} for stamp in ("20261399T999999Z", "00010101T000000Z", "99991231T235959Z")),
        {"run": "\u0662" * 8 + "T000000Z"},
        *({"runs": runs} for runs in ("[" * 200_000, "[[null, Infinity]]", '[["r", NaN]]', "[[null, 1, 2]]", "null")),
        {"runs": json.dumps([["20261399T999999Z", 1]])},
    ],
    ids=lambda facts: str(facts)[:30],
)
def test_metadata_that_cannot_be_read_say_nothing(tmp_path: Path, facts: dict[str, str]) -> None:
    rows = manifest_table([a_row(state="missing", reason="not_sent")], source="", destination="")
    for run, extra in (("20260101T000000Z-deadbeef", {}), ("r", facts)):
        write_manifest(rows, tmp_path / f"{run}.parquet", verdict="partial", evidence="list", run=run, extra=extra)
    assert len(export(tmp_path / "r.parquet", "series", accept=("partial",))) == 1
    assert combine_manifests([tmp_path / "r.parquet"], tmp_path / "all.parquet")["rows"] == 1
    (tmp_path / "all.parquet").unlink()
    frame = read_manifests(tmp_path)
    assert len(frame) == 2
    assert len(export(frame, "series", accept=("partial",))) == 1


def test_a_manifest_that_lies_elsewhere_needs_a_root(
    embedded: Embedded, private: Holding, target: EmbeddedPacs, tmp_path: Path
) -> None:
    got = Retrieved(embedded, private, tmp_path / "data", manifest_root=tmp_path / "elsewhere")
    assert stored(target, tmp_path, got.uri).verdict == "failed"
    assert verify(got.uri).counts == {"!": 12}
    assert verify(got.uri, root=got.folder).same
    assert stored(target, tmp_path, got.uri, root=got.folder).verdict == "complete"


def test_several_manifests_open_nothing_for_each_other(embedded: Embedded, private: Holding, tmp_path: Path) -> None:
    """Each is held to its own destination: what one may name, another may not."""
    mine, shared = (Retrieved(embedded, private, tmp_path / name) for name in ("mine", "shared"))
    forged = shared.forged(uri=mine.frame["uri"][5])
    with pytest.raises(NotProven, match="outside the destination of the manifest"):
        export([mine.uri, forged], "series", check=True)
    for given in ([forged, mine.uri], [mine.uri, forged]):
        listed = [objects.load_listed(one) for one in given]
        parts = tuple(part for one in listed for part in one.parts)
        found = verify(objects.Listed(one_table([one.table for one in listed]), parts), manifest_root=tmp_path / "v")
        assert [x.symbol for x in found.differences] == ["!"]
        assert "outside the destination" in found.differences[0].what
    assert len(export([mine.uri, shared.uri], "series", check=True))


def test_rows_of_several_places_in_one_manifest_are_held_to_their_own(
    embedded: Embedded, private: Holding, target: EmbeddedPacs, tmp_path: Path
) -> None:
    """Of several manifests as one, a row of one place names an object of another."""
    mine, shared = (Retrieved(embedded, private, tmp_path / name) for name in ("mine", "shared"))
    forged = shared.forged(uri=mine.frame["uri"][0])
    for several in ([mine.uri, forged], [forged, mine.uri]):
        whole = combine_manifests(several, tmp_path / "all")
        for given in (whole, load_manifest(whole)):
            assert objects.load_listed(given).places == objects.load_listed(load_manifests(several)).places
            assert verify(given, manifest_root=tmp_path / "v").counts["!"] == 1
            assert reasons(stored(target, tmp_path, given)) == {"outside_root": 1}
            if several[-1] == forged:  # else its rows are older than those of ours, and not exported
                with pytest.raises(NotProven, match="outside the destination"):
                    export(given, "series", check=True)
        with pytest.raises(ManifestError, match="outside the destination"):
            read_instances(load_manifests(several))
        assert len(read_instances(load_manifests(several), root=mine.folder)) == 24
    whole = combine_manifests([mine.uri, shared.uri], tmp_path / "all")
    assert verify(whole, manifest_root=tmp_path / "v").same
    assert len(export(whole, "series", check=True))


def test_what_is_read_by_its_address_keeps_its_own_place(
    embedded: Embedded, private: Holding, target: EmbeddedPacs, tmp_path: Path
) -> None:
    """Its column ``destination`` names another: with the address that would be the last word."""
    mine, shared = (Retrieved(embedded, private, tmp_path / name) for name in ("mine", "shared"))
    forged = shared.forged(uri=mine.frame["uri"][0], destination=str(mine.folder))
    Path(shared.uri.removeprefix("file://")).unlink()
    reference = combine_manifests([forged], tmp_path / "all")
    for given in (reference, load_manifest(forged), read_manifests(shared.folder), load_manifests([forged])):
        assert verify(given, manifest_root=tmp_path / "v").counts == {"=": 11, "!": 1}
        with pytest.raises(ManifestError, match="outside the destination"):
            read_instances(load_manifest(given))
        assert len(read_instances(load_manifest(given), root=mine.folder)) == 12
    assert reasons(stored(target, tmp_path, reference)) == {"outside_root": 1}
    for given in (read_manifests(shared.folder), reference):
        with pytest.raises(NotProven, match="outside the destination"):
            export(given, "series", check=True)


def test_what_lies_in_the_place_of_a_manifest_is_of_that_place(got: Retrieved, tmp_path: Path) -> None:
    """By whatever name its destination is called: what is the same folder now may be a link later."""
    (tmp_path / "link").symlink_to(got.folder)
    (got.folder / "part").mkdir()
    for text in (str(tmp_path / "link"), str(got.folder / "part"), f"{got.folder}/part/.."):
        frame = load_manifest(got.forged(destination=text))
        assert set(frame["destination"]) == {got.folder.as_uri()}
        assert len(read_instances(frame)) == 12
    for text in (str(got.folder), "", "nothing", "dicom://DEST@127.0.0.1:1", "gopher://127.0.0.1"):
        assert load_manifest(got.forged(destination=text))["destination"][0] == text
    by_link = load_manifest(tmp_path / "link" / "_manifests" / "forged.parquet")
    assert set(by_link["destination"][1:]) == {(tmp_path / "link").as_uri()}
    assert len(read_instances(by_link[1:])) == 11


class Within:
    """A folder ``_manifests`` below that of a destination, as others can make it, with a manifest of that place.

    What it lists lies in a private folder, which a link can put in its place.
    """

    def __init__(self, got: Retrieved, tmp_path: Path) -> None:
        name = Path(got.file).relative_to(got.folder)
        self.folder, self.private = got.folder / "_manifests" / "x", tmp_path / "private"
        (self.private / name).parent.mkdir(parents=True)
        (self.private / name).write_bytes(Path(got.file).read_bytes())
        (self.private / "_manifests").mkdir()
        (self.folder / "_manifests").mkdir(parents=True)
        self.manifest = self.folder / "_manifests" / "m.parquet"
        frame = got.frame.iloc[:1].assign(destination=self.folder.as_uri(), uri=(self.folder / name).as_uri())
        write_manifest(table_of(frame), self.manifest, verdict="complete", evidence="list", run="r")
        shutil.copy(self.manifest, self.private / "_manifests")

    def put_link(self) -> None:
        self.folder.rename(self.folder.with_name("old"))
        self.folder.symlink_to(self.private)


def test_a_folder_of_manifests_within_ours_is_no_place_of_its_own(
    got: Retrieved, target: EmbeddedPacs, tmp_path: Path
) -> None:
    within = Within(got, tmp_path)
    for named in (got.folder, got.folder / "_manifests", within.folder, within.manifest):
        frame = read_manifests(named)
        assert set(frame["destination"]) == {got.folder.as_uri()}
        assert len(frame) == (13 if named in (got.folder, got.folder / "_manifests") else 1)
    within.put_link()
    with pytest.raises(ManifestError, match="outside the destination"):
        read_instances(frame)
    assert reasons(stored(target, tmp_path, frame[got.frame.columns])) == {"outside_root": 1}


def test_no_link_is_followed_to_a_folder_of_manifests_within_ours(
    got: Retrieved, target: EmbeddedPacs, tmp_path: Path
) -> None:
    within = Within(got, tmp_path)
    within.put_link()
    for read in (read_table, load_manifest, read_manifests, lambda uri: stored(target, tmp_path, uri)):
        with pytest.raises(ManifestError, match="it is a link, which is not followed"):
            read(within.manifest)
    with pytest.raises(ManifestError, match="it is a link, which is not followed"):
        read_manifests(within.folder)
    with pytest.raises(ManifestError, match="it is a link, which is not followed"):
        combine_manifests([got.uri], within.folder / "_manifests" / "whole.parquet")
    assert [x.name for x in (within.private / "_manifests").iterdir()] == ["m.parquet"]


def test_destinations_without_number_are_not_all_looked_at(got: Retrieved, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    rows = [a_row() for _ in range(20_000)]
    table = manifest_table(rows, source="", destination="")
    places = pa.array([str(got.folder), *(f"{got.folder}/{number}" for number in range(1, len(rows)))], pa.string())
    table = table.set_column(table.column_names.index("destination"), "destination", places)
    path = got.folder / "_manifests" / "many.parquet"
    write_manifest(table, path, verdict="complete", evidence="list", run="r")

    def looked(_: Any, at: Any) -> Path:
        looks.append(at)
        return Path(at)

    monkeypatch.setattr(type(files.disk), "real_path", looked)
    assert set(load_manifest(path)["destination"]) == {str(got.folder), got.folder.as_uri(), ""}
    assert len(looks) <= 1000


@pytest.mark.parametrize("root", ["elsewhere", "elsewhere/_manifests"])
def test_what_a_retrieval_hands_on_has_its_destination_wherever_its_manifest_lies(
    embedded: Embedded, private: Holding, tmp_path: Path, root: str
) -> None:
    got = Retrieved(embedded, private, tmp_path / "data", manifest_root=tmp_path / root)
    assert verify(reference_now(got.uri), manifest_root=tmp_path / "v").same
    reference = combine_manifests([reference_now(got.uri)], tmp_path / "all")
    assert len(read_instances(load_manifest(reference))) == 12


def test_a_frame_is_held_to_its_destination(got: Retrieved, target: EmbeddedPacs, tmp_path: Path) -> None:
    frame: pd.DataFrame = got.frame
    assert verify(frame, manifest_root=tmp_path / "v").same
    assert len(read_instances(frame)) == 12
    forged = frame.copy()
    forged.loc[0, "uri"] = outside(got, tmp_path, "path")["uri"]
    assert reasons(stored(target, tmp_path, forged)) == {"outside_root": 1}
    assert verify(forged, manifest_root=tmp_path / "v").counts == {"=": 11, "!": 1}
    with pytest.raises(ManifestError, match="outside the destination"):
        read_instances(forged)
    assert len(read_instances(forged, root=tmp_path / "secret")) == 12
    nowhere = frame.assign(destination="")
    assert verify(nowhere, manifest_root=tmp_path / "v").counts == {"!": 12}
    relative = frame.assign(destination="data")
    assert stored(target, tmp_path, relative).verdict == "failed"


def test_the_uids_are_those_of_the_object(got: Retrieved, target: EmbeddedPacs, tmp_path: Path) -> None:
    """The first row names the second one's object, with its size and digest."""
    second = got.frame.loc[1]
    forged = got.forged(uri=second["uri"], bytes=second["bytes"], sha256=second["sha256"])
    found = verify(forged)
    assert (found.exit_code, found.counts) == (3, {"=": 11, "*": 1})
    result = stored(target, tmp_path, forged)
    assert (result.verdict, result.failed, reasons(result)) == ("partial", 1, {"size_changed": 1})
    with pytest.raises(ManifestError, match="not the instance that the manifest names"):
        read_instances(frame_of(read_table(forged)))


def test_a_bucket_is_held_to_its_prefix(
    embedded: Embedded, private: Holding, target: EmbeddedPacs, moto: Moto, tmp_path: Path
) -> None:
    prefix = tmp_path.name
    pacs = embedded(private.folder)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=f"s3://{BUCKET}/{prefix}", s3_config=moto.config)
    result = scu.get_study({"StudyInstanceUID": private.study})
    frame = result.manifest
    assert verify(frame, s3_config=moto.config, manifest_root=tmp_path / "v").same
    path = f"{prefix}/_manifests/forged.parquet"
    here = f"s3://{BUCKET}/{prefix}"
    for text, held in (
        *((f"s3://{BUCKET}", ""), (f"{here}-else", ""), ("s3://another/x", ""), ("/etc", ""), (f"{here}/part", here)),
        *((here, here), (f"s3://CONN@{BUCKET}/{prefix}", f"s3://CONN@{BUCKET}/{prefix}")),
    ):
        content, _ = manifest_content(table_of(frame.assign(destination=text)), verdict="", evidence="", run="r")
        moto.client().put_object(Bucket=BUCKET, Key=path, Body=content)
        assert set(load_manifest(f"s3://{BUCKET}/{path}", moto.config)["destination"]) == {held}
    key = frame["uri"][0].removeprefix(f"s3://{BUCKET}/")
    for number, other in enumerate((f"{prefix}-else/one.dcm", "one.dcm")):
        moto.client().put_object(Bucket=BUCKET, Key=other, Body=moto.read(key))
        forged = frame.copy()
        forged.loc[0, "uri"] = f"s3://{BUCKET}/{other}"
        found = verify(forged, s3_config=moto.config, manifest_root=tmp_path / "v")
        assert found.counts == {"=": 11, "!": 1}
        scu_of = StoreScu(
            f"DEST@127.0.0.1:{target.port}", s3_config=moto.config, manifest_root=tmp_path / f"state{number}"
        )
        assert reasons(scu_of.store(manifest=forged)) == {"outside_root": 1}
        root = f"s3://{BUCKET}/{other.rpartition('/')[0]}".rstrip("/")
        assert verify(forged, s3_config=moto.config, root=root, manifest_root=tmp_path / "v").same


def test_of_a_file_that_grew_a_notebook_reads_no_more_than_the_manifest_says(
    got: Retrieved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour may put a file of 16 GiB there that takes no space on the disk."""
    read = []

    def counted(path: Any) -> Any:
        for view in files.read_chunks(path):
            read.append(len(view))
            yield view

    monkeypatch.setattr(objects, "files", SimpleNamespace(**{**vars(files), "read_chunks": counted}))
    assert len(read_instances(got.frame)) == 12
    with open(got.file, "r+b") as file:
        file.truncate(1 << 30)
    read.clear()
    with pytest.raises(ManifestError, match=f"larger than the {got.frame['bytes'][0]} bytes"):
        read_instances(got.frame)
    assert sum(read) < 1 << 20


@pytest.mark.parametrize("quick", [True, False])
def test_rows_of_one_instance_without_number_take_time_by_their_number_alone(
    got: Retrieved, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    """By its square, 135 KB of manifest would hold a verify for hours."""
    looks = []

    def counted(row: Instance) -> str | None:
        looks.append(row)
        return uri.__get__(row)

    uri: Any = Instance.uri
    rows = pd.concat([got.frame.head(1)] * 1000, ignore_index=True)
    monkeypatch.setattr(Instance, "uri", property(counted, uri.__set__))
    found = verify(rows, manifest_root=got.folder / "v", quick=quick)
    assert found.counts == {"=": 1}
    assert len(looks) < 10 * 1000


@pytest.fixture
def deflated(got: Retrieved) -> Callable[[bytes, bytes], pd.DataFrame]:
    """The first row, with a file in its place that has the same data set deflated, and zeros for its pixels."""

    def make(pixels: bytes, behind: bytes) -> pd.DataFrame:
        dataset = dcmread(got.file)
        dataset.file_meta.TransferSyntaxUID = UID(DEFLATED_LE)
        dataset.PixelData = b""
        plain = DicomBytesIO()
        plain.is_little_endian, plain.is_implicit_VR = True, False
        write_dataset(plain, dataset)
        head = file_header(dataset.SOPClassUID, dataset.SOPInstanceUID, DEFLATED_LE, calling="A", called="B")
        deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        elements = plain.getvalue().partition(b"\xe0\x7f\x10\x00")[0]
        element = b"\xe0\x7f\x10\x00OB\0\0" + len(pixels).to_bytes(4, "little")
        content = head + deflate.compress(elements + element + pixels) + deflate.flush() + behind
        Path(got.file).write_bytes(content)
        frame: pd.DataFrame = got.frame.head(1).assign(bytes=len(content), dataset_offset=len(head))
        return frame

    return make


def test_what_inflates_without_measure_is_not_inflated_in_a_notebook(deflated: Any) -> None:
    """As a PACS sends it: some 300 KB, stored as they came, of which pydicom would make gigabytes of memory."""
    (dataset,) = read_instances(deflated(bytes(1 << 20), b"\0"))
    assert len(dataset.PixelData) == 1 << 20
    with pytest.raises(ManifestError, match="it inflates without measure"):
        read_instances(deflated(bytes(300 << 20), b""))


def test_a_damaged_deflated_file_is_an_error_that_names_it(got: Retrieved, deflated: Any) -> None:
    frame = deflated(bytes(1 << 20), b"")
    path = Path(got.file)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ManifestError, match="its deflated data set is damaged"):
        read_instances(frame)


def _elements(order: str, *elements: tuple[int, bytes, bytes]) -> bytes:
    """Elements in explicit VR, of which those of OB have a long length."""
    return b"".join(
        struct.pack(order + "HH2s", tag >> 16, tag & 0xFFFF, vr)
        + (struct.pack(order + "HL", 0, len(value)) if vr == b"OB" else struct.pack(order + "H", len(value)))
        + value
        for tag, vr, value in elements
    )


@pytest.fixture
def remade(got: Retrieved) -> Callable[[str, bytes], pd.DataFrame]:
    """The first row, with another file in its place."""

    def make(syntax: str, dataset: bytes) -> pd.DataFrame:
        row = got.frame.iloc[0]
        head = file_header(row.sop_class_uid, row.sop_instance_uid, syntax, calling="A", called="B")
        Path(got.file).write_bytes(head + dataset)
        frame: pd.DataFrame = got.frame.head(1).assign(bytes=len(head + dataset), dataset_offset=len(head))
        return frame

    return make


def _uids(got: Retrieved) -> list[tuple[int, bytes, bytes]]:
    row = got.frame.iloc[0]
    texts = (row.sop_class_uid, row.sop_instance_uid, row.study_instance_uid, row.series_instance_uid)
    values = [text.encode() + b"\0" * (len(text) % 2) for text in texts]
    tags = (0x00080016, 0x00080018, 0x0020000D, 0x0020000E)
    return [(tag, b"UI", value) for tag, value in zip(tags, values, strict=True)]


DEFLATES = _elements("<", (0x00020010, b"UI", DEFLATED_LE.encode()))


def test_a_second_transfer_syntax_in_the_data_set_is_not_followed(got: Retrieved, remade: Any) -> None:
    """pydicom would take it for more of the file's own, and inflate what follows."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    elements = _elements("<", *_uids(got), (0x7FE00010, b"OB", bytes(1 << 20)))
    with pytest.raises(ManifestError, match=r"it is not an instance .* \(0002,0010\) does not belong in a data set"):
        read_instances(remade(EXPLICIT_LE, DEFLATES + deflate.compress(elements) + deflate.flush()))


def test_what_a_data_set_begins_with_is_none_of_the_file(got: Retrieved, remade: Any) -> None:
    """As a PACS sends it, in big endian: read as little endian, its first element would be one of group 0002."""
    within = _elements(">", *_uids(got))
    odd = b"\x02\0\xf0\0OB\0\0" + struct.pack(">L", 256) + bytes(256)  # of 65,536 bytes, if read so
    pixels = bytes((1 << 16) - 256 - len(within) - 12)
    tail = _elements(">", (0x7FE00010, b"OB", pixels + DEFLATES + b"\xff" * 100))
    (dataset,) = read_instances(remade(EXPLICIT_BE, odd + within + tail))
    assert dataset.file_meta.TransferSyntaxUID == EXPLICIT_BE
    assert dataset[0x0200F000].value == bytes(256)
    assert len(dataset.PixelData) == len(pixels) + len(DEFLATES) + 100


def test_what_pydicom_cannot_read_is_an_error_that_names_it(got: Retrieved, remade: Any) -> None:
    first = b"\x40\0\x75\2SQ\0\0\xff\xff\xff\xff"
    sequence = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff"
    item = b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    with pytest.raises(ManifestError, match=r"pydicom cannot read it \(RecursionError\)"):
        read_instances(remade(EXPLICIT_LE, _elements("<", *_uids(got)) + first + item + (sequence + item) * 3000))


@pytest.mark.parametrize("column", ["uri", "destination"])
def test_a_path_longer_than_any_is_not_followed_part_by_part(got: Retrieved, tmp_path: Path, column: str) -> None:
    """Some KB of manifest, of which each of thousands of rows would take a minute."""
    looks: list[str] = []
    changes = {column: f"{got.folder}/" + "a/" * 200_000 + "x"}
    real_path = files.disk.real_path

    def looked(_: Any, path: Any) -> Path:
        looks.append(str(path))
        return real_path(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(files.disk), "real_path", looked)
        forged = got.forged(**changes)
        assert verify(forged).counts == ({"=": 11, "!": 1} if column == "uri" else {"=": 12})
        frame = load_manifest(forged)
        assert verify(frame, manifest_root=tmp_path / "v").counts == {"=": 11, "!": 1}, "a row has its own destination"
    assert max(map(len, looks)) < 4096


@pytest.mark.parametrize("way", ["relative", "absolute"])
def test_a_way_over_our_manifests_makes_a_foreign_one_not_ours(
    got: Retrieved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """It may name a file there, and is still not that of the destination."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "m.parquet").write_bytes(got.forged().read_bytes())
    monkeypatch.chdir(got.folder / "_manifests")
    named = f"{got.folder}/_manifests/" if way == "absolute" else ""
    named += "../../foreign/m.parquet"
    found = verify(named, manifest_root=tmp_path / "state")
    assert (found.exit_code, found.counts["!"]) == (3, 12)
    assert verify(named, root=got.folder, manifest_root=tmp_path / "state").same


def test_forth_and_back_within_our_manifests_it_is_ours(
    got: Retrieved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (got.folder / "_manifests" / "cohorts").mkdir()
    monkeypatch.chdir(got.folder / "_manifests" / "cohorts")
    got.forged()
    assert verify("../forged.parquet", manifest_root=tmp_path / "state").same
    # No link is followed on that way either, forth or at its end.
    (got.folder / "_manifests" / "link").symlink_to(tmp_path / "data" / "_manifests")
    shutil.copy(got.folder / "_manifests" / "forged.parquet", tmp_path / "data" / "out.parquet")
    with pytest.raises(ManifestError, match="No such file"):
        verify("../link/../out.parquet", manifest_root=tmp_path / "state")
    (got.folder / "_manifests" / "forged.parquet").rename(tmp_path / "forged.parquet")
    (got.folder / "_manifests" / "forged.parquet").symlink_to(tmp_path / "forged.parquet")
    with pytest.raises(ManifestError, match="link"):
        verify("../forged.parquet", manifest_root=tmp_path / "state")


def test_a_bucket_that_others_may_write_to_does_not_fill_the_memory(
    embedded: Embedded, private: Holding, moto: Moto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by a manifest nor by ledgers, of which the bounds are those of a folder."""
    prefix = tmp_path.name
    pacs = embedded(private.folder)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=f"s3://{BUCKET}/{prefix}", s3_config=moto.config)
    uri = str(scu.get_study({"StudyInstanceUID": private.study}).manifest_uri)
    assert read_table(uri, moto.config).num_rows == 12
    monkeypatch.setattr(ledger, "_LARGEST", 1 << 20)
    monkeypatch.setattr(manifests, "_LARGEST", 1 << 20)
    assert scu.get_study({"StudyInstanceUID": private.study}).skipped == 12
    folder = f"{prefix}/_manifests/.ledger/{private.study}"
    for number in range(2):
        moto.client().put_object(Bucket=BUCKET, Key=f"{folder}/x.{number}.jsonl", Body=b" " * 700_000)
    result = scu.get_study({"StudyInstanceUID": private.study})
    assert result.verdict == "failed"
    assert "are larger than 1 MiB together" in str(result.errors)
    moto.client().put_object(Bucket=BUCKET, Key=f"{prefix}/_manifests/large.parquet", Body=bytes(2 << 20))
    with pytest.raises(ManifestError, match="is larger than 1 MiB"):
        read_table(f"s3://{BUCKET}/{prefix}/_manifests/large.parquet", moto.config)


@pytest.mark.parametrize("how", ["combined", "of a task"])
def test_a_reference_is_to_what_was_written_and_not_to_what_lies_there(
    got: Retrieved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A neighbour puts a file of his own in the place of a manifest as soon as it has its name."""
    forged = tmp_path / "forged.parquet"
    frame = got.frame.copy()
    frame.loc[0, "uri"] = outside(got, tmp_path, "path")["uri"]
    write_manifest(table_of(frame), forged, verdict="complete", evidence="list", run="r")
    real = files.replace_whole

    def replaced(path: Any, *arguments: Any, **options: Any) -> None:
        real(path, *arguments, **options)
        shutil.copy(forged, path)

    monkeypatch.setattr(files, "replace_whole", replaced)
    if how == "combined":
        found = combine_manifests([got.uri], got.folder / "_manifests" / "whole.parquet")
    else:
        again = GetScu(got.node, destination=got.folder).get_study(
            {"StudyInstanceUID": got.frame["study_instance_uid"][0]}
        )
        assert again.manifest_uri is not None
        assert again.written is not None
        found = frames.reference_to(again.manifest_uri, again.written)
    with pytest.raises(ManifestError, match="does not match the reference"):
        load_manifest(found)
