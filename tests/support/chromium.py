"""Chromium in front of an Airflow, for the tests that use its web interface."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.live_airflow import LiveAirflow

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


@contextmanager
def launched() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def signed_in_page(browser: Any, airflow: LiveAirflow, user: str = "admin") -> Iterator[Any]:
    """A page of a signed-in user: the administrator, or ``viewer``."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light", locale="en-US")
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(airflow.address)
    page.locator("input[name=username]").fill(user)
    page.locator("input[name=password]").fill(airflow.home.password())
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Dags").first.wait_for()
    yield page
    context.close()


def take_picture(page: Any, name: str, folder: Path) -> None:
    """Take a screenshot into a folder, or into the documentation where SCREENSHOTS names its folder."""
    # Until pictures and fonts are there and the last transition is over.
    page.wait_for_timeout(700)
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS") or folder) / f"{name}.png")
