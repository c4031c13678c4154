"""Try an installed airflow-dicom-get from outside; scripts/packages.py runs this in each of its environments.

Usage: installed.py SOURCES CHECK…

SOURCES is the unpacked sdist: the DAGs and the tests come from it, the package from where it was installed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

TYPED = """\
from airflow_dicom_get import GetScu, Result
result: Result = GetScu("PACS@127.0.0.1:104", destination="/tmp").get_study({"StudyInstanceUID": "1.2.3"})
verdict: int = result.verdict
"""


def program(name: str, *arguments: str, **environment: str) -> str:
    """Run a program of this environment to its end; gives its output."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name} {arguments}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def engine(sources: Path) -> None:
    """Files, version and public names; a retrieval from the embedded PACS; the shell."""
    import airflow_dicom_get
    from airflow_dicom_get.testing.pacs import EmbeddedPacs
    from airflow_dicom_get.testing.sample_data import big_study

    package = files("airflow_dicom_get")
    assert not Path(str(package)).is_relative_to(sources)
    for name in ("py.typed", "plugins/templates/task.html", "plugins/static/page.css", "plugins/static/page.js"):
        assert (package / name).is_file(), name
    assert airflow_dicom_get.__version__ == version("airflow-dicom-get")
    for name in airflow_dicom_get.__all__:
        assert getattr(airflow_dicom_get, name) is not None
    with tempfile.TemporaryDirectory() as folder:
        uid = big_study(Path(folder, "pacs"), 3, 1024)
        with EmbeddedPacs(Path(folder, "pacs")) as pacs:
            node = f"PACS@127.0.0.1:{pacs.port}"
            scu = airflow_dicom_get.GetScu(node, destination=f"{folder}/python")
            result = scu.get_study({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": uid})
            assert (result.verdict, result.completed, len(result.manifest)) == ("complete", 3, 3)
            assert result.manifest_uri
            assert airflow_dicom_get.load_manifest(result.manifest_uri).equals(result.manifest)
            said = json.loads(program("dicom-get", "get", node, "--study", uid, "--to", f"{folder}/shell", "--json"))
            assert (said["verdict"], said["completed"]) == ("complete", 3)


def airflow(sources: Path) -> None:
    """The provider, its connection types and its plugin in Airflow's own lists; the DAGs parse and one runs."""
    from airflow_dicom_get.testing.pacs import EmbeddedPacs
    from airflow_dicom_get.testing.sample_data import big_study

    with tempfile.TemporaryDirectory() as folder:
        uid = big_study(Path(folder, "pacs"), 3, 1024)
        with EmbeddedPacs(Path(folder, "pacs")) as pacs:
            home = {
                "AIRFLOW_HOME": folder,
                "AIRFLOW__CORE__DAGS_FOLDER": str(sources / "dags"),
                "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
                "AIRFLOW_CONN_DICOM_DEFAULT": f"dicom://PACS@127.0.0.1:{pacs.port}",
                "DICOM_DESTINATION": f"{folder}/held",
            }
            program("airflow", "db", "migrate", **home)
            providers = json.loads(program("airflow", "providers", "list", "-o", "json", **home))
            assert version("airflow-dicom-get") in [
                one["version"] for one in providers if one["package_name"] == "airflow-dicom-get"
            ]
            hooks = json.loads(program("airflow", "providers", "hooks", "-o", "json", **home))
            assert {"dicom", "dicom_s3"} <= {one["connection_type"] for one in hooks}
            plugins = json.loads(program("airflow", "plugins", "-o", "json", **home))
            assert any("airflow-dicom-get" in one["source"] for one in plugins), plugins
            forms = program("python", "-c", FORMS, **home)
            assert forms.split() == ["dicom", "dicom_s3"], forms
            # Airflow may log to the same place before it answers.
            errors = program("airflow", "dags", "list-import-errors", "--local", "-o", "json", **home)
            assert errors.splitlines()[-1] == "[]", errors
            program("airflow", "dags", "test", "retrieve_studies", **home)
            assert len(list(Path(folder, "held", uid).rglob("*.dcm"))) == 3


# What the API server shows as the form of a new connection.
FORMS = """
from airflow.api_fastapi.core_api.services.ui.connections import HookMetaService
forms = {one.connection_type: one for one in HookMetaService.hook_meta_data()}
print(*[name for name in ("dicom", "dicom_s3") if forms[name].extra_fields])
"""


def types(sources: Path) -> None:
    """A type checker finds the types, and by them an error that is made on purpose."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "user.py").write_text(TYPED, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--strict", "user.py"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert "user.py:3: error: Incompatible types in assignment" in done.stdout, done.stdout
        assert "Found 1 error in 1 file" in done.stdout, done.stdout


def tests(sources: Path) -> None:
    """A part of the sdist's tests, against what was installed."""
    chosen = [
        "tests/unit",
        "tests/functional/test_manifest.py",
        "tests/functional/test_testing_pacs.py",
        "tests/airflow/test_provider.py",
    ]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("pytest")), "-q", *chosen], cwd=sources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def installed(name: str) -> str:
    """A distribution and its version; empty if it is not there."""
    try:
        return f", {name.removeprefix('apache-')} {version(name)}"
    except PackageNotFoundError:
        return ""


def main() -> None:
    sources, checks = Path(sys.argv[1]), sys.argv[2:]
    if "airflow" not in checks:
        try:
            importlib.import_module("airflow")
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("Airflow came along without being asked for")
    for name in checks:
        globals()[name](sources)
    shown = "".join(map(installed, ("apache-airflow", "pandas", "pyarrow", "boto3", "pynetdicom", "pydicom")))
    print(f"Python {platform.python_version()}{shown}: {', '.join(checks)} passed")


if __name__ == "__main__":
    main()
