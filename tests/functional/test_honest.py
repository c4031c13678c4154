"""The truth: the exit status of the real process, and one clear line, whatever the PACS does or says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.dicom.syntaxes import UNCOMPRESSED
from airflow_dicom_get.manifest.files import read_table
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.sample_data import CT, ENHANCED_SR, PRIVATE_CLASS
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc, free_port
from tests.support.holdings import Holding

COMMAND = (sys.executable, "-m", "airflow_dicom_get.cli")
NO_RETRY = ("--retries", "0")


@dataclass
class Ended:
    """How a process ended: its exit status, the line on stdout, the lines on stderr, the rows of the manifest."""

    code: int
    line: str
    notes: list[str]
    rows: list[dict[str, Any]]

    def states(self) -> Counter[str]:
        return Counter(row["state"] for row in self.rows)

    def not_held(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["state"] not in ("stored", "held")]


Get = Callable[..., Ended]


@pytest.fixture
def get(tmp_path: Path) -> Get:
    """Run ``dicom-get get`` on a study."""
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    def run(node: str, study: str, *options: str) -> Ended:
        done = subprocess.run(
            [*COMMAND, "get", node, "--study", study, "--to", str(tmp_path / "out"), *options],
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
            check=False,
        )
        line, manifest = done.stdout.splitlines()
        rows = read_table(manifest.removeprefix("manifest: ")).to_pylist()
        assert "Traceback" not in done.stderr
        ended = Ended(done.returncode, line, done.stderr.splitlines(), rows)
        held = {row["uri"].removeprefix("file://") for row in rows if row["state"] in ("stored", "held", "unexpected")}
        assert held == {str(path) for path in (tmp_path / "out").rglob("*.dcm")}
        return ended

    return run


def node_of(server: Any) -> str:
    return f"{getattr(server, 'ae_title', None) or 'PACS'}@127.0.0.1:{server.port}"


@pytest.fixture
def peer() -> Iterator[Callable[..., MisbehavingPacs]]:
    """The scripted peer: ``peer(mode)``."""
    with ExitStack() as stack:

        def start(mode: str | None = None, **options: Any) -> MisbehavingPacs:
            return stack.enter_context(MisbehavingPacs(mode, **options))

        yield start


def assert_end(ended: Ended, code: int, verdict: str, line: str, note: str | None) -> None:
    """The exit status, the verdict with its reason and numbers, and one line of explanation where one is due."""
    assert ended.code == code, (ended.line, ended.notes)
    assert ended.line.startswith(f"{verdict}: {line}"), ended.line
    if note is None:
        assert ended.notes == []
    else:
        assert len(ended.notes) == 1, ended.notes
        assert ended.notes[0].startswith("dicom-get: ")
        assert note in ended.notes[0]
        # What to do next stands there, too.
        assert ended.notes[0].endswith(".")


# --- complete ----------------------------------------------------------------------------------------


class TestComplete:
    @pytest.mark.orthanc
    def test_orthanc(self, get: Get, orthanc: Orthanc, ct: Holding) -> None:
        ended = get(orthanc.node, ct.study)
        assert_end(ended, 0, "complete", "40 of 40 instances listed are held", None)
        assert ended.states() == {"stored": 40}

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, get: Get, dcmqrscp_all: Dcmqrscp, ct: Holding) -> None:
        ended = get(dcmqrscp_all.node, ct.study)
        assert_end(ended, 0, "complete", "40 of 40 instances listed are held", None)
        assert ended.states() == {"stored": 40}

    def test_scripted(self, get: Get, peer: Any) -> None:
        pacs = peer()
        assert_end(get(node_of(pacs), pacs.study_uid), 0, "complete", "8 of 8 instances listed are held", None)

    @pytest.mark.parametrize("mode", ["a702_all_sent", "b000_all_sent", "failed_list_lies", "counters_lie"])
    def test_whatever_the_final_status_says(self, mode: str, get: Get, peer: Any) -> None:
        """A702 and B000 are claims; that everything is there is proven."""
        pacs = peer(mode)
        assert_end(get(node_of(pacs), pacs.study_uid), 0, "complete", "8 of 8 instances listed are held", None)
        assert set(pacs.sent.values()) == {1}


# --- a private SOP class and a structured report ---------------------------------------------------------


class TestPrivateClass:
    """Twelve instances: ten CT images, a structured report, and one of a private SOP class."""

    def test_from_the_embedded_pacs_all_come(self, get: Get, embedded: Any, private: Holding) -> None:
        ended = get(node_of(embedded(private.folder)), private.study)
        assert_end(ended, 0, "complete", "12 of 12 instances listed are held", None)
        assert Counter(row["sop_class_uid"] for row in ended.rows) == {CT: 10, ENHANCED_SR: 1, PRIVATE_CLASS: 1}

    @pytest.mark.orthanc
    def test_orthanc_that_knows_the_class(self, get: Get, orthanc_mixed: Orthanc, private: Holding) -> None:
        assert_end(get(orthanc_mixed.node, private.study), 0, "complete", "12 of 12 instances listed are held", None)

    @pytest.mark.orthanc
    def test_orthanc_that_does_not_know_it(self, get: Get, orthanc: Orthanc, private: Holding) -> None:
        """It ends the whole C-GET at the first instance without a context; the other eleven must still come."""
        ended = get(orthanc.node, private.study)
        assert_end(
            ended, 3, "partial (class_refused)", "11 of 12 instances listed are held, 1 not held", "class_refused"
        )
        self.check(ended, private, "class_refused")

    @pytest.mark.dcmtk
    def test_dcmqrscp_does_not_know_it(self, get: Get, dcmqrscp: Dcmqrscp, private: Holding) -> None:
        """It tells no SOP class, so that the class is refused is not known; that one is missing is."""
        ended = get(dcmqrscp.node, private.study)
        text = "11 of 12 instances listed are held, 1 not held"
        assert_end(ended, 3, "partial (sub_operation_failed)", text, "The source ended with A702H")
        self.check(ended, private, "sub_operation_failed")

    @staticmethod
    def check(ended: Ended, private: Holding, reason: str) -> None:
        assert ended.states() == {"stored": 11, "missing": 1}
        (row,) = ended.not_held()
        assert private.entries[row["sop_instance_uid"]].sop_class == PRIVATE_CLASS
        assert row["reason"] == reason


# --- compressed instances at a PACS that takes no compressed syntax --------------------------------------


@pytest.mark.dcmtk
def test_dcmqrscp_as_it_comes_takes_no_compressed_syntax(get: Get, dcmqrscp: Dcmqrscp, ct: Holding) -> None:
    """The rows, and what the user reads, say what was offered, that none was accepted, and what to change there."""
    ended = get(dcmqrscp.node, ct.study)
    text = "It accepted none of the compressed transfer syntaxes offered (MPEG2, "
    assert_end(ended, 3, "partial (sub_operation_failed)", "26 of 40 instances listed are held, 14 not held", text)
    assert (
        "let the PACS accept that syntax from our AE title (dcmqrscp: an association profile, option -xf)"
        in " ".join(ended.notes)
    )
    rows = ended.not_held()
    compressed = {sop for sop, entry in ct.entries.items() if entry.syntax not in UNCOMPRESSED}
    assert {row["sop_instance_uid"] for row in rows} == compressed
    for row in rows:
        assert "JPEG 2000, RLE Lossless), so it cannot send an instance that it stores compressed." in row["error"]


# --- a list that is longer than what comes ---------------------------------------------------------------


class TestListedAndNotSent:
    def test_scripted(self, get: Get, peer: Any) -> None:
        pacs = peer("find_lists_more")
        ended = get(node_of(pacs), pacs.study_uid)
        assert_end(ended, 3, "partial (not_sent)", "8 of 9 instances listed are held, 1 not held", "did not send it")
        (row,) = ended.not_held()
        assert (row["state"], row["reason"], row["uri"]) == ("missing", "not_sent", None)

    def test_embedded(self, get: Get, embedded: Any, ct: Holding) -> None:
        hidden = sorted(ct.entries)[7]
        ended = get(node_of(embedded(ct.folder, hide=[hidden])), ct.study)
        assert_end(ended, 3, "partial (not_sent)", "39 of 40 instances listed are held, 1 not held", "did not send it")
        assert [row["sop_instance_uid"] for row in ended.not_held()] == [hidden]

    @pytest.mark.dcmtk
    def test_dcmqrscp_that_has_lost_a_file(self, get: Get, tmp_path: Path, private: Holding) -> None:
        images = [path for path in private.files if path.name.startswith("ct-")]
        with Dcmqrscp(tmp_path / "server") as server:
            server.register(images)
            next(server.storage.glob(f"*{images[4].name}")).unlink()
            ended = get(server.node, private.study)
        text = "9 of 10 instances listed are held, 1 not held"
        assert_end(ended, 3, "partial (sub_operation_failed)", text, "The source ended with A702H")

    @pytest.mark.orthanc
    def test_orthanc_that_has_lost_a_file(self, get: Get, tmp_path: Path, private: Holding) -> None:
        """It ends the C-GET at the file that it cannot read: the others must come all the same."""
        images = [path for path in private.files if path.name.startswith("ct-")]
        with Orthanc(tmp_path / "server", MaximumStorageCacheSize=0) as server:
            server.load(images)
            lost = images[4].read_bytes()
            held = [path for path in (tmp_path / "server" / "storage").glob("*/*/*") if path.is_file()]
            next(path for path in held if path.read_bytes() == lost).unlink()
            ended = get(server.node, private.study)
        assert_end(
            ended,
            3,
            "partial (refused_by_source)",
            "9 of 10 instances listed are held, 1 not held",
            "refused_by_source: The source answered C000H",
        )


class TestNothingSent:
    @pytest.mark.parametrize("mode", ["success_zero", "success_zero_lies"])
    def test_success_is_no_success(self, mode: str, get: Get, peer: Any) -> None:
        pacs = peer(mode)
        ended = get(node_of(pacs), pacs.study_uid)
        text = "0 of 8 instances listed are held, 8 not held"
        assert_end(ended, 1, "failed (not_sent)", text, "The source ended with 0000H (success) and did not send it")
        assert ended.states() == {"missing": 8}

    def test_of_half_of_it(self, get: Get, peer: Any) -> None:
        pacs = peer("success_partial")
        ended = get(node_of(pacs), pacs.study_uid)
        assert_end(ended, 3, "partial (not_sent)", "4 of 8 instances listed are held, 4 not held", "4 × not_sent")


# --- no list, no study, no association -----------------------------------------------------------------------


class TestNoFind:
    def test_scripted(self, get: Get, peer: Any) -> None:
        pacs = peer("no_find")
        ended = get(node_of(pacs), pacs.study_uid)
        assert_end(ended, 4, "unverified (no_list)", "8 of 8 instances sent are held", "compare with the source")

    def test_embedded(self, get: Get, embedded: Any, ct: Holding) -> None:
        ended = get(node_of(embedded(ct.folder, no_find=True)), ct.study)
        assert_end(ended, 4, "unverified (no_list)", "40 of 40 instances sent are held", "compare with the source")

    @pytest.mark.orthanc
    def test_orthanc_that_lets_nobody_ask(self, get: Get, tmp_path: Path) -> None:
        """It hangs up on the C-FIND; that this may be a matter of permission is said."""
        with Orthanc(tmp_path / "server", DicomAlwaysAllowFind=False) as server:
            ended = get(server.node, "1.2.3", *NO_RETRY)
        text = "closed it on the C-FIND request. If this persists, our AE title is probably not allowed"
        assert_end(ended, 1, "failed (association_lost)", "nothing was retrieved", text)


class TestUnknownStudy:
    TEXT = "the query matched nothing"
    NOTE = "Check the query, and whether the study is at this node"

    @pytest.mark.orthanc
    def test_orthanc(self, get: Get, orthanc: Orthanc) -> None:
        assert_end(get(orthanc.node, "1.2.3.4"), 5, "empty", self.TEXT, self.NOTE)

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, get: Get, dcmqrscp: Dcmqrscp) -> None:
        assert_end(get(dcmqrscp.node, "1.2.3.4"), 5, "empty", self.TEXT, self.NOTE)

    def test_scripted(self, get: Get, peer: Any) -> None:
        assert_end(get(node_of(peer()), "1.2.3.4"), 5, "empty", self.TEXT, self.NOTE)


class TestWrongTitle:
    NOTE = "rejected the association permanently: called AE title not recognised (calling GET-SCU, called OTHER)"

    @pytest.mark.orthanc
    def test_orthanc(self, get: Get, tmp_path: Path) -> None:
        with Orthanc(tmp_path / "server", DicomCheckCalledAet=True) as server:
            ended = get(f"OTHER@127.0.0.1:{server.port}", "1.2.3")
        assert_end(ended, 1, "failed (association_rejected)", "nothing was retrieved", self.NOTE)

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, get: Get, dcmqrscp: Dcmqrscp) -> None:
        ended = get(f"OTHER@127.0.0.1:{dcmqrscp.port}", "1.2.3")
        assert_end(ended, 1, "failed (association_rejected)", "nothing was retrieved", self.NOTE)

    def test_scripted(self, get: Get, peer: Any) -> None:
        ended = get(f"OTHER@127.0.0.1:{peer('wrong_called_ae').port}", "1.2.3")
        assert_end(ended, 1, "failed (association_rejected)", "nothing was retrieved", self.NOTE)


def test_port_closed(get: Get) -> None:
    ended = get(f"PACS@127.0.0.1:{free_port()}", "1.2.3", *NO_RETRY)
    text = "Connection refused. Check the host and the port, and that the node is running"
    assert_end(ended, 1, "failed (connect_failed)", "nothing was retrieved", text)


class TestGetNotOffered:
    """The list is there: the manifest names what is not held, and that asking again will not help."""

    NOTE = "does not offer C-GET (StudyRoot). Ask the PACS admin to enable C-GET"

    def test_scripted(self, get: Get, peer: Any) -> None:
        pacs = peer("no_get")
        self.check(get(node_of(pacs), pacs.study_uid), 8, self.NOTE)

    def test_embedded(self, get: Get, embedded: Any, private: Holding) -> None:
        self.check(get(node_of(embedded(private.folder, no_get=True)), private.study), 12, self.NOTE)

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, get: Get, tmp_path: Path, private: Holding) -> None:
        with Dcmqrscp(tmp_path / "server", options=["--disable-get"]) as server:
            server.register(private.files)
            self.check(get(server.node, private.study), 12, self.NOTE)

    @pytest.mark.orthanc
    def test_orthanc_does_not_let_us(self, get: Get, tmp_path: Path, private: Holding) -> None:
        """It accepts everything and hangs up on the C-GET."""
        with Orthanc(tmp_path / "server", DicomAlwaysAllowGet=False) as server:
            server.load(private.files)
            ended = get(server.node, private.study)
        self.check(ended, 12, "Our AE title is probably not allowed to retrieve: ask the PACS admin")

    @staticmethod
    def check(ended: Ended, count: int, note: str) -> None:
        text = f"0 of {count} instances listed are held, {count} not held"
        assert_end(ended, 1, "failed (refused_by_source)", text, note)
        assert ended.states() == {"missing": count}
        assert {row["reason"] for row in ended.rows} == {"refused_by_source"}
