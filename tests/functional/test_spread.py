"""The lists of many series are asked for on several associations, where the run may have them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.engine import spread
from airflow_dicom_get.engine.listing import ListSeries, SeriesInfo
from airflow_dicom_get.lists.finder import Finder
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study

SERIES, INSTANCES = 24, 48

Embedded = Callable[..., EmbeddedPacs]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("many-series")
    return folder, big_study(folder, INSTANCES, 200, name="spread", series=SERIES)


def image_queries(pacs: EmbeddedPacs) -> int:
    return sum((service, level) == ("C-FIND", "IMAGE") for service, level, _ in pacs.requests)


@pytest.mark.parametrize("admitted", [10, 4, 1])
def test_lists_are_whole_however_many_associations_are_admitted(
    many: tuple[Path, str], embedded: Embedded, tmp_path: Path, admitted: int
) -> None:
    folder, study = many
    pacs = embedded(folder, max_associations=admitted)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, associations=4, max_associations=4)
    result = scu.get_study({"StudyInstanceUID": study})
    assert (result.verdict, result.completed) == ("complete", INSTANCES)
    assert result.manifest["series_instance_uid"].nunique() == SERIES
    assert image_queries(pacs) == 2 * SERIES, "each series once before and once after"
    assert min(admitted, 2) <= pacs.peak_associations <= min(admitted, 4)
    assert max(pacs.sent.values()) == 1


def test_an_association_that_is_lost_leaves_its_series_to_the_others(
    many: tuple[Path, str], embedded: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, lost = spread._serve, []

    def serve_and_lose(finder: Finder, queue: deque[SeriesInfo], list_series: ListSeries) -> None:
        beside = threading.current_thread().name.startswith("dicom-get-list")

        def list_after_a_cut(finder: Finder, series: SeriesInfo) -> None:
            if beside:
                lost.append(series.uid)
                finder._association.close()
            else:
                time.sleep(0.01)
            list_series(finder, series)

        serve(finder, queue, list_after_a_cut)

    monkeypatch.setattr(spread, "_serve", serve_and_lose)
    folder, study = many
    pacs = embedded(folder)
    scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path, associations=4, max_associations=4)
    result = scu.get_study({"StudyInstanceUID": study})
    assert lost
    assert (result.verdict, result.completed) == ("complete", INSTANCES)
