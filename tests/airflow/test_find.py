"""DicomFindOperator in DAG runs against the embedded PACS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MethodType
from typing import Any

import pytest
from airflow.sdk import DAG

from airflow_dicom_get.operators.dicom import DicomFindOperator, DicomGetOperator
from airflow_dicom_get.testing.archive import MODALITY, SERIES_UID, STUDY_UID
from airflow_dicom_get.testing.sample_data import STUDY_DATE

AT_ONCE = {"retries": 2, "retry_delay": timedelta(0)}


def find(task_id: str, **options) -> DicomFindOperator:
    return DicomFindOperator(**{"task_id": task_id, "dicom_conn_id": "pacs", "study_date": STUDY_DATE, **options})


def uids(items: list[dict]) -> list[str]:
    return [item["study_instance_uid"] for item in items]


def test_what_is_found(run_dag, pacs, archive, patient):
    with DAG("find", params={"day": STUDY_DATE}) as dag:
        find("range", study_date="2024-01-01/2024-01-31")
        find("templated", study_date="{{ params.day }}")
        find("reports", modalities="SR")
        find("either", modalities=["MR", "OT"])
        find("no_such", modalities=["MR"])
        find("series", level="SERIES", modalities=["SR"])
        find("by_series_key", query={"Modality": "SR"})
        find("one", study_date=None, query={"StudyInstanceUID": archive.many})
        find("keys", study_date=None, query={"PatientID": patient[1]}, return_keys=["AccessionNumber", "(0020,1206)"])
        find("patient_root", query_model="PatientRoot")
    run = run_dag(dag)
    assert run.state == "success"
    both = sorted([archive.private, archive.many])
    for name in ("range", "templated", "keys", "patient_root"):
        assert uids(run.xcom(name)) == both
    for name in ("reports", "either", "series", "by_series_key"):
        assert uids(run.xcom(name)) == [archive.private]
    assert run.xcom("no_such") == []
    assert uids(run.xcom("one")) == [archive.many]
    for name in ("series", "by_series_key"):
        (item,) = run.xcom(name)
        assert (len(item["series_instance_uids"]), item["expected_instances"], item["modalities"]) == (1, 1, ["SR"])
        assert item["label"].endswith("SR (1 series)")
    assert [item["keys"] for item in run.xcom("keys")] == [
        {"AccessionNumber": f"A{uid[-8:]}", "NumberOfStudyRelatedSeries": "3"} for uid in both
    ]
    assert run.rendered("keys")["query"] == {"PatientID": "***"}
    assert not any(word in run.log for word in patient)


def test_a_pacs_that_gives_no_counts_and_no_modalities(run_dag, pacs, archive):
    pacs.omit_counts = True
    with DAG("meagre") as dag:
        find("all")
        find("reports", modalities="SR")
        find("shards", shard_instances=50)
    run = run_dag(dag)
    assert run.state == "success"
    assert [item["expected_instances"] for item in run.xcom("all")] == [None, None]
    assert run.xcom("all", "summary")["instances"] is None
    assert uids(run.xcom("reports")) == [archive.private]
    assert run.xcom("reports")[0]["modalities"] == ["CT", "OT", "SR"]
    assert [len(shard) for shard in run.xcom("shards")] == [1, 1]


def test_a_pacs_is_not_asked_for_modalities_without_end(run_dag, pacs):
    """Whoever triggers a run may choose them: each is a C-FIND."""
    with DAG("many", default_args=AT_ONCE) as dag:
        find("again", modalities=["SR"] * 1000)
        find("other", modalities=",".join(f"X{number}" for number in range(65)))
    run = run_dag(dag)
    assert (run.task("other").state, run.task("other").try_number) == ("failed", 1)
    assert "modalities has 65 codes, of which each is a C-FIND. Give 64 at most, or none for all studies." in run.log
    assert run.xcom("again", "summary")["queries"] == pacs.total_associations == 1


def test_nothing_found_is_what_the_dag_says_it_is(run_dag, pacs):
    with DAG("empty", default_args=AT_ONCE) as dag:
        for on_empty in ("return", "skip", "fail"):
            find(on_empty, study_date="19991231", on_empty=on_empty)
    run = run_dag(dag)
    assert [run.task(name).state for name in ("return", "skip", "fail")] == ["success", "skipped", "failed"]
    assert run.task("fail").try_number == 1
    assert run.xcom("return") == []
    assert run.xcom("skip", "summary")["matched"] == 0


BAD: dict[str, dict[str, Any]] = {
    "nothing": {"study_date": None},
    "blank": {"study_date": "{{ '' }}"},
    "twice": {"query": {"StudyDate": "20240101"}},
    "no_date": {"study_date": "yesterday"},
    "null": {"study_date": "{{ params.none }}"},
    "null_key": {"study_date": None, "query": {"StudyDate": "{{ params.none }}", "Modality": "CT"}},
    "other_level": {"query": {"QueryRetrieveLevel": "SERIES"}},
    "key": {"query": {"PatientNam": "x"}},
    "deep": {"query": {"InstanceNumber": "1"}},
    "wildcard": {"query": {"PatientID": "*"}},
    "modality": {"modalities": "['CT', 'MR']"},
    "no_connection": {"dicom_conn_id": "nowhere"},
}


@pytest.mark.parametrize("native", [False, True])
def test_bad_input_fails_at_once_and_before_any_traffic(run_dag, pacs, native):
    with DAG("find_bad", default_args=AT_ONCE, params={"none": None}, render_template_as_native_obj=native) as dag:
        # A list that a template renders natively is none of text.
        bad = {name: options for name, options in BAD.items() if not (native and name == "modality")}
        for name, options in bad.items():
            find(name, **options)
    run = run_dag(dag)
    # A connection may only seem to be missing: its secrets backend may be away for a moment.
    assert {name: (run.task(name).state, run.task(name).try_number) for name in bad} == {
        name: ("failed", 3 if name in ("no_connection",) else 1) for name in bad
    }
    assert pacs.total_associations == 0
    assert "study_date rendered to nothing. A run that was triggered without a logical date has no dates" in run.log
    assert "StudyDate is null, not a date" in run.log


def test_a_uid_that_is_named_and_not_there_is_said(run_dag, pacs, archive):
    """A get of the query is no success either; what another key leaves out is there."""
    (here,) = {row[SERIES_UID] for row in pacs.archive.find("SERIES", {STUDY_UID: archive.private, MODALITY: "SR"})}
    studies = {"StudyInstanceUID": [archive.many, "1.2.3"]}
    series = {"StudyInstanceUID": archive.private, "SeriesInstanceUID": [here, "1.2.3"]}
    both = {"StudyInstanceUID": [archive.many, archive.private]}
    with DAG("named", default_args=AT_ONCE) as dag:
        find("studies", study_date=None, query=studies)
        find("dated", query=studies)
        find("series", study_date=None, query=series, level="SERIES")
        find("goes_on", study_date=None, query=studies, on_truncation="return")
        find("left_out", study_date=None, query=both, modalities="SR")
        find("none", study_date=None, query={"StudyInstanceUID": "1.2.3"})
    run = run_dag(dag)
    states = {name: run.task(name).state for name in ("studies", "dated", "series", "goes_on", "left_out", "none")}
    assert states == dict.fromkeys(states, "success") | dict.fromkeys(("studies", "dated", "series"), "failed")
    assert run.log.count("The PACS lists nothing of these UIDs of the query: 1.2.3.") >= 4
    assert uids(run.xcom("goes_on")) == [archive.many]
    assert uids(run.xcom("left_out")) == [archive.private]
    truncated = {name: run.xcom(name, "summary")["truncated"] for name in states}
    assert truncated == dict.fromkeys(states, True) | {"left_out": False, "none": False}


@pytest.mark.parametrize("native", [False, True])
def test_the_date_of_a_run_is_the_day_that_it_is_at_the_node(run_dag, pacs, archive, native, monkeypatch):
    """Half past eleven in the evening of the day before, in UTC."""
    monkeypatch.setenv("AIRFLOW_CONN_BERLIN", f"dicom://PACS@127.0.0.1:{pacs.port}/?timezone=Europe%2FBerlin")
    with DAG("of_run", schedule="@daily", start_date=datetime(2024, 1, 1, tzinfo=UTC),
             render_template_as_native_obj=native) as dag:  # fmt: skip
        find("berlin", dicom_conn_id="berlin", study_date="{{ logical_date }}")
        find("ts", dicom_conn_id="berlin", study_date="{{ ts }}")
        find("query", dicom_conn_id="berlin", study_date=None, query={"StudyDate": "{{ logical_date }}"})
        find("utc", study_date="{{ logical_date }}")
    night = datetime.strptime(STUDY_DATE, "%Y%m%d").replace(tzinfo=UTC) - timedelta(minutes=30)
    run = run_dag(dag, logical_date=night)
    both = sorted([archive.private, archive.many])
    assert [uids(run.xcom(name)) for name in ("berlin", "ts", "query", "utc")] == [both, both, both, []]


def test_a_task_that_is_ended_before_its_client_is_made_asks_nothing_and_is_tried_again(run_dag, pacs):
    tasks = []

    class Ended(DicomFindOperator):
        def execute(self, context):
            tasks.append(self)
            if len(tasks) == 1:
                self.on_kill()
            return super().execute(context)

    with DAG("ended", default_args=AT_ONCE) as dag:
        Ended(task_id="find", dicom_conn_id="pacs", study_date=STUDY_DATE)
    run = run_dag(dag)
    assert (run.state, len(tasks)) == ("success", 2)
    assert "Cancelled: the task was ended." in run.log


def test_shards_are_mapped_and_each_retrieves_its_part(run_dag, pacs, archive, tmp_path):
    with DAG("shards") as dag:
        shards = find("find", shard_instances=25)
        DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=shards.output
        )
    run = run_dag(dag)
    assert run.state == "success"
    found = run.xcom("find")
    assert [[item["expected_instances"] for item in shard] for shard in found] == [[20], [20], [20], [12]]
    assert run.xcom("find", "summary")["returned"] == 4
    assert [run.xcom("get", "summary", index)["completed"] for index in range(4)] == [20, 20, 20, 12]
    assert set(pacs.sent.values()) == {1}
    assert len(pacs.sent) == 72


def test_a_study_whose_series_the_pacs_does_not_all_list_is_of_one_shard(run_dag, pacs, archive, tmp_path):
    """So that its get finds out: no shard of the series that are listed would."""
    whole = pacs.archive.find

    def short(self, level, keys, unsupported):
        rows = list(whole(level, keys, unsupported))
        return rows[:-1] if level == "SERIES" and not keys.get(SERIES_UID) else rows

    pacs.archive.find = MethodType(short, pacs.archive)
    with DAG("short") as dag:
        shards = find("find", study_date=None, query={"StudyInstanceUID": archive.many}, shard_instances=25)
        DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=shards.output
        )
        find("series", study_date=None, query={"StudyInstanceUID": archive.many}, level="SERIES")
    run = run_dag(dag)
    assert [[item["series_instance_uids"] for item in shard] for shard in run.xcom("find")] == [[None]]
    assert (run.task("find").state, run.task("get", 0).state, run.task("series").state) == (
        "success", "failed", "failed",
    )  # fmt: skip
    assert run.xcom("get", "summary", 0)["reason"] == "list_contradicted"
    assert "More studies may match (list_contradicted)" in run.log


def test_more_studies_than_can_be_mapped_are_said_to_be_before_airflow_fails(run_dag, pacs, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__MAX_MAP_LENGTH", "1")
    with DAG("long", default_args=AT_ONCE) as dag:
        found = find("find")
        DicomGetOperator.partial(task_id="get", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=found.output
        )
        shards = find("shards", shard_instances=10)
        DicomGetOperator.partial(task_id="get_shards", dicom_conn_id="pacs", destination=str(tmp_path)).expand(
            study=shards.output
        )
    run = run_dag(dag)
    assert (run.task("find").state, run.task("find").try_number) == ("failed", 1)
    assert "shard_instances" in run.log
    assert run.task("get_shards", 0).state == "success"
    assert run.xcom("get_shards", "summary", 0)["completed"] == 72


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("options", "state"), [({}, "failed"), ({"on_truncation": "return"}, "success")])
def test_a_pacs_that_cuts_its_answers(run_dag, pacs, archive, split, options, state):
    """It gives the same study a hundred times over and then no more, whatever is asked."""
    whole = pacs.archive.find

    def cut(self, level, keys, unsupported):
        rows = list(whole(level, keys, unsupported))
        return [rows[0]] * 100 if rows else rows

    pacs.archive.find = MethodType(cut, pacs.archive)
    with DAG(f"cut_{split}_{state}") as dag:
        find("find", split_on_truncation=split, **options)
    run = run_dag(dag)
    summary = run.xcom("find", "summary")
    assert run.task("find").state == state
    assert run.task("find").try_number == 1
    assert summary["truncated"]
    assert (summary["queries"] > 10) == split
    assert "More studies may match (list_may_be_cut)" in run.log
