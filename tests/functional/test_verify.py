"""The verb ``verify``: what is listed, what is there, what the PACS says; and what a get makes of its answer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from airflow_dicom_get import GetScu
from airflow_dicom_get.config.options import VerifyOptions
from airflow_dicom_get.engine import ending
from airflow_dicom_get.errors import DeadlineExceeded, InvalidOption, ManifestError
from airflow_dicom_get.manifest.frames import load_manifests
from airflow_dicom_get.result import Result
from airflow_dicom_get.storage import files
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.testing.servers import Dcmqrscp, Storescp
from airflow_dicom_get.verify import How, Verification, compare, verify
from tests.support.forwards import forward
from tests.support.holdings import Holding
from tests.support.listing_node import Held, ListingNode, honest
from tests.support.odd_destination import OddDestination

Embedded = Callable[..., EmbeddedPacs]


class Got:
    """A study that was retrieved, and its source."""

    def __init__(self, source: EmbeddedPacs, holding: Holding, folder: Path, **options: Any) -> None:
        self.source, self.study, self.folder = source, holding.study, folder
        self.result = self.get(**options)
        assert self.result.verdict == "complete"
        frame = self.result.manifest
        self.paths = {sop: Path(uri) for sop, uri in zip(frame["sop_instance_uid"], frame["uri"], strict=True)}
        self.sops = sorted(self.paths)

    @property
    def node(self) -> str:
        return f"PACS@127.0.0.1:{self.source.port}"

    def get(self, query: bool = True, **options: Any) -> Result:
        manifest = options.pop("manifest", None)
        scu = GetScu(self.node, out_dir=self.folder, **options)
        if manifest is not None:
            return scu.get_study(manifest=manifest)
        return scu.get_study({"StudyInstanceUID": self.study})

    def spoil(self) -> None:
        """One file gone, one changed, one cut."""
        self.paths[self.sops[0]].unlink()
        content = self.paths[self.sops[1]].read_bytes()
        self.paths[self.sops[1]].write_bytes(content[:-2] + b"zz")
        self.paths[self.sops[2]].write_bytes(self.paths[self.sops[2]].read_bytes()[:-2])


@pytest.fixture
def got(embedded: Embedded, ct: Holding, tmp_path: Path) -> Got:
    return Got(embedded(ct.folder), ct, tmp_path / "out")


def marks(found: Verification) -> dict[str, str]:
    return {x.sop_instance_uid: x.symbol for x in found.differences}


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "airflow_dicom_get.cli", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class TestFolder:
    def test_all_the_same(self, got: Got) -> None:
        for arguments in (
            {"manifest": got.result.manifest_uri},
            {"manifest": got.result.manifest},
            {"manifest": got.result.manifest_uri, "addr": got.node},
            {"study": got.study, "destination": got.folder},
            {"study": got.study, "destination": got.folder, "addr": got.node},
            {"manifest": got.result.manifest_uri, "destination": got.folder, "addr": got.node},
        ):
            for quick in (False, True):
                found = verify(**arguments, quick=quick)
                assert (found.same, found.exit_code, found.counts) == (True, 0, {"=": 40}), arguments
                assert found.manifest_uri is not None
                assert list(found.frame().columns) == [
                    "study_instance_uid", "series_instance_uid", "sop_instance_uid", "symbol", "what",
                ]  # fmt: skip

    @pytest.mark.parametrize("by_manifest", [True, False])
    def test_differences(self, got: Got, by_manifest: bool) -> None:
        got.spoil()
        (got.folder / got.study / "1.2.3").mkdir()
        stray = got.folder / got.study / "1.2.3" / "1.2.3.4.dcm"
        stray.write_bytes(b"no DICOM")
        place = {"manifest": got.result.manifest_uri, "destination": got.folder} if by_manifest else {
            "study": got.study, "destination": got.folder,
        }  # fmt: skip
        found = verify(**place)
        wanted = {got.sops[0]: "+", got.sops[1]: "*", got.sops[2]: "*", "1.2.3.4": "*"}
        assert marks(found) == wanted
        assert (found.exit_code, found.counts["="]) == (3, 37)
        quick = verify(**place, quick=True)
        assert marks(quick) == {got.sops[0]: "+", got.sops[2]: "*", "1.2.3.4": "*"}
        assert len(found.frame()) == 4

    def test_its_output_is_the_input_of_a_get(self, got: Got, ct: Holding) -> None:
        before = {sop: path.read_bytes() for sop, path in got.paths.items()}
        got.spoil()
        found = verify(got.result.manifest_uri, addr=got.node)
        assert marks(found) == {got.sops[0]: "+", got.sops[1]: "*", got.sops[2]: "*"}
        got.source.sent.clear()
        result = got.get(manifest=found.manifest_uri, on_conflict="replace")
        assert (result.verdict, result.completed, result.skipped) == ("complete", 40, 37)
        assert set(got.source.sent) == set(got.sops[:3])
        assert {sop: path.read_bytes() for sop, path in got.paths.items()} == before
        assert verify(got.result.manifest_uri).same

    def test_what_the_pacs_says(
        self, embedded: Embedded, got: Got, ct: Holding, private: Holding, tmp_path: Path
    ) -> None:
        import shutil

        fewer = tmp_path / "fewer"
        shutil.copytree(ct.folder, fewer)
        gone = sorted(ct.entries)[5]
        (fewer / ct.entries[gone].path.relative_to(ct.folder)).unlink()
        node = f"PACS@127.0.0.1:{embedded(fewer).port}"
        for place in (
            {"manifest": got.result.manifest_uri},
            {"study": got.study, "destination": got.folder},
        ):
            found = verify(**place, addr=node)
            assert marks(found) == {gone: "-"}
            assert [x.state for x in found.rows].count("withdrawn") == 1
            assert (found.same, found.exit_code) == (True, 0), "a get is complete, and has nothing to fetch"
        # And the other way: the PACS has one more than was retrieved.
        less = Got(embedded(fewer), ct, tmp_path / "less")
        found = verify(less.result.manifest_uri, addr=got.node)
        assert marks(found) == {gone: "+"}
        assert "not in the manifest" in found.differences[0].what or "not there" in found.differences[0].what
        fetched = GetScu(got.node, out_dir=tmp_path / "less").get_study(manifest=found.manifest_uri)
        assert (fetched.verdict, fetched.completed, fetched.skipped) == ("complete", 40, 39)

    def test_what_is_damaged_is_a_difference_also_where_the_pacs_no_longer_lists_it(
        self, embedded: Embedded, got: Got, ct: Holding, tmp_path: Path
    ) -> None:
        got.spoil()
        fewer = tmp_path / "fewer"
        shutil.copytree(ct.folder, fewer)
        for sop in got.sops[:4]:
            (fewer / ct.entries[sop].path.relative_to(ct.folder)).unlink()
        node = f"PACS@127.0.0.1:{embedded(fewer).port}"
        for place in (None, got.folder):
            found = verify(got.result.manifest_uri, addr=node, destination=place)
            assert marks(found) == {got.sops[0]: "+", got.sops[1]: "*", got.sops[2]: "*", got.sops[3]: "-"}, place
            assert found.exit_code == 3
        by_study = verify(study=got.study, destination=got.folder, addr=node)
        assert (by_study.exit_code, set(marks(by_study).values())) == (0, {"-"}), "a get of the study leaves it alone"

    def test_pacs_that_cannot_be_compared(self, embedded: Embedded, got: Got, ct: Holding) -> None:
        mute = f"PACS@127.0.0.1:{embedded(ct.folder, no_find=True).port}"
        for node, code in (("X@127.0.0.1:1", 1), (mute, 4)):
            found = verify(got.result.manifest_uri, addr=node)
            assert (found.exit_code, found.differences, found.same) == (code, [], False)
            assert found.uncompared
            assert found.counts == {"=": 40}

    def test_rows_that_were_never_there(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        hidden = sorted(ct.entries)[:2]
        source = embedded(ct.folder, hide=hidden)
        result = GetScu(f"PACS@127.0.0.1:{source.port}", out_dir=tmp_path / "out").get_study(
            {"StudyInstanceUID": ct.study}
        )
        found = verify(result.manifest_uri)
        assert marks(found) == dict.fromkeys(hidden, "+")

    def test_bare_data_sets(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        bare = Got(embedded(ct.folder), ct, tmp_path / "bare", store_with_file_meta=False)
        assert verify(bare.result.manifest_uri).same
        for addr in (None, bare.node):
            assert verify(study=bare.study, destination=bare.folder, addr=addr).same
        bare.spoil()
        assert len(verify(bare.result.manifest_uri).differences) == 3

    def test_a_copy_elsewhere(self, got: Got, tmp_path: Path) -> None:
        shutil.copytree(got.folder / got.study, tmp_path / "copy" / got.study)
        found = verify(got.result.manifest_uri, destination=tmp_path / "copy")
        assert found.same
        next((tmp_path / "copy").rglob("*.dcm")).unlink()
        assert verify(got.result.manifest_uri, destination=tmp_path / "copy").exit_code == 3

    @pytest.mark.parametrize("content", [None, b"rubbish"])
    def test_a_copy_below_the_study_takes_no_instances_place(self, got: Got, content: bytes | None) -> None:
        path = got.paths[got.sops[0]]
        shutil.copytree(path.parent, got.folder / got.study / "backup" / path.parent.name)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for arguments in ({"manifest": got.result.manifest_uri}, {"study": got.study, "addr": got.node}):
            found = verify(**arguments, destination=got.folder)
            assert found.exit_code == 3
            assert marks(found) == {got.sops[0]: "+" if content is None else "*"}

    def test_what_was_taken_and_never_synced_is_held_against_its_digest(
        self, embedded: Embedded, ct: Holding, tmp_path: Path
    ) -> None:
        got = Got(embedded(ct.folder), ct, tmp_path / "out", durable=False)
        place: dict[str, Any] = {"study": got.study, "destination": got.folder}
        assert verify(**place).same
        path = got.paths[got.sops[0]]
        content = path.read_bytes()
        other = content.replace(got.sops[0].encode()[-3:], b"999")
        for bad in (
            content[: len(content) // 2],
            content[:800] + bytes(len(content) - 800),
            content[:-2] + b"zz",
            other,
        ):
            path.write_bytes(bad)
            for node in (None, got.node):
                found = verify(**place, addr=node)
                assert (found.exit_code, marks(found)) == (3, {got.sops[0]: "*"})
        path.unlink()
        assert marks(verify(**place)) == {got.sops[0]: "+"}

    def test_records_that_contradict_each_other(
        self, got: Got, embedded: Embedded, ct: Holding, tmp_path: Path
    ) -> None:
        """Any of them may be of what is there; what none of them tells is a difference."""
        other = Got(embedded(ct.folder), ct, tmp_path / "other", calling_ae_title="SOMEBODYELSE")
        [records] = (other.folder / "_manifests" / ".ledger" / got.study).iterdir()
        shutil.copy(records, got.folder / "_manifests" / ".ledger" / got.study / f"2999{records.name}")
        sop = got.sops[0]
        place: dict[str, Any] = {"study": got.study, "destination": got.folder}
        for content in [path.read_bytes() for path in (other.paths[sop], got.paths[sop])]:
            got.paths[sop].write_bytes(content)
            assert verify(**place).same
            got.paths[sop].write_bytes(content[:-2] + b"zz")
            assert marks(verify(**place)) == {sop: "*"}
            got.paths[sop].write_bytes(content)

    def test_a_record_without_a_digest_takes_nothing_from_one_that_has_it(
        self, embedded: Embedded, ct: Holding, tmp_path: Path
    ) -> None:
        first = Got(embedded(ct.folder), ct, tmp_path / "out", checksum=None)
        second = first.get(resume=False)
        assert second.verdict == "complete"
        path = first.paths[first.sops[0]]
        path.write_bytes(path.read_bytes()[:-2] + b"zz")
        both = load_manifests([first.result.manifest_uri, second.manifest_uri])
        place: dict[str, Any] = {"study": first.study, "destination": first.folder}
        for asked in ({"manifest": both}, place, place | {"addr": first.node}):
            assert marks(verify(**asked)) == {first.sops[0]: "*"}, asked
        assert verify(first.result.manifest_uri).same, "no digest is recorded there"

    def test_files_without_a_record(self, ct: Holding, tmp_path: Path, got: Got) -> None:
        """Whole instances of their names count, whoever put them there."""
        shutil.copytree(got.folder / got.study, tmp_path / "copy" / got.study)
        found = verify(study=got.study, destination=tmp_path / "copy", addr=got.node)
        assert found.same
        path = tmp_path / "copy" / got.paths[got.sops[0]].relative_to(got.folder)
        content = path.read_bytes()
        path.write_bytes(content[:-20])
        found = verify(study=got.study, destination=tmp_path / "copy", addr=got.node)
        assert (found.exit_code, marks(found)) == (3, {got.sops[0]: "*"})
        again = GetScu(got.node, out_dir=tmp_path / "copy").get_study({"StudyInstanceUID": got.study})
        assert again.verdict == "complete"
        assert path.read_bytes() == content
        assert verify(study=got.study, destination=tmp_path / "copy", addr=got.node).same

    def test_where_nothing_is_recorded_a_quick_comparison_reads(self, got: Got) -> None:
        shutil.rmtree(got.folder / "_manifests" / ".ledger")
        place: dict[str, Any] = {"study": got.study, "destination": got.folder, "addr": got.node, "quick": True}
        assert verify(**place).same
        for sop in got.sops[:2]:
            got.paths[sop].write_bytes(b"")
        assert marks(verify(**place)) == dict.fromkeys(got.sops[:2], "*")
        frame = got.result.manifest.assign(bytes=None, sha256=None)
        assert marks(verify(frame, quick=True)) == dict.fromkeys(got.sops[:2], "*")

    def test_a_study_that_is_nowhere_is_not_the_same(
        self, got: Got, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        shutil.copytree(got.folder / got.study, tmp_path / "copy" / got.study)
        unknown = verify(study=got.study, destination=tmp_path / "copy")
        assert (unknown.exit_code, unknown.counts) == (4, {"-": 40}), "what was there once, nobody knows"
        nowhere = verify(study="1.2.3", destination=got.folder, addr=got.node)
        assert (nowhere.exit_code, nowhere.same, nowhere.counts) == (4, False, {})
        assert "1.2.3 is not listed by the PACS" in nowhere.errors[0]["error"]
        assert verify(study="1.2.3", destination=got.folder).exit_code == 4
        assert verify(study=[got.study, "1.2.3"], destination=got.folder, addr=got.node).exit_code == 4
        other = f"PACS@127.0.0.1:{embedded(private.folder).port}"
        assert GetScu(other, out_dir=got.folder).get_study({"StudyInstanceUID": got.study}).verdict == "empty"
        gone = verify(study=got.study, destination=got.folder, addr=other)
        assert (gone.exit_code, gone.counts) == (4, {"-": 40})


class TestDoubt:
    """What is not known to be the same is a difference, and stays one in the manifest of the comparison."""

    @pytest.mark.parametrize("quick", [False, True])
    def test_a_conflict(self, got: Got, quick: bool) -> None:
        frame = got.result.manifest
        frame.loc[frame["sop_instance_uid"] == got.sops[0], ["state", "reason"]] = ["conflict", "different_content"]
        manifest: Any = frame
        at: dict[str, Any] = {"destination": got.folder}
        for place in ({}, at, at | {"addr": got.node}):
            found = verify(manifest, quick=quick, **place)
            assert (found.exit_code, marks(found)) == (3, {got.sops[0]: "*"}), place
            assert [row.state for row in found.rows].count("conflict") == 1
            manifest = found.manifest_uri or manifest

    @pytest.mark.parametrize("quick", [False, True])
    def test_a_difference(self, got: Got, quick: bool) -> None:
        path = got.paths[got.sops[1]]
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"zz")
        first = verify(got.result.manifest_uri)
        places: tuple[dict[str, Any], ...] = ({}, {"destination": got.folder})
        for place in places:
            assert marks(verify(first.manifest_uri, quick=quick, **place)) == {got.sops[1]: "*"}
            path.write_bytes(content)
            assert verify(first.manifest_uri, quick=quick, **place).same
            path.write_bytes(content[:-2] + b"zz")
        frame = first.manifest
        frame["sha256"] = None
        path.write_bytes(content)
        assert marks(verify(frame, destination=got.folder, quick=quick)) == {got.sops[1]: "*"}

    def test_what_cannot_be_read_is_not_held(self, got: Got, monkeypatch: pytest.MonkeyPatch) -> None:
        path = got.paths[got.sops[0]]

        class BadSector(files.Disk):
            def read_into(self, fd: int, view: memoryview, position: int) -> int:
                if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return super().read_into(fd, view, position)

        monkeypatch.setattr(files, "disk", BadSector())
        found = verify(got.result.manifest_uri)
        assert marks(found) == {got.sops[0]: "!"}
        again = got.get(manifest=found.manifest_uri)
        assert (again.verdict, again.reason) == ("failed", "destination_error")

    def test_each_object_of_an_instance_is_looked_at(self, got: Got, embedded: Embedded, ct: Holding) -> None:
        other = Got(got.source, ct, got.folder.parent / "other")
        both = load_manifests([got.result.manifest_uri, got.result.manifest_uri, other.result.manifest_uri])
        for addr in (None, got.node):
            assert verify(both, addr=addr).counts == {"=": 80}
        got.paths[got.sops[0]].unlink()
        assert marks(verify(both)) == {got.sops[0]: "+"}
        assert verify(both, destination=other.folder).counts == {"=": 40}

    def test_nothing_that_is_listed(self, got: Got) -> None:
        failed = GetScu("X@127.0.0.1:1", out_dir=got.folder, retries=0).get_study({"StudyInstanceUID": got.study})
        assert failed.verdict == "failed"
        found = verify(failed.manifest_uri)
        assert (found.same, found.exit_code, found.uncompared) == (False, 4, "No instance is listed.")


class TestBucket:
    @pytest.mark.parametrize("prefix", ["a%2520b", "_manifests/x"])
    def test_an_odd_prefix(self, embedded: Embedded, moto: Moto, private: Holding, prefix: str) -> None:
        place: dict[str, Any] = {"destination": f"s3://{BUCKET}/odd/{prefix}", "s3_config": moto.config}
        scu = GetScu(f"PACS@127.0.0.1:{embedded(private.folder).port}", **place)
        assert scu.get_study({"StudyInstanceUID": private.study}).verdict == "complete"
        found = verify(study=private.study, **place)
        assert (found.same, found.counts) == (True, {"=": 12})

    def test_differences(self, embedded: Embedded, moto: Moto, ct: Holding) -> None:
        place = f"s3://{BUCKET}/verify-verb"
        node = f"PACS@127.0.0.1:{embedded(ct.folder).port}"
        scu = GetScu(node, destination=place, s3_config=moto.config)
        result = scu.get_study({"StudyInstanceUID": ct.study})
        assert result.verdict == "complete"
        ways: tuple[dict[str, Any], ...] = (
            {"manifest": result.manifest_uri, "addr": node},
            {"study": ct.study, "destination": place},
            {"study": ct.study, "destination": place, "addr": node},
        )
        for way in ways:
            found = verify(**way, s3_config=moto.config)
            assert (found.same, found.counts) == (True, {"=": 40}), way
        frame = result.manifest
        keys = {
            sop: uri.removeprefix(f"s3://{BUCKET}/")
            for sop, uri in zip(frame["sop_instance_uid"], frame["uri"], strict=True)
        }
        gone, cut, other = sorted(keys)[:3]
        client = moto.client()
        for each in (gone, cut, other):  # copies further down take nobody's place
            copy = keys[each].replace(f"{ct.study}/", f"{ct.study}/backup/")
            client.put_object(Bucket=BUCKET, Key=copy, Body=moto.read(keys[each]))
        client.delete_object(Bucket=BUCKET, Key=keys[gone])
        client.put_object(Bucket=BUCKET, Key=keys[cut], Body=moto.read(keys[cut])[:-2])
        client.put_object(Bucket=BUCKET, Key=keys[other], Body=moto.read(keys[other])[:-2] + b"zz")
        for way in ways:
            found = verify(**way, s3_config=moto.config)
            assert marks(found) == {gone: "+", cut: "*", other: "*"}, way
        again = GetScu.of(replace(scu.options, on_conflict="replace")).get_study(manifest=found.manifest_uri)
        assert (again.verdict, again.completed, again.skipped) == ("complete", 40, 37)
        assert verify(**ways[0], s3_config=moto.config).same


class TestForwards:
    @pytest.mark.parametrize("late", [2, 99])
    def test_a_node_has_time_to_list_what_it_was_given(
        self, embedded: Embedded, private: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
    ) -> None:
        """As one whose index catches up: the first lists are empty."""
        monkeypatch.setattr("airflow_dicom_get.verify._ASKED_AGAIN", 0.1)
        (tmp_path / "target").mkdir()
        target = EmbeddedPacs(tmp_path / "target")
        with target:
            place = f"dicom://127.0.0.1:{target.port}"
            scu = GetScu(f"PACS@127.0.0.1:{embedded(private.folder).port}", destination=place, manifest_root=tmp_path)
            got = scu.get_study({"StudyInstanceUID": private.study})
            assert got.verdict == "complete"
            find, asked = target.archive.find, []

            def find_late(level: str, *rest: Any, **more: Any) -> Any:
                asked.append(level)
                return find(level, *rest, **more) if len(asked) > late else []

            monkeypatch.setattr(target.archive, "find", find_late)
            options = VerifyOptions.check({"destination": place, "manifest_root": tmp_path})
            found = compare(options, got.manifest_uri, how=How(listed_within=1.0))
            assert (found.same, found.counts) == ((True, {"=": 12}) if late == 2 else (False, {"+": 12}))
            asked.clear()
            assert compare(options, got.manifest_uri).counts == {"+": 12}
            assert len(asked) == 1

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with Dcmqrscp(tmp_path / "qr", ae_title="DEST", sop_classes={"1.2.840.10008.5.1.4.1.1.2"}) as destination:
            source = embedded(ct.folder)
            result = forward(source, destination, tmp_path / "state", ct.study)
            assert result.verdict == "complete"
            to = f"dicom://{destination.node}"
            by_manifest = verify(result.manifest_uri, destination=to, manifest_root=tmp_path / "v")
            assert (by_manifest.same, by_manifest.counts) == (True, {"=": 40})
            by_study = verify(
                study=ct.study, destination=to, addr=f"PACS@127.0.0.1:{source.port}",
                manifest_root=tmp_path / "state",
            )  # fmt: skip
            assert (by_study.same, by_study.counts) == (True, {"=": 40})

    def test_what_the_destination_lost(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        (tmp_path / "dest").mkdir()
        destination = embedded(tmp_path / "dest", ae_title="DEST")
        source = embedded(private.folder)
        result = forward(source, destination, tmp_path / "state", private.study)
        port = destination.port
        destination.stop()
        lost = next((tmp_path / "dest").rglob("*.dcm"))
        lost.unlink()
        embedded(tmp_path / "dest", ae_title="DEST", port=port)
        to = f"dicom://DEST@127.0.0.1:{port}"
        found = verify(result.manifest_uri, addr=f"PACS@127.0.0.1:{source.port}", destination=to)
        assert [x.symbol for x in found.differences] == ["+"]
        again = GetScu(
            f"PACS@127.0.0.1:{source.port}",
            destination=to,
            manifest_root=tmp_path / "state",
        ).get_study(manifest=found.manifest_uri)
        assert (again.verdict, again.completed, again.skipped) == ("complete", 12, 11)
        assert verify(result.manifest_uri, destination=to).same

    def test_our_records_tell_what_a_node_was_sent(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        (tmp_path / "dest").mkdir()
        destination = embedded(tmp_path / "dest", ae_title="DEST")
        result = forward(embedded(private.folder), destination, tmp_path / "state", private.study)
        place: dict[str, Any] = {"study": private.study, "destination": result.destination}
        found = verify(**place, manifest_root=tmp_path / "state")
        assert (found.exit_code, found.counts) == (0, {"=": 12})
        without = verify(**place, manifest_root=tmp_path / "nothing")
        assert (without.exit_code, without.counts) == (4, {"-": 12})
        assert "no record says what was stored" in str(without.uncompared)
        destination.stop()
        for path in sorted((tmp_path / "dest").rglob("*.dcm"))[1:]:
            path.unlink()
        again = embedded(tmp_path / "dest", ae_title="DEST", port=destination.port)
        found = verify(**place, manifest_root=tmp_path / "state")
        assert (found.exit_code, found.counts) == (3, {"=": 1, "+": 11})
        again.stop()
        unreachable = verify(**place, manifest_root=tmp_path / "state")
        assert (unreachable.exit_code, unreachable.differences) == (1, [])

    def test_what_a_node_refused_or_never_took_from_us_is_not_the_same(self, tmp_path: Path) -> None:
        """It has other data sets under the UIDs of the study, and answers 0111; it lists them all the same."""
        with MisbehavingPacs(series=1, instances=3) as source, ListingNode(honest, duplicate=0x0111) as node:
            node.held = {x.sop: (STUDY_UID, x.series, b"another data set") for x in source._site.instances}
            to, pacs = f"dicom://LISTS@127.0.0.1:{node.port}", f"PACS@127.0.0.1:{source.port}"
            refused = forward(source, node, tmp_path, STUDY_UID)
            assert (refused.verdict, refused.reason) == ("failed", "destination_refused")
            for addr in (None, pacs):
                found = verify(refused.manifest_uri, addr=addr, destination=to, manifest_root=tmp_path)
                assert (found.exit_code, found.counts) == (3, {"*": 3})
                again = verify(found.manifest_uri, destination=to, manifest_root=tmp_path)
                assert (again.exit_code, again.counts) == (3, {"*": 3})
                assert {(x.state, x.reason, x.forward_status) for x in again.rows} == {
                    ("failed", "destination_refused", "error")
                }
            in_files = GetScu(pacs, destination=tmp_path / "files").get_study({"StudyInstanceUID": STUDY_UID})
            for way in ({"manifest": in_files.manifest_uri}, {"study": STUDY_UID, "addr": pacs}):
                found = verify(**way, destination=to, manifest_root=tmp_path)
                assert (found.exit_code, found.differences) == (4, []), "nobody says that the node took them from us"
                assert "3 instances of which no record says" in str(found.uncompared)
                assert verify(found.manifest_uri, destination=to, manifest_root=tmp_path).exit_code == 4
            unlisted = verify(study=STUDY_UID, destination=to, manifest_root=tmp_path)
            assert (unlisted.exit_code, unlisted.counts) == (4, {"-": 3})
            assert verify(unlisted.manifest_uri, destination=to, manifest_root=tmp_path).exit_code == 4
            found = verify(
                refused.manifest_uri, destination=to, manifest_root=tmp_path / "blank", trust_destination=True
            )
            assert (found.exit_code, found.counts) == (0, {"=": 3})
            node.held.clear()
            assert forward(source, node, tmp_path, STUDY_UID).verdict == "complete"
            for manifest in (refused.manifest_uri, in_files.manifest_uri):
                found = verify(manifest, destination=to, manifest_root=tmp_path)
                assert (found.exit_code, found.counts) == (0, {"=": 3}), "our records say that it took them since"

    def test_a_node_is_not_called_because_a_manifest_names_it(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        (tmp_path / "dest").mkdir()
        destination = embedded(tmp_path / "dest", ae_title="DEST")
        result = forward(embedded(private.folder), destination, tmp_path / "state", private.study)
        before = destination.total_associations
        found = verify(result.manifest_uri)
        assert (found.exit_code, found.counts, found.differences) == (4, {"!": 12}, [])
        assert f"DEST@127.0.0.1:{destination.port}" in str(found.uncompared)
        assert "Name the node as destination" in found.errors[0]["hint"]
        assert destination.total_associations == before

    def test_destination_that_cannot_be_asked(
        self, embedded: Embedded, private: Holding, storescp: Storescp, tmp_path: Path
    ) -> None:
        with OddDestination() as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study)
            found = verify(result.manifest_uri, destination=result.destination)
            assert (found.exit_code, found.differences) == (4, [])
            assert "does not offer C-FIND" in str(found.uncompared)


class TestShell:
    def test_one_line_per_difference(self, got: Got, tmp_path: Path) -> None:
        same = shell("--manifest", got.result.manifest_uri, got.node)
        assert (same.returncode, same.stdout) == (0, ""), same.stderr
        assert "40 of 40 instances are the same" in same.stderr
        got.spoil()
        done = shell("--manifest", got.result.manifest_uri)
        assert done.returncode == 3
        lines = done.stdout.splitlines()
        assert [line[:2] for line in sorted(lines)] == ["* ", "* ", "+ "]
        assert all(got.study in line for line in lines)
        quick = shell("--study", got.study, "--to", got.folder, "--quick")
        assert (quick.returncode, len(quick.stdout.splitlines())) == (3, 2)
        said = json.loads(shell("--manifest", got.result.manifest_uri, "--json").stdout)
        assert said["counts"] == {"=": 37, "+": 1, "-": 0, "*": 2, "!": 0}
        assert len(said["differences"]) == 3
        get = [sys.executable, "-m", "airflow_dicom_get.cli", "get", got.node, "--manifest", said["manifest"],
               "--to", str(got.folder), "--on-conflict", "replace"]  # fmt: skip
        assert subprocess.run(get, capture_output=True, timeout=60).returncode == 0
        assert shell("--manifest", got.result.manifest_uri).returncode == 0
        unreachable = shell("X@127.0.0.1:1", "--manifest", got.result.manifest_uri)
        assert unreachable.returncode == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "nothing to verify"),
            (["--study", "1.2"], "destination"),
            (["--study", "1.2.x", "--to", "out"], "is not a valid UID"),
            (["--manifest", "nothing.parquet"], "cannot be read"),
            (["--manifest", "m", "--to", "dicom://PACS_B"], "names a connection of Airflow"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str) -> None:
        done = shell(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption):
        verify()
    with pytest.raises(InvalidOption):
        verify(study="1.2.3")
    with pytest.raises(ManifestError):
        verify(tmp_path / "nothing.parquet")


class TestItsTime:
    """``deadlines.operation`` is of the whole call, and of what was half compared nothing is written."""

    def test_while_files_are_read(self, got: Got) -> None:
        got.spoil()
        before = sorted(got.folder.rglob("*.parquet"))
        with pytest.raises(DeadlineExceeded, match="whole comparison"):
            verify(got.result.manifest_uri, deadlines={"operation": 1}, on_difference=lambda _: time.sleep(1.1))
        assert sorted(got.folder.rglob("*.parquet")) == before

    def test_which_a_reader_finds_over_before_the_caller_looks(self, got: Got, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ending, "_LOOK", 60.0)
        got.spoil()
        with pytest.raises(DeadlineExceeded, match="whole comparison"):
            verify(got.result.manifest_uri, deadlines={"operation": 1}, on_difference=lambda _: time.sleep(1.1))

    def test_while_a_pacs_is_asked(self, got: Got, monkeypatch: pytest.MonkeyPatch) -> None:
        find = got.source.archive.find

        def find_late(*arguments: Any, **named: Any) -> Any:
            time.sleep(1.1)
            return find(*arguments, **named)

        monkeypatch.setattr(got.source.archive, "find", find_late)
        with pytest.raises(DeadlineExceeded, match="whole comparison"):
            verify(got.result.manifest_uri, addr=got.node, deadlines={"operation": 1})

    def test_while_a_node_is_asked(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        late: list[float] = []

        def rows(held: Held, wanted: Dataset) -> Iterator[Dataset]:
            for seconds in late:
                time.sleep(seconds)
            yield from honest(held, wanted)

        with ListingNode(rows) as node:
            result = forward(embedded(ct.folder), node, tmp_path / "state", ct.study)
            assert result.verdict == "complete"
            late.append(2.1)
            before = sorted((tmp_path / "state").rglob("*.parquet"))
            place = ["--to", str(result.destination), "--state", tmp_path / "state"]
            ended = shell("--manifest", result.manifest_uri, *place, "--deadline", "2")
        assert (ended.returncode, ended.stdout) == (1, "")
        assert "whole comparison (2 s) ran out" in ended.stderr
        assert sorted((tmp_path / "state").rglob("*.parquet")) == before
