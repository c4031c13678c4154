"""The entry point ``dicom-get``. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import NoReturn

from airflow_dicom_get import __version__
from airflow_dicom_get.cli import streams
from airflow_dicom_get.config.checks import AETitle
from airflow_dicom_get.config.options import CallOptions, EchoOptions, FindOptions, StoreOptions, VerifyOptions
from airflow_dicom_get.config.shell import add_shell_options, shell_name
from airflow_dicom_get.errors import DicomGetError, InvalidOption, InvalidQuery, ManifestError

EXIT_USAGE = 2

_EXIT_CODES = """\
exit codes:
  0 complete    all that the source lists is held and verified
  1 failed      nothing of it is held, or the node cannot be reached
  2             bad usage or input; nothing was sent
  3 partial     something of it is held, something is not
  4 unverified  all that was sent is held, but no list proves that it is all
  5 empty       the query matched nothing
  130, 143      cancelled by SIGINT, SIGTERM
"""

_STORE_EXIT_CODES = """\
exit codes:
  0 complete    all instances are at the node, by its own answers
  1 failed      none of them is, or the node cannot be reached
  2             bad usage or input; nothing was sent
  3 partial     some are not, or files were left out that are no instances
  130, 143      cancelled by SIGINT, SIGTERM
"""

_VERIFY_EPILOG = """\
marks:
  + listed, not there     - there, not listed     * there, with other content
  ! there, not readable
The manifest that it writes can be given to `dicom-get get --manifest`: that fetches what is missing or differs.

exit codes:
  0 the same
  1 a place cannot be looked at
  2 bad usage or input
  3 differences
  4 no difference found, and a PACS could not be compared
"""

_KEYS = "--study UID | -k KEY=VALUE ..."


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = ArgumentParser(
        prog="dicom-get",
        description="Retrieve DICOM studies by C-GET, proven instance by instance.",
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

    echo = verb("echo", "NODE", "Ask a node whether it is there, and what it accepts.")
    _node(echo)
    echo.add_argument(
        "--study", metavar="UID", help="List this study and fetch a little of it, to find out how the node behaves.",
    )  # fmt: skip
    echo.add_argument("--profile", metavar="FILE", help="Write what --study found out to this file, for get --profile.")
    add_shell_options(echo, EchoOptions)

    find = verb("find", f"NODE ({_KEYS})", "List what a node holds.")
    _node(find)
    _what(find)
    find.add_argument(
        "--level", choices=("STUDY", "SERIES", "IMAGE"), type=str.upper, metavar="LEVEL",
        help="Level of the rows: STUDY, SERIES or IMAGE; by default what the keys say.",
    )  # fmt: skip
    find.add_argument(
        "--return-key", action="append", default=[], metavar="KEYWORD", help="Ask for this key too; repeatable."
    )
    add_shell_options(find, FindOptions)

    plan = verb("plan", f"NODE ({_KEYS} | --from-file CSV)", "List what a get would fetch, and what is held already.")
    _node(plan)
    _what(plan, files=True)
    add_shell_options(plan, CallOptions)

    get = verb(
        "get", f"NODE ({_KEYS} | --from-file CSV | --manifest URI) --to DEST",
        "Fetch studies into a folder, and prove that they are there.", epilog=_EXIT_CODES,
    )  # fmt: skip
    _node(get)
    _what(get, files=True, manifest=True)
    add_shell_options(get, CallOptions)

    store = verb(
        "store", "NODE (PATH ... | s3://BUCKET/PREFIX | --manifest URI)",
        "Store files, or what a manifest holds, at a node, and prove that they are there.", epilog=_STORE_EXIT_CODES,
    )  # fmt: skip
    _node(store)
    store.add_argument("paths", nargs="*", metavar="PATH", help="Files, folders, and prefixes as s3://bucket/prefix.")
    store.add_argument("--manifest", metavar="URI", help="Store the objects that a manifest holds.")
    add_shell_options(store, StoreOptions)

    verify = verb(
        "verify", "[NODE] (--manifest URI | --study UID ... --to DEST)",
        "Compare what is listed with what is there.",
        epilog=_VERIFY_EPILOG,
    )  # fmt: skip
    verify.add_argument("node", nargs="?", metavar="NODE", help="A PACS to compare with: [AE@]host:port, or a name.")
    verify.add_argument("--manifest", metavar="URI", help="What a run wrote.")
    verify.add_argument("--study", action="append", default=[], metavar="UID", help="Study; repeatable.")
    verify.add_argument("--quick", action="store_true", help="Compare sizes, and read nothing.")
    verify.add_argument("--json", action="store_true", help="Print the result as one JSON value.")
    add_shell_options(verify, VerifyOptions)

    pacs = verb("pacs", "--dir FOLDER", "Serve a folder as a PACS, for trials and tests.")
    pacs.add_argument("--dir", metavar="FOLDER", help="Folder with DICOM files.")
    pacs.add_argument("--host", default="127.0.0.1", help="Address to listen on. [%(default)s]")
    pacs.add_argument("--port", default=11112, type=_port, metavar="N", help="TCP port. [%(default)s]")
    pacs.add_argument("--ae-title", default="PACS", type=_ae_title, metavar="AE", help="Its AE title. [%(default)s]")
    pacs.add_argument("--misbehave", metavar="MODE", help="Break the protocol in this way, with data of its own.")
    return parser


def _node(parser: ArgumentParser) -> None:
    parser.add_argument("node", metavar="NODE", help="[AE@]host:port, or a name from the config file.")
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON value.")


def _what(parser: ArgumentParser, *, files: bool = False, manifest: bool = False) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--study", action="append", default=[], metavar="UID", help="Study Instance UID; repeatable.")
    group.add_argument(
        "-k", "--key", action="append", default=[], metavar="KEY=VALUE",
        help="DICOM keyword or tag, and its value, as in StudyDate=today-1; repeatable.",
    )  # fmt: skip
    parser.set_defaults(from_file=None, manifest=None)
    if files:
        group.add_argument(
            "--from-file", metavar="CSV", help="Studies from a file with a column StudyInstanceUID or AccessionNumber."
        )
    if manifest:
        group.add_argument("--manifest", metavar="URI", help="What a manifest lists and does not have as held.")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ArgumentTypeError(f"{text[:32]!a} is no port. Give a whole number from 0 to 65535.")
    return int(text)


def _ae_title(text: str) -> str:
    try:
        return str(AETitle()("--ae-title", text))
    except InvalidOption as error:
        raise ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = build_parser()
    typed = parser.parse_args(argv)
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
        parser.error(f"{given[1]} is given beside {given[0]}. Give one of the two.")
    if typed.verb in ("find", "plan", "get") and not given:
        parser.error("nothing says what to ask for. Give --study UID or -k KEY=VALUE.")
    if typed.verb == "verify" and not (typed.manifest or typed.study):
        parser.error("nothing says what to verify. Give --manifest URI, or --study UID --to DEST.")
    if typed.verb == "store" and bool(typed.paths) == bool(typed.manifest):
        parser.error("give files to store, or --manifest URI: one of the two.")
    from airflow_dicom_get.cli import commands, output

    try:
        return int(getattr(commands, typed.verb)(typed))
    except (InvalidOption, InvalidQuery, ManifestError) as error:
        text = str(error)
        if isinstance(error, InvalidQuery):  # an option is named as it was given, on the line or in the file
            for name in ("max_studies", "query_model"):  # what a query may be refused for
                text = text.replace(name, shell_name(name))
        output.note(f"error: {text}")
        return EXIT_USAGE
    except DicomGetError as error:
        output.note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def run() -> NoReturn:
    """The console script: one verb as the whole of this process, with its exit code."""
    streams.run(main)


if __name__ == "__main__":
    run()
