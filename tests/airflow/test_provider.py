"""What Airflow is told of the package: the form of the connection, the configuration, the modules."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import airflow
import jsonschema
import pytest

from airflow_dicom_get.config.connection import connection_fields
from airflow_dicom_get.get_provider_info import get_provider_info

INFO = get_provider_info()
DICOM = next(entry for entry in INFO["connection-types"] if entry["connection-type"] == "dicom")

ONLY_JSON = {"connect_timeout", "acse_timeout", "next_object_timeout", "idle_timeout", "operation_timeout"}


def schema(name: str) -> dict:
    return json.loads((Path(airflow.__file__).parent / name).read_text())


def test_the_whole_description_fits_what_airflow_reads():
    jsonschema.validate(INFO, schema("provider_info.schema.json"))


def test_connection_types_fit_the_strict_schema_of_the_form():
    strict = schema("provider.yaml.schema.json")
    for name in ("connection-types", "config"):
        jsonschema.validate(INFO[name], {**strict["properties"][name], "definitions": strict["definitions"]})


def test_the_form_has_the_fields_of_the_options_table():
    fields = connection_fields()
    form = DICOM["conn-fields"]
    assert list(form) == [key for key in fields if key not in ONLY_JSON]
    assert fields.keys() >= ONLY_JSON
    for key, field in fields.items():
        if key in ONLY_JSON:
            continue
        declared = form[key]["schema"]
        assert declared["type"] == [field.json_type, "null"], key
        assert declared.get("default") == field.default, key
        assert tuple(declared.get("enum", ())) == field.choices, key


def test_no_field_of_the_form_is_required_or_cuts_what_is_typed():
    for key, field in DICOM["conn-fields"].items():
        assert "null" in field["schema"]["type"], key
        assert "maxLength" not in field["schema"], key


def test_every_module_and_class_that_is_named_exists():
    for kind in ("hooks", "operators"):
        for entry in INFO[kind]:
            for module in entry["python-modules"]:
                importlib.import_module(module)
    module, _, name = DICOM["hook-class-name"].rpartition(".")
    hook = getattr(importlib.import_module(module), name)
    assert hook.conn_type == DICOM["connection-type"]
    assert hook.hook_name == DICOM["hook-name"]


def test_the_description_imports_nothing():
    code = (
        "import sys; before = set(sys.modules);"
        "from airflow_dicom_get.get_provider_info import get_provider_info; get_provider_info();"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert loaded == {"airflow_dicom_get", "airflow_dicom_get.get_provider_info"}


@pytest.fixture
def installed():
    if not any(entry.value.startswith("airflow_dicom_get") for entry in entry_points(group="apache_airflow_provider")):
        pytest.skip("the package is not installed")


@pytest.mark.usefixtures("installed")
def test_airflow_finds_the_connection_type_and_the_configuration():
    from airflow.sdk.configuration import conf
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    hook = ProvidersManagerTaskRuntime().hooks["dicom"]
    assert hook is not None
    assert hook.hook_class_name == "airflow_dicom_get.hooks.dicom.DicomHook"
    assert hook.connection_id_attribute_name == "dicom_conn_id"
    assert conf.getint("dicom_get", "manifest_xcom_max_bytes") == 10485760


@pytest.mark.parametrize("name", list(INFO["config"]["dicom_get"]["options"]))
def test_every_configuration_option_is_read_with_its_default(name):
    from airflow_dicom_get.hooks import configuration

    option = INFO["config"]["dicom_get"]["options"][name]
    read = {"string": configuration.text, "integer": configuration.integer, "boolean": configuration.boolean}[
        option["type"]
    ]
    assert str(read(name)) == option["default"]
