"""Imports point downwards only and in no circle, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import airflow_dicom_get

PACKAGE = Path(airflow_dicom_get.__file__).parent
NAME = airflow_dicom_get.__name__

WORDS = frozenset({"errors", "vocabulary"})
FACTS = WORDS | {"records", "dicom", "clock", "config"}
BELOW_SINKS = FACTS | {"net", "lists", "storage", "connections", "manifest"}
BELOW_ENGINE = BELOW_SINKS | {"sinks", "result"}
BELOW_VERBS = BELOW_ENGINE | {"engine", "cell"}
VERBS = frozenset({"getscu", "store", "verify", "exports"})
BELOW_AIRFLOW = BELOW_VERBS | VERBS | {"get_provider_info"}

ALLOWED: Mapping[str, frozenset[str]] = {
    "": BELOW_VERBS | VERBS,  # the public names, for type checkers alone: they load on first use
    "errors": frozenset({"vocabulary"}),
    "vocabulary": frozenset(),
    "records": frozenset({"vocabulary"}),
    "clock": WORDS,
    "dicom": WORDS,
    "config": WORDS | {"dicom"},
    "net": FACTS | {"storage"},
    "lists": FACTS | {"net"},
    "storage": FACTS,
    "connections": FACTS | {"hooks.dicom_s3"},
    "manifest": FACTS | {"storage", "connections"},
    "sinks": BELOW_SINKS,
    "result": FACTS | {"manifest"},
    "engine": BELOW_ENGINE,
    "cell": BELOW_ENGINE | {"engine"},
    **dict.fromkeys(VERBS, BELOW_VERBS | {"verify"}),
    "verify": BELOW_VERBS,
    "notebook": FACTS | {"connections", "storage", "manifest", "sinks", "result", "engine", "exports"},
    "cli": BELOW_VERBS | VERBS | {"testing", ""},
    "hooks": BELOW_AIRFLOW,
    "triggers": BELOW_AIRFLOW | {"hooks"},
    "sensors": BELOW_AIRFLOW | {"hooks", "triggers"},
    "operators": BELOW_AIRFLOW | {"hooks", "triggers", "sensors"},
    "plugins": BELOW_AIRFLOW | {"hooks", ""},
    "tasks": BELOW_AIRFLOW | {"hooks", "operators"},
    "get_provider_info": frozenset(),
    "testing": FACTS,
}
"""What each part may import, besides itself. Nothing that is not here."""

NEVER: Mapping[str, frozenset[str]] = {
    module: frozenset({"engine.study"})
    for module in (
        "engine.state",
        "engine.requests",
        "engine.receiver",
        "engine.worker",
        "engine.strategies",
        "engine.verdict",
        "engine.report",
    )
}
"""Inside a part: what a study is made of does not know the loop that runs it."""

AIRFLOW = frozenset({"hooks", "operators", "sensors", "triggers", "plugins", "tasks"})
HEAVY = ("airflow", "pandas", "boto3", "botocore", "pyarrow", "rich", "pynetdicom", "pydicom", "numpy")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """What a module imports, anywhere in it: inside functions and for its types alone, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"  # a name may be a module of its own
                yield name if name.removeprefix(f"{NAME}.") in MODULES else node.module


def own_imports(module: str) -> set[str]:
    found = set()
    for name in imports(MODULES[module]):
        if name == NAME or name.startswith(f"{NAME}."):
            found.add(name.removeprefix(NAME).removeprefix("."))
    return found - {module}


ARROWS = {module: own_imports(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    allowed = ALLOWED[part(module)]
    for imported in ARROWS[module]:
        fits = part(imported) == part(module) or part(imported) in allowed or imported in allowed
        assert fits, f"{module} imports {imported}"
        assert imported not in NEVER.get(module, frozenset()), f"{module} imports {imported}"


def test_the_table_names_every_part_and_no_other() -> None:
    assert ALLOWED.keys() == {part(module) for module in MODULES}


def test_there_is_no_circle() -> None:
    above: list[str] = []
    done: set[str] = set()

    def walk(module: str) -> None:
        if module in done:
            return
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module) :], module])}"
        above.append(module)
        for imported in sorted(ARROWS[module] & MODULES.keys()):
            walk(imported)
        done.add(above.pop())

    for module in MODULES:
        walk(module)


def test_every_import_is_of_a_module_that_exists() -> None:
    for module, found in ARROWS.items():
        assert found <= MODULES.keys(), f"{module} imports {found - MODULES.keys()}"


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) == "dicom"])
def test_dicom_does_no_io_reads_no_clock_and_logs_nothing(module: str) -> None:
    used = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not used & {"io", "logging", "os", "pathlib", "select", "selectors", "socket", "ssl", "threading", "time"}
    calls = {node.func.id for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not calls & {"open", "print"}


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) not in AIRFLOW])
def test_only_the_airflow_layer_knows_airflow(module: str) -> None:
    assert not {name for name in imports(MODULES[module]) if name.partition(".")[0] == "airflow"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import airflow_dicom_get",
        "import airflow_dicom_get; airflow_dicom_get.__version__",
        "import airflow_dicom_get.get_provider_info",
        "from airflow_dicom_get import errors, records, vocabulary; from airflow_dicom_get.config import node, groups",
        "from airflow_dicom_get.cli.main import build_parser; build_parser()",
    ],
)
def test_what_must_be_light_is_light(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)


def test_a_client_that_was_made_has_loaded_no_tables() -> None:
    code = "from airflow_dicom_get import GetScu; GetScu('PACS@127.0.0.1:104', destination='/tmp')"
    assert not loaded_by(code) & {"airflow", "pandas", "boto3", "pyarrow"}


def test_public_names_are_all_there() -> None:
    for name in airflow_dicom_get.__all__:
        assert getattr(airflow_dicom_get, name) is not None
    with pytest.raises(AttributeError):
        airflow_dicom_get.Nothing  # noqa: B018
