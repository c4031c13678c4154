"""The contract of destinations on a folder."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from airflow_dicom_get.dicom.part10 import read_file_meta
from airflow_dicom_get.records import Instance
from airflow_dicom_get.sinks.filesystem import FilesystemSink
from airflow_dicom_get.sinks.ledger import OWN, FolderLedgers
from tests.support.sink_contract import Harness, SinkContract, written


class FolderHarness(Harness):
    def __init__(self, folder: Path) -> None:
        self.root = folder / "out"
        self.ledgers = folder / "out" / "_manifests"
        self._runs = itertools.count(1)

    def sink(self, *, read_only: bool = False, **options: Any) -> FilesystemSink:
        return FilesystemSink(
            self.root,
            FolderLedgers(self.ledgers, OWN),
            f"20260101T000000Z-{next(self._runs):08x}",
            written(**options),
            read_only=read_only,
        )

    def crash(self, sink: Any) -> None:
        # A dead process holds no lock and syncs nothing more.
        sink.close()

    def _path(self, instance: Instance) -> Path:
        return self.root / instance.study / instance.series / f"{instance.sop}.dcm"

    def content(self, instance: Instance) -> bytes:
        return self._path(instance).read_bytes()

    def dataset(self, instance: Instance) -> bytes | None:
        if not self._path(instance).exists():
            return None
        content = self.content(instance)
        meta = read_file_meta(content)
        assert meta is not None
        return content[meta.dataset_offset :]

    def leftovers(self) -> list[str]:
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return [str(path) for path in files if path.suffix not in (".dcm", ".jsonl") or path.name.startswith(".")]

    def tamper(self, instance: Instance, content: bytes) -> None:
        self._path(instance).write_bytes(content)

    def break_ledger(self, study: str, line: bytes) -> None:
        folder = self.ledgers / ".ledger" / study
        folder.mkdir(parents=True)
        (folder / "20250101T000000Z-00000000.jsonl").write_bytes(line)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        go_on = threading.Event()
        sync = os.fdatasync

        def wait(fd: int) -> None:
            go_on.wait(60)
            sync(fd)

        with mock.patch("os.fdatasync", wait):
            try:
                yield
            finally:
                go_on.set()

    def failures(self) -> Any:
        def full(*_: Any, **__: Any) -> Any:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return [(name, mock.patch(name, full)) for name in ("os.writev", "os.fdatasync", "os.write")]


@pytest.fixture
def harness(tmp_path: Path) -> FolderHarness:
    return FolderHarness(tmp_path)


class TestFolder(SinkContract):
    pass
