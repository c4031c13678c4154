"""Each meaning has one place: words of results, verdicts, parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import airflow_dicom_get
from airflow_dicom_get import vocabulary

PACKAGE = Path(airflow_dicom_get.__file__).parent
MODULES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if "testing" not in path.parts
}

KINDS = (frozenset(vocabulary.VERDICTS), frozenset(vocabulary.STATES), frozenset(vocabulary.REASONS))
WORDS = frozenset().union(*KINDS)
NAMES = {
    name: value
    for name, value in vars(vocabulary).items()
    if name.isupper() and isinstance(value, str) and value in WORDS
}
SET_A_VERDICT = frozenset({"engine/verdict.py", "engine/report.py"})

MOST_PARAMETERS = 8
PUBLIC_VERBS = frozenset(
    {"getscu.py:GetScu.__init__", "store.py:StoreScu.__init__", "verify.py:verify", "exports/verb.py:export"}
)
"""Their parameters are the options of the contract."""
HANDED_ON = frozenset(
    {
        "config/checks.py:setting",  # what is said of an option
        "errors.py:DicomGetError.__init__",  # the facts of an error become its attributes
        "notebook/rest.py:_NoRedirect.redirect_request",  # as the standard library has it
        "storage/bucket.py:Bucket.call",  # the parameters of an operation of S3
        "storage/bucket.py:Bucket.put",
    }
)
"""What takes ``**`` by its nature."""
READERS = "notebook/"
"""What reads manifests in a notebook takes ``**s3`` by the contract."""
AIRFLOW_FOLDERS = ("hooks", "operators", "sensors", "triggers")
"""Airflow's classes have the parameters of their tasks, and hand ``**kwargs`` on to Airflow."""


def words_in(node: ast.expr) -> set[str]:
    """The words of the vocabulary that stand in an expression itself, as texts or by their names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value} & WORDS
    if isinstance(node, ast.Name) and node.id in NAMES:
        return {NAMES[node.id]}
    if isinstance(node, ast.Starred):
        return words_in(node.value)
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return set().union(*map(words_in, node.elts)) if node.elts else set()
    return set()


def groups(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """Collections, matches and chains of comparisons, with the words in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            yield node.lineno, words_in(node)
        elif isinstance(node, ast.Dict):
            yield node.lineno, set().union(*(words_in(key) for key in node.keys if key is not None), set())
        elif isinstance(node, ast.Match):
            patterns = [case.pattern for case in node.cases]
            values = [x.value for pattern in patterns for x in ast.walk(pattern) if isinstance(x, ast.MatchValue)]
            yield node.lineno, set().union(*map(words_in, values), set())
        elif isinstance(node, ast.BoolOp):
            compared = [x for x in node.values if isinstance(x, ast.Compare)]
            by_subject: dict[str, set[str]] = {}
            for comparison in compared:
                found = set().union(*map(words_in, comparison.comparators), words_in(comparison.left))
                by_subject.setdefault(ast.dump(comparison.left), set()).update(found)
            for found in by_subject.values():
                yield node.lineno, found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "vocabulary.py"])
def test_groups_of_words_stand_in_the_vocabulary(module: str) -> None:
    for line, words in groups(MODULES[module]):
        # A verdict or state beside its reason is a pair, and no group.
        alike = max((words & kind for kind in KINDS), key=len)
        assert len(alike) < 2, f"{module}:{line} groups {sorted(alike)}: give the group a name in vocabulary.py"


def verdicts_set(tree: ast.AST) -> Iterator[int]:
    """Lines that set a verdict: by assignment, as a keyword, by ``replace`` or ``setattr``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [x for target in targets for x in ast.walk(target)]
            if any(isinstance(x, ast.Attribute) and x.attr == "verdict" for x in flat):
                yield node.lineno
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            named = any(keyword.arg == "verdict" for keyword in node.keywords)
            makes = called in ("Result", "StudyResult") and (named or bool(node.args))
            said = any(isinstance(x, ast.Constant) and x.value == "verdict" for x in node.args)
            if makes or (called == "replace" and named) or (called == "setattr" and said):
                yield node.lineno


@pytest.mark.parametrize("module", [name for name in MODULES if name not in SET_A_VERDICT])
def test_a_verdict_is_set_in_one_place(module: str) -> None:
    assert not [f"{module}:{line}" for line in verdicts_set(MODULES[module])]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(AIRFLOW_FOLDERS)])
def test_functions_take_few_parameters(module: str) -> None:
    for name, function in functions(MODULES[module]):
        if f"{module}:{name}" in PUBLIC_VERBS:
            continue
        arguments = function.args
        count = len([x for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                     if x.arg not in ("self", "cls")])  # fmt: skip
        where = f"{module}:{function.lineno} {name}"
        assert count <= MOST_PARAMETERS, f"{where} takes {count} parameters"
        if arguments.kwarg is not None and f"{module}:{name}" not in HANDED_ON:
            reads = module.startswith(READERS) and arguments.kwarg.arg == "s3"
            assert reads, f"{where} takes **{arguments.kwarg.arg}"
