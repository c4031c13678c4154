"""What the shell prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from airflow_dicom_get.config.shell import in_shell
from airflow_dicom_get.errors import printable, sentences
from airflow_dicom_get.result import EchoReport, Plan, Result, size_text
from airflow_dicom_get.vocabulary import noun


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(f"dicom-get: {printable(text)}", file=sys.stderr, flush=True)


def emit(lines: Iterable[str]) -> None:
    """Print the result, on stdout."""
    _print(map(printable, lines))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()


def emit_json(value: Any) -> None:
    """Print one JSON object, in ASCII: it is safe for any terminal and any locale."""
    emit([json.dumps(value)])


def advice(error: Mapping[str, Any]) -> str:
    """An error of a result and its hint, with the options as the shell writes them."""
    return in_shell(sentences(str(error.get("error", "")), str(error.get("hint") or "")))


def result_lines(result: Result) -> list[str]:
    line = result.summary()
    if result.bytes:
        line += f"; {size_text(result.bytes)} in {result.duration_seconds:.1f} s"
        line += f", {size_text(result.bytes_per_second)}/s"
    return [line, *([f"manifest: {result.manifest_uri}"] if result.manifest_uri else [])]


def result_notes(result: Result) -> list[str]:
    """What went wrong, one line each, and when it may go on."""
    notes = []
    for error in result.errors:
        count = error.get("count", 1)
        times = f"{count} × " if count != 1 else ""
        notes.append(times + advice(error))
    if result.resume_at is not None:
        notes.append(f"may be resumed at {result.resume_at.isoformat(timespec='minutes')}")
    return notes


def plan_lines(plan: Plan) -> list[str]:
    studies, classes = len(plan.studies), len(plan.classes)
    counts = [
        f"{studies} {noun(studies, 'study', 'studies')}, {plan.series} series",
        f"{plan.instances} {noun(plan.instances, 'instance')}: {plan.held} held, {plan.missing} to fetch",
    ]
    needs = [
        f"{classes} {noun(classes, 'SOP class', 'SOP classes')}",
        f"{plan.contexts} {noun(plan.contexts, 'presentation context')}",
        f"{plan.associations} {noun(plan.associations, 'association')}; evidence: {plan.evidence}",
    ]
    return [", ".join(counts), ", ".join(needs)]


def echo_lines(report: EchoReport) -> list[str]:
    lines = [f"{report.node} answers in {report.round_trip_ms:.1f} ms"]
    lines += [f"{name}: {'accepted' if yes else 'refused'}" for name, yes in report.accepted.items()]
    if report.implementation_version:
        lines.append(f"implementation: {report.implementation_version}")
    if report.max_pdu_length is not None:
        lines.append(f"maximum PDU length: {report.max_pdu_length or 'no limit'}")
    if report.profile is not None:
        words = {True: "yes", False: "no", None: "unknown"}
        lines += [f"{text}: {words[report.profile[name]]}" for name, text in _PROBED.items()]
        lines.append(f"parallel associations: {report.profile['associations']} tried and accepted")
    return lines


_PROBED = {
    "converts": "converts uncompressed instances",
    "takes_lists": "accepts UID lists",
    "counts": "returns numbers of related instances",
    "tells_classes": "returns SOP classes",
    "tells_syntaxes": "returns transfer syntaxes",
}


_FIRST = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_WIDEST = 28
"""Columns of the terminal that a value takes at most, but for UIDs: those are to be copied."""


def emit_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under a head: at a terminal in columns that fit it, else separated by tabs."""
    if not sys.stdout.isatty():
        _print("\t".join(line) for line in _table(rows))  # each cell was made printable, and the tabs are ours
        return
    lines, left_out = fitted(_table(rows), shutil.get_terminal_size().columns)
    emit(lines)
    if left_out:
        note(f"no room for {', '.join(left_out)}: widen the terminal, or use --json or a pipe")


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A head of keywords, UIDs first, and the values of each row."""
    found = dict.fromkeys(key for row in rows for key in row)
    columns = [*(key for key in _FIRST if key in found), *(key for key in found if key not in _FIRST)]
    return [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]


def fitted(table: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[str]]:
    """The lines of a table that is no wider than ``width``, and the columns that there was no room for.

    UIDs are whole, as long as one fits at all; other values are cut. Columns without any value are not shown.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    chosen: list[int] = []
    left_out: list[str] = []
    room = width
    for number, name in enumerate(table[0]):
        longest = max(cell_len(line[number]) for line in table[1:])
        if not longest:
            continue
        uid = name in _FIRST
        needed = max(longest, cell_len(name)) if uid else min(max(longest, cell_len(name)), _WIDEST)
        if chosen and needed > room:
            left_out.append(name)
            continue
        chosen.append(number)
        shown.add_column(
            Text(name), overflow="fold" if uid else "ellipsis", no_wrap=not uid or needed <= room, max_width=needed
        )
        room -= needed + 2
    for line in table[1:]:
        shown.add_row(*(Text(line[number]) for number in chosen))
    console = Console(width=max(width, 1), color_system=None, file=io.StringIO(), legacy_windows=False)
    with console.capture() as lines:
        console.print(shown)
    return [line.rstrip() for line in lines.get().splitlines()], left_out


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\\".join(printable(item) for item in value)
    return printable(value)
