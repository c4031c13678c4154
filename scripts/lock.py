"""Write constraints.txt again: the newest releases that resolve together, for the oldest and a newer Python.

Usage: lock.py PYTHON_OLD PYTHON_NEW

Each interpreter gets an empty virtual environment with all the extras. What both resolve to stands in the file once;
where they differ, each line carries a marker. The Makefile installs with this file, and so does whoever wants the
very releases that the tests ran with.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "airflow,amazon,examples,notebook,distributed,edge,dev"
HEADER = """\
# Releases that resolve together on Python 3.11 and newer, with all the extras. Written by `make lock`, not by hand.
# Use: pip install -c constraints.txt 'airflow-dicom-get[airflow]'
"""


def resolve(python: str) -> tuple[tuple[int, int], dict[str, str]]:
    """Return the version of `python` and what it resolves all the extras to, by name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = str(Path(folder, "bin", "python"))
        pip = [own, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", f"{ROOT}[{EXTRAS}]", "hatchling"], check=True)
        subprocess.run([*pip, "check"], check=True)
        frozen = subprocess.run([*pip, "freeze", "--exclude-editable"], check=True, capture_output=True, text=True)
        major, minor = subprocess.run(
            [own, "-c", "import sys; print(*sys.version_info[:2])"], check=True, capture_output=True, text=True
        ).stdout.split()
    pins = dict(line.split("==", 1) for line in frozen.stdout.splitlines() if "==" in line)
    return (int(major), int(minor)), pins


def merge(old: dict[str, str], new: dict[str, str], since: str) -> list[str]:
    """Return the lines of both sets of pins; `since` is the first Python version that takes the newer set."""
    lines = []
    for name in sorted(old.keys() | new.keys(), key=str.lower):
        if old.get(name) == new.get(name):
            lines.append(f"{name}=={old[name]}")
            continue
        if name in old:
            lines.append(f'{name}=={old[name]} ; python_version < "{since}"')
        if name in new:
            lines.append(f'{name}=={new[name]} ; python_version >= "{since}"')
    return lines


def main() -> None:
    python_old, python_new = sys.argv[1:]
    version, old = resolve(python_old)
    _, new = resolve(python_new)
    for pins in (old, new):
        for name in ("airflow-dicom-get", "pip", "setuptools", "wheel"):
            pins.pop(name, None)
    lines = merge(old, new, f"{version[0]}.{version[1] + 1}")
    Path(ROOT, "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(lines)} lines")


if __name__ == "__main__":
    main()
