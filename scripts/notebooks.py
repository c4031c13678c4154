"""Execute the notebooks, each in a clean kernel, and keep their output where it stands.

Usage: notebooks.py [NAME ...]

What a clock, a port or a folder of this machine has put into the output is taken out, so that nothing changes in a
notebook unless what it shows has changed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMED = re.compile(r"AIRFLOW_URL|DICOM_GET_\w+")
"""What a notebook takes from the environment: not here, where all is made up."""
_PASSING = (
    (re.compile(r"/(?:[\w.-]+/)*dicom-get-notebook-\w+"), "/data"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:11112"),
    (re.compile(r"(?<=_manifests/)(?:verify-)?\d{8}T\d{6}Z-[0-9a-f]{8}"), "RUN"),
    (re.compile(r"( \w?B) in [\d.]+ s, [\d.]+ \w?B/s"), r"\1"),
    (re.compile(r", as of [\d:TZ-]+"), ""),
)


def execute(path: Path, *, cwd: Path | None = None, then: str | None = None) -> Any:
    """Execute a notebook and give it with its output, cleaned.

    Parameters
    ----------
    path : Path
        The notebook.
    cwd : Path, optional
        Where it runs; its own folder by default.
    then : str, optional
        Code of one more cell at its end.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    if then is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(then))  # type: ignore[no-untyped-call]
    resources = {"metadata": {"path": str(cwd or path.parent)}}
    # A kernel is ended before it removes the folders that it made.
    with tempfile.TemporaryDirectory() as scratch:
        # Over sockets of the file system: a kernel warns of TCP, which other users of the machine could listen on.
        over = Config(KernelManager={"transport": "ipc", "ip": f"{scratch}/kernel"})
        client = NotebookClient(notebook, timeout=120, record_timing=False, resources=resources, config=over)
        # No Airflow that happens to run here, unless the caller names its folder.
        client.execute(env={"DICOM_DEMO_FOLDER": scratch, **os.environ, "TMPDIR": scratch})
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            _clean(output)
    return notebook


def _clean(output: Any) -> None:
    data = output.get("data", {})
    if "text/html" in data and (result := re.match(r"(\w+)\(", data["text/plain"])):
        # Said better in HTML; the plain text of a result has every clock in it.
        data["text/plain"] = result[1]
    for values, key in ((data, "text/plain"), (data, "text/html"), (output, "text")):
        if key in values:
            for what, instead in _PASSING:
                values[key] = what.sub(instead, values[key])


def main() -> None:
    for name in filter(NAMED.fullmatch, list(os.environ)):
        del os.environ[name]
    wanted = [FOLDER / f"{Path(name).stem}.ipynb" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in wanted:
        nbformat.write(execute(path), path)  # type: ignore[no-untyped-call]
        print(path.name)


if __name__ == "__main__":
    main()
