"""Manifests: the schema that others rely on, files that are whole or not there, and every shape read back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_dicom_get.clock import run_name
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.manifest.files import read_table, safe_name, write_manifest
from airflow_dicom_get.manifest.frames import (
    combine_manifests,
    frame_of,
    load_manifest,
    load_manifests,
    read_manifest,
    table_of,
)
from airflow_dicom_get.manifest.schema import manifest_rows, manifest_table, metadata_of
from airflow_dicom_get.records import Instance
from tests.support.references import reference

# Schema 1, written down by hand: others read these files.
SCHEMA = {
    "study_instance_uid": "string", "series_instance_uid": "string", "sop_instance_uid": "string",
    "sop_class_uid": "string", "transfer_syntax_uid": "string", "modality": "string", "series_number": "int64",
    "instance_number": "int64", "state": "string", "reason": "string", "exactness": "string", "dimse_status": "int64",
    "error": "string", "uri": "string", "bytes": "int64", "sha256": "string", "dataset_offset": "int64",
    "dataset_bytes": "int64", "forwarded_to": "string", "forward_status": "string", "forward_error": "string",
    "source": "string", "destination": "string", "availability": "string", "attempt": "int64", "association": "int64",
    "received_at": "timestamp[us, tz=UTC]", "duration_ms": "int64",
}  # fmt: skip


def instance(number: int = 1, state: str = "stored", **more: object) -> Instance:
    made = Instance("1.2", f"1.2.{number % 3}", f"1.2.3.{number}", "1.2.840.10008.5.1.4.1.1.2")
    made.state = state  # type: ignore[assignment]
    made.syntax, made.modality, made.series_number = "1.2.840.10008.1.2.1", "CT", number % 3
    made.instance_number, made.uri, made.bytes = number, f"/d/1.2/1.2.3.{number}.dcm", 1000 + number
    made.sha256, made.received_at, made.attempt = bytes([number % 256]) * 32, 1_700_000_000.25 + number, 1
    for name, value in more.items():
        setattr(made, name, value)
    return made


def table(count: int = 3, **more: object) -> pa.Table:
    return manifest_table(
        [instance(number, **more) for number in range(count)], source="PACS@h:104", destination="/d"  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "m.parquet"
    write_manifest(table(), path, verdict="complete", evidence="list", run="r1", extra={"plan_at": "now"})
    return path


class TestSchema:
    def test_columns_types_and_metadata(self, written: Path) -> None:
        file = pq.ParquetFile(written)
        assert {item.name: str(item.type) for item in file.schema_arrow} == SCHEMA
        assert file.schema_arrow.metadata == {
            b"dicom_get.schema": b"1", b"dicom_get.verdict": b"complete", b"dicom_get.evidence": b"list",
            b"dicom_get.run": b"r1", b"dicom_get.plan_at": b"now",
        }  # fmt: skip
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"

    def test_values(self) -> None:
        made = instance(7, dimse_status=0xB000, reason="not_sent", tags=("20240101", None))
        (row,) = manifest_table([made], source="A@h:1", destination="/d", tags=("StudyDate", "PatientAge")).to_pylist()
        assert row["sha256"] == "07" * 32
        assert row["received_at"] == datetime.fromtimestamp(1_700_000_007.25, UTC)
        assert (row["dimse_status"], row["reason"], row["bytes"]) == (0xB000, "not_sent", 1007)
        assert (row["source"], row["destination"]) == ("A@h:1", "/d")
        assert (row["StudyDate"], row["PatientAge"]) == ("20240101", None)
        assert row["error"] is None

    def test_rows_that_know_nothing(self) -> None:
        (row,) = manifest_table([Instance("1", "2", "3")], source="s", destination="d", tags=("StudyDate",)).to_pylist()
        assert {key for key, value in row.items() if value is not None} == {
            "study_instance_uid", "series_instance_uid", "sop_instance_uid", "source", "destination",
        }  # fmt: skip

    def test_no_rows(self, tmp_path: Path) -> None:
        write_manifest(table(0), tmp_path / "m.parquet", verdict="empty", evidence="list", run="r")
        frame = read_manifest(tmp_path / "m.parquet")
        assert len(frame) == 0
        assert list(frame.columns) == list(SCHEMA)

    def test_frame_types(self, written: Path) -> None:
        frame = read_manifest(written)
        for name, kind in SCHEMA.items():
            expected = {"string": "string", "int64": "Int64"}.get(kind, "datetime64[us, UTC]")
            assert str(frame[name].dtype) == expected, name
        assert frame["dimse_status"].isna().all()
        assert frame.attrs["verdict"] == "complete"


class TestFiles:
    def test_uri_forms(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spaced = written.with_name("a b%.parquet")
        spaced.write_bytes(written.read_bytes())
        expected = read_manifest(written)
        for uri in (str(written), written, f"file://{written}", reference(spaced)["manifest_uri"]):
            pd.testing.assert_frame_equal(read_manifest(uri), expected)
        monkeypatch.chdir(written.parent)
        pd.testing.assert_frame_equal(read_manifest("m.parquet"), expected)

    def test_rows_and_table_make_the_same_file(self, tmp_path: Path) -> None:
        rows = [instance(number) for number in range(40_000)]
        whole = manifest_table(rows, source="s", destination="d")
        write_manifest(whole, tmp_path / "a", verdict="complete", evidence="list", run="r")
        streamed = manifest_rows(iter(rows), source="s", destination="d")
        write_manifest(streamed, tmp_path / "b", verdict="complete", evidence="list", run="r")
        assert read_table(tmp_path / "a").equals(read_table(tmp_path / "b"))
        assert pq.ParquetFile(tmp_path / "b").metadata.num_row_groups > 1

    def test_an_older_file_is_replaced_whole_or_not_at_all(self, written: Path) -> None:
        before = written.read_bytes()

        def broken() -> Iterator[Instance]:
            yield from (instance(number) for number in range(20_000))
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            write_manifest(
                manifest_rows(broken(), source="s", destination="d"), written, verdict="x", evidence="list", run="r2"
            )
        assert written.read_bytes() == before
        assert [path.name for path in written.parent.iterdir()] == ["m.parquet"]

    def test_never_half_written_under_its_name(self, tmp_path: Path) -> None:
        path, seen, done = tmp_path / "m.parquet", 0, threading.Event()

        def write() -> None:
            for number in range(1, 30):
                write_manifest(table(number), path, verdict="partial", evidence="list", run=str(number))
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set():
            if path.exists():
                found = read_table(path)
                # The number of rows and the metadata are of the same write.
                assert found.num_rows == int(metadata_of(found)["run"])
                seen += 1
        writer.join()
        assert seen

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match=r"nothing\.parquet' cannot be read: No such file or directory"):
            read_manifest(tmp_path / "nothing.parquet")
        with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
            read_manifest(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 5000, b"\x00" * 100])
    def test_what_is_no_parquet_is_named_and_left(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "m.parquet"
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=r"m\.parquet' is damaged"):
            read_manifest(path)
        with pytest.raises(ManifestError, match=r"m\.parquet' is damaged"):
            reference(path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("cut", [1, 8, 100, 0.5])
    def test_torn_files_are_broken(self, written: Path, cut: float) -> None:
        content = written.read_bytes()
        written.write_bytes(content[: -int(cut)] if cut >= 1 else content[: int(len(content) * cut)])
        with pytest.raises(ManifestError, match="is damaged"):
            read_manifest(written)

    @settings(max_examples=60)
    @given(st.integers(0, 20_000), st.integers(0, 7))
    def test_damage_is_noticed_by_the_reference(self, place: int, bit: int) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder, "m.parquet")
            write_manifest(table(), path, verdict="complete", evidence="list", run="r")
            ref, content = reference(path), bytearray(path.read_bytes())
            content[place % len(content)] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(ManifestError, match="does not match the reference"):
                load_manifest(ref)
            # Without the digest Parquet notices some of it; what it does not like is one of our errors.
            with contextlib.suppress(ManifestError):
                read_manifest(path)

    @pytest.mark.parametrize("version", [b"2", b"0", b"1.0", b"\xff"])
    def test_other_schemas_are_refused(self, tmp_path: Path, version: bytes) -> None:
        path = tmp_path / "m.parquet"
        pq.write_table(table().replace_schema_metadata({b"dicom_get.schema": version}), path)
        with pytest.raises(ManifestError, match="this version reads schema 1"):
            read_manifest(path)

    def test_other_parquet_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "m.parquet"
        pq.write_table(pa.table({"a": [1]}), path)
        with pytest.raises(ManifestError, match="is not a manifest: the column study_instance_uid is missing"):
            read_manifest(path)
        pq.write_table(table(), path)
        with pytest.raises(ManifestError, match="is not a manifest: the schema version is missing"):
            read_manifest(path)

    @pytest.mark.parametrize("uri", [None, "", "s3://bucket/m.parquet", "http://h/m", "dicom://h:1", 5])
    def test_uris_that_are_none(self, uri: object) -> None:
        with pytest.raises(ManifestError) as caught:
            read_manifest(uri)
        assert caught.value.hint


class TestShapes:
    def test_reference(self, written: Path) -> None:
        ref = reference(written)
        assert ref.pop("sha256") == subprocess.check_output(["sha256sum", written], text=True).split()[0]
        assert ref == {
            "kind": "dicom-manifest", "schema": 1, "manifest_uri": f"file://{written}", "rows": 3,
            "bytes": written.stat().st_size, "verdict": "complete",
        }  # fmt: skip

    def test_every_shape_gives_the_same_frame(self, written: Path) -> None:
        expected = read_manifest(written)
        for shape in (expected, reference(written), str(written), written):
            pd.testing.assert_frame_equal(load_manifest(shape), expected)
            assert load_manifest(shape).attrs == expected.attrs

    def test_frames_that_travelled(self, written: Path) -> None:
        expected = read_manifest(written)
        as_objects = expected.astype(object)
        as_csv = pd.read_csv(pd.io.common.StringIO(expected.to_csv(index=False)), dtype={"series_number": float})
        stored = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pandas(expected), stored)
        as_parquet = pq.read_table(pa.BufferReader(stored.getvalue())).to_pandas()
        for frame in (as_objects, as_parquet):
            pd.testing.assert_frame_equal(load_manifest(frame), expected)
        # UIDs that look like numbers are read as such by read_csv: only the types can be checked.
        assert list(load_manifest(as_csv.astype({"study_instance_uid": str})).dtypes) == list(expected.dtypes)

    def test_frames_of_another_shape_are_refused(self, written: Path) -> None:
        frame = read_manifest(written)
        with pytest.raises(ManifestError, match="has no column state"):
            load_manifest(frame.drop(columns="state"))
        with pytest.raises(ManifestError, match=r"column bytes .* type int64"):
            load_manifest(frame.astype({"bytes": object}).assign(bytes="many"))
        with pytest.raises(ManifestError, match="column received_at"):
            load_manifest(frame.assign(received_at="last week"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "x"}, "not a reference"), ({"schema": 2}, "has schema 2"), ({"rows": 4}, "has 3 rows, not 4"),
            ({"sha256": "0" * 64}, "does not match the reference"), ({"manifest_uri": "/nowhere"}, "cannot be read"),
            ({"sha256": None}, "does not match the reference"), ({"manifest_uri": None}, "There is no manifest"),
        ],
    )  # fmt: skip
    def test_references_are_verified(self, written: Path, change: dict[str, object], message: str) -> None:
        with pytest.raises(ManifestError, match=message):
            load_manifest({**reference(written), **change})

    def test_an_error_tells_no_digest(self, tmp_path: Path) -> None:
        """Who may hand on a reference would learn it of any file that the worker may read."""
        secret = tmp_path / "secret"
        secret.write_text("of the worker alone")
        said = {"kind": "dicom-manifest", "schema": 1, "manifest_uri": str(secret), "rows": 1, "sha256": "0" * 64}
        with pytest.raises(ManifestError) as caught:
            load_manifest(said)
        assert sha256(secret.read_bytes()).hexdigest()[:8] not in f"{caught.value} {caught.value.facts}"

    @pytest.mark.parametrize("value", [5, None, b"x", [1]])
    def test_other_things_are_no_manifest(self, value: object) -> None:
        with pytest.raises(ManifestError):
            load_manifest(value)

    def test_several(self, written: Path) -> None:
        one, ref = read_manifest(written), reference(written)
        tagged = frame_of(manifest_table([instance(9, tags=("x",))], source="s", destination="d", tags=("StudyDate",)))
        frame = load_manifests([one, ref, None, tagged, str(written)])
        assert len(frame) == 10
        assert frame["StudyDate"].notna().sum() == 1
        for shape in (one, ref, str(written), [ref], iter([ref])):
            assert len(load_manifests(shape)) == 3
        assert len(load_manifests([])) == 0
        assert list(load_manifests([]).columns) == list(SCHEMA)

    def test_combine(self, written: Path, tmp_path: Path) -> None:
        other = tmp_path / "o.parquet"
        write_manifest(table(2), other, verdict="partial", evidence="list+counts", run="r2")
        ref = combine_manifests([str(written), read_manifest(other)], tmp_path / "new" / "all.parquet")
        assert (ref["verdict"], ref["rows"]) == ("partial", 5)
        frame = load_manifest(ref)
        assert len(frame) == 5
        assert (frame.attrs["evidence"], frame.attrs["schema"]) == ("list", "1")

    def test_combine_into_a_folder(self, written: Path, tmp_path: Path) -> None:
        first = combine_manifests([written], tmp_path / "night")
        second = combine_manifests([written], tmp_path / "night")
        assert first["manifest_uri"] != second["manifest_uri"]
        assert first["verdict"] == "complete"
        assert load_manifest(first).equals(load_manifest(second))

    def test_combine_proves_nothing_that_was_not_proven(self, written: Path, tmp_path: Path) -> None:
        frame = read_manifest(written)
        frame.attrs.clear()
        assert combine_manifests([str(written), frame], tmp_path / "a.parquet")["verdict"] == "unverified"
        assert combine_manifests([], tmp_path / "b.parquet")["verdict"] == "empty"
        ref = combine_manifests(iter([str(written), None]), tmp_path / "c.parquet")
        assert (ref["verdict"], ref["rows"]) == ("unverified", 3)
        ref = combine_manifests([written], tmp_path / "d.parquet", expected=2)
        assert (ref["verdict"], ref["rows"]) == ("unverified", 3)
        assert combine_manifests([written], tmp_path / "e.parquet", expected=1)["verdict"] == "complete"

    def test_combine_writes_nothing_if_one_is_broken(self, written: Path, tmp_path: Path) -> None:
        with pytest.raises(ManifestError):
            combine_manifests([written, "/nowhere.parquet"], tmp_path / "sub" / "a.parquet")
        assert not (tmp_path / "sub").exists()

    texts = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    numbers = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))

    @settings(max_examples=50)
    @given(st.lists(st.tuples(texts, numbers, st.one_of(st.none(), st.floats(0, 4e9))), max_size=20))
    def test_any_values_come_back(self, rows: list[tuple[str | None, int | None, float | None]]) -> None:
        made = manifest_table(
            [
                instance(number, error=text, bytes=count, received_at=at, tags=(text,))
                for number, (text, count, at) in enumerate(rows)
            ],
            source="s",
            destination="d",
            tags=("StudyDescription",),
        )
        again = table_of(frame_of(made))
        assert again.equals(made)


class TestNames:
    def test_run_names(self) -> None:
        assert run_name(datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)).startswith("20240102T030405Z-")
        assert len({run_name() for _ in range(100)}) == 100

    @pytest.mark.parametrize(
        ("text", "name"),
        [("a b/c", "a_b_c"), ("..", "__"), (".x", "_x"), ("", "_"), ("ok-1.2_X", "ok-1.2_X"), ("é", "_")],
    )
    def test_safe_names(self, text: str, name: str) -> None:
        assert safe_name(text) == name


def test_writing_needs_no_pandas(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from airflow_dicom_get.manifest.files import *\n"
        "from airflow_dicom_get.manifest.frames import *\n"
        "from airflow_dicom_get.manifest.schema import *\n"
        "from airflow_dicom_get.records import Instance\n"
        "assert 'pyarrow' not in sys.modules\n"
        "t = manifest_rows([Instance('1', '2', '3')], source='s', destination='d')\n"
        f"w = write_manifest(t, {str(tmp_path / 'm.parquet')!r}, verdict='complete', evidence='list', run='r')\n"
        f"reference_to({str(tmp_path / 'm.parquet')!r}, w)\n"
        f"open_manifest(open({str(tmp_path / 'm.parquet')!r}, 'rb').read(), 'm').close()\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "error"})


@pytest.mark.slow
def test_memory_of_a_large_manifest(tmp_path: Path) -> None:
    # Half a million rows: what is on top of the records must stay far below 1 KB a row.
    code = (
        "import resource, pyarrow.parquet\n"
        "from airflow_dicom_get.manifest.files import *\n"
        "from airflow_dicom_get.manifest.frames import *\n"
        "from airflow_dicom_get.manifest.schema import *\n"
        "from airflow_dicom_get.records import Instance\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "def rows():\n"
        "    for n in range(500_000):\n"
        "        r = Instance('1.2.3', f'1.2.3.{n // 500}', f'1.2.3.4.{n}', '1.2.840.10008.5.1.4.1.1.2')\n"
        "        r.state, r.bytes, r.sha256, r.received_at = 'stored', n, n.to_bytes(32), 1.7e9 + n\n"
        "        r.uri = f'/data/studies/1.2.3/1.2.3.{n // 500}/1.2.3.4.{n}.dcm'\n"
        "        yield r\n"
        "before = peak()\n"
        f"write_manifest(manifest_rows(rows(), source='s', destination='d'), {str(tmp_path / 'm')!r},\n"
        "               verdict='complete', evidence='list', run='r')\n"
        "print(peak() - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 200_000, f"{grown} KiB"
    assert reference(tmp_path / "m")["rows"] == 500_000
