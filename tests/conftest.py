"""Fixtures: data, the embedded PACS, and real PACS that hold it. Servers live as long as the test session."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import supported
from hypothesis import settings
from pynetdicom.transport import AssociationSocket

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import Juicefs, Moto
from airflow_dicom_get.testing.sample_data import (
    PRIVATE_CLASS,
    ct_study,
    mixed_study,
    private_study,
    usable_pydicom_files,
)
from airflow_dicom_get.testing.servers import Dcmqrscp, Orthanc, Storescp, find_binary
from tests.support.holdings import Holding, hold
from tests.support.relay import Relay

# Servers of other tests share the cores: how long one example takes says nothing.
settings.register_profile("shared", deadline=None)
# `make fuzz` looks far longer.
settings.register_profile("fuzz", deadline=None, max_examples=20_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "shared"))


def _close(self: AssociationSocket) -> None:
    if self.socket is not None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


# pynetdicom, the tests' client, leaves a socket open whose peer was quicker to shut it down.
AssociationSocket._shutdown_socket = _close  # type: ignore[method-assign]

_NEEDS = {"dcmtk": ("dcmqrscp", "dcmtk"), "orthanc": ("Orthanc", "orthanc")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {mark: package for mark, (binary, package) in _NEEDS.items() if find_binary(binary) is None}
    for item in items:
        for mark, package in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"{package} is not installed: apt-get install {package}"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        _begin_with_the_longest(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Put down what a whole folder of tests came to, for the page of what is supported; see scripts/supported.py."""
    config = session.config
    whole = not config.option.keyword and all(Path(argument).is_dir() for argument in config.args)
    if not os.environ.get("SUPPORTED") or "PYTEST_XDIST_WORKER" in os.environ or not whole:
        return
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    outcomes = {"passed": ("passed",), "failed": ("failed", "error"), "skipped": ("skipped",)}
    for check in supported.CHECKS:
        # Of those in a browser, the whole suite runs one.
        if check == "browser" and check not in config.option.markexpr:
            continue
        reports = {
            name: [report for kind in kinds for report in terminal.stats.get(kind, [])]
            for name, kinds in outcomes.items()
        }
        figures = {
            name: sum(report.nodeid.startswith(f"tests/{check}/") for report in found)
            for name, found in reports.items()
        }
        if any(figures.values()):
            supported.record(check, version("apache-airflow"), figures)


def _begin_with_the_longest(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: with one that a worker begins last, the others would have nothing to do.

    These are the files with a test that is marked as slow, then those whose tests may take longest, or are most.
    """
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)

    def length(tests: list[pytest.Item]) -> tuple[bool, float, int]:
        slow = any(test.get_closest_marker("slow") for test in tests)
        limits = [float(mark.args[0]) for test in tests for mark in test.iter_markers("timeout")]
        return slow, max(limits, default=0.0), len(tests)

    items[:] = [test for tests in sorted(files.values(), key=length, reverse=True) for test in tests]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """The usable files of pydicom's wheel, each in its own study as it comes."""
    folder = tmp_path_factory.mktemp("real")
    for path in usable_pydicom_files():
        (folder / path.name).write_bytes(path.read_bytes())
    return hold(folder)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """The same files as one study."""
    folder = tmp_path_factory.mktemp("mixed")
    return hold(folder, mixed_study(folder))


@pytest.fixture(scope="session")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """A CT study of four series in three transfer syntaxes, 40 instances."""
    folder = tmp_path_factory.mktemp("ct")
    return hold(folder, ct_study(folder))


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """Ten CT images, one instance of a private SOP class, one structured report."""
    folder = tmp_path_factory.mktemp("private")
    return hold(folder, private_study(folder))


@pytest.fixture
def embedded() -> Iterator[Callable[..., EmbeddedPacs]]:
    """Start embedded PACS: ``embedded(folder, **options)``."""
    with ExitStack() as stack:

        def start(folder: Path, **options: Any) -> EmbeddedPacs:
            return stack.enter_context(EmbeddedPacs(folder, **options))

        yield start


@pytest.fixture
def relay() -> Iterator[Callable[..., Relay]]:
    """Start relays: ``relay(server, **options)`` for anything with a host and a port."""
    with ExitStack() as stack:

        def start(server: Any, **options: Any) -> Relay:
            return stack.enter_context(Relay(server.host, server.port, **options))

        yield start


@pytest.fixture(scope="session")
def dcmqrscp(tmp_path_factory: pytest.TempPathFactory, ct: Holding, private: Holding) -> Iterator[Dcmqrscp]:
    """dcmqrscp as it comes: uncompressed syntaxes, classes of its own list. Holds ``ct`` and ``private``."""
    server = Dcmqrscp(tmp_path_factory.mktemp("dcmqrscp"))
    server.register(ct.files + private.files)
    with server:
        yield server


def _profiled(folder: Path, *holdings: Holding) -> Dcmqrscp:
    classes = {entry.sop_class for holding in holdings for entry in holding.entries.values()}
    server = Dcmqrscp(folder, ae_title="QRALL", sop_classes=classes - {PRIVATE_CLASS})
    server.register(path for holding in holdings for path in holding.files)
    return server


@pytest.fixture(scope="session")
def dcmqrscp_all(tmp_path_factory: pytest.TempPathFactory, real: Holding, ct: Holding) -> Iterator[Dcmqrscp]:
    """dcmqrscp with a profile that accepts all syntaxes. Holds ``real`` and ``ct``."""
    with _profiled(tmp_path_factory.mktemp("dcmqrscp-all"), real, ct) as server:
        yield server


@pytest.fixture(scope="session")
def dcmqrscp_mixed(tmp_path_factory: pytest.TempPathFactory, mixed: Holding) -> Iterator[Dcmqrscp]:
    """The same with ``mixed``, whose SOP Instance UIDs are those of ``real``."""
    with _profiled(tmp_path_factory.mktemp("dcmqrscp-mixed"), mixed) as server:
        yield server


@pytest.fixture(scope="session")
def orthanc(
    tmp_path_factory: pytest.TempPathFactory, real: Holding, ct: Holding, private: Holding
) -> Iterator[Orthanc]:
    """Orthanc as it comes, so without contexts for private classes. Holds ``real``, ``ct`` and ``private``."""
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        server.load(real.files + ct.files + private.files)
        yield server


@pytest.fixture(scope="session")
def orthanc_mixed(tmp_path_factory: pytest.TempPathFactory, mixed: Holding, private: Holding) -> Iterator[Orthanc]:
    """Orthanc that accepts unknown SOP classes. Holds ``mixed`` and ``private``."""
    with Orthanc(tmp_path_factory.mktemp("orthanc-mixed"), unknown_classes=True) as server:
        server.load(mixed.files + private.files)
        yield server


@pytest.fixture
def storescp(tmp_path: Path) -> Iterator[Storescp]:
    """storescp as it comes: uncompressed syntaxes."""
    with Storescp(tmp_path / "storescp") as server:
        yield server


@pytest.fixture
def storescp_all(tmp_path: Path) -> Iterator[Storescp]:
    """storescp that accepts every transfer syntax that it knows."""
    with Storescp(tmp_path / "storescp-all", accept_all=True) as server:
        yield server


@pytest.fixture(scope="session")
def juicefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Juicefs]:
    """juicefs' gateway with an empty bucket; each test takes a prefix of its own."""
    with Juicefs(tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    """moto's S3 service with an empty bucket; each test takes a prefix of its own."""
    with Moto(tmp_path_factory.mktemp("moto")) as server:
        yield server
