"""The notebooks, each executed in a clean kernel: what they show where nothing is named, and on real retrievals."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.manifest.files import write_manifest
from airflow_dicom_get.manifest.frames import frame_of
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.notebook import latest, overview, read_instances, read_manifests
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, Moto
from airflow_dicom_get.testing.sample_data import big_study, make_uid
from airflow_dicom_get.vocabulary import State
from notebooks import NAMED, execute
from tests.support.holdings import Holding

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("01_first_look", "02_complete_or_not", "03_throughput", "04_to_pixels", "05_cohort_tables", "06_hand_it_on")

EXPECTED = {
    "01_first_look": """
        assert manifests["run"].nunique() > 60 and len(held) + 20 == len(now) < len(manifests)
        assert set(by_modality.index) == {"CT", "MR", "CR", "MG"}
        assert by_modality["instances"].sum() == len(held)
        assert len(days) == 31 and abs(days.sum().sum() - held["bytes"].sum() / 1e6) < 1e-3
        assert series["instances"].sum() == len(held)
    """,
    "02_complete_or_not": """
        assert len(missing) == 20
        assert set(missing.loc[~missing["reason"].map(is_transient), "reason"]) == {"class_refused"}
        # A frame of the list is what the next get takes: just these rows.
        from airflow_dicom_get.engine.retry import asked_by
        from airflow_dicom_get.manifest.frames import table_of
        for source, rows in retry_list.items():
            asked = {sop for scope in asked_by(table_of(rows)).scopes for sop in scope.instances}
            assert asked == set(rows["sop_instance_uid"]) and len(asked) == len(rows) > 0
        assert by_day.to_numpy().sum() == len(first) and today.sum() == len(missing)
        assert (result.verdict, result.completed, result.total) == ("partial", 61, 64)
        assert (again.verdict, again.completed, again.skipped) == ("complete", 64, 61)
        assert sum(pacs.sent.values()) == 61 + 3 + 1, "asked again for what was held"
        assert (found.counts["="], found.counts["*"], len(found.differences)) == (63, 1, 1)
        assert verify(result.manifest_uri, destination=folder).same
    """,
    "03_throughput": """
        # The month is made by a model: its speeds are 60 and 25 MB/s, its waits those below, longer in the evening.
        truth = {sample._ARCHIVE.name: (60, 14, 1), sample._CARDIO.name: (25, 45, 2)}
        for source, (rate, wait, associations) in truth.items():
            model = models.loc[source]
            assert abs(model["MB/s"] / rate - 1) < 0.05, model
            assert 1 < model["wait"] * 1e3 / wait < 2, model
            assert used[source] == associations
            assert (np.diff(estimates[source]) >= 0).all() and estimates[source][-1] <= model["MB/s"]
        share = came["waited"].sum() / (came["waited"].sum() + came["seconds"].sum()) * 100
        assert nodes["waiting (%)"].min() < share < nodes["waiting (%)"].max()
        assert nodes["instances"].sum() == len(came)
    """,
    "04_to_pixels": """
        assert voxels.shape == (40, 96, 80) and np.allclose(spacing, (5, 2, 2.5), atol=1e-3)
        assert np.linalg.norm(centre - sample.SPHERE_CENTRE) < 1
        assert abs(millilitres / truth - 1) < 0.02
        # Orthogonal axes of a right-handed space, with the slices towards the head.
        axes_of = affine[:3, :3] / spacing
        assert np.allclose(axes_of.T @ axes_of, np.eye(3), atol=1e-4) and affine[2, 0] > 0
        assert set(np.unique(voxels)) == {-1000, 0, 300, 800}
        assert sorted(stacks) == [1, 2]
        k, i, j = np.linalg.solve(stacks[2][1], np.append(sample.SPHERE_CENTRE, 1))[:3].round().astype(int)
        assert stacks[2][0][k, i, j] == 300
        # Of a stack with a slice missing no volume is made.
        try:
            volume(datasets[:5] + datasets[6:])
        except InvalidOption as error:
            assert "no evenly spaced stack" in str(error)
        else:
            raise AssertionError("a gap went unseen")
    """,
    "05_cohort_tables": """
        assert checks.to_dict() == {"rows": 94, "without a UID": 0, "not a UID": 0, "twice or more": 1}
        assert len(table) == 93 and (table["status"] == "never retrieved").sum() == 3
        assert set(todo["status"]) == {"incomplete", "nothing held", "never retrieved"}
        # DuckDB and pandas count alike.
        assert by_week["instances"].sum() == len(held)
        assert abs(by_week["gigabytes"].sum() - held["bytes"].sum() / 1e9) < 0.1
        assert images["sop_instance_uid"].is_unique and images["study_instance_uid"].nunique() == len(whole)
        remarks = quality.set_index("what")["count"]
        assert set(remarks[remarks > 0].index) == {"series with gaps in their numbers"}
    """,
    "06_hand_it_on": """
        assert (result.verdict, len(missing), again.verdict) == ("partial", 5, "complete")
        assert checked.returncode == 0 and len(records) == len(now) == series["instanceCount"].sum()
        assert set(by_modality["Modality"]) == {"CT", "MR", "CR"} and series["missing"].sum() == 0
        assert len(slices) == (records["modality"] == "CT").sum() == len(batch)
        assert bright["none"].max() == 0 < bright["sphere"].max()
    """,
}


def test_the_latest_row_of_each_instance(tmp_path: Path) -> None:
    """A retrieval that fails at one, a verification that finds another changed, a retrieval that fetches both."""

    def write(run: str, source: str, states: dict[int, State]) -> None:
        rows = [Instance("1.2", "1.2.3", f"1.2.3.{n}") for n in states]
        for row, state in zip(rows, states.values(), strict=True):
            row.state = state
        table = manifest_table(rows, source=source, destination=str(tmp_path) if source else "")
        write_manifest(table, tmp_path / "_manifests" / f"{run}.parquet", verdict="partial", evidence="list", run=run)

    write("20260301T220000Z-ffffffff", "PACS@a:104", {1: "stored", 2: "missing", 3: "stored"})
    write("verify-20260302T060000Z-00000000", "", {1: "failed", 2: "missing", 3: "held"})
    frame = read_manifests(tmp_path)
    assert list(frame["run_at"].dt.hour) == [22, 22, 22, 6, 6, 6]
    now = latest(frame)
    assert now["state"].tolist() == ["failed", "missing", "held"]
    assert set(now["source"]) == {"PACS@a:104"}
    assert set(now["destination"]) == {str(tmp_path)}
    write("20260302T070000Z-aaaaaaaa", "PACS@b:104", {1: "stored", 2: "stored"})
    (tmp_path / "_manifests" / ".ledger").mkdir()
    (tmp_path / "_manifests" / ".ledger" / "x.parquet").write_bytes(b"no manifest")
    now = latest(read_manifests(tmp_path)).sort_values("sop_instance_uid")
    assert now["state"].tolist() == ["stored", "stored", "held"]
    assert now["source"].tolist() == ["PACS@b:104", "PACS@b:104", "PACS@a:104"]


def test_pixels_of_files_without_meta_information(mixed: Holding, embedded: Any, tmp_path: Path) -> None:
    """Every transfer syntax of pydicom's wheel, deflated and big endian among them, told by the manifest alone."""
    pacs = embedded(mixed.folder)
    scu = GetScu(f"{pacs.host}:{pacs.port}", destination=tmp_path, store_with_file_meta=False)
    rows = scu.get_study({"StudyInstanceUID": mixed.study}).manifest
    held = rows[rows["state"] == "stored"]
    datasets = read_instances(held)
    assert [ds.SOPInstanceUID for ds in datasets] == held["sop_instance_uid"].tolist()
    assert [ds.file_meta.TransferSyntaxUID for ds in datasets] == held["transfer_syntax_uid"].tolist()
    assert {"1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"} < set(held["transfer_syntax_uid"])
    with pytest.raises(InvalidOption, match="endpoints"):
        read_instances(held, endpoints="http://127.0.0.1:1")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks") / "copy"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def outputs_of(notebook: Any) -> list[list[Any]]:
    """What is shown below each cell, without the pixels of figures: these depend on the release of matplotlib."""
    return [
        [
            {kind: value if kind != "image/png" else len(value) > 5000 for kind, value in output["data"].items()}
            if "data" in output
            else {key: output[key] for key in ("name", "text")}
            for output in cell["outputs"]
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_with_nothing_named(
    name: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in [variable for variable in os.environ if NAMED.fullmatch(variable)]:
        monkeypatch.delenv(variable)
    executed = execute(copied / f"{name}.ipynb", then=textwrap.dedent(EXPECTED[name]))
    executed.cells.pop()
    assert capfd.readouterr().err == "", "the kernel complains"
    kept = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert outputs_of(executed) == outputs_of(kept), "make notebooks"
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/tmp/|/home/|/root/|Sample\^", text)


REAL = {
    "02_complete_or_not": """
        assert missing["reason"].tolist() == ["sub_operation_failed"] * 2
        assert list(retry_list) == [NODE], (list(retry_list), NODE)
        assert (result.verdict, result.total, result.completed) == ("partial", 40, 38)
    """,
    "03_throughput": "assert len(came) == 68 and nodes.index.nunique() == 2 and (nodes['minutes'] > 0).all()",
    "05_cohort_tables": """
        assert table["status"].value_counts().to_dict() == {"complete": 1, "incomplete": 1, "never retrieved": 1}
        assert by_week["instances"].sum() == 68 and len(images) == 30
    """,
}


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What names the manifests of real retrievals, from a PACS that is in order and one that fails twice."""
    folder = tmp_path_factory.mktemp("retrieved")
    sound = big_study(folder / "one", 30, 4000, name="sound")
    ailing = big_study(folder / "two", 40, 4000, name="ailing", series=2)
    to = folder / "to"
    with EmbeddedPacs(folder / "one") as good, EmbeddedPacs(folder / "two") as bad:
        bad.fail = {make_uid("ailing 1 1 3"), make_uid("ailing 2 2 30")}
        GetScu(f"{good.host}:{good.port}", destination=to).get_study({"StudyInstanceUID": sound})
        GetScu(f"{bad.host}:{bad.port}", destination=to, associations=2, retries=0).get_study(
            {"StudyInstanceUID": ailing}
        )
        cohort = folder / "cohort.csv"
        cohort.write_text(f"study_instance_uid,note\n{sound},a\n {ailing} ,b\n1.2.3,c\n", encoding="utf-8")
        yield {
            "DICOM_GET_MANIFESTS": str(to),
            "DICOM_GET_COHORT": str(cohort),
            "DICOM_GET_NODE": f"{bad.host}:{bad.port}",
            "DICOM_GET_STUDY": ailing,
        }


@pytest.mark.parametrize("name", sorted(REAL))
def test_a_notebook_on_real_retrievals(
    name: str, copied: Path, retrieved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in retrieved.items():
        monkeypatch.setenv(variable, value)
    execute(copied / f"{name}.ipynb", then=textwrap.dedent(REAL[name]))


def test_manifests_and_pixels_out_of_a_bucket(
    copied: Path, retrieved: dict[str, str], moto: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        "DICOM_GET_MANIFESTS": f"s3://{BUCKET}/night",
        "AWS_ENDPOINT_URL": moto.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    scu = GetScu(retrieved["DICOM_GET_NODE"], destination=f"s3://{BUCKET}/night", s3_config=moto.config, retries=0)
    assert scu.get_study({"StudyInstanceUID": retrieved["DICOM_GET_STUDY"]}).completed == 38
    execute(
        copied / "01_first_look.ipynb",
        then="""if True:
        from airflow_dicom_get.notebook import read_instances
        assert len(manifests) == 40 and len(held) == 38
        datasets = read_instances(held.head(3))
        assert [ds.SOPInstanceUID for ds in datasets] == held["sop_instance_uid"].head(3).tolist()
        assert len(datasets[0].PixelData) == 4000
        """,
    )


def test_labels_of_an_overview_are_no_formulas_and_short() -> None:
    """Whoever writes a manifest may write any text into it."""
    for text in ("$\\frac$", "M" * 3_000_000, "a\nb\x1b[2J"):
        row = Instance("1.2", "1.2.3", "1.2.3.4")
        row.state, row.modality = "missing", text
        row.reason = text
        figure = overview(frame_of(manifest_table([row], source="", destination="")))
        figure.savefig(BytesIO())
        labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
        assert max(map(len, labels)) <= 45
        assert all(map(str.isprintable, labels))
