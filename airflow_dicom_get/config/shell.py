"""The options as flags of the shell."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Iterable
from typing import Any

from airflow_dicom_get.config.checks import Choice, Flag
from airflow_dicom_get.config.options import OPTIONS, Option


def shell_name(name: str) -> str:
    """How the shell writes an option; used in messages."""
    if name == "addr":
        return "NODE"
    if name == "tls":
        return "--tls"
    row = OPTIONS.get(name)
    flags = (row.setting.shell or row.setting.off) if row else ()
    return flags[0] if flags else name


def _dest(name: str) -> str:
    return "option:" + name


def add_shell_options(parser: ArgumentParser | _ArgumentGroup, names: Iterable[str]) -> None:
    """Add the flags of the options named, and of the parts of a group named.

    Nothing has a default here, so that what was typed can be told from what was not.
    """
    wanted = set(names)
    for row in OPTIONS.values():
        if row.name not in wanted and row.part_of not in wanted:
            continue
        if row.name == "tls":
            parser.add_argument(
                "--tls", dest=_dest("tls"), action="store_const", const=True, default=SUPPRESS, help=row.setting.doc
            )
            continue
        texts: dict[str, Any] = {
            "dest": _dest(row.name),
            "default": SUPPRESS,
            "help": _help(row),
        }
        if row.setting.off:
            parser.add_argument(*row.setting.off, action="store_const", const=False, **texts)
        if row.setting.shell:
            kind = row.setting.check
            if isinstance(kind, Flag):
                parser.add_argument(*row.setting.shell, action="store_const", const=True, **texts)
            else:
                if isinstance(kind, Choice):
                    texts["metavar"] = "|".join([*kind.values, *(["none"] if kind.optional else [])])
                else:
                    texts["metavar"] = row.setting.metavar or ("S" if row.setting.unit == "s" else "N")
                parser.add_argument(*row.setting.shell, action="append" if row.setting.repeat else "store", **texts)


def _help(row: Option) -> str:
    doc = row.setting.doc.replace("%", "%%")
    if row.setting.off:
        return row.setting.off_doc
    shown_default = row.default_text
    return f"{doc} [{shown_default}]" if shown_default else doc


def options_from_shell(namespace: Namespace) -> dict[str, Any]:
    """The options typed, by their names in the table."""
    found = {}
    for key, value in vars(namespace).items():
        if key.startswith("option:"):
            name = key.removeprefix("option:")
            found[name] = ",".join(value) if isinstance(value, list) else value
    return found
