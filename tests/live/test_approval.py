"""The approval of a DAG of the repository, given in Chromium as the person who is asked gives it.

With SCREENSHOTS=docs/images the screenshot of the documentation is taken again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.archive import Archive, Entry
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY
from airflow_dicom_get.testing.sample_data import big_study, private_study
from tests.support.chromium import MISSING, launched, signed_in_page, take_picture
from tests.support.holdings import Holding, hold
from tests.support.live_airflow import LiveAirflow

DAGS = Path(__file__).parents[2] / "dags"
NAME = "retrieve_then_forward"

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


class CountingArchive(Archive):
    """An archive that counts how often each instance is put into it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored: Counter[str] = Counter()

    def add(self, path: Path, *, replace: bool = False) -> Entry:
        entry = super().add(path, replace=replace)
        self.stored[entry.sop] += 1
        return entry


@pytest.fixture
def source(tmp_path) -> Iterator[EmbeddedPacs]:
    """A PACS with a study of twelve instances, one of them of a private class, and one of sixty."""
    private_study(tmp_path / "source" / "private")
    big_study(tmp_path / "source" / "many", 60, 8192, series=3)
    with EmbeddedPacs(tmp_path / "source", ae_title="PACS", require_called_ae=True) as server:
        yield server


@pytest.fixture
def target(tmp_path) -> Iterator[EmbeddedPacs]:
    """Another PACS, empty."""
    folder = tmp_path / "target"
    folder.mkdir()
    server = EmbeddedPacs(folder, ae_title="ARCHIVE", require_called_ae=True)
    server.archive = CountingArchive(folder)
    with server:
        yield server


@pytest.fixture
def home(tmp_path, source, target, juicefs) -> Iterator[LiveAirflow]:
    """The DAG and its connections."""
    folder = tmp_path / "home"
    (folder / "dags").mkdir(parents=True)
    shutil.copy(DAGS / f"{NAME}.py", folder / "dags")
    environment = {
        "AIRFLOW_CONN_DICOM_DEFAULT": f"dicom://PACS@127.0.0.1:{source.port}",
        "AIRFLOW_CONN_DICOM_TARGET": f"dicom://ARCHIVE@127.0.0.1:{target.port}",
        "DICOM_BUCKET": f"{BUCKET}/{NAME}",
    }
    with LiveAirflow(folder, dags=folder / "dags", environment=environment) as live:
        live.make_pool("pacs", 2)
        keys = {"login": ACCESS_KEY, "password": SECRET_KEY, "extra": {"scheme": "http"}}
        live.connect("dicom_s3_default", conn_type="dicom_s3", host=juicefs.host, port=juicefs.port, **keys)
        yield live


@pytest.fixture
def page(home) -> Iterator[Any]:
    with launched() as browser, signed_in_page(browser, home) as page:
        yield page


def datasets(holding: Holding) -> dict[str, tuple[str, bytes]]:
    """Transfer syntax and data set by SOP Instance UID."""
    return {sop: (entry.syntax, holding.dataset(sop)) for sop, entry in holding.entries.items()}


def test_what_is_approved_in_the_browser_is_forwarded(home, page, source, target, juicefs, tmp_path):
    run = home.trigger(NAME, bucket=f"{BUCKET}/{NAME}")
    run.wait_task("approve", ["awaiting_input"], seconds=90)
    assert target.total_associations == 0
    assert len([key for key in juicefs.objects(NAME) if key.endswith(".dcm")]) == 72

    # As a person finds it: the menu, the question, the answer.
    page.get_by_role("button", name="Browse").click()
    page.get_by_role("menuitem", name="Required Actions").click()
    page.get_by_role("link", name="Forward the studies of 20240115 to dicom_target?").click()
    page.get_by_text("Studies: 2. Instances: 72.").wait_for()
    take_picture(page, "approval", tmp_path)
    assert target.total_associations == 0
    page.get_by_role("button", name="Approve", exact=True).click()

    assert run.wait() == "success"
    details = home.call("GET", f"{run.path}/taskInstances/approve/-1/hitlDetails")
    assert (details["chosen_options"], details["responded_by_user"]["name"]) == (["Approve"], "admin")
    expected = datasets(hold(source.archive.folder))
    assert len(expected) == 72
    assert datasets(hold(target.archive.folder)) == expected
    assert target.archive.stored == Counter(expected.keys())
    assert sorted(run.summary("confirm", index)["symbols"]["="] for index in range(2)) == [12, 60]
