"""The verb ``export``: each form is checked by the tool of somebody else that reads it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from airflow_dicom_get import GetScu, combine_manifests, export, load_manifest, read_manifest
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.errors import InvalidOption, ManifestError, NotProven, SinkError
from airflow_dicom_get.manifest.files import read_table, write_manifest
from airflow_dicom_get.manifest.schema import manifest_table
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.s3_servers import BUCKET, S3Server
from airflow_dicom_get.verify import verify
from airflow_dicom_get.vocabulary import State
from tests.support.holdings import Holding

Embedded = Callable[..., EmbeddedPacs]


class Got:
    """A study in a folder, and its manifests."""

    def __init__(self, pacs: EmbeddedPacs, holding: Holding, folder: Path) -> None:
        self.pacs, self.study, self.folder = pacs, holding.study, folder
        self.holding = holding

    def get(self, **options: Any) -> str:
        """Retrieve it; the URI of the manifest."""
        options = {"destination": self.folder, "retries": 0, **options}
        uri = (
            GetScu(f"{self.pacs.host}:{self.pacs.port}", **options)
            .get_study({"StudyInstanceUID": self.study})
            .manifest_uri
        )
        assert uri is not None
        return uri

    def partial(self) -> tuple[str, set[str]]:
        """The same with two instances that the PACS fails to send."""
        refused = set(sorted(self.holding.entries)[:2])
        self.pacs.fail = refused
        uri = self.get()
        self.pacs.fail = set()
        return uri, refused


@pytest.fixture
def got(embedded: Embedded, ct: Holding, tmp_path: Path) -> Got:
    return Got(embedded(ct.folder), ct, tmp_path / "dicom")


@pytest.fixture(scope="module")
def complete(ct: Holding, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The manifest of a complete retrieval, and its folder; nobody changes either."""
    folder = tmp_path_factory.mktemp("complete") / "dicom"
    with EmbeddedPacs(ct.folder) as pacs:
        return Got(pacs, ct, folder).get(tags=["AccessionNumber", "PatientID"]), folder


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The shell's verb, in this process: most of its time is its start."""
    out, err = io.StringIO(), io.StringIO()
    words = ["export", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


IDC_QUERY = """
SELECT StudyInstanceUID, Modality, COUNT(DISTINCT SeriesInstanceUID) AS series, SUM(instanceCount) AS instances,
       SUM(series_size_MB) AS size
FROM index WHERE Modality = 'CT' AND instanceCount > 1 GROUP BY StudyInstanceUID, Modality ORDER BY size DESC
"""
"""As the tutorials of idc-index have it, where the client's main table is called so."""


def files_in(folder: Path) -> list[Path]:
    return list(folder.glob("[0-9]*/*/*.dcm"))


def sha256sum(sums: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sha256sum", "--check", "--strict", str(sums)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def made_up(path: Path, states: dict[int, State], *, run: str = "20260301T220000Z-ffffffff", **changes: Any) -> Path:
    """Write a manifest of a study that nobody has retrieved."""
    rows = []
    for number, state in states.items():
        row = Instance("1.2", "1.2.3", f"1.2.3.{number}", "1.2.840.10008.5.1.4.1.1.2")
        row.state, row.modality, row.syntax = state, "CT", "1.2.840.10008.1.2.1"
        if state in ("stored", "held", "unexpected"):
            row.sha256, row.bytes, row.dataset_offset, row.where = bytes([number] * 32), 1000, 300, "file:///data/1.2/"
        else:
            row.reason = "not_sent"
        for name, value in changes.items():
            setattr(row, name, value)
        rows.append(row)
    verdict = "partial" if set(states.values()) & {"missing", "failed"} else "complete"
    write_manifest(
        manifest_table(rows, source="PACS@a:104", destination="/data"), path, verdict=verdict, evidence="list", run=run
    )
    return path


class TestSha256sums:
    def test_sha256sum_agrees_on_a_folder(self, complete: tuple[str, Path], ct: Holding, tmp_path: Path) -> None:
        uri, folder = complete
        command = [sys.executable, "-m", "airflow_dicom_get.cli", "export", uri, "--as", "sha256sums"]
        done = subprocess.run([*command, "--to", tmp_path / "SHA256SUMS"], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            f"complete: {len(ct.files)} instances in 4 series of 1 study",
            str(tmp_path / "SHA256SUMS"),
        ]
        checked = sha256sum(tmp_path / "SHA256SUMS", folder)
        assert checked.returncode == 0
        assert sorted(checked.stdout.splitlines()) == sorted(
            f"{path.relative_to(folder)}: OK" for path in folder.glob("[0-9]*/*/*.dcm")
        )
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        victim = next(copy.glob("[0-9]*/*/*.dcm"))
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
        spoilt = sha256sum(tmp_path / "SHA256SUMS", copy)
        assert spoilt.returncode == 1
        assert f"{victim.relative_to(copy)}: FAILED" in spoilt.stdout

    @pytest.mark.parametrize("server", ["moto", "juicefs"])
    def test_sha256sum_agrees_on_objects_that_boto_fetched(
        self, request: pytest.FixtureRequest, embedded: Embedded, private: Holding, tmp_path: Path, server: str
    ) -> None:
        import boto3

        service: S3Server = request.getfixturevalue(server)
        config = {name: value for name, value in service.config.items() if name != "bucket"}
        prefix = f"exports-{tmp_path.name}"
        got = Got(embedded(private.folder), private, tmp_path)
        uri = got.get(destination=f"s3://{BUCKET}/{prefix}", s3_config=config)
        written = export(uri, "sha256sums", f"s3://{BUCKET}/{prefix}/SHA256SUMS", s3_config=config, check=True)
        assert written["files"] == [f"s3://{BUCKET}/{prefix}/SHA256SUMS"]
        with pytest.raises(InvalidOption, match="exists already"):
            export(uri, "sha256sums", f"s3://{BUCKET}/{prefix}/SHA256SUMS", s3_config=config)
        client = boto3.client(
            "s3",
            endpoint_url=config["endpoint"],
            aws_access_key_id=config["access_key"],
            aws_secret_access_key=config["secret_key"],
            region_name="us-east-1",
        )
        for item in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]:
            path = tmp_path / item["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not item["Key"].endswith("/"):
                client.download_file(BUCKET, item["Key"], str(path))
        client.close()
        checked = sha256sum(tmp_path / prefix / "SHA256SUMS", tmp_path / prefix)
        assert (checked.returncode, len(checked.stdout.splitlines())) == (0, len(private.files))

    def test_what_is_missing_stands_in_comments(self, got: Got, tmp_path: Path) -> None:
        uri, refused = got.partial()
        sums = tmp_path / "SHA256SUMS"
        written = export(uri, "sha256sums", sums, accept=["partial"])
        assert (written["verdict"], written["missing"], written["instances"]) == ("partial", 2, 38)
        comments = [line for line in sums.read_text().splitlines() if line.startswith("#")]
        assert "2 of 40 instances are missing (2 sub_operation_failed)" in comments[0]
        assert {Path(line.split()[2]).stem for line in comments[1:]} == refused
        checked = sha256sum(sums, got.folder)
        assert (checked.returncode, len(checked.stdout.splitlines())) == (0, 38)

    def test_a_reason_of_a_manifest_writes_no_line(self, tmp_path: Path) -> None:
        """Whoever writes a manifest may write a word that is none of ours."""
        forged = f"not_sent\n{'a' * 64}  ../../etc/passwd\n#"
        path = made_up(tmp_path / "a.parquet", {1: "stored", 2: "missing"}, reason=forged)
        text = export(path, "sha256sums", accept="partial")
        assert [line for line in text.splitlines() if not line.startswith("#")] == [
            f"{'01' * 32}  1.2/1.2.3/1.2.3.1.dcm"
        ]
        assert "passwd" not in text
        with pytest.raises(NotProven) as refused:
            export(path, "sha256sums")
        assert "passwd" not in str(refused.value)

    def test_without_a_file_it_is_a_text(self, complete: tuple[str, Path], tmp_path: Path) -> None:
        uri, _ = complete
        text = export(load_manifest(uri), "sha256sums")
        export([uri], "sha256sums", tmp_path / "sums")
        assert text == (tmp_path / "sums").read_text()


class TestSeries:
    def test_a_query_written_for_idc_index(self, complete: tuple[str, Path], ct: Holding, tmp_path: Path) -> None:
        import duckdb

        uri, folder = complete
        for name in ("series.parquet", "series.csv"):
            written = export(uri, "series", tmp_path / name)
            assert written["series"] == 4
            index: Any = duckdb.sql(f"SELECT * FROM '{tmp_path / name}'")
            assert index.columns == [
                "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "instanceCount", "series_size_MB",
                "series_uri", "sop_class_uids", "transfer_syntax_uids", "missing",
            ]  # fmt: skip
            found: Any = duckdb.sql(IDC_QUERY)
            assert found.fetchall() == [
                (ct.study, "CT", 4, 40, pytest.approx(sum(path.stat().st_size for path in files_in(folder)) / 1e6))
            ]
        by_series = {path.parent for path in files_in(folder)}
        table = export(uri, "series")
        assert set(table["series_uri"]) == {str(path) for path in by_series}
        assert dict(zip(table["series_uri"], table["instanceCount"], strict=True)) == {
            str(path): len(list(path.glob("*.dcm"))) for path in by_series
        }
        assert table["transfer_syntax_uids"].nunique() == 3

    def test_what_is_missing_is_counted_series_by_series(self, tmp_path: Path) -> None:
        one = made_up(tmp_path / "a.parquet", {1: "stored", 2: "missing"})
        none = made_up(tmp_path / "b.parquet", {3: "missing"}, series="1.2.4")
        table = export([one, none], "series", accept=["partial"])
        assert table[["SeriesInstanceUID", "instanceCount", "missing"]].to_numpy().tolist() == [
            ["1.2.3", 1, 1],
            ["1.2.4", 0, 1],
        ]
        assert table["series_size_MB"].tolist() == [0.001, 0]

    def test_a_forward_has_its_node(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "forwarded"}, reason=None, forwarded_to="ARCHIVE@b:104")
        assert export(path, "series")["series_uri"].tolist() == ["dicom://ARCHIVE@b:104"]

    def test_patients_only_where_they_are_asked_for_by_name(self, complete: tuple[str, Path], tmp_path: Path) -> None:
        uri, _ = complete
        patient = load_manifest(uri)["PatientID"].unique().tolist()
        export(uri, "series", tmp_path / "a.csv")
        assert not any(word in (tmp_path / "a.csv").read_text() for word in [*patient, "PatientID"])
        table = export(uri, "series", tmp_path / "b.csv", columns="PatientID")
        assert table["series"] == 4
        text = (tmp_path / "b.csv").read_text()
        assert text.splitlines()[0].endswith(",PatientID,missing")
        assert text.count(f",{patient[0]},") == 4
        assert (tmp_path / "b.csv").stat().st_mode & 0o007 == 0
        with pytest.raises(InvalidOption, match=r"'PatientName' is no column of tags of the manifest. It has Acc"):
            export(uri, "series", columns=["PatientName"])
        with pytest.raises(InvalidOption, match="is no column of tags"):
            export(uri, "series", columns=["uri"])

    def test_a_cell_is_no_formula(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored"}, modality='=HYPERLINK("x")')
        export(path, "series", tmp_path / "a.csv")
        assert "'=HYPERLINK" in (tmp_path / "a.csv").read_text()
        with pytest.raises(InvalidOption, match=r"ends in none of \.csv, \.parquet"):
            export(path, "series", tmp_path / "a.xlsx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of mlcroissant and rdflib
class TestCroissant:
    @pytest.fixture
    def mlc(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies' own changes to come
            return pytest.importorskip("mlcroissant", reason="mlcroissant is not installed: pip install mlcroissant")

    def test_mlcroissant_takes_and_loads_it(
        self, mlc: Any, complete: tuple[str, Path], ct: Holding, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        uri, folder = complete
        described = ["--name", "A study", "--licence", "https://creativecommons.org/licenses/by/4.0/"]
        described += ["--citation", "Somebody, 2026", "--description", "Forty slices."]
        done = shell(uri, "--as", "croissant", *described, "--to", tmp_path / "croissant.json", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["files"] == [
            str(tmp_path / "croissant.parquet"),
            str(tmp_path / "croissant.json"),
        ]
        with caplog.at_level("WARNING"):
            dataset = mlc.Dataset(tmp_path / "croissant.json")
        assert not dataset.metadata.ctx.issues.errors
        # What was not given is all that it misses.
        assert {text.partition('"')[2].partition('"')[0] for text in dataset.metadata.ctx.issues.warnings} <= {
            "http://mlcommons.org/croissant/sdVersion", "https://schema.org/datePublished",
            "https://schema.org/version",
        }, dataset.metadata.ctx.issues.warnings  # fmt: skip
        assert "JSON-LD `@context` is not standard" not in caplog.text
        assert (dataset.metadata.name, dataset.metadata.description) == ("A study", "Forty slices.")
        assert dataset.metadata.license == ["https://creativecommons.org/licenses/by/4.0/"]
        assert dataset.metadata.cite_as == "Somebody, 2026"
        records = list(dataset.records("instances"))
        assert {_text(record["instances/path"]) for record in records} == {
            str(path.relative_to(folder)) for path in files_in(folder)
        }
        assert {_text(record["instances/study_instance_uid"]) for record in records} == {ct.study}
        for record in records:
            content = (folder / _text(record["instances/path"])).read_bytes()
            assert (len(content), sha256(content).hexdigest()) == (
                record["instances/bytes"],
                _text(record["instances/sha256"]),
            )

    def test_what_is_missing_is_a_record_set_of_its_own(self, mlc: Any, got: Got, tmp_path: Path) -> None:
        uri, refused = got.partial()
        export(uri, "croissant", tmp_path / "c.json", name="Part", accept=["partial"])
        dataset = mlc.Dataset(tmp_path / "c.json")
        assert "2 of 40 instances are missing" in dataset.metadata.description
        missing = list(dataset.records("missing"))
        assert {_text(record["missing/sop_instance_uid"]) for record in missing} == refused
        assert len(list(dataset.records("instances"))) == 38

    def test_without_a_file_its_instances_stand_in_it(self, mlc: Any, complete: tuple[str, Path], ct: Holding) -> None:
        found = export(complete[0], "croissant", name="A study", columns=["AccessionNumber"])
        json.dumps(found)
        records = list(mlc.Dataset(jsonld=found).records("instances"))
        assert {_text(record["instances/sop_instance_uid"]) for record in records} == set(ct.entries)
        assert "PatientID" not in str(found)
        assert "AccessionNumber" in str(found)

    def test_nothing_is_made_up(self, complete: tuple[str, Path], tmp_path: Path) -> None:
        found = export(complete[0], "croissant", name="A study")
        assert found.keys() == {"@context", "@type", "conformsTo", "name", "recordSet"}
        with pytest.raises(InvalidOption, match="name is missing: the form croissant needs it"):
            export(complete[0], "croissant")
        with pytest.raises(InvalidOption, match="licence: 'CC-BY' is not an address"):
            export(complete[0], "croissant", name="x", licence="CC-BY")

    def test_a_table_of_somebody_else_stays(self, complete: tuple[str, Path], tmp_path: Path) -> None:
        (tmp_path / "c.parquet").write_text("of somebody else")
        with pytest.raises(InvalidOption, match=r"c\.parquet' exists already"):
            export(complete[0], "croissant", tmp_path / "c.json", name="x")
        assert [path.name for path in tmp_path.iterdir()] == ["c.parquet"]


CDM = """
CREATE TABLE person (person_id integer PRIMARY KEY);
CREATE TABLE procedure_occurrence (procedure_occurrence_id integer PRIMARY KEY);
CREATE TABLE visit_occurrence (visit_occurrence_id integer PRIMARY KEY);
CREATE TABLE concept (concept_id integer PRIMARY KEY);
CREATE TABLE image_occurrence (
    image_occurrence_id integer NOT NULL PRIMARY KEY,
    person_id integer NOT NULL REFERENCES person (person_id),
    procedure_occurrence_id integer NOT NULL REFERENCES procedure_occurrence (procedure_occurrence_id),
    visit_occurrence_id integer NULL REFERENCES visit_occurrence (visit_occurrence_id),
    anatomic_site_concept_id integer NULL REFERENCES concept (concept_id),
    wadors_uri text NULL,
    local_path text NULL,
    image_occurrence_date date NOT NULL,
    image_study_uid varchar(250) NOT NULL,
    image_series_uid varchar(250) NOT NULL,
    modality_concept_id integer NOT NULL REFERENCES concept (concept_id)
);
"""
"""The table of OHDSI's imaging extension, with what it needs of the CDM.

Names, types, what may be null and the keys are those of *inst/csv/new_csv/OMOP_CDM_Medical_Imaging_Ex_Field_Level.csv*
in github.com/OHDSI/ImageWG.
"""
MAPPED = "person_id,procedure_occurrence_id,image_occurrence_date,visit_occurrence_id,wadors_uri"


class TestOmop:
    @pytest.fixture
    def cdm(self) -> Iterator[Any]:
        import duckdb

        with duckdb.connect() as database:
            database.execute(CDM)
            database.execute("INSERT INTO person VALUES (7); INSERT INTO procedure_occurrence VALUES (70);")
            database.execute("INSERT INTO visit_occurrence VALUES (700); INSERT INTO concept VALUES (0), (4300757);")
            yield database

    @pytest.mark.parametrize("key", ["StudyInstanceUID", "AccessionNumber"])
    @pytest.mark.parametrize("name", ["images.csv", "images.parquet"])
    def test_a_database_made_by_its_ddl_takes_it(
        self, cdm: Any, complete: tuple[str, Path], ct: Holding, tmp_path: Path, key: str, name: str
    ) -> None:
        uri, folder = complete
        value = ct.study if key == "StudyInstanceUID" else load_manifest(uri)["AccessionNumber"].iloc[0]
        mapping = tmp_path / "mapping.csv"
        mapping.write_text(f"{key},{MAPPED}\n{value},7,70,2026-01-31,700,\n1.2.3,8,80,2026-02-01,,\n")
        done = shell(uri, "--as", "omop", "--mapping", mapping, "--to", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
        cdm.execute(f"INSERT INTO image_occurrence BY NAME SELECT * FROM '{tmp_path / name}'")
        rows = cdm.execute("SELECT * FROM image_occurrence ORDER BY 1").fetchall()
        series = sorted({path.parent for path in files_in(folder)})
        assert rows == [
            (number, 7, 70, 700, None, None, str(path), date(2026, 1, 31), ct.study, path.name, 4300757)
            for number, path in enumerate(series, 1)
        ]
        assert (tmp_path / name).stat().st_mode & 0o007 == 0
        for change in ("person_id = NULL", "modality_concept_id = 1", "person_id = 8", "image_study_uid = NULL"):
            with pytest.raises(duckdb_error(), match=r"onstraint"):
                cdm.execute(f"UPDATE image_occurrence SET {change}")

    def test_a_study_without_a_line_is_named_and_nothing_is_written(self, tmp_path: Path) -> None:
        one = made_up(tmp_path / "a.parquet", {1: "stored"})
        other = made_up(tmp_path / "b.parquet", {1: "stored"}, study="1.3", where="file:///data/1.3/")
        mapping = tmp_path / "mapping.csv"
        mapping.write_text(
            "StudyInstanceUID;person_id;procedure_occurrence_id;image_occurrence_date\n1.2;7;70;2026-01-31\n"
        )
        with pytest.raises(InvalidOption, match=r"mapping\.csv' has no line for 1\.3\. Add a line"):
            export([one, other], "omop", tmp_path / "out.csv", mapping=mapping)
        assert not (tmp_path / "out.csv").exists()
        assert len(export(one, "omop", mapping=mapping)) == 1

    def test_what_is_missing_stands_beside_it(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored", 2: "missing"})
        mapping = tmp_path / "mapping.csv"
        mapping.write_text(f"StudyInstanceUID,{MAPPED}\n1.2,7,70,2026-01-31,,https://pacs.example/studies/1.2\n")
        written = export(path, "omop", tmp_path / "out.csv", mapping=mapping, accept=["partial"])
        assert written["files"] == [str(tmp_path / "out.missing.csv"), str(tmp_path / "out.csv")]
        assert (tmp_path / "out.missing.csv").read_text().splitlines()[1:] == ["1.2,1.2.3,1.2.3.2,missing,not_sent"]
        assert (tmp_path / "out.csv").read_text().splitlines()[1:] == [
            "1,7,70,,,https://pacs.example/studies/1.2,/data/1.2/1.2.3,2026-01-31,1.2,1.2.3,4300757"
        ]

    def test_concepts(self, tmp_path: Path) -> None:
        """OMOP's own for none where the table has none; what the user maps comes first."""
        one = made_up(tmp_path / "a.parquet", {1: "stored"}, modality="SR")
        mapping = tmp_path / "mapping.csv"
        for column, values, concept in (("", "", 0), (",modality_concept_id", ",4300757", 4300757)):
            head = "StudyInstanceUID,person_id,procedure_occurrence_id,image_occurrence_date"
            mapping.write_text(f"{head}{column}\n1.2,7,70,2026-01-31{values}\n")
            assert export(one, "omop", mapping=mapping)["modality_concept_id"].tolist() == [concept]
        forwarded = made_up(tmp_path / "b.parquet", {1: "forwarded"}, reason=None, forwarded_to="A@b:104")
        assert export(forwarded, "omop", mapping=mapping)["local_path"].isna().all()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("person_id\n1", "has no column StudyInstanceUID or AccessionNumber"),
            ("StudyInstanceUID,person_id\n1.2,7", "has no column procedure_occurrence_id"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,,70,2026-01-31,,", "line 2, column person_id is empty"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,SECRET,70,2026-01-31,,", "column person_id is not a whole number"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,7,2147483648,2026-01-31,,", "is not a whole number up to 2147483647"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,7,70,31.1.2026,,", "image_occurrence_date is not a date"),
            (f"StudyInstanceUID,{MAPPED}\n1.x,7,70,2026-01-31,,", "column StudyInstanceUID is not a valid UID"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,7,70,2026-01-31,,,9", "beyond the last is filled"),
            (f"StudyInstanceUID,{MAPPED}\n1.2,7,70,2026-01-31,,\n1.2,8,70,2026-01-31,,", "names the study of line 2"),
            (f"AccessionNumber,{MAPPED}\nA1,7,70,2026-01-31,,", "the manifest has no column AccessionNumber"),
            ("\xff", "is not in UTF-8"),
        ],
    )
    def test_a_bad_mapping(self, tmp_path: Path, text: str, message: str) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored"})
        (tmp_path / "mapping.csv").write_text(text, "latin-1")
        with pytest.raises((InvalidOption, ManifestError), match=re.escape(message)) as caught:
            export(path, "omop", tmp_path / "out.csv", mapping=tmp_path / "mapping.csv")
        assert "SECRET" not in str(caught.value)
        assert not (tmp_path / "out.csv").exists()

    def test_a_mapping_that_is_not_there(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored"})
        with pytest.raises(InvalidOption, match="mapping is missing: the form omop needs it"):
            export(path, "omop")
        with pytest.raises(InvalidOption, match="cannot be read: No such file"):
            export(path, "omop", mapping=tmp_path / "none.csv")


def duckdb_error() -> type[Exception]:
    import duckdb

    return duckdb.ConstraintException


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class TestOnlyWhatIsProven:
    def test_what_is_not_complete_is_refused_unless_it_is_accepted(self, got: Got, tmp_path: Path) -> None:
        uri, _ = got.partial()
        to = tmp_path / "new" / "SHA256SUMS"
        done = shell(uri, "--as", "sha256sums", "--to", to)
        assert (done.returncode, done.stdout) == (3, "")
        assert "The verdict is partial, and nothing was written. 2 of 40 instances are missing" in done.stderr
        assert not to.parent.exists()
        assert shell(uri, "--as", "sha256sums", "--to", to, "--accept", "unverified").returncode == 3
        done = shell(uri, "--as", "sha256sums", "--to", to, "--accept", "partial", "--json")
        assert (done.returncode, json.loads(done.stdout)["missing"]) == (0, 2)

    def test_the_newest_row_of_each_instance_counts(self, got: Got, tmp_path: Path) -> None:
        """A retrieval that leaves two out, and one that fetches them; in any order that they are given in."""
        first, _ = got.partial()
        second = got.get()
        for manifests in ([first, second], [second, first]):
            assert export(manifests, "sha256sums").count("\n") == 40
        with pytest.raises(NotProven):
            export(first, "sha256sums")

    def test_a_later_verification_takes_the_proof_away(self, got: Got) -> None:
        uri = got.get()
        victim = next(got.folder.glob("[0-9]*/*/*.dcm"))
        victim.unlink()
        found = verify(uri)
        assert export(uri, "sha256sums")
        with pytest.raises(NotProven, match="1 of 40 instances are missing"):
            export([uri, found.manifest_uri], "sha256sums")

    def test_a_verification_without_the_pacs_proves_no_more_than_was_proven(self, got: Got) -> None:
        path = Path(got.get().removeprefix("file://"))
        table = read_table(path)
        place: dict[str, Any] = {"study": got.study, "destination": got.folder}
        pacs = f"{got.pacs.host}:{got.pacs.port}"
        for verdict in ("unverified", "cancelled", "empty"):
            write_manifest(table, path, verdict=verdict, evidence="list", run="20200101T000000Z-0")
            for found in (verify(path), verify(path, destination=got.folder), verify(read_manifest(path))):
                assert (found.exit_code, read_manifest(found.manifest_uri).attrs["verdict"]) == (0, verdict)
                with pytest.raises(NotProven, match=f"The verdict is {verdict}"):
                    export([path, found.manifest_uri], "sha256sums")
            with nullcontext() if verdict != "empty" else pytest.raises(NotProven):  # something is not there
                assert export([path, verify(path, addr=pacs).manifest_uri], "sha256sums")
        found = verify(**place)
        assert (found.exit_code, read_manifest(found.manifest_uri).attrs["verdict"]) == (0, "unverified")
        assert read_manifest(verify(**place, addr=pacs).manifest_uri).attrs["verdict"] == "complete"

    @pytest.mark.parametrize("first", [True, False])
    def test_a_verification_knows_nothing_of_studies_that_its_manifest_has_no_rows_of(
        self, got: Got, private: Holding, tmp_path: Path, first: bool
    ) -> None:
        """Of those that a cancel kept from being listed."""
        for holding in (got.holding, private):
            shutil.copytree(holding.folder, tmp_path / "pacs" / holding.study)
        with EmbeddedPacs(tmp_path / "pacs") as pacs:
            node = f"{pacs.host}:{pacs.port}"
            scu = GetScu(node, destination=tmp_path / "both")
            stop = 1 if first else 40
            result = scu.get_study(
                {"StudyInstanceUID": [got.study, private.study]},
                on_sub_operation=lambda event: scu.cancel() if event.completed == stop else None,
            )
            assert (result.verdict, result.evidence) == ("cancelled", "none")
            assert scu.get_study({"StudyInstanceUID": got.study}).verdict == "complete"
            found = verify(result.manifest_uri, destination=tmp_path / "both", addr=node)
        assert (found.exit_code, read_manifest(found.manifest_uri).attrs["verdict"]) == (0, "cancelled")

    def test_a_manifest_whose_rows_are_all_replaced_counts_for_the_studies_that_it_does_not_name(
        self, got: Got, tmp_path: Path
    ) -> None:
        """One of two studies was listed before the cancel, and that one alone is complete now."""
        rows = read_table(got.get().removeprefix("file://"))
        for verdict, evidence, counts in (
            ("cancelled", "none", True), ("partial", "none", True), ("failed", "none", True), ("empty", "list", True),
            ("cancelled", "list", False), ("partial", "list+counts", False), ("unverified", "none", False),
        ):  # fmt: skip
            old = tmp_path / "old.parquet"
            write_manifest(rows, old, verdict=verdict, evidence=evidence, run="20200101T000000Z-0")
            again = got.get()
            if counts:
                with pytest.raises(
                    NotProven, match=f"{verdict}, and nothing was written. Manifest 1 may be of studies"
                ):
                    export([old, again], "sha256sums")
                with pytest.raises(NotProven, match=r"Manifest 2 may be of studies"):
                    export([None, old, again], "sha256sums")
            else:
                assert export([old, again], "sha256sums")

    def test_a_combined_manifest_makes_no_old_row_new(self, tmp_path: Path) -> None:
        got = str(made_up(tmp_path / "a.parquet", {1: "stored", 2: "stored"}, run="20260301T220000Z-0"))
        lost = str(made_up(tmp_path / "b.parquet", {1: "stored", 2: "missing"}, run="20260302T220000Z-0"))
        again = str(made_up(tmp_path / "c.parquet", {1: "stored"}, run="20260303T220000Z-0"))
        alone = combine_manifests([got], tmp_path / "alone.parquet")
        night = combine_manifests([got, again], tmp_path / "night.parquet")
        twice = combine_manifests([night], tmp_path / "twice.parquet")
        every = combine_manifests([lost, load_manifest(got)], tmp_path / "every.parquet")
        for ways in ([alone, lost], [night, lost], [twice, lost], [load_manifest(twice), lost], [every]):
            for manifests in (ways, ways[::-1]):
                with pytest.raises(NotProven, match="1 of 2 instances are missing"):
                    export(manifests, "sha256sums")
        assert export([combine_manifests([lost, got], tmp_path / "x.parquet"), again], "sha256sums", accept="partial")
        mended = str(made_up(tmp_path / "d.parquet", {1: "stored", 2: "stored"}, run="20260304T220000Z-0"))
        assert export([combine_manifests([mended], tmp_path / "y.parquet"), lost], "sha256sums")

    def test_rows_speak_louder_than_the_verdict_of_the_file(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored", 2: "missing"})
        table = pq.read_table(path)
        write_manifest(table, tmp_path / "b.parquet", verdict="complete", evidence="list", run="20260301T220000Z-0")
        with pytest.raises(NotProven, match="The verdict is partial"):
            export(tmp_path / "b.parquet", "sha256sums")

    def test_a_frame_without_its_verdict_proves_nothing(self, complete: tuple[str, Path]) -> None:
        frame = load_manifest(complete[0])
        frame.attrs.clear()
        with pytest.raises(NotProven, match="The verdict is unverified"):
            export(frame, "sha256sums")
        with pytest.raises(NotProven, match="The verdict is unverified"):
            export([complete[0], None], "sha256sums")
        assert export(frame, "sha256sums", accept="unverified")

    def test_each_verdict_is_to_be_accepted(self, tmp_path: Path) -> None:
        part = made_up(tmp_path / "a.parquet", {1: "stored", 2: "missing"})
        whole = load_manifest(made_up(tmp_path / "b.parquet", {3: "stored"}, series="1.2.4"))
        whole.attrs["verdict"] = "unverified"
        for accept in ("partial", "unverified"):
            with pytest.raises(NotProven, match=r"The verdict is partial"):
                export([part, whole], "sha256sums", accept=accept)
        assert export([part, whole], "sha256sums", accept=["partial", "unverified"])

    def test_check_looks_into_the_folder(self, got: Got, tmp_path: Path) -> None:
        uri = got.get()
        assert shell(uri, "--as", "sha256sums", "--to", tmp_path / "a", "--check").returncode == 0
        manifests = sorted((got.folder / "_manifests").glob("*"))
        gone, changed, *_ = sorted(got.folder.glob("[0-9]*/*/*.dcm"))
        gone.unlink()
        changed.write_bytes(changed.read_bytes()[:-2] + b"zz")
        done = shell(uri, "--as", "sha256sums", "--to", tmp_path / "b", "--check")
        assert (done.returncode, done.stdout) == (3, "")
        for path in (gone, changed):
            assert str(path.relative_to(got.folder)).removesuffix(".dcm") in done.stderr
        assert not (tmp_path / "b").exists()
        assert sorted((got.folder / "_manifests").glob("*")) == manifests, "a check writes nothing"

    def test_what_the_pacs_withdrew_is_no_part_and_what_it_did_not_list_is(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored", 2: "withdrawn", 3: "unexpected"})
        assert [line[-11:] for line in export(path, "sha256sums").splitlines()] == ["1.2.3.1.dcm", "1.2.3.3.dcm"]


class TestNotebook:
    def test_runs_that_a_notebook_read_are_told_apart(self, got: Got, tmp_path: Path) -> None:
        from airflow_dicom_get.notebook import export as at_hand
        from airflow_dicom_get.notebook import latest, read_manifests

        got.partial()
        with pytest.raises(NotProven, match="The verdict is partial"):
            at_hand(read_manifests(got.folder), "sha256sums")
        made_up(got.folder / "_manifests" / "b.parquet", {1: "stored"}, run="20990101T000000Z-00000000",
                study=got.study, where=f"{got.folder}/{got.study}/")  # fmt: skip
        second = read_manifests(got.folder)
        assert second["run"].nunique() == 2
        with pytest.raises(NotProven, match="2 of 41 instances are missing"):
            at_hand(second, "sha256sums")
        complete = second[second["run"] == "20990101T000000Z-00000000"]
        for frame in (complete, latest(complete)):
            assert at_hand(frame, "sha256sums").endswith(f"{got.study}/1.2.3/1.2.3.1.dcm\n")


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--as", "xml"), "--as: 'xml' is not allowed. Give one of sha256sums"),
            (("--as", "sha256sums", "--accept", "nothing"), "--accept: 'nothing' is not allowed"),
            (("--as", "sha256sums", "--mapping", "x.csv"), "--mapping does not belong to the form sha256sums"),
            (("--as", "sha256sums", "--to", "dicom://a:104"), "is a DICOM node"),
            (("--as", "sha256sums", "--to", "."), "names no file"),
        ],
    )
    def test_it_is_said_before_anything_is_read(self, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
        to = [] if "--to" in arguments else ["--to", tmp_path / "x"]
        done = shell("/nowhere/m.parquet", *arguments, *to)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_is_there_stays(self, complete: tuple[str, Path], tmp_path: Path) -> None:
        to = tmp_path / "SHA256SUMS"
        to.write_text("of somebody else")
        done = shell(complete[0], "--as", "sha256sums", "--to", to)
        assert done.returncode == 2
        assert f"--to: '{to}' exists already. Give another name, or move it away." in done.stderr
        assert to.read_text() == "of somebody else"
        assert list(tmp_path.iterdir()) == [to]

    def test_a_manifest_of_a_newer_schema(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored"})
        table = pq.read_table(path)
        table = table.replace_schema_metadata({**table.schema.metadata, b"dicom_get.schema": b"2"})
        pq.write_table(table, path)
        done = shell(path, "--as", "sha256sums", "--to", tmp_path / "sums")
        assert done.returncode == 2
        assert "has schema '2', and this version reads schema 1" in done.stderr
        assert not (tmp_path / "sums").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sha256": None}, "has no digest in the manifest"),
            ({"where": "file:///data/other.dcm"}, "lies at a place that is not of our layout"),
            ({"where": None}, "lies at a place that is not of our layout"),
            ({"study": "../../etc", "where": "file:///data/../../etc/"}, "is not a valid UID"),
            ({"sop": "1.2\n0000"}, "is not a valid UID"),
            ({"state": "forwarded", "where": None}, "was forwarded to a node, and has no file"),
        ],
    )
    def test_a_row_that_is_no_file_of_ours(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "stored"}, **changes)
        with pytest.raises(ManifestError, match=message):
            export(path, "sha256sums", tmp_path / "sums")
        assert not (tmp_path / "sums").exists()

    def test_files_of_two_places(self, tmp_path: Path) -> None:
        one = made_up(tmp_path / "a.parquet", {1: "stored"})
        other = made_up(tmp_path / "b.parquet", {2: "stored"}, where="file:///other/1.2/")
        with pytest.raises(ManifestError, match=r"The files lie in 2 places: 'file:///data', 'file:///other'\."):
            export([one, other], "sha256sums")

    def test_nothing_is_held(self, tmp_path: Path) -> None:
        path = made_up(tmp_path / "a.parquet", {1: "missing"})
        with pytest.raises(ManifestError, match="Nothing of it is held"):
            export(path, "sha256sums", accept="partial")
        with pytest.raises(ManifestError, match="list no instance"):
            export(made_up(tmp_path / "b.parquet", {}), "sha256sums")
        with pytest.raises(InvalidOption, match="names none"):
            export([], "sha256sums")

    def test_a_disk_that_gets_full_leaves_nothing(
        self, complete: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from airflow_dicom_get.storage import files

        def full(*_: object) -> int:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(files.disk, "write", full)
        with pytest.raises(SinkError, match="cannot be written: No space left"):
            export(complete[0], "sha256sums", tmp_path / "sums")
        assert list(tmp_path.iterdir()) == []
