"""The options as flags of the shell."""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from typing import Any

from airflow_dicom_get.config.checks import Choice, Flag, Group
from airflow_dicom_get.config.options import GROUPS, OPTIONS, Option, Options, declared


def shell_name(name: str) -> str:
    """How the shell writes an option; used in messages."""
    if name == "addr":
        return "NODE"
    row = OPTIONS.get(name)
    flags = (row.setting.shell or row.setting.off) if row else ()
    return flags[0] if flags else name


def in_shell(text: str) -> str:
    """A message with the options that it names as the shell writes them; others are left as they are."""
    return _WRITTEN.sub(lambda match: shell_name(match[0]), text)


_WRITTEN = re.compile(
    r"(?<![\w.='\"/-])(?:"
    + "|".join(sorted((re.escape(name) for name in OPTIONS if re.search(r"[_.]", name)), key=len, reverse=True))
    + r")(?![\w=])(?!\.\w)"
)
"""Names of options as Python has them, but for those that are words of the language."""


def _dest(name: str) -> str:
    return "option:" + name


def add_shell_options(parser: ArgumentParser, verb: type[Options]) -> None:
    """Add the flags of a verb's options, and of their parts, in groups with titles.

    Nothing has a default here, so that what was typed can be told from what was not.
    """
    sections: dict[str, _ArgumentGroup] = {}
    for group in GROUPS:
        if not issubclass(verb, group):
            continue
        for row in declared(group):
            if not (row.setting.shell or row.setting.off):
                continue
            if group.title not in sections:
                sections[group.title] = parser.add_argument_group(group.title)
            _add_flags(sections[group.title], row)


def _add_flags(section: _ArgumentGroup, row: Option) -> None:
    texts: dict[str, Any] = {"dest": _dest(row.name), "default": SUPPRESS, "help": _help(row)}
    kind = row.setting.check
    if row.setting.off:
        section.add_argument(*row.setting.off, action="store_const", const=False, **texts)
    if not row.setting.shell:
        return
    if isinstance(kind, Flag | Group):
        section.add_argument(*row.setting.shell, action="store_const", const=True, **texts)
        return
    if isinstance(kind, Choice):
        texts["metavar"] = "|".join([*kind.values, *(["none"] if kind.optional else [])])
    else:
        texts["metavar"] = row.setting.metavar or ("S" if row.setting.unit == "s" else "N")
    section.add_argument(*row.setting.shell, action="append" if row.setting.repeat else "store", **texts)


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
