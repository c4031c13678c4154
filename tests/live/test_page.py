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
        times = [round(answer.elapsed.total_seconds(), 2) for answer in answers]
        figures[name] = {"first": times[0], "median": median(times), "slowest": max(times)}
    everything = airflow.answer("GET", "/dicom-get/?dag_id=nightly_archive").text
    assert f"{NIGHTS * A_NIGHT:,} runs" in everything
    record(retrievals=NIGHTS * A_NIGHT, **figures)
