"""The options as extra fields of an Airflow connection, and as keys of the config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any

from airflow_dicom_get.config.checks import Choice, Group
from airflow_dicom_get.config.options import OPTIONS, Option


@dataclass(frozen=True, slots=True)
class ConnectionField:
    """An extra field of the Airflow connection, and key of a node in the config file."""

    key: str
    option: str
    json_type: str
    default: Any
    choices: tuple[str, ...]
    doc: str


_FIELD_ORDER = (
    "calling_ae_title", "query_model", "max_pdu_length", "max_associations", "bytes_per_second", "window", "timezone",
    "list_limit", "connect_timeout", "acse_timeout", "next_object_timeout", "idle_timeout", "operation_timeout",
    "use_tls", "tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name", "tls_check_hostname",
    "tls_min_version",
)  # fmt: skip


def connection_fields() -> dict[str, ConnectionField]:
    """The extra fields of a ``dicom`` connection, by key, in the order of the form."""
    found = {}
    for row in OPTIONS.values():
        key = row.setting.connection
        if key:
            check = row.setting.check
            found[key] = ConnectionField(
                key,
                row.name,
                "boolean" if isinstance(check, Group) else check.json_type,
                _default(row),
                check.values if isinstance(check, Choice) else (),
                row.setting.doc,
            )
    return {key: found[key] for key in sorted(found, key=_FIELD_ORDER.index)}


def _default(row: Option) -> Any:
    if isinstance(row.check, Group):
        return False
    return str(row.default) if isinstance(row.default, tzinfo) else row.default


def options_from_fields(extras: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options by their names in the table, from the extra fields of a connection, and the keys not known.

    A field that is missing, null or blank takes the option's default.
    """
    fields = connection_fields()
    found = {}
    for key, value in extras.items():
        if key in fields and value is not None and not (isinstance(value, str) and not value.strip()):
            found[fields[key].option] = value
    return found, sorted(key for key, value in extras.items() if key not in fields and value is not None)


def field_name(name: str) -> str:
    """How a connection and the config file write an option; used in messages."""
    row = OPTIONS.get(name)
    return (row.setting.connection if row else None) or name
