"""The entry point ``dicom-get``. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import sys
from argparse import (
    Action,
    ArgumentError,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
    _SubParsersAction,
)
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from airflow_dicom_get import __version__
from airflow_dicom_get.cli import streams
from airflow_dicom_get.config.checks import AETitle, shown
from airflow_dicom_get.config.options import (
    CallOptions,
    EchoOptions,
    ExportOptions,
    FindOptions,
    StoreOptions,
    VerifyOptions,
)
from airflow_dicom_get.config.shell import add_shell_options, in_shell
from airflow_dicom_get.errors import DicomGetError, InvalidOption, InvalidQuery, ManifestError, NotProven
from airflow_dicom_get.vocabulary import EXIT_CODES, PARTIAL

EXIT_USAGE = 2

_EXIT_CODES = """\
exit codes:
  0 complete    all that the source lists is held and verified
  1 failed      nothing of it is held, or the node cannot be reached
  2             bad usage or input; nothing was sent
  3 partial     some of it is held, some is not
  4 unverified  all that was sent is held, but no list of the source proves that it is all
  5 empty       the query matched nothing
  130, 143      cancelled by SIGINT, SIGTERM
"""

_FIND_EXIT_CODES = """\
exit codes:
  0             matches
  1             the node cannot be reached, or refuses the query
  2             bad usage or input; or the node does not support a key that was asked for
  4             there may be more matches than are listed
  5             nothing matches
"""

_STORE_EXIT_CODES = """\
exit codes:
  0 complete    all instances are stored at the node: it has confirmed each of them
  1 failed      none of them is, or the node cannot be reached
  2             bad usage or input; nothing was sent
  3 partial     some are not, or some files are not DICOM instances
  130, 143      cancelled by SIGINT, SIGTERM
"""

_VERIFY_EPILOG = """\
marks:
  + listed, but missing     - present, but not listed     * present, but different
  ! present, but not readable
Give the manifest that it writes to `dicom-get get --manifest` to fetch what is missing or different.

exit codes:
  0 the same
  1 the destination or the PACS cannot be reached
  2 bad usage or input
  3 differences
  4 no difference found, but the PACS could not be compared with
"""

_EXPORT_EPILOG = """\
forms:
  sha256sums  what sha256sum -c reads, relative to the destination
  series      a table of series in the names of idc-index, .csv or .parquet
  croissant   metadata of a data set (Croissant 1.1), .json, and a table of its instances beside them, .parquet
  omop        rows of image_occurrence of OMOP imaging, .csv or .parquet; --mapping has persons, procedures and dates

exit codes:
  0 written
  1 a place cannot be reached or written to
  2 bad usage or input; nothing was written
  3 not complete and not accepted, or a file is not what its manifest says; nothing was written
"""

_KEYS = "--study UID | -k KEY=VALUE ..."


class _Parser(ArgumentParser):
    def _check_value(self, action: Action, value: Any) -> None:
        if isinstance(action, _SubParsersAction) and value not in action.choices:
            raise ArgumentError(None, f"{shown(value)} is not a verb.{_meant(value, action.choices)}")
        super()._check_value(action, value)


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="dicom-get",
        description="Retrieve DICOM studies by C-GET, and verify every instance.",
        epilog="NODE is [AE@]host:port, or a name from the config file. `dicom-get VERB --help` explains a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dicom-get {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, usage: str, doc: str, *, epilog: str = "") -> ArgumentParser:
        return verbs.add_parser(
            name, usage=f"dicom-get {name} {usage} [options]", help=doc, description=doc, epilog=epilog,
            allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter,
        )  # fmt: skip

    echo = verb("echo", "NODE", "Check whether a node answers, and which services it accepts.")
    _node(echo)
    echo.add_argument(
        "--study", metavar="UID", help="Probe the node with this study: what it returns, and how it behaves.",
    )  # fmt: skip
    echo.add_argument("--profile", metavar="FILE", help="Write what --study found out to this file, for get --profile.")
    add_shell_options(echo, EchoOptions)

    find = verb("find", f"NODE ({_KEYS} | --all)", "Query a node by C-FIND.", epilog=_FIND_EXIT_CODES)
    _node(find)
    _what(find)
    find.add_argument("--all", action="store_true", help="List everything: for a small PACS.")
    find.add_argument(
        "--limit", default=1000, type=_count, metavar="N",
        help="Cancel the C-FIND after this many rows; 0: never. [%(default)s]",
    )  # fmt: skip
    find.add_argument(
        "--level", choices=("STUDY", "SERIES", "IMAGE"), type=str.upper, metavar="LEVEL",
        help="Level of the rows: STUDY, SERIES or IMAGE. Default: the lowest level that a key is given for.",
    )  # fmt: skip
    find.add_argument(
        "--return-key", action="append", default=[], metavar="KEYWORD", help="Return this key as well; repeatable."
    )
    add_shell_options(find, FindOptions)

    plan = verb("plan", f"NODE ({_KEYS} | --from-file CSV)", "Show what a get would fetch, and what is already held.")
    _node(plan)
    _what(plan, files=True)
    add_shell_options(plan, CallOptions)

    get = verb(
        "get", f"NODE ({_KEYS} | --from-file CSV | --manifest URI) --to DEST",
        "Retrieve studies to a folder, a bucket or another node, and verify every instance.", epilog=_EXIT_CODES,
    )  # fmt: skip
    _node(get)
    _what(get, files=True, manifest=True)
    add_shell_options(get, CallOptions)

    store = verb(
        "store", "NODE (PATH ... | s3://BUCKET/PREFIX | --manifest URI)",
        "Store files, or the objects of a manifest, at a node, and verify every instance.", epilog=_STORE_EXIT_CODES,
    )  # fmt: skip
    _node(store)
    store.add_argument(
        "paths", nargs="*", metavar="PATH", help="Files, folders, or prefixes such as s3://bucket/prefix."
    )
    store.add_argument("--manifest", metavar="URI", help="Store the objects that this manifest lists.")
    _root(store)
    add_shell_options(store, StoreOptions)

    verify = verb(
        "verify", "[NODE] (--manifest URI | --study UID ... --to DEST)",
        "Compare a destination with a manifest, with the list of a PACS, or with both.",
        epilog=_VERIFY_EPILOG,
    )  # fmt: skip
    verify.add_argument(
        "node", nargs="?", metavar="NODE", help="PACS to compare with: [AE@]host:port, or a name from the config file."
    )
    verify.add_argument("--manifest", metavar="URI", help="Manifest of a run.")
    _root(verify)
    verify.add_argument("--study", action="append", default=[], metavar="UID", help="Study Instance UID; repeatable.")
    verify.add_argument("--quick", action="store_true", help="Compare sizes only; do not read the objects.")
    verify.add_argument("--json", action="store_true", help="Print the result as one JSON value.")
    add_shell_options(verify, VerifyOptions)

    export = verb(
        "export", "MANIFEST ... --as FORM --to PATH", "Write manifests in a form that other tools read.",
        epilog=_EXPORT_EPILOG,
    )  # fmt: skip
    export.add_argument("manifests", nargs="+", metavar="MANIFEST", help="Manifests of runs; the newest row counts.")
    export.add_argument(
        "--as", dest="form", required=True, metavar="FORM", help="sha256sums, series, croissant or omop."
    )
    export.add_argument("--to", required=True, metavar="PATH", help="New file, or s3://bucket/key.")
    export.add_argument("--check", action="store_true", help="Read every file first, and compare its digest.")
    _root(export)
    export.add_argument("--json", action="store_true", help="Print the result as one JSON value.")
    add_shell_options(export, ExportOptions)

    pacs = verb("pacs", "--dir FOLDER", "Serve a folder as a PACS, for tests and trials.")
    pacs.add_argument("--dir", metavar="FOLDER", help="Folder of DICOM files to serve.")
    pacs.add_argument("--host", default="127.0.0.1", help="Address to listen on. [%(default)s]")
    pacs.add_argument(
        "--port",
        default=11112,
        type=_port,
        metavar="N",
        help="TCP port to listen on; 0 for any free one. [%(default)s]",
    )
    pacs.add_argument(
        "--ae-title", default="PACS", type=_ae_title, metavar="AE", help="AE title of the PACS. [%(default)s]"
    )
    pacs.add_argument(
        "--misbehave",
        metavar="MODE",
        help="Serve a generated study and misbehave in this mode; 'list' shows the modes.",
    )
    return parser


def _node(parser: ArgumentParser) -> None:
    parser.add_argument("node", metavar="NODE", help="[AE@]host:port, or a name from the config file.")
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON value.")


def _root(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--root", action="append", default=[], metavar="PLACE",
        help="Folder or s3://bucket/prefix in which objects of the manifest, and targets of links, may lie, besides "
        "the destination in which its _manifests lies; repeatable.",
    )  # fmt: skip


def _what(parser: ArgumentParser, *, files: bool = False, manifest: bool = False) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--study", action="append", default=[], metavar="UID", help="Study Instance UID; repeatable.")
    group.add_argument(
        "-k", "--key", action="append", default=[], metavar="KEY=VALUE",
        help="Matching key: a DICOM keyword or tag and its value, such as StudyDate=today-1; repeatable.",
    )  # fmt: skip
    parser.set_defaults(from_file=None, manifest=None)
    if files:
        group.add_argument(
            "--from-file", metavar="CSV", help="CSV file with a column StudyInstanceUID or AccessionNumber."
        )
    if manifest:
        group.add_argument("--manifest", metavar="URI", help="Fetch what this manifest lists and DEST does not hold.")


def _verbs(parser: ArgumentParser) -> Mapping[str, ArgumentParser]:
    return next(action.choices for action in parser._actions if isinstance(action, _SubParsersAction))


def _unknown(word: str, options: Collection[str], with_keys: bool) -> str:
    if not word.startswith("-") and with_keys:  # it may be the rest of a name
        return "There is one argument too many. Put a value with spaces in quotes."
    if not word.startswith("-"):
        return f"{shown(word)} is one argument too many."
    name = word.partition("=")[0]
    return f"{name[:64]} is not an option of this verb.{_meant(name, options) or ' See its --help.'}"


def _meant(word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    bare = {name.lstrip("-"): name for name in known if len(name) > 2}
    close = get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.65)
    return f" Did you mean {bare[close[0]]}?" if close else ""


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ArgumentTypeError(f"{text[:32]!a} is not a port number. Give a whole number from 0 to 65535.")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ArgumentTypeError(f"{text[:32]!a} is not a number of rows. Give a whole number, 0 for no limit.")
    return int(text)


def _ae_title(text: str) -> str:
    try:
        return str(AETitle()("--ae-title", text))
    except InvalidOption as error:
        raise ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    root = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    typed, unknown = root.parse_known_args(words)
    parser = _verbs(root)[typed.verb]
    if unknown:
        parser.error(_unknown(unknown[0], parser._option_string_actions, bool(getattr(typed, "key", None))))
    given = [
        name
        for name, value in (
            ("--study or -k", getattr(typed, "study", None) or getattr(typed, "key", None)),
            ("--from-file", getattr(typed, "from_file", None)),
            ("--manifest", getattr(typed, "manifest", None)),
        )
        if value
    ]
    if len(given) > 1 and typed.verb != "verify":
        parser.error(f"{given[1]} is given together with {given[0]}. Give one of the two.")
    if typed.verb == "find" and typed.all:
        if given:
            parser.error(f"--all is given together with {given[0]}. Give one of the two.")
    elif typed.verb in ("find", "plan", "get") and not given:
        more = ", or --all" if typed.verb == "find" else ""
        parser.error(f"no studies are selected. Give --study UID or -k KEY=VALUE{more}.")
    if typed.verb == "verify" and not (typed.manifest or typed.study):
        parser.error("nothing to verify. Give --manifest URI, or --study UID --to DEST.")
    if typed.verb == "store" and bool(typed.paths) == bool(typed.manifest):
        parser.error("give either files to store or --manifest URI.")
    from airflow_dicom_get.cli import commands, output

    try:
        return int(getattr(commands, typed.verb)(typed))
    except (InvalidOption, InvalidQuery, ManifestError) as error:
        # An option that was refused is spelled already, also as the config file has it.
        text = str(error) if isinstance(error, InvalidOption) else in_shell(str(error))
        output.note(f"error: {text}")
        return EXIT_USAGE
    except NotProven as error:
        output.note(f"error: {in_shell(str(error))}")
        return EXIT_CODES[PARTIAL]
    except DicomGetError as error:
        output.note(f"error: {in_shell(str(error))}")
        return 1
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """The console script: one verb as the whole of this process, with its exit code."""
    streams.run(main)


if __name__ == "__main__":
    run()
