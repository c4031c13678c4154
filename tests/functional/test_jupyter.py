"""What a person sees in Jupyter: bars, tables, sentences, and what an interrupt does; each in a real kernel."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from airflow_dicom_get import clock
from airflow_dicom_get.manifest.files import write_manifest
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, SECRET_KEY, Moto

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
_CELL_SECONDS = 60


class Kernel:
    """A Jupyter kernel: runs cells and gives what a person would see of them."""

    def __init__(self, folder: Any) -> None:
        # It is killed in the end, before it removes the folders that it made.
        self.scratch = tempfile.TemporaryDirectory()
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", cwd=str(folder), env={**os.environ, "TMPDIR": self.scratch.name}
        )

    def run(self, code: str, *, interrupt_at: str | None = None) -> list[tuple[str, Any]]:
        """Run a cell; ``interrupt_at`` interrupts the kernel when an output of that type comes."""
        request = self.client.execute(code)
        seen: list[tuple[str, Any]] = []
        while True:
            message = self.client.get_iopub_msg(timeout=_CELL_SECONDS)
            kind, content = message["msg_type"], message["content"]
            assert message["parent_header"].get("msg_id") == request, "shown below another cell"
            if kind == "status" and content["execution_state"] == "idle":
                return seen
            if kind in ("stream", "error"):
                seen.append((kind, content.get("text") or "\n".join(content["traceback"])))
            elif kind in ("display_data", "update_display_data", "execute_result"):
                seen.append((kind, content["data"]))
            if kind == interrupt_at:
                self.manager.interrupt_kernel()
                interrupt_at = None

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.scratch.cleanup()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    started = Kernel(tmp_path_factory.mktemp("kernel"))
    started.run(
        """
        import time
        from pathlib import Path
        from airflow_dicom_get import GetScu, StoreScu
        from airflow_dicom_get.notebook import overview
        from airflow_dicom_get.testing.pacs import EmbeddedPacs
        from airflow_dicom_get.testing.sample_data import big_study, make_uid

        held = Path("held").absolute()
        study = {"StudyInstanceUID": big_study(held, 30, 2000, series=3)}
        slow = 0.1
        pacs = EmbeddedPacs(held, before_send=lambda uid: time.sleep(slow)).start()
        node = f"{pacs.host}:{pacs.port}"
        """
    )
    yield started
    started.close()


def text_of(seen: list[tuple[str, Any]], kind: str) -> list[str]:
    return [content["text/html"] if isinstance(content, dict) else content for what, content in seen if what == kind]


@pytest.mark.parametrize("associations", [1, 2])
def test_a_bar_an_interrupt_and_going_on(kernel: Kernel, associations: int) -> None:
    kernel.run(f"slow = 0.1; scu = GetScu(node, destination='to-{associations}', associations={associations})")
    seen = kernel.run("result = scu.get_study(study)\nresult", interrupt_at="update_display_data")
    (first,) = text_of(seen, "display_data")
    assert "<progress value='1' max='30'" in first
    (shown,) = text_of(seen, "execute_result")
    assert "<b>cancelled (interrupted)</b>" in shown
    assert "Run it again: it resumes, and transfers only what is missing." in shown
    assert not text_of(seen, "error")
    kernel.run(
        """
        rows = result.manifest
        states = rows["state"].value_counts().to_dict()
        assert len(rows) == result.total == 30, len(rows)
        assert set(states) == {"stored", "missing"} and states["stored"] == result.completed, states
        """
    )
    # The same client goes on; what the bar says at the end has no clock in it.
    seen = kernel.run("slow = 0; print(result.completed, scu.get_study(study).summary())")
    (line,) = text_of(seen, "stream")
    held = int(line.split()[0])
    assert line == f"{held} complete: 30 of 30 instances listed are held, {held} already there\n"
    last = (text_of(seen, "update_display_data") or text_of(seen, "display_data"))[-1]
    assert f"{30 - held} of {30 - held} instances, " in last
    assert not last.endswith("/s")


def test_a_third_interrupt_is_pythons_own(kernel: Kernel) -> None:
    seen = kernel.run(
        """
        import os, signal
        from airflow_dicom_get.cell import at_cell
        asked = []
        with at_cell(asked.append, None):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        """
    )
    assert "KeyboardInterrupt" in text_of(seen, "error")[0]
    assert text_of(kernel.run("print(asked)"), "stream") == ["['interrupted', 'interrupted']\n"]


def test_the_callers_own_callback_takes_the_place_of_the_bar(kernel: Kernel) -> None:
    seen = kernel.run(
        """
        slow, came = 0, []
        GetScu(node, destination="own").get_study(study, on_sub_operation=came.append)
        print(len(came))
        """
    )
    assert text_of(seen, "stream") == ["30\n"]
    assert not text_of(seen, "display_data")


def test_results_are_tables(kernel: Kernel) -> None:
    kernel.run("slow = 0; scu = GetScu(node, destination='tables')")
    for cell, what in (
        ("scu.echo()", "<th style='text-align:left'>C-GET StudyRoot</th><td style='text-align:left'>accepted</td>"),
        ("scu.plan(study)", "Plan: 30 of 30 instances to fetch"),
        ("result = scu.get_study(study)\nresult", "<b>complete</b>"),
        ("from airflow_dicom_get.verify import verify\nverify(result.manifest_uri)", "same: 30 of 30 instances"),
    ):
        (html,) = text_of(kernel.run(cell), "execute_result")
        assert html.startswith("<table>")
        assert what in html
    kernel.run("Path(result.manifest.uri[3].removeprefix('file://')).unlink()")
    (html,) = text_of(kernel.run("verify(result.manifest_uri)"), "execute_result")
    assert "differences: 29 of 30 instances are the same, 1 not there" in html


def test_a_failure_is_a_sentence(kernel: Kernel) -> None:
    (said,) = text_of(kernel.run("GetScu('127.0.0.1:1').echo()"), "error")
    assert said == (
        "\x1b[31mConnectFailed\x1b[0m: No connection to 127.0.0.1:1: Connection refused. "
        "Check the host and the port, and that the node is running."
    )
    (said,) = text_of(kernel.run("GetScu(node, destination='x').get_study({'StudyInstanceUID': '1.*'})"), "error")
    assert said.startswith("\x1b[31mInvalidQuery\x1b[0m: ")
    assert "\n" not in said


def test_the_overview_is_a_picture_shown_once(kernel: Kernel) -> None:
    kernel.run("slow = 0; result = GetScu(node, destination='seen').get_study(study)")
    seen = kernel.run("overview(result.manifest)")
    pictures = [content for kind, content in seen if isinstance(content, dict) and "image/png" in content]
    assert len(pictures) == 1


# --- the notebooks, where what they are told to read is not there -----------------------------------


@pytest.fixture
def at_notebooks(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("sample.py", "sample.mplstyle"):
        shutil.copy(NOTEBOOKS / name, folder)
    kernel.run(f"import os, sys; os.chdir({str(folder)!r}); sys.path.insert(0, {str(folder)!r})")
    return kernel


def first_cell(kernel: Kernel, name: str, **environment: str) -> str:
    """Run the first cell of a notebook, and give what is said of its failure."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    kernel.run("import os; kept = dict(os.environ)")
    (said,) = text_of(kernel.run(f"os.environ.update({environment!r})\n{source}"), "error")
    kernel.run("os.environ.clear(); os.environ.update(kept)")
    assert "Traceback" not in said
    assert len(said) < 400, said
    return said


@pytest.mark.parametrize("name", ["01_first_look", "02_complete_or_not", "03_throughput", "05_cohort_tables"])
def test_no_manifests_none_with_rows_and_no_bucket(name: str, at_notebooks: Kernel, moto: Moto, tmp_path: Path) -> None:
    said = first_cell(at_notebooks, name, DICOM_GET_MANIFESTS=str(tmp_path))
    assert "There are no manifests at" in said
    assert "Name the destination of a retrieval" in said
    said = first_cell(at_notebooks, name, DICOM_GET_MANIFESTS=str(tmp_path / "none"))
    assert "No such file or directory. Check the path" in said
    nothing = manifest_table([], source="a:1", destination="b")
    write_manifest(nothing, tmp_path / "empty.parquet", verdict="empty", evidence="list", run=clock.run_name())
    said = first_cell(at_notebooks, name, DICOM_GET_MANIFESTS=str(tmp_path))
    assert "have no rows. The queries matched nothing" in said
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
    where = {"DICOM_GET_MANIFESTS": "s3://nowhere/night", "AWS_ENDPOINT_URL": moto.endpoint}
    said = first_cell(at_notebooks, name, **keys, **where)
    assert "The manifests at 's3://nowhere/night' cannot be listed." in said
    assert "Check the bucket's name, the endpoint and the region" in said


def test_airflow_down_or_no_token(at_notebooks: Kernel) -> None:
    said = first_cell(at_notebooks, "01_first_look", AIRFLOW_URL="http://127.0.0.1:1", AIRFLOW_TOKEN="t")
    assert "does not answer: ConnectionRefusedError. Check base_url, and that Airflow is running." in said
    said = first_cell(at_notebooks, "01_first_look", AIRFLOW_URL="http://127.0.0.1:1")
    assert "POST /auth/token returns one." in said


def test_the_pacs_down(at_notebooks: Kernel) -> None:
    said = first_cell(at_notebooks, "04_to_pixels", DICOM_GET_NODE="PACS@127.0.0.1:1", DICOM_GET_STUDY="1.2.3")
    assert "IncompleteRetrieval" in said
    assert "Connection refused" in said
    assert "Check the host and the port, and that the node is running." in said
    said = first_cell(at_notebooks, "04_to_pixels", DICOM_GET_NODE="PACS@127.0.0.1:1")
    assert "InvalidQuery" in said


def test_the_pacs_down_in_the_middle_of_a_notebook(at_notebooks: Kernel) -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_complete_or_not.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (at,) = [n for n, source in enumerate(sources) if "DICOM_GET_NODE" in source]
    at_notebooks.run(sources[0])
    at_notebooks.run("os.environ.update(DICOM_GET_NODE='PACS@127.0.0.1:1', DICOM_GET_STUDY='1.2.3')")
    (shown,) = text_of(at_notebooks.run(sources[at]), "execute_result")
    assert "<b>failed (connect_failed)</b>" in shown
    assert "Connection refused. Check the host and the port, and that the node is running." in shown
    (said,) = text_of(at_notebooks.run(sources[at + 1]), "error")
    assert said.startswith("\x1b[31mIncompleteRetrieval\x1b[0m: failed (connect_failed): nothing was retrieved.")
    assert said.endswith("Connection refused. Check the host and the port, and that the node is running.")
    at_notebooks.run("del os.environ['DICOM_GET_NODE'], os.environ['DICOM_GET_STUDY']")


def test_a_cohort_without_uids(at_notebooks: Kernel, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text("patient\nP1\n", encoding="utf-8")
    said = first_cell(at_notebooks, "05_cohort_tables", DICOM_GET_COHORT=str(table))
    assert "has no column study_instance_uid. Name it so" in said


def test_a_file_that_is_gone(kernel: Kernel) -> None:
    (said,) = text_of(
        kernel.run(
            """
            from airflow_dicom_get.notebook import read_instances
            slow, to = 0, Path("gone").absolute()
            rows = GetScu(node, destination=to).get_study(study).manifest
            for path in to.glob("*/*/*.dcm"):
                path.unlink()
            read_instances(rows)
            """
        ),
        "error",
    )
    assert "No such file or directory. It may have been moved." in said
