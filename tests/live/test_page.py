"""The page with a history of ten thousand retrievals."""

from __future__ import annotations

from statistics import median

import pytest

pytestmark = pytest.mark.timeout(300)
NIGHTS, A_NIGHT = 21, 500


def test_the_page_with_ten_thousand_retrievals(airflow, here, record):
    airflow.run(str(here.parent / "browser" / "history.py"), str(A_NIGHT))
    figures = {}
    for name, query in {
        "list": "",
        "last page": "?page=211",
        "incomplete": "?verdict=incomplete",
        "one DAG": "?dag_id=nightly_archive",
    }.items():
        answers = [airflow.answer("GET", f"/dicom-get/{query}", user="viewer") for _ in range(7)]
        assert {answer.status_code for answer in answers} == {200}
        assert "nightly_archive" in answers[0].text
        times = sorted(answer.elapsed.total_seconds() for answer in answers)
        figures[name] = (round(median(times), 2), round(times[-1], 2))
    everything = airflow.answer("GET", "/dicom-get/?dag_id=nightly_archive").text
    assert f"{NIGHTS * A_NIGHT:,}".replace(",", "\u202f") in everything or f"{NIGHTS * A_NIGHT:,}" in everything
    record(retrievals=NIGHTS * A_NIGHT, **figures)
