"""Imports point downwards only, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import airflow_dicom_get

PACKAGE = Path(airflow_dicom_get.__file__).parent
NAME = airflow_dicom_get.__name__

LEAVES = frozenset({"errors", "records", "clock", "config", "vocabulary"})
"""Anyone may import these."""
LAYERS = ("dicom", "net", "storage", "sinks", "engine")
AIRFLOW = frozenset({"hooks", "operators", "sensors", "triggers", "plugins", "tasks"})
TOP, TASKS = len(LAYERS), len(LAYERS) + 1
UPWARDS = frozenset({("connections", "hooks.dicom_s3")})
"""An address that names a connection of Airflow: where Airflow is, its hook knows what that is."""
WORDS = frozenset({"manifest", "result"})
"""What the engine is asked for and what it fills in: top modules that know nothing of the layers but UID rules."""
HEAVY = ("airflow", "pandas", "boto3", "botocore", "pyarrow", "rich", "pynetdicom", "pydicom", "numpy")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def layer(module: str) -> int | None:
    """The height of a module; None for a leaf, and for what is beside the layers."""
    head = module.partition(".")[0]
    if head in LEAVES or head in ("", "testing"):
        return None
    if head in AIRFLOW:
        return TASKS
    return LAYERS.index(head) if head in LAYERS else TOP


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a module imports, anywhere in it, and whether for its types alone."""
    tree = ast.parse(path.read_text())
    typing = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            for alias in node.names:
                # A name may be a module of its own.
                below = PACKAGE.parent / Path(*node.module.split("."), alias.name)
                own = below.with_suffix(".py").exists() or below.is_dir()
                yield f"{node.module}.{alias.name}" if own else node.module, id(node) in typing


def own_imports(path: Path, *, types: bool = True) -> set[str]:
    return {
        name.removeprefix(f"{NAME}.")
        for name, typing in imports(path)
        if name.startswith(f"{NAME}.") and (types or not typing)
    }


@pytest.mark.parametrize(("module", "path"), [found for found in modules() if layer(found[0]) is not None])
def test_imports_point_downwards(module: str, path: Path) -> None:
    mine = layer(module)
    assert mine is not None
    for imported in own_imports(path):
        theirs = layer(imported)
        if theirs is None:
            assert not imported.startswith("testing") or module.startswith("cli"), f"{module} imports {imported}"
        elif imported.partition(".")[0] not in WORDS and (module, imported) not in UPWARDS:
            assert theirs <= mine, f"{module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), [found for found in modules() if found[0].startswith("dicom")])
def test_dicom_does_no_io_reads_no_clock_and_logs_nothing(module: str, path: Path) -> None:
    used = {name.partition(".")[0] for name, _ in imports(path)}
    assert not used & {"io", "logging", "os", "pathlib", "select", "selectors", "socket", "ssl", "threading", "time"}
    calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not calls & {"open", "print"}


@pytest.mark.parametrize(("module", "path"), [found for found in modules() if layer(found[0]) not in (None, TASKS)])
def test_only_the_airflow_layer_knows_airflow(module: str, path: Path) -> None:
    assert not {name for name, _ in imports(path) if name.partition(".")[0] == "airflow"}


def test_testing_knows_no_engine() -> None:
    """The PACS that prove the engine share none of its code that moves bytes."""
    for module, path in modules():
        if module.startswith("testing"):
            heads = {name.partition(".")[0] for name in own_imports(path)}
            assert heads <= {"testing", "dicom"} | LEAVES, module


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
        "from airflow_dicom_get import errors, records; from airflow_dicom_get.config import node, groups",
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
