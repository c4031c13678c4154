"""The parameters of operators and sensor: those of the contract, and what of them is refused as the DAG is parsed."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator, BaseSensorOperator

from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)
from airflow_dicom_get.sensors.dicom import DicomStudySensor

TRANSFER = {
    "manifest": None, "s3_conn_id": None, "associations": 1, "accept": ("complete",), "strict_forward": False,
    "resume": True, "manifest_root": None, "manifest_xcom": "auto", "outside_window": "defer", "engine_options": None,
}  # fmt: skip
REQUIRED = inspect.Parameter.empty
# Written down by hand: what DAGs rely on.
PARAMETERS: dict[type[BaseOperator], dict[str, Any]] = {
    DicomFindOperator: {
        "query": None, "level": "STUDY", "study_date": None, "modalities": None, "return_keys": (),
        "split_on_truncation": True, "on_truncation": "fail", "shard_instances": None, "on_empty": "return",
        "query_model": None, "dicom_conn_id": "dicom_default",
    },
    DicomGetOperator: {
        **TRANSFER, "study": None, "query": None, "destination": REQUIRED, "dicom_conn_id": "dicom_default",
        "query_model": None, "store_with_file_meta": True, "tags": (), "on_bad_study": "fail", "verbose": False,
    },
    DicomStoreOperator: {**TRANSFER, "source": None, "target_conn_id": REQUIRED},
    DicomVerifyOperator: {
        "manifest": None, "study": None, "destination": None, "dicom_conn_id": None, "s3_conn_id": None,
        "quick": False, "fail_on_difference": True, "listed_within": timedelta(0),
    },
    DicomStudySensor: {
        "study": None, "query": None, "settled_for": timedelta(minutes=10), "min_instances": 1,
        "dicom_conn_id": "dicom_default", "poke_interval": 60, "deferrable": False,
    },
}  # fmt: skip
TEMPLATED: dict[type[BaseOperator], set[str]] = {
    DicomFindOperator: {"query", "study_date", "modalities", "dicom_conn_id"},
    DicomGetOperator: {"study", "query", "manifest", "destination", "dicom_conn_id", "s3_conn_id", "manifest_root"},
    DicomStoreOperator: {"manifest", "source", "target_conn_id", "s3_conn_id", "manifest_root"},
    DicomVerifyOperator: {"manifest", "study", "destination", "dicom_conn_id", "s3_conn_id"},
    DicomStudySensor: {"study", "query", "dicom_conn_id"},
}


@pytest.mark.parametrize("operator", PARAMETERS)
def test_the_parameters_are_those_of_the_contract(operator):
    found: dict[str, Any] = {}
    for cls in operator.__mro__:
        if cls in (BaseOperator, BaseSensorOperator):
            break
        if "__init__" not in vars(cls):
            continue
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name not in ("self", "kwargs"):
                assert parameter.kind is parameter.KEYWORD_ONLY, name
                found.setdefault(name, parameter.default)
    assert found == PARAMETERS[operator]
    assert set(operator.template_fields) == TEMPLATED[operator]


ALLOWED = {
    "verify_held": "digest", "on_conflict": "replace", "adopt": True, "trust_destination": True, "checksum": None,
    "durable": False, "ack": "durable", "sop_classes": ["CTImageStorage"], "require_exact": True, "retries": 2,
    "transfer_syntaxes": ["1.2.840.10008.1.2.1"], "deadlines": {"idle": 5}, "transcript": "/tmp/transcript",
}  # fmt: skip
STORING = {"verify_held", "trust_destination", "checksum", "retries", "deadlines", "transcript"}
REFUSED: list[tuple[Any, str]] = [
    ({"associations": 2}, "'associations' is not one of them"),
    ({"resume": False}, "'resume' is not one of them"),
    ({"max_associations": 2}, "belong to the connection"),
    ({"bytes_per_second": 1000}, "belong to the connection"),
    ({"window": "22:00-06:00"}, "belong to the connection"),
    ({"calling_ae_title": "X"}, "belong to the connection"),
    ({"tls": {}}, "belong to the connection"),
    ({"list_limit": 0}, "'list_limit' is not one of them"),
    ({"no_such": 1}, "'no_such' is not one of them"),
    ({"verify_held": "md5"}, "verify_held: 'md5' is not allowed"),
    ({"retries": -1}, "retries: -1 is not allowed"),
    ({"deadlines": {"idle": 0}}, "deadlines.idle: 0 is not allowed"),
    ({"transcript": "said.jsonl"}, "is not an absolute path"),
    (["verify_held"], "is not a mapping"),
    ("verify_held", "is not a mapping"),
]


def make(operator, *, mapped: bool, **options):
    """An operator of a DAG that is parsed, as it is or mapped."""
    own: dict[type[BaseOperator], dict[str, Any]] = {
        DicomGetOperator: {"destination": "/data"},
        DicomStoreOperator: {"target_conn_id": "archive"},
    }
    over: Any = {DicomFindOperator: {"study_date": "today"}, DicomStudySensor: {"study": "1.2"}}
    name, value = next(iter(over.get(operator, {"manifest": "/m.parquet"}).items()))
    with DAG("parsed"):
        if mapped:
            return operator.partial(task_id="task", **own.get(operator, {}), **options).expand(**{name: [value]})
        return operator(task_id="task", **{name: value}, **own.get(operator, {}), **options)


WRONG: list[tuple[type[BaseOperator], dict[str, Any], str]] = [
    *(
        (operator, options, words)
        for operator in (DicomGetOperator, DicomStoreOperator)
        for options, words in (
            ({"accept": ("bogus",)}, "accept: 'bogus' is not allowed. Give some of complete"),
            ({"accept": None}, "accept is missing"),
            ({"associations": 99}, "associations: 99 is not allowed. Give a whole number from 1 to"),
            ({"associations": 0}, "associations: 0 is not allowed"),
            ({"associations": "{{ params.n }}"}, "associations: '{{ params.n }}' is not allowed"),
            ({"manifest_xcom": "always"}, "manifest_xcom: 'always' is not allowed. Give auto, full or reference."),
            ({"outside_window": "wait"}, "outside_window: 'wait' is not allowed"),
            ({"resume": "perhaps"}, "resume: 'perhaps' is not allowed"),
            ({"strict_forward": None}, "strict_forward is missing"),
        )
    ),
    (DicomGetOperator, {"on_bad_study": "ignore"}, "on_bad_study: 'ignore' is not allowed"),
    (DicomGetOperator, {"query_model": "Worklist"}, "query_model: 'Worklist' is not allowed"),
    (DicomGetOperator, {"tags": "StudyDat"}, "tags: 'StudyDat' is not a DICOM keyword. Did you mean StudyDate?"),
    (DicomGetOperator, {"store_with_file_meta": 2}, "store_with_file_meta: 2 is not allowed"),
    (DicomGetOperator, {"verbose": "loud"}, "verbose: 'loud' is not allowed"),
    (DicomFindOperator, {"level": "IMAGE"}, "level: 'IMAGE' is not allowed. Give STUDY or SERIES."),
    (DicomFindOperator, {"shard_instances": 0}, "shard_instances: 0 is not allowed"),
    (DicomFindOperator, {"on_empty": "ignore"}, "on_empty: 'ignore' is not allowed"),
    (DicomFindOperator, {"on_truncation": "ignore"}, "on_truncation: 'ignore' is not allowed"),
    (DicomFindOperator, {"query_model": "Worklist"}, "query_model: 'Worklist' is not allowed"),
    (DicomFindOperator, {"return_keys": ["NoSuchKey"]}, "return_keys: 'NoSuchKey' is not a DICOM keyword"),
    (DicomFindOperator, {"return_keys": "NoSuchKey"}, "return_keys: 'NoSuchKey' is not a DICOM keyword"),
    (DicomVerifyOperator, {"quick": "fast"}, "quick: 'fast' is not allowed"),
    (DicomStudySensor, {"settled_for": timedelta(-1)}, "settled_for: datetime.timedelta(days=-1) is not allowed"),
    (DicomStudySensor, {"settled_for": 600}, "settled_for: 600 is not allowed. Give a timedelta"),
    (DicomStudySensor, {"min_instances": 0}, "min_instances: 0 is not allowed"),
    (DicomStudySensor, {"mode": "reschedule"}, "mode: reschedule forgets in between what was counted before"),
]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("operator", "options", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_no_template_is_checked_as_the_dag_is_parsed(operator, options, words, mapped):
    with pytest.raises(InvalidOption) as caught:
        make(operator, mapped=mapped, **options)
    assert words in str(caught.value)


def test_the_mode_of_a_mapped_sensor_is_checked_as_the_dag_is_parsed():
    with pytest.raises(InvalidOption, match=r"mode: 'sleep' is not allowed\. Give poke or reschedule"):
        make(DicomStudySensor, mapped=True, mode="sleep")


@pytest.mark.parametrize("mapped", [False, True])
def test_a_sensor_that_counts_elsewhere_may_be_rescheduled(mapped):
    make(DicomStudySensor, mapped=mapped, mode="reschedule", settled_for=timedelta(0))
    make(DicomStudySensor, mapped=mapped, mode="reschedule", deferrable=True)


def test_a_text_where_a_list_of_keywords_belongs_is_one_keyword():
    assert make(DicomGetOperator, mapped=False, tags="StudyDate").tags == ("StudyDate",)
    assert make(DicomFindOperator, mapped=False, return_keys="(0020,1206)").return_keys == (
        "NumberOfStudyRelatedSeries",
    )
    assert make(DicomGetOperator, mapped=False, accept="partial").accept == ("partial",)


def test_a_parameter_that_a_subclass_has_as_a_template_is_left_for_later():
    class Templated(DicomGetOperator):
        template_fields = (*DicomGetOperator.template_fields, "accept")

    with DAG("parsed"):
        task = Templated(task_id="task", study="1.2", destination="/data", accept="{{ params.accept }}")
    assert task.accept == "{{ params.accept }}"


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("operator", [DicomGetOperator, DicomStoreOperator])
def test_other_options_of_the_engine_are_refused_as_the_dag_is_parsed(operator, options, words, mapped):
    with pytest.raises(InvalidOption) as caught:
        make(operator, mapped=mapped, engine_options=options)
    assert words in str(caught.value)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ALLOWED)
def test_the_options_of_the_engine_that_a_task_may_set(name, mapped):
    options = {name: ALLOWED[name]}
    make(DicomGetOperator, mapped=mapped, engine_options=options)
    if name in STORING:
        make(DicomStoreOperator, mapped=mapped, engine_options=options)
        return
    with pytest.raises(InvalidOption, match="is not one of them"):
        make(DicomStoreOperator, mapped=mapped, engine_options=options)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_store_takes_its_target_by_no_other_name(mapped):
    with pytest.raises(TypeError, match="dicom_conn_id"):
        make(DicomStoreOperator, mapped=mapped, dicom_conn_id="pacs")
    with pytest.raises(TypeError, match="target_conn_id"), DAG("parsed", default_args={"dicom_conn_id": "pacs"}):
        DicomStoreOperator(task_id="task", manifest="/m.parquet")  # type: ignore[call-arg]
    with DAG("parsed", default_args={"dicom_conn_id": "pacs"}):
        store = DicomStoreOperator(task_id="task", manifest="/m.parquet", target_conn_id="archive")
    assert store.hook.dicom_conn_id == "archive"
