"""The small parts of the operators, each alone."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.destination import parse_destination
from airflow_dicom_get.engine import report
from airflow_dicom_get.engine.items import make_item
from airflow_dicom_get.engine.report import merge
from airflow_dicom_get.errors import Cancelled, IncompleteRetrieval, InvalidOption
from airflow_dicom_get.hooks._destinations import check_address, resolve_destinations
from airflow_dicom_get.hooks._redaction import label_of, shown_manifest, shown_query, shown_study
from airflow_dicom_get.hooks._studies import study_queries
from airflow_dicom_get.hooks.configuration import is_allowed
from airflow_dicom_get.manifest.files import task_run_name, write_manifest
from airflow_dicom_get.manifest.frames import frame_of
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.operators._manifests import Manifest, counts_of, load_given
from airflow_dicom_get.operators._outcome import check_accept, raise_for, summary
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.records import Completed, Instance, SubOperation
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import State

LOG = logging.getLogger("test")


# --- what is shown ---------------------------------------------------------------------------------


def test_only_harmless_keys_of_a_query_are_shown():
    query = {
        "StudyDate": "20240115",
        "PatientName": "Doe^Jane",
        "(0010,0020)": "4711",
        "AccessionNumber": "A1",
        "Modality": "CT",
    }
    assert shown_query(query) == {
        "StudyDate": "20240115",
        "PatientName": "***",
        "(0010,0020)": "***",
        "AccessionNumber": "***",
        "Modality": "CT",
    }


def test_what_is_no_query_is_not_shown():
    """A template that rendered to a text, for example."""
    for query in ('{"PatientName": "Doe^Jane"}', [{"PatientName": "Doe^Jane"}], ("Doe^Jane",)):
        assert shown_query(query) == "***"
    assert [shown_query(None), shown_query(""), shown_query({})] == [None, "", {}]


def test_keys_that_a_dag_asked_for_are_not_shown():
    item = make_item("1.2", keys={"PatientID": "4711"})
    assert shown_study([item, "1.3"]) == [{**item, "keys": {"PatientID": "***"}}, "1.3"]
    assert item["keys"] == {"PatientID": "4711"}


def test_a_text_is_shown_where_it_is_of_uids_alone():
    for text in ("1.2", " 1.2 ", "['1.2', '1.3']", ""):
        assert shown_study(text) == text
    for text in ("DOE^JANE", "A-4711", '{"keys": {"PatientID": "4711"}}', str([make_item("1.2")])):
        assert shown_study([text]) == [shown_study(text)] == [label_of(text, None, None)] == ["***"]


def test_a_long_list_of_studies_is_cut():
    assert shown_study([f"1.{n}" for n in range(100)])[20:] == ["and 80 more"]


def test_manifests_are_shown_by_their_size():
    assert shown_manifest(pd.DataFrame({"a": [1, 2]})) == "manifest of 2 rows"
    assert shown_manifest({"kind": "dicom-manifest", "rows": 7, "manifest_uri": "file:///m"}) == (
        "manifest of 7 rows: file:///m"
    )
    assert shown_manifest("file:///m") == "file:///m"
    assert shown_manifest(str(pd.DataFrame({"PatientName": ["Doe^Demo"]}))) == "***"


@pytest.mark.parametrize(
    ("study", "query", "manifest", "expected"),
    [
        ("1.2.3", None, None, "1.2.3"),
        (make_item("1.2.3", modalities=["CT"]), None, None, "1.2.3 CT"),
        ([make_item("1.2.3"), "1.4"], None, None, "1.2.3 and 1 more"),
        ([], None, None, "no study"),
        (None, {"QueryRetrieveLevel": "STUDY", "PatientID": "4711", "StudyDate": "20240115"}, None,
         "PatientID=*** StudyDate=20240115"),
        (None, None, pd.DataFrame({"a": [1]}), "manifest of 1 row"),
        (None, None, pd.DataFrame({"study_instance_uid": ["1.2", "1.2"]}), "1.2"),
        (None, None, pd.DataFrame({"study_instance_uid": ["1.2", "1.3"]}), "manifest of 2 rows"),
        (None, None, pd.DataFrame({"study_instance_uid": ["DOE^JANE"]}), "manifest of 1 row"),
    ],
)  # fmt: skip
def test_labels_name_studies_and_nothing_of_the_patient(study, query, manifest, expected):
    assert label_of(study, query, manifest) == expected


# --- what is asked for -----------------------------------------------------------------------------


def test_whole_studies_are_one_query_and_parts_are_their_own():
    items = ["1.1", make_item("1.2"), make_item("1.3", series=["1.3.1"]), make_item("1.3", series=["1.3.2"]), "1.1"]
    assert study_queries(items) == [
        {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": ["1.1", "1.2"]},
        {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.3", "SeriesInstanceUID": ["1.3.1", "1.3.2"]},
    ]


@pytest.mark.parametrize(
    ("study", "word"),
    [
        ("", "rendered to an empty string"),
        ("None", "rendered to an empty string"),
        ("1.2.x", "not a valid Study Instance UID"),
        ("['1.2', '1.3']", "render_template_as_native_obj"),
        ("1.2*", "not a valid Study Instance UID"),
        ({"label": "x"}, "without study_instance_uid"),
        ({"study_instance_uid": "1.2", "series_instance_uids": []}, "an invalid list of series"),
        (["1.2", "bad"], "not a valid Study Instance UID"),
        (12, "not a valid Study Instance UID"),
    ],
)
def test_a_bad_study_is_named_before_anything_is_sent(study, word):
    with pytest.raises(InvalidOption, match=word):
        study_queries(study)


def test_bad_studies_of_a_list_can_be_left_out_but_not_all_of_them():
    left_out: list[Any] = []
    assert study_queries(["1.2", "bad"], skip=left_out.append)[0]["StudyInstanceUID"] == ["1.2"]
    assert [error.option for error in left_out] == ["study"]
    with pytest.raises(InvalidOption, match="without a valid study"):
        study_queries(["bad"], skip=left_out.append)


# --- places ----------------------------------------------------------------------------------------


def test_the_name_of_a_manifest_holds_nothing_that_leads_elsewhere():
    name = task_run_name(
        dag_id="../x", run_id="manual__2026-01-01T00:00:00+00:00", task_id="group.get", map_index=-1, try_number=2
    )
    assert name == "___x/manual__2026-01-01T00_00_00_00_00/group.get/-1-2"


@pytest.mark.parametrize("place", ["", None, "None", "data", "./data", "~/data", "~", "file:data"])
def test_places_that_depend_on_the_worker_are_refused(place):
    with pytest.raises(InvalidOption, match="destination"):
        check_address(place, "destination")


@pytest.mark.parametrize("place", ["/data", "file:///data", "s3://bucket/x", "dicom://PACS_B"])
def test_whole_places_are_taken(place):
    assert check_address(place, "destination") == place


ALLOWED = "/data/dicom/*\n\n  s3://imaging/night/*  \ndicom://archive\ndicom://*@10.0.0.9:104\n"


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("/data/dicom", True), ("/data/dicom/", True), ("/data/dicom/a/b", True), ("file:///data/dicom/a", True),
        ("/data/dicom2", False), ("/data", False), ("/data/dicom/../x", False), ("/data/dicom/a/../b", False),
        ("file:///data/dicom/%2e%2e/x", False), ("/DATA/dicom/a", False),
        ("s3://imaging/night/x", True), ("s3://any-conn@imaging/night/x", True), ("s3://imaging/night", True),
        ("s3://imaging", False), ("s3://imaging/nights", False), ("s3://imaging2/night/x", False),
        ("dicom://archive", True), ("dicom://other", False), ("dicom://A@10.0.0.9:104", True),
        ("dicom://A@10.0.0.8:104", False), ("dicom://10.0.0.9:104", False),
    ],
)  # fmt: skip
def test_places_are_held_against_those_that_are_allowed(place, allowed, monkeypatch):
    assert is_allowed(parse_destination(place))
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", ALLOWED)
    assert is_allowed(parse_destination(place)) == allowed


def test_a_link_in_an_allowed_place_allows_no_other(monkeypatch, tmp_path):
    """Whoever may write there may make one; above it, it is the administrator's."""
    (tmp_path / "disk" / "dicom" / "mine").mkdir(parents=True)
    (tmp_path / "disk" / "reports").mkdir()
    (tmp_path / "secret").mkdir()
    data = tmp_path / "data"
    data.symlink_to(tmp_path / "disk")
    for name, target in (("out", tmp_path / "secret"), ("aside", data / "reports"), ("in", data / "dicom" / "mine")):
        (data / "dicom" / name).symlink_to(target)
    for pattern in (f"{data}/dicom/*", f"{data}/dic?m*"):
        monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", pattern)
        for name in ("", "mine", "new/x", "in", "in/x"):
            assert is_allowed(parse_destination(f"{data}/dicom/{name}")), name
        for name in ("out", "out/x", "aside"):
            assert not is_allowed(parse_destination(f"{data}/dicom/{name}")), name
    rows = manifest_table([Instance("1.2", "1.2.3", "1.2.3.4")], source="A@h:1", destination=f"{data}/dicom/out")
    assert load_given(frame_of(rows), None).places == ()
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", f"{data}/dicom/*\n{tmp_path}/secret/*")
    assert is_allowed(parse_destination(f"{data}/dicom/out/x"))


def test_the_root_of_the_configuration_needs_no_other_leave(monkeypatch):
    monkeypatch.setenv("AIRFLOW__DICOM_GET__ALLOWED_DESTINATIONS", "dicom://*")
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", "/manifests")
    assert resolve_destinations("dicom://B@host:104").root is not None
    with pytest.raises(InvalidOption, match=r"^manifest_root: '/manifests' is none of \[dicom_get\] allowed_dest"):
        resolve_destinations("dicom://B@host:104", manifest_root="/manifests")


def test_the_configured_root_is_for_transfers_to_a_node(monkeypatch):
    assert resolve_destinations("dicom://B@host:104").root is None
    monkeypatch.setenv("AIRFLOW__DICOM_GET__MANIFEST_ROOT", "/manifests")
    assert resolve_destinations("/data").root is None
    own = resolve_destinations("/data", manifest_root="/own").root
    assert own is not None
    assert str(own.destination) == "/own"
    configured = resolve_destinations("dicom://B@host:104").root
    assert configured is not None
    assert str(configured.destination) == "/manifests"


# --- outcome ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (Result("complete"), None),
        (Result("partial", "missing", transient=True), IncompleteRetrieval),
        (Result("partial", "missing"), AirflowFailException),
        (Result("failed", transient=True), IncompleteRetrieval),
        (Result("failed"), AirflowFailException),
        (Result("unverified", transient=True), IncompleteRetrieval),
        (Result("unverified"), AirflowFailException),
        (Result("empty"), AirflowFailException),
        (Result("cancelled"), Cancelled),
    ],
    ids=lambda value: getattr(value, "verdict", getattr(value, "__name__", "success")),
)
def test_each_verdict_has_its_outcome(result, error):
    if error is None:
        raise_for(result, ("complete",))
        return
    with pytest.raises(error):
        raise_for(result, ("complete",))


def test_an_accepted_verdict_is_a_success():
    raise_for(Result("partial", transient=True), ("complete", "partial"))


@pytest.mark.parametrize("accept", [["cancelled"], ["done"], "all"])
def test_only_verdicts_can_be_accepted(accept):
    with pytest.raises(InvalidOption, match="accept"):
        check_accept(accept)


def test_several_retrievals_add_up_and_the_worst_decides():
    early, late = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    one = Result("complete", expected=3, total=3, completed=3, bytes=30, duration_seconds=1, plan_at=late,
                 evidence="list+counts", errors=[{"error": "x", "count": 1, "hint": "h"}])  # fmt: skip
    two = Result("partial", "not_sent", expected=5, total=5, completed=4, failed=1, bytes=50, duration_seconds=3,
                 plan_at=early, evidence="list", transient=True,
                 errors=[{"error": "x", "count": 2, "hint": "h"}])  # fmt: skip
    whole = merge([one, two])
    assert (whole.verdict, whole.reason, whole.transient) == ("partial", "not_sent", True)
    assert (whole.expected, whole.total, whole.completed, whole.failed, whole.bytes) == (8, 8, 7, 1, 80)
    assert (whole.plan_at, whole.evidence, whole.bytes_per_second) == (early, "list", 20.0)
    assert whole.errors == [{"error": "x", "count": 3, "hint": "h"}]


@pytest.mark.parametrize(
    "other", [report.never_begun(), report.broken_off(InvalidOption("x", hint="", option="x"))], ids=lambda x: x.verdict
)
def test_the_file_of_a_task_has_the_verdict_of_the_task(tmp_path, other):
    path = tmp_path / "0-1.part0.parquet"
    row = Instance("1", "2", "3")
    row.state = "stored"
    table = manifest_table([row], source="s", destination="d")
    complete = Result(verdict="complete", manifest_uri=f"file://{path}", evidence="list")
    complete.written = write_manifest(table, path, verdict="complete", evidence="list", run="r")
    value = Manifest([complete, other], "0-1", mode="reference").value
    assert (value["verdict"], value["rows"]) == (other.verdict, 1)
    assert [one.name for one in tmp_path.iterdir()] == ["0-1.parquet"]


def test_one_that_waits_for_its_hours_makes_all_wait():
    resume = datetime(2026, 1, 1, 22, tzinfo=UTC)
    whole = merge([Result("complete"), Result("partial", "window", resume_at=resume, transient=True)])
    assert (whole.reason, whole.resume_at) == ("window", resume)


def test_the_summary_is_json_with_the_keys_of_its_schema():
    import json

    value = summary(
        Result("complete", node="A@h:1", plan_at=datetime(2026, 1, 1, tzinfo=UTC)),
        kind="get",
        manifest={
            **counts_of(manifest_table([], source="", destination="")),
            "manifest_kind": "inline",
            "manifest_uri": "file:///m",
            "manifest_rows": 3,
            "manifest_sha256": "0",
        },
        try_number=1,
    )
    assert json.loads(json.dumps(value)) == value
    assert set(value) == {
        "schema", "verdict", "reason", "expected", "total", "completed", "skipped", "warning", "failed", "withdrawn",
        "unexpected", "conflicts", "bytes", "duration_seconds", "bytes_per_second", "associations", "rounds",
        "plan_at", "evidence", "resume_at", "errors", "studies", "series", "source", "destination", "manifest_kind",
        "manifest_uri", "manifest_rows", "manifest_sha256", "try_number", "kind", "study_instance_uids", "reasons",
        "series_rows",
    }  # fmt: skip


def test_the_summary_counts_series_and_reasons():
    def row(study: str, series: str, number: int, state: State, **more: Any) -> Instance:
        made = Instance(study, series, f"{series}.{number}")
        for name, value in {"state": state, "series_number": 7, "modality": "CT", "bytes": 10, **more}.items():
            setattr(made, name, value)
        return made

    rows = [
        row("1.2", "1.2.1", 1, "stored"),
        row("1.2", "1.2.1", 2, "held", bytes=None),
        row("1.2", "1.2.1", 3, "unexpected"),
        row("1.3", "1.3.1", 1, "missing", reason="not_sent", bytes=None),
        row("1.3", "1.3.1", 2, "conflict", reason="other_bytes", modality=None),
        row("1.3", "1.3.1", 3, "missing", reason="not_sent", bytes=None),
        *(row("1.4", f"1.4.{n}", 1, "stored") for n in range(60)),
    ]
    found = counts_of(manifest_table(rows, source="", destination=""))
    assert (found["studies"], found["series"]) == (3, 62)
    assert found["study_instance_uids"] == ["1.2", "1.3", "1.4"]
    assert found["reasons"] == {"not_sent": 2, "other_bytes": 1}
    assert len(found["series_rows"]) == 50
    assert found["series_rows"][:2] == [
        {"study_instance_uid": "1.3", "series_instance_uid": "1.3.1", "modality": "CT", "series_number": 7,
         "held": 0, "not_held": 3, "bytes": 0},
        {"study_instance_uid": "1.2", "series_instance_uid": "1.2.1", "modality": "CT", "series_number": 7,
         "held": 2, "not_held": 0, "bytes": 10},
    ]  # fmt: skip


# --- progress --------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.writes: list[tuple[float, str, Any]] = []

    def set(self, key, value):
        self.writes.append((self.clock.now, key, value))


def test_progress_is_written_at_most_every_five_seconds_and_logged_no_oftener(caplog):
    clock = Clock()
    store = Store(clock)
    with caplog.at_level(logging.INFO, "test"):
        progress = Progress(log=LOG, store=store, interval=2, associations=2, clock=clock)
        for second in range(1, 13):
            clock.now = float(second)
            progress.on_sub_operation(
                SubOperation(remaining=20 - second, completed=second, failed=0, warning=0, file=None,
                             sop_instance_uid="1", bytes=1000)
            )  # fmt: skip
        progress.on_completed(Completed(total=20, completed=12, failed=8, warning=0, duration_seconds=12,
                                        verdict="partial", bytes=12000))  # fmt: skip
        clock.now = 20.0
        progress.finish("partial")
    assert [(at, value["phase"], value["done"]) for at, _, value in store.writes] == [
        (5.0, "get", 5), (10.0, "get", 10), (20.0, "partial", 12),
    ]  # fmt: skip
    assert set(store.writes[0][2]) == {
        "phase", "done", "total", "failed", "bytes", "bytes_per_second", "associations", "updated_at",
    }  # fmt: skip
    assert [record.getMessage().split(" inst")[0] for record in caplog.records] == [
        f"{n} of 20" for n in (2, 4, 6, 8, 10, 12)
    ]


def test_a_state_store_that_does_not_answer_does_not_hold_up_the_retrieval():
    # As while the API server is away: each write is tried again and again.
    clock, back, begun = Clock(), threading.Event(), []

    class Away:
        def set(self, key, value):
            begun.append(value["done"])
            back.wait()

    progress = Progress(log=LOG, store=Away(), interval=5, associations=1, clock=clock)
    began = time.monotonic()
    for second in range(1, 61):
        clock.now = float(second)
        progress.on_sub_operation(
            SubOperation(remaining=60 - second, completed=second, failed=0, warning=0, file=None,
                         sop_instance_uid="1", bytes=1000)
        )  # fmt: skip
    assert time.monotonic() - began < 10
    assert begun == [5]
    back.set()


def test_a_state_store_that_fails_harms_nothing():
    class Broken:
        def set(self, key, value):
            raise RuntimeError("no")

    Progress(log=LOG, store=Broken(), interval=5, associations=1).finish("complete")
    Progress(log=LOG, store=None, interval=5, associations=1).window(datetime.now(UTC) + timedelta(hours=1))
