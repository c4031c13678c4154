"""The contract of destinations on a forward to a node that does as it is told."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.config.groups import Deadlines
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import StoreOptions
from airflow_dicom_get.net.association import Association, CancelToken
from airflow_dicom_get.net.peer import Peer
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.forward import ForwardSink
from airflow_dicom_get.sinks.ledger import FolderLedgers
from tests.support.odd_destination import DieError, OddDestination
from tests.support.sink_contract import Harness, SinkContract


class ForwardHarness(Harness):
    tells_runs_apart = False

    def __init__(self, destination: OddDestination, folder: Path) -> None:
        self.destination, self.folder = destination, folder
        self._runs = itertools.count(1)
        self.opened: list[Association] = []

    def sink(self, *, read_only: bool = False, adopt: bool = False, **options: Any) -> ForwardSink:
        if adopt:
            pytest.skip("nothing to adopt")
        harness = self

        class Recorded(Peer):
            def open(self, *args: Any) -> Association:
                association = Peer.open(self, *args)
                harness.opened.append(association)
                return association

        return ForwardSink(
            Recorded(Node.parse(self.destination.node), "CALLING", "ODD", Deadlines()),
            FolderLedgers(self.folder, f"dicom://{self.destination.node}"),
            f"20260101T000000Z-{next(self._runs):08x}",
            StoreOptions.check({"addr": self.destination.node, **options}),
            cancel=CancelToken(),
        )

    holds_a_uid_twice = False

    def crash(self, sink: Any) -> None:
        for association in self.opened:
            association.close()

    def dataset(self, instance: Instance) -> bytes | None:
        return self.destination.held().get(instance.sop)

    def leftovers(self) -> list[str]:
        return [str(path) for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"]

    def break_ledger(self, study: str, line: bytes) -> None:
        folder = self.folder / ".ledger" / study
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "20250101T000000Z-00000000.jsonl").write_bytes(line)

    def failures(self) -> Sequence[tuple[str, contextlib.AbstractContextManager[Any]]]:
        def die(number: int, size: int) -> None:
            raise DieError

        return [
            ("data", self._with(on_data=die)),
            ("status", self._with(status=lambda number: 0xA700)),
            ("association", self._with(reject=lambda number: (2, 3, 2))),
            ("down", self._down()),
        ]

    @contextlib.contextmanager
    def _with(self, **hooks: Any) -> Iterator[None]:
        before = {name: getattr(self.destination, name) for name in hooks}
        for name, hook in hooks.items():
            setattr(self.destination, name, hook)
        yield
        for name, hook in before.items():
            setattr(self.destination, name, hook)

    @contextlib.contextmanager
    def _down(self) -> Iterator[None]:
        self.destination.go_down()
        yield
        self.destination.come_back()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[ForwardHarness]:
    with OddDestination(max_pdu=131072) as destination:
        made = ForwardHarness(destination, tmp_path)
        yield made
        for association in made.opened:
            association.close()


class TestForward(SinkContract):
    pass
