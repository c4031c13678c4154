"""A real Airflow of four components, a PACS, and Chromium in front of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study, private_study
from tests.support.chromium import MISSING, launched, signed_in_page
from tests.support.live_airflow import LiveAirflow

HERE = Path(__file__).parent
SAMPLE = "test_a_connection_by_the_form"


def pytest_collection_modifyitems(config, items):
    if "browser" not in config.option.markexpr:
        # All of them take minutes: the whole suite runs one, `make test-browser` the others.
        left_out = [item for item in items if HERE in item.path.parents and item.name != SAMPLE]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.airflow)
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)}"))


@dataclass
class Site:
    """Airflow, its PACS, and where things lie."""

    airflow: LiveAirflow
    pacs: EmbeddedPacs
    held: Path
    """What the PACS holds."""
    many: str
    """The study of sixty instances."""
    retrieved: Path

    @property
    def address(self) -> str:
        """Of the web interface."""
        return self.airflow.address


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Iterator[Site]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("browser")
        held = folder / "pacs"
        # The pictures of the documentation show its path.
        retrieved = Path(stack.enter_context(TemporaryDirectory(prefix="dicom-")))
        private_study(held / "private")
        many = big_study(held / "many", 60, 65536, series=3)
        pacs = stack.enter_context(EmbeddedPacs(held, ae_title="PACS", require_called_ae=True))
        where = {"DICOM_DESTINATION": str(retrieved)}
        airflow = stack.enter_context(LiveAirflow(folder, dags=HERE.parent.parent / "dags", environment=where))
        # What the DAG's tasks wait for.
        airflow.make_pool("pacs", 2)
        yield Site(airflow, pacs, held, many, retrieved)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def signed_in(site, browser) -> Iterator[Any]:
    """A page of a signed-in administrator."""
    with signed_in_page(browser, site.airflow) as page:
        yield page
