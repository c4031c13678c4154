"""Nodes by name: ``[nodes.NAME]`` tables in ``dicom-get/config.toml`` of the XDG configuration folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.connection import connection_fields, field_name, options_from_fields
from airflow_dicom_get.errors import InvalidOption

_OWN_KEYS = {"addr": "addr", "called_ae_title": "called_ae_title", "tls_key_password": "tls.key_password"}


@dataclass(frozen=True, slots=True)
class NamedNode:
    """The address that was typed or looked up, if one was, and the options that the config file holds for it."""

    addr: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    """By their names in the table of options."""
    label: str = ""
    """Where the options stand, for messages."""


def key_of(option: str) -> str:
    """How the config file writes an option; used in messages."""
    return next((key for key, name in _OWN_KEYS.items() if name == option), field_name(option))


def config_file() -> Path:
    """Where the config file lies, whether it exists or not."""
    # A relative path in XDG_CONFIG_HOME is to be ignored, says the XDG specification.
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".config") / "dicom-get" / "config.toml"


def find_node(text: str) -> NamedNode:
    """Take ``[AE@]host:port`` as it is, and look anything without a colon up in the config file.

    Raises
    ------
    InvalidOption
        There is no such node, or its table is malformed.
    """
    if ":" in text:
        return NamedNode(text)
    path = config_file()
    nodes = _nodes(path)
    if text not in nodes:
        known = f"It names {', '.join(map(shown, nodes))}." if nodes else f"{path} names no nodes."
        raise invalid(
            "NODE", f"{shown(text)} is neither an address nor a node of the config file", f"{known} {_ADDRESS}"
        )
    label = f"[nodes.{text}] in {path}"
    table = nodes[text]
    if not isinstance(table, dict):
        raise invalid(label, "is not a table", _ADDRESS)
    own = {_OWN_KEYS[key]: value for key, value in table.items() if key in _OWN_KEYS}
    options, unknown = options_from_fields({key: value for key, value in table.items() if key not in _OWN_KEYS})
    if unknown:
        keys = [*_OWN_KEYS, *connection_fields()]
        close = get_close_matches(unknown[0], keys, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"The keys are {', '.join(keys)}."
        raise invalid(label, f"the key {shown(unknown[0])} is not known", hint)
    addr = own.pop("addr", None)
    if not isinstance(addr, str):
        raise invalid(label, "addr is missing", _ADDRESS)
    return NamedNode(addr, {**options, **own}, label)


_ADDRESS = 'Write [AE@]host:port, or a table such as [nodes.pacs] with addr = "PACS@10.0.0.5:104".'


def _nodes(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # also what tomllib and the decoder raise
        raise _broken(path, f"is not valid TOML: {error}") from None
    for key in content:
        if key != "nodes":
            raise _broken(path, f"the table {shown(key)} is not known")
    nodes = content.get("nodes", {})
    if not isinstance(nodes, dict):
        raise _broken(path, "nodes is not a table")
    return nodes


def _broken(path: Path, what: str) -> InvalidOption:
    return invalid(str(path), what, "Correct the file: it holds tables such as [nodes.pacs].")
