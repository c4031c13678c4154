"""A real Airflow of four components, a PACS, and Chromium in front of them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from live_airflow import LiveAirflow

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study, private_study

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium")
MISSING = [
    what
    for what, there in (
        ("Airflow", importlib.util.find_spec("airflow")),
        ("playwright", importlib.util.find_spec("playwright")),
        ("chromium (Debian package chromium)", CHROMIUM),
    )
    if not there
]

# Without them Chromium looks for servers that are not there; root needs the first.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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
        yield Site(airflow, pacs, held, many, retrieved)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def signed_in(site, browser) -> Iterator[Any]:
    """A page of a signed-in administrator."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light", locale="en-US")
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(site.address)
    page.locator("input[name=username]").fill("admin")
    page.locator("input[name=password]").fill(site.airflow.home.password())
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Dags").first.wait_for()
    yield page
    context.close()
