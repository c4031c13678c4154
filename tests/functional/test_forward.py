"""Forwards: from a PACS to another node, as the instances arrive, with the destination's answers as the proof."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.config.groups import Deadlines
from airflow_dicom_get.result import Result
from airflow_dicom_get.sinks.ledger import LedgerWriter
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import PATIENT_ID, STUDY_UID
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import PRIVATE_CLASS, big_study
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc, Storescp
from airflow_dicom_get.verify import verify
from tests.support.certificates import Authority
from tests.support.forwards import datasets, forward, sent_by, states
from tests.support.holdings import Holding, hold
from tests.support.listing_node import (
    PATIENT_ROOT,
    ListingNode,
    capped,
    cut,
    honest,
    imageless,
    miscounted,
    nameless,
    nothing,
    of_patient,
    studies_alone,
)
from tests.support.odd_destination import DieError, OddDestination, accept_only, at
from tests.support.relay import Relay

Embedded = Callable[..., EmbeddedPacs]
EXPLICIT = "1.2.840.10008.1.2.1"
RLE = "1.2.840.10008.1.2.5"
UNCOMPRESSED = ("1.2.840.10008.1.2", EXPLICIT)
QUICK = {"sub_operation": 0.6, "stall": 0.6}


class TestBytes:
    """What arrives is what the source sent."""

    def test_every_real_file_from_the_embedded_pacs(
        self, embedded: Embedded, mixed: Holding, storescp_all: Storescp, tmp_path: Path
    ) -> None:
        result = forward(embedded(mixed.folder), storescp_all, tmp_path / "state", mixed.study)
        assert (result.verdict, result.failed, result.errors) == ("complete", 0, [])
        assert result.completed == len(mixed.entries)
        assert datasets(storescp_all.received) == sent_by(mixed)
        assert states(result) == {("forwarded", None, "ok"): len(mixed.entries)}
        frame = result.manifest.set_index("sop_instance_uid")
        import hashlib

        for sop, entry in mixed.entries.items():
            row = frame.loc[sop]
            data = mixed.dataset(sop)
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
            assert (row["bytes"], row["dataset_offset"], row["dataset_bytes"]) == (len(data), 0, len(data))
            assert row["transfer_syntax_uid"] == entry.syntax
            assert row["forwarded_to"] == f"STORESCP@127.0.0.1:{storescp_all.port}"
        assert frame["uri"].isna().all()
        assert set(frame["destination"]) == {f"dicom://STORESCP@127.0.0.1:{storescp_all.port}"}

    @pytest.mark.dcmtk
    @pytest.mark.parametrize("name", ["dcmqrscp_mixed", "orthanc_mixed"])
    def test_every_real_file_from_real_pacs(
        self,
        name: str,
        request: pytest.FixtureRequest,
        relay: Callable[..., Any],
        mixed: Holding,
        storescp_all: Storescp,
        tmp_path: Path,
    ) -> None:
        server = request.getfixturevalue(name)
        line = relay(server)
        line.ae_title = server.ae_title
        result = forward(line, storescp_all, tmp_path / "state", mixed.study)
        arrived = datasets(storescp_all.received)
        sent = {sop: (x.syntax, x.data) for sop, x in line.by_sop().items() if sop in arrived}
        assert arrived == sent
        assert len(arrived) == result.completed >= 0.8 * len(mixed.entries)
        assert (result.verdict == "complete") == (result.completed == result.total)

    def test_to_an_scp_that_takes_little(
        self, embedded: Embedded, mixed: Holding, storescp: Storescp, tmp_path: Path
    ) -> None:
        """storescp by default: what it refuses is named, and nothing is converted for it."""
        result = forward(embedded(mixed.folder), storescp, tmp_path / "state", mixed.study)
        wanted = {sop: x for sop, x in sent_by(mixed).items() if x[0] in UNCOMPRESSED or x[0] == "1.2.840.10008.1.2.2"}
        assert datasets(storescp.received) == wanted
        refused = set(mixed.entries) - set(wanted)
        assert (result.verdict, result.reason) == ("partial", "destination_refused")
        assert (result.completed, result.failed) == (len(wanted), len(refused))
        frame = result.manifest.set_index("sop_instance_uid")
        failed = frame[frame["state"] == "failed"]
        assert set(failed.index) == refused
        assert set(failed["dimse_status"]) == {0x0122}
        for sop, row in failed.iterrows():
            assert row["forward_status"] == "error"
            entry = mixed.entries[str(sop)]
            assert entry.syntax in row["forward_error"]
            assert entry.sop_class in row["forward_error"]
        assert not result.transient

    @pytest.mark.dcmtk
    def test_to_dcmqrscp(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with Dcmqrscp(tmp_path / "qr", ae_title="DEST", sop_classes={"1.2.840.10008.5.1.4.1.1.2"}) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path / "state", ct.study)
            assert result.verdict == "complete"
            again = forward(embedded(ct.folder), destination, tmp_path / "state", ct.study)
            assert (again.verdict, again.skipped) == ("complete", 40), "its C-FIND lists them all"

    @pytest.mark.orthanc
    def test_to_orthanc(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with Orthanc(tmp_path / "orthanc", ae_title="DEST", unknown_classes=True) as destination:
            source = embedded(private.folder)
            result = forward(source, destination, tmp_path / "state", private.study)
            assert result.verdict == "complete"
            assert states(result) == {("forwarded", None, "ok"): 12}
            back = GetScu(destination.node, out_dir=tmp_path / "back").get_study({"StudyInstanceUID": private.study})
            assert back.verdict == "complete"
        assert datasets(tmp_path / "back") == sent_by(private)

    def test_to_the_embedded_pacs(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        (tmp_path / "dest").mkdir()
        destination = embedded(tmp_path / "dest", ae_title="DEST")
        result = forward(embedded(ct.folder), destination, tmp_path / "state", ct.study, associations=2)
        assert result.verdict == "complete"
        assert datasets(tmp_path / "dest") == sent_by(ct)
        assert destination.peak_associations <= 2

    def test_private_class_is_refused_by_storescp(
        self, embedded: Embedded, private: Holding, storescp_all: Storescp, tmp_path: Path
    ) -> None:
        result = forward(embedded(private.folder), storescp_all, tmp_path / "state", private.study)
        assert (result.verdict, result.completed, result.failed) == ("partial", 11, 1)
        (row,) = result.manifest[result.manifest["state"] == "failed"].to_dict("records")
        assert row["sop_class_uid"] == PRIVATE_CLASS

    def test_memory_is_flat(self, embedded: Embedded, tmp_path: Path) -> None:
        (tmp_path / "big").mkdir()
        study = big_study(tmp_path / "big", 2, 64 << 20)
        peak = 0

        def watch(number: int, size: int) -> None:
            nonlocal peak
            peak = max(peak, size)

        with OddDestination(on_data=watch, max_pdu=131072) as destination:
            source = embedded(tmp_path / "big")
            script = (
                "import re, sys\n"
                "from airflow_dicom_get import GetScu\n"
                "r = GetScu(sys.argv[1], destination=sys.argv[2], manifest_root=sys.argv[3])"
                ".get_study({'StudyInstanceUID': sys.argv[4]})\n"
                "print(r.verdict, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, f"127.0.0.1:{source.port}",
                 f"dicom://{destination.node}", str(tmp_path / "state"), study],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            verdict, kilobytes = done.stdout.split()
            assert verdict == "complete"
            assert int(kilobytes) < 160 * 1024
            assert peak > 64 << 20


class TestContexts:
    def test_planned_classes_go_with_the_first_association(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        with OddDestination() as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study)
            assert result.verdict == "complete"
            assert len(destination.proposed) == 1
            assert {syntax for _, syntax in destination.proposed[0]} == {EXPLICIT}
            assert len(destination.proposed[0]) == 3

    def test_new_pair_means_a_new_association_between_two_instances(
        self, embedded: Embedded, ct: Holding, tmp_path: Path
    ) -> None:
        with OddDestination() as destination:
            result = forward(embedded(ct.folder, omit_classes=True), destination, tmp_path, ct.study)
            assert result.verdict == "complete"
            assert [len(pairs) for pairs in destination.proposed] == [1, 2, 3]
            assert destination.peak == 1
            assert destination.ends["released"] == 3
            assert destination.held() == {sop: data for sop, (_, data) in sent_by(ct).items()}

    def test_refused_pair_is_asked_for_once(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(accept=accept_only(EXPLICIT)) as destination:
            source = embedded(ct.folder)
            result = forward(source, destination, tmp_path, ct.study)
            assert (result.verdict, result.reason, result.completed) == ("partial", "destination_refused", 14)
            assert len(destination.proposed) <= 3
            assert set(destination.times.values()) == {1}
            assert set(source.sent.values()) == {1}, "asking the source again does not fix it"

    def test_nothing_is_accepted(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(accept=lambda sop_class, syntax: 3) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert (result.verdict, result.reason, result.completed) == ("failed", "destination_refused", 0)
            assert not destination.stored


class TestStatuses:
    @pytest.mark.parametrize(
        ("status", "state", "reason", "forward_status", "told"),
        [
            (0xB000, "forwarded", None, "warning", 0xB000),
            (0xB007, "forwarded", None, "warning", 0xB007),
            (0x0111, "failed", "destination_refused", "error", 0xC000),
            (0xA700, "failed", "destination_error", "error", 0xA700),
            (0x0213, "failed", "destination_error", "error", 0xA700),
            (0xC001, "failed", "destination_refused", "error", 0xC001),
            (0xA900, "failed", "destination_refused", "error", 0xA900),
            (0x0124, "failed", "destination_refused", "error", 0x0124),
        ],
    )
    def test_of_one_instance(
        self,
        embedded: Embedded,
        private: Holding,
        tmp_path: Path,
        status: int,
        state: str,
        reason: str | None,
        forward_status: str,
        told: int,
    ) -> None:
        events: list[Any] = []
        with OddDestination(status=at(3, status)) as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study, events=events.append)
            good = state == "forwarded"
            assert result.verdict == ("complete" if good else "partial")
            assert result.completed == (12 if good else 11)
            assert result.warning == good
            assert states(result) == {("forwarded", None, "ok"): 11, (state, reason, forward_status): 1}
            (row,) = result.manifest[result.manifest["forward_status"] == forward_status].to_dict("records")
            assert row["dimse_status"] == told
            assert f"{status:04X}H" in row["forward_error"]
            assert len(events) == 12
            assert [e.forward_status for e in events].count(forward_status) == 1
            assert {e.forwarded_to for e in events} == {destination.node}
            assert all(e.file is None for e in events)
            assert events[-1].completed == result.completed
            assert events[-1].failed == (not good)
            assert result.transient == (reason == "destination_error")
            # The next run sends just what is not there yet.
            destination.status = lambda number: 0
            again = forward(embedded(private.folder), destination, tmp_path, private.study)
            assert (again.verdict, again.skipped) == ("complete", result.completed)
            assert sum(destination.times.values()) == (12 if good else 13)

    def test_the_source_is_told_the_failure(
        self, embedded: Embedded, relay: Callable[..., Any], private: Holding, tmp_path: Path
    ) -> None:
        """Never 0000 for an instance that the destination does not have."""
        line = relay(embedded(private.folder))
        line.ae_title = "PACS"
        with OddDestination(status=lambda number: {2: 0xA700, 4: 0xC001, 6: 0xB000}.get(number, 0)) as destination:
            forward(line, destination, tmp_path, private.study)
        answers = [
            int.from_bytes(elements[0x0900], "little")
            for direction, field, elements in line.commands
            if direction == "up" and field == 0x8001
        ]
        assert answers == [0, 0xA700, 0, 0xC001, 0, 0xB000, *[0] * 6]

    def test_everything_is_refused(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(status=lambda number: 0xA700) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert (result.verdict, result.completed, result.failed) == ("failed", 0, 40)
            assert states(result) == {("failed", "destination_error", "error"): 40}, "it goes on to the end"
            assert result.transient


class TestStrict:
    @pytest.mark.parametrize("status", [0xA700, 0xC001])
    def test_stops_at_the_first_failure(self, embedded: Embedded, ct: Holding, tmp_path: Path, status: int) -> None:
        with OddDestination(status=at(5, status)) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study, strict_forward=True)
            assert (result.verdict, result.reason) == ("partial", "strict_forward")
            assert (result.completed, len(destination.stored)) == (4, 5)
            counts = states(result)
            assert counts["forwarded", None, "ok"] == 4
            assert sum(n for (_, reason, _), n in counts.items() if reason == "strict_forward") == 35
            assert result.transient
            again = forward(embedded(ct.folder), destination, tmp_path, ct.study, strict_forward=True)
            assert (again.verdict, again.skipped) == ("complete", 4)

    def test_refused_pair(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(accept=accept_only(EXPLICIT)) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study, strict_forward=True)
            assert (result.verdict, result.reason) == ("partial", "strict_forward") or result.completed == 0
            assert result.completed < 40

    def test_warnings_do_not_stop(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(status=lambda number: 0xB000) as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study, strict_forward=True)
            assert (result.verdict, result.warning) == ("complete", 12)


class TestLost:
    def test_dies_in_the_middle_and_comes_back(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        def die_once(number: int, size: int) -> None:
            if number == 7:
                raise DieError

        with OddDestination(on_data=die_once) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert result.verdict == "complete"
            assert set(destination.times.values()) == {1}
            assert destination.held() == {sop: data for sop, (_, data) in sent_by(ct).items()}

    def test_a_success_before_the_data_is_there_is_none(self, embedded: Embedded, tmp_path: Path) -> None:
        """More data than sockets hold: it has answered before the last of them can have gone."""
        archive = tmp_path / "big"
        archive.mkdir()
        study = big_study(archive, 1, 32 << 20)
        with OddDestination() as destination:
            destination.early = True
            result = forward(embedded(archive), destination, tmp_path / "state", study, retries=0)
            assert (result.verdict, result.completed) == ("failed", 0)
            assert "before it had the whole data set" in str(result.errors[0]["error"])
            destination.early = False
            again = forward(embedded(archive), destination, tmp_path / "state", study)
            assert (again.verdict, again.skipped) == ("complete", 0)

    @pytest.mark.parametrize("verb", ["get", "store"])
    def test_a_duplicate_of_what_was_never_confirmed_is_somebody_elses(
        self, embedded: Embedded, private: Holding, tmp_path: Path, verb: str
    ) -> None:
        """The answer to the third instance is lost; sent again, the node has its UID already: of whom?"""
        lost: list[int] = []

        def status(number: int) -> int:
            if number == 3:
                lost.append(number)
                raise DieError
            return 0x0111 if number == 4 else 0

        with OddDestination(status=status) as destination:
            if verb == "get":
                result = forward(embedded(private.folder), destination, tmp_path, private.study)
            else:
                result = StoreScu(destination.node, manifest_root=tmp_path).store(private.folder)
            assert (lost, result.verdict, result.completed, result.failed) == ([3], "partial", 11, 1)
            assert not result.transient
            (row,) = result.manifest[result.manifest["state"] == "failed"].to_dict("records")
            assert row["reason"] == "destination_refused"
            assert "trust_destination" in row["forward_error"]

    def test_gone_for_a_while(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        gone = threading.Event()

        def go(number: int, size: int) -> None:
            if number == 12 and not gone.is_set():
                gone.set()
                destination.go_down()
                threading.Timer(2.0, destination.come_back).start()
                raise DieError

        with OddDestination(on_data=go) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert result.verdict == "complete"
            assert gone.is_set()
            assert set(destination.times.values()) == {1}

    def test_gone_for_good(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        def go(number: int, size: int) -> None:
            if number == 12:
                destination.go_down()
                raise DieError

        with OddDestination(on_data=go) as destination:
            source = embedded(ct.folder)
            result = forward(source, destination, tmp_path, ct.study, retries=1)
            assert (result.verdict, result.completed, result.failed) == ("partial", 11, 29)
            assert result.reason == "destination_error"
            assert "No connection" in result.errors[0]["error"]
            assert result.transient
            assert source.total_associations < 10
            destination.on_data = lambda number, size: None
            destination.come_back()
            again = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert (again.verdict, again.skipped) == ("complete", 11)
            assert set(destination.times.values()) == {1}

    def test_never_there(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination() as destination:
            pass
        result = forward(embedded(private.folder), destination, tmp_path, private.study, retries=0)
        assert (result.verdict, result.completed) == ("failed", 0)
        assert "No connection" in result.errors[0]["error"]

    def test_one_instance_kills_it(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        poison = sorted(private.entries)[4]

        def die(number: int, size: int) -> None:
            pass

        class Poisoned(OddDestination):
            def _answer(self, sock: Any, context: int, pair: Any, request: Any, *rest: Any) -> None:
                if request[0x1000].rstrip(b"\0").decode() == poison:
                    raise DieError
                super()._answer(sock, context, pair, request, *rest)

        with Poisoned(on_data=die) as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study, retries=1)
            assert (result.verdict, result.completed, result.failed) == ("partial", 11, 1)
            (row,) = result.manifest[result.manifest["state"] != "forwarded"].to_dict("records")
            assert (row["sop_instance_uid"], row["reason"]) == (poison, "destination_error")

    def test_hung_up_while_idle(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        """A destination that drops an association between two instances costs nothing but a new one."""
        dropped: list[int] = []

        class Impatient(OddDestination):
            def _answer(
                self, sock: Any, context: int, pair: Any, request: Any, data: bytes, number: int, n: int
            ) -> None:
                super()._answer(sock, context, pair, request, data, number, n)
                if number == 5:
                    dropped.append(number)
                    raise DieError

        pause = threading.Event()
        with Impatient() as destination:
            source = embedded(ct.folder, before_send=lambda sop: pause.wait(0.05))
            result = forward(source, destination, tmp_path, ct.study, retries=0)
            assert dropped == [5]
            assert result.verdict == "complete"
            assert source.total_associations == 3, "two lists and one get"

    def test_second_association_is_rejected_for_now(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(reject=at(2, (2, 3, 2), None)) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert result.verdict == "complete"
            assert destination.ends["rejected"] == 1

    def test_second_association_is_rejected_for_good(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(reject=at(2, (1, 1, 7), None)) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert result.verdict == "partial"
            assert 0 < result.completed < 40
            assert "rejected the association permanently" in result.errors[0]["error"]
            assert len(destination.proposed) == 2, "a permanent rejection is not tried again"
            again = forward(embedded(ct.folder), destination, tmp_path, ct.study)
            assert (again.verdict, again.skipped) == ("complete", result.completed)

    def test_fewer_associations_than_asked_for(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        def reject(number: int) -> tuple[int, int, int] | None:
            return (2, 3, 2) if destination.open > 1 else None

        with OddDestination(reject=reject) as destination:
            result = forward(embedded(ct.folder), destination, tmp_path, ct.study, associations=2)
            assert result.verdict == "complete"
            assert set(destination.times.values()) == {1}

    def test_no_dicom_node(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                while True:
                    try:
                        sock, _ = server.accept()
                    except OSError:
                        return
                    with sock:
                        sock.recv(65536)
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            threading.Thread(target=serve, daemon=True).start()
            destination = type("Web", (), {"ae_title": "WEB", "port": server.getsockname()[1]})
            began = time.monotonic()
            result = forward(embedded(private.folder), destination, tmp_path, private.study)
            assert result.verdict == "failed"
            assert "may not be a DICOM node" in result.errors[0]["error"]
            assert time.monotonic() - began < 3
            server.shutdown(socket.SHUT_RDWR)


class TestSourceLost:
    @pytest.mark.parametrize("mode", ["drop", "abort_mid", "reset"])
    def test_in_the_middle_of_an_instance(self, mode: str, tmp_path: Path) -> None:
        with MisbehavingPacs() as well, OddDestination() as destination:
            assert forward(well, destination, tmp_path / "well", well.study_uid).verdict == "complete"
            wanted = destination.held()
        with MisbehavingPacs(mode, victim=2) as source, OddDestination() as destination:
            result = forward(source, destination, tmp_path, source.study_uid, retries=1)
            held = destination.held()
            assert held.items() <= wanted.items(), "nothing half-stored"
            assert len(held) == result.completed
            assert destination.ends["aborted"] >= 1
            assert set(destination.times.values()) == {1}


class TestLate:
    @pytest.mark.parametrize("seconds", [0.3, 1.2, 2.5])
    def test_one_late_answer(self, embedded: Embedded, ct: Holding, tmp_path: Path, seconds: float) -> None:
        """In time: as ever. Late: the source is left, the late answer counts, the rest goes on."""
        answers: list[float] = []
        with OddDestination(delay=at(6, seconds, 0.0)) as destination:
            source = embedded(ct.folder)
            result = forward(source, destination, tmp_path, ct.study, deadlines=QUICK, events=answers.append)
            assert result.verdict == "complete"
            assert set(destination.times.values()) == {1}, "what was answered late is not sent again"
            assert source.total_associations == (3 if seconds < 0.6 else 4)
            assert len(answers) == 40

    def test_every_answer_is_late(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=lambda number: 0.4) as destination:
            deadlines = {"sub_operation": 0.2, "stall": 0.6}
            result = forward(embedded(private.folder), destination, tmp_path, private.study, deadlines=deadlines)
            assert result.verdict == "complete"
            assert set(destination.times.values()) == {1}
            assert destination.peak == 1

    def test_answer_that_never_comes(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=at(3, 30.0, 0.0)) as destination:
            deadlines = {**QUICK, "next_object": 1.0}
            result = forward(embedded(private.folder), destination, tmp_path, private.study, deadlines=deadlines)
            assert (result.verdict, result.completed, result.failed) == ("partial", 11, 1)
            (row,) = result.manifest[result.manifest["state"] != "forwarded"].to_dict("records")
            assert row["reason"] == "destination_error"
            assert "did not answer" in row["error"]

    @pytest.mark.parametrize("begun", [b"", b"\x04", "nothing, on and on"])
    @pytest.mark.parametrize("retries", [0, 3])
    def test_a_cancel_is_heard_while_a_late_answer_is_waited_for(
        self, embedded: Embedded, private: Holding, tmp_path: Path, begun: bytes | str, retries: int
    ) -> None:
        """Also where one byte of it has come: `idle` is as long as Airflow gives a task between SIGTERM and SIGKILL.

        Or where fragments come that hold nothing of it, without end.
        """
        heard: list[float] = []

        class Begins(OddDestination):
            def _answer(self, sock: socket.socket, *given: Any) -> None:
                if given[-2] == 3:
                    time.sleep(2.0)  # the source is given up meanwhile
                    if isinstance(begun, bytes):
                        sock.sendall(begun)
                        time.sleep(0.3)
                    heard.append(time.monotonic())
                    scu.cancel("SIGTERM")
                    empty = struct.pack(">BBLLBB", 4, 0, 6, 2, given[0], 1) * 5000
                    while time.monotonic() < heard[0] + 30.0:
                        if isinstance(begun, bytes):
                            time.sleep(0.1)
                        else:
                            sock.sendall(empty)
                super()._answer(sock, *given)

        with Begins() as destination:
            source = embedded(private.folder)
            scu = GetScu(
                f"{source.ae_title}@127.0.0.1:{source.port}", destination=f"dicom://{destination.node}",
                manifest_root=tmp_path, deadlines=QUICK, retries=retries,
            )  # fmt: skip
            result = scu.get_study({"StudyInstanceUID": private.study})
            assert time.monotonic() - heard[0] < 15, "and not idle, a minute"
        assert (result.verdict, result.reason) == ("cancelled", "SIGTERM")
        assert result.completed >= 2

    def test_late_refusal(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=at(3, 1.2, 0.0), status=at(3, 0xC001)) as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study, deadlines=QUICK)
            assert (result.verdict, result.completed, result.failed) == ("partial", 11, 1)
            assert states(result)["failed", "destination_refused", "error"] == 1
            assert set(destination.times.values()) == {1}

    def test_the_source_is_never_answered_late(
        self, embedded: Embedded, relay: Callable[..., Any], private: Holding, tmp_path: Path
    ) -> None:
        line = relay(embedded(private.folder))
        line.ae_title = "PACS"
        with OddDestination(delay=at(3, 1.5, 0.0)) as destination:
            result = forward(line, destination, tmp_path, private.study, deadlines=QUICK)
            assert result.verdict == "complete"
        asked = [sent.sop for sent in line.sent]
        answered = [
            elements[0x1000].rstrip(b"\0").decode()
            for direction, field, elements in line.commands
            if direction == "up" and field == 0x8001
        ]
        assert asked.count(asked[2]) == 1
        assert answered == [sop for sop in asked if sop != asked[2]]

    def test_destination_that_stops_reading(self, embedded: Embedded, tmp_path: Path) -> None:
        """The source is left unread for no longer than the deadline; the instance is sent again."""
        (tmp_path / "big").mkdir()
        study = big_study(tmp_path / "big", 3, 16 << 20)
        stopped: list[int] = []

        def stop(number: int, size: int) -> None:
            if number == 2 and not stopped and size > 1 << 20:
                stopped.append(number)
                time.sleep(2.0)

        with OddDestination(on_data=stop) as destination:
            result = forward(embedded(tmp_path / "big"), destination, tmp_path / "state", study, deadlines=QUICK)
            assert stopped
            assert result.verdict == "complete"
            assert len(destination.held()) == 3

    def test_association_that_is_answered_late(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        def slow(number: int) -> None:
            if number == 1:
                time.sleep(1.0)

        with OddDestination(reject=slow) as destination:
            result = forward(embedded(private.folder), destination, tmp_path, private.study, deadlines=QUICK)
            assert result.verdict == "complete"
            assert len(destination.proposed) == 2


class TestResume:
    def test_what_our_records_say_is_not_sent_again(
        self, embedded: Embedded, ct: Holding, storescp_all: Storescp, tmp_path: Path
    ) -> None:
        first = forward(embedded(ct.folder), storescp_all, tmp_path, ct.study)
        source = embedded(ct.folder)
        second = forward(source, storescp_all, tmp_path, ct.study)
        assert (first.verdict, second.verdict, second.skipped) == ("complete", "complete", 40)
        assert not source.sent
        assert set(second.manifest["state"]) == {"held"}
        assert set(second.manifest["forwarded_to"]) == {storescp_all.node}
        assert list(second.manifest["sha256"].sort_values()) == list(first.manifest["sha256"].sort_values())
        third = forward(embedded(ct.folder), storescp_all, tmp_path, ct.study, resume=False)
        assert (third.verdict, third.skipped) == ("complete", 0)

    def test_records_of_one_destination_say_nothing_of_another(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        with OddDestination() as one, OddDestination() as other:
            for destination in (one, other):
                result = forward(embedded(private.folder), destination, tmp_path, private.study)
                assert (result.verdict, result.skipped, len(destination.held())) == ("complete", 0, 12)
            folder = GetScu(
                f"PACS@127.0.0.1:{embedded(private.folder).port}", out_dir=tmp_path / "out", manifest_root=tmp_path
            ).get_study({"StudyInstanceUID": private.study})
            assert (folder.verdict, folder.skipped) == ("complete", 0)

    def test_what_the_destination_does_not_list_any_more_is_sent_again(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        (tmp_path / "dest").mkdir()
        destination = embedded(tmp_path / "dest", ae_title="DEST")
        assert forward(embedded(private.folder), destination, tmp_path / "state", private.study).verdict == "complete"
        held = hold(tmp_path / "dest")
        for sop in sorted(held.entries)[:3]:
            held.entries[sop].path.unlink()
        emptied = embedded(tmp_path / "dest", ae_title="DEST", port=0)
        port = destination.port
        destination.stop()
        renewed = embedded(tmp_path / "dest", ae_title="DEST", port=port)
        result = forward(embedded(private.folder), renewed, tmp_path / "state", private.study)
        assert (result.verdict, result.skipped) == ("complete", 9)
        assert emptied.total_associations == 0

    def test_a_node_that_tells_no_series_holds_one_of_a_uid(self, tmp_path: Path) -> None:
        """It ignores the key of the series, and names none: one UID in two series of the source is there once."""
        with MisbehavingPacs(series=2, instances=2) as source, ListingNode(nameless) as destination:
            instances = source._site.instances
            assert instances[0].series != instances[2].series
            instances[2] = replace(instances[2], sop=instances[0].sop)
            for _ in range(3):
                result = forward(source, destination, tmp_path, STUDY_UID)
                assert len(destination.held) == 3
                assert (result.verdict, result.total, result.completed, result.conflicts) == ("partial", 4, 3, 1)
            compared = verify(result.manifest_uri, destination=f"dicom://LISTS@127.0.0.1:{destination.port}")
            assert compared.exit_code == 3

    @pytest.mark.parametrize("lists", [nothing, cut])
    @pytest.mark.parametrize("checksum", ["sha256", None])
    def test_our_records_tell_a_duplicate_whatever_the_node_lists(
        self, tmp_path: Path, lists: Any, checksum: Any
    ) -> None:
        """It lists too little and refuses what it has: sent again, its 0111 is of what it confirmed to us before."""
        with MisbehavingPacs(series=1, instances=3) as source, ListingNode(lists, duplicate=0x0111) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID, checksum=checksum).verdict == "complete"
            for _ in range(2):
                result = forward(source, destination, tmp_path, STUDY_UID, checksum=checksum)
                assert (result.verdict, result.completed) == ("complete", 3)
            assert result.warning == 3 - result.skipped > 0
            if checksum is not None:  # without, the size alone tells
                source._site.instances[2] = replace(source._site.instances[2], salt=3)
                other = forward(source, destination, tmp_path, STUDY_UID)
                assert (other.verdict, other.completed) == ("partial", 2), "a duplicate of what was never sent there"

    @pytest.mark.parametrize(
        ("lists", "instances"), [(capped, 103), (imageless, 3), (studies_alone, 3), (miscounted, 3)]
    )
    def test_what_a_list_lacks_that_is_not_whole_is_not_replaced(
        self, tmp_path: Path, lists: Any, instances: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Cut at a round number, nothing below what is listed, or a count above it: that proves nothing to be gone."""
        with MisbehavingPacs(series=1, instances=instances) as source, ListingNode(lists) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            held = dict(destination.held)
            last = list(held)[-1]
            source._site.instances[:] = [replace(x, salt=3) if x.sop == last else x for x in source._site.instances]
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.conflicts, result.failed) == ("partial", 1, 1)
            assert destination.held == held
        assert "its answers do not prove that they are gone: they are sent again" in caplog.text

    def test_a_node_that_breaks_off_above_its_list_of_instances_costs_nothing(self, tmp_path: Path) -> None:
        class BreaksOff(ListingNode):
            def _find(self, event: Any) -> Any:
                if breaks and event.identifier.QueryRetrieveLevel != "IMAGE":
                    event.assoc.abort()
                    return
                yield from super()._find(event)

        breaks = False
        with MisbehavingPacs(series=1, instances=3) as source, BreaksOff(honest) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            del destination.held[next(iter(destination.held))]
            breaks = True
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.skipped, len(destination.held)) == ("complete", 2, 3)

    def test_what_a_whole_list_lacks_may_be_replaced(self, tmp_path: Path) -> None:
        """It was deleted there, so that the corrected one may come: of one instance, and of a whole study."""
        with MisbehavingPacs(series=1, instances=3) as source, ListingNode(honest) as destination:
            for gone in (1, 3):
                assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
                for number, sop in enumerate(list(destination.held)[:gone]):
                    del destination.held[sop]
                    at = next(n for n, x in enumerate(source._site.instances) if x.sop == sop)
                    source._site.instances[at] = replace(source._site.instances[at], salt=10 * gone + number)
                result = forward(source, destination, tmp_path, STUDY_UID)
                assert (result.verdict, result.completed, result.skipped) == ("complete", 3, 3 - gone)
                assert {sop: data for sop, (_, _, data) in destination.held.items()} == {
                    sop: source.dataset(sop) for sop in source.uids
                }

    @pytest.mark.parametrize("refuses", [0x0000, 0xA900])
    @pytest.mark.parametrize(
        ("patient", "needed"), [(PATIENT_ID, True), ("ANOTHER", False), ("ANOTHER", True)], ids=str
    )
    def test_a_node_that_offers_patient_root_alone(
        self, tmp_path: Path, patient: str, needed: bool, refuses: int
    ) -> None:
        """It is asked with the Patient ID of the source, or its own; what it does not list it may yet have."""
        rows = of_patient(patient, needed=needed)
        with (
            MisbehavingPacs(series=2, instances=2) as source,
            ListingNode(rows, model=PATIENT_ROOT, refuses=refuses) as destination,
        ):
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            known = patient == PATIENT_ID or (not needed and not refuses)
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.skipped) == ("complete", 4 if known else 0)
            content = {sop: data for sop, (_, _, data) in destination.held.items()}
            folder = tmp_path / "files"
            GetScu(f"127.0.0.1:{source.port}", destination=folder).get_study({"StudyInstanceUID": STUDY_UID})
            node = f"{destination.ae_title}@127.0.0.1:{destination.port}"
            stored = StoreScu(node, manifest_root=tmp_path).store(folder)
            assert (stored.verdict, stored.skipped) == ("complete", 4 if known else 0)
            verified = verify(study=STUDY_UID, destination=f"dicom://{node}", manifest_root=tmp_path)
            assert verified.exit_code == (0 if not needed and not refuses else 4)
            source._site.instances[:] = [replace(x, salt=3) for x in source._site.instances]
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.conflicts) == (("complete", 0) if known else ("partial", 4))
            assert {sop: data for sop, (_, _, data) in destination.held.items()} == content

    @pytest.mark.parametrize("to", ["1.2.99", "", "told of several"])
    def test_what_a_node_lists_in_another_series_is_not_replaced(self, tmp_path: Path, to: str) -> None:
        """Its admin has moved it: to a series that we never sent there, or to one of ours; or no row names a series."""
        with MisbehavingPacs(series=2, instances=3) as source, ListingNode(honest) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            sop, (study, series, content) = next(iter(destination.held.items()))
            other = to or next(x for _, x, _ in destination.held.values() if x != series)
            if to == "told of several":
                destination._rows = nameless
            else:
                destination.held[sop] = (study, other, content)
            held = dict(destination.held)
            source._site.instances[:] = [replace(x, salt=3) if x.sop == sop else x for x in source._site.instances]
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.conflicts, result.failed) == ("partial", 1, 1)
            assert destination.held == held
            source._site.instances[:] = [
                replace(x, series="1.2.98") if x.sop == sop else x for x in source._site.instances
            ]
            third = forward(source, destination, tmp_path, STUDY_UID)
            assert (third.verdict, third.conflicts) == ("partial", 1), "nor by one of a third series"
            assert destination.held[sop] == held[sop]

    @pytest.mark.parametrize("to", ["1.2.99", ""])
    def test_what_was_moved_to_another_series_at_both_ends_is_no_conflict(self, tmp_path: Path, to: str) -> None:
        with MisbehavingPacs(series=2, instances=3) as source, ListingNode(honest) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            sop, (study, series, content) = next(iter(destination.held.items()))
            other = to or next(x for _, x, _ in destination.held.values() if x != series)
            destination.held[sop] = (study, other, content)
            source._site.instances[:] = [
                replace(x, series=other) if x.sop == sop else x for x in source._site.instances
            ]
            for _ in range(2):
                result = forward(source, destination, tmp_path, STUDY_UID)
                assert (result.verdict, result.completed, result.conflicts) == ("complete", 6, 0)

    def test_a_series_that_does_not_tell_its_instances_may_hold_what_is_not_listed(self, tmp_path: Path) -> None:
        def refuses(held: Any, wanted: Any) -> Any:
            rows = honest(held, wanted)
            if wanted.QueryRetrieveLevel == "IMAGE" and wanted.SeriesInstanceUID == "1.2.99":
                return iter(())
            return rows

        with MisbehavingPacs(series=1, instances=3) as source, ListingNode(refuses) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            sop, (study, _, content) = next(iter(destination.held.items()))
            destination.held[sop] = (study, "1.2.99", content)
            source._site.instances[:] = [replace(x, salt=3) if x.sop == sop else x for x in source._site.instances]
            result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.conflicts) == ("partial", 1)
            assert destination.held[sop] == (study, "1.2.99", content)

    @pytest.mark.parametrize("again", [0x0000, 0x0111])
    def test_what_was_deleted_and_came_corrected_stays(self, tmp_path: Path, again: int) -> None:
        """The record of the first one has ended: it is no leave to put it back, and a duplicate is none of it."""
        with MisbehavingPacs(series=1, instances=2) as source, ListingNode(honest, duplicate=again) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            old = source._site.instances[0]
            del destination.held[old.sop]
            source._site.instances[0] = replace(old, salt=3)
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            held = dict(destination.held)
            same = forward(source, destination, tmp_path, STUDY_UID, resume=False)
            assert (same.verdict, same.completed, same.warning) == ("complete", 2, 2 if again else 0)
            source._site.instances[0] = old
            result = forward(source, destination, tmp_path, STUDY_UID, resume=False)
            assert (result.verdict, result.conflicts, result.completed) == ("partial", 1, 1)
            assert destination.held == held

    def test_nothing_goes_whose_forerunner_cannot_be_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two records that contradict each other tell nothing: if the first cannot be ended, the other is not sent."""
        with MisbehavingPacs(series=1, instances=2) as source, ListingNode(honest) as destination:
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"
            old = source._site.instances[0]
            del destination.held[old.sop]
            source._site.instances[0] = replace(old, salt=3)

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with monkeypatch.context() as patch:
                patch.setattr(LedgerWriter, "dropped", full)
                result = forward(source, destination, tmp_path, STUDY_UID)
            assert (result.verdict, result.reason, result.transient) == ("partial", "destination_error", True)
            assert old.sop not in destination.held
            assert forward(source, destination, tmp_path, STUDY_UID).verdict == "complete"

    def test_verify_tells_what_a_node_gave_up_for_another_study(self, tmp_path: Path) -> None:
        """Our records of a node are by study, so two runs do not see it: it holds one of a UID, and took the later."""
        with MisbehavingPacs(series=1, instances=2) as source, ListingNode(honest) as destination:
            first = forward(source, destination, tmp_path, STUDY_UID)
            where = f"dicom://LISTS@127.0.0.1:{destination.port}"
            assert verify(first.manifest_uri, destination=where).exit_code == 0
            moved = f"{STUDY_UID}.1"
            source._site.instances[0] = replace(source._site.instances[0], study=moved, series=f"{moved}.1")
            assert forward(source, destination, tmp_path, moved).verdict == "complete"
            assert verify(first.manifest_uri, destination=where).exit_code == 3

    def test_resume_false_alone_replaces_nothing(self, tmp_path: Path) -> None:
        """Also where the destination is not asked what it holds: a different data set is never sent whole."""
        (tmp_path / "dest").mkdir()
        with EmbeddedPacs(tmp_path / "dest") as destination, MisbehavingPacs(series=1, instances=2) as source:
            assert forward(source, destination, tmp_path / "state", STUDY_UID).verdict == "complete"
            first = {sop: source.dataset(sop) for sop in source.uids}
            source._site.instances[0] = replace(source._site.instances[0], salt=3)
            result = forward(source, destination, tmp_path / "state", STUDY_UID, resume=False)
            assert (result.verdict, result.conflicts, result.completed, result.skipped) == ("partial", 1, 1, 0)
            assert states(result) == {("conflict", "different_content", None): 1, ("forwarded", None, "ok"): 1}
            held = hold(tmp_path / "dest")
            assert {sop: held.dataset(sop) for sop in held.entries} == first

    @pytest.mark.parametrize("status", ["0xA700", "0xC001"])
    def test_a_list_that_is_offered_and_not_given_confirms_nothing(self, tmp_path: Path, status: str) -> None:
        (tmp_path / "dest").mkdir()
        with MisbehavingPacs(series=1, instances=3) as source:
            with EmbeddedPacs(tmp_path / "dest", ae_title="DEST") as destination:
                assert forward(source, destination, tmp_path / "state", STUDY_UID).verdict == "complete"
                port = destination.port
            with MisbehavingPacs("find_fails", param=status, port=port):
                emptied = SimpleNamespace(ae_title="DEST", port=port)
                result = forward(source, emptied, tmp_path / "state", STUDY_UID, retries=0)
        assert (result.verdict, result.completed, result.skipped) == ("failed", 0, 0)

    @pytest.mark.parametrize("how", ["closed", "rejected"])
    def test_a_destination_that_cannot_be_reached_confirms_nothing(
        self, embedded: Embedded, private: Holding, tmp_path: Path, how: str
    ) -> None:
        """Our records are of another day. Nothing is fetched from the source that could not be sent on."""
        source = embedded(private.folder)
        with OddDestination() as destination:
            assert forward(source, destination, tmp_path, private.study).verdict == "complete"
            source.sent.clear()
            if how == "closed":
                destination.go_down()
            else:
                destination.reject = lambda number: (1, 1, 7)
            gone = forward(source, destination, tmp_path, private.study, retries=0)
            assert (gone.verdict, gone.total, gone.completed, gone.skipped) == ("failed", 12, 0, 0)
            assert set(gone.manifest["reason"]) == {"destination_error"}
            assert gone.transient == (how == "closed")
            assert not source.sent
            if how == "closed":
                destination.come_back()
            destination.reject = lambda number: None
            again = forward(source, destination, tmp_path, private.study)
            assert (again.verdict, again.skipped) == ("complete", 12)

    def test_a_destination_that_comes_back_in_time_is_asked_again(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        source = embedded(private.folder)
        with OddDestination() as destination:
            assert forward(source, destination, tmp_path, private.study).verdict == "complete"
            seen = len(destination.proposed)
            destination.reject = lambda number: (2, 3, 2) if number <= seen + 1 else None
            again = forward(source, destination, tmp_path, private.study)
            assert (again.verdict, again.skipped) == ("complete", 12)

    def test_trust_destination(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        """What it lists counts only if it is trusted: it may be other content under the same UIDs."""
        destination = embedded(private.folder, ae_title="DEST")
        source = embedded(private.folder)
        trusted = forward(source, destination, tmp_path / "one", private.study, trust_destination=True)
        assert (trusted.verdict, trusted.skipped) == ("complete", 12)
        assert not source.sent
        assert trusted.manifest["bytes"].isna().all()
        with OddDestination() as blank:
            plain = forward(source, blank, tmp_path / "two", private.study, trust_destination=True)
            assert (plain.verdict, plain.skipped, len(blank.held())) == ("complete", 0, 12)

    @pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "2"))))
    @pytest.mark.parametrize("to", ["odd", pytest.param("storescp", marks=pytest.mark.dcmtk)])
    def test_kill(
        self,
        to: str,
        seed: int,
        request: pytest.FixtureRequest,
        embedded: Embedded,
        relay: Callable[..., Relay],
        ct: Holding,
        tmp_path: Path,
    ) -> None:
        """kill -9 at a random moment: the resume completes, and at most one instance goes twice."""
        rng = random.Random(f"{os.environ.get('KILL_SEED', '1')} {to} {seed}")
        with OddDestination(delay=lambda number: 0.01) as odd:
            target: Any = odd if to == "odd" else request.getfixturevalue("storescp_all")
            line: Any = relay(target, latency=0.002)
            line.ae_title = target.ae_title

            def began() -> Counter[str]:
                return Counter(
                    elements[0x1000].decode().strip("\0 ")
                    for direction, kind, elements in list(line.commands)
                    if (direction, kind) == ("up", 0x0001)
                )

            def arrived() -> dict[str, bytes]:
                if target is odd:
                    return odd.held()
                return {sop: data for sop, (_, data) in datasets(target.received).items()}

            source = embedded(ct.folder)
            script = (
                "import sys\nfrom airflow_dicom_get import GetScu\n"
                "GetScu(sys.argv[1], destination=sys.argv[2], manifest_root=sys.argv[3])"
                ".get_study({'StudyInstanceUID': sys.argv[4]})\n"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", script, f"127.0.0.1:{source.port}",
                 f"dicom://{target.ae_title}@127.0.0.1:{line.port}", str(tmp_path), ct.study]
            )  # fmt: skip
            limit = time.monotonic() + 20
            wanted = rng.randrange(36)
            while began().total() < wanted and time.monotonic() < limit:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.02)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it was over before"
            passed = -1
            while passed != line.up:  # what was under way
                passed = line.up
                time.sleep(0.05)
            before = arrived()
            sent = {sop: data for sop, (_, data) in sent_by(ct).items()}
            assert before == {sop: sent[sop] for sop in before}, "whole or not there"
            first = began()
            result = forward(source, line, tmp_path, ct.study)
            assert result.verdict == "complete"
            assert result.skipped >= len(before) - 1
            again = [sop for sop, times in began().items() if times > 1]
            print(f"{to}: killed with {len(first)} begun, {len(before)} there, {len(again)} sent again")
            assert len(again) <= 1
            assert set(began().values()) <= {1, 2}
            assert arrived() == sent


class TestSink:
    def test_duplicates_stay_as_they_were_first(self, tmp_path: Path) -> None:
        for mode, conflicts in (("dup_same", False), ("dup_diff", True)):
            with MisbehavingPacs(mode) as source, OddDestination() as destination:
                result = forward(source, destination, tmp_path / mode, source.study_uid)
                assert bool(result.conflicts) == conflicts
                assert set(destination.times.values()) == {1}, "the second is never sent on"

    def test_two_studies_with_an_instance_of_one_uid(
        self, embedded: Embedded, private: Holding, tmp_path: Path
    ) -> None:
        shutil.copytree(private.folder, tmp_path / "both" / "first")
        path = next(p for p in sorted((tmp_path / "both").rglob("*")) if p.is_file())
        twin = pydicom.dcmread(path)
        twin.StudyInstanceUID, twin.SeriesInstanceUID = f"{private.study}.1", f"{private.study}.2"
        twin.save_as(tmp_path / "both" / "twin.dcm")
        source = embedded(tmp_path / "both")
        query = {"StudyInstanceUID": [private.study, twin.StudyInstanceUID]}
        with OddDestination() as destination:
            scu = GetScu(f"127.0.0.1:{source.port}", destination=f"dicom://{destination.node}", manifest_root=tmp_path)
            result = scu.get_study(query)
            assert {n.verdict for n in result.studies} == {"complete", "partial"}
            assert (result.verdict, result.conflicts) == ("partial", 1)
            assert set(destination.times.values()) == {1}, "the node keeps what it confirmed first"

    def test_limits_of_both_nodes(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination() as destination:
            source = embedded(ct.folder)
            result = forward(source, destination, tmp_path, ct.study, associations=2)
            assert result.verdict == "complete"
            assert destination.peak <= 2
            assert source.peak_associations <= 2

    def test_questions_count_against_the_limit_of_the_destination(
        self, embedded: Embedded, ct: Holding, private: Holding, tmp_path: Path
    ) -> None:
        both = tmp_path / "both"
        shutil.copytree(ct.folder, both / "ct")
        shutil.copytree(private.folder, both / "private")
        source = embedded(both)
        query = {"StudyInstanceUID": [ct.study, private.study]}
        with OddDestination(status=lambda number: 0xC001 if number in (3, 45) else 0) as destination:
            scu = GetScu(f"127.0.0.1:{source.port}", destination=f"dicom://{destination.node}", manifest_root=tmp_path)
            first = scu.get_study(query)
            assert (first.verdict, first.completed, len(first.studies)) == ("partial", 50, 2)
            destination.status = lambda number: 0
            second = scu.get_study(query)
            assert (second.verdict, second.skipped) == ("complete", 50)
            assert destination.peak == 1

    def test_seed_form(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(ae_title="OTHER") as destination:
            source = embedded(private.folder)
            result = GetScu(
                f"127.0.0.1:{source.port}",
                storage_backend="Forward",
                forward_target={"addr": f"127.0.0.1:{destination.port}", "called_ae_title": "OTHER"},
                manifest_root=tmp_path,
            ).get_study({"StudyInstanceUID": private.study})
            assert result.verdict == "complete"
            assert result.manifest["forwarded_to"].iloc[0] == f"OTHER@127.0.0.1:{destination.port}"

    def test_tls(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        (tmp_path / "ca").mkdir()
        (tmp_path / "dest").mkdir()
        authority = Authority(tmp_path / "ca", "authority")
        pair = authority.issue("destination")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pair.cert, pair.key)
        destination = embedded(tmp_path / "dest", ae_title="DEST", ssl_context=context)
        source = embedded(private.folder)

        def run(tls: dict[str, Any] | None) -> Result:
            target = {"addr": f"DEST@127.0.0.1:{destination.port}", "tls": tls}
            return GetScu(
                f"127.0.0.1:{source.port}", storage_backend="Forward", forward_target=target,
                manifest_root=tmp_path / "state", retries=0, deadlines=Deadlines(stall=4),
            ).get_study({"StudyInstanceUID": private.study})  # fmt: skip

        assert run({"ca": authority.ca}).verdict == "complete"
        assert datasets(tmp_path / "dest") == sent_by(private)
        (tmp_path / "state").rename(tmp_path / "before")
        untrusted = run({})
        assert (untrusted.verdict, untrusted.completed) == ("failed", 0)
        assert "certificate" in untrusted.errors[0]["error"]

    def test_state_goes_to_the_users_state_folder(
        self, embedded: Embedded, private: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
        with OddDestination() as destination:
            source = embedded(private.folder)
            scu = GetScu(f"127.0.0.1:{source.port}", destination=f"dicom://{destination.node}")
            result = scu.get_study({"StudyInstanceUID": private.study})
        assert result.verdict == "complete"
        folder = tmp_path / "xdg" / "dicom-get"
        assert [path.parent for path in folder.glob("*.parquet")] == [folder]
        assert list(folder.glob(f".ledger/{private.study}/*.jsonl"))

    def test_cancel(self, embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
        with OddDestination(delay=lambda number: 0.05) as destination:
            source = embedded(ct.folder)
            scu = GetScu(f"127.0.0.1:{source.port}", destination=f"dicom://{destination.node}", manifest_root=tmp_path)
            threading.Timer(0.5, scu.cancel).start()
            result = scu.get_study({"StudyInstanceUID": ct.study})
            assert result.verdict == "cancelled"
            assert 0 < result.completed < 40
            assert len(destination.held()) == result.completed

    def test_shell(self, embedded: Embedded, private: Holding, tmp_path: Path) -> None:
        with OddDestination(status=at(2, 0xC001)) as destination:
            source = embedded(private.folder)
            command = [
                sys.executable, "-m", "airflow_dicom_get.cli", "get", f"PACS@127.0.0.1:{source.port}",
                "--study", private.study, "--to", f"dicom://{destination.node}", "--state", str(tmp_path / "s"),
                "--forward-calling-ae", "RELAY",
            ]  # fmt: skip
            done = subprocess.run([*command, "--strict-forward"], capture_output=True, text=True, timeout=60)
            assert done.returncode == 3, done.stderr
            assert "partial (strict_forward)" in done.stdout
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout.split(":")[0]) == (0, "complete"), done.stderr
