"""A real Airflow of four components, a PACS, and Chromium in front of them."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study, private_study

HERE = Path(__file__).parent
SCRIPTS = HERE.parent.parent / "scripts"
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

    address: str
    password: str
    pacs: EmbeddedPacs
    many: str
    """The study of sixty instances."""
    retrieved: Path
    home: Any
    environment: dict[str, str]

    def run(self, *arguments: str) -> str:
        """Run a Python program on this Airflow home."""
        done = subprocess.run(
            [sys.executable, *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


def _demo_home(folder: Path) -> Any:
    """The module that `make ui` stands on, with another folder."""
    spec = importlib.util.spec_from_file_location("browser_home", SCRIPTS / "demo_home.py")
    assert spec is not None
    assert spec.loader is not None
    home = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(home)
    home.FOLDER = folder
    home.AIRFLOW_HOME, home.LOGS = folder / "airflow", folder / "logs"
    for path in (home.AIRFLOW_HOME, home.LOGS):
        path.mkdir()
    return home


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(address: str) -> bool:
    import httpx

    try:
        states = httpx.get(f"{address}/api/v2/monitor/health", timeout=5).json()
    except (httpx.HTTPError, ValueError):
        return False
    return all(states.get(name, {}).get("status") == "healthy" for name in ("scheduler", "dag_processor", "triggerer"))


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Iterator[Site]:
    with ExitStack() as stack:
        yield _start(tmp_path_factory.mktemp("browser"), stack)


def _start(folder: Path, stack: ExitStack) -> Site:
    home = _demo_home(folder)
    held = folder / "pacs"
    # The pictures of the documentation show its path.
    retrieved = Path(stack.enter_context(TemporaryDirectory(prefix="dicom-")))
    private_study(held / "private")
    many = big_study(held / "many", 60, 65536, series=3)
    address = f"http://127.0.0.1:{free_port()}"
    environment = home.airflow_environment(
        {
            "DICOM_DESTINATION": str(retrieved),
            "AIRFLOW__API__BASE_URL": address,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": address.rpartition(":")[2],
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
            "AIRFLOW__CORE__DAGS_FOLDER": str(HERE.parent.parent / "dags"),
        }
    )
    pacs = stack.enter_context(EmbeddedPacs(held, ae_title="PACS", require_called_ae=True))
    home.airflow("db", "migrate", environment=environment, log=home.LOGS / "setup.log")
    processes: list[subprocess.Popen[str]] = []
    stack.callback(lambda: home.stop(processes))
    for name, arguments in {
        "api-server": ["api-server"],
        "scheduler": ["scheduler", "--skip-serve-logs"],
        "dag-processor": ["dag-processor"],
        "triggerer": ["triggerer", "--skip-serve-logs"],
    }.items():
        command = [sys.executable, "-m", "airflow", *arguments]
        processes.append(home.launch(command, environment=environment, log=home.LOGS / f"{name}.log"))
    until = time.monotonic() + 120
    while not _healthy(address):
        assert time.monotonic() < until, "Airflow did not get ready"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.5)
    return Site(address, home.password(), pacs, many, retrieved, home, environment)


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
    page.locator("input[name=password]").fill(site.password)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Dags").first.wait_for()
    yield page
    context.close()
