"""The ``dicom_s3`` connection in all its forms, stock ``aws`` ones, and the Test button, on real services."""

from __future__ import annotations

import json
import sys
import time

import pytest
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.get_provider_info import get_provider_info
from airflow_dicom_get.hooks.dicom_s3 import FIELDS, DicomS3Hook
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, FaultProxy

PLAIN = {"conn_type": "dicom_s3", "host": "minio.example", "port": 9000, "login": "key", "password": "hush-hush"}
FORM = next(x for x in get_provider_info()["connection-types"] if x["connection-type"] == "dicom_s3")


@pytest.fixture
def connect(monkeypatch):
    """Make a connection by environment, as JSON or as a URI, and give its hook."""

    def make(value, conn_id="archive") -> DicomS3Hook:
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", text)
        return DicomS3Hook(conn_id)

    return make


def of(server, **extra):
    """The connection to a service."""
    return {
        "conn_type": "dicom_s3",
        "host": "127.0.0.1",
        "port": server.port,
        "login": ACCESS_KEY,
        "password": SECRET_KEY,
        "extra": {"scheme": "http", "bucket": BUCKET, **extra},
    }


# --- the form --------------------------------------------------------------------------------------


def test_the_form_has_the_settings_of_s3_and_what_belongs_to_the_connection_alone():
    form = FORM["conn-fields"]
    assert set(form) == {"scheme", "bucket", "path_style", *FIELDS}
    assert form["path_style"]["schema"]["enum"] == ["auto", "path", "virtual"]
    import dataclasses

    settings = {item.name: item for item in dataclasses.fields(S3Config)}
    for key, name in FIELDS.items():
        check = settings[name].metadata["setting"].check
        declared = form[key]["schema"]
        assert declared["type"] == [check.json_type, "null"], key
        assert tuple(declared.get("enum", ())) == getattr(check, "values", ()), key
        if key != "region":  # S3Config takes the profile's before it
            assert declared.get("default") == settings[name].default, key
    # What is masked is told by its name.
    assert "token" in next(key for key in form if form[key]["schema"].get("format") == "password")
    # Without a port saved, the Test button gets no answer but "Bad Request".
    assert FORM["ui-field-behaviour"]["placeholders"]["port"] == "443"
    assert "port" not in FORM["ui-field-behaviour"]["hidden-fields"]


def test_what_the_form_saves_is_taken_with_all_its_nulls(connect):
    saved = {key: field["schema"].get("default") for key, field in FORM["conn-fields"].items()}
    assert connect({**PLAIN, "extra": saved}).config == connect({**PLAIN, "extra": {"region": "us-east-1"}}, "b").config


# --- connections -----------------------------------------------------------------------------------


def test_a_connection_is_a_configuration(connect):
    extra = {"region": "eu-central-1", "session_token": "tok", "storage_class": "GLACIER_IR", "max_concurrency": "4"}
    hook = connect({**PLAIN, "extra": {**extra, "bucket": "trial", "path_style": "virtual"}})
    assert hook.config == S3Config(
        access_key="key", secret_key="hush-hush", endpoint="https://minio.example:9000", region="eu-central-1",
        session_token="tok", storage_class="GLACIER_IR", max_concurrency=4, path_style=False,
    )  # fmt: skip
    assert hook.bucket == "trial"
    assert "hush-hush" not in repr(hook.config)


def test_a_uri_is_a_whole_connection(connect):
    hook = connect("dicom-s3://key:secret@127.0.0.1:9000/?scheme=http&bucket=trial")
    assert hook.config == S3Config(access_key="key", secret_key="secret", endpoint="http://127.0.0.1:9000")
    assert hook.bucket == "trial"


def test_a_blank_host_is_aws(connect):
    assert connect({**PLAIN, "host": "", "port": 443}).config.endpoint is None


def test_a_blank_port_is_that_of_the_scheme_with_a_warning(connect, capsys):
    assert connect({**PLAIN, "port": None}).config.endpoint == "https://minio.example"
    assert "the port is blank" in capsys.readouterr().out


def test_an_address_of_ip_version_6(connect):
    assert connect({**PLAIN, "host": "::1"}).config.endpoint == "https://[::1]:9000"


def test_an_unknown_extra_changes_nothing_and_is_named_in_a_warning(connect, capsys):
    assert connect({**PLAIN, "extra": {"zone_of_s3": "x"}}).config == connect(PLAIN, "plain").config
    assert "the extra field 'zone_of_s3' is unknown" in capsys.readouterr().out


def test_credentials_of_the_machine_are_never_taken_in_silence(connect, capsys):
    assert connect({**PLAIN, "login": None, "password": None}).config.access_key is None
    assert "has no keys, profile or role" in capsys.readouterr().out
    connect({**PLAIN, "login": None, "password": None, "extra": {"profile": "p"}}, "b").config  # noqa: B018
    assert "no keys" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"password": None}, "password (secret key)"),
        ({"login": ""}, "login (access key)"),
        ({"host": "https://minio.example"}, "host"),
        ({"host": "minio.example:9000"}, "host"),
        ({"host": "minio example"}, "host"),
        ({"host": "me:hush-hush@minio.example"}, "host"),
        ({"host": "https://me:hush-hush@minio.example"}, "host"),
        ({"host": "hush-hush@minio.example:9000"}, "host"),
        ({"conn_type": "dicom"}, "type"),
        ({"conn_type": None}, "type"),
        ({"extra": {"scheme": "ftp"}}, "scheme"),
        ({"extra": {"bucket": "no_bucket/at all"}}, "bucket"),
        ({"extra": {"path_style": "perhaps"}}, "path_style"),
        ({"extra": {"path_style": True}}, "path_style"),
        ({"extra": {"tls_ca": "/ca.pem"}}, "tls_ca"),
        ({"extra": {"ssl": True}}, "ssl"),
        ({"extra": {"scheme": "http", "ca_file": "/ca.pem"}}, "ca_file"),
        ({"extra": {"profile": "p"}}, "profile"),
        ({"login": None, "password": None, "extra": {"session_token": "t"}}, "session_token"),
        ({"extra": {"sse": "rot13"}}, "sse"),
        ({"extra": {"kms_key_id": "k"}}, "kms_key_id"),
        ({"extra": {"max_concurrency": 0}}, "max_concurrency"),
        ({"extra": {"ca_file": "/nowhere.pem"}}, "ca_file"),
        ({"extra": {"ca_file": "ca.pem"}}, "ca_file"),
        ({"extra": "[1]"}, "extra"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_each_bad_field_is_named_with_its_connection(connect, change, field):
    hook = connect({**PLAIN, **change})
    with pytest.raises(InvalidOption) as caught:
        hook.config  # noqa: B018
    assert str(caught.value).startswith("Connection archive: ")
    assert field in str(caught.value).partition(". ")[0]
    assert "s3_config" not in str(caught.value)
    assert "hush" not in str(caught.value)
    ok, message = hook.test_connection()
    assert not ok
    assert field in message


def test_a_connection_that_is_not_there_is_an_error_and_nothing_is_taken_in_its_place(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-machine")
    with pytest.raises(AirflowNotFoundException, match=r"nowhere.* with the type DICOM storage \(S3\)"):
        DicomS3Hook("nowhere").config  # noqa: B018


# --- stock aws connections -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conn",
    [
        {"login": "key", "password": "secret"},
        {"extra": {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}},
        {"extra": {"session_kwargs": {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}}},
    ],
    ids=["fields", "extra", "session_kwargs"],
)
def test_the_keys_of_an_aws_connection(connect, conn):
    config = connect({"conn_type": "aws", **conn}).config
    assert config == S3Config(access_key="key", secret_key="secret")


def test_an_aws_connection_whole(connect, tmp_path):
    ca = tmp_path / "ca.pem"
    ca.touch()
    extra = {
        "aws_session_token": "tok",
        "region_name": "eu-west-1",
        "endpoint_url": "https://other:1",
        "verify": str(ca),
        "service_config": {"s3": {"endpoint_url": "http://s3:9000", "bucket_name": "trial"}},
        "config_kwargs": {"connect_timeout": 3},
    }
    hook = connect({"conn_type": "aws", "login": "key", "password": "secret", "extra": extra})
    assert hook.config == S3Config(
        access_key="key", secret_key="secret", session_token="tok", region="eu-west-1", endpoint="http://s3:9000",
        ca_bundle=str(ca),
    )  # fmt: skip
    assert hook.bucket == "trial"


def test_the_profile_of_an_aws_connection(connect):
    assert connect({"conn_type": "aws", "extra": {"profile_name": "p", "verify": True}}).config == S3Config(profile="p")


@pytest.mark.parametrize(
    ("conn", "field"),
    [
        ({"login": "key"}, "password (secret key)"),
        ({"extra": {"aws_access_key_id": "key"}}, "aws_secret_access_key"),
        ({"login": "k", "password": "s", "extra": {"verify": False}}, "verify"),
        ({"login": "k", "password": "s", "extra": {"verify": "/nowhere.pem"}}, "verify"),
        ({"login": "k", "password": "s", "extra": {"endpoint_url": "minio"}}, "endpoint_url"),
        ({"extra": {"session_kwargs": 3}}, "session_kwargs"),
        ({"login": "k", "password": "s", "extra": {"config_kwargs": 3}}, "config_kwargs"),
        (
            {"login": "k", "password": "s", "extra": {"config_kwargs": {"s3": {"addressing_style": "sideways"}}}},
            "config_kwargs",
        ),
        ({"login": "k", "password": "s", "extra": {"ssl_verify": False}}, "ssl_verify"),
        ({"extra": {"endpoint_url": "https://me:hush-hush@minio.example"}}, "endpoint_url"),
        ({"extra": {"config_kwargs": {"proxies": {"https": "http://me:hush-hush@proxy:3128"}}}}, "proxies"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_each_bad_field_of_an_aws_connection_is_named(connect, conn, field):
    with pytest.raises(InvalidOption) as caught:
        connect({"conn_type": "aws", **conn}).config  # noqa: B018
    assert field in str(caught.value).partition(". ")[0]
    assert "hush" not in str(caught.value)


def test_what_is_not_taken_of_an_aws_connection_is_named(connect, capsys):
    extra = {
        "config_kwargs": {"connect_timeout": 3, "s3": {"use_accelerate_endpoint": True}},
        "regoin_name": "eu-west-1",
        "assume_role_note": "its provider's",
        "external_id": None,
    }
    assert connect({"conn_type": "aws", "login": "k", "password": "s", "extra": extra}).config == S3Config(
        access_key="k", secret_key="s"
    )
    said = capsys.readouterr().out
    for key in ("regoin_name", "config_kwargs.connect_timeout", "config_kwargs.use_accelerate_endpoint"):
        assert f"the extra field '{key}' is unknown and has no effect" in said
    assert "assume_role_note" not in said


@pytest.mark.parametrize(
    ("options", "host", "path", "signature"),
    [
        ({}, "s3.example", f"/{BUCKET}/", "AWS4-HMAC-SHA256 "),
        ({"s3": {"addressing_style": "virtual"}}, f"{BUCKET}.s3.example", "/", "AWS4-HMAC-SHA256 "),
        ({"signature_version": "s3"}, "s3.example", f"/{BUCKET}/", f"AWS {ACCESS_KEY}:"),
        ({"signature_version": "unsigned"}, "s3.example", f"/{BUCKET}/", None),
    ],
    ids=["proxy", "addressing", "signature", "unsigned"],
)
def test_the_client_of_an_aws_connection_is_set_up_as_it_says(connect, moto, options, host, path, signature):
    """The service has a name that only the proxy could resolve."""
    with FaultProxy(moto, lambda *_: (403, "AccessDenied", "seen")) as proxy:
        extra = {
            "endpoint_url": "http://s3.example",
            "service_config": {"s3": {"bucket_name": BUCKET}},
            "config_kwargs": {"proxies": {"http": f"http://127.0.0.1:{proxy.port}"}, **options},
        }
        hook = connect({"conn_type": "aws", "login": ACCESS_KEY, "password": SECRET_KEY, "extra": extra})
        ok, message = hook.test_connection()
    assert (ok, "AccessDenied" in message) == (False, True), message
    lines = [line.decode() for line in proxy.heads[0]]
    assert lines[0].startswith(f"PUT http://{host}{path}.connection-test ")
    found = [line.partition(": ")[2] for line in lines if line.lower().startswith("authorization: ")]
    assert found == [] if signature is None else found[0].startswith(signature)
    assert SECRET_KEY not in repr(hook.config)


def test_a_role_without_the_provider_that_takes_it_names_the_provider(connect, monkeypatch):
    monkeypatch.setitem(sys.modules, "airflow.providers.amazon", None)
    hook = connect({"conn_type": "aws", "login": "k", "password": "s", "extra": {"role_arn": "arn:aws:iam::1:role/x"}})
    with pytest.raises(InvalidOption, match=r"role_arn.*apache-airflow-providers-amazon"):
        hook.config  # noqa: B018


def test_a_role_is_taken_by_the_provider_and_lasts(connect, moto, monkeypatch):
    pytest.importorskip("airflow.providers.amazon.aws.hooks.base_aws", reason="the amazon provider is not installed")
    # The provider asks for it; its requests go to the service of the tests.
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto.endpoint)
    extra = {
        "role_arn": "arn:aws:iam::123456789012:role/reader",
        "endpoint_url": moto.endpoint,
        "region_name": "us-east-1",
        "service_config": {"sts": {"endpoint_url": moto.endpoint}, "s3": {"bucket_name": BUCKET}},
    }
    hook = connect({"conn_type": "aws", "login": ACCESS_KEY, "password": SECRET_KEY, "extra": extra})
    credentials = hook.config.session().get_credentials()
    assert credentials.refresh_needed() is False  # it can be renewed
    assert credentials.token
    assert hook.test_connection()[0]


# --- the Test button -------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["juicefs", "moto"])
def test_the_round_trip_of_a_bucket(connect, request, server):
    service = request.getfixturevalue(server)
    hook = connect(of(service))
    before = service.objects()
    ok, message = hook.test_connection()
    assert (ok, message.partition(" stores")[0]) == (True, f"The bucket {BUCKET} at {service.endpoint}")
    assert service.objects() == before
    assert hook.get_conn().list_buckets()["Buckets"][0]["Name"] == BUCKET


@pytest.mark.parametrize(
    ("change", "extra", "words"),
    [
        ({"password": "wrong-wrong"}, {}, ("SignatureDoesNotMatch", "secret key")),
        ({"login": "nobody"}, {}, ("InvalidAccessKeyId", "access key")),
        ({}, {"bucket": "not-there"}, ("NoSuchBucket", "bucket's name")),
        ({}, {"bucket": None}, ("bucket", "nothing to test")),
        ({}, {"scheme": "https"}, ("at https://", "endpoint", "ca_file")),
    ],
    ids=["secret", "key", "bucket", "no bucket", "scheme"],
)
def test_what_is_wrong_is_said_and_no_secret_with_it(connect, juicefs, change, extra, words):
    ok, message = connect({**of(juicefs, **extra), **change}).test_connection()
    assert not ok
    for word in words:
        assert word in message
    assert SECRET_KEY not in message
    assert "wrong-wrong" not in message


def test_a_closed_port_is_said(connect, juicefs):
    ok, message = connect({**of(juicefs), "port": 1}).test_connection()
    assert not ok
    assert message.startswith("The bucket dicom at http://127.0.0.1:1: ")
    assert "Check the endpoint" in message


def test_an_object_that_may_not_be_deleted_stays_and_is_named(connect, moto):
    with FaultProxy(moto, lambda n, method, path: (403, "AccessDenied") if method == "DELETE" else None) as proxy:
        ok, message = connect(of(proxy)).test_connection()
    assert ok
    assert ".connection-test stays there" in message


def test_a_service_that_does_not_answer_takes_ten_seconds_at_most(connect, moto, monkeypatch):
    monkeypatch.setattr("airflow_dicom_get.hooks._connection.TEST_SECONDS", 1.0)
    with FaultProxy(moto, lambda *_: "stall") as proxy:
        began = time.monotonic()
        ok, message = connect(of(proxy)).test_connection()
        assert time.monotonic() - began < 20, "without it, as long as a request may take"
    assert not ok
    assert "no answer within" in message
