"""A destination that others may write to: FIFOs, devices, links and endless files in it lead nowhere."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import shutil
import socket
import stat
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import InvalidOption, LedgerError, ManifestError, SinkError
from airflow_dicom_get.exports.verb import export
from airflow_dicom_get.manifest import files as manifests
from airflow_dicom_get.manifest.files import read_table, tables_below, write_manifest
from airflow_dicom_get.manifest.frames import combine_manifests, frame_of, load_manifests, table_in_xcom
from airflow_dicom_get.manifest.schema import arrow_schema, instances_of, manifest_table
from airflow_dicom_get.net.association import CancelToken
from airflow_dicom_get.net.transcript import FileTranscript
from airflow_dicom_get.notebook import read_manifests, stored
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks import ledger, locks
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.sinks.ledger import OWN, FolderLedgers, dropped_line, header_line, taken_line
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.verify import verify
from tests.support.holdings import Holding
from tests.support.references import reference

DEAD = "20260101T000000Z-dead0001"


class Study:
    """A study at a PACS, a folder to retrieve it to, and another folder that is none of our business."""

    def __init__(self, pacs: EmbeddedPacs, holding: Holding, root: Path) -> None:
        self.node, self.uid = f"PACS@127.0.0.1:{pacs.port}", holding.study
        self.folder, self.outside = root / "shared", root / "outside"
        for one in (self.folder, self.outside):
            one.mkdir()
        self.series = str(dcmread(holding.files[0], stop_before_pixels=True).SeriesInstanceUID)
        self.total = len(holding.entries)

    def get(self, **options: Any) -> Result:
        scu = GetScu(self.node, destination=self.folder, retries=0, **options)
        return scu.get_study({"StudyInstanceUID": self.uid})

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / self.uid).rglob("*.dcm"))

    def ledger(self) -> Path:
        """A name for the ledger of another run."""
        folder = self.folder / "_manifests" / ".ledger" / self.uid
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{DEAD}.jsonl"


@pytest.fixture
def study(embedded: Callable[..., EmbeddedPacs], private: Holding, tmp_path: Path) -> Study:
    return Study(embedded(private.folder), private, tmp_path)


@pytest.mark.parametrize("options", [{}, {"verify_held": "digest"}])
def test_a_cancel_is_heard_while_a_file_under_a_final_name_is_read(
    study: Study, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Sparse ones of 16 GiB: each is read to its end before it is known to be no instance of ours."""
    assert study.get().verdict == "complete"
    for file in study.files:
        os.truncate(file, files.LARGEST - 1)
    scu = GetScu(study.node, destination=study.folder, **options)
    read: list[int] = []

    class Reading(files.Disk):
        def read_into(self, fd: int, view: memoryview, position: int) -> int:
            self._look_at(position)
            return super().read_into(fd, view, position)

        def read_at(self, fd: int, size: int, position: int) -> bytes:
            self._look_at(position)
            return super().read_at(fd, size, position)

        def _look_at(self, position: int) -> None:
            if position >= 64 * files.CHUNK:
                read.append(position)
                if len(read) == 1:
                    scu.cancel("enough")

    monkeypatch.setattr(files, "disk", Reading())
    result = scu.get_study({"StudyInstanceUID": study.uid})
    assert 0 < len(read) < 8
    assert (result.verdict, result.reason, result.completed) == ("cancelled", "enough", 0)
    assert set(result.manifest["reason"]) == {"cancelled"}


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_a_ledger(path: Path) -> None:
    other = path.parents[4] / "outside" / "ledger"
    other.write_text(header_line())
    path.symlink_to(other)


def a_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def an_endless_line(path: Path) -> None:
    path.write_bytes(header_line().encode() + b'{"state": "' + b"x" * (100 << 10))


def an_endless_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


LEDGERS = (a_fifo, a_link_to_zeros, a_link_to_a_ledger, a_socket, an_endless_line, an_endless_file)


@pytest.mark.parametrize("make", LEDGERS)
def test_a_ledger_that_is_none_ends_the_run(study: Study, make: Callable[[Path], None]) -> None:
    """Nobody waits for a FIFO, and nothing endless is read."""
    make(study.ledger())
    result = study.get()
    assert (result.verdict, result.completed) == ("failed", 0)
    assert study.ledger().name in result.errors[0]["error"]
    assert "Move it away" in result.errors[0]["hint"]
    study.ledger().unlink()
    assert study.get().verdict == "complete"


PLACES: dict[str, Callable[[Study], Path]] = {
    "study": lambda study: study.folder / study.uid,
    "series": lambda study: study.folder / study.uid / study.series,
    "ledgers": lambda study: study.folder / "_manifests" / ".ledger",
    "ledgers of the study": lambda study: study.folder / "_manifests" / ".ledger" / study.uid,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("durable", [True, False])
def test_a_link_leads_nothing_out_of_the_destination(study: Study, place: str, durable: bool) -> None:
    link = PLACES[place](study)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(study.outside)
    result = study.get(durable=durable)
    assert result.verdict in ("failed", "partial")
    assert "it is a link" in str(result.errors)
    assert not list(study.outside.iterdir())
    link.unlink()
    assert study.get(durable=durable).verdict == "complete"


def test_manifests_do_not_go_where_a_link_leads(study: Study) -> None:
    (study.folder / "_manifests").symlink_to(study.outside)
    with pytest.raises(InvalidOption, match="is a file, or a link, which is not followed"):
        study.get()
    assert study.get(manifest_root=study.outside).verdict == "complete"  # named by its operator


@pytest.mark.parametrize("place", ["study", "series"])
def test_what_is_held_is_not_looked_for_behind_a_link(study: Study, place: str) -> None:
    """A neighbour moves a folder away, and leaves a link to it: from then on he decides what is there."""
    assert study.get().verdict == "complete"
    folder = PLACES[place](study)
    shutil.move(folder, study.outside)
    folder.symlink_to(study.outside / folder.name)
    assert study.get().verdict != "complete"
    found = verify(study=study.uid, destination=study.folder)
    assert found.exit_code == 3
    assert found.counts["="] < study.total


def test_a_destination_that_is_a_link_is_what_its_operator_wants(study: Study, tmp_path: Path) -> None:
    study.folder.rmdir()
    study.folder.symlink_to(study.outside)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    result = study.get(manifest_root=tmp_path / "root")
    assert (result.verdict, len(list(study.outside.rglob("*.dcm")))) == ("complete", study.total)
    assert list((tmp_path / "elsewhere").glob("*.parquet"))
    assert study.get(manifest_root=tmp_path / "root").skipped == study.total


def test_nothing_outside_is_removed_as_left_by_a_dead_run(study: Study) -> None:
    part = study.outside / f".1.2.3.{DEAD}.part"
    part.write_bytes(b"of another destination")
    folder = study.folder / study.uid
    folder.mkdir()
    (folder / "1.2").symlink_to(study.outside)
    (folder / f".{DEAD}.lock").symlink_to(study.outside / "lock")
    assert study.get().verdict == "complete"
    assert part.exists()
    assert not (study.outside / "lock").exists()


FINAL = (a_fifo, a_link_to_zeros, a_socket, an_endless_file)


@pytest.mark.parametrize("make", FINAL)
def test_what_stands_under_a_final_name_holds_nobody_up(study: Study, make: Callable[[Path], None]) -> None:
    assert study.get().verdict == "complete"
    name = study.files[0]
    name.unlink()
    make(name)
    result = study.get(adopt=True, verify_held="digest")
    assert (result.verdict, result.completed) == ("partial", study.total - 1)
    found = verify(study=study.uid, destination=study.folder)
    assert (found.exit_code, found.counts["="]) == (3, study.total - 1)
    name.unlink()
    assert study.get().verdict == "complete"


@pytest.mark.parametrize("recorded", [False, True])
def test_an_endless_instance_is_not_read(study: Study, recorded: bool) -> None:
    """Neither because it begins as an instance does, nor because a ledger says that it is as large as that."""
    assert study.get().verdict == "complete"
    name, size = study.files[0], 1 << 40
    with name.open("r+b") as file:
        file.truncate(size)
    if recorded:
        record = Stored(study.series, name.stem, "1.2", "1.2.840.10008.1.2", None, size, 0)
        study.ledger().write_text(header_line() + taken_line(record, OWN))
    began = time.process_time()
    result = study.get()
    assert (result.verdict, result.completed) == ("partial", study.total - 1)
    assert "larger than 16 GiB" in str(result.errors)
    left: list[str] = []
    with pytest.raises(OSError, match="larger than 16 GiB"):
        left += map(str, files.read_chunks(name))
    assert not left
    assert time.process_time() - began < 30


def test_who_reads_what_is_held_ends_with_the_run(study: Study) -> None:
    assert study.get().verdict == "complete"
    cancel, ledgers = CancelToken(), FolderLedgers(Below(study.folder) / "_manifests", OWN)
    options = GetScu(study.node, destination=study.folder, verify_held="digest").options
    sink = FilesystemSink(study.folder, ledgers, "20260102T000000Z-00000001", options, cancel=cancel)
    assert len(sink.inventory(study.uid)) == study.total
    cancel.cancel("SIGTERM")
    with pytest.raises(SinkError, match="ended before"):
        sink.inventory(study.uid)


def test_a_link_under_a_final_name_does_not_count(study: Study) -> None:
    """Equal bytes behind a link are somebody else's, who may change them at any time."""
    assert study.get().verdict == "complete"
    name = study.files[0]
    shutil.move(name, study.outside / "one")
    name.symlink_to(study.outside / "one")
    before = (study.outside / "one").read_bytes()
    for options in ({}, {"adopt": True}, {"resume": False, "on_conflict": "replace"}):
        result = study.get(**options)
        assert (result.verdict, result.completed) == ("partial", study.total - 1)
        assert "link" in str(result.errors)
    assert (study.outside / "one").read_bytes() == before


def test_nobody_else_may_take_the_lock_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / f".{DEAD}.lock"
    lock = locks.hold(Below(tmp_path) / path.name, files.disk)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files.disk.close(lock)
    # The name of a run is known once it holds one lock: a neighbour may be first in the folder of the next study.
    with pytest.raises(FileExistsError):
        locks.hold(Below(tmp_path) / path.name, files.disk)


def test_a_manifest_is_read_from_a_regular_file(tmp_path: Path) -> None:
    a_fifo(tmp_path / "fifo.parquet")
    a_link_to_zeros(tmp_path / "zeros.parquet")
    an_endless_file(tmp_path / "endless.parquet")
    for name in ("fifo", "zeros", "endless"):
        with pytest.raises(ManifestError, match=r"no regular file|larger than"):
            read_table(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("column", ["modality", "PatientComments", "odd.name"])
def test_a_manifest_of_some_kilobytes_does_not_become_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """A text of a million characters that stands there once, and is that of all rows."""
    path = tmp_path / "m.parquet"
    table = manifest_table(
        (Instance("1.2", "1.2.3", f"1.2.3.{number}") for number in range(70)), source="", destination=""
    )
    text = pa.array(["M" * 1_000_000] * table.num_rows, pa.string())
    at = table.column_names.index(column) if column in table.column_names else None
    table = table.append_column(column, text) if at is None else table.set_column(at, column, text)
    write_manifest(table, path, verdict="complete", evidence="list", run="r")
    assert path.stat().st_size < 100_000
    assert read_table(path).num_rows == 70
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    monkeypatch.setattr(pq.ParquetFile, "read", None)  # it is not begun
    with pytest.raises(ManifestError, match="of memory"):
        read_table(path)


READERS: dict[str, Callable[[Path, list[Path]], Any]] = {
    "read_manifests": lambda folder, _: read_manifests(folder),
    "load_manifests": lambda _, several: load_manifests(several),
    "references": lambda _, several: load_manifests([reference(one) for one in several]),
    "combine_manifests": lambda folder, several: combine_manifests(several, folder / "all"),
    "export": lambda _, several: export(several, "series", accept=("partial",)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_manifests_that_are_read_together_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, list[Path]], Any]
) -> None:
    row = Instance("1.2", "1.2.3", "1.2.3.4")
    row.state, row.reason, row.error = "missing", "not_sent", "x" * 1000
    table = manifest_table([row] * 10_000, source="", destination="")
    several = [tmp_path / f"{number}.parquet" for number in range(5)]
    for path in several:
        write_manifest(table, path, verdict="partial", evidence="list", run="r")
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    assert read_table(several[0]).num_rows == 10_000
    with pytest.raises(ManifestError, match=r"[1-4]\.parquet' takes more than 0 GiB of memory with"):
        read(tmp_path, several)
    for path in several[2:]:
        path.unlink()
    read(tmp_path, several[:2])


def test_the_name_of_a_run_counts_for_each_row_that_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")] * 10_000, source="", destination="")
    write_manifest(rows, tmp_path / "m.parquet", verdict="partial", evidence="list", run="r" * 10_000)
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    assert read_table(tmp_path / "m.parquet").num_rows == 10_000
    with pytest.raises(ManifestError, match="of memory"):
        read_manifests(tmp_path)


def of_nulls(rows: int) -> pa.Table:
    return pa.table([pa.nulls(rows, kind) for kind in arrow_schema().types], schema=arrow_schema())


def test_rows_that_take_no_byte_of_a_manifest_are_counted_as_what_they_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.parquet"
    write_manifest(of_nulls(100_000), path, verdict="complete", evidence="list", run="r")
    assert path.stat().st_size < 200_000
    assert read_table(path).num_rows == 100_000
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    with pytest.raises(ManifestError, match="of memory"):
        read_table(path)


def test_the_rows_of_a_manifest_become_records_a_batch_at_a_time() -> None:
    table = of_nulls(100_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in instances_of(table)) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_many_columns_of_a_long_text_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, of which a column alone is no bomb: what is counted is not all decoded before it is too much."""
    path = tmp_path / "m.parquet"
    table = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")], source="", destination="")
    text = pa.array(["M" * 8_000_000], pa.string())
    for number in range(30):
        table = table.append_column(f"tag{number}", text)
    write_manifest(table, path, verdict="complete", evidence="list", run="r")
    assert path.stat().st_size < 100_000
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ManifestError, match="of memory"):
            read_table(path)
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 64 << 20


def test_a_manifest_in_xcom_does_not_become_gigabytes_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a DAG may put anything into its XComs; a frame that is no manifest is not read at all."""

    def in_xcom(table: pa.Table) -> dict[str, str]:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pandas(frame_of(table)), buffer)  # as Airflow does it
        return {"__classname__": "pandas.core.frame.DataFrame", "__data__": buffer.getvalue().hex()}

    rows = [Instance("1.2", "1.2.3", f"1.2.3.{number}") for number in range(70)]
    table = manifest_table(rows, source="", destination="")
    text = pa.array(["M" * 1_000_000] * table.num_rows, pa.string())
    monkeypatch.setattr(manifests, "_MOST_DECODED", 64 << 20)
    found = table_in_xcom(in_xcom(table))
    assert found is not None
    assert found.num_rows == 70
    assert table_in_xcom(in_xcom(pa.table({"text": text, "list": [[1]] * 70}))) is None
    monkeypatch.setattr(pq.ParquetFile, "read", None)  # it is not begun
    with pytest.raises(ManifestError, match="of memory"):
        table_in_xcom(in_xcom(table.append_column("tag", text)))


@pytest.mark.parametrize(
    ("ends", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_what_was_moved_out_of_xcom_does_not_become_gigabytes_in_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, pack: Callable[[bytes], bytes]
) -> None:
    """Whoever has a DAG may have a task of it return an address, of a file of some MB that inflates to many GB."""
    monkeypatch.setattr(stored, "_MOST", 2 << 20)
    path = tmp_path / "dag" / "run" / "get" / f"x.json{ends}"
    path.parent.mkdir(parents=True)

    def value(content: bytes) -> Any:
        path.write_bytes(content)
        return stored.stored_value(f"file://{path}", "dag", "get", None)

    assert value(pack(b'{"a": ') + pack(b" " * (1 << 20) + b"1}")) == {"a": 1}
    with pytest.raises(ManifestError, match="takes more than 2 MiB when it is unpacked"):
        value(pack(b" " * (3 << 20) + b"1"))
    for broken in (pack(b"[" * 100_000), pack(b"1" * 1000)[:-9] + b"\0" * 9, b"\x1f\x8b"):
        with pytest.raises(ManifestError, match="is no JSON"):
            value(broken)


def test_a_column_that_no_manifest_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    table = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")], source="", destination="")
    for column in ([["a"]], [{"a": "b"}], [b"a"]):
        wide = table.append_column("tag", pa.array(column))
        write_manifest(wide, path, verdict="complete", evidence="list", run="r")
        with pytest.raises(ManifestError, match=r"column .tag. does not hold texts"):
            read_table(path)


def test_manifests_behind_links_are_left_out(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    manifest = Path(str(study.get().manifest_uri).removeprefix("file://"))
    shutil.copy(manifest, study.outside / "other.parquet")
    (manifest.parent / "a-link.parquet").symlink_to(study.outside / "other.parquet")
    (manifest.parent / "a-folder").symlink_to(study.outside)
    a_fifo(manifest.parent / "fifo.parquet")
    assert len(list(tables_below(study.folder))) == 1
    for name in ("a-folder", "a-link.parquet"):
        assert f"{name}' is left out: it is a link" in caplog.text


def test_a_manifest_of_several_goes_nowhere_behind_a_link(study: Study) -> None:
    """Nor is one read from there, or the manifest of a comparison written."""
    uri = study.get().manifest_uri
    manifests = study.folder / "_manifests"
    (manifests / "cohorts").symlink_to(study.outside)
    before = study.outside / ".m.parquet.0.part"
    before.write_bytes(b"of somebody else")
    os.utime(before, (0, 0))
    with pytest.raises(ManifestError, match="it is a link"):
        combine_manifests([uri], manifests / "cohorts")
    assert [one.name for one in study.outside.iterdir()] == [before.name]
    shutil.copy(str(uri).removeprefix("file://"), study.outside / "m.parquet")
    with pytest.raises(ManifestError, match="it is a link"):
        read_table(manifests / "cohorts" / "m.parquet")
    assert combine_manifests([uri], manifests / "all")["rows"] == study.total
    assert combine_manifests([uri], study.outside)["rows"] == study.total


def a_tower(path: Path) -> None:
    """Folders in folders, more than Python's calls go deep."""
    at = os.open(path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)


def test_a_tower_of_folders_costs_nothing_but_what_lies_in_it(
    study: Study, target: StoreScu, caplog: pytest.LogCaptureFixture
) -> None:
    assert study.get().verdict == "complete"
    left: list[str] = []
    try:
        for above in (study.folder / study.uid, study.folder / "_manifests"):
            a_tower(above)
        assert len(list(tables_below(study.folder))) == 1
        assert "left out: it lies more than 64 folders deep" in caplog.text
        assert verify(study=study.uid, destination=study.folder).exit_code == 0
        result = target.store(study.folder, on_unusable=lambda name, why: left.append(why))
    finally:
        subprocess.run(["rm", "-rf", study.folder], check=True)  # neither does shutil go as deep
    assert (result.verdict, result.completed) == ("partial", study.total)
    assert left == ["cannot be read: it lies more than 64 folders deep"]


@pytest.fixture
def target(embedded: Callable[..., EmbeddedPacs], tmp_path: Path) -> StoreScu:
    (tmp_path / "target").mkdir()
    pacs = embedded(tmp_path / "target", ae_title="DEST")
    return StoreScu(f"DEST@127.0.0.1:{pacs.port}", manifest_root=tmp_path / "state")


def test_store_sends_nothing_that_a_link_leads_to_out_of_its_source(
    private: Holding, target: StoreScu, tmp_path: Path
) -> None:
    one, other = sorted(private.files)[:2]
    drop, secret = tmp_path / "drop", tmp_path / "secret"
    for folder in (drop, secret):
        folder.mkdir()
    shutil.copy(one, drop / "one.dcm")
    (drop / "again.dcm").symlink_to("one.dcm")
    shutil.copy(other, secret / "other.dcm")
    (drop / "other.dcm").symlink_to(secret / "other.dcm")
    (drop / "all").symlink_to(secret)
    a_fifo(drop / "fifo.dcm")
    left: list[str] = []
    result = target.store(drop, on_unusable=lambda name, why: left.append(f"{Path(name).name} {why}"))
    assert (result.verdict, result.reason, result.completed) == ("partial", "unusable_files", 1)
    assert sorted(left) == [
        f"{name} cannot be read: it is a link, which is not followed" for name in ("all", "other.dcm")
    ]
    assert target.store(drop, root=secret).completed == 2
    assert target.store(drop / "other.dcm").verdict == "complete"  # named itself


def test_a_chain_of_thousands_of_links_leads_nowhere(private: Holding, target: StoreScu, tmp_path: Path) -> None:
    drop = tmp_path / "drop"
    drop.mkdir()
    shutil.copy(private.files[0], drop / "one.dcm")
    for number in range(3000):
        (drop / f"l{number}").symlink_to(f"l{number + 1}")
    result = target.store(drop)
    assert (result.verdict, result.reason, result.completed) == ("partial", "unusable_files", 1)
    row = Instance("1.2", "1.2.3", "1.2.3.4")
    row.state, row.sop_class, row.syntax = "stored", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
    row.uri, row.sha256 = f"file://{drop}/l0/x.dcm", bytes(32)
    table = manifest_table([row], source="dicom://PACS@127.0.0.1:104", destination=f"file://{drop}/l0")
    path = drop / "_manifests" / "m.parquet"
    write_manifest(table, path, verdict="complete", evidence="list", run="r")
    # From 3.13 on Python follows such a chain to its end, which lies in our folder; the kernel does not.
    assert read_manifests(drop)["destination"].tolist() in ([""], [f"file://{drop}"])
    assert target.store(manifest=path).completed == 0
    assert target.store(manifest=table).completed == 0


def test_a_ledger_is_bounded(tmp_path: Path) -> None:
    folder = tmp_path / ".ledger" / "1.2"
    folder.mkdir(parents=True)
    an_endless_file(folder / f"{DEAD}.jsonl")
    began = time.process_time()
    with pytest.raises(LedgerError, match="larger than 512 MiB"):
        FolderLedgers(Below(tmp_path), OWN).read("1.2")
    assert time.process_time() - began < 30


def test_all_ledgers_of_a_study_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".ledger" / "1.2"
    folder.mkdir(parents=True)
    monkeypatch.setattr(ledger, "_LARGEST", 3 << 20)
    ledgers = FolderLedgers(Below(tmp_path), OWN)
    for number in range(3):
        record = Stored("1.3", f"1.4.{number}", "1.2", "1.2.840.10008.1.2", None, 1, 0, modality="x" * 1000)
        lines = header_line() + taken_line(record, OWN) * 1000
        (folder / f"{DEAD[:-1]}{number}.jsonl").write_text(lines)
        if number < 2:
            assert len(ledgers.read("1.2")) == number + 1
    with pytest.raises(LedgerError, match="larger than 3 MiB together"):
        ledgers.read("1.2")


def test_runs_that_a_ledger_invents_take_no_memory(tmp_path: Path) -> None:
    """Each of a few characters is a text and a place in a set of a hundred bytes: gigabytes out of some megabytes."""
    folder = tmp_path / ".ledger" / "1.2"
    folder.mkdir(parents=True)
    kept, other = f"{DEAD[:-1]}2", f"{DEAD[:-1]}3"
    record = Stored("1.3", "1.4", "1.2", "1.2.840.10008.1.2", None, 1, 0)
    (folder / f"{other}.jsonl").write_text(header_line() + taken_line(record, OWN))
    lines = (dropped_line(("1.3", f"1.5.{n}"), OWN, [f"{n}.{m}" for m in range(4000)]) for n in range(30))
    ended = dropped_line(record.key, OWN, [other, "of nobody"])
    (folder / f"{kept}.jsonl").write_text(header_line() + "".join(lines) + ended)
    content = (folder / f"{kept}.jsonl").read_bytes()
    found = ledger.parse_ledger([(kept, content)], "1.2", OWN, frozenset([kept, other]))
    assert len(found.dropped) == 31
    assert {name for names in found.dropped.values() for name in names} == {other}
    assert FolderLedgers(Below(tmp_path), OWN).read("1.2") == {}


def test_runs_that_a_ledger_names_take_no_more_memory_than_their_names(tmp_path: Path) -> None:
    """An empty ledger costs a neighbour nothing, and each line may name them all."""
    folder = tmp_path / ".ledger" / "1.2"
    folder.mkdir(parents=True)
    names = [f"{n:03}" for n in range(1000)]
    for name in names:
        (folder / f"{name}.jsonl").touch()
    lines = [dropped_line(("1.3", f"1.5.{n}"), OWN, names) for n in range(200)]
    (folder / f"{DEAD}.jsonl").write_text(header_line() + "".join(lines))
    ledgers = FolderLedgers(Below(tmp_path), OWN)
    tracemalloc.start()
    try:
        assert ledgers.read("1.2") == {}
        assert tracemalloc.get_traced_memory()[1] < 5 * (folder / f"{DEAD}.jsonl").stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("there", [False, True])
def test_the_state_of_the_shell_is_its_users_alone(
    private: Holding, target: StoreScu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    state = tmp_path / "xdg" / "dicom-get"
    if there:
        state.mkdir(parents=True, mode=0o755)
    assert StoreScu(str(target.options.addr)).store(private.files[0]).verdict == "complete"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert list(state.glob("*.parquet"))


@pytest.mark.parametrize("made_by", ["a link", "another user", "another user, who lets nobody read", "us, unreadable"])
def test_the_state_of_the_shell_is_not_anothers(
    private: Holding, target: StoreScu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str
) -> None:
    """Whoever makes the folder first could close another folder to others, or say what is held at a node."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    state, other = tmp_path / "xdg" / "dicom-get", tmp_path / "other"
    state.parent.mkdir()
    other.mkdir(mode=0o755)
    if made_by == "a link":
        state.symlink_to(other)
    else:
        state.mkdir(mode=0o777)
        if made_by != "us, unreadable":
            monkeypatch.setattr(os, "geteuid", lambda: state.stat().st_uid + 1)
        if "read" in made_by:  # root may read all
            open_folder = files.Disk.open_folder

            def refuses(disk: files.Disk, path: files.Where) -> int:
                if str(path) == str(state):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return open_folder(disk, path)

            monkeypatch.setattr(files.Disk, "open_folder", refuses)
    said = {"a link": "is a link", "us, unreadable": "Permission denied"}.get(made_by, "belongs to another user")
    with pytest.raises(InvalidOption, match=said):
        StoreScu(str(target.options.addr)).store(private.files[0])
    assert stat.S_IMODE(other.stat().st_mode) == 0o755
    assert not list(other.iterdir())
    assert not list(state.iterdir())


@pytest.mark.parametrize("made_by", ["another user", "us, for all"])
def test_the_state_of_the_shell_stays_its_users(
    study: Study, target: StoreScu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str
) -> None:
    """Whoever may write to the folder above can put another one in its place while a run goes on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    state = tmp_path / "xdg" / "dicom-get"

    def put_another(_: Any) -> None:
        if not state.with_name("old").exists():
            state.rename(state.with_name("old"))
            state.mkdir()
            state.chmod(0o2777)
            if made_by == "another user":
                to_another_user(state, monkeypatch)

    scu = GetScu(study.node, destination=f"dicom://{target.options.addr}", tags=("PatientID",), retries=0)
    result = scu.get_study({"StudyInstanceUID": study.uid}, on_sub_operation=put_another)
    assert result.manifest_uri is None
    said = "belongs to another user" if made_by == "another user" else "others may look into the folder"
    assert said in str(result.errors)
    assert not list(state.iterdir())


def test_a_manifest_that_may_name_patients_is_not_for_all(study: Study) -> None:
    before = os.umask(0)
    try:
        plain, tagged = study.get(), study.get(tags=("PatientID",))
        both = combine_manifests([plain.manifest_uri, tagged.manifest_uri], study.outside)
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE(Path(str(uri).removeprefix("file://")).stat().st_mode)
        for uri in (plain.manifest_uri, tagged.manifest_uri, both["manifest_uri"])
    ]
    assert modes == [0o666, 0o640, 0o640]


def with_a_default_list(path: Path) -> None:
    """What is made in the folder may be read and written by another user, whatever the umask says."""
    entries = [(0x01, 7, -1), (0x02, 7, 65534), (0x04, 0, -1), (0x10, 7, -1), (0x20, 0, -1)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_default", packed)
    except OSError as error:
        pytest.skip(f"no access control lists here: {error}")


def with_a_group(path: Path) -> None:
    """What is made in the folder is of its group."""
    path.chmod(0o2777)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("widen", [with_a_default_list, with_a_group])
def test_who_made_the_folder_of_manifests_reads_no_names_in_it(
    study: Study, monkeypatch: pytest.MonkeyPatch, widen: Callable[[Path], None], deep: bool
) -> None:
    """Folders of ours that lie in it have his list and group as well; what is ours alone stays for our group too.

    Of a file with a list the group bits are its mask: no other user on the list may do more.
    """
    folder = study.folder / "_manifests"
    folder.mkdir(mode=0o777, parents=True)
    folder.chmod(0o777)
    widen(folder)
    written = folder / "a" / "b.parquet" if deep else folder / "b.parquet"
    if deep:
        written.parent.mkdir()
    uri = study.get(tags=("PatientID",)).manifest_uri
    assert stat.S_IMODE(Path(str(uri).removeprefix("file://")).stat().st_mode) == 0o640
    to_another_user(folder, monkeypatch)
    if deep and os.geteuid() == 0:
        os.chown(written.parent, 0, 65534)
    combine_manifests([uri], written)
    export(uri, "series", written.with_suffix(".csv"), columns=("PatientID",))
    for file in (written, written.with_suffix(".csv")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_a_person_names_to_be_written_to_may_be_a_pipe(tmp_path: Path) -> None:
    a_fifo(tmp_path / "transcript")
    reader = os.open(tmp_path / "transcript", os.O_RDONLY | os.O_NONBLOCK)
    files.append_to(tmp_path / "transcript", b"a line\n")
    assert os.read(reader, 100) == b"a line\n"
    with pytest.raises(OSError, match="no regular file"):
        files.append_to(Below(tmp_path) / "transcript", b"a line\n")
    os.close(reader)


def to_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a file or a link away, as root can; who is not root becomes another user."""
    ours = os.geteuid()
    if ours == 0:
        os.chown(path, 65534, 65534, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: ours + 1)


@pytest.mark.parametrize("what", ["a link", "a dangling link", "a link on the way", "a file"])
def test_a_transcript_goes_nowhere_that_another_user_chose(
    study: Study, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    own = study.outside / "own"
    if what != "a dangling link":
        own.write_text("mine\n")
    transcript = made = study.folder / "t.jsonl"
    if what == "a file":
        made.write_text("mine\n")
    elif what == "a link on the way":
        made = study.folder / "way"
        made.symlink_to(study.outside)
        transcript = made / "own"
    else:
        made.symlink_to(own)
    # Our own, and root's, lead where we said.
    study.get(transcript=transcript)
    before = transcript.read_bytes()
    assert len(before.splitlines()) > 2
    to_another_user(made, monkeypatch)
    # To an ordinary user who became another one, the file behind the link belongs to somebody else, too.
    refused = f"transcript: '{made}(/own)?' .*belongs to another user. Remove it, or give"
    with pytest.raises(InvalidOption, match=refused):
        study.get(transcript=transcript)
    assert transcript.read_bytes() == before


def test_nor_where_he_chooses_while_it_is_written(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, path = study.outside / "own", study.folder / "t.jsonl"
    own.write_text("mine\n")
    transcript = FileTranscript(path)
    transcript.take({"a": 1})
    path.unlink()
    path.symlink_to(own)
    to_another_user(path, monkeypatch)
    transcript.take({"a": 2})
    assert own.read_text() == "mine\n"
    assert "belongs to another user" in caplog.text
