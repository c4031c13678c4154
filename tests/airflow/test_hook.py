"""The connection in all its forms, and the hook's verbs against the embedded PACS."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.get_provider_info import get_provider_info
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.servers import Storescp

PLAIN = {"conn_type": "dicom", "host": "pacs.example", "port": 104, "login": "ORTHANC"}


@pytest.fixture
def connect(monkeypatch):
    """Make a connection by environment, as JSON or as a URI, and give its hook."""

    def make(value, conn_id="pacs") -> DicomHook:
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", text)
        return DicomHook(conn_id)

    return make


def test_a_uri_is_a_whole_connection(connect):
    hook = connect("dicom://ORTHANC@127.0.0.1:4242")
    assert str(hook.node) == "ORTHANC@127.0.0.1:4242"
    assert (hook.config.values, hook.query_model) == ({}, "StudyRoot")
    assert hook.timezone == "UTC"


def test_what_the_form_saves_is_taken_with_all_its_nulls(connect):
    form = get_provider_info()["connection-types"][0]["conn-fields"]
    saved = {key: field["schema"].get("default") for key, field in form.items()}
    scu_options = connect({**PLAIN, "extra": saved}).options()
    assert scu_options == connect(PLAIN, "plain").options()


@pytest.mark.parametrize(
    "write",
    [
        lambda extra: {**PLAIN, "extra": extra},
        lambda extra: {**PLAIN, "extra": json.dumps(extra)},
        lambda extra: {**PLAIN, "extra": {key: str(value) for key, value in extra.items()}},
        lambda extra: "dicom://ORTHANC@pacs.example:104/?" + "&".join(f"{k}={v}" for k, v in extra.items()),
    ],
    ids=["json", "json in json", "texts", "uri"],
)
def test_numbers_and_texts_mean_the_same(connect, write):
    extra = {
        "max_pdu_length": 65536,
        "max_associations": 4,
        "connect_timeout": 2.5,
        "operation_timeout": 60,
        "use_tls": True,
        "tls_check_hostname": False,
        "query_model": "PatientRoot",
    }
    hook = connect(write(extra))
    options = hook.options()
    assert hook.query_model == "PatientRoot"
    assert options.max_pdu_length == 65536
    assert int(hook.config.values["max_associations"]) == 4
    assert (options.deadlines.connect, options.deadlines.operation, options.deadlines.acse) == (2.5, 60, 30)
    assert options.tls is not None
    assert not options.tls.check_hostname


def test_the_password_is_the_passphrase_of_the_key_and_never_shown(connect, tmp_path):
    extra: dict[str, Any] = {"use_tls": True}
    for field in ("tls_cert_file", "tls_key_file"):
        extra[field] = str(tmp_path / field)
        (tmp_path / field).touch()
    hook = connect({**PLAIN, "password": "hush-hush", "extra": extra})
    assert hook.options().tls.key_password == "hush-hush"
    assert "hush-hush" not in repr(hook.options())


@pytest.mark.parametrize("extra", [{}, {"calling_ae_title": "RELAY"}])
def test_a_node_knows_us_by_one_title_whether_it_is_asked_stored_at_or_forwarded_to(connect, tmp_path, extra):
    hook = connect({**PLAIN, "extra": extra})
    title = extra.get("calling_ae_title", "GET-SCU")
    assert hook.options().calling_ae_title == title
    assert hook.get_store_scu(manifest_root=tmp_path).options.calling_ae_title == title
    assert hook.config.forward_target().calling_ae_title == title


def test_an_unknown_extra_changes_nothing_and_is_named_in_a_warning(connect, caplog):
    hook = connect({**PLAIN, "extra": {"calling_aet": "X", "max_associations": 3}})
    assert hook.config.values == {"max_associations": 3}
    assert "Connection pacs: the extra field 'calling_aet' is unknown" in caplog.text
    # What the form leaves empty asks for nothing.
    assert (
        connect({**PLAIN, "extra": {"tls_of_old": None, "use_tls": False, "tls_min_version": "1.2"}}).config.own.tls
        is None
    )


def test_a_blank_called_title_is_any_scp_with_a_warning(connect, caplog):
    assert connect({**PLAIN, "login": ""}).options().called == "ANY-SCP"
    assert "login (called AE title) is blank" in caplog.text


def test_a_task_gets_its_share_of_what_holds_for_all(connect):
    hook = connect({**PLAIN, "extra": {"max_associations": 4, "bytes_per_second": "8M"}})
    one, two = hook.options(), hook.options(associations=2)
    assert (one.max_associations, one.bytes_per_second) == (1, 2_000_000)
    assert (two.max_associations, two.bytes_per_second) == (2, 4_000_000)
    with pytest.raises(InvalidOption, match="max_associations"):
        hook.options(associations=5)


def test_a_task_that_may_run_so_long_ends_before(connect):
    assert connect(PLAIN, "a").options(seconds=20).deadlines.operation == 20
    hook = connect({**PLAIN, "extra": {"operation_timeout": 10}}, "b")
    assert hook.options(seconds=20).deadlines.operation == 10
    assert hook.options().deadlines.operation == 10


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"host": None}, "host"),
        ({"host": "  "}, "host"),
        ({"host": "me:hush-hush@pacs.example"}, "host"),
        ({"host": "hush-hush@pacs.example"}, "host"),
        ({"port": None}, "port"),
        ({"port": 0}, "port"),
        ({"port": 70000}, "port"),
        ({"login": "SEVENTEEN-LETTERS"}, "login"),
        ({"login": "ÄÖÜ"}, "login"),
        ({"login": "A\\B"}, "login"),
        ({"conn_type": "http"}, "type"),
        ({"conn_type": None}, "type"),
        ({"extra": {"calling_ae_title": "SEVENTEEN-LETTERS"}}, "calling_ae_title"),
        ({"extra": {"max_pdu_length": 12}}, "max_pdu_length"),
        ({"extra": {"max_associations": 0}}, "max_associations"),
        ({"extra": {"connect_timeout": -1}}, "connect_timeout"),
        ({"extra": {"connect_timeout": "soon"}}, "connect_timeout"),
        ({"extra": {"window": "at night"}}, "window"),
        ({"extra": {"timezone": "Mars/Olympus"}}, "timezone"),
        ({"extra": {"query_model": "Composite"}}, "query_model"),
        ({"extra": {"use_tls": "perhaps"}}, "use_tls"),
        ({"extra": {"use_tls": True, "tls_min_version": "1.0"}}, "tls_min_version"),
        ({"extra": {"use_tls": True, "tls_key_file": "/k.pem"}}, "tls_key_file"),
        ({"extra": {"tls_ca_file": "/ca.pem"}}, "tls_ca_file"),
        ({"extra": {"use_tls": False, "tls_ca_file": "/ca.pem"}}, "tls_ca_file"),
        ({"extra": {"tls_min_version": "1.3"}}, "tls_min_version"),
        ({"extra": {"tls_check_hostname": "false"}}, "tls_check_hostname"),
        ({"password": "hush-hush"}, "password (TLS key passphrase)"),
        ({"extra": {"use_tls": True, "tls_ca": "/ca.pem"}}, "tls_ca"),
        ({"extra": {"TLS_CA_FILE": "/ca.pem"}}, "TLS_CA_FILE"),
        ({"extra": {"ssl_cert": "/c.pem"}}, "ssl_cert"),
        ({"extra": {"use_ssl": True}}, "use_ssl"),
        ({"extra": "[1, 2]"}, "extra"),
        ({"extra": "{broken"}, "extra"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_each_bad_field_is_named_with_its_connection(connect, change, field):
    hook = connect({**PLAIN, **change})
    with pytest.raises(InvalidOption) as caught:
        hook.config  # noqa: B018
    assert str(caught.value).startswith("Connection pacs: ")
    assert field in str(caught.value).partition(". ")[0]
    assert "hush" not in str(caught.value)
    ok, message = hook.test_connection()
    assert not ok
    assert field in message.partition(". ")[0]
    assert not message.startswith("Connection")


def test_a_connection_that_is_not_there_is_an_error_of_airflow():
    with pytest.raises(AirflowNotFoundException):
        DicomHook("nowhere").config  # noqa: B018
    ok, message = DicomHook("nowhere").test_connection()
    assert not ok
    assert "nowhere" in message


# --- against a PACS --------------------------------------------------------------------------------


def test_the_verbs(pacs, archive, tmp_path):
    hook = DicomHook("pacs")
    assert hook.echo().accepted["C-ECHO"]
    assert [str(row.StudyInstanceUID) for row in hook.find({"StudyInstanceUID": archive.many})] == [archive.many]
    assert len(hook.find({"StudyInstanceUID": archive.many}, level="SERIES")) == 3
    assert hook.plan({"StudyInstanceUID": archive.many}).missing == 60
    result = hook.get_study({"StudyInstanceUID": archive.private}, str(tmp_path), tags=["Modality"])
    assert (result.verdict, result.completed) == ("complete", 12)
    assert set(result.manifest["Modality"]) == {"CT", "OT", "SR"}


def test_the_answers_of_a_find_as_a_frame_that_a_task_returns(run_dag, pacs, archive, monkeypatch):
    from airflow.sdk import DAG, task

    keys = ["PatientBirthDate"]
    real = pacs.archive.find

    def find(level, asked, unsupported):
        """One of the two has a date that is none."""
        rows = real(level, asked, unsupported)
        return [*rows[:-1], *({**row, 0x00100030: "in May"} for row in rows[-1:])]

    with DAG("frames") as dag:

        @task
        def found(query):
            return DicomHook("pacs").find_df(query, return_keys=keys)

        @task
        def series():
            return DicomHook("pacs").find_df({"StudyInstanceUID": archive.many}, level="SERIES")

        found.override(task_id="some")({"StudyDate": "20240101/20240131"})
        found.override(task_id="none")({"StudyDate": "19991231"})
        series()
    monkeypatch.setattr(pacs.archive, "find", find)
    run = run_dag(dag)
    assert run.state == "success"
    some, none = run.xcom("some"), run.xcom("none")
    assert sorted(some["StudyInstanceUID"]) == sorted([archive.private, archive.many])
    assert set(some["StudyDate"]) == {pd.Timestamp("2024-01-15")}
    assert some["PatientBirthDate"].isna().sum() == 1
    assert str(some["AccessionNumber"].dtype).startswith("string")
    assert len(none) == 0
    assert {"StudyInstanceUID", "StudyDate", "PatientBirthDate"} <= set(none.columns)
    assert len(run.xcom("series")) == 3


def test_two_lines_in_a_task(run_dag, pacs, archive, tmp_path):
    from airflow.sdk import DAG, task

    with DAG("two_lines") as dag:

        @task
        def retrieve():
            hook = DicomHook("pacs")
            return hook.get_study({"StudyInstanceUID": archive.private}, destination=str(tmp_path)).verdict

        retrieve()
    run = run_dag(dag)
    assert run.xcom("retrieve") == "complete"


def test_the_test_button_says_what_the_pacs_offers(pacs):
    ok, message = DicomHook("pacs").test_connection()
    assert ok
    for word in ("C-ECHO", "C-FIND StudyRoot", "C-GET StudyRoot"):
        assert word in message


def test_the_test_button_by_way_of_airflow(pacs):
    from airflow.sdk import Connection

    conn = Connection(conn_id="other", conn_type="dicom", host="127.0.0.1", port=pacs.port, login="PACS")
    ok, message = conn.test_connection()
    assert (ok, "C-GET" in message) == (True, True), message


def test_the_test_button_says_what_to_mend(pacs, archive, connect):
    with EmbeddedPacs(archive.folder, require_called_ae=True) as strict:
        ok, message = connect(f"dicom://WRONG@127.0.0.1:{strict.port}").test_connection()
    assert not ok
    assert "called WRONG" in message

    pacs.no_get = True
    ok, message = connect(f"dicom://PACS@127.0.0.1:{pacs.port}").test_connection()
    assert not ok
    assert "not C-GET" in message

    pacs.no_get, pacs.no_find = False, True
    ok, message = connect(f"dicom://PACS@127.0.0.1:{pacs.port}").test_connection()
    assert ok
    assert "Without C-FIND" in message

    port = pacs.port
    pacs.stop()
    ok, message = connect(f"dicom://PACS@127.0.0.1:{port}").test_connection()
    assert not ok
    assert str(port) in message


STORES = "can be forwarded to; cannot be retrieved from."


@pytest.mark.dcmtk
def test_a_node_that_only_stores_is_a_good_one(connect, tmp_path):
    with Storescp(tmp_path) as node:
        ok, message = connect(f"dicom://STORESCP@127.0.0.1:{node.port}").test_connection()
    assert ok
    assert message.endswith(f"and offers C-ECHO, C-STORE: {STORES}")


def test_a_pacs_without_c_get_is_told_from_a_node_that_only_stores(pacs, connect):
    pacs.no_get = pacs.no_find = True
    ok, message = connect(f"dicom://PACS@127.0.0.1:{pacs.port}").test_connection()
    assert ok
    assert message.endswith(STORES)
    pacs.no_find = False
    ok, message = connect(f"dicom://PACS@127.0.0.1:{pacs.port}").test_connection()
    assert not ok
    assert "but not C-GET StudyRoot: studies cannot be retrieved from it by C-GET." in message


def test_the_test_button_ends_in_time_when_nobody_answers(connect, monkeypatch):
    monkeypatch.setattr("airflow_dicom_get.hooks.dicom.TEST_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        ok, message = connect(f"dicom://A@127.0.0.1:{silent.getsockname()[1]}").test_connection()
    assert not ok
    assert time.monotonic() - began < 1.5
    assert "127.0.0.1" in message


def test_the_test_button_never_raises_and_shows_no_secret(pacs, connect, monkeypatch):
    hook = connect({**PLAIN, "password": "hush-hush", "extra": {"use_tls": True}})

    def fails(self, *args, **kwargs):
        raise RuntimeError("something with hush-hush in it")

    monkeypatch.setattr(DicomHook, "get_scu", fails)
    ok, message = hook.test_connection()
    assert not ok
    assert "RuntimeError" in message
    assert "hush-hush" not in message
