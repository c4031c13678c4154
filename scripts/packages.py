"""Install the wheel and the sdist into empty environments with plain pip, and try what was installed.

Usage: packages.py [--only NAME,…] [--airflow VERSION] [--record]

Each row of the matrix is an interpreter, what is installed, and releases that it is held to. An interpreter that is not
here leaves its rows out, and says so. Each environment must be in order for `pip check`, and pass scripts/installed.py
in a folder that does not hold the sources. The newest pre-release of Airflow is tried too, where there is one after
the newest release. `--airflow` tries one release of Airflow in place of the matrix, also one that the extra does not
take. `--record` writes what passed with an Airflow into docs/supported.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import supported

ROOT = Path(__file__).resolve().parent.parent
LOWEST = (
    "boto3==1.36.0",
    "pandas==2.2.0",
    "pyarrow==16.0.0",
    "pynetdicom==3.0.3",
    "pydicom==3.0.2",
    "rich==13.0.0",
)
PRERELEASE = "the newest pre-release of Airflow"


@dataclass(frozen=True)
class Row:
    """One environment."""

    name: str
    python: str
    package: str = "wheel"
    extras: str = ""
    pins: tuple[str, ...] = ()
    checks: tuple[str, ...] = ("engine",)


MATRIX = (
    Row("lowest", "python3.11", pins=LOWEST),
    Row("newest", "python3.13", checks=("engine", "types")),
    Row(
        "airflow-lowest",
        "python3.11",
        extras="airflow",
        pins=("apache-airflow==3.3.1", "pandas<3"),
        checks=("engine", "airflow"),
    ),
    Row("airflow-newest", "python3.13", extras="airflow", pins=("pandas>=3",), checks=("engine", "airflow")),
    Row("airflow-3.12", "python3.12", extras="airflow", checks=("engine", "airflow")),
    Row("airflow-3.14", "python3.14", extras="airflow", checks=("engine", "airflow")),
    Row("prerelease-3.11", "python3.11", extras="airflow", pins=(PRERELEASE,), checks=("engine", "airflow")),
    Row("prerelease-3.13", "python3.13", extras="airflow", pins=(PRERELEASE,), checks=("engine", "airflow")),
    Row("sdist", "python3.11", package="sdist", extras="airflow,dev", checks=("engine", "airflow", "tests")),
)


def interpreter(name: str) -> str | None:
    """The path of an interpreter that runs and can make environments; the system's goes before others."""
    for path in ("/usr/bin", None):
        found = shutil.which(name, path=path)
        if found and subprocess.run([found, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return found
    return None


def prerelease() -> str | None:
    """The newest pre-release of Airflow, as pip takes it; None where the newest release is newer."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--pre", "--report", "-"]
    said = subprocess.run([*pip, *options, "apache-airflow"], check=True, stdout=subprocess.PIPE, text=True)
    version: str = json.loads(said.stdout)["install"][0]["metadata"]["version"]
    return f"apache-airflow=={version}" if re.search(r"(a|b|rc)\d+$", version) else None


def rows_of(only: list[str]) -> list[Row]:
    """The rows that are wanted, with the pre-release that they name."""
    rows = [row for row in MATRIX if not only or row.name in only]
    if not any(PRERELEASE in row.pins for row in rows):
        return rows
    newest = prerelease()
    if newest is None:
        print("No pre-release of Airflow is newer than its newest release.", flush=True)
        return [row for row in rows if PRERELEASE not in row.pins]
    return [replace(row, pins=(newest,)) if PRERELEASE in row.pins else row for row in rows]


def build(folder: Path) -> dict[str, Path]:
    """Build both packages: the sdist from the sources, the wheel from the sdist."""
    tool = [sys.executable, "-W", "ignore", "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(tool, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(sdist)]
    subprocess.run([*wheel, "--disable-pip-version-check"], cwd=folder, check=True)
    (made,) = folder.glob("*.whl")
    return {"wheel": made, "sdist": sdist}


def check(row: Row, python: str, package: Path, folder: Path) -> str:
    """Install and try one row. Returns what was installed; ``CalledProcessError`` if anything fails."""
    environment = folder / "env"
    subprocess.run([python, "-m", "venv", environment], check=True)
    own = str(environment / "bin" / "python")
    pip = [own, "-m", "pip", "--disable-pip-version-check"]
    wanted = f"{package}[{row.extras}]" if row.extras else str(package)
    types = ("mypy",) if "types" in row.checks else ()
    subprocess.run([*pip, "install", "--quiet", wanted, *row.pins, *types], cwd=folder, check=True)
    subprocess.run([*pip, "check"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    shutil.unpack_archive(package.parent / next(package.parent.glob("*.tar.gz")).name, folder, filter="data")
    (sources,) = (path.parent for path in folder.glob("*/pyproject.toml"))
    said = subprocess.run(
        [own, "-W", "ignore", sources / "scripts" / "installed.py", sources, *row.checks],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return said.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of rows, with commas between")
    parser.add_argument("--airflow", help="a release of Airflow to try")
    parser.add_argument("--record", action="store_true", help="write what passed into docs/supported.json")
    chosen = parser.parse_args()
    if chosen.airflow:
        # Without the extra, whose bounds would refuse it.
        pins = (f"apache-airflow=={chosen.airflow}",)
        rows = [Row(f"airflow-{chosen.airflow}", "python3.11", pins=pins, checks=("engine", "airflow"))]
    else:
        rows = rows_of([name for name in chosen.only.split(",") if name])
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        packages = build(Path(temporary))
        for row in rows:
            python = interpreter(row.python)
            if python is None:
                print(f"{row.name}: left out, {row.python} is not here", flush=True)
                continue
            began = time.monotonic()
            folder = Path(temporary, row.name)
            folder.mkdir()
            try:
                said = check(row, python, packages[row.package], folder)
                found = re.match(r"Python ([\d.]+), airflow ([^,:]+)", said)
                if chosen.record and found:
                    supported.record("package", found[2], {"passed": len(row.checks)}, python=found[1])
            except subprocess.CalledProcessError as error:
                failed.append(row.name)
                said = f"FAILED: {error.cmd[:4]}: {(error.stdout or '')[-2000:]}"
            print(f"{row.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
            shutil.rmtree(folder)
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
