"""A moody PACS within one run: it restarts, has no room for us, or drops associations now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu, clock
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc
from tests.support.holdings import Holding
from tests.support.relay import Relay

Embedded = Callable[..., EmbeddedPacs]
Relays = Callable[..., Relay]
FOUR = {"associations": 4, "max_associations": 4}


def assert_same(holding: Holding, destination: Path) -> None:
    """What lies at the destination are the data sets of the study, byte by byte."""
    found = {path.stem: path for path in destination.rglob("*.dcm")}
    assert found.keys() == holding.entries.keys()
    for sop, path in found.items():
        assert path.read_bytes().endswith(holding.dataset(sop))


class AfterSome:
    """A callback that does something once, after ``count`` instances."""

    def __init__(self, count: int, act: Callable[[], object]) -> None:
        self.count, self.act, self.seen = count, act, 0

    def __call__(self, event: Any) -> None:
        self.seen += 1
        if self.seen == self.count:
            self.act()


@pytest.mark.parametrize("options", [{}, FOUR], ids=["one", "four"])
def test_the_embedded_pacs_restarts(ct: Holding, tmp_path: Path, options: dict[str, Any]) -> None:
    with EmbeddedPacs(ct.folder) as first:
        later: list[EmbeddedPacs] = []
        threads: list[threading.Thread] = []

        def restart() -> None:
            first.stop()
            time.sleep(0.7)
            later.append(EmbeddedPacs(ct.folder, port=first.port).start())

        def begin() -> None:
            threads.append(threading.Thread(target=restart))
            threads[0].start()

        scu = GetScu(f"PACS@127.0.0.1:{first.port}", destination=tmp_path, **options)
        result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=AfterSome(7, begin))
        threads[0].join()
        sent = first.sent + later[0].sent
        later[0].stop()
    assert result.verdict == "complete"
    assert_same(ct, tmp_path)
    assert max(sent.values()) <= 2
    assert sum(times > 1 for times in sent.values()) <= options.get("associations", 1)


@pytest.mark.dcmtk
def test_dcmqrscp_restarts(ct: Holding, tmp_path: Path) -> None:
    server = Dcmqrscp(tmp_path / "pacs", sop_classes={entry.sop_class for entry in ct.entries.values()})
    server.register(ct.files)
    with server:
        _restarted(server, ct, tmp_path / "to")


@pytest.mark.orthanc
def test_orthanc_restarts(ct: Holding, tmp_path: Path) -> None:
    with Orthanc(tmp_path / "pacs") as server:
        server.load(ct.files)
        _restarted(server, ct, tmp_path / "to")


def _restarted(server: Dcmqrscp | Orthanc, ct: Holding, to: Path) -> None:
    threads: list[threading.Thread] = []

    def restart() -> None:
        port = server.port
        server.stop()
        server.start(port)

    def begin() -> None:
        threads.append(threading.Thread(target=restart))
        threads[0].start()
        time.sleep(0.05)

    with Relay("127.0.0.1", server.port) as relay:
        scu = GetScu(f"{server.ae_title}@127.0.0.1:{relay.port}", destination=to)
        result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=AfterSome(7, begin))
        threads[0].join()
    assert result.verdict == "complete", result
    assert result.associations > 3
    # As it was sent: this dcmqrscp decides for itself in which uncompressed syntax it sends.
    sent, found = relay.by_sop(), {path.stem: path for path in to.rglob("*.dcm")}
    assert found.keys() == ct.entries.keys()
    for sop, path in found.items():
        assert path.read_bytes().endswith(sent[sop].data or b"nothing")


@pytest.mark.parametrize("options", [{}, FOUR], ids=["one", "four"])
def test_no_room_for_some_seconds(ct: Holding, embedded: Embedded, tmp_path: Path, options: dict[str, Any]) -> None:
    pacs = embedded(ct.folder)

    def full() -> None:
        pacs.max_associations = 0
        for association in list(pacs._open):
            association.cut()
        threading.Timer(1.5, open_again).start()

    def open_again() -> None:
        pacs.max_associations = 10

    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, **options)
    result = scu.get_study({"StudyInstanceUID": ct.study}, on_sub_operation=AfterSome(5, full))
    assert result.verdict == "complete"
    assert_same(ct, tmp_path)
    assert max(pacs.sent.values()) <= 2


def test_no_room_before_anything_could_be_asked(ct: Holding, embedded: Embedded, tmp_path: Path) -> None:
    pacs = embedded(ct.folder, max_associations=0)
    threading.Timer(1.5, lambda: setattr(pacs, "max_associations", 10)).start()
    result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"StudyInstanceUID": ct.study})
    assert result.verdict == "complete"


def test_the_default_retries_outlast_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "sleep", sleep)
    scu = GetScu("PACS@127.0.0.1:104")
    with scu._opened_source() as source:
        assert source.cancel.reason is None
    for _ in range(50):
        begun = now[0]
        for failures in range(1, scu.options.retries + 1):
            source.back_off(failures, DicomGetError("Full."), 5)
        waited.append(now[0] - begun)
    assert min(waited) > 30
    assert max(waited) < 75
    assert len({round(x, 1) for x in waited}) > 10, "no jitter: clients would come back together"


@pytest.mark.parametrize("options", [{}, FOUR], ids=["one", "four"])
def test_fewer_associations_than_we_ask_for(
    ct: Holding, embedded: Embedded, tmp_path: Path, options: dict[str, Any]
) -> None:
    pacs = embedded(ct.folder, max_associations=2)
    result = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, **options).get_study(
        {"StudyInstanceUID": ct.study}
    )
    assert result.verdict == "complete"
    assert max(pacs.sent.values()) == 1
    assert pacs.peak_associations <= 2


def test_every_fiftieth_association_is_dropped(embedded: Embedded, relay: Relays, tmp_path: Path) -> None:
    folder = tmp_path / "pacs"
    studies = [big_study(folder / str(number), 2, 4096, name=f"night {number}") for number in range(40)]
    through = relay(embedded(folder), cut_after=[1 << 40 if n % 50 else 300 for n in range(1, 500)])
    scu = GetScu(f"PACS@127.0.0.1:{through.port}", destination=tmp_path / "to")
    result = scu.get_study({"StudyInstanceUID": studies})
    assert through.connections > 100
    assert (result.verdict, result.total, result.completed) == ("complete", 80, 80)
    assert len(result.studies) == 40
    assert all(study.verdict == "complete" for study in result.studies)


@pytest.mark.parametrize(
    ("refusal", "words"),
    [({"require_called_ae": True}, "called AE title"), ({"no_get": True}, "does not offer C-GET")],
    ids=["unknown AE title", "no C-GET"],
)
def test_what_time_does_not_mend_is_not_tried_again(
    ct: Holding, embedded: Embedded, tmp_path: Path, refusal: dict[str, bool], words: str
) -> None:
    pacs = embedded(ct.folder, **refusal)
    begun = time.monotonic()
    result = GetScu(f"WRONG@127.0.0.1:{pacs.port}", destination=tmp_path).get_study({"StudyInstanceUID": ct.study})
    assert time.monotonic() - begun < 10, "a retry would wait, and name another error in the end"
    assert result.verdict == "failed"
    assert not result.transient
    assert words in result.errors[0]["error"]
    assert result.errors[0]["hint"]
    assert pacs.total_associations <= 2
