"""`echo --study`: what is found out about a PACS, and what a run makes of it that is given the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu, read_manifest
from airflow_dicom_get.cli.main import main
from airflow_dicom_get.errors import InvalidOption, InvalidQuery
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving.archive import Row
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from tests.support.holdings import Holding

Embedded = Callable[..., EmbeddedPacs]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "pacs.json"


def exactness(result: Any) -> dict[str, set[str]]:
    """What is said of the instances, by transfer syntax."""
    found: dict[str, set[str]] = {}
    for row in result.manifest.to_dict("records"):
        found.setdefault(row["transfer_syntax_uid"], set()).add(row["exactness"])
    return found


EXPLICIT, IMPLICIT, DEFLATED, RLE = (
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5",
)  # fmt: skip


def probed(node: str, study: str, file: Path | None = None, **options: Any) -> dict[str, Any]:
    report = GetScu(node, **options).echo(study=study, profile=file)
    assert report.profile is not None
    return report.profile


@pytest.mark.orthanc
def test_orthanc_sends_what_it_holds(orthanc: Any, ct: Holding, tmp_path: Path, file: Path, state: Path) -> None:
    node = f"ORTHANC@127.0.0.1:{orthanc.port}"
    query = {"StudyInstanceUID": ct.study}
    profile = probed(node, ct.study, file)
    assert (profile["converts"], profile["takes_lists"]) == (False, True)
    assert profile["associations"] == 2
    assert {**json.loads(file.read_text()), "profile": None} == {**profile, "profile": None}
    result = GetScu(node, destination=tmp_path / "given", profile=file).get_study(query)
    assert result.verdict == "complete"
    assert set.union(*exactness(result).values()) == {"as_received"}
    # What is not given does not count, whatever was written before.
    assert exactness(GetScu(node, destination=tmp_path / "other").get_study(query))[EXPLICIT] == {"peer_choice"}
    assert not state.exists()


@pytest.mark.dcmtk
def test_dcmqrscp_sends_what_is_proposed_first(dcmqrscp_all: Any, ct: Holding, tmp_path: Path) -> None:
    node = f"QRALL@127.0.0.1:{dcmqrscp_all.port}"
    profile = probed(node, ct.study)
    assert (profile["converts"], profile["takes_lists"]) == (True, True)
    result = GetScu(node, destination=tmp_path / "to").get_study({"StudyInstanceUID": ct.study})
    assert "peer_choice" in set.union(*exactness(result).values())


def test_the_embedded_pacs(embedded: Embedded, ct: Holding, tmp_path: Path) -> None:
    pacs = embedded(ct.folder, omit_syntaxes=True, max_associations=3)
    profile = probed(f"PACS@127.0.0.1:{pacs.port}", ct.study, max_associations=5)
    assert profile["converts"] is False
    assert profile["takes_lists"] is True
    assert profile["counts"] is profile["tells_classes"] is True
    assert profile["tells_syntaxes"] is False
    assert profile["associations"] == 3
    assert max(pacs.sent.values()) <= 3
    assert len(pacs.sent) <= 5


def test_what_a_source_does_not_tell(embedded: Embedded, ct: Holding) -> None:
    pacs = embedded(ct.folder, omit_syntaxes=True, omit_classes=True, omit_counts=True)
    profile = probed(f"PACS@127.0.0.1:{pacs.port}", ct.study)
    assert not profile["counts"]
    assert not profile["tells_classes"]
    assert profile["converts"] is False


def test_neither_a_class_nor_a_modality_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class TellsNothing(Behaviour):
        stages = frozenset({FIND})

        def describe(self, level: str, group: Any) -> Row:
            told = {tag: x for tag, x in super().describe(level, group).items() if tag not in (0x00080016, 0x00080062)}
            return {**told, 0x00080060: "ZZ"}

    monkeypatch.setitem(MODE_CLASSES, "of_a_test", TellsNothing)
    with MisbehavingPacs("of_a_test", series=1, instances=3) as pacs:
        profile = probed(f"PACS@127.0.0.1:{pacs.port}", pacs.study_uid)
    assert (profile["tells_classes"], profile["takes_lists"]) == (False, None)


def test_lists_are_not_tried_where_they_were_refused(tmp_path: Path, file: Path) -> None:
    with MisbehavingPacs("lists_refused", series=1, instances=12) as pacs:
        node = f"PACS@127.0.0.1:{pacs.port}"
        assert probed(node, pacs.study_uid, file)["takes_lists"] is False
        before = pacs.finals
        query = {"StudyInstanceUID": pacs.study_uid, "SOPInstanceUID": pacs.uids[:5],
                 "SeriesInstanceUID": pacs.instances[0].series}  # fmt: skip
        scu = GetScu(node, destination=tmp_path / "to", profile=file)
        result = scu.get_study({"QueryRetrieveLevel": "IMAGE", **query})
        assert (result.verdict, result.completed) == ("complete", 5)
        assert pacs.finals[len(before) :] == [0] * 5  # one by one from the start, none refused


def test_a_node_that_has_changed_is_not_judged_by_its_past(
    embedded: Embedded, ct: Holding, tmp_path: Path, file: Path
) -> None:
    pacs = embedded(ct.folder, omit_syntaxes=True)
    node = f"PACS@127.0.0.1:{pacs.port}"
    probed(node, ct.study, file)
    file.write_text(file.read_text().replace('"implementation": "', '"implementation": "OLD-'))
    result = GetScu(node, destination=tmp_path / "to", profile=file).get_study({"StudyInstanceUID": ct.study})
    assert exactness(result)[EXPLICIT] == {"peer_choice"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"profile": 2}', '{"profile": 1, "converts": false}', "\0" * 100, "[" * 60_000]
)
def test_a_broken_profile_is_refused(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(InvalidOption, match=r"^profile: .* holds no profile of a node"):
        GetScu("PACS@127.0.0.1:104", profile=file)


def test_a_profile_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(InvalidOption, match=r"^profile: .* is not a readable file"):
        GetScu("PACS@127.0.0.1:104", profile=file)


@pytest.mark.parametrize(
    ("addr", "options"), [("OTHER@{}", {}), ("PACS@{}", {"calling_ae_title": "OTHER"}), ("PACS@127.0.0.1:104", {})]
)
def test_a_profile_of_another_node_is_refused(
    embedded: Embedded, ct: Holding, file: Path, addr: str, options: dict[str, Any]
) -> None:
    host = f"127.0.0.1:{embedded(ct.folder).port}"
    probed(host, ct.study, file, called_ae_title="PACS")
    with pytest.raises(InvalidOption, match=r"^profile: .* is that of 'PACS@127\.0\.0\.1:\d+' called by 'GET-SCU'"):
        GetScu(addr.format(host), profile=file, **options)
    GetScu(f"PACS@{host}", profile=file)


def test_a_profile_that_cannot_be_written_is_refused_before_traffic(ct: Holding, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidOption, match=r"^profile: "):
        GetScu("PACS@127.0.0.1:1").echo(study=ct.study, profile=tmp_path / "file" / "pacs.json")
    with pytest.raises(InvalidOption, match=r"^profile is given without a study"):
        GetScu("PACS@127.0.0.1:1").echo(profile=tmp_path / "pacs.json")


def test_a_study_that_is_not_there(embedded: Embedded, ct: Holding, file: Path) -> None:
    pacs = embedded(ct.folder)
    with pytest.raises(InvalidQuery, match=r"lists no instance of study 1\.2\.3"):
        GetScu(f"PACS@127.0.0.1:{pacs.port}").echo(study="1.2.3", profile=file)
    with pytest.raises(InvalidQuery):
        GetScu(f"PACS@127.0.0.1:{pacs.port}").echo(study="1.2.*", profile=file)
    assert not file.exists()


def test_from_the_shell(embedded: Embedded, ct: Holding, file: Path, tmp_path: Path, capsys: Any) -> None:
    pacs = embedded(ct.folder, omit_syntaxes=True)
    node = f"PACS@127.0.0.1:{pacs.port}"
    assert main(["echo", node, "--study", ct.study]) == 0
    out = capsys.readouterr().out
    assert "converts uncompressed instances: no" in out
    assert "accepts UID lists: yes" in out
    assert main(["echo", node, "--study", ct.study, "--profile", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"]["takes_lists"] is True
    to = str(tmp_path / "to")
    assert main(["get", node, "--study", ct.study, "--to", to, "--profile", str(file), "--json"]) == 0
    manifest = read_manifest(json.loads(capsys.readouterr().out)["manifest"])
    assert set(manifest["exactness"]) == {"as_received"}
    assert main(["echo", node, "--study", "no UID"]) == 2
    assert main(["get", node, "--study", ct.study, "--to", to, "--profile", to]) == 2
    assert "--profile: " in capsys.readouterr().err
    assert main(["echo", node, "--profile", str(file)]) == 2
