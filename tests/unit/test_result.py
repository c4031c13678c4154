"""Verdicts, exit codes, and how results are raised and rendered."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.engine.report import any_transient
from airflow_dicom_get.errors import IncompleteRetrieval, ManifestError
from airflow_dicom_get.manifest.files import write_manifest
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.records import Instance
from airflow_dicom_get.result import EchoReport, Plan, Result, StudyResult
from airflow_dicom_get.vocabulary import EXIT_CODES, WORST_FIRST, Verdict, worst

FIELDS = [
    "verdict", "reason", "expected", "total", "completed", "skipped", "warning", "failed", "withdrawn", "unexpected",
    "conflicts", "bytes", "duration_seconds", "bytes_per_second", "associations", "rounds", "plan_at", "evidence",
    "resume_at", "errors", "manifest",
]  # fmt: skip


def row(state: str | None, reason: str | None = None, sop: str = "1.2.3.4") -> Instance:
    made = Instance("1.2", "1.2.3", sop)
    made.state, made.reason = state, reason  # type: ignore[assignment]
    return made


class TestVerdicts:
    def test_exit_codes(self) -> None:
        assert EXIT_CODES == {"complete": 0, "failed": 1, "partial": 3, "unverified": 4, "empty": 5, "cancelled": 130}
        assert Result("cancelled", "SIGINT").exit_code == 130
        assert Result("cancelled", "SIGTERM").exit_code == 143
        assert Result("partial", "SIGTERM").exit_code == 3

    def test_worst(self) -> None:
        assert worst(["complete", "empty", "unverified", "partial", "cancelled", "failed"]) == "failed"
        assert worst(["complete", "empty"]) == "empty"
        assert worst([]) == "empty"

    @given(st.lists(st.sampled_from(WORST_FIRST), min_size=1), st.lists(st.sampled_from(WORST_FIRST), min_size=1))
    def test_worst_of_parts_is_worst_of_all(self, one: list[Verdict], two: list[Verdict]) -> None:
        assert worst([worst(one), worst(two)]) == worst(one + two)
        assert worst(["complete", *one]) == worst(one)

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            ([], False),
            ([row("stored"), row("held")], False),
            ([row("missing", "not_sent")], True),
            ([row("missing")], True),
            ([row("failed", "class_refused"), row("conflict", "different_content")], False),
            ([row("failed", "class_refused"), row("failed", "destination_full")], True),
            ([row("withdrawn", "not_sent")], False),
        ],
    )
    def test_any_transient(self, rows: Sequence[Instance], expected: bool) -> None:
        assert any_transient(rows) is expected


class TestRaise:
    def test_complete_and_accepted_verdicts_return(self) -> None:
        Result("complete").raise_for_verdict()
        Result("empty").raise_for_verdict(accept=("complete", "empty"))
        Result("empty", studies=[StudyResult("1.2", "complete")]).raise_for_verdict(accept=("empty",))
        hidden = Result("unverified", studies=[StudyResult("1.2", "unverified"), StudyResult("1.3", "empty")])
        hidden.raise_for_verdict(accept=("unverified", "empty"))
        with pytest.raises(IncompleteRetrieval):
            hidden.raise_for_verdict(accept=("complete", "unverified"))

    @pytest.mark.parametrize("verdict", [verdict for verdict in WORST_FIRST if verdict != "complete"])
    def test_others_raise_with_the_facts(self, verdict: Verdict) -> None:
        result = Result(
            verdict, "missing", expected=9, total=9, completed=4, failed=5, manifest_uri="file:///m", node="h:1"
        )
        with pytest.raises(IncompleteRetrieval) as caught:
            result.raise_for_verdict()
        error = pickle.loads(pickle.dumps(caught.value))
        assert (error.verdict, error.reason, error.total, error.completed, error.failed) == (
            verdict,
            "missing",
            9,
            4,
            5,
        )
        assert (error.manifest_uri, error.node) == ("file:///m", "h:1")
        assert error.transient is False
        assert error.hint

    @pytest.mark.parametrize(
        ("verdict", "transient"),
        [("partial", True), ("failed", True), ("cancelled", True), ("unverified", True), ("empty", False)],
    )
    def test_only_what_may_pass_is_transient(self, verdict: Verdict, transient: bool) -> None:
        with pytest.raises(IncompleteRetrieval) as caught:
            Result(verdict, transient=True).raise_for_verdict()
        assert caught.value.transient is transient

    def test_hint_says_when_it_may_go_on(self) -> None:
        with pytest.raises(IncompleteRetrieval, match=r"be resumed at 2024-01-01T22:00:00Z\.$"):
            Result("partial", "window", resume_at=datetime(2024, 1, 1, 22, tzinfo=UTC)).raise_for_verdict()


class TestRendering:
    def test_json_has_all_fields_and_nothing_else(self) -> None:
        result = Result(
            "partial", "missing", total=2, completed=1, failed=1, plan_at=datetime(2024, 1, 1, tzinfo=UTC),
            errors=[{"error": "x", "count": 1, "hint": "y"}], manifest_uri="file:///m.parquet",
            duration_seconds=1.23456,
            studies=[StudyResult("1.2", "partial", total=2)], rows=lambda: None,
        )  # fmt: skip
        value = json.loads(json.dumps(result.to_json()))
        assert list(value) == [*FIELDS, "node", "destination", "studies"]
        assert value["manifest"] == "file:///m.parquet"
        assert value["plan_at"] == "2024-01-01T00:00:00Z"
        assert value["expected"] is None
        assert value["duration_seconds"] == 1.235
        assert value["studies"][0]["study_instance_uid"] == "1.2"

    def test_summary_is_one_line(self) -> None:
        whole = Result("complete", expected=9, total=9, completed=9, skipped=2)
        assert whole.summary() == "complete: 9 of 9 instances listed are held, 2 already there"
        part = Result("unverified", "no_list", total=9, completed=8, failed=1, warning=1, conflicts=1)
        assert part.summary() == (
            "unverified (no_list): 8 of 9 instances sent are held, 1 not held, 1 with a warning, 1 in conflict"
        )
        assert Result("empty").summary() == "empty: the query matched nothing"

    def test_html_is_escaped(self) -> None:
        result = Result("partial", "<b>", errors=[{"error": "<script>", "count": 2}], node="A<@h:1")
        page = result._repr_html_()
        assert "<script>" not in page
        assert "&lt;script&gt;" in page
        assert "A&lt;@h:1" in page
        plan = Plan("h:1", ["1.2"], 1, 2, 0, 2, {"1.2.840.10008.5.1.4.1.1.2": 1, None: 1}, 4, 1, "list")
        assert "CT Image Storage" in plan._repr_html_()
        report = EchoReport("h:1", 1.5, {"C-ECHO": True, "C-GET StudyRoot": False}, implementation_version="<x>")
        assert "refused" in report._repr_html_()
        assert "<x>" not in report._repr_html_()

    def test_plan_and_echo_as_json(self) -> None:
        plan = Plan("h:1", ["1.2"], 1, 2, 0, 2, {None: 2}, 4, 1, "list", rows=[row(None)])
        value = json.loads(json.dumps(plan.to_json()))
        assert value["classes"] == {"unknown": 2}
        assert "rows" not in value
        assert json.loads(json.dumps(EchoReport("h:1", 1.5, {"C-ECHO": True}).to_json()))["accepted"] == {
            "C-ECHO": True
        }


class TestManifest:
    def test_loaded_on_first_use_from_the_file(self, tmp_path: Path) -> None:
        table = manifest_table([row("stored")], source="h:1", destination="/d")
        path = tmp_path / "m.parquet"
        write_manifest(table, path, verdict="complete", evidence="list", run="r")
        result = Result("complete", manifest_uri=str(path))
        assert list(result.manifest["state"]) == ["stored"]
        path.unlink()
        assert result.manifest is result.manifest

    def test_made_from_rows_where_there_is_no_file(self) -> None:
        result = Result("complete", rows=lambda: manifest_table([row("held")], source="h:1", destination="/d"))
        assert list(result.manifest["state"]) == ["held"]

    def test_none_at_all(self) -> None:
        with pytest.raises(ManifestError, match="There is no manifest"):
            _ = Result("failed").manifest

    def test_plan_as_a_frame(self) -> None:
        plan = Plan("h:1", ["1.2"], 1, 2, 1, 1, {}, 1, 1, "list", rows=[row(None), row("held", sop="1.2.3.5")])
        assert list(plan.frame["sop_instance_uid"]) == ["1.2.3.4", "1.2.3.5"]
        assert plan.frame["state"].isna().tolist() == [True, False]
