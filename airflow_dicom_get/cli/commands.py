"""What each verb does with what was typed. All of it goes through ``GetScu``."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, MutableSequence
from dataclasses import replace
from errno import EADDRINUSE
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_dicom_get.cli import output
from airflow_dicom_get.cli.config import NamedNode, find_node
from airflow_dicom_get.cli.inputs import StudyList, query_of, read_studies
from airflow_dicom_get.cli.progress import progress_bar
from airflow_dicom_get.cli.signals import cancelling
from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.connection import field_name
from airflow_dicom_get.config.options import (
    OPTIONS,
    CallOptions,
    ConnectionOptions,
    GetOptions,
    StoreOptions,
    VerifyOptions,
    nested,
)
from airflow_dicom_get.config.shell import in_shell, options_from_shell, shell_name
from airflow_dicom_get.dicom.dictionary import UnknownAttributeError, find_attribute
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.vocabulary import COMPLETE

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from airflow_dicom_get.engine.query import Query
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.result import Result


_VERBOSE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Plain(logging.Formatter):
    """The log for a person who reads along, with the options as the shell writes them."""

    def format(self, record: logging.LogRecord) -> str:
        return in_shell(super().format(record))


Verb = TypeVar("Verb", bound=ConnectionOptions)


def _checked(typed: Namespace, verb: type[Verb]) -> Verb:
    """The options of a verb, from the config file and, above them, from what was typed.

    What the config file says of a node for other verbs is checked alone, and skipped: its limits as a
    source are not those of a node to store at.
    """
    node = find_node(typed.node) if typed.node is not None else NamedNode(None)
    shell = options_from_shell(typed)
    spelling = _spelling(node, shell)
    values = {"addr": node.addr, **nested({**node.options, **shell}, spelling)}
    own = verb.own(values)
    for name in values.keys() - own.keys():
        OPTIONS[name].check(spelling(name), values[name])
    options = verb.check(own, spelling)
    level = logging.DEBUG if options.verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_VERBOSE) if options.verbose else _Plain("dicom-get: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("airflow_dicom_get.waits").setLevel(min(level, logging.INFO))
    # They log each message of their own: parts of identifiers, and the secrets of a bucket.
    for name in ("pynetdicom", "pydicom", "botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return options


def _client(options: GetOptions) -> GetScu:
    from airflow_dicom_get.getscu import GetScu

    return GetScu.of(options)


def _parse(options: CallOptions, query: Mapping[str, Any]) -> Query:
    """Refuse a bad query before any traffic."""
    return parse_query(query, query_model=options.query_model, timezone=options.timezone)


def _spelling(node: NamedNode, shell: Mapping[str, Any]) -> Callable[[str], str]:
    def spell(name: str) -> str:
        if name in node.options and name not in shell:
            return f"{field_name(name)} of {node.label}"
        return f"addr of {node.label}" if name == "addr" and node.label else shell_name(name)

    return spell


def echo(typed: Namespace) -> int:
    report = _client(_checked(typed, CallOptions)).echo(study=typed.study, profile=typed.profile)
    if typed.json:
        output.emit_json(report.to_json())
    else:
        output.emit(output.echo_lines(report))
    return 0 if report.ok else 1


def find(typed: Namespace) -> int:
    options = _checked(typed, CallOptions)
    query = query_of(typed.study, typed.key)
    level = typed.level or _parse(options, query).level
    rows = _client(options).find(
        query,
        level="STUDY" if level == "PATIENT" else level,
        query_model=options.query_model,
        return_keys=_return_keys(typed.return_key),
    )
    values = [_values(row) for row in rows]
    if typed.json:
        output.emit_json(values)
    elif values:
        output.emit(output.table_lines(values, aligned=sys.stdout.isatty()))
    output.note(f"{len(values)} matches")
    return 0 if values else 5


def _return_keys(typed: Iterable[str]) -> list[str]:
    keywords = []
    for text in typed:
        for key in text.split(","):
            try:
                keywords.append(find_attribute(key).keyword)
            except UnknownAttributeError as error:
                raise invalid("--return-key", f"{shown(key)} {error.what}", error.hint) from None
    return keywords


def _values(row: Dataset) -> dict[str, str | None]:
    """The keys of a row that hold text, by keyword; several values stand in one text, as DICOM has them."""
    found: dict[str, str | None] = {}
    for element in row:
        if element.keyword and element.VR != "SQ" and element.keyword not in _NO_RESULT:
            value = element.value
            text = "\\".join(map(str, value)) if isinstance(value, list | MutableSequence) else str(value or "")
            found[element.keyword] = text or None
    return found


_NO_RESULT = frozenset({"SpecificCharacterSet", "QueryRetrieveLevel"})


def plan(typed: Namespace) -> int:
    options, studies = _checked(typed, CallOptions), _studies(typed)
    scu, query, unknown = _resolved(options, typed, studies)
    if query is None:
        return _nothing(unknown)
    planned = scu.plan(query, query_model=options.query_model)
    if typed.json:
        output.emit_json(planned.to_json())
    else:
        output.emit(output.plan_lines(planned))
    return 0 if planned.instances else 5


def get(typed: Namespace) -> int:
    options, studies = _checked(typed, CallOptions), _studies(typed)
    if options.destination is None:
        raise invalid("--to", "is missing", "Give a folder, s3://bucket/prefix or dicom://[AE@]host:port.")
    if typed.manifest is not None:
        from airflow_dicom_get.manifest.frames import load_table

        config = options.s3_config
        table = load_table(typed.manifest, **(config.reach() if config is not None else {}))
        scu, query, unknown = _client(options), None, 0
    else:
        table = None
        scu, query, unknown = _resolved(options, typed, studies)
        if query is None:
            return _nothing(unknown)
    with cancelling(scu.cancel), progress_bar(not options.verbose) as show:
        result = scu.get_study(
            query,
            query_model=options.query_model,
            on_sub_operation=show,
            **({} if table is None else {"manifest": table}),
        )
    if unknown:
        from airflow_dicom_get.engine.report import studies_not_found

        studies_not_found(result, unknown)
    _show(result, typed)
    return result.exit_code


def _studies(typed: Namespace) -> StudyList | None:
    return read_studies(typed.from_file) if typed.from_file is not None else None


def _resolved(
    options: CallOptions, typed: Namespace, listed: StudyList | None
) -> tuple[GetScu, dict[str, Any] | None, int]:
    """The client and the query to ask it, and how many accession numbers have no study."""
    if listed is None:
        query = query_of(typed.study, typed.key)
        _parse(options, query)
        return _client(options), query, 0
    # max_studies guards against a query that matches more than was meant; a list means what it says.
    count = max(options.max_studies, len(listed.uids) + len(listed.accessions))
    scu = _client(replace(options, max_studies=count))
    uids, unknown = list(listed.uids), 0
    for line, accession in listed.accessions:
        rows = scu.find({"AccessionNumber": accession}, level="STUDY", query_model=options.query_model)
        found = [str(row.StudyInstanceUID) for row in rows]
        if not found:
            unknown += 1
            output.note(f"{typed.from_file}, line {line}: no study has this accession number")
        uids += found
    uids = list(dict.fromkeys(uids))
    return scu, {"StudyInstanceUID": uids} if uids else None, unknown


def _nothing(unknown: int) -> int:
    output.note(f"none of the {unknown} accession numbers matches a study")
    output.emit(["empty: no study matches"])
    return 5


def store(typed: Namespace) -> int:
    from airflow_dicom_get.store import StoreScu

    options = _checked(typed, StoreOptions)
    scu = StoreScu.of(options)
    with cancelling(scu.cancel), progress_bar(not options.verbose) as show:
        result = scu.store(
            typed.paths or None,
            manifest=typed.manifest,
            on_sub_operation=show,
            on_unusable=lambda name, why: output.note(f"skipped: {output.printable(name)} {why}"),
        )
    _show(result, typed)
    return result.exit_code


def _show(result: Result, typed: Namespace) -> None:
    """The verdict first, then what went wrong and what to do about it."""
    if typed.json:
        output.emit_json(result.to_json())
    else:
        output.emit(output.result_lines(result))
    for line in output.result_notes(result) or ([] if result.verdict == COMPLETE else [result.hint()]):
        output.note(line)


def verify(typed: Namespace) -> int:
    from airflow_dicom_get.verify import compare

    found = compare(
        _checked(typed, VerifyOptions),
        typed.manifest,
        typed.study,
        quick=typed.quick,
        on_difference=None if typed.json else lambda difference: output.emit([str(difference)]),
    )
    for error in found.errors:
        output.note(output.advice(error))
    if typed.json:
        output.emit_json(found.to_json())
    output.note(found.summary())
    if found.manifest_uri:
        output.note(f"manifest: {found.manifest_uri}")
    return found.exit_code


def pacs(typed: Namespace) -> int:
    try:
        if typed.misbehave is not None:
            from airflow_dicom_get.testing import misbehave

            return misbehave.serve(typed.misbehave, typed.host, typed.port)
        if typed.dir is None:
            raise invalid("--dir", "is missing", "Name the folder to serve.")
        from airflow_dicom_get.testing.pacs import serve

        serve(typed.dir, typed.host, typed.port, typed.ae_title)
    except ValueError as error:
        if typed.misbehave is None:
            raise
        raise invalid("--misbehave", str(error), "") from None
    except OSError as error:
        hint = " Give another port with --port, or 0 for any free one." if error.errno == EADDRINUSE else ""
        output.note(f"error: cannot listen on {typed.host}:{typed.port}: {error.strerror or error}.{hint}")
        return 1
    return 0
