"""The DAG that de-identifies copies and forwards them, as a user runs it, to Orthanc."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
from http.client import HTTPConnection
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowFailException
from pydicom import DataElement, Dataset, dcmread

from airflow_dicom_get import GetScu, StoreScu, load_manifest, load_manifests
from airflow_dicom_get.storage import files
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import modes_object
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import ct_study, private_study
from airflow_dicom_get.testing.servers import HOST, Orthanc

SECRET = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def log_of_pydicom():
    """The task silences it for the rest of its process, which here is that of other tests too."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def folder(tmp_path):
    """12 and 40 instances of two studies, of a private class and in compressed syntaxes too."""
    folder = tmp_path / "pacs"
    private_study(folder / "private")
    ct_study(folder / "ct")
    return folder


@pytest.fixture
def burned_in(folder):
    """One of the instances says that patient data is burned into its pixels. Before the PACS indexes it."""
    return str(with_elements(folder, DataElement("BurnedInAnnotation", "CS", "YES")).SOPInstanceUID)


@pytest.fixture
def source(folder, monkeypatch):
    monkeypatch.setenv("AIRFLOW_VAR_DICOM_DEIDENTIFY_SECRET", SECRET)
    with EmbeddedPacs(folder) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DICOM_DEFAULT", f"dicom://PACS@127.0.0.1:{server.port}")
        yield server


@pytest.fixture
def originals(folder):
    return [dcmread(path) for path in sorted(folder.rglob("*.dcm"))]


@pytest.fixture
def orthanc(tmp_path, monkeypatch):
    with Orthanc(tmp_path / "orthanc", ae_title="TARGET", unknown_classes=True) as server:
        monkeypatch.setenv("AIRFLOW_CONN_DICOM_TARGET", f"dicom://TARGET@127.0.0.1:{server.port}")
        yield server


@pytest.fixture
def run(run_dag, load_dag, tmp_path):
    """Run the DAG, each task once."""
    dag = load_dag("deidentify_and_forward")
    for task in dag.tasks:
        task.retries = 0
    conf = {"destination": str(tmp_path / "originals")}
    return lambda: run_dag(dag, run_conf=conf)


def ask(server: Orthanc, path: str):
    connection = HTTPConnection(HOST, server.http_port, timeout=30)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_the_folder_of_a_copy_is_no_link(run, source, orthanc, tmp_path):
    """A neighbour may make one: what it leads to is neither written to nor tidied up."""
    assert run().state == "success"
    own = tmp_path / "own"
    (own / "work").mkdir(parents=True)
    (own / "work" / "thesis.txt").write_text("years")
    for copy in list((tmp_path / "originals-deidentified").glob("[0-9]*")):
        copy.rename(tmp_path / copy.name)
        copy.symlink_to(own)
    again = run()
    assert [path.name for path in own.rglob("*") if path.is_file()] == ["thesis.txt"]
    assert again.state == "failed"
    assert "is a link, which is not followed" in again.log


def held(source, study, folder):
    """A study, retrieved."""
    scu = GetScu(f"PACS@127.0.0.1:{source.port}", destination=folder / "here")
    found = scu.get_study({"StudyInstanceUID": study})
    assert found.verdict == "complete"
    return found


def test_a_link_that_comes_while_copies_are_tidied_up_leads_nowhere(load_dag, source, originals, tmp_path, monkeypatch):
    """A neighbour has files of the names of others' removed, and exchanges their folder when they were listed."""
    found = held(source, originals[0].StudyInstanceUID, tmp_path)
    deidentify = load_dag("deidentify_and_forward").get_task("deidentify").python_callable
    copies, private = tmp_path / "copies", tmp_path / "private"
    deidentify(found.manifest_uri, str(copies))
    (folder,) = copies.glob("[0-9]*")
    for place in (private, folder / "junk"):
        place.mkdir()
        (place / "thesis.txt").write_text("years")
    real = files.files_below

    def exchanged(*arguments):
        listed = list(real(*arguments))
        (folder / "junk").rename(tmp_path / "old")
        (folder / "junk").symlink_to(private)
        return listed

    monkeypatch.setattr(files, "files_below", exchanged)
    with pytest.raises(OSError, match="link"):
        deidentify(found.manifest_uri, str(copies))
    assert (private / "thesis.txt").read_text() == "years"


def test_an_original_is_no_link(load_dag, source, originals, tmp_path):
    """A neighbour may make one when it is held, and before it is copied: to what only the worker may read."""
    dag = load_dag("deidentify_and_forward")
    found = held(source, originals[0].StudyInstanceUID, tmp_path)
    original = next((tmp_path / "here").glob("[0-9]*/*/*.dcm"))
    original.rename(tmp_path / "elsewhere.dcm")
    original.symlink_to(tmp_path / "elsewhere.dcm")
    deidentify = dag.get_task("deidentify").python_callable
    with pytest.raises(AirflowFailException, match="was not de-identified"):
        deidentify(found.manifest_uri, str(tmp_path / "copies"))


def test_no_name_in_the_place_of_a_character_set_gets_into_the_log(load_dag, tmp_path, monkeypatch, caplog, recwarn):
    monkeypatch.setenv("AIRFLOW_VAR_DICOM_DEIDENTIFY_SECRET", SECRET)
    monkeypatch.setattr(modes_object, "_ODD", {0x00080005: "DOE^JOHN", 0x00080020: "20240115"})
    with MisbehavingPacs("odd_values", series=1, instances=2) as pacs:
        found = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=tmp_path / "here").get_study(
            {"StudyInstanceUID": pacs.study_uid}
        )
    deidentify = load_dag("deidentify_and_forward").get_task("deidentify").python_callable
    copies = load_manifest(deidentify(found.manifest_uri, str(tmp_path / "copies")))
    assert len(copies) == len(instances_below(tmp_path / "copies")) == 2
    assert "DOE" not in caplog.text
    assert not [warning for warning in recwarn if "DOE" in str(warning.message)]


def with_elements(folder: Path, *elements: DataElement) -> Dataset:
    """Give one of the instances some elements, before the PACS indexes it."""
    path = folder / "ct" / "series-3" / "0007.dcm"
    dataset = dcmread(path)
    for element in elements:
        dataset.add(element)
    dataset.save_as(path)
    return dataset


def of_names(vr: str, value: str) -> Dataset:
    """A name or another attribute of a patient, as an item of a sequence."""
    item = Dataset()
    item.add(DataElement("ReferringPhysicianName", vr, value))
    return item


@pytest.mark.parametrize(
    ("keyword", "vr", "value"),
    [
        ("PatientName", "LO", "DOE^JANE"),
        ("PatientName", "UN", b"DOE^JANE" * 8192),
        ("PatientBirthDate", "SH", "19500101"),
        ("StudyTime", "LO", "123456"),
        ("FrameOfReferenceUID", "LO", "1.2.3"),
        ("RequestAttributesSequence", "SQ", [of_names("LO", "DOE^JANE")]),
        ("RequestAttributesSequence", "UT", "DOE^JANE"),
    ],
)
def test_what_dicognito_would_leave_as_it_is_is_not_copied(folder, request, load_dag, tmp_path, keyword, vr, value):
    dataset = with_elements(folder, DataElement(keyword, vr, value))
    found = held(request.getfixturevalue("source"), dataset.StudyInstanceUID, tmp_path)
    deidentify = load_dag("deidentify_and_forward").get_task("deidentify").python_callable
    with pytest.raises(AirflowFailException) as caught:
        deidentify(found.manifest_uri, str(tmp_path / "copies"))
    assert f"Instance {dataset.SOPInstanceUID} was not de-identified (ValueError)" in str(caught.value)
    assert not [path for path in (tmp_path / "copies").rglob("*.dcm") if b"DOE^JANE" in path.read_bytes()]


def test_what_may_have_several_value_representations_is_copied(folder, request, load_dag, tmp_path):
    dataset = with_elements(
        folder,
        DataElement("SmallestImagePixelValue", "US", 1),
        DataElement("PatientComments", "UN", b"none"),
        DataElement("PatientName", "UN", b"DOE^JANE"),
    )
    found = held(request.getfixturevalue("source"), dataset.StudyInstanceUID, tmp_path)
    deidentify = load_dag("deidentify_and_forward").get_task("deidentify").python_callable
    deidentify(found.manifest_uri, str(tmp_path / "copies"))
    copies = instances_below(tmp_path / "copies").values()
    assert len(copies) == 40
    assert not [path for path in copies if b"DOE^JANE" in path.read_bytes()]


def test_a_folder_in_the_place_of_a_copy_is_not_forwarded(source, originals, load_dag, orthanc, tmp_path):
    """A neighbour may exchange it when it was copied: for a link to what only the worker may read, or other files."""
    dag = load_dag("deidentify_and_forward")
    found = held(source, originals[0].StudyInstanceUID, tmp_path)
    copies = tmp_path / "copies"
    reference = dag.get_task("deidentify").python_callable(found.manifest_uri, str(copies))
    (folder,) = copies.glob("[0-9]*")
    folder.rename(tmp_path / "old")
    target = StoreScu(f"TARGET@127.0.0.1:{orthanc.port}")
    here = tmp_path / "here" / originals[0].StudyInstanceUID
    folder.symlink_to(here)
    by_link = target.store(manifest=reference)
    folder.unlink()
    # Files of the names of the copies, with the originals in them.
    names = [row.sop_instance_uid for row in load_manifest(reference).itertuples()]
    for name, original in zip(names, sorted(here.rglob("*.dcm")), strict=True):
        series = next((tmp_path / "old").rglob(f"{name}.dcm")).parent.name
        (folder / series).mkdir(parents=True, exist_ok=True)
        shutil.copy(original, folder / series / f"{name}.dcm")
    exchanged = target.store(manifest=reference)
    assert (by_link.verdict, exchanged.verdict) == ("failed", "failed")
    assert ask(orthanc, "/instances") == []


def test_a_copy_has_no_uid_of_its_original(source, originals, load_dag, tmp_path, monkeypatch):
    """Whatever `clean` was made of."""
    found = held(source, originals[0].StudyInstanceUID, tmp_path)
    deidentify = load_dag("deidentify_and_forward").get_task("deidentify").python_callable
    usual = deidentify.__globals__["clean"]

    def but_of_the_series(dataset, anonymizer):
        uid = dataset.SeriesInstanceUID
        usual(dataset, anonymizer)
        dataset.SeriesInstanceUID = uid

    monkeypatch.setitem(deidentify.__globals__, "clean", but_of_the_series)
    with pytest.raises(AirflowFailException, match="was not de-identified"):
        deidentify(found.manifest_uri, str(tmp_path / "copies"))
    assert not list((tmp_path / "copies").rglob("*.dcm"))


def names(originals) -> set[bytes]:
    """What the originals say of their patients, and all their UIDs of instances, series and studies."""
    words = {str(ds[key].value) for ds in originals for key in ("PatientName", "PatientID") if key in ds}
    words |= {ds[f"{level}InstanceUID"].value for ds in originals for level in ("Study", "Series", "SOP")}
    assert len(words) > 40
    return {word.encode() for word in words}


def instances_below(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("[0-9]*/*/*.dcm")}


def test_all_copies_arrive_and_nothing_of_the_patient_and_again_nothing(run, source, originals, orthanc, tmp_path):
    first = run()
    assert first.state == "success"
    copies = instances_below(tmp_path / "originals-deidentified")
    assert len(copies) == len(originals) == 52
    # The destination lists and holds just these.
    assert sorted(first.xcom("confirm", "summary", index)["symbols"]["="] for index in range(2)) == [12, 40]
    tags = [ask(orthanc, f"/instances/{one}/simplified-tags") for one in ask(orthanc, "/instances")]
    assert {one["SOPInstanceUID"] for one in tags} == set(copies)
    assert {one["DeidentificationMethod"] for one in tags} == {"DICOGNITO"}
    words = names(originals)
    for path in [*copies.values(), *(tmp_path / "orthanc" / "storage").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in words if word in content], path
    patients = [str(ds[key].value) for ds in originals for key in ("PatientName", "PatientID") if key in ds]
    assert not any(word in first.log for word in patients)
    # No pixel is decoded, and no transfer syntax changed.
    by_pixels = {(ds.file_meta.TransferSyntaxUID, ds.get("PixelData")) for ds in originals}
    assert {(ds.file_meta.TransferSyntaxUID, ds.get("PixelData")) for ds in map(dcmread, copies.values())} == by_pixels
    # The manifests of the second half are those of the copies: what was sent, with size and digest.
    manifest = load_manifests([first.xcom("store", map_index=index) for index in range(2)])
    assert set(manifest["sop_instance_uid"]) == set(copies)
    assert set(manifest["state"]) == {"forwarded"}
    for row in manifest.itertuples():
        copy = copies[row.sop_instance_uid]
        assert hashlib.sha256(copy.read_bytes()[-row.bytes :]).hexdigest() == row.sha256
    assert len(list((tmp_path / "originals-deidentified" / "_forwarded").rglob("store/*.parquet"))) == 2

    before = {path: path.read_bytes() for path in copies.values()}
    second = run()
    assert second.state == "success"
    assert source.sent.total() == 52
    summaries = [second.xcom("store", "summary", index) for index in range(2)]
    assert sorted((summary["completed"], summary["skipped"]) for summary in summaries) == [(12, 12), (40, 40)]
    assert {path: path.read_bytes() for path in instances_below(tmp_path / "originals-deidentified").values()} == before
    assert len(ask(orthanc, "/instances")) == 52


def test_one_instance_that_cannot_be_deidentified_keeps_all_from_going(burned_in, run, source, orthanc, tmp_path):
    ran = run()
    assert ran.state == "failed"
    assert sorted(ran.task("deidentify", index).state for index in range(2)) == ["failed", "success"]
    assert ran.task("store").state == "upstream_failed"
    assert f"Instance {burned_in} was not de-identified (ValueError)" in ran.log
    assert ask(orthanc, "/instances") == []
    assert not list((tmp_path / "originals-deidentified").rglob("*.part"))


def test_what_does_not_belong_to_the_copy_is_not_forwarded(run, source, originals, orthanc, tmp_path):
    assert run().state == "success"
    some = next(iter(instances_below(tmp_path / "originals-deidentified").values()))
    stray, half = some.with_name("1.2.3.dcm"), some.with_name(".x.part")
    for path in (stray, half):
        path.write_bytes(some.read_bytes()[:1000])
    assert run().state == "success"
    assert not stray.exists()
    assert not half.exists()


@pytest.mark.parametrize("secret", [None, "short"])
def test_without_a_secret_nothing_is_copied(run, source, orthanc, tmp_path, monkeypatch, secret):
    monkeypatch.delenv("AIRFLOW_VAR_DICOM_DEIDENTIFY_SECRET")
    if secret is not None:
        monkeypatch.setenv("AIRFLOW_VAR_DICOM_DEIDENTIFY_SECRET", secret)
    ran = run()
    assert ran.state == "failed"
    assert "The variable dicom_deidentify_secret is not set or has fewer than 32 characters." in ran.log
    assert not instances_below(tmp_path / "originals-deidentified")


def test_a_file_that_the_disk_has_no_room_for_leaves_nothing_and_the_whole_one_stays(load_dag, originals, tmp_path):
    write = load_dag("deidentify_and_forward").get_task("deidentify").python_callable.__globals__["write"]
    path = tmp_path / "originals-deidentified" / "1.2" / "1.2.3.dcm"
    write(originals[0], path)
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(originals[0], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {one: one.read_bytes() for one in path.parent.iterdir()} == {path: whole}
