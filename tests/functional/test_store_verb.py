"""The verb ``store``: files and manifests to a node, resumable, with a manifest of its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.config.groups import Deadlines
from airflow_dicom_get.errors import InvalidOption, ManifestError, S3Error
from airflow_dicom_get.manifest.files import read_table, write_manifest
from airflow_dicom_get.manifest.frames import combine_manifests, load_manifests, read_manifest
from airflow_dicom_get.result import Result
from airflow_dicom_get.storage import files
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.testing.sample_data import big_study, set_elements
from airflow_dicom_get.testing.servers import Orthanc, Storescp
from airflow_dicom_get.verify import verify
from tests.support.forwards import datasets, sent_by, states
from tests.support.holdings import Holding, hold
from tests.support.odd_destination import DieError, OddDestination, at

Embedded = Callable[..., EmbeddedPacs]


def store(destination: Any, state: Path, source: Any = None, manifest: Any = None, **options: Any) -> Result:
    calls = {
        name: options.pop(name)
        for name in ("on_sub_operation", "on_unusable", "on_completed", "root")
        if name in options
    }
    scu = StoreScu(f"{destination.ae_title}@127.0.0.1:{destination.port}", manifest_root=state, **options)
    return scu.store(source, manifest=manifest, **calls)


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "airflow_dicom_get.cli", "store", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class TestFiles:
    def test_every_real_file(self, mixed: Holding, storescp_all: Storescp, tmp_path: Path) -> None:
        events: list[Any] = []
        result = store(storescp_all, tmp_path / "state", mixed.folder, on_sub_operation=events.append)
        assert (result.verdict, result.completed, result.errors) == ("complete", len(mixed.entries), [])
        assert datasets(storescp_all.received) == sent_by(mixed)
        assert len(events) == len(mixed.entries)
        assert events[-1].remaining == 0
        frame = result.manifest
        assert set(frame["state"]) == {"forwarded"}
        assert set(frame["destination"]) == {f"dicom://{storescp_all.node}"}
        again = store(storescp_all, tmp_path / "state", mixed.folder)
        assert (again.verdict, again.skipped, again.bytes) == ("complete", len(mixed.entries), 0)
        assert set(again.manifest["state"]) == {"held"}

    @pytest.mark.orthanc
    def test_to_orthanc_over_two_associations(self, ct: Holding, tmp_path: Path) -> None:
        with Orthanc(tmp_path / "orthanc") as destination:
            result = store(destination, tmp_path / "state", ct.folder, associations=2)
            assert (result.verdict, result.completed) == ("complete", 40)
            back = GetScu(destination.node, out_dir=tmp_path / "back").get_study({"StudyInstanceUID": ct.study})
            assert back.verdict == "complete"
        assert datasets(tmp_path / "back") == sent_by(ct)

    def test_what_is_refused_is_named(self, mixed: Holding, storescp: Storescp, tmp_path: Path) -> None:
        result = store(storescp, tmp_path / "state", mixed.folder)
        assert (result.verdict, result.reason) == ("partial", "destination_refused")
        arrived = datasets(storescp.received)
        assert arrived.items() <= sent_by(mixed).items()
        assert result.completed == len(arrived)

    def test_files_that_cannot_be_stored(self, private: Holding, tmp_path: Path) -> None:
        folder = tmp_path / "mixed"
        shutil.copytree(private.folder, folder)
        (folder / "notes.txt").write_text("no DICOM")
        (folder / "empty.dcm").write_bytes(b"")
        entry = next(iter(private.entries.values()))
        whole = entry.path.read_bytes()
        (folder / "cut.dcm").write_bytes(whole[: entry.offset + 40])
        (folder / "no-meta.dcm").write_bytes(whole[entry.offset :])
        (folder / ".hidden").write_text("not looked at")
        (folder / "_manifests").mkdir()
        (folder / "_manifests" / "x.parquet").write_text("not looked at")
        left: list[tuple[str, str]] = []
        with OddDestination() as destination:
            result = store(
                destination, tmp_path / "state", folder, on_unusable=lambda name, why: left.append((name, why))
            )
            assert (result.verdict, result.reason, result.completed) == ("partial", "unusable_files", 12)
            assert {Path(name).name for name, _ in left} == {"notes.txt", "empty.dcm", "cut.dcm", "no-meta.dcm"}
            assert result.errors[0]["count"] == 4
            done = shell(destination.node, folder, "--state", tmp_path / "state2")
            assert done.returncode == 3
            assert done.stderr.count("skipped: ") == 4
            assert "notes.txt is not a DICOM file" in done.stderr
            only = shell(destination.node, folder / "notes.txt", "--state", tmp_path / "state3")
            assert (only.returncode, only.stdout.splitlines()[0]) == (1, "failed (unusable_files): nothing was stored")

    def test_what_cannot_be_looked_into_is_named(
        self, private: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "mixed"
        shutil.copytree(private.folder, folder)
        (folder / "dangling.dcm").symlink_to(tmp_path / "nowhere")
        (folder / "round.dcm").symlink_to(folder / "round.dcm")
        for name in ("closed", ".closed"):
            (folder / name).mkdir()

        class Closed(files.Disk):  # root may read any folder
            def scan(self, path: Any) -> Iterator[os.DirEntry[str]]:
                if Path(path).name.endswith("closed"):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return super().scan(path)

        monkeypatch.setattr(files, "disk", Closed())
        left: dict[str, str] = {}
        with OddDestination() as destination:
            result = store(
                destination,
                tmp_path / "state",
                folder,
                on_unusable=lambda name, why: left.update({Path(name).name: why}),
            )
            assert (result.verdict, result.reason, result.completed) == ("partial", "unusable_files", 12)
            assert set(left) == {"dangling.dcm", "round.dcm", "closed"}
            assert left["closed"] == "cannot be read: Permission denied"
            only = store(destination, tmp_path / "state", folder / "closed")
            assert (only.verdict, only.reason) == ("failed", "unusable_files")

    def test_same_instance_in_two_files(self, private: Holding, tmp_path: Path) -> None:
        folder = tmp_path / "twice"
        folder.mkdir()
        entry = private.entries[sorted(private.entries)[0]]
        content = entry.path.read_bytes()
        (folder / "a.dcm").write_bytes(content)
        (folder / "b.dcm").write_bytes(content)
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", folder)
            assert (result.verdict, result.total) == ("complete", 1)
            assert sum(destination.times.values()) == 1
            (folder / "c.dcm").write_bytes(content[:-2] + b"zz")
            result = store(destination, tmp_path / "state2", folder)
            assert (result.verdict, result.conflicts) == ("failed", 1)
            assert destination.held()[entry.sop] == private.dataset(entry.sop), "the first stays"

    @pytest.mark.parametrize("options", [{}, {"verify_held": "digest"}, {"resume": False}])
    def test_other_bytes_of_the_same_size_are_a_conflict_with_what_was_stored_before(
        self, private: Holding, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        sop = sorted(private.entries)[0]
        path = private.entries[sop].path
        (tmp_path / "corrected.dcm").write_bytes(path.read_bytes()[:-2] + b"zz")
        with OddDestination() as destination:
            assert store(destination, tmp_path / "state", path).verdict == "complete"
            result = store(destination, tmp_path / "state", tmp_path / "corrected.dcm", **options)
            assert (result.verdict, result.conflicts, result.completed) == ("failed", 1, 0)
            assert states(result) == {("conflict", "different_content", None): 1}
            assert destination.held() == {sop: private.dataset(sop)}
            again = store(destination, tmp_path / "state", path, **options)
            assert (again.verdict, again.skipped) == ("complete", 0 if "resume" in options else 1)

    @pytest.mark.parametrize("equal", [True, False])
    def test_over_two_associations(self, private: Holding, tmp_path: Path, equal: bool) -> None:
        """The second file of a UID waits for the answer to the first, over whichever association."""
        folder = tmp_path / "twice"
        folder.mkdir()
        entry = private.entries[sorted(private.entries)[0]]
        content = entry.path.read_bytes()
        (folder / "a.dcm").write_bytes(content)
        (folder / "b.dcm").write_bytes(content if equal else content[:-2] + b"zz")
        with OddDestination(delay=lambda number: 1.0) as destination:
            result = store(destination, tmp_path / "state", folder, associations=2)
            assert sum(destination.times.values()) == 1
            assert (result.total, result.conflicts) == (1, 0 if equal else 1)
            assert result.verdict == ("complete" if equal else "failed")

    def test_the_second_is_sent_where_the_first_is_refused(self, private: Holding, tmp_path: Path) -> None:
        folder = tmp_path / "twice"
        folder.mkdir()
        content = private.entries[sorted(private.entries)[0]].path.read_bytes()
        for name in ("a.dcm", "b.dcm"):
            (folder / name).write_bytes(content)
        with OddDestination(
            delay=lambda number: 0.5, status=lambda number: 0xC001 if number == 1 else 0
        ) as destination:
            result = store(destination, tmp_path / "state", folder, associations=2)
            assert sum(destination.times.values()) == 2
            assert (result.verdict, result.completed) == ("complete", 1)

    @pytest.mark.parametrize("refused", [0xC001, 0xA700])
    @pytest.mark.parametrize("associations", [1, 2])
    def test_each_of_two_different_ones_counts(
        self, private: Holding, tmp_path: Path, refused: int, associations: int
    ) -> None:
        """The node refuses the first, for good or for the moment, and takes the second: the first is not there."""
        folder = tmp_path / "twice"
        folder.mkdir()
        content = private.entries[sorted(private.entries)[0]].path.read_bytes()
        (folder / "a.dcm").write_bytes(content)
        (folder / "b.dcm").write_bytes(content[:-2] + b"zz")
        refusals = 1 if refused == 0xC001 else 3
        with OddDestination(
            delay=lambda number: 0.3, status=lambda number: refused if number <= refusals else 0
        ) as destination:
            result = store(destination, tmp_path / "state", folder, associations=associations)
            assert (result.verdict, result.total, result.completed) == ("failed", 1, 0)


class TestFailures:
    def test_statuses(self, private: Holding, tmp_path: Path) -> None:
        statuses = {2: 0xC001, 4: 0xB000, 6: 0xA700}
        with OddDestination(status=lambda number: statuses.get(number, 0)) as destination:
            result = store(destination, tmp_path, private.folder)
            assert (result.verdict, result.completed, result.warning, result.failed) == ("partial", 11, 1, 1)
            assert Counter(destination.times.values()) == {1: 11, 2: 1}, "what has no room is sent again"
            again = store(destination, tmp_path, private.folder)
            assert (again.verdict, again.skipped) == ("complete", 11)

    def test_strict(self, private: Holding, tmp_path: Path) -> None:
        with OddDestination(status=at(3, 0xA700)) as destination:
            result = store(destination, tmp_path, private.folder, strict_forward=True)
            assert (result.verdict, result.reason, result.completed) == ("partial", "strict_forward", 2)
            assert len(destination.stored) == 3

    def test_dies_and_comes_back(self, ct: Holding, tmp_path: Path) -> None:
        gone = threading.Event()

        def go(number: int, size: int) -> None:
            if number == 12 and not gone.is_set():
                gone.set()
                destination.go_down()
                threading.Timer(1.0, destination.come_back).start()
                raise DieError

        with OddDestination(on_data=go) as destination:
            result = store(destination, tmp_path, ct.folder)
            assert result.verdict == "complete"
            assert set(destination.times.values()) == {1}

    def test_gone_for_good(self, ct: Holding, tmp_path: Path) -> None:
        def go(number: int, size: int) -> None:
            if number == 12:
                destination.go_down()
                raise DieError

        with OddDestination(on_data=go) as destination:
            result = store(destination, tmp_path, ct.folder, retries=1)
            assert (result.verdict, result.completed) == ("partial", 11)
            assert "No connection" in result.errors[0]["error"]
            assert result.transient
        result = store(destination, tmp_path / "other", ct.folder, retries=0)
        assert (result.verdict, result.completed) == ("failed", 0)
        assert shell(destination.node, ct.folder, "--retries", 0, "--state", tmp_path / "o2").returncode == 1

    @pytest.mark.parametrize("numbers", [{0}, {4}, {0, 6, 11}])
    def test_one_on_which_the_node_breaks_off_is_given_up(
        self, private: Holding, tmp_path: Path, numbers: set[int]
    ) -> None:
        """As in a get: it is a failed row of its own, and the others are stored."""
        poison = {sorted(private.entries)[number] for number in numbers}

        class Poisoned(OddDestination):
            def _answer(self, sock: Any, context: int, pair: Any, request: Any, *rest: Any) -> None:
                if request[0x1000].rstrip(b"\0").decode() in poison:
                    raise DieError
                super()._answer(sock, context, pair, request, *rest)

        with Poisoned() as destination:
            result = store(destination, tmp_path, private.folder, retries=1)
            assert (result.verdict, result.completed, result.failed) == ("partial", 12 - len(poison), len(poison))
            assert result.transient
            rows = result.manifest[result.manifest["state"] == "failed"]
            assert set(rows["sop_instance_uid"]) == poison
            assert set(rows["reason"]) == {"destination_error"}
            assert rows["error"].notna().all()

    def test_a_node_that_breaks_off_on_everything_ends_it(self, private: Holding, tmp_path: Path) -> None:
        def die(number: int, size: int) -> None:
            raise DieError

        with OddDestination(on_data=die) as destination:
            result = store(destination, tmp_path, private.folder, retries=1)
            assert (result.verdict, result.completed, result.failed) == ("failed", 0, 12)
            assert len(destination.proposed) == 6, "three instances, each twice"

    @pytest.mark.parametrize("retries", [0, 2])
    def test_late_answers_over_two_associations(self, private: Holding, tmp_path: Path, retries: int) -> None:
        """Each instance gets its own, whichever association wakes first; none is sent again."""
        with OddDestination(delay=lambda number: 1.4 if number < 3 else 0.0) as destination:
            deadlines = Deadlines(next_object=1, idle=1)
            result = store(destination, tmp_path, private.folder, associations=2, retries=retries, deadlines=deadlines)
            assert (result.verdict, result.completed) == ("complete", 12)
            assert set(destination.times.values()) == {1}

    def test_slow_answers_are_waited_for(self, private: Holding, tmp_path: Path) -> None:
        """There is no source that would lose its patience."""
        with OddDestination(delay=at(3, 1.0, 0.0)) as destination:
            quick = Deadlines(sub_operation=0.2, stall=0.2)
            result = store(destination, tmp_path, private.folder, deadlines=quick)
            assert result.verdict == "complete"
            assert len(destination.proposed) == 1 or set(destination.times.values()) == {1}

    def test_cancel(self, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=lambda number: 0.05) as destination:
            scu = StoreScu(destination.node, manifest_root=tmp_path)
            threading.Timer(0.5, scu.cancel).start()
            result = scu.store(ct.folder)
            assert (result.verdict, result.transient) == ("cancelled", True)
            assert 0 < result.completed == len(destination.held()) < 40
            again = store(destination, tmp_path, ct.folder)
            assert (again.verdict, again.skipped) == ("complete", result.completed)

    def test_a_cancel_gives_what_is_being_sent_a_moment_however_slowly_it_is_read(self, tmp_path: Path) -> None:
        holding = hold(tmp_path / "source", big_study(tmp_path / "source", 1, 8 << 20, name="slow"))
        with OddDestination() as destination:
            scu = StoreScu(destination.node, manifest_root=tmp_path / "state", deadlines={"stall": 100.0})

            def read_slowly(number: int, size: int) -> None:
                if size > 1 << 20:
                    scu.cancel("enough")
                    destination.on_data = lambda number, size: time.sleep(0.1)

            destination.on_data = read_slowly
            began = time.monotonic()
            result = scu.store(holding.folder)
            assert time.monotonic() - began < 20, "the whole of it would take a minute"
            assert (result.verdict, result.reason, result.completed) == ("cancelled", "enough", 0)
            assert destination.held() == {}
            destination.on_data = lambda number, size: None
            assert store(destination, tmp_path / "state", holding.folder).verdict == "complete"

    def test_kill(self, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=lambda number: 0.02) as destination:
            command = [sys.executable, "-m", "airflow_dicom_get.cli", "store", destination.node, str(ct.folder),
                       "--state", str(tmp_path)]  # fmt: skip
            process = subprocess.Popen(command)
            limit = time.monotonic() + 20
            while len(destination.stored) < 15 and time.monotonic() < limit:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            result = store(destination, tmp_path, ct.folder)
            assert result.verdict == "complete"
            assert result.skipped >= 14
            assert sum(destination.times.values()) <= 41


class TestManifest:
    def retrieved(self, embedded: Embedded, holding: Holding, folder: Path, **options: Any) -> Result:
        source = embedded(holding.folder)
        scu = GetScu(f"PACS@127.0.0.1:{source.port}", out_dir=folder, **options)
        result = scu.get_study({"StudyInstanceUID": holding.study})
        assert result.verdict == "complete"
        return result

    @pytest.mark.parametrize("file_meta", [True, False])
    def test_retrieve_first_forward_later(
        self, embedded: Embedded, ct: Holding, tmp_path: Path, file_meta: bool
    ) -> None:
        got = self.retrieved(embedded, ct, tmp_path / "out", store_with_file_meta=file_meta)
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=got.manifest_uri)
            assert (result.verdict, result.completed) == ("complete", 40)
            assert destination.held() == {sop: data for sop, (_, data) in sent_by(ct).items()}
            assert states(result) == {("forwarded", None, "ok"): 40}
            frame = store(destination, tmp_path / "state2", manifest=got.manifest)
            assert frame.verdict == "complete"
            done = shell(destination.node, "--manifest", got.manifest_uri, "--state", tmp_path / "state", "--json")
            assert done.returncode == 0, done.stderr
            said = json.loads(done.stdout)
            assert (said["verdict"], said["skipped"]) == ("complete", 40)

    @pytest.mark.parametrize("how", ["address", "frame", "of a verify", "other title", "no title"])
    def test_nothing_goes_back_to_where_it_came_from(
        self, embedded: Embedded, private: Holding, tmp_path: Path, how: str
    ) -> None:
        source = embedded(private.folder)
        title = "" if how == "no title" else "PACS@"
        got = GetScu(f"{title}127.0.0.1:{source.port}", out_dir=tmp_path / "out").get_study(
            {"StudyInstanceUID": private.study}
        )
        assert got.verdict == "complete"
        manifest = got.manifest if how == "frame" else got.manifest_uri
        if how == "of a verify":
            manifest = verify(manifest).manifest_uri
        scu = StoreScu(f"{'OTHER' if how == 'other title' else 'PACS'}@localhost:{source.port}", manifest_root=tmp_path)
        asked = source.total_associations
        if how == "other title":  # another archive behind the same door
            assert scu.store(manifest=manifest).verdict == "complete"
            return
        with pytest.raises(InvalidOption, match="is the node that the manifest was retrieved from"):
            scu.store(manifest=manifest)
        assert source.total_associations == asked
        # What is no manifest says nothing of its source.
        assert scu.store(tmp_path / "out").completed == 12

    def test_objects_that_changed_since(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        got = self.retrieved(embedded, ct, tmp_path / "out")
        paths = sorted(got.manifest["uri"])
        Path(paths[0]).unlink()
        content = Path(paths[1]).read_bytes()
        Path(paths[1]).write_bytes(content[:-2] + b"zz")
        Path(paths[2]).write_bytes(content[:-2])
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=got.manifest_uri)
            assert (result.verdict, result.completed, result.failed) == ("partial", 37, 3)
            assert states(result)["failed", "size_changed", None] == 3 or result.reason == "size_changed"
            assert len(destination.held()) == 37
            assert destination.ends["aborted"] >= 1, "a digest that does not fit is seen before the last fragment"

    def test_an_object_that_changed_is_refused_also_where_it_was_sent_so(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        got = GetScu(f"PACS@127.0.0.1:{embedded(private.folder).port}", out_dir=tmp_path / "out").get_study(
            {"StudyInstanceUID": private.study}
        )
        path = Path(sorted(got.manifest["uri"])[0].removeprefix("file://"))
        path.write_bytes(path.read_bytes()[:-2] + b"zz")
        with OddDestination() as destination:
            assert store(destination, tmp_path / "state", tmp_path / "out").verdict == "complete"
            result = store(destination, tmp_path / "state", manifest=got.manifest_uri)
            assert (result.verdict, result.completed, result.skipped, result.failed) == ("partial", 11, 11, 1)
            assert states(result)["failed", "size_changed", None] == 1

    def test_each_object_that_a_manifest_names_counts(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        node = f"PACS@127.0.0.1:{embedded(private.folder).port}"
        found = [
            GetScu(node, out_dir=tmp_path / name).get_study({"StudyInstanceUID": private.study}) for name in ("a", "b")
        ]
        both = load_manifests([result.manifest_uri for result in found])
        next((tmp_path / "a").rglob("*.dcm")).unlink()
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=both)
            assert (result.verdict, result.total, result.failed) == ("partial", 12, 1)

    def test_an_object_that_was_not_begun_counts_beside_another_of_its_instance(
        self, embedded: Embedded, tmp_path: Path
    ) -> None:
        """Of two manifests that name each instance, those of the first are stored when the time is over."""
        study = big_study(tmp_path / "pacs", 6, 2000)
        pacs = embedded(tmp_path / "pacs")
        places = [tmp_path / "first", tmp_path / "second"]
        for place in places:
            scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=place)
            assert scu.get_study({"StudyInstanceUID": study}).verdict == "complete"
            last = max((tmp_path / "pacs").iterdir())
            last.write_bytes(set_elements(last.read_bytes(), {0x00081030: "CORRECTED"}))
            pacs = embedded(tmp_path / "pacs")
        both = combine_manifests(
            [next((place / "_manifests").glob("*.parquet")) for place in places], tmp_path / "both"
        )
        stored = Counter[str]()

        def wait_for_the_end(event: Any) -> None:
            stored[event.sop_instance_uid] += 1
            if stored.total() == 6:
                time.sleep(max(began + 6 - time.monotonic(), 0))

        began = time.monotonic()
        with OddDestination() as node:
            result = store(
                node, tmp_path / "state", manifest=both["manifest_uri"], deadlines=Deadlines(operation=5.0),
                on_sub_operation=wait_for_the_end, root=[str(place) for place in places],
            )  # fmt: skip
        assert len(stored) == 6, "each instance once"
        assert (result.verdict, result.reason) == ("partial", "deadline")
        assert (result.total, result.completed) == (6, 5)

    @pytest.mark.parametrize(
        ("verdict", "evidence"), [("unverified", "list"), ("partial", "none"), ("complete", "list")]
    )
    def test_what_is_stored_of_a_manifest_proves_no_more_than_it_did(
        self, embedded: Embedded, ct: Holding, tmp_path: Path, verdict: str, evidence: str
    ) -> None:
        uri = self.retrieved(embedded, ct, tmp_path / "out").manifest_uri
        assert uri is not None
        path = Path(uri.removeprefix("file://"))
        write_manifest(read_table(path), path, verdict=verdict, evidence=evidence, run="20200101T000000Z-0")
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=uri)
        assert (result.verdict, result.completed) == ("complete", 40)
        made = read_manifest(result.manifest_uri)
        assert (made.attrs["verdict"], made.attrs["evidence"]) == (verdict, evidence)

    def test_a_manifest_without_rows(self, tmp_path: Path) -> None:
        found = GetScu("X@127.0.0.1:1", out_dir=tmp_path / "out", retries=0).get_study({"StudyInstanceUID": "1.2.3"})
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=found.manifest_uri)
            assert (result.verdict, result.reason, result.exit_code) == ("failed", "nothing_asked", 1)

    def test_rows_without_an_object(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        hidden = sorted(ct.entries)[:2]
        source = embedded(ct.folder, hide=hidden)
        got = GetScu(f"PACS@127.0.0.1:{source.port}", out_dir=tmp_path / "out").get_study(
            {"StudyInstanceUID": ct.study}
        )
        assert got.completed == 38
        with OddDestination() as destination:
            result = store(destination, tmp_path / "state", manifest=got.manifest_uri)
            assert (result.verdict, result.total, result.completed, result.failed) == ("partial", 40, 38, 2)
            missing = result.manifest[result.manifest["state"] == "missing"]
            assert set(missing["sop_instance_uid"]) == set(hidden)


class TestBucket:
    def test_retrieve_to_a_bucket_and_forward_later(
        self, embedded: Embedded, moto: Moto, ct: Holding, tmp_path: Path
    ) -> None:
        place = f"s3://{BUCKET}/store-verb"
        source = embedded(ct.folder)
        scu = GetScu(f"PACS@127.0.0.1:{source.port}", destination=place, s3_config=moto.config)
        got = scu.get_study({"StudyInstanceUID": ct.study})
        assert got.verdict == "complete"
        wanted = {sop: data for sop, (_, data) in sent_by(ct).items()}
        with OddDestination() as destination:
            by_manifest = store(destination, tmp_path / "a", manifest=got.manifest_uri, s3_config=moto.config)
            assert (by_manifest.verdict, by_manifest.completed) == ("complete", 40)
            assert destination.held() == wanted
        with OddDestination() as destination:
            by_prefix = store(destination, tmp_path / "b", place, s3_config=moto.config, associations=2)
            assert (by_prefix.verdict, by_prefix.completed, by_prefix.errors) == ("complete", 40, [])
            assert destination.held() == wanted
            assert destination.peak <= 2

    def test_bucket_that_is_not_there(self, moto: Moto, tmp_path: Path) -> None:
        with pytest.raises(S3Error, match="no-such-bucket"):
            store(type("X", (), {"ae_title": "X", "port": 1}), tmp_path, "s3://no-such-bucket/x", s3_config=moto.config)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either files to store"),
            (["a", "--manifest", "m"], "give either files"),
            (["nowhere"], "'nowhere' does not exist"),
            (["dicom://h:1"], "is not a path or an s3:// address"),
            (["--manifest", "nothing.parquet"], "cannot be read"),
        ],
    )
    def test_shell(self, arguments: list[str], message: str) -> None:
        done = shell("X@127.0.0.1:1", *arguments)
        assert done.returncode == 2
        assert message in done.stderr

    def test_python(self, tmp_path: Path) -> None:
        scu = StoreScu("127.0.0.1:1", manifest_root=tmp_path)
        with pytest.raises(InvalidOption, match=r"^source and manifest are both given, or neither"):
            scu.store()
        with pytest.raises(InvalidOption, match="holds no files"):
            scu.store(tmp_path)
        with pytest.raises(ManifestError):
            scu.store(manifest=7)
        with pytest.raises(InvalidOption):
            StoreScu("127.0.0.1")
        with pytest.raises(InvalidOption):
            StoreScu("127.0.0.1:1", strict_forward="perhaps")  # type: ignore[arg-type]
