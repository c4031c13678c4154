"""What was tested on which Airflow and Python: docs/supported.json, which the table of docs/supported.md is made from.

`make test-packages ARGS='--record'` writes its own rows. The tests write theirs where SUPPORTED=1 is set and a whole
folder of them ran: `make test SUPPORTED=1`, `make test-live SUPPORTED=1`, `make test-browser SUPPORTED=1`; on another
Airflow than the newest, in an environment that has it: `SUPPORTED=1 .venv-34/bin/python -m pytest tests/airflow`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "docs" / "supported.json"
CHECKS = {
    "package": "installed by pip",
    "airflow": "tests of the provider",
    "live": "a real Airflow",
    "browser": "in Chromium",
}
"""What there is to pass, and the head of its column."""


def minor(version: str) -> str:
    """The version of Python without its last number."""
    return ".".join(version.split(".")[:2])


def load(path: Path = FILE) -> list[dict[str, Any]]:
    """The rows: of each check, Airflow and Python, the last result."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def record(check: str, airflow: str, figures: Mapping[str, int], *, python: str = "", path: Path = FILE) -> None:
    """Put down the result of a check: how many passed, failed and were left out, in place of an older one."""
    row = {"check": check, "airflow": airflow, "python": minor(python or platform.python_version())}
    kept = [one for one in load(path) if any(one[name] != value for name, value in row.items())]
    rows = [*kept, {**row, **figures, "date": date.today().isoformat()}]
    rows.sort(key=lambda one: (order(one["airflow"]), order(one["python"]), one["check"]))
    lines = ",\n".join(json.dumps(one) for one in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def order(version: str) -> tuple[list[int], bool, str]:
    """A key by which versions sort; a pre-release comes before its release."""
    number, pre = version, ""
    for index, letter in enumerate(version):
        if letter.isalpha():
            number, pre = version[:index], version[index:]
            break
    return [int(part) for part in number.split(".") if part], not pre, pre
