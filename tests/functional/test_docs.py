"""The documentation: its tables say what the code says, its links lead somewhere, its commands and Python are real."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import doc_tables
import pytest

import airflow_dicom_get
from airflow_dicom_get.cli.main import build_parser
from airflow_dicom_get.config.groups import ForwardTarget, S3Config, Tls
from airflow_dicom_get.config.options import OPTIONS, nested
from airflow_dicom_get.config.shell import options_from_shell
from airflow_dicom_get.dicom import status
from airflow_dicom_get.store import StoreScu
from airflow_dicom_get.verify import verify

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PACKAGE = ROOT / "airflow_dicom_get"


class Block(NamedTuple):
    """A block of code in a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^    [^\n]*\n)+", re.MULTILINE)


def blocks() -> Iterator[Block]:
    """Every block of code of every page; README's indented ones are shell."""
    for path in PAGES:
        text = path.read_text("utf-8")
        for match in _FENCE.finditer(text):
            yield Block(path.name, text.count("\n", 0, match.start()) + 2, match[1], match[2])
        if path.name == "README.md":
            for match in _INDENTED.finditer(_FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)):
                yield Block(path.name, text.count("\n", 0, match.start()) + 1, "sh", match[0].replace("    ", "", 1))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the shell blocks, split as the shell would."""
    for block in blocks():
        if block.language == "sh":
            lexer = shlex.shlex(block.text.replace("\\\n", " "), posix=True, punctuation_chars=True)
            lexer.commenters = "#"
            lexer.whitespace = " \t"
            lexer.wordchars += "%@:{}[]$,"
            words: list[str] = []
            for word in [*lexer, "\n"]:
                if word.strip(";&|\n") == "":
                    if words:
                        yield block.where, words
                    words = []
                else:
                    words.append(word)


# --- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tables_are_up_to_date(path: Path) -> None:
    text = path.read_text("utf-8")
    assert doc_tables.page_with_tables(text) == text, "run: python scripts/doc_tables.py"


def test_every_table_stands_in_a_page() -> None:
    used = {match[2] for path in DOCS for match in doc_tables.BLOCK.finditer(path.read_text("utf-8"))}
    assert used == set(doc_tables.TABLES)


def test_statuses_that_are_sent_are_those_of_the_code() -> None:
    sources = [PACKAGE / "engine" / "receiver.py", PACKAGE / "net" / "get.py", *(PACKAGE / "sinks").glob("*.py")]
    found = set()
    for path in sources:
        text = path.read_text("utf-8")
        found |= set(re.findall(r"(?:Taken\(|_refuse\(|self\.refusal = (?:self\.refusal or )?)\s*s\.([A-Z_]+)", text))
    assert {getattr(status, name) for name in found} == set(doc_tables._SENT)


def test_options_page_has_every_option() -> None:
    page = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert [name for name in OPTIONS if f"| `{name}` |" not in page] == []


# --- texts of the troubleshooting page ---------------------------------------------------------------


@cache
def _texts_of_the_code() -> list[str]:
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
    return texts


def _is_said(words: str, code: list[str]) -> bool:
    """Whether some text of the code holds these words, or begins them and another one goes on with them."""
    if any(words in one for one in code):
        return True
    for end in range(len(words) - 1, 7, -1):
        head, rest = words[:end], words[end:]
        begun = any(part.endswith(head) for one in code if "…" in one for part in one.split("…")[:-1])
        if begun and any(rest in one for one in code):
            return True
    return False


def test_texts_of_troubleshooting_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    section = page.partition("## Texts")[2].partition("## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(lines) > 20
    # What the operating system, or Airflow, or a value of the user adds.
    foreign = {"Connection refused"}
    code = _texts_of_the_code()
    unknown = []
    for line in lines:
        for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
            for piece in re.split(r"…|\d+|'|: ", text):
                words = piece.strip(" .,;")
                if words and words not in foreign and not _is_said(words, code):
                    unknown.append((text, words))
    assert unknown == []


def test_reasons_of_verdicts_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    section = page.partition("## Verdicts that are not complete")[2].partition("## ")[0]
    reasons = re.findall(r"^\| `\w+`, `(\w+)`", section, re.MULTILINE)
    assert len(reasons) > 5
    code = set(_texts_of_the_code())
    assert [reason for reason in reasons if reason not in code] == []


def test_tests_that_the_security_page_names_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    tables = [line for line in page.splitlines() if line.startswith("| ") and "| shown by |" not in line]
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", "\n".join(tables))
    assert len(named) > 10
    gone = [f"{file}::{name}" for file, name in named if name not in _functions(ROOT / "tests" / file)]
    assert gone == []


@cache
def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_promise_of_the_security_page_names_its_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    tables = page.split("| shown by |\n")[1:]
    assert len(tables) >= 5
    rows = [line for table in tables for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert [row for row in rows if "::test_" not in row.rpartition(" | ")[2]] == []


# --- links -----------------------------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
    from markdown.extensions.toc import slugify

    bare = _FENCE.sub("", text)
    heads = re.findall(r"^#{1,6} +(.+?)\s*$", bare, re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", head), "-") for head in heads}


def test_relative_links_resolve() -> None:
    broken = []
    for path in PAGES:
        text = _FENCE.sub("", path.read_text("utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            found = (path.parent / file) if file else path
            if not found.exists():
                broken.append(f"{path.name}: {target}")
            elif anchor and anchor not in _anchors(found.read_text("utf-8")):
                broken.append(f"{path.name}: {target} (no such heading)")
    assert broken == []


# --- the shell -------------------------------------------------------------------------------------


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    seen = 0
    for where, words in commands():
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if not words or Path(words[0]).name != "dicom-get":
            continue
        seen += 1
        arguments = [word for word in words[1:] if word != "…"]
        if {">", "<"} & set(arguments):
            arguments = arguments[: min(arguments.index(one) for one in "<>" if one in arguments)]
        if arguments in (["--version"], ["get", "--help"]):
            continue
        try:
            typed = build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{where}: {shlex.join(words)}\n{capsys.readouterr().err}")
        _check_values(options_from_shell(typed))
    assert seen > 25


def _check_values(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name != "tls":
            OPTIONS[name].check(name, value)
    nested(values)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    wanted = {words[1] for _, words in commands() if words[0] == "make" and len(words) > 1}
    wanted |= {name for path in PAGES for name in re.findall(r"`make ([a-z-]+)", path.read_text("utf-8"))}
    assert wanted
    assert wanted <= targets


def test_modules_that_are_run_exist() -> None:
    for where, words in commands():
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), where
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), where


def test_other_languages_parse() -> None:
    import tomllib

    parsers: dict[str, Callable[[str], Any]] = {"json": json.loads, "toml": tomllib.loads}
    for block in blocks():
        if block.language in parsers:
            try:
                parsers[block.language](block.text)
            except ValueError as error:
                pytest.fail(f"{block.where}: {error}")


# --- Python ----------------------------------------------------------------------------------------

PYTHON = [block for block in blocks() if block.language == "python"]
_OF_AIRFLOW = ("airflow", *(f"airflow_dicom_get.{name}" for name in ("hooks", "operators", "sensors", "tasks")))

# What every operator of Airflow takes, as far as the pages use it.
_EVERY_OPERATOR = {"task_id", "pool", "pool_slots", "retries", "retry_delay", "timeout", "poke_interval", "outlets"}


def test_python_compiles_and_names_are_known(tmp_path: Path) -> None:
    assert len(PYTHON) > 15
    for block in PYTHON:
        name = f"{Path(block.page).stem.lower().replace('-', '_')}_{block.line}.py"
        (tmp_path / name).write_text(block.text, encoding="utf-8")
        compile(block.text, block.where, "exec")
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9,F", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    # An example may end in a name that the reader goes on with.
    complaints = [line for line in found.stdout.splitlines() if re.match(r"(F(?!841)|E9)", line)]
    assert complaints == [], found.stdout


def _keywords() -> dict[str, set[str]]:
    known = {
        "GetScu": set(inspect.signature(airflow_dicom_get.GetScu.__init__).parameters),
        "StoreScu": set(inspect.signature(StoreScu.__init__).parameters),
        "verify": set(inspect.signature(verify).parameters) | {"calling_ae_title", "called_ae_title"},
        "get_study": set(inspect.signature(airflow_dicom_get.GetScu.get_study).parameters) | {"destination"},
    }
    classes = {node.name: node for node, _ in doc_tables._classes()}
    for name, node in classes.items():
        taken = [set(doc_tables._parameters(one)) for one in doc_tables._lineage(node, classes)]
        known[name] = _EVERY_OPERATOR.union(*taken)
    return known


def test_keywords_of_calls_exist() -> None:
    known = _keywords()
    unknown = []
    for block in PYTHON:
        for call in ast.walk(ast.parse(block.text)):
            if not isinstance(call, ast.Call):
                continue
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr == "partial":
                function = function.value
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in known:
                unknown += [(block.where, name, k.arg) for k in call.keywords if k.arg and k.arg not in known[name]]
    assert unknown == []


def test_groups_of_options_take_what_the_pages_give() -> None:
    groups: dict[str, Any] = {"s3_config": S3Config, "forward_target": ForwardTarget, "tls": Tls}
    for block in PYTHON:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.keyword) and node.arg in groups and isinstance(node.value, ast.Dict):
                groups[node.arg](**ast.literal_eval(node.value))


def _imports(*, of_airflow: bool) -> list[str]:
    """The import statements of all blocks, each once."""
    found: dict[str, None] = {}
    for block in PYTHON:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
                if any(module == one or module.startswith(one + ".") for one in _OF_AIRFLOW) == of_airflow:
                    found[ast.unparse(node)] = None
    return list(found)


def test_imports_resolve() -> None:
    for statement in _imports(of_airflow=False):
        exec(compile(statement, statement, "exec"), {})


_IN_AIRFLOW = """
import json, os, sys
given = json.load(sys.stdin)
for statement in given["imports"]:
    exec(statement, {})
from airflow.cli.cli_parser import get_parser
for command in given["commands"]:
    get_parser().parse_args(command)
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook
for name in given["connections"]:
    hook = DicomHook(name)
    if hook.get_connection(name).conn_type == "dicom_s3":
        DicomS3Hook(name).config
    else:
        hook.config
print("all of it")
"""


@pytest.mark.airflow
@pytest.mark.skipif(importlib.util.find_spec("airflow") is None, reason="needs the airflow extra")
def test_airflow_takes_imports_commands_and_connections(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.touch()
    connections = {}
    for block in blocks():
        for name, value in re.findall(r"AIRFLOW_CONN_(\w+)='([^']*)'", block.text):
            connections[name] = re.sub(r"/etc/dicom-get/[\w.-]+", str(file), value)
    assert len(connections) >= 4
    # The providers of these commands are installed for the tests in distributed/ alone, which run them.
    elsewhere = ("celery", "edge")
    spoken = [words[1:] for _, words in commands() if words[0] == "airflow" and words[1] not in elsewhere]
    assert spoken
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        **{f"AIRFLOW_CONN_{name}": value for name, value in connections.items()},
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONWARNINGS": "ignore",
    }
    given = {"imports": _imports(of_airflow=True), "commands": spoken, "connections": [n.lower() for n in connections]}
    done = subprocess.run(
        [sys.executable, "-c", _IN_AIRFLOW],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("all of it\n"), done.stderr[-3000:]


# --- the website -----------------------------------------------------------------------------------


def test_site_builds_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        # A build that wanted the network would wait for this proxy in vain, and say so.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "true", "HTTPS_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").glob("*.html"))
    assert {path.stem for path in DOCS} <= {page.stem for page in pages}
    fetched = []
    for page in pages:
        text = page.read_text("utf-8")
        fetched += re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"(?:https?:)?//[^\"]+", text)
        fetched += re.findall(r"<link[^>]* href=\"(?:https?:)?//[^\"]+", text)
    for sheet in (tmp_path / "site").rglob("*.css"):
        fetched += re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]+", sheet.read_text("utf-8"))
    assert fetched == []
    # The theme would fetch a script for diagrams.
    assert not any(block.language == "mermaid" for block in blocks())


def test_every_page_stands_in_the_navigation() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    # Written by `make bench`.
    assert named - {"performance.md"} == {path.name for path in DOCS} - {"performance.md"}


def test_verbs_and_operators_have_their_how_to() -> None:
    shell = (ROOT / "docs" / "shell.md").read_text("utf-8")
    actions = [one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    assert [verb for verb in actions[0].choices if f"\n## {verb}: " not in shell] == []
    airflow = (ROOT / "docs" / "airflow.md").read_text("utf-8")
    names = [node.name for node, public in doc_tables._classes() if public and node.name.startswith("Dicom")]
    assert [name for name in names if f"\n## {name}\n" not in airflow] == []
