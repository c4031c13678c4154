"""The table of options: Python parameters, shell, connection and documentation agree, and bad values are refused."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get.config import reference
from airflow_dicom_get.config.checks import Choice, Flag
from airflow_dicom_get.config.connection import connection_fields, field_name, options_from_fields
from airflow_dicom_get.config.destination import (
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.config.groups import Deadlines, ForwardTarget, S3Config, Tls, UserIdentity, Window
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import (
    GROUPS,
    OPTIONS,
    CallOptions,
    EchoOptions,
    ExportOptions,
    FindOptions,
    GetOptions,
    Options,
    Spelling,
    StoreOptions,
    VerifyOptions,
    nested,
)
from airflow_dicom_get.config.shell import add_shell_options, options_from_shell, shell_name
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.exports.verb import export
from airflow_dicom_get.getscu import GetScu
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.verify import verify

# What the users of the package rely on, written down by hand: a change here is a breaking change.
DEFAULTS = {
    "calling_ae_title": "GET-SCU",
    "called_ae_title": "ANY-SCP",
    "max_pdu_length": 131072,
    "verbose": False,
    "transcript": None,
    "storage_backend": "Filesystem",
    "out_dir": None,
    "s3_config": None,
    "forward_target": None,
    "destination": None,
    "strict_forward": False,
    "store_with_file_meta": True,
    "associations": 1,
    "max_associations": 2,
    "bytes_per_second": None,
    "window": None,
    "timezone": UTC,
    "max_studies": 100,
    "list_limit": None,
    "profile": None,
    "resume": True,
    "verify_held": "size",
    "on_conflict": "keep",
    "adopt": False,
    "retries": 5,
    "checksum": "sha256",
    "durable": True,
    "ack": "taken",
    "require_exact": False,
    "tags": (),
    "manifest_root": None,
    "trust_destination": False,
    "transfer_syntaxes": None,
    "sop_classes": None,
    "tls": None,
    "user_identity": None,
}
DEADLINES = {
    "connect": 10, "acse": 30, "find_response": 120, "next_object": 300, "idle": 60, "min_rate": 1000,
    "min_rate_window": 60, "sub_operation": 25, "stall": 25, "operation": None, "release": 5,
}  # fmt: skip
SHELL = {
    "--calling-ae": "calling_ae_title", "--called-ae": "called_ae_title", "--max-pdu": "max_pdu_length",
    "--rate": "bytes_per_second", "--model": "query_model", "--connect-timeout": "deadlines.connect",
    "--acse-timeout": "deadlines.acse", "--next-object-timeout": "deadlines.next_object",
    "--idle-timeout": "deadlines.idle", "--deadline": "deadlines.operation", "--no-resume": "resume",
    "--no-file-meta": "store_with_file_meta", "--s3-endpoint-url": "s3_config.endpoint",
    "--s3-region": "s3_config.region", "--s3-profile": "s3_config.profile",
    "--forward-calling-ae": "forward_target.calling_ae_title", "--tls": "tls", "--tls-ca": "tls.ca",
    "--tls-cert": "tls.cert", "--tls-key": "tls.key", "--tls-server-name": "tls.server_name",
    "--forward-tls": "forward_target.tls", "--forward-tls-ca": "forward_target.tls.ca",
    "--forward-tls-cert": "forward_target.tls.cert", "--forward-tls-key": "forward_target.tls.key",
    "--forward-tls-server-name": "forward_target.tls.server_name",
    "--state": "manifest_root", "--to": "destination", "--profile": "profile",
}  # fmt: skip
CONNECTION = {
    "calling_ae_title": "GET-SCU", "query_model": "StudyRoot", "max_pdu_length": 131072, "max_associations": 2,
    "bytes_per_second": None, "window": None, "timezone": "UTC", "list_limit": None, "connect_timeout": 10,
    "acse_timeout": 30,
    "next_object_timeout": 300, "idle_timeout": 60, "operation_timeout": None, "use_tls": False, "tls_ca_file": None,
    "tls_cert_file": None, "tls_key_file": None, "tls_server_name": None, "tls_check_hostname": True,
    "tls_min_version": "1.2",
}  # fmt: skip
ONLY_PYTHON = {
    "addr": "positional in the shell",
    "storage_backend": "the shell has the short form alone",
    "out_dir": "the same",
    "s3_config": "a group",
    "forward_target": "a group",
    "user_identity": "a group; its secrets must not stand on a command line",
    "deadlines": "a group",
}


def whole_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_shell_options(parser, CallOptions)
    return parser


def check_options(addr: object, spelling: Spelling = str, **values: object) -> GetOptions:
    return GetOptions.check({"addr": addr, **values}, spelling)


def typed(*argv: str) -> dict[str, object]:
    return options_from_shell(whole_parser().parse_args(argv))


class TestAgreement:
    def test_defaults_are_the_promised_ones(self) -> None:
        made = check_options("h:104")
        assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS
        assert dataclasses.asdict(made.deadlines) == DEADLINES
        assert {item.name for item in dataclasses.fields(GetOptions)} == {"addr", "deadlines", *DEFAULTS}

    @pytest.mark.parametrize(
        ("call", "verb", "beside"),
        [
            (GetScu.__init__, GetOptions, {"self"}),
            (StoreScu.__init__, StoreOptions, {"self"}),
            (verify, VerifyOptions, {"manifest", "root", "study", "quick", "on_difference", "manifest_name"}),
            (export, ExportOptions, {"manifests", "form", "to", "check", "root"}),
        ],
    )
    def test_python_takes_the_same_parameters_with_the_same_defaults(
        self, call: Callable[..., object], verb: type[Options], beside: set[str]
    ) -> None:
        parameters = dict(inspect.signature(call).parameters)
        assert beside <= parameters.keys()
        options = {item.name: item for item in dataclasses.fields(verb)}
        assert parameters.keys() - beside == options.keys()
        for name in options:
            parameter, default = parameters[name], options[name].default
            if name != "addr" or verb is VerifyOptions:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, name
            if name == "timezone":
                assert parameter.default == "UTC"
            elif name == "deadlines":
                assert parameter.default is None
            elif name == "addr" and verb is not VerifyOptions:
                assert parameter.default is inspect.Parameter.empty
                assert default is dataclasses.MISSING
            else:
                assert parameter.default == default, name

    def test_none_for_deadlines_is_the_defaults(self) -> None:
        assert GetScu("h:104", deadlines=None).options.deadlines == Deadlines()

    @pytest.mark.parametrize(
        "verb",
        [EchoOptions, FindOptions, CallOptions, StoreOptions, VerifyOptions, ExportOptions],
        ids=lambda verb: verb.__name__,
    )
    def test_every_option_of_a_verb_is_declared_by_one_group(self, verb: type[Options]) -> None:
        rows = [item for item in dataclasses.fields(verb) if (verb, item.name) != (VerifyOptions, "addr")]
        for item in rows:
            groups = [group for group in GROUPS if issubclass(verb, group) and item.name in group.__annotations__]
            assert len(groups) == 1, item.name
            assert item.metadata["setting"] is OPTIONS[item.name].setting

    def test_shell_options_are_the_promised_ones(self) -> None:
        flags = {
            flag: action.dest.removeprefix("option:")
            for action in whole_parser()._actions
            for flag in action.option_strings
            if action.dest != "help"
        }
        for flag, name in SHELL.items():
            assert flags[flag] == name
        # "options as in Python, with dashes": every option of the shell has its long form too.
        for name in DEFAULTS:
            if name in ONLY_PYTHON or name == "tls":
                continue
            dashed = name.replace("_", "-")
            long = {f"--{dashed}", f"--no-{dashed}"} if name != "storage_backend" else set()
            assert long & set(flags), name

    def test_no_secret_stands_on_the_command_line(self) -> None:
        flags = {flag for action in whole_parser()._actions for flag in action.option_strings}
        assert not [flag for flag in flags if any(word in flag for word in ("secret", "password", "token", "access"))]

    def test_connection_fields_are_the_promised_ones(self) -> None:
        assert {key: field.default for key, field in connection_fields().items()} == CONNECTION
        assert list(connection_fields()) == list(CONNECTION)

    def test_connection_defaults_make_the_python_defaults(self) -> None:
        found, unknown = options_from_fields(CONNECTION)
        assert unknown == []
        values = nested(found)
        assert values.pop("query_model") == "StudyRoot"
        assert check_options("h:104", **values) == check_options("h:104")

    def test_provider_form_shows_the_same_fields(self) -> None:
        info = pytest.importorskip("airflow_dicom_get.get_provider_info").get_provider_info()
        form = next(item for item in info["connection-types"] if item["connection-type"] == "dicom")["conn-fields"]
        shown = {key: field["schema"].get("default") for key, field in form.items()}
        assert shown == {key: default for key, default in CONNECTION.items() if not key.endswith("_timeout")}
        for key, field in connection_fields().items():
            if field.choices:
                assert [value for value in form[key]["schema"]["enum"] if value is not None] == list(field.choices)

    def test_documentation_is_made_from_the_table(self) -> None:
        page = Path(__file__).parents[3] / "docs" / "options.md"
        assert page.read_text() == reference.markdown_page(), (
            "run: python -m airflow_dicom_get.config.reference > docs/options.md"
        )

    @pytest.mark.parametrize("name", OPTIONS)
    def test_every_option_has_a_sentence_and_one_way_into_the_shell(self, name: str) -> None:
        row = OPTIONS[name].setting
        assert row.doc.endswith(".")
        assert len(row.doc) < 110
        assert bool(row.off) == bool(row.off_doc)
        if isinstance(row.check, Flag) and "." not in name and name != "tls":
            assert bool(row.off) == (OPTIONS[name].default is True)
        if not (row.shell or row.off) and "." not in name:
            assert name in {*ONLY_PYTHON, "tls"}

    @pytest.mark.parametrize("name", OPTIONS)
    def test_default_passes_its_own_check(self, name: str) -> None:
        row = OPTIONS[name]
        if name in ("addr", "deadlines"):
            return
        assert row.check(name, row.default) == row.default


class TestShell:
    def test_text_becomes_the_values(self, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text("")
        ca = str(tmp_path / "ca.pem")
        flat = typed(
            "--to", str(tmp_path), "--rate", "20M", "--calling-ae", "ME", "--no-resume", "--no-file-meta",
            "--idle-timeout", "7.5", "--deadline", "60", "--window", "22:00-06:00", "--timezone", "Europe/Berlin",
            "--tags", "StudyDate", "--tags", "PatientAge,00080060", "--checksum", "none", "--tls", "--tls-ca", ca,
            "--tls-no-check-hostname", "--min-rate", "0", "--max-associations", "8", "--associations", "8",
            "--sop-classes", "CTImageStorage",
        )  # fmt: skip
        made = check_options("A@h:104", **nested(flat, shell_name))
        assert made.destination == FilesystemDestination(tmp_path)
        assert made.bytes_per_second == 20_000_000
        assert made.calling_ae_title == "ME"
        assert (made.resume, made.store_with_file_meta, made.checksum) == (False, False, None)
        assert (made.deadlines.idle, made.deadlines.operation, made.deadlines.min_rate) == (7.5, 60.0, 0)
        assert made.deadlines.acse == 30
        assert made.window == Window(time(22), time(6))
        assert made.timezone == ZoneInfo("Europe/Berlin")
        assert made.tags == ("StudyDate", "PatientAge", "Modality")
        assert made.tls == Tls(ca=ca, check_hostname=False)
        assert made.associations == 8
        assert made.sop_classes == ("1.2.840.10008.5.1.4.1.1.2",)

    @pytest.mark.parametrize(
        ("given", "made"),
        [(None, None), (0, ()), ("0", ()), (500, (500,)), ("100, 1000", (100, 1000)), ([100, "1000"], (100, 1000))],
    )  # fmt: skip
    def test_list_limit(self, given: object, made: tuple[int, ...] | None) -> None:
        assert check_options("h:104", list_limit=given).list_limit == made

    def test_nothing_typed_gives_nothing(self) -> None:
        assert typed() == {}

    @pytest.mark.parametrize(
        ("argv", "flag"),
        [
            (["--tls-ca", "ca.pem"], "--tls-ca"),
            (["--tls-cert", "c.pem"], "--tls-cert"),
            (["--tls-key", "k.pem"], "--tls-key"),
            (["--tls-server-name", "pacs"], "--tls-server-name"),
            (["--tls-min-version", "1.3"], "--tls-min-version"),
            (["--tls-no-check-hostname"], "--tls-no-check-hostname"),
        ],
    )
    @pytest.mark.parametrize("of", ["--tls", "--forward-tls"])
    def test_what_belongs_to_tls_is_refused_without_it(self, argv: list[str], flag: str, of: str) -> None:
        argv, flag = [one.replace("--tls", of) for one in argv], flag.replace("--tls", of)
        with pytest.raises(InvalidOption, match=f"^{flag} is given without {of}") as caught:
            nested(typed(*argv), shell_name)
        assert of in caught.value.hint
        # The other node's switch does not switch it on.
        other = "--tls" if of == "--forward-tls" else "--forward-tls"
        with pytest.raises(InvalidOption, match=f"^{flag} is given without {of}"):
            nested(typed(*argv, other), shell_name)

    def test_defaults_of_tls_ask_for_nothing(self) -> None:
        assert nested(typed("--tls-min-version", "1.2", "--forward-tls-min-version", "1.2"), shell_name) == {}

    def test_tls_of_both_nodes(self, tmp_path: Path) -> None:
        ca, cert = tmp_path / "ca.pem", tmp_path / "cert.pem"
        ca.touch()
        cert.touch()
        flat = typed(
            "--to", "dicom://b:1", "--tls", "--tls-ca", str(ca), "--forward-calling-ae", "ME", "--forward-tls",
            "--forward-tls-ca", str(ca), "--forward-tls-cert", str(cert), "--forward-tls-key", str(cert),
            "--forward-tls-server-name", "b", "--forward-tls-min-version", "1.3", "--forward-tls-no-check-hostname",
        )  # fmt: skip
        made = check_options("a:1", **nested(flat, shell_name))
        assert made.tls == Tls(ca=str(ca))
        assert made.forward_target == ForwardTarget(
            calling_ae_title="ME",
            tls=Tls(str(ca), str(cert), str(cert), server_name="b", min_version="1.3", check_hostname=False),
        )

    @pytest.mark.parametrize(
        ("argv", "start"),
        [
            (["--max-pdu", "1"], "--max-pdu: "),
            (["--idle-timeout", "soon"], "--idle-timeout: "),
            (["--tls", "--tls-key", "k"], "--tls-key is given without --tls-cert"),
            (["--tls", "--tls-ca", "/nowhere"], "--tls-ca: "),
            (
                ["--to", "dicom://b:1", "--forward-tls", "--forward-tls-key", "k"],
                "--forward-tls-key is given without --forward-tls-cert",
            ),
            (["--to", "dicom://b:1", "--forward-tls", "--forward-tls-ca", "/nowhere"], "--forward-tls-ca: "),
            (["--to", "/tmp", "--forward-tls"], "forward_target does not fit a destination of kind Filesystem"),
            (["--associations", "3"], "--associations: "),
            (["--verify-held", "digest", "--checksum", "none"], "--verify-held: "),
            (["--ack", "durable", "--no-durable"], "--ack: durable waits for the sync that --no-durable"),
            (["--to", "/dev/null/x"], "--to: "),
        ],
    )
    def test_messages_name_the_flag(self, argv: list[str], start: str) -> None:
        with pytest.raises(InvalidOption) as caught:
            check_options("h:104", spelling=shell_name, **nested(typed(*argv), shell_name))
        assert str(caught.value).startswith(start)
        assert caught.value.hint


class TestConnection:
    @pytest.mark.parametrize("switch", [{}, {"use_tls": False}, {"use_tls": "no"}, {"use_tls": None}])
    @pytest.mark.parametrize(
        "field",
        [
            {"tls_ca_file": "ca.pem"}, {"tls_cert_file": "c"}, {"tls_key_file": "k"}, {"tls_server_name": "n"},
            {"tls_check_hostname": False}, {"tls_check_hostname": "false"}, {"tls_min_version": "1.3"},
        ],
    )  # fmt: skip
    def test_what_belongs_to_tls_is_refused_without_it(self, field: dict[str, Any], switch: dict[str, Any]) -> None:
        with pytest.raises(InvalidOption, match=f"^{next(iter(field))} is given without use_tls"):
            nested(options_from_fields(field | switch)[0], field_name)

    def test_strings_nulls_and_values_are_alike(self) -> None:
        as_text, _ = options_from_fields(
            {
                "max_pdu_length": "16384",
                "use_tls": "true",
                "idle_timeout": "30",
                "window": "",
                "tls_check_hostname": None,
            }
        )
        as_values, _ = options_from_fields(
            {"max_pdu_length": 16384, "use_tls": True, "idle_timeout": 30, "window": None}
        )
        assert check_options("h:1", **nested(as_text)) == check_options("h:1", **nested(as_values))

    def test_unknown_keys_are_named(self) -> None:
        assert options_from_fields({"called_aet": "X", "window": None})[1] == ["called_aet"]


BAD = [
    ("addr", "h"), ("addr", None), ("addr", 5), ("addr", "a@b@:104"), ("addr", "TOO-LONG-AE-TITLE@h:104"),
    ("addr", "::1:104"), ("addr", "h:0"), ("addr", "h:65536"),
    ("calling_ae_title", ""), ("calling_ae_title", " "), ("calling_ae_title", "x" * 17), ("calling_ae_title", "Ä"),
    ("calling_ae_title", "A\\B"), ("called_ae_title", None), ("called_ae_title", "A\nB"),
    ("max_pdu_length", 0), ("max_pdu_length", 131072.5), ("max_pdu_length", True), ("max_pdu_length", "x"),
    ("verbose", "maybe"), ("verbose", 2), ("verbose", None),
    ("storage_backend", "S4"), ("out_dir", "s3://bucket/x"), ("out_dir", 7), ("s3_config", "bucket"),
    ("s3_config", {"bukket": "x"}), ("forward_target", {"addr": "h"}),
    ("destination", ""), ("destination", "http://h/x"), ("destination", "s3:/bucket"), ("destination", b"x"),
    ("destination", "file://host/x"), ("destination", "s3://"), ("destination", "dicom://A B C@h"),
    ("destination", "a\0b"),
    ("destination", "/dev/null"), ("destination", "/dev/null/below"),
    ("associations", 0), ("associations", 65), ("max_associations", 0),
    ("bytes_per_second", 0), ("bytes_per_second", "20 apples"), ("bytes_per_second", "-5M"), ("bytes_per_second", "9"),
    ("window", "22-06"), ("window", "25:00-06:00"), ("window", "06:00-06:00"), ("window", "22:00-24:30"),
    ("window", 22),
    ("timezone", "Berlin/Europe"), ("timezone", "../../etc/passwd"), ("timezone", ""), ("timezone", 3),
    ("max_studies", 0), ("list_limit", -1), ("list_limit", "100,x"), ("list_limit", "0,100"), ("list_limit", 1.5),
    ("list_limit", []), ("list_limit", True), ("list_limit", 10**7),
    ("profile", 7), ("profile", ""), ("profile", "/nowhere"),
    ("verify_held", "md5"), ("verify_held", None), ("retries", -1), ("checksum", "md5"),
    ("ack", "never"), ("tags", ["PatientNam"]), ("tags", ["PixelData"]), ("tags", [7]), ("tags", {"a": 1}),
    ("tags", ["TransferSyntaxUID"]), ("manifest_root", "dicom://h:1"), ("manifest_root", "/dev/null/x"),
    ("manifest_root", "s3://minio@bucket/x"), ("manifest_root", "s3://b"),
    ("destination", "s3://b"), ("destination", "s3://bucket//x"), ("destination", "s3://bucket/a/../x"),
    ("destination", "s3://bucket/x//"), ("destination", "s3://buck..et/x"), ("destination", "s3://10.0.0.1/x"),
    ("destination", "s3://minio@bucket/x"), ("destination", "s3://bucket name/x"),
    *(("s3_config", {"bucket": "bucket", **bad}) for bad in (
        {"bucket": "b"}, {"bucket": "a/b"}, {"prefix": "a//b"}, {"prefix": "../b"}, {"prefix": "a/./b"},
        {"endpoint": "host:9000"}, {"endpoint": "ftp://host"}, {"endpoint": "https://"}, {"endpoint": "https://h/path"},
        {"endpoint": "https://key:secret@h"}, {"endpoint": "http://h:port"}, {"access_key": "AKIA"},
        {"secret_key": "x"}, {"session_token": "x"}, {"profile": "p", "access_key": "k", "secret_key": "s"},
        {"sse": "AES"}, {"kms_key_id": "k"}, {"sse": "AES256", "kms_key_id": "k"}, {"max_concurrency": 0},
        {"path_style": "perhaps"}, {"region": ""},
    )),
    ("transfer_syntaxes", []), ("transfer_syntaxes", ["1..2"]), ("sop_classes", ["CTImage"]), ("sop_classes", 5),
    ("tls", {"min_version": "1.0"}), ("tls", {"key": "k"}), ("tls", True), ("tls", {"ca": ""}),
    ("tls", {"ca": "/nowhere"}), ("tls", {"ca": "/"}), ("tls", False), ("tls", {"use_tls": True}), ("tls", {"ssl": 1}),
    ("forward_target", {"addr": "h:1", "tls_ca": "/x"}), ("forward_target", {"addr": "h:1", "ssl": True}),
    ("forward_target", {"addr": "h:1", "tls": True}), ("forward_target", {"addr": "h:1", "tls": {"key": "k"}}),
    ("forward_target", {"addr": "h:1", "tls": {"certificate": "k"}}),
    ("user_identity", {}), ("user_identity", {"password": "p"}), ("user_identity", {"username": "u", "token": "t"}),
    ("user_identity", {"token": "t"}),
    ("deadlines", {"idle": 0}), ("deadlines", {"idle": float("nan")}), ("deadlines", {"connect": float("inf")}),
    ("deadlines", {"operation": -1}), ("deadlines", {"idle_": 1}), ("deadlines", 30), ("deadlines", None),
    ("no_such_option", 1),
    ("adopt", True), ("strict_forward", True), ("trust_destination", True),
]  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: ascii(value)[:40])
    def test_bad_value_names_the_option_and_the_way_out(self, name: str, value: object) -> None:
        values: dict[str, Any] = {"addr": "h:104", name: value}
        if name == "adopt":
            values["resume"] = False
        with pytest.raises(InvalidOption) as caught:
            check_options(**values)
        assert str(caught.value).startswith(name)
        assert str(caught.value.facts["option"]).startswith(name)
        assert caught.value.hint[-1] in ".?"
        assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    @pytest.mark.parametrize(
        ("values", "start"),
        [
            ({"destination": "a", "out_dir": "b"}, "out_dir is given together with destination"),
            ({"storage_backend": "Filesystem", "s3_config": {"bucket": "bucket"}}, "s3_config does not fit"),
            ({"storage_backend": "S3", "out_dir": "a", "s3_config": {"bucket": "bucket"}}, "out_dir does not fit"),
            ({"storage_backend": "S3", "destination": "a"}, "storage_backend: S3 does not fit"),
            ({"storage_backend": "S3"}, "s3_config names no bucket"),
            ({"storage_backend": "Forward"}, "forward_target names no address"),
            (
                {"destination": "s3://bucket", "s3_config": {"bucket": "bucket"}},
                "s3_config names a destination in addition",
            ),
            ({"destination": "dicom://h:1", "s3_config": {"region": "x"}}, "s3_config does not fit"),
            ({"destination": "a", "forward_target": {"addr": "h:1"}}, "forward_target names a destination"),
            ({"destination": "s3://bucket", "s3_config": {"prefix": "x"}}, "s3_config names a destination in addition"),
            ({"destination": "a", "s3_config": {"region": "x"}}, "s3_config does not fit"),
            ({"destination": "s3://bucket", "forward_target": {}}, "forward_target does not fit"),
            ({"destination": "s3://bucket", "strict_forward": True}, "strict_forward needs a DICOM node"),
            ({"destination": "s3://bucket", "s3_config": {"ca_bundle": "/nowhere"}}, "s3_config.ca_bundle: '/nowhere'"),
            (
                {"destination": "dicom://h:1", "forward_target": {"tls": {"key": "k"}}},
                "forward_target.tls.key is given without forward_target.tls.cert",
            ),
            (
                {"destination": "dicom://h:1", "forward_target": {"tls": {"ca": "/nowhere"}}},
                "forward_target.tls.ca: '/nowhere'",
            ),
            ({"destination": "dicom://PACS_B"}, "destination: dicom://PACS_B names a connection"),
            ({"destination": "dicom://X@H:104"}, "destination: dicom://X@H:104 is the source"),
            (
                {"storage_backend": "Forward", "forward_target": {"addr": "h:104"}},
                "forward_target: dicom://h:104 is the source",
            ),
            ({"destination": "dicom://X@h:1", "adopt": True}, "adopt has no effect for a DICOM node"),
            ({"associations": 4}, "associations: 4 is more than max_associations, which is 2"),
            ({"verify_held": "digest", "checksum": None}, "verify_held: digest needs a checksum, but checksum is none"),
            ({"ack": "durable", "durable": False}, "ack: durable waits"),
        ],
    )
    def test_contradictions(self, values: dict[str, Any], start: str) -> None:
        with pytest.raises(InvalidOption) as caught:
            check_options("h:104", **values)
        assert str(caught.value).startswith(start)
        assert caught.value.hint

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(InvalidOption, match="cannot be written to"):
            check_options("h:104", destination=tmp_path / "new" / "er")

    def test_secrets_are_not_shown(self) -> None:
        made = [
            S3Config(bucket="bucket", access_key="AKIA1", secret_key="hush1", session_token="hush2"),
            Tls(cert="c", key="k", key_password="hush3"),
            UserIdentity(username="u", password="hush4"),
        ]
        assert "hush" not in repr(made)
        assert "AKIA1" not in repr(made)
        with pytest.raises(InvalidOption) as caught:
            S3Config(secret_key=["hush"])  # type: ignore[arg-type]
        assert "hush" not in str(caught.value)


class TestDestination:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/data/x", FilesystemDestination(Path("/data/x"))),
            ("data/100%25", FilesystemDestination(Path("data/100%25"))),
            ("file:///data/100%25%20x", FilesystemDestination(Path("/data/100% x"))),
            ("FILE://localhost/data", FilesystemDestination(Path("/data"))),
            ("a:b", FilesystemDestination(Path("a:b"))),
            ("s3://bucket", S3Destination("bucket")),
            ("s3://minio@Bucket/A/b%20c/", S3Destination("Bucket", "A/b c", "minio")),
            ("s3://bucket/a@b", S3Destination("bucket", "a@b")),
            ("dicom://MyAE@pacs:104", ForwardDestination(Node("pacs", 104, "MyAE"))),
            ("dicom://My%20AE@[::1]:104", ForwardDestination(Node("::1", 104, "My AE"))),
            ("dicom://PACS_b", ForwardDestination(conn_id="PACS_b")),
        ],
    )
    def test_forms(self, text: str, expected: object) -> None:
        assert parse_destination(text) == expected
        assert parse_destination(parse_destination(text)) == expected

    def test_home_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert parse_destination("~/dicom") == FilesystemDestination(tmp_path / "dicom")

    @given(st.text(max_size=40))
    def test_any_text_is_a_destination_or_refused(self, text: str) -> None:
        with contextlib.suppress(InvalidOption):
            place = parse_destination(text)
            assert parse_destination(str(place)) == place or "%" in text or "~" in text


class TestCalledTitle:
    def test_title_in_the_address_wins(self) -> None:
        assert check_options("IN-ADDR@h:104", called_ae_title="OPTION").called == "IN-ADDR"
        assert check_options("h:104", called_ae_title="OPTION").called == "OPTION"
        assert check_options("h:104").called == "ANY-SCP"


class TestRate:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("20M", 20_000_000),
            ("1.5G", 1_500_000_000),
            ("500k", 500_000),
            ("2Mi", 2_097_152),
            ("5000", 5000),
            (5000, 5000),
        ],
    )
    def test_units(self, text: object, value: int) -> None:
        assert check_options("h:1", bytes_per_second=text).bytes_per_second == value


class TestWindow:
    berlin = ZoneInfo("Europe/Berlin")

    @staticmethod
    def at(text: str) -> datetime:
        return datetime.fromisoformat(text).astimezone(UTC)

    def test_over_midnight(self) -> None:
        window = Window.parse("window", "22:00-06:00")
        assert str(window) == "22:00-06:00"
        assert window.closes_at(self.at("2024-01-10T23:00+01:00"), self.berlin) == self.at("2024-01-11T06:00+01:00")
        assert window.closes_at(self.at("2024-01-11T05:59+01:00"), self.berlin) == self.at("2024-01-11T06:00+01:00")
        assert window.closes_at(self.at("2024-01-11T06:00+01:00"), self.berlin) is None
        assert window.opens_at(self.at("2024-01-11T06:00+01:00"), self.berlin) == self.at("2024-01-11T22:00+01:00")

    def test_clock_change(self) -> None:
        # Clocks go forward on 2024-03-31 at 02:00: the window of that night is an hour shorter.
        window = Window.parse("window", "22:00-06:00")
        closes = window.closes_at(self.at("2024-03-30T22:00+01:00"), self.berlin)
        assert closes == self.at("2024-03-31T06:00+02:00")
        assert closes - self.at("2024-03-30T22:00+01:00") == self.at("2024-01-01T07:00") - self.at("2024-01-01T00:00")

    def test_until_midnight(self) -> None:
        window = Window.parse("window", "20:00-24:00")
        assert window.closes_at(self.at("2024-01-10T21:00+00:00"), UTC) == self.at("2024-01-11T00:00+00:00")

    @given(
        st.times(), st.times(), st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC)),
        st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"]),
    )  # fmt: skip
    def test_open_and_closed_take_turns(self, start: time, end: time, moment: datetime, zone: str) -> None:
        start, end = start.replace(second=0, microsecond=0), end.replace(second=0, microsecond=0)
        if start == end:
            return
        window, place = Window(start, end), ZoneInfo(zone)
        closes, opens = window.closes_at(moment, place), window.opens_at(moment, place)
        assert opens > moment
        assert (opens - moment).days < 3
        if closes is not None:
            assert moment < closes
            assert (closes - moment).days < 2


def test_choice_describes_none() -> None:
    assert Choice("sha256", optional=True).describe() == "sha256 or none"


def test_identity_on_the_wire() -> None:
    assert UserIdentity(username="u").identity_type == 1
    both = UserIdentity(username="u", password="p")
    assert (both.identity_type, both.primary_field, both.secondary_field) == (2, b"u", b"p")
    assert UserIdentity(token="t", token_type="jwt").identity_type == 5
