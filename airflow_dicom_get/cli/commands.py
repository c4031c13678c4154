"""What each verb does with what was typed. All of it goes through ``GetScu``."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, MutableSequence
from dataclasses import dataclass
from errno import EADDRINUSE
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_dicom_get.cli import output
from airflow_dicom_get.cli.config import NamedNode, find_node, key_of
from airflow_dicom_get.cli.inputs import query_of, read_studies
from airflow_dicom_get.cli.progress import progress_bar
from airflow_dicom_get.cli.signals import cancelling
from airflow_dicom_get.config.checks import invalid, reworded, shown
from airflow_dicom_get.config.options import (
    OPTIONS,
    CallOptions,
    ConnectionOptions,
    ExportOptions,
    GetOptions,
    StoreOptions,
    VerifyOptions,
    nested,
)
from airflow_dicom_get.config.shell import in_shell, options_from_shell, shell_name
from airflow_dicom_get.dicom.dictionary import UnknownAttributeError, find_attribute
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.engine.study_list import UID
from airflow_dicom_get.errors import InvalidOption, printable
from airflow_dicom_get.lists.matching import remark_text
from airflow_dicom_get.lists.whole import doubt_remark
from airflow_dicom_get.vocabulary import COMPLETE, EXIT_CODES, UNVERIFIED, noun

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from airflow_dicom_get.engine.query import Query
    from airflow_dicom_get.engine.study_list import FoundList, ListedStudy
    from airflow_dicom_get.getscu import GetScu
    from airflow_dicom_get.result import Result


_VERBOSE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Printable(logging.Formatter):
    """The log on a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it so
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging calls it so
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class _Plain(_Printable):
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
    handler.setFormatter(_Printable(_VERBOSE) if options.verbose else _Plain("dicom-get: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("airflow_dicom_get.waits").setLevel(min(level, logging.INFO))
    # They log each message of their own: parts of identifiers, and the secrets of a bucket.
    for name in ("pynetdicom", "pydicom", "botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return options


def _client(options: GetOptions) -> GetScu:
    from airflow_dicom_get.getscu import GetScu

    return GetScu.of(options)


def _parse(options: CallOptions, query: Mapping[str, Any], *, selective: bool = True) -> Query:
    """Refuse a bad query before any traffic."""
    return parse_query(query, query_model=options.query_model, timezone=options.timezone, selective=selective)


def _spelling(node: NamedNode, shell: Mapping[str, Any]) -> Callable[[str], str]:
    def spell(name: str) -> str:
        if name in node.options and name not in shell:
            return f"{key_of(name)} of {node.label}"
        return f"addr of {node.label}" if name == "addr" and node.label else shell_name(name)

    return spell


def echo(typed: Namespace) -> int:
    report = _client(_checked(typed, CallOptions)).echo(study=typed.study, profile=typed.profile)
    if typed.json:
        output.emit_json(report.to_json())
    else:
        output.emit(output.echo_lines(report))
    return 0


def find(typed: Namespace) -> int:
    options = _checked(typed, CallOptions)
    query = {UID: "*"} if typed.all else query_of(typed.study, typed.key)
    level = typed.level or _parse(options, query, selective=False).level
    rows = _client(options).find(
        query,
        level="STUDY" if level == "PATIENT" else level,
        query_model=options.query_model,
        return_keys=_return_keys(typed.return_key),
        limit=typed.limit or None,
        on_remark=lambda text: output.note(text.replace("raise limit", "raise --limit")),
    )
    values = [_values(row) for row in rows]
    if typed.json:
        output.emit_json(values)
    elif values:
        output.emit_table(values)
    output.note(f"{len(values)} {noun(len(values), 'match', 'matches')}")
    return EXIT_CODES[UNVERIFIED] if rows.cut else 0 if values else 5


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
    meant = _meant(options, typed, studies)
    if meant.query is None:
        return _nothing(meant)
    planned = meant.scu.plan(meant.query, query_model=options.query_model)
    planned.errors[:0] = [*meant.remarks, *([doubt_remark(meant.doubt)] if meant.doubt is not None else [])]
    for remark in planned.errors:
        output.note(remark_text(remark))
    if typed.json:
        output.emit_json(planned.to_json())
    else:
        output.emit(output.plan_lines(planned))
    if meant.doubt is not None or planned.doubt is not None:
        return EXIT_CODES[UNVERIFIED]
    return 0 if planned.instances and not planned.unknown else 5


def get(typed: Namespace) -> int:
    options, studies = _checked(typed, CallOptions), _studies(typed)
    if options.destination is None:
        raise invalid("--to", "is missing", "Give a folder, s3://bucket/prefix or dicom://[AE@]host:port.")
    if typed.manifest is not None:
        meant = _Meant(_client(options), None)
    else:
        meant = _meant(options, typed, studies)
        if meant.query is None:
            return _nothing(meant)
    scu = meant.scu
    with cancelling(scu.cancel), progress_bar(not options.verbose) as show:
        result = scu.get_study(
            meant.query,
            query_model=options.query_model,
            on_sub_operation=show,
            manifest=typed.manifest,
            found=meant.found,
        )
    _show(result, typed)
    return result.exit_code


def _studies(typed: Namespace) -> list[ListedStudy] | None:
    return read_studies(typed.from_file) if typed.from_file is not None else None


@dataclass(slots=True)
class _Meant:
    """What was asked for: the client, the query to ask it, and the search for a list."""

    scu: GetScu
    query: dict[str, Any] | None
    """None where nothing of a list is at the node."""
    found: FoundList | None = None
    """What there is of a list of accession numbers."""

    @property
    def remarks(self) -> list[dict[str, Any]]:
        """What is to be said of the answers."""
        return self.found.remarks if self.found is not None else []

    @property
    def doubt(self) -> str | None:
        """Why the list may mean more studies."""
        return self.found.doubt if self.found is not None else None


def _meant(options: CallOptions, typed: Namespace, listed: list[ListedStudy] | None) -> _Meant:
    scu = _client(options)
    if listed is None:
        query = query_of(typed.study, typed.key)
        _parse(options, query)
        return _Meant(scu, query)
    if listed[0].key == UID:
        return _Meant(scu, {UID: [one.value for one in listed]})
    found = scu.find_listed(listed)
    for entry in found.entries:
        if entry.uids:
            continue
        output.note(f"{typed.from_file}, line {entry.listed.line}: no study {entry.problem}")
    uids = list(dict.fromkeys(uid for entry in found.entries for uid in entry.uids))
    return _Meant(scu, {UID: uids} if uids else None, found)


def _nothing(meant: _Meant) -> int:
    for remark in meant.remarks:
        output.note(remark_text(remark))
    if meant.doubt is not None:
        output.note(remark_text(doubt_remark(meant.doubt)))
    asked = len(meant.found.entries) if meant.found is not None else 0
    output.note(f"none of the {asked} accession numbers matches a study, or no more than max_studies")
    output.emit(["empty: no study matches"])
    return 5 if meant.doubt is None else EXIT_CODES[UNVERIFIED]


def store(typed: Namespace) -> int:
    from airflow_dicom_get.store import StoreScu

    options = _checked(typed, StoreOptions)
    scu = StoreScu.of(options)
    with cancelling(scu.cancel), progress_bar(not options.verbose) as show:
        result = scu.store(
            typed.paths or None,
            manifest=typed.manifest,
            root=typed.root or None,
            on_sub_operation=show,
            on_unusable=lambda name, why: output.note(f"skipped: {name} {why}"),
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
    from airflow_dicom_get.verify import How, compare

    found = compare(
        _checked(typed, VerifyOptions),
        typed.manifest,
        typed.study,
        root=typed.root or None,
        how=How(typed.quick),
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


def export(typed: Namespace) -> int:
    import pyarrow as pa

    from airflow_dicom_get.exports.verb import FORMS, summary, write_export

    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what it has freed: 40 MB for 100,000 rows
    options = ExportOptions.check(nested(options_from_shell(typed), shell_name), shell_name)
    if typed.form not in FORMS:
        raise invalid("--as", f"{shown(typed.form)} is not allowed", f"Give one of {', '.join(FORMS)}.")
    try:
        written = write_export(
            options, typed.manifests, typed.form, typed.to, check=typed.check, root=typed.root or None
        )
    except InvalidOption as error:
        name = error.facts["option"]
        raise reworded(error, lambda text: text.replace(name, _EXPORT.get(name, shell_name(name)), 1)) from None
    if typed.json:
        output.emit_json(written)
    else:
        output.emit([summary(written), *written["files"]])
    return 0


_EXPORT = {"to": "--to", "form": "--as", "manifests": "MANIFEST", "manifest": "MANIFEST", "root": "--root"}


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
