"""The sample data: valid, diverse, and the same in every run."""

from __future__ import annotations

import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from airflow_dicom_get.testing.archive import PATIENT_ID, STUDY_UID, Archive, read_header
from airflow_dicom_get.testing.sample_data import (
    DEFLATED,
    EXPLICIT_LITTLE,
    PRIVATE_CLASS,
    RLE,
    STUDY_DATE,
    big_study,
    ct_study,
    set_elements,
    usable_pydicom_files,
    write_demo_data,
)
from airflow_dicom_get.testing.servers import require
from tests.support.holdings import Holding, hold

_STUDY_DATE = 0x00080020


def test_real_files_cover_the_syntaxes_of_the_wheel(real: Holding) -> None:
    assert len(real.entries) == len(usable_pydicom_files()) >= 115
    syntaxes = Counter(entry.syntax for entry in real.entries.values())
    assert len(syntaxes) >= 9
    assert len({entry.sop_class for entry in real.entries.values()}) >= 10


def test_mixed_study_differs_from_the_files_in_three_elements(real: Holding, mixed: Holding) -> None:
    assert mixed.entries.keys() == real.entries.keys()
    patched = {STUDY_UID, PATIENT_ID, _STUDY_DATE}

    def raw(path: Path) -> dict[int, object]:
        dataset: Dataset = dcmread(path)
        return {
            int(tag): getattr(dataset.get_item(tag), "value", None)
            for tag in dataset.keys()  # noqa: SIM118 - iterating over the data set itself converts the elements
            if int(tag) not in patched and tag.element
        }

    for sop, entry in mixed.entries.items():
        syntax, _, _, row = read_header(entry.path)
        assert syntax == real.entries[sop].syntax
        assert (row[STUDY_UID], row[PATIENT_ID], row[_STUDY_DATE]) == (mixed.study, "MIXED", STUDY_DATE)
        assert raw(entry.path) == raw(real.entries[sop].path), entry.path.name


def test_set_elements_keeps_every_other_byte(real: Holding) -> None:
    for sop, entry in real.entries.items():
        original = entry.path.read_bytes()
        row = read_header(entry.path)[3]
        # Setting what is there already must give the file itself.
        same = set_elements(original, {STUDY_UID: row[STUDY_UID]})
        if entry.syntax == DEFLATED:
            inflated = [zlib.decompress(data[entry.offset :], -zlib.MAX_WBITS) for data in (original, same)]
            assert inflated[0] == inflated[1]
        else:
            assert same == original, entry.path.name
        changed = set_elements(original, {STUDY_UID: "1.2.3"})
        assert changed[: entry.offset] == original[: entry.offset]
        assert sop in real.entries


def test_set_elements_keeps_group_lengths_right(tmp_path: Path, real: Holding) -> None:
    def length_and_size(path: Path) -> tuple[int, int] | None:
        dataset = dcmread(path)
        body = path.read_bytes()[read_header(path)[1] :]
        at = body.find(b"\x20\x00\x00\x00UL\x04\x00")
        if at < 0:
            return None
        end = next(
            body.find(bytes([tag.group & 0xFF, tag.group >> 8, tag.element & 0xFF, tag.element >> 8]), at)
            for tag in sorted(dataset.keys())
            if tag.group > 0x20
        )
        return int.from_bytes(body[at + 8 : at + 12], "little"), end - at - 12

    checked = 0
    for entry in real.entries.values():
        before = length_and_size(entry.path)
        if entry.syntax == DEFLATED or before is None or before[0] != before[1]:
            continue
        changed = tmp_path / "changed.dcm"
        changed.write_bytes(set_elements(entry.path.read_bytes(), {STUDY_UID: "1.2.3.4.5.6"}))
        after = length_and_size(changed)
        assert after is not None
        assert after[0] == after[1] != before[0]
        checked += 1
    assert checked >= 1


def test_ct_study(ct: Holding, tmp_path: Path) -> None:
    assert len(ct.entries) == 40
    assert {entry.syntax for entry in ct.entries.values()} == {EXPLICIT_LITTLE, RLE, DEFLATED}
    assert sum(path.stat().st_size for path in ct.files) < 9_000_000
    sums = set()
    for path in sorted(ct.folder.glob("series-*/0001.dcm")):
        dataset = dcmread(path)
        pixels = dataset.pixel_array
        assert (pixels.shape, dataset.StudyDate) == ((512, 512), STUDY_DATE)
        sums.add(int(pixels.sum()))
    assert len(sums) == 4
    assert ct_study(tmp_path) == ct.study
    for path in ct.files:
        assert (tmp_path / path.relative_to(ct.folder)).read_bytes() == path.read_bytes()


def test_private_study(private: Holding) -> None:
    classes = Counter(entry.sop_class for entry in private.entries.values())
    assert sorted(classes.values()) == [1, 1, 10]
    assert PRIVATE_CLASS in classes


def test_demo_data(tmp_path: Path) -> None:
    number = write_demo_data(tmp_path)
    archive = Archive(tmp_path)
    archive.load()
    assert len(archive.entries()) == number
    assert archive.skipped == {}
    rows = archive.find("STUDY", {_STUDY_DATE: STUDY_DATE})
    modalities = {modality for row in rows for modality in row[0x00080061].split("\\")}
    assert len(rows) == 7
    assert {"CT", "SR", "RTPLAN", "SEG", "MR"} <= modalities
    assert write_demo_data(tmp_path) == number


@pytest.mark.parametrize(("n", "size", "series"), [(7, 8192, 3), (2, 512 * 1024, 1), (1, 3_000_001, 1)])
def test_big_study(tmp_path: Path, n: int, size: int, series: int) -> None:
    study = big_study(tmp_path, n, size, series=series)
    holding = hold(tmp_path, study)
    assert len(holding.entries) == n
    contents = {holding.dataset(sop) for sop in holding.entries}
    assert len(contents) == n
    assert all(size < len(content) < size + 2000 for content in contents)
    rows = {read_header(path)[3][0x0020000E] for path in holding.files}
    assert len(rows) == series


@pytest.mark.dcmtk
def test_dcmtk_reads_every_file(real: Holding, mixed: Holding, ct: Holding, private: Holding) -> None:
    files = [path for holding in (real, mixed, ct, private) for path in holding.files]
    done = subprocess.run([require("dcmftest"), *files], capture_output=True, text=True, check=False)
    assert done.stdout.count("yes: ") == len(files), done.stdout
    for path in mixed.files:
        subprocess.run([require("dcmdump"), "-q", path], check=True, capture_output=True)
