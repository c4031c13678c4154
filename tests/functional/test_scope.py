"""What a query means, and what of it is said to be there, at PACS with habits that no other test has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import Instance, Row
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.misbehaving.wire import Message

STUDY = archive.STUDY_UID


class _AtFind(Behaviour):
    stages = frozenset({FIND})


Start = Callable[..., tuple[GetScu, MisbehavingPacs]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a PACS of a behaviour; a client of it, and the PACS."""
    started: list[MisbehavingPacs] = []

    def make(behaviour: type[Behaviour] | str | None = None, *, series: int = 1, instances: int = 2,
             more: Sequence[Instance] = (), **options: Any) -> tuple[GetScu, MisbehavingPacs]:  # fmt: skip
        name = behaviour if isinstance(behaviour, str) or behaviour is None else "of_a_test"
        if isinstance(behaviour, type):
            monkeypatch.setitem(MODE_CLASSES, "of_a_test", behaviour)
        pacs = MisbehavingPacs(name, series=series, instances=instances, size=2000)
        pacs._site.instances.extend(more)
        started.append(pacs)
        pacs.start()
        return GetScu(f"X@127.0.0.1:{pacs.port}", destination=tmp_path / "out", **options), pacs

    yield make
    for pacs in started:
        pacs.close()
        assert pacs.faults == []


def stored(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "out").rglob("*.dcm")}


# --- the loop of rounds ------------------------------------------------------------------------------


class _Flips(_AtFind):
    """Every other list lacks its last instance."""

    lists = 0

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        type(self).lists += level == "IMAGE"
        listing = self.listing() if self.lists % 2 else self.listing()[:-1]
        return archive.find(level, query, listing, self.describe)


def test_a_list_that_never_comes_to_rest_ends_the_rounds(start: Start, tmp_path: Path) -> None:
    _Flips.lists = 0
    client, pacs = start(_Flips, instances=3, deadlines={"operation": 60})
    result = client.get_study({"StudyInstanceUID": STUDY})
    assert (result.verdict, result.reason) == ("partial", "still_growing")
    assert stored(tmp_path) == set(pacs.uids)


# --- lists that may be cut ---------------------------------------------------------------------------


class _CutsUncounted(_AtFind):
    """Cuts every answer at 100 rows, and gives no numbers of related series and instances."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return {tag: value for tag, value in row.items() if tag not in (0x00201206, 0x00201208, 0x00201209)}

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from list(super().rows(level, query))[:100]


class _IgnoresModality(_CutsUncounted):
    """Ignores Modality too; its MR series come first."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return row if level == "STUDY" else row | {0x00080060: "CT" if group[0].sop_class == archive.CT else "MR"}

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        return super().rows(level, {tag: "" if tag == 0x00080060 else value for tag, value in query.items()})


OTHER = "2.25.331000000000000000000000000000000001"


def _large() -> list[Instance]:
    """A study of 100 series MR, and then one CT."""
    made = archive.build(series=101, instances=1, size=2000, pairs=((archive.MR, wire.EXPLICIT_LE),), study=OTHER)
    return [*made[:-1], replace(made[-1], sop_class=archive.CT)]


@pytest.mark.parametrize(
    "query",
    [{"PatientID": archive.PATIENT_ID}, {"StudyInstanceUID": OTHER}, {"StudyInstanceUID": [STUDY, OTHER]}],
)
def test_a_cut_list_of_which_a_filter_leaves_nothing_is_not_forgotten(start: Start, query: dict[str, Any]) -> None:
    client, _ = start(_IgnoresModality, more=_large())
    result = client.get_study({**query, "Modality": "CT"})
    assert (result.verdict, result.reason) == ("unverified", "list_may_be_cut")
    assert {one.study_instance_uid: one.verdict for one in result.studies}[OTHER] == "unverified"


class _NoSingleInstances(_CutsUncounted):
    """Refuses a C-FIND for instances without their series."""

    def find(self, message: Message) -> None:
        query = archive.parse_identifier(message.data, self.syntax_of(message.context))
        if query.get(0x00080052) == "IMAGE" and not query.get(0x0020000E):
            self.respond(message, 0xA900)
        else:
            super().find(message)


def test_named_instances_are_held_against_the_list_of_series_where_they_cannot_be_asked_for(start: Start) -> None:
    client, pacs = start(_NoSingleInstances, series=101, instances=1)
    named = [pacs.uids[0], pacs.uids[100]]
    result = client.get_study({"StudyInstanceUID": STUDY, "SOPInstanceUID": named})
    assert (result.verdict, result.reason) == ("unverified", "list_may_be_cut")
    result = client.get_study({"StudyInstanceUID": STUDY, "SOPInstanceUID": named[:1]})
    assert (result.verdict, result.skipped) == ("complete", 1)


# --- classes that are not wanted ---------------------------------------------------------------------


class _SendsTheTwinAlone(Behaviour):
    """Tells no classes, and sends of two instances of one SOP Instance UID the second alone."""

    stages = frozenset({FIND, GET})

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        return {**super().describe(level, group), 0x00080016: "", 0x00080062: ""}

    def select(self, request: Row) -> list[Instance]:
        if request.get(0x00080052) != "IMAGE":
            return super().select(request)
        asked = request.get(0x00080018, "").split("\\")
        return [one for one in self.holdings() if one.sop in asked]

    def operate(self, retrieval: Any, instance: Instance) -> None:
        if instance == self.site.instances[0]:
            retrieval.failed.append(instance.sop)
        else:
            super().operate(retrieval, instance)


@pytest.mark.parametrize("study", [STUDY, archive.FOREIGN_STUDY_UID])
@pytest.mark.parametrize("whole_study", [True, False])
def test_an_unwanted_twin_leaves_the_instance_that_is_listed_wanted(
    start: Start, study: str, whole_study: bool
) -> None:
    client, pacs = start(_SendsTheTwinAlone, sop_classes=[archive.CT])
    first = pacs.instances[0]
    twin = replace(first, study=study, series=f"{first.series}.9", sop_class=archive.MR, modality="MR")
    pacs._site.instances.append(twin)
    series = {} if whole_study else {"SeriesInstanceUID": first.series}
    result = client.get_study({"StudyInstanceUID": STUDY, **series})
    assert (result.verdict, result.reason) == ("partial", "sub_operation_failed")
    assert (result.total, result.completed) == (2, 1)


# --- studies that are not there ----------------------------------------------------------------------


@pytest.mark.parametrize("below", [{}, {"Modality": "CT"}, {"InstanceNumber": "1"}])
def test_a_named_study_that_is_not_there_is_said_beside_a_filter_below_it(start: Start, below: dict[str, str]) -> None:
    client, _ = start()
    result = client.get_study({"StudyInstanceUID": [STUDY, "2.25.999"], **below})
    assert result.verdict == "empty"
    assert [one.verdict for one in result.studies] == ["complete", "empty"]


def test_a_study_of_which_a_filter_leaves_nothing_is_not_meant(start: Start) -> None:
    client, _ = start(_ManyModalities, more=_large()[:2])
    result = client.get_study({"StudyInstanceUID": [STUDY, OTHER], "Modality": "CT"})
    assert (result.verdict, len(result.studies)) == ("complete", 1)


class _ManyModalities(_AtFind):
    """Tells the modality of its series by their class."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        return row if level == "STUDY" else row | {0x00080060: "CT" if group[0].sop_class == archive.CT else "MR"}


# --- whose study it is -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["PatientID", "AccessionNumber", "Modality"])
def test_a_key_that_cannot_be_matched_is_refused(start: Start, tmp_path: Path, key: str) -> None:
    client, _ = start("no_find")
    with pytest.raises(InvalidQuery, match=f"does not offer C-FIND, so {key} cannot be matched"):
        client.get_study({"StudyInstanceUID": STUDY, key: "OTHER"})
    assert stored(tmp_path) == set()


def test_patient_root_carries_the_patient_id_without_c_find(start: Start, tmp_path: Path) -> None:
    client, pacs = start("no_find")
    result = client.get_study({"StudyInstanceUID": STUDY, "PatientID": archive.PATIENT_ID}, query_model="PatientRoot")
    assert result.verdict == "unverified"
    assert stored(tmp_path) == set(pacs.uids)


class _TwoPatients(Behaviour):
    """Has one Study Instance UID under two patients, and gives in Patient Root what is of the one that is asked for."""

    stages = frozenset({FIND, GET})
    asked: ClassVar[list[str | None]] = []

    def select(self, request: Row) -> list[Instance]:
        patient = request.get(0x00100020)
        self.asked.append(patient)
        return [x for x in super().select(request) if patient in (None, x.patient_id)]

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        for patient in (archive.PATIENT_ID, "ANOTHER"):
            of_patient = [x for x in self.listing() if x.patient_id == patient]
            yield from archive.find(level, query, of_patient, self.describe)


def test_a_c_get_carries_the_patient_id_that_was_asked_for(start: Start, tmp_path: Path) -> None:
    _TwoPatients.asked.clear()
    (other,) = archive.build(series=2, instances=1, size=2000, pairs=((archive.CT, wire.EXPLICIT_LE),))[1:]
    client, pacs = start(_TwoPatients, instances=1, more=[replace(other, patient_id="ANOTHER")])
    result = client.get_study({"StudyInstanceUID": STUDY, "PatientID": archive.PATIENT_ID}, query_model="PatientRoot")
    assert set(_TwoPatients.asked) == {archive.PATIENT_ID}
    assert stored(tmp_path) == {pacs.uids[0]}
    assert result.verdict == "partial", "the list by Study Root is of both patients"


# --- what a PACS sends beside what was asked for -----------------------------------------------------


class _SendsTheSeries(Behaviour):
    """Answers a C-GET for instances by the whole series."""

    stages = frozenset({GET})

    def select(self, request: Row) -> list[Instance]:
        return [x for x in self.holdings() if x.series in (request.get(0x0020000E), None)]


def test_what_a_filter_on_instances_leaves_out_is_not_stored(start: Start, tmp_path: Path) -> None:
    client, pacs = start(_SendsTheSeries, instances=4)
    result = client.get_study({"StudyInstanceUID": STUDY, "InstanceNumber": "1"})
    assert (result.verdict, result.total, result.unexpected) == ("complete", 1, 0)
    assert stored(tmp_path) == {pacs.uids[0]}


# --- numbers that nobody can hold --------------------------------------------------------------------


class _OddNumbers(_AtFind):
    """Has numbers beyond 64 bits in its rows."""

    def describe(self, level: str, group: Sequence[Instance]) -> Row:
        row = super().describe(level, group)
        counts = {0x00201206: "1e400", 0x00201208: "-99999999999999999999", 0x00201209: "1e400"}
        return row | {tag: value for tag, value in counts.items() if tag in row} | {
            0x00200011: "9" * 12 + "99999999", 0x00200013: "-" + "9" * 20,
        }  # fmt: skip


def test_numbers_beyond_64_bits_cost_no_row(start: Start, tmp_path: Path) -> None:
    client, pacs = start(_OddNumbers)
    result = client.get_study({"StudyInstanceUID": STUDY})
    assert (result.verdict, result.completed, result.errors) == ("complete", 2, [])
    assert result.manifest["series_number"].isna().all()
    (row,) = client.find({"StudyInstanceUID": STUDY})
    assert row.StudyInstanceUID == STUDY
    assert not row.NumberOfStudyRelatedSeries
    assert not row.NumberOfStudyRelatedInstances
    frame = client.find({"StudyInstanceUID": STUDY}, level="IMAGE", as_frame=True)
    assert set(frame["SOPInstanceUID"]) == set(pacs.uids)
    assert set(frame["InstanceNumber"]) == {""}


class _IgnoresTime(_AtFind):
    """Does not match on the Study Time."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        yield from super().rows(level, {tag: "" if tag == 0x00080030 else value for tag, value in query.items()})


def test_a_study_of_another_time_is_not_meant(start: Start, tmp_path: Path) -> None:
    client, pacs = start(_IgnoresTime)
    result = client.get_study({"StudyDate": archive.STUDY_DATE, "StudyTime": "200000-210000"})
    assert (result.verdict, result.reason) == ("empty", "key_not_matched")
    assert stored(tmp_path) == set()
    result = client.get_study({"StudyDate": archive.STUDY_DATE, "StudyTime": "1000-1011"})
    assert (result.verdict, stored(tmp_path)) == ("complete", set(pacs.uids))


# --- keys and UIDs of several levels -----------------------------------------------------------------


class _Hierarchical(_AtFind):
    """Refuses keys of a level above with a value, but for the unique ones (PS3.4 C.4.1.2.2.1)."""

    above: ClassVar = {"SERIES": {0x00100020, 0x00080050, 0x00080020}, "IMAGE": {0x00100020, 0x00080050, 0x00080060}}

    def find(self, message: Message) -> None:
        query = archive.parse_identifier(message.data, self.syntax_of(message.context))
        if any(query.get(tag) for tag in self.above.get(query[0x00080052], ())):
            self.respond(message, 0xA900)
        else:
            super().find(message)


def test_a_key_is_matched_at_its_own_level(start: Start) -> None:
    client, pacs = start(_Hierarchical, series=2, instances=2)
    series = sorted({x.series for x in pacs.instances if x.study == STUDY})
    for query in ({"PatientID": archive.PATIENT_ID}, {"AccessionNumber": "HOSTILE-ACC"}):
        assert {row.SeriesInstanceUID for row in client.find(query, level="SERIES")} == set(series)
        assert {row.SOPInstanceUID for row in client.find(query, level="IMAGE")} == set(pacs.uids)
        named = client.find({**query, "SeriesInstanceUID": series[0]}, level="IMAGE")
        assert {row.SeriesInstanceUID for row in named} == {series[0]}
        assert len(named) == 2
        assert client.find({**query, "Modality": "XA"}, level="IMAGE") == []
    assert client.find({"PatientID": "NOBODY", "SeriesInstanceUID": series[0]}, level="SERIES") == []


@pytest.mark.parametrize("level", ["SeriesInstanceUID", "SOPInstanceUID"])
def test_of_a_patients_studies_those_without_what_is_named_are_not_meant(start: Start, level: str) -> None:
    others = archive.build(series=1, instances=2, size=2000, pairs=((archive.MR, wire.EXPLICIT_LE),), study=OTHER)
    client, pacs = start(more=others)
    uid = pacs.instances[0].series if level == "SeriesInstanceUID" else pacs.uids[0]
    query = {"PatientID": archive.PATIENT_ID, level: uid}
    assert len(client.plan({"PatientID": archive.PATIENT_ID}).studies) > 1
    plan = client.plan(query)
    assert (plan.unknown, plan.errors) == ([], [])
    result = client.get_study(query)
    assert (result.verdict, [one.study_instance_uid for one in result.studies]) == ("complete", [STUDY])


@pytest.mark.parametrize("beside", [{"StudyInstanceUID": STUDY}, {"PatientID": archive.PATIENT_ID}, {}])
def test_a_named_uid_that_the_pacs_does_not_know_is_said(start: Start, beside: dict[str, str]) -> None:
    client, pacs = start(series=2)
    series = pacs.instances[0].series
    for key, uid in (("SeriesInstanceUID", series), ("SOPInstanceUID", pacs.uids[0])):
        if key == "SOPInstanceUID" and beside:
            beside = {**beside, "SeriesInstanceUID": series}
        query = {**beside, key: [uid, "1.2.3"]}
        plan = client.plan(query)
        assert plan.unknown == ["1.2.3"]
        assert "1.2.3" in plan.errors[0]["error"]
        result = client.get_study(query)
        assert (result.verdict, result.reason, result.exit_code) == ("empty", "not_found", 5)
        assert result.completed == result.total > 0
        assert "1.2.3" in " ".join(error["error"] for error in result.errors)
        assert client.get_study({**beside, key: uid}).verdict == "complete"
    nothing = client.get_study({"StudyInstanceUID": STUDY, "SeriesInstanceUID": "1.2.3"})
    assert (nothing.verdict, nothing.reason, nothing.total) == ("empty", "not_found", 0)


@pytest.mark.parametrize("model", ["StudyRoot", "PatientRoot"])
@pytest.mark.parametrize("beside", [{}, {"PatientID": archive.PATIENT_ID}, {"ModalitiesInStudy": "CT"}])
def test_a_named_study_that_is_not_there_is_said_beside_any_key(
    start: Start, beside: dict[str, str], model: str
) -> None:
    client, _ = start()
    query = {**beside, "StudyInstanceUID": [STUDY, "1.2.3"]}
    plan = client.plan(query, query_model=model)
    assert plan.unknown == ["1.2.3"]
    result = client.get_study(query, query_model=model)
    assert (result.verdict, result.reason, result.exit_code) == ("empty", "not_found", 5)
    assert result.completed == result.total > 0
    assert "1.2.3" in " ".join(error["error"] for error in result.errors)


@pytest.mark.parametrize(
    ("key", "value", "left_out"),
    [("ModalitiesInStudy", "CT", True), ("AccessionNumber", archive.ACCESSION, True),
     ("PatientID", archive.PATIENT_ID, False)],
)  # fmt: skip
def test_a_filter_leaves_a_study_out_and_the_patient_id_says_whose_it_is(
    start: Start, key: str, value: str, left_out: bool
) -> None:
    built = archive.build(series=1, instances=2, size=2000, pairs=((archive.MR, wire.EXPLICIT_LE),), study=OTHER)
    others = [replace(x, modality="MR", accession="OTHER-1", patient_id="OTHER") for x in built]
    client, _ = start(more=others)
    query = {"StudyInstanceUID": [STUDY, OTHER], key: value}
    assert client.plan(query).unknown == ([] if left_out else [OTHER])
    result = client.get_study(query)
    assert result.verdict == ("complete" if left_out else "empty")
    assert [one.study_instance_uid for one in result.studies] == [STUDY], "nothing of another patient is fetched"
    assert (result.manifest["study_instance_uid"] == STUDY).all()


class _RefusesOneAlone(_AtFind):
    """Fails where a study is asked for by its UID alone, or in a list of UIDs with others."""

    def find(self, message: Message) -> None:
        query = archive.parse_identifier(message.data, self.syntax_of(message.context))
        if OTHER in (query.get(0x0020000D) or "").split("\\") and not query.get(0x00080061):
            self.respond(message, 0xC001)
        else:
            super().find(message)


def test_a_study_for_which_a_c_find_fails_is_not_said_to_be_absent(start: Start) -> None:
    built = archive.build(series=1, instances=2, size=2000, pairs=((archive.MR, wire.EXPLICIT_LE),), study=OTHER)
    client, _ = start(_RefusesOneAlone, more=[replace(x, modality="MR") for x in built])
    query = {"StudyInstanceUID": [STUDY, OTHER], "ModalitiesInStudy": "CT"}
    result = client.get_study(query)
    assert (result.verdict, result.errors, len(result.studies)) == ("complete", [], 1)
    assert client.plan({**query, "StudyInstanceUID": [STUDY, OTHER, "1.2.3"]}).unknown == ["1.2.3"]


def test_a_named_series_or_instance_that_is_not_there_is_said_beside_a_filter(start: Start) -> None:
    client, pacs = start(series=2)
    mine = [x for x in pacs.instances if x.study == STUDY]
    series = sorted({x.series for x in mine})
    rows = client.find({"StudyInstanceUID": STUDY}, level="SERIES")
    number = {row.SeriesInstanceUID: str(row.SeriesNumber) for row in rows}[series[0]]
    in_series, elsewhere = (next(x.sop for x in mine if x.series == one) for one in series)
    for named, there in (
        ({"SeriesInstanceUID": [*series, "1.2.3"]}, {"SeriesInstanceUID": series}),
        ({"SOPInstanceUID": [in_series, elsewhere, "1.2.3"]}, {"SOPInstanceUID": [in_series, elsewhere]}),
    ):
        query = {"StudyInstanceUID": STUDY, "SeriesNumber": number}
        assert client.plan({**query, **named}).unknown == ["1.2.3"]
        result = client.get_study({**query, **named})
        assert (result.verdict, result.reason) == ("empty", "not_found")
        result = client.get_study({**query, **there})
        assert (result.verdict, result.errors) == ("complete", [])


def test_what_a_filter_leaves_out_is_known(start: Start) -> None:
    client, pacs = start(series=2)
    series = sorted({x.series for x in pacs.instances if x.study == STUDY})
    rows = client.find({"StudyInstanceUID": STUDY}, level="SERIES")
    number = {row.SeriesInstanceUID: row.SeriesNumber for row in rows}[series[0]]
    query = {"StudyInstanceUID": STUDY, "SeriesInstanceUID": series, "SeriesNumber": str(number)}
    result = client.get_study(query)
    assert (result.verdict, result.errors) == ("complete", [])


class _CutAboveInstances(_ManyModalities):
    """Lists no more than the first series of a study."""

    def rows(self, level: str, query: Row) -> Iterator[Row]:
        rows = list(super().rows(level, query))
        yield from rows[:1] if level == "SERIES" and not query.get(0x0020000E) else rows


@pytest.mark.parametrize("behaviour", [_ManyModalities, _CutAboveInstances])
@pytest.mark.parametrize("also_series", [False, True])
def test_a_named_instance_is_of_the_scope_where_its_series_is(
    start: Start, tmp_path: Path, behaviour: type[Behaviour], also_series: bool
) -> None:
    ct = archive.build(series=2, instances=1, size=2000, pairs=((archive.CT, wire.EXPLICIT_LE),), study=OTHER)
    (mr,) = archive.build(series=3, instances=1, size=2000, pairs=((archive.MR, wire.EXPLICIT_LE),), study=OTHER)[2:]
    client, _ = start(behaviour, more=[*ct, mr])
    query = {"StudyInstanceUID": OTHER, "Modality": "CT", "SOPInstanceUID": [x.sop for x in (*ct, mr)]}
    if also_series:
        query["SeriesInstanceUID"] = [x.series for x in (*ct, mr)]
    result = client.get_study(query)
    assert (result.verdict, result.total, result.errors) == ("complete", 2, [])
    assert stored(tmp_path) == {x.sop for x in ct}
    result = client.get_study({**query, "SOPInstanceUID": mr.sop})
    assert (result.verdict, result.total) == ("empty", 0)
    assert stored(tmp_path) == {x.sop for x in ct}


class _AloneItFails(_AtFind):
    """Fails, as a case says, where what is named is asked for without the filter, and for the series not meant."""

    how: ClassVar[str] = ""
    not_meant: ClassVar[str] = ""
    asked: ClassVar[list[str]] = []

    def find(self, message: Message) -> None:
        query = archive.parse_identifier(message.data, self.syntax_of(message.context))
        level = query[0x00080052]
        self.asked.append(level)
        alone = level == "IMAGE" and query.get(0x00080018) and not query.get(0x00200013)
        of_other = level == "IMAGE" and self.not_meant and query.get(0x0020000E) == self.not_meant
        if of_other or (alone and self.how == "refuses"):
            self.respond(message, 0xC001)
        elif alone and self.how == "busy":
            self.respond(message, 0xA700)
        elif alone and self.how == "closes":
            self.link.send(wire.abort())
        elif alone and self.how == "silent":
            self.respond(message, 0x0000)
        else:
            super().find(message)


@pytest.mark.parametrize("how", ["", "refuses", "busy", "closes", "silent"])
def test_to_say_what_is_not_there_never_costs_the_list(start: Start, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(_AloneItFails, "how", "")
    monkeypatch.setattr(_AloneItFails, "not_meant", "")
    client, pacs = start(_AloneItFails, series=2, instances=3)
    mine = [x for x in pacs.instances if x.study == STUDY]
    series = sorted({x.series for x in mine})
    rows = client.find({"StudyInstanceUID": STUDY}, level="SERIES")
    number = {row.SeriesInstanceUID: str(row.SeriesNumber) for row in rows}[series[0]]
    monkeypatch.setattr(_AloneItFails, "how", how)
    monkeypatch.setattr(_AloneItFails, "not_meant", series[1])
    query = {"StudyInstanceUID": STUDY, "SeriesNumber": number, "InstanceNumber": "1"}
    named = [x.sop for x in mine if x.series == series[0]]
    _AloneItFails.asked.clear()
    result = client.get_study({**query, "SOPInstanceUID": named})
    assert (result.verdict, result.completed, result.errors) == ("complete", 1, [])
    assert _AloneItFails.asked.count("IMAGE") <= 2 * 3 + 4, "what is known to be left out is not asked for again"
    result = client.get_study({**query, "SOPInstanceUID": [*named, "1.2.3"]})
    assert (result.verdict, result.completed) == ("complete" if how else "empty", 1)
