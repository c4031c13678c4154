"""Lists that are cut, lists that only look so, and rows that cannot be asked for, over sockets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get import GetScu
from airflow_dicom_get.engine.study_list import FoundList, ListedStudy
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.testing.misbehave import MisbehavingPacs
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import CT, crowd
from airflow_dicom_get.testing.misbehaving.behaviour import FIND, GET, MODE_CLASSES, Behaviour
from airflow_dicom_get.testing.misbehaving.modes_list import (
    FindCutNothingCounted,
    FindCutUncounted,
    FindIgnoresKeysOfMany,
    FindPrefix,
)
from airflow_dicom_get.testing.misbehaving.wire import EXPLICIT_LE, GoneError
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import big_study
from airflow_dicom_get.testing.servers import HOST, Dcmqrscp, Orthanc
from airflow_dicom_get.verify import verify
from tests.support.holdings import hold

Embedded = Callable[..., EmbeddedPacs]


@pytest.fixture(autouse=True)
def counts_its_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that cuts lists, and counts in a C-GET only what it has a context for."""

    class CountsItsContexts(FindCutUncounted):
        stages = frozenset({FIND, GET})

        def select(self, request: Any) -> Any:
            return [one for one in super().select(request) if self.context_for(one) is not None]

    monkeypatch.setitem(MODE_CLASSES, "counts_its_contexts", CountsItsContexts)


@pytest.fixture(autouse=True)
def brings_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes that cut lists, and bring what is behind the cut in a way that is refused at its command."""

    class WithoutDataSet(FindCutNothingCounted):
        def operate(self, retrieval: Any, instance: Any) -> None:
            if instance is not self.site.instances[-1]:
                return super().operate(retrieval, instance)
            fields = self.store_fields(retrieval, instance) | {wire.DATA_SET_TYPE: wire.NO_DATA_SET}
            self.link.send_command(retrieval.message.context, fields)
            self.await_response(retrieval)
            retrieval.completed += 1

    class OnTheContextOfTheGet(FindCutNothingCounted):
        def operate(self, retrieval: Any, instance: Any) -> None:
            if instance is not self.site.instances[-1]:
                return super().operate(retrieval, instance)
            context = retrieval.message.context
            self.store_command(retrieval, instance, context)
            self.send_dataset(context, instance.pieces())
            self.await_response(retrieval)
            retrieval.completed += 1

    class BesideTheList(FindCutUncounted):
        """Counts what it lists, and sends one beside it."""

        stages = frozenset({FIND, GET})

        def holdings(self) -> Any:
            return self.site.instances[:100]

        def bring(self, retrieval: Any, instance: Any, context: int) -> None:
            self.store(retrieval, instance, context)

        def before(self, retrieval: Any) -> None:
            beside = self.site.instances[-1]
            context = self.context_for(beside)
            assert context is not None
            self.bring(retrieval, beside, context)
            self.await_response(retrieval)

    class BesideTheListBroken(BesideTheList):
        def bring(self, retrieval: Any, instance: Any, context: int) -> None:
            self.store_command(retrieval, instance, context)
            self.send_dataset(context, iter([b"\x01nothing that can be read" * 10]))

    class BesideTheListEmpty(BesideTheList):
        def bring(self, retrieval: Any, instance: Any, context: int) -> None:
            fields = self.store_fields(retrieval, instance) | {wire.DATA_SET_TYPE: wire.NO_DATA_SET}
            self.link.send_command(context, fields)

    monkeypatch.setitem(MODE_CLASSES, "brings_one_beside_its_list", BesideTheList)
    monkeypatch.setitem(MODE_CLASSES, "brings_one_beside_its_list_broken", BesideTheListBroken)
    monkeypatch.setitem(MODE_CLASSES, "brings_one_beside_its_list_empty", BesideTheListEmpty)
    monkeypatch.setitem(MODE_CLASSES, "brings_one_without_a_data_set", WithoutDataSet)
    monkeypatch.setitem(MODE_CLASSES, "brings_one_on_the_context_of_the_get", OnTheContextOfTheGet)


@pytest.fixture
def scu(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes clients of a PACS in a mode; the PACS is ``client.pacs``."""
    started: list[MisbehavingPacs] = []

    def make(mode: str | None = None, *, pacs: MisbehavingPacs | None = None, of: dict[str, Any] | None = None,
             **options: Any) -> Any:  # fmt: skip
        if pacs is None:
            pacs = MisbehavingPacs(mode, **{"size": 600, **(of or {})})
            started.append(pacs)
            pacs.start()
        client: Any = GetScu(f"X@{HOST}:{pacs.port}", destination=tmp_path / "out", **options)
        client.pacs, client.study = pacs, {"StudyInstanceUID": pacs.study_uid}
        return client

    yield make
    for pacs in started:
        pacs.close()
        assert pacs.faults == []


def stored(folder: Path) -> int:
    return len(list((folder / "out").rglob("*.dcm")))


class TestImages:
    @pytest.mark.parametrize(("cap", "held"), [(100, 103), (250, 253), (256, 260)])
    @pytest.mark.parametrize("associations", [1, 2])
    def test_a_cut_list_is_never_complete(
        self, scu: Any, tmp_path: Path, cap: int, held: int, associations: int
    ) -> None:
        of = {"series": 1, "instances": held, "param": cap}
        client = scu("find_cut_uncounted", of=of, associations=associations)
        result = client.get_study(client.study)
        assert (result.verdict, result.reason) == ("unverified", "list_contradicted")
        assert (result.total, result.unexpected) == (cap, held - cap)
        assert stored(tmp_path) == held
        assert client.get_study(client.study).verdict == "unverified"
        assert stored(tmp_path) == held

    def test_what_is_held_is_not_fetched_again_to_see_it_once_more(self, scu: Any) -> None:
        client = scu("find_cut_uncounted", of={"series": 1, "instances": 103})
        client.get_study(client.study)
        before = client.pacs.sent.total()
        result = client.get_study(client.study)
        assert (result.verdict, result.reason) == ("unverified", "list_may_be_cut")
        assert client.pacs.sent.total() - before <= 2, "the counters tell that all 103 are held"

    @pytest.mark.parametrize("instances", [150, 256])
    @pytest.mark.parametrize("associations", [1, 2])
    def test_an_honest_list_costs_one_message(self, scu: Any, instances: int, associations: int) -> None:
        client = scu("no_counts", of={"series": 1, "instances": instances}, associations=associations)
        first = client.get_study(client.study)
        assert (first.verdict, first.completed) == ("complete", instances)
        fetched = client.pacs.sent.total()
        assert fetched <= instances + 2, "what the fetch has counted is older than the second list"
        result = client.get_study(client.study)
        assert (result.verdict, result.skipped) == ("complete", instances)
        assert client.pacs.sent.total() - fetched <= 2
        assert 0 < result.bytes < 3 * 1000

    def test_without_counters_the_series_comes_once_more_and_is_counted(self, scu: Any, tmp_path: Path) -> None:
        client = scu("nothing_counted", of={"series": 1, "instances": 100})
        assert client.get_study(client.study).verdict == "complete"
        assert 200 <= client.pacs.sent.total() <= 202, "what came before the second list says nothing of it"
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.dcm")}
        result = client.get_study(client.study)
        assert (result.verdict, result.skipped, result.conflicts) == ("complete", 100, 0)
        assert result.bytes >= 100 * 600
        assert {path: path.stat().st_mtime_ns for path in files} == files

    def test_a_cut_list_without_any_counters(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_cut_nothing_counted", of={"series": 1, "instances": 103})
        for _ in range(2):
            result = client.get_study(client.study)
            assert result.verdict == "unverified"
            assert stored(tmp_path) == 103

    @pytest.mark.parametrize("mode", ["brings_one_without_a_data_set", "brings_one_on_the_context_of_the_get"])
    def test_what_is_refused_before_it_is_read_was_sent_too(self, scu: Any, mode: str) -> None:
        client = scu(mode, of={"series": 1, "instances": 101})
        for _ in range(2):
            result = client.get_study(client.study)
            assert (result.verdict, result.reason, result.completed) == ("unverified", "list_contradicted", 100)

    @pytest.mark.parametrize("how", ["", "_broken", "_empty"])
    def test_what_is_sent_beside_a_list_that_may_be_cut_denies_it(self, scu: Any, how: str) -> None:
        """Whether it can be read, or only its command tells what it is; and where a C-GET was made to count."""
        client = scu(f"brings_one_beside_its_list{how}", of={"series": 1, "instances": 101})
        for _ in range(2):
            result = client.get_study(client.study)
            assert (result.verdict, result.reason) == ("unverified", "list_contradicted")
        found = client.plan(client.study)
        assert found.doubt == "list_may_be_cut"

    def test_a_longer_list_of_the_run_shows_that_there_is_no_cap(self, embedded: Embedded, tmp_path: Path) -> None:
        (tmp_path / "pacs").mkdir()
        studies = []
        for number in (101, 100):
            studies.append(big_study(tmp_path / str(number), number, 600, name=f"of{number}", series=1))
            for path in (tmp_path / str(number)).iterdir():
                path.rename(tmp_path / "pacs" / f"{number}-{path.name}")
        pacs = embedded(tmp_path / "pacs", omit_counts=True)
        client = GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "out")
        assert client.get_study({"StudyInstanceUID": studies}).verdict == "complete"
        result = client.get_study({"StudyInstanceUID": studies})
        assert (result.verdict, result.skipped, result.bytes) == ("complete", 201, 0)

    def test_what_is_behind_the_cut_is_of_a_class_that_is_not_listed(self, scu: Any, tmp_path: Path) -> None:
        """A PACS that counts only what it has a context for is offered contexts for other classes, too."""
        dose = "1.2.840.10008.5.1.4.1.1.88.67"
        of = {"series": 1, "instances": 103, "pairs": [(CT, EXPLICIT_LE)] * 100 + [(dose, EXPLICIT_LE)] * 3}
        client = scu("counts_its_contexts", of=of)
        result = client.get_study(client.study)
        assert (result.verdict, result.unexpected) == ("unverified", 3)
        assert stored(tmp_path) == 103

    def test_list_limit_says_what_an_admin_knows(self, scu: Any) -> None:
        of = {"series": 1, "instances": 103}
        client = scu("find_cut_uncounted", of=of, list_limit="100")
        assert client.get_study(client.study).verdict == "unverified"
        client = scu("nothing_counted", of={"series": 1, "instances": 100}, list_limit=0)
        client.get_study(client.study)
        assert client.get_study(client.study).bytes == 0

    @pytest.mark.parametrize("associations", [1, 2])
    def test_a_listed_series_without_instances(self, scu: Any, associations: int) -> None:
        client = scu("find_no_images", of={"series": 3, "instances": 4}, associations=associations)
        result = client.get_study(client.study)
        assert (result.verdict, result.reason, result.completed) == ("unverified", "list_contradicted", 8)
        assert client.plan(client.study).doubt == "list_contradicted"


class TestSeries:
    def test_a_cut_list(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_cut_uncounted", of={"series": 103, "instances": 1})
        result = client.get_study(client.study)
        assert (result.verdict, result.total) == ("unverified", 100)
        assert stored(tmp_path) == 103
        again = client.get_study(client.study)
        assert (again.verdict, again.reason) == ("unverified", "list_may_be_cut")

    def test_an_honest_list_costs_one_message(self, scu: Any) -> None:
        client = scu("no_counts", of={"series": 100, "instances": 2})
        assert client.get_study(client.study).verdict == "complete"
        before = client.pacs.sent.total()
        result = client.get_study(client.study)
        assert (result.verdict, result.skipped) == ("complete", 200)
        assert client.pacs.sent.total() - before <= 2

    def test_many_round_series_cost_one_message(self, scu: Any) -> None:
        client = scu("no_counts", of={"series": 5, "instances": 100})
        client.get_study(client.study)
        before, gets = client.pacs.sent.total(), len(client.pacs.finals)
        assert client.get_study(client.study).verdict == "complete"
        assert client.pacs.sent.total() - before <= 2
        assert len(client.pacs.finals) - gets == 1

    def test_named_series_are_held_against_what_was_named(self, scu: Any) -> None:
        client = scu("no_counts", of={"series": 103, "instances": 1})
        series = sorted({x.series for x in client.pacs.instances})[:100]
        result = client.get_study({**client.study, "SeriesInstanceUID": series})
        assert (result.verdict, result.completed) == ("complete", 100)
        assert client.pacs.sent.total() == 100

    def test_named_instances_that_a_cut_list_lacks_are_asked_for_one_by_one(self, scu: Any) -> None:
        client = scu("find_cut_uncounted", of={"series": 1, "instances": 103})
        last = client.pacs.instances[-2:]
        query = {**client.study, "SeriesInstanceUID": last[0].series, "SOPInstanceUID": [x.sop for x in last]}
        result = client.get_study(query)
        assert (result.verdict, result.completed) == ("complete", 2)


class TestStudies:
    DAY = {"StudyDate": "20240131"}  # noqa: RUF012

    def test_what_only_a_part_lists_is_taken_too(self, scu: Any, tmp_path: Path) -> None:
        client = scu("studies_cut", of={"series": 1, "instances": 1}, max_studies=200)
        assert len(client.find(self.DAY)) == 103
        assert not client.find(self.DAY).cut
        result = client.get_study(self.DAY)
        assert (result.verdict, len(result.studies)) == ("complete", 103)
        assert stored(tmp_path) == 103
        with pytest.raises(InvalidQuery, match="matches 103 studies"):
            scu("studies_cut", of={"series": 1, "instances": 1}).get_study(self.DAY)

    def test_studies_of_one_moment_are_not_confirmed(self, scu: Any, caplog: pytest.LogCaptureFixture) -> None:
        client = scu("studies_cut_alike", of={"series": 1, "instances": 1})
        rows = client.find(self.DAY)
        assert (len(rows), rows.cut, rows.doubt) == (100, True, "list_may_be_cut")
        assert "just as many rows as a PACS may cut it at" in caplog.text
        assert client.plan(self.DAY).doubt == "list_may_be_cut"
        result = client.get_study(self.DAY)
        assert (result.verdict, result.reason, result.completed) == ("unverified", "list_may_be_cut", 100)
        assert {study.verdict for study in result.studies} == {"complete"}
        assert "list_limit" in result.errors[0]["hint"]

    def test_without_parts(self, scu: Any) -> None:
        client = scu("studies_cut", of={"series": 1, "instances": 1})
        rows = client.find(self.DAY, split_on_truncation=False)
        assert (len(rows), rows.cut, rows.queries) == (100, True, 1)

    def test_named_studies_are_asked_for_one_by_one(self, scu: Any) -> None:
        client = scu("studies_cut", of={"series": 1, "instances": 1, "param": 260}, max_studies=1)
        every = [row.StudyInstanceUID for row in client.find(self.DAY)]
        assert len(every) == 260
        named = client.find({"StudyInstanceUID": every})
        assert (len(named), named.cut) == (260, False)

    def test_rows_with_malformed_study_uids(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_hostile_studies")
        result = client.get_study(self.DAY)
        assert (result.verdict, result.completed, result.total) == ("failed", 8, 10)
        rows = result.manifest[result.manifest["state"] == "missing"]
        assert list(rows["reason"]) == ["bad_uid", "bad_uid"]
        assert rows["series_instance_uid"].isna().all()
        assert rows["sop_instance_uid"].isna().all()
        assert sorted(rows["study_instance_uid"].fillna("")) == ["", "../../PWNED"]
        assert {path.name for path in tmp_path.iterdir()} == {"out"}

    def test_a_list_of_studies_at_a_pacs_that_ignores_the_key(self, scu: Any, caplog: pytest.LogCaptureFixture) -> None:
        client = scu("find_ignores_keys_of_many", of={"series": 1, "instances": 1})
        wanted = ["CROWD-3", "HOSTILE-ACC", "CROWD-1400", "CROWD-7", "NOWHERE"]
        listed = [ListedStudy(line, "AccessionNumber", value) for line, value in enumerate(wanted, 2)]
        with caplog.at_level(logging.INFO):
            found = client.find_listed(listed)
        assert [len(entry.uids) for entry in found.entries] == [1, 1, 1, 1, 0]
        assert found.entries[1].uids == (client.pacs.study_uid,)
        ignored = sum(remark["count"] for remark in found.remarks)
        assert 1500 + 4 * 1000 <= ignored < 1500 + 4 * 1100, "one whole answer, and the beginning of each other"

    def find_crowd(self, client: Any, *wanted: str) -> FoundList:
        return client.find_listed([ListedStudy(n, "AccessionNumber", value) for n, value in enumerate(wanted, 2)])

    def test_an_answer_that_broke_off_does_not_stand_for_others(
        self, scu: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = []

        class BreaksOffOnce(FindIgnoresKeysOfMany):
            def rows(self, level: str, query: Any) -> Iterator[Any]:
                answers.append(level)
                yield from islice(super().rows(level, query), 1200 if len(answers) == 1 else None)
                if len(answers) == 1:
                    raise GoneError("in the middle of an answer")

        monkeypatch.setitem(MODE_CLASSES, "breaks_off_once", BreaksOffOnce)
        client = scu("breaks_off_once", of={"series": 1, "instances": 1})
        found = self.find_crowd(client, "HOSTILE-ACC", "CROWD-1400")
        assert [(len(entry.uids), entry.problem) for entry in found.entries] == [(1, ""), (1, "")]
        assert len(answers) == 3

    @pytest.mark.parametrize("character_set", ["ISO_IR 100", "ISO_IR 192"])
    def test_what_stands_in_an_answer_to_another_entry(
        self, scu: Any, monkeypatch: pytest.MonkeyPatch, character_set: str
    ) -> None:
        """It is compared, and found wanting, as in an answer of its own."""
        encoding = {"ISO_IR 100": "latin-1", "ISO_IR 192": "utf-8"}[character_set]

        class Written(FindIgnoresKeysOfMany):
            def rows(self, level: str, query: Any) -> Iterator[Any]:
                for row in super().rows(level, query):
                    changed = row | {0x00080005: character_set}
                    if row[0x00080050] == "CROWD-1400":
                        changed[0x00080050] = "Ä-1".encode(encoding).decode("latin-1")
                    if row[0x00080050] == "CROWD-1401":
                        changed[0x0020000D] = "../1"
                    yield changed

        monkeypatch.setitem(MODE_CLASSES, "written", Written)
        client = scu("written", of={"series": 1, "instances": 1})
        found = self.find_crowd(client, "CROWD-1", "Ä-1", "CROWD-1401")
        assert [len(entry.uids) for entry in found.entries] == [1, 1, 0]
        assert (found.doubt, "malformed" in found.entries[2].problem) == ("bad_uid", True)

    def test_a_pacs_that_takes_numbers_as_prefixes_answers_each_on_its_own(
        self, scu: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class FindPrefixOfMany(FindPrefix):
            def listing(self) -> Any:
                return [*self.site.instances, *reversed(crowd(3000, 600))]

        monkeypatch.setitem(MODE_CLASSES, "find_prefix_of_many", FindPrefixOfMany)
        client = scu("find_prefix_of_many", of={"series": 1, "instances": 1})
        found = self.find_crowd(client, "CROWD-1", "CROWD-2")
        assert [len(entry.uids) for entry in found.entries] == [1, 1]


class TestFoundSeries:
    """C-FIND for the series of a study, held against what is said of the study."""

    @pytest.fixture(autouse=True)
    def modes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class OmitsASeries(Behaviour):
            stages = frozenset({FIND})
            left_out: tuple[int, ...] = ()

            def rows(self, level: str, query: Any) -> Iterator[Any]:
                rows = list(super().rows(level, query))
                for row in rows[:-1] if (level, self.param) == ("SERIES", "omitted") else rows:
                    yield {tag: value for tag, value in row.items() if tag not in self.left_out}

        class OfInstances(OmitsASeries):
            left_out = (0x00201206,)

        class OfSeries(OmitsASeries):
            left_out = (0x00201208,)

        class Refused(OmitsASeries):
            def find(self, message: Any) -> None:
                if archive.parse_identifier(message.data, self.syntax_of(message.context))[0x00080052] == "STUDY":
                    return self.respond(message, 0xC001)
                super().find(message)

        for name, behaviour in {"both": OmitsASeries, "instances": OfInstances, "series": OfSeries}.items():
            monkeypatch.setitem(MODE_CLASSES, f"counts_{name}", behaviour)
        monkeypatch.setitem(MODE_CLASSES, "refuses_studies", Refused)

    @pytest.mark.parametrize("counts", ["both", "instances", "series"])
    @pytest.mark.parametrize("several", [False, True])
    def test_a_series_that_is_not_listed(self, scu: Any, counts: str, several: bool) -> None:
        def found(param: str) -> Any:
            client = scu(f"counts_{counts}", of={"series": 4, "instances": 2, "param": param})
            uids = [client.pacs.study_uid, *(["1.2.3"] if several else [])]
            return client.find({"StudyInstanceUID": uids}, level="SERIES")

        rows = found("omitted")
        assert (len(rows), rows.doubt, rows.cut) == (3, "list_contradicted", True)
        rows = found("whole")
        assert (len(rows), rows.doubt, rows.cut) == (4, None, False)

    def test_a_round_number_of_series_that_the_study_has(self, scu: Any) -> None:
        client = scu(of={"series": 100, "instances": 1})
        assert not client.find(client.study, level="SERIES").cut
        client = scu("no_counts", of={"series": 100, "instances": 1})
        assert client.find(client.study, level="SERIES").doubt == "list_may_be_cut"

    def test_a_filter_is_held_against_no_count(self, scu: Any) -> None:
        client = scu(of={"series": 4})
        (row, *_) = client.find(client.study, level="SERIES")
        for key in ({"SeriesNumber": row.SeriesNumber}, {"SeriesInstanceUID": row.SeriesInstanceUID}):
            rows = client.find({**client.study, **key}, level="SERIES")
            assert (len(rows), rows.cut) == (1, False)

    def test_a_study_that_is_not_told_of(self, scu: Any) -> None:
        client = scu("refuses_studies", of={"series": 4})
        assert not client.find(client.study, level="SERIES").cut


class TestMalformed:
    def test_rows_of_series_and_instances(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_hostile_rows")
        result = client.get_study(client.study)
        # In each series, and for the study: a path, an empty one, control characters, and one that is too long.
        assert (result.verdict, result.reason) == ("partial", "bad_uid")
        assert (result.total, result.completed, result.failed) == (8 + 4 + 2 * 4, 8, 12)
        rows = result.manifest
        bad = rows[rows["reason"] == "bad_uid"]
        assert set(bad["state"]) == {"missing"}
        assert bad["study_instance_uid"].eq(client.pacs.study_uid).all()
        texts = set(bad["sop_instance_uid"].dropna()) | set(bad["series_instance_uid"].dropna())
        assert "../../PWNED" in texts
        assert "1.2\\n\\x1b[31mFAKELOGLINE" in texts
        assert max(map(len, texts)) == 64
        assert not result.transient
        assert client.plan(client.study).missing == 12

    def test_an_instance_that_left_the_list_and_comes_when_it_is_asked_for(self, scu: Any) -> None:
        client = scu("list_forgets", of={"series": 1})
        result = client.get_study(client.study)
        assert (result.verdict, result.reason, result.unexpected) == ("unverified", "list_contradicted", 1)


class TestVerify:
    def compare(self, client: Any, tmp_path: Path) -> Any:
        node = f"X@{HOST}:{client.pacs.port}"
        return verify(study=client.pacs.study_uid, destination=tmp_path / "out", addr=node)

    def test_an_honest_round_list(self, scu: Any, tmp_path: Path) -> None:
        client = scu("no_counts", of={"series": 1, "instances": 150})
        client.get_study(client.study)
        before = client.pacs.sent.total()
        found = self.compare(client, tmp_path)
        assert (found.exit_code, found.uncompared) == (0, None)
        assert client.pacs.sent.total() - before <= 2

    def test_a_cut_list(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_cut_uncounted", of={"series": 1, "instances": 103})
        client.get_study(client.study)
        unlisted = {x.sop for x in client.pacs.instances[100:]}
        for path in [path for path in (tmp_path / "out").rglob("*.dcm") if path.stem in unlisted]:
            path.unlink()
        found = self.compare(client, tmp_path)
        assert (found.exit_code, found.differences) == (4, [])
        assert "list_may_be_cut" in found.uncompared

    def test_a_listed_series_without_instances(self, scu: Any, tmp_path: Path) -> None:
        client = scu("find_no_images")
        client.get_study(client.study)
        found = self.compare(client, tmp_path)
        assert (found.exit_code, found.differences) == (4, [])

    def test_a_pacs_without_c_get_cannot_confirm_its_list(self, embedded: Embedded, tmp_path: Path) -> None:
        study = big_study(tmp_path / "data", 100, 600, name="round", series=1)
        pacs = embedded(tmp_path / "data")
        GetScu(f"PACS@{HOST}:{pacs.port}", destination=tmp_path / "out").get_study({"StudyInstanceUID": study})
        pacs = embedded(tmp_path / "data", omit_counts=True, no_get=True)
        found = verify(study=study, destination=tmp_path / "out", addr=f"PACS@{HOST}:{pacs.port}")
        assert (found.exit_code, found.differences, found.counts["="]) == (4, [], 100)
        assert "list_may_be_cut" in str(found.uncompared)


SC = "1.2.840.10008.5.1.4.1.1.7"
MIXED = {"pairs": [(CT, "1.2.840.10008.1.2.1"), (SC, "1.2.840.10008.1.2.1")]}
"""Every other instance is a secondary capture."""


class TestClasses:
    def classes(self, result: Any) -> set[str]:
        return set(result.manifest["sop_class_uid"])

    @pytest.mark.parametrize("mode", [None, "no_counts", "no_classes"])
    def test_what_is_wanted_is_complete_and_nothing_else_is_stored(self, scu: Any, tmp_path: Path, mode: str) -> None:
        client = scu(mode, of=MIXED, sop_classes=[CT])
        assert client.plan(client.study).instances == (8 if mode == "no_classes" else 4)
        for _ in range(2):
            result = client.get_study(client.study)
            assert (result.verdict, result.total, result.completed) == ("complete", 4, 4), result
            assert self.classes(result) == {CT}
            assert stored(tmp_path) == 4
            assert result.failed == result.unexpected == result.withdrawn == 0

    @pytest.mark.parametrize("mode", [None, "no_classes"])
    def test_none_of_the_class_is_empty(self, scu: Any, tmp_path: Path, mode: str) -> None:
        client = scu(mode, sop_classes=[SC])
        result = client.get_study(client.study)
        assert (result.verdict, result.exit_code, result.total) == ("empty", 5, 0), result
        assert stored(tmp_path) == 0

    def test_what_is_held_of_another_class_is_left_alone(self, scu: Any, tmp_path: Path) -> None:
        whole = scu("no_classes", of=MIXED)
        assert whole.get_study(whole.study).completed == 8
        client = scu(pacs=whole.pacs, sop_classes=[CT])
        before = whole.pacs.sent.total()
        result = client.get_study(client.study)
        assert (result.verdict, result.total, result.skipped) == ("complete", 4, 4)
        assert len(result.manifest) == 4
        assert whole.pacs.sent.total() == before, "what is held tells its class"
        assert stored(tmp_path) == 8

    def test_a_class_that_no_likely_context_would_bring(self, scu: Any, tmp_path: Path) -> None:
        """The series says CT: secondary captures are among the other classes, and the wanted ones are asked first."""
        client = scu("no_classes", of=MIXED, sop_classes=[SC])
        result = client.get_study(client.study)
        assert (result.verdict, result.completed, self.classes(result)) == ("complete", 4, {SC})
        assert stored(tmp_path) == 4

    @pytest.mark.dcmtk
    def test_dcmqrscp_which_tells_no_classes(self, ct: Any, tmp_path: Path) -> None:
        classes = sorted({e.sop_class for e in ct.entries.values()})
        server = Dcmqrscp(tmp_path / "pacs", sop_classes=set(classes))
        server.register(ct.files)
        with server:
            client = GetScu(f"{server.ae_title}@{HOST}:{server.port}", destination=tmp_path / "out",
                            sop_classes=classes[:1])  # fmt: skip
            result = client.get_study({"StudyInstanceUID": ct.study})
        wanted = {sop for sop, entry in ct.entries.items() if entry.sop_class == classes[0]}
        assert {path.stem for path in (tmp_path / "out").rglob("*.dcm")} <= wanted
        assert self.classes(result) - {None} <= {classes[0]}


class TestShell:
    def run(self, *argv: object) -> int:
        from airflow_dicom_get.cli.main import main

        return main([str(arg) for arg in argv])

    @pytest.mark.parametrize(("mode", "limit", "status"), [
        ("studies_cut", None, 0), ("studies_cut_alike", None, 4), ("studies_cut_alike", "0", 0),
        ("studies_cut_alike", "99", 0),
    ])  # fmt: skip
    def test_find_and_plan(self, scu: Any, capsys: pytest.CaptureFixture[str], mode: str, limit: str | None,
                           status: int) -> None:  # fmt: skip
        pacs = scu(mode, of={"series": 1, "instances": 1}).pacs
        options = ["-k", "StudyDate=20240131", *(["--list-limit", limit] if limit else [])]
        assert self.run("find", f"X@{HOST}:{pacs.port}", *options) == status
        assert ("just as many rows" in capsys.readouterr().err) == bool(status)
        assert self.run("plan", f"X@{HOST}:{pacs.port}", "--max-studies", 200, *options) == status
        assert ("just as many rows" in capsys.readouterr().err) == bool(status)

    @pytest.mark.parametrize(("level", "of"), [("SERIES", {"series": 100, "instances": 1}),
                                               ("IMAGE", {"series": 1, "instances": 150})])  # fmt: skip
    def test_find_below_the_studies_knows_no_more(self, scu: Any, level: str, of: dict[str, int]) -> None:
        client = scu("no_counts", of=of)
        argv = ["find", f"X@{HOST}:{client.pacs.port}", "--study", client.pacs.study_uid, "--level", level]
        assert self.run(*argv) == 4
        assert self.run(*argv, "--list-limit", "0") == 0

    def test_a_list_of_studies_in_a_file(self, scu: Any, tmp_path: Path) -> None:
        client = scu("studies_cut", of={"series": 1, "instances": 1, "param": 3}, list_limit="1")
        (tmp_path / "cohort.csv").write_text("AccessionNumber\nHOSTILE-ACC\n")
        argv = ["get", f"X@{HOST}:{client.pacs.port}", "--from-file", tmp_path / "cohort.csv", "--to", tmp_path / "out"]
        assert self.run(*argv) == 0
        assert self.run(*argv, "--list-limit", "1") == 4, "the PACS may have a second study of that number"


class TestPatientRoot:
    def test_queries_below_the_patient_name_it(self, scu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """At a PACS that offers C-FIND in Patient Root alone."""
        from airflow_dicom_get.net.find import STUDY_ROOT_FIND
        from airflow_dicom_get.testing.misbehaving.behaviour import Behaviour

        asked: list[tuple[str, str]] = []
        rows = Behaviour.rows

        def noted(self: Behaviour, level: str, query: dict[int, str]) -> Any:
            asked.append((level, query.get(0x00100020, "")))
            return rows(self, level, query)

        monkeypatch.setattr(Behaviour, "rows", noted)
        monkeypatch.setattr(Behaviour, "refused_classes", frozenset({STUDY_ROOT_FIND}))
        client = scu()
        result = client.get_study(client.study, query_model="PatientRoot")
        assert result.verdict == "complete"
        assert asked[0] == ("STUDY", ""), "not known before the study was found"
        assert {level for level, _ in asked[2:]} == {"STUDY", "SERIES", "IMAGE"}
        assert {patient for _, patient in asked[1:] if patient} == {"HOSTILE1"}
        assert all(patient for level, patient in asked if level != "STUDY")


class TestRealServers:
    """(c) of the rule: how the servers answer a C-GET that is cancelled after its first instance."""

    NUMBER = 150

    def run(self, server: Any, study: str, tmp_path: Path) -> Any:
        client = GetScu(f"{server.ae_title}@{HOST}:{server.port}", destination=tmp_path / "out")
        first = client.get_study({"StudyInstanceUID": study})
        assert (first.verdict, first.completed) == ("complete", self.NUMBER)
        result = client.get_study({"StudyInstanceUID": study})
        assert (result.verdict, result.skipped) == ("complete", self.NUMBER)
        return result

    @pytest.mark.dcmtk
    def test_dcmqrscp(self, tmp_path: Path) -> None:
        study = big_study(tmp_path / "data", self.NUMBER, 5000, name="round", series=1)
        held = hold(tmp_path / "data", study)
        server = Dcmqrscp(tmp_path / "pacs", sop_classes={e.sop_class for e in held.entries.values()})
        server.register(held.files)
        with server:
            result = self.run(server, study, tmp_path)
        assert 0 < result.bytes < 20 * 6000, "a few instances that were on their way, and not the series"

    @pytest.mark.orthanc
    def test_orthanc_by_its_counts(self, tmp_path: Path) -> None:
        study = big_study(tmp_path / "data", self.NUMBER, 5000, name="round", series=1)
        with Orthanc(tmp_path / "pacs") as server:
            server.load(sorted((tmp_path / "data").glob("*.dcm")))
            assert self.run(server, study, tmp_path).bytes == 0

    @pytest.mark.orthanc
    def test_orthanc_by_its_counters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if its C-FIND gave no counts."""
        from airflow_dicom_get.dicom import identifier
        from airflow_dicom_get.engine import listing

        study = big_study(tmp_path / "data", self.NUMBER, 5000, name="round", series=1)
        uncounted = {identifier.STUDY_RELATED_INSTANCES, identifier.STUDY_RELATED_SERIES,
                     identifier.SERIES_RELATED_INSTANCES}  # fmt: skip
        for name in ("_STUDY_KEYS", "_SERIES_KEYS"):
            monkeypatch.setattr(listing, name, tuple(tag for tag in getattr(listing, name) if tag not in uncounted))
        with Orthanc(tmp_path / "pacs") as server:
            server.load(sorted((tmp_path / "data").glob("*.dcm")))
            result = self.run(server, study, tmp_path)
        assert 0 < result.bytes < 20 * 6000

    def test_pynetdicom(self, embedded: Embedded, tmp_path: Path) -> None:
        study = big_study(tmp_path / "data", self.NUMBER, 5000, name="round", series=1)
        pacs = embedded(tmp_path / "data", omit_counts=True)
        pacs.ae_title = "PACS"
        assert 0 < self.run(pacs, study, tmp_path).bytes < 20 * 6000
