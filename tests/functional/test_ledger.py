"""The ledger on a folder: what was written is read, what is broken is said, whatever its bytes are."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_dicom_get import GetScu, clock
from airflow_dicom_get.errors import LedgerError
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.sinks.ledger import (
    OWN,
    SCHEMA,
    FolderLedgers,
    dropped_line,
    durable_line,
    header_line,
    parse_ledger,
    taken_line,
)
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from tests.support.holdings import Holding

STUDY, SERIES = "1.2.3", "1.2.3.4"


def instance(sop: str, size: int = 100, series: str = SERIES) -> Instance:
    made = Instance(STUDY, series, sop, "1.2.840.10008.5.1.4.1.1.2")
    made.syntax, made.bytes, made.dataset_offset = "1.2.840.10008.1.2.1", size, min(50, size)
    made.sha256 = bytes(range(32))
    made.modality, made.series_number, made.instance_number = "CT", 3, 7
    return made


def record_of(one: Instance, *, durable: bool) -> Stored:
    return Stored(
        one.series, one.sop, one.sop_class, one.syntax, one.sha256, one.bytes or 0, one.dataset_offset or 0,
        one.modality, one.series_number, one.instance_number, forwarded_to=one.forwarded_to, durable=durable,
    )  # fmt: skip


def key(sop: str) -> Key:
    return SERIES, sop


def read(root: Path, study: str = STUDY, destination: str = OWN) -> dict[Key, list[Stored]]:
    return FolderLedgers(root, destination).read(study)


def write(
    root: Path, run: str, taken: Sequence[Instance] = (), durable: Sequence[str] = (), destination: str = OWN
) -> Path:
    writer = FolderLedgers(root, destination).open(STUDY, run)
    for one in taken:
        writer.taken(one)
    if durable:
        writer.durable(map(key, durable))
    writer.sync()
    writer.close()
    return root / ".ledger" / STUDY / f"{run}.jsonl"


def parse(content: bytes, destination: str = OWN) -> dict[Key, Stored]:
    return parse_ledger([("ledger", content)], STUDY, destination, ()).stored


# --- what is written ------------------------------------------------------------------------------------


def test_a_record_before_the_rename_and_one_after_the_sync(tmp_path: Path) -> None:
    one, two = instance("1.1"), instance("1.2")
    path = write(tmp_path, "r", [one, two], ["1.1"])
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries[0] == {"ledger": SCHEMA}
    assert [(entry["state"], entry["uid"]) for entry in entries[1:]] == [
        ("taken", "1.1"), ("taken", "1.2"), ("durable", "1.1"),
    ]  # fmt: skip
    assert entries[1]["sha256"] == one.sha256.hex() if one.sha256 else False
    assert {"series", "class", "syntax", "size", "dataset_offset"} <= entries[1].keys()
    assert read(tmp_path) == {
        key("1.1"): [record_of(one, durable=True)],
        key("1.2"): [record_of(two, durable=False)],
    }


def test_a_line_is_what_json_makes_of_it() -> None:
    odd = instance("1.1")
    odd.modality, odd.series_number, odd.truncated = 'C"T\\\u00e9\n\ud800', None, True
    for line in (taken_line(odd, "/d\u00e9st"), durable_line(key("1.1"), '"etag"', "dicom://A@b:1"),
                 dropped_line(key("1.1"), OWN, ["r1", "r\u00e9"]), header_line()):  # fmt: skip
        assert line == json.dumps(json.loads(line)) + "\n"


def test_no_patient_data_can_get_in() -> None:
    keys = json.loads(taken_line(instance("1.1"), OWN)).keys()
    assert keys == {"state", "destination", "uid", "series", "class", "syntax", "size", "dataset_offset", "sha256",
                    "modality", "series_number", "instance_number"}  # fmt: skip


def test_each_line_is_written_by_one_write(tmp_path: Path) -> None:
    """So that a kill leaves whole lines: here after every call, before the file is closed."""
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "r")
    for number in range(3):
        writer.taken(instance(f"1.{number}"))
        assert len(read(tmp_path)) == number + 1
    writer.durable([key("1.0"), key("1.2")])
    assert [read(tmp_path)[key(f"1.{n}")][0].durable for n in range(3)] == [True, False, True]
    writer.close()


def test_a_run_that_recorded_nothing_leaves_no_ledger(tmp_path: Path) -> None:
    assert not write(tmp_path, "r").exists()


def test_what_was_taken_back_is_not_there(tmp_path: Path) -> None:
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "r")
    writer.taken(instance("1.1"))
    writer.dropped(key("1.1"))
    writer.durable([key("1.1")])
    writer.close()
    assert read(tmp_path) == {}


# --- the union of all runs --------------------------------------------------------------------------------


def test_newer_records_come_first_and_durable_ones_before_all(tmp_path: Path) -> None:
    for run, size, durable in (("20260101", 1, True), ("20260102", 2, False), ("20260103", 3, True)):
        write(tmp_path, run, [instance("1.1", size)], ["1.1"] if durable else [])
    write(tmp_path, "20260104", [instance("1.1", 4)])
    found = [(record.bytes, record.durable) for record in read(tmp_path)[key("1.1")]]
    assert found == [(3, True), (1, True), (4, False), (2, False)]


def test_a_durable_of_another_run_says_nothing_of_this_one(tmp_path: Path) -> None:
    write(tmp_path, "a", [instance("1.1", 1)])
    write(tmp_path, "b", [], ["1.1"])
    assert [record.durable for record in read(tmp_path)[key("1.1")]] == [False]


def test_other_studies_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "a", [instance("1.1")])
    (tmp_path / ".ledger" / "9.9").mkdir()
    (tmp_path / ".ledger" / "9.9" / "a.jsonl").write_bytes(b"broken\n")
    assert read(tmp_path).keys() == {key("1.1")}
    assert read(tmp_path, "7.7") == {}
    with pytest.raises(LedgerError):
        read(tmp_path, "9.9")


def test_records_count_for_their_own_destination(tmp_path: Path) -> None:
    """One root may serve several: nodes, and folders."""
    write(tmp_path, "a", [instance("1.1")], ["1.1"], destination="dicom://A@host:1")
    write(tmp_path, "b", [instance("1.1", 7)], ["1.1"], destination="file:///data/one")
    assert read(tmp_path) == {}
    assert read(tmp_path, destination="dicom://B@host:1") == {}
    assert [x.bytes for x in read(tmp_path, destination="dicom://A@host:1")[key("1.1")]] == [100]
    assert [x.bytes for x in read(tmp_path, destination="file:///data/one")[key("1.1")]] == [7]


def test_one_uid_in_two_series_is_two_records(tmp_path: Path) -> None:
    write(tmp_path, "a", [instance("1.1"), instance("1.1", 7, "1.2.3.5")], ["1.1"])
    found = read(tmp_path)
    assert {k: (x.bytes, x.durable) for k, (x,) in found.items()} == {
        (SERIES, "1.1"): (100, True),
        ("1.2.3.5", "1.1"): (7, False),
    }


def test_a_replacement_ends_what_older_runs_recorded_and_no_newer_one(tmp_path: Path) -> None:
    write(tmp_path, "20260101", [instance("1.1", 1), instance("1.2", 1)], ["1.1", "1.2"])
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "20260102")
    writer.dropped(key("1.1"))
    writer.sync()
    assert read(tmp_path).keys() == {key("1.2")}
    writer.taken(instance("1.1", 2))
    writer.close()
    write(tmp_path, "20260103", [instance("1.1", 3)])
    assert [x.bytes for x in read(tmp_path)[key("1.1")]] == [3, 2]


def test_a_replacement_that_cannot_be_recorded_whole_ends_nothing(tmp_path: Path) -> None:
    """Else the file of the first, whose sync may have failed, would be nobody's when it is met again."""
    write(tmp_path, "20260101", [instance("1.1", 1)])
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "20260102")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(header_line() + dropped_line(key("1.1"), OWN)) + 20, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            writer.taken(instance("1.1", 2), anew=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [x.bytes for x in read(tmp_path)[key("1.1")]] == [1]
    writer.taken(instance("1.1", 2), anew=True)
    writer.close()
    assert [x.bytes for x in read(tmp_path)[key("1.1")]] == [2]


@pytest.mark.parametrize("earlier", ["z", "a"])
def test_a_replacement_ends_what_was_there_before_whatever_its_name(tmp_path: Path, earlier: str) -> None:
    """The names of runs begin with the time: a clock may be set back, and two may begin within one second."""
    write(tmp_path, earlier, [instance("1.1"), instance("1.2")], ["1.1", "1.2"])
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "m")
    writer.dropped(key("1.1"))
    writer.taken(instance("1.1", size=2))
    writer.close()
    there = read(tmp_path)
    assert [(x.bytes, x.durable) for x in there[key("1.1")]] == [(2, False)]
    assert [x.durable for x in there[key("1.2")]] == [True]
    write(tmp_path, "y", [instance("1.1", size=2)], ["1.1"])
    assert [(x.bytes, x.durable) for x in read(tmp_path)[key("1.1")]] == [(2, True), (2, False)]


def test_a_clock_that_is_set_back_makes_no_torn_file_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ct: Holding, embedded: Callable[..., EmbeddedPacs]
) -> None:
    node = f"PACS@127.0.0.1:{embedded(ct.folder).port}"
    query = {"StudyInstanceUID": ct.study}
    with monkeypatch.context() as ahead:
        ahead.setattr(clock, "now", lambda: time.time() + 3600)
        assert GetScu(node, destination=tmp_path).get_study(query).verdict == "complete"
    victim = next(path for path in sorted(tmp_path.rglob("*.dcm")))
    content = victim.read_bytes()
    victim.unlink()
    assert GetScu(node, destination=tmp_path, durable=False).get_study(query).verdict == "complete"
    victim.write_bytes(content[:600] + bytes(len(content) - 600))  # a power cut: it was never synced
    assert GetScu(node, destination=tmp_path).get_study(query).verdict == "complete"
    assert victim.read_bytes() == content


def test_a_replacement_at_another_destination_ends_nothing_here(tmp_path: Path) -> None:
    write(tmp_path, "a", [instance("1.1")], ["1.1"], destination="file:///one")
    other = FolderLedgers(tmp_path, "file:///two").open(STUDY, "b")
    other.dropped(key("1.1"))
    other.close()
    assert read(tmp_path, destination="file:///one").keys() == {key("1.1")}


# --- schema 1 -----------------------------------------------------------------------------------------------


def old(*lines: dict[str, object]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in ({"ledger": 1}, *lines)).encode()


def old_taken(series: str = SERIES, **more: object) -> dict[str, object]:
    line: dict[str, object] = json.loads(taken_line(instance("1.1", series=series), OWN))
    del line["destination"]
    return {**line, **more}


OLD_DURABLE: dict[str, object] = {"state": "durable", "uid": "1.1"}


@pytest.mark.parametrize(
    ("lines", "destination", "durable"),
    [
        ((old_taken(), OLD_DURABLE), OWN, {key("1.1"): True}),
        ((old_taken(),), OWN, {key("1.1"): False}),
        # It does not say for which of the two.
        ((old_taken(), old_taken("1.2.3.5"), OLD_DURABLE), OWN, {key("1.1"): False, ("1.2.3.5", "1.1"): False}),
        # Nor where.
        ((old_taken(), OLD_DURABLE), "file:///data", {key("1.1"): False}),
        ((old_taken(forwarded_to="A@h:1"), OLD_DURABLE), "dicom://A@h:1", {key("1.1"): True}),
        ((old_taken(forwarded_to="A@h:1"), OLD_DURABLE), "dicom://B@h:1", {}),
        ((old_taken(forwarded_to="A@h:1"), OLD_DURABLE), OWN, {}),
        ((old_taken(), OLD_DURABLE), "dicom://A@h:1", {}),
        ((old_taken(), {"state": "dropped", "uid": "1.1"}), OWN, {}),
    ],
)
def test_a_ledger_of_schema_1(lines: Sequence[dict[str, object]], destination: str, durable: dict[Key, bool]) -> None:
    assert {k: x.durable for k, x in parse(old(*lines), destination).items()} == durable


# --- any bytes ----------------------------------------------------------------------------------------------

UIDS = st.sampled_from(("1.1", "1.2", "1.3"))
LINES = st.one_of(
    UIDS.map(lambda uid: taken_line(instance(uid), OWN)),
    UIDS.map(lambda uid: durable_line(key(uid))),
    UIDS.map(lambda uid: dropped_line(key(uid), OWN)),
)
LEDGERS = st.lists(LINES, max_size=12).map(lambda lines: (header_line() + "".join(lines)).encode())


@given(LEDGERS, st.integers(0, 3000))
def test_a_torn_last_line_is_ignored(content: bytes, cut: int) -> None:
    """At whatever byte: what the whole lines say is read, and no more."""
    torn = content[: min(cut, len(content))]
    whole = torn[: torn.rfind(b"\n") + 1]
    assert parse(torn) == parse(whole)


@given(LEDGERS, st.integers(0, 3000), st.integers(1, 600))
def test_zeros_where_a_power_cut_lost_a_page_end_a_ledger(content: bytes, at: int, lost: int) -> None:
    at = min(at, len(content))
    torn = content[:at] + bytes(len(content[at : at + lost])) + content[at + lost :]
    whole = torn[:at][: torn[:at].rfind(b"\n") + 1] if torn != content else content
    assert parse(torn) == parse(whole)


@given(st.lists(st.tuples(st.sampled_from(("taken", "durable", "dropped")), UIDS), max_size=20))
def test_the_last_word_counts(steps: list[tuple[str, str]]) -> None:
    lines: dict[str, Callable[[str], str]] = {
        "taken": lambda uid: taken_line(instance(uid), OWN),
        "durable": lambda uid: durable_line(key(uid)),
        "dropped": lambda uid: dropped_line(key(uid), OWN),
    }
    expected: dict[str, bool] = {}
    for state, uid in steps:
        if state == "taken":
            expected[uid] = False
        elif state == "dropped":
            expected.pop(uid, None)
        elif uid in expected:
            expected[uid] = True
    found = parse("".join([header_line(), *(lines[state](uid) for state, uid in steps)]).encode())
    assert {sop: record.durable for (_, sop), record in found.items()} == expected


SPOILED = st.tuples(LEDGERS, st.integers(0, 5000), st.binary(max_size=8)).map(
    lambda x: x[0][: x[1] % len(x[0])] + x[2] + x[0][x[1] % len(x[0]) + 1 :]
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
KEYS = sorted(json.loads(taken_line(instance("1.1"), OWN)))
ODD = st.tuples(st.sampled_from(KEYS), JSON).map(
    lambda x: (json.dumps({**json.loads(taken_line(instance("1.1"), OWN)), x[0]: x[1]}) + "\n").encode()
)


@given(st.one_of(st.binary(max_size=200), SPOILED, ODD, JSON.map(lambda x: (json.dumps(x) + "\n").encode())))
def test_any_bytes_are_records_or_an_error_of_ours(content: bytes) -> None:
    try:
        found = parse(content)
    except LedgerError:
        return
    for at, record in found.items():
        assert record.key == at
        assert isinstance(record.bytes, int)
        assert 0 <= record.dataset_offset <= record.bytes
        for text in (record.sop_class, record.syntax, record.modality):
            assert text is None or isinstance(text, str)
        for number in (record.series_number, record.instance_number):
            assert number is None or type(number) is int


TAKEN, DURABLE = taken_line(instance("1.1"), OWN).encode(), durable_line((SERIES, "1.1")).encode()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"ledger": 3}\n', "has schema 3; this version reads 2"),
        (b'{"ledger": "1"}\n', "has schema '1'; this version reads 2"),
        (b'{"ledger": 2.0}\n', "has schema 2.0; this version reads 2"),
        (b'{"ledger": []}\n', r"has schema \[\]; this version reads 2"),
        (b'{"ledger": {"of": true}}\n', "has schema .*; this version reads 2"),
        (b'{"ledger": "%s"}\n' % (b"z" * 60_000), "has schema 'z{62}…; this version reads 2"),
        (b"{}\n", "contains an unreadable record"),
        (b'{"state": "taken", "uid": "1.1"}\n', "contains an unreadable record"),
        (b'{"state": "taken"\n', "is damaged in line 2"),
        (b"\n", "is damaged in line 2"),
        (b"[]\n", "is damaged in line 2"),
        (b"\xff\xfe\n", "is damaged in line 2"),
        (b"[" * 100_000 + b"\n", "is damaged in line 2"),
        (TAKEN.replace(b'"size": 100', b'"size": Infinity'), "contains an unreadable record"),
        (TAKEN.replace(b'"size": 100', b'"size": %d' % (1 << 63)), "contains an unreadable record"),
        (TAKEN.replace(b'"dataset_offset": 50', b'"dataset_offset": %d' % (1 << 63)), "contains an unreadable record"),
        (TAKEN.replace(b'"dataset_offset": 50', b'"dataset_offset": -1'), "contains an unreadable record"),
        (TAKEN.replace(b'"dataset_offset": 50', b'"dataset_offset": 101'), "contains an unreadable record"),
        (TAKEN.replace(b'"series_number": 3', b'"series_number": %d' % (1 << 63)), "contains an unreadable record"),
        (TAKEN.replace(b'"modality": "CT"', b'"modality": 1'), "contains an unreadable record"),
        (TAKEN + DURABLE.replace(b"}", b', "etag": []}'), "contains an unreadable record"),
    ],
)  # fmt: skip
def test_what_is_broken_is_said_and_left_as_it_is(tmp_path: Path, line: bytes, text: str) -> None:
    path = write(tmp_path, "r", [instance("1.1")], ["1.1"])
    content = header_line().encode() + line + path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=text) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert not caught.value.transient
    assert caught.value.study == STUDY  # type: ignore[attr-defined]
    assert path.read_bytes() == content


def test_records_of_a_state_to_come_are_passed_over() -> None:
    content = (
        header_line() + taken_line(instance("1.1"), OWN) + '{"state": "seen", "series": "1.2.3.4", "uid": "1.1"}\n'
    )
    assert parse(content.encode()).keys() == {key("1.1")}


def test_what_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    writer = FolderLedgers(tmp_path, OWN).open(STUDY, "run")
    writer.taken(instance("1.2.9"))
    with pytest.raises(OSError, match="longer than 64 KiB"):
        writer.durable([key("1.2.9")], etag="\xe9" * 20_000)
    writer.durable([key("1.2.9")], etag="e" * 60_000)
    writer.close()
    assert read(tmp_path)[key("1.2.9")][0].durable
