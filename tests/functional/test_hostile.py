"""Every misbehaviour against the engine: the right verdict in time, nothing leaked, nothing written elsewhere.

The cases run in one process of their own (this file as a program), several at a time, because most
of them wait for a deadline; floods run alone. That process logs everything it can, and its peak
memory, its output and its folders are looked at here.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from airflow_dicom_get.testing.misbehave import MODES, MisbehavingPacs, many_pairs
from airflow_dicom_get.testing.misbehaving import wire
from airflow_dicom_get.testing.misbehaving.archive import CT, build
from airflow_dicom_get.testing.misbehaving.wire import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE, JPEG_2000

pytestmark = pytest.mark.slow

STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
DEADLINES: dict[str, Any] = {
    "connect": 2.0,
    "acse": 0.8,
    "find_response": 0.8,
    "next_object": 0.8,
    "idle": 0.6,
    "min_rate": 1000,
    "min_rate_window": 0.6,
    "sub_operation": 5.0,
    "stall": 5.0,
    "operation": 12.0,
    "release": 0.4,
}
CANCEL_AFTER = 0.5
PARALLEL = 8
FLOOD_GROWTH = 32 << 20
"""Bytes by which the floods may exceed the memory of a good retrieval, each alone with its peer in the process."""
MAX_GROWTH = 96 << 20
"""The same for all the others, eight retrievals and eight peers at a time."""
ALL = 8
"""Instances of the default study: two series of four."""


@dataclass(frozen=True)
class Case:
    """A misbehaviour and what must come of it.

    Parameters
    ----------
    verdicts : set of str
        Any of these is right.
    held : tuple of int
        Fewest and most instances that are held at the end.
    peer : dict
        Arguments of the PACS.
    reason : str or None
        A reason that some manifest row must carry.
    errors : str or None
        A piece of text that one of the result's errors, or its hint, must hold.
    seconds : float
        The end must come before.
    cancel : bool
        Cancel after half a second, with deadlines that would end it only after minutes.
    scu : dict
        Further options of the retrieval.
    check : callable or None
        Further assertions on what was recorded.
    """

    mode: str
    verdicts: frozenset[str]
    held: tuple[int, int]
    peer: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    errors: str | None = None
    seconds: float = 20.0
    retries: int = 1
    alone: bool = False
    cancel: bool = False
    scu: dict[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], None] | None = None


def _rows(record: dict[str, Any], state: str) -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["state"] == state]


def _statuses(*expected: int) -> Callable[[dict[str, Any]], None]:
    """Each of these statuses was among our C-STORE responses."""

    def check(record: dict[str, Any]) -> None:
        assert set(expected) <= set(record["statuses"]), [f"{s:04X}" for s in record["statuses"]]

    return check


def _number(name: str, value: int) -> Callable[[dict[str, Any]], None]:
    def check(record: dict[str, Any]) -> None:
        assert record["result"][name] == value, record["result"]

    return check


def _not_asked_again(record: dict[str, Any]) -> None:
    """Nothing was fetched twice."""
    assert set(record["sent"].values()) <= {1}, record["sent"]


def _twice_at_most(associations: int) -> Callable[[dict[str, Any]], None]:
    """What was under way when an association broke may come twice: one instance for each."""

    def check(record: dict[str, Any]) -> None:
        again = [uid for uid, times in record["sent"].items() if times > 1]
        assert len(again) <= associations, again
        assert set(record["sent"].values()) <= {1, 2}

    return check


def _few_associations(most: int) -> Callable[[dict[str, Any]], None]:
    def check(record: dict[str, Any]) -> None:
        assert record["associations"] <= most, record["associations"]

    return check


def _answered(field_: int, status: int) -> Callable[[dict[str, Any]], None]:
    def check(record: dict[str, Any]) -> None:
        assert [field_, status] in record["answers"], record["answers"]

    return check


def _uids_are_escaped(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        for key in ("study_instance_uid", "series_instance_uid", "sop_instance_uid"):
            text = row[key] or ""
            assert set(text) <= set("0123456789.") or row["reason"] == "bad_uid", row
            assert text.isprintable(), row
            assert len(text) <= 64, row


def _all(*verdicts: str) -> frozenset[str]:
    return frozenset(verdicts)


COMPLETE, PARTIAL, FAILED, UNVERIFIED = _all("complete"), _all("partial"), _all("failed"), _all("unverified")


OTHER_BYTES = ("ds_truncated", "ds_group2", "mutate", "odd_values", "other_patient", "huge_modality")
"""Modes that send other data sets than the well PACS."""
ANY = _all("complete", "partial", "unverified", "failed", "empty")


def _cases() -> Iterator[Case]:
    # Well in effect, or provably complete whatever the source says.
    for mode in (
        "ac_small_pdu", "ac_unlimited_pdu", "ac_hostile_text", "norole", "no_release_rp", "release_collision",
        "pdv_odd", "pdv_two_byte", "pdv_many", "pdv_empty", "pdv_reserved", "cmd_nolen", "cmd_badlen", "cmd_fragmented",
        "same_msgid", "pipelined", "dup_same", "failed_list_lies", "failed_list_in_command", "counters_lie",
        "no_pending", "unknown_status", "nostatus", "msgid", "b000_all_sent", "a702_all_sent", "second_final",
        "store_after_final", "lists_refused", "find_duplicates", "find_foreign_rows", "find_row_per_instance",
        "find_prefix", "find_ignores_keys", "find_leaves_keys_out", "find_empties_keys", "find_folds",
        "find_hostile_studies", "studies_cut", "studies_cut_alike", "nothing_counted",
        "no_counts", "no_classes", "abort_end", "stall_end", "reject_once_then_ok", "a702_then_ok",
    ):  # fmt: skip
        yield Case(mode, COMPLETE, (ALL, ALL))
    for mode in ("find_nested", "find_long_texts", "odd_values", "other_patient"):
        yield Case(mode, COMPLETE, (ALL, ALL))
    yield Case("slow_objects", COMPLETE, (ALL, ALL), {"param": 0.05})
    yield Case("cancel_ignored", COMPLETE, (ALL, ALL), {"param": 0.01})
    yield Case("slow_line", COMPLETE, (2, 2), {"param": 10_000, "size": 16_000, "series": 1, "instances": 2})
    yield Case("extra_command", COMPLETE, (ALL, ALL), check=_answered(0x8030, 0x0000))
    yield Case("ncreate", COMPLETE, (ALL, ALL), check=_answered(0x8140, 0x0211))
    yield Case("foreign_study", COMPLETE, (ALL, ALL), check=_statuses(0x0124))
    yield Case("extra_instance", COMPLETE, (ALL, ALL), check=_number("unexpected", 2))
    yield Case("list_grows", COMPLETE, (ALL, ALL))
    yield Case("list_shrinks", COMPLETE, (ALL - 1, ALL - 1), check=_number("withdrawn", 1))
    one = _number("warning", 1)
    twice = {"victim": 2, "pairs": [(CT, IMPLICIT_LE), (CT, EXPLICIT_LE)]}
    yield Case("dup_othersyntax", COMPLETE, (ALL, ALL), twice, reason="other_transfer_syntax", check=one)
    # What is cut off at its end is stored as received: the pixel data is never decoded.
    yield Case("ds_truncated", COMPLETE, (ALL, ALL), {"victim": 2}, reason="truncated_dataset", check=one)

    # No association, or nothing that could be sent over it.
    for mode, text in (
        ("connect_close", ""), ("assoc_silent", "acse"), ("assoc_trickle", "acse"), ("assoc_abort", "abort"),
        ("ac_huge", ""), ("ac_trunc", ""), ("ac_not_dicom", ""), ("wrong_called_ae", "called AE title"),
        ("reject_local_limit", "local limit"), ("no_get", "C-GET"), ("ac_unknown_ctx", ""), ("ac_other_ts", ""),
        ("ac_two_ts", ""), ("no_storage", ""), ("role_refused", ""), ("silent", "next_object"), ("pdu_zero", ""),
        ("success_zero", ""), ("success_zero_lies", ""), ("get_fails", ""), ("error_comment", ""),
        ("drop_on_get", "AE title"),
    ):  # fmt: skip
        yield Case(mode, FAILED, (0, 0), errors=text or None, alone=mode == "ac_huge")

    # One sub-operation is spoiled for good, the others are not. A deadline is named in the error.
    deadlines = {
        "stall_mid": "deadlines.idle",
        "trickle": "deadlines.min_rate",
        "trickle_pdus": "deadlines.min_rate",
        "pending_slow": "deadlines.next_object",
        "pending_flood": "deadlines.next_object",
        "pending_wobble": "deadlines.next_object",
    }
    for mode in (
        "pdu_huge", "pdu_over_max", "pdu_unknown", "pdu_length_lies", "garbage", "pdv_short", "pdv_no_header",
        "interleave", "ctx_switch", "cmd_bomb", "cmd_garbage", "store_rq_twice", "pending_mid_store",
        "final_mid_store", "stall_mid", "trickle", "trickle_pdus", "drop", "reset", "abort_mid", "release_mid",
        "pending_flood", "pending_slow", "pending_wobble",
    ):  # fmt: skip
        loud = mode in ("pdu_huge", "cmd_bomb", "pending_flood")
        peer = {"param": 0.2} if mode.startswith("trickle") else {}
        yield Case(mode, PARTIAL, (1, ALL - 1), peer, alone=loud, seconds=14.0, errors=deadlines.get(mode))
    yield Case("noread", _all("complete", "partial"), (1, ALL), seconds=14.0)
    for mode, reason, status in (
        ("ctx_wrong", None, 0x0122), ("uid_mismatch", "uid_mismatch", 0xA900),
        ("class_mismatch", "uid_mismatch", 0xA900),
        ("ds_preamble", "unparsable", 0xC000), ("ds_othersyntax", "unparsable", 0xC000),
        ("ds_length_lies", "unparsable", 0xC000), ("ds_garbage", "unparsable", 0xC000),
        ("no_dataset", "empty_dataset", 0xC000), ("empty_dataset", "empty_dataset", 0xC000),
    ):  # fmt: skip
        yield Case(mode, PARTIAL, (1, ALL - 1), {"victim": 2}, reason=reason, check=_statuses(status))
    yield Case("ds_traversal", PARTIAL, (1, ALL - 1), {"victim": 2})
    yield Case("ds_group2", _all("complete", "partial"), (1, ALL), {"victim": 2})
    for mode in MODES:
        if mode.startswith("uid_") and mode != "uid_mismatch":
            yield Case(mode, PARTIAL, (ALL - 1, ALL - 1), {"victim": 2}, check=_statuses(0xA900))
    yield Case("dup_diff", PARTIAL, (1, ALL), {"victim": 2}, reason="different_content", check=_number("conflicts", 1))
    yield Case("huge_modality", COMPLETE, (ALL, ALL), {"pairs": [(CT, IMPLICIT_LE)]}, alone=True)
    yield Case("find_huge_rows", UNVERIFIED, (ALL, ALL), {"param": 2}, alone=True)
    yield Case("find_claims", _all("failed", "unverified"), (0, ALL), {"max_bytes": 4 << 20}, alone=True)
    yield Case("deflate_bomb", FAILED, (0, 0), {"pairs": [(CT, DEFLATED_LE)]}, alone=True, seconds=20.0)
    yield Case("endless_object", PARTIAL, (1, ALL - 1), {"max_bytes": 8 << 20}, alone=True, seconds=20.0)
    yield Case(
        "endless_garbage", PARTIAL, (ALL - 1, ALL - 1), {"victim": 2, "max_bytes": 512 << 20}, reason="unparsable",
        alone=True,
    )  # fmt: skip
    yield Case(
        "endless_on_context", PARTIAL, (ALL - 1, ALL - 1), {"victim": 2, "max_bytes": 8 << 20},
        reason="association_lost", alone=True,
    )  # fmt: skip
    yield Case(
        "endless_objects", _all("partial", "failed"), (0, ALL - 1), {"max_bytes": 8 << 20}, alone=True, seconds=20.0
    )

    # The final response lies, or comes too early.
    for mode in ("success_with_failed", "success_partial", "success_nocounts_partial"):
        yield Case(mode, PARTIAL, (4, 4), check=_not_asked_again)
    for mode in ("c000_half", "fe00_unasked"):
        yield Case(mode, PARTIAL, (4, ALL - 1))

    # Lists that fail or lie.
    yield Case("no_find", UNVERIFIED, (ALL, ALL))
    yield Case("find_fails", _all("unverified", "failed"), (0, ALL))
    for mode in ("find_silent", "find_drops", "find_wrong_msgid"):
        yield Case(mode, _all("unverified", "failed"), (0, ALL))
    for mode in ("find_garbage", "find_empty_rows"):
        yield Case(mode, _all("unverified", "failed"), (0, ALL))
    for mode in ("find_endless", "find_repeats"):
        yield Case(
            mode, _all("unverified", "failed", "partial"), (0, ALL), {"max_bytes": 64 << 20}, alone=True, seconds=40.0
        )
    yield Case("find_hostile_rows", PARTIAL, (ALL, ALL), reason="bad_uid", check=_uids_are_escaped)
    cut = {"series": 1, "instances": 103, "size": 600}
    for mode in ("find_cut_uncounted", "find_cut_nothing_counted"):
        yield Case(mode, UNVERIFIED, (100, 100), cut, seconds=15.0, check=_number("unexpected", 3))
    yield Case("find_no_images", UNVERIFIED, (ALL // 2, ALL // 2))
    yield Case("list_forgets", UNVERIFIED, (3, 3), {"series": 1}, check=_number("unexpected", 1))
    yield Case("find_ignores_keys_of_many", COMPLETE, (ALL, ALL), {"param": 100})
    yield Case("nearline", COMPLETE, (ALL, ALL))
    yield Case("not_online", PARTIAL, (ALL - 1, ALL - 1), reason="offline")
    yield Case("find_lists_more", PARTIAL, (ALL, ALL), reason="not_sent")
    yield Case("one_unknown_fails_list", PARTIAL, (ALL, ALL), reason="refused_by_source")
    yield Case("find_cut_at", UNVERIFIED, (6, 6), {"param": 3}, check=_number("unexpected", 2))
    yield Case("counts_lie", UNVERIFIED, (ALL, ALL))
    yield Case("list_grows_endless", PARTIAL, (ALL, 100), check=lambda r: _growing(r))

    # What is changed in pixel data cannot be seen; whatever else happens, it ends well within our own words.
    yield Case("mutate", ANY, (0, ALL), seconds=15.0)

    # The line breaks at a byte of the first answer, and is well afterwards.
    for mode in ("stall_at", "close_at", "reset_at"):
        yield Case(mode, COMPLETE, (ALL, ALL), {"param": 7000, "heal_after": 1}, check=_few_associations(6))


def _growing(record: dict[str, Any]) -> None:
    assert record["result"]["reason"] == "still_growing", record["result"]


def _borders(size: int, count: int) -> list[int]:
    """Where the PDUs of the first ``count`` instances end in the answer to a C-GET-RQ of a study."""
    uid = build(series=1, instances=1, size=size, pairs=[(CT, EXPLICIT_LE)])[0].sop
    store: dict[int, wire.Value] = {
        wire.CLASS: CT,
        wire.FIELD: 1,
        wire.MESSAGE_ID: 1,
        wire.PRIORITY: 0,
        wire.DATA_SET_TYPE: 1,
        wire.INSTANCE: uid,
    }
    counters = dict.fromkeys((wire.REMAINING, wire.COMPLETED, wire.FAILED, wire.WARNING), 0)
    answer: dict[int, wire.Value] = {
        wire.CLASS: STUDY_ROOT_GET,
        wire.FIELD: 1,
        wire.RESPONDED_ID: 1,
        wire.DATA_SET_TYPE: 1,
        wire.STATUS: 1,
    }
    room = 131072 - 6
    data = [min(room, size - at) + 12 for at in range(0, size, room)]
    one = [len(wire.command(store)) + 12, *data, len(wire.command(answer | counters)) + 12]
    return list(accumulate(one * count))


def _more_cases() -> Iterator[tuple[str, Case]]:
    """Further cases, beside the one of each mode."""
    for mode in (
        "connect_close", "assoc_silent", "assoc_abort", "ac_huge", "ac_trunc", "reject_local_limit", "silent",
        "stall_mid", "drop", "reset", "abort_mid", "release_mid", "c000_half", "fe00_unasked", "final_mid_store",
        "cmd_garbage", "pdu_huge", "pdu_unknown", "pdv_short", "interleave", "ctx_switch", "pending_slow", "find_drops",
        "find_silent", "success_zero", "get_fails",
    ):  # fmt: skip
        peer: dict[str, Any] = {"heal_after": 1}
        yield (
            f"{mode}, healed",
            Case(mode, COMPLETE, (ALL, ALL), peer, alone=mode in ("ac_huge", "pdu_huge"), seconds=12),
        )
    for mode in (
        "drop",
        "reset",
        "abort_mid",
        "stall_mid",
        "cmd_garbage",
        "release_mid",
        "final_mid_store",
        "c000_half",
    ):
        yield f"{mode}, one instance", Case(mode, PARTIAL, (ALL - 1, ALL - 1), {"victim": 1}, seconds=20.0, retries=5)
    for number in range(0, 3000, 271):
        peer = {"param": number, "heal_after": 1, "size": 600, "series": 1, "instances": 2}
        if number:
            yield f"close_at:{number}", Case("close_at", COMPLETE, (2, 2), peer)
        else:  # hung up on the request itself, which looks as if we were not allowed to ask: not tried again
            yield "close_at:0", Case("close_at", FAILED, (0, 0), peer, errors="AE title")
    size = 300_000
    for border in _borders(size, 2):
        for number in (border - 1, border, border + 1):
            peer = {"param": number, "heal_after": 1, "size": size, "series": 1}
            yield f"reset_at:{number}", Case("reset_at", COMPLETE, (4, 4), peer, check=_twice_at_most(1))
    for seed in range(1, 25):
        yield f"mutate:{seed}", Case("mutate", ANY, (0, ALL), {"param": seed}, seconds=15.0)
    for mode, peer in (
        ("silent", {}), ("assoc_silent", {}), ("assoc_trickle", {}), ("find_silent", {}),
        ("find_repeats", {"param": 0.01}), ("stall_mid", {}), ("stall_end", {}), ("trickle", {}), ("trickle_pdus", {}),
        ("noread", {}), ("pending_slow", {}), ("pending_flood", {}), ("pending_wobble", {}),
        ("cancel_ignored", {"param": 0.3}), ("slow_objects", {"param": 0.3}), ("endless_object", {}),
        ("reject_local_limit", {}), ("slow_line", {"param": 2000}),
    ):  # fmt: skip
        loud = mode in ("pending_flood", "endless_object")
        yield f"{mode}, cancelled", Case(
            mode, _all("cancelled"), (0, ALL - 1 if mode != "stall_end" else ALL), peer, seconds=CANCEL_AFTER + 8.0,
            retries=10, alone=loud, cancel=True,
        )  # fmt: skip
    four = {"associations": 4, "max_associations": 4}
    for mode in (
        "drop",
        "reset",
        "abort_mid",
        "stall_mid",
        "release_mid",
        "msgid",
        "reject_local_limit",
        "pdu_unknown",
    ):
        # Fewer refusals than associations where each is waited for longer than the one before.
        peer = {"heal_after": 2 if mode == "reject_local_limit" else 4, "series": 4, "instances": 10}
        yield (
            f"{mode}, healed, four associations",
            Case(mode, COMPLETE, (40, 40), peer, seconds=15.0, retries=5, scu=four, check=_twice_at_most(4)),
        )
    mixed = [(CT, JPEG_2000), (CT, IMPLICIT_LE)]
    yield "well, two syntaxes", Case("", COMPLETE, (ALL, ALL), {"pairs": mixed})
    many = {"pairs": many_pairs(200), "series": 4, "instances": 50, "size": 700}
    yield "well, 200 pairs", Case("", COMPLETE, (200, 200), many, seconds=15.0)
    yield "well, 200 pairs, listed", Case("", COMPLETE, (200, 200), many | {"list_syntaxes": True}, seconds=15.0)
    cut = {"param": 500, "series": 1, "instances": 520, "size": 700}
    yield (
        "find_cut_at, no more than 500 rows",
        Case("find_cut_at", UNVERIFIED, (500, 500), cut, seconds=15.0, check=_number("unexpected", 20)),
    )
    yield "well", Case("", COMPLETE, (ALL, ALL), check=_not_asked_again)


CASES: dict[str, Case] = {case.mode: case for case in _cases()} | dict(_more_cases())


# --- the program that runs them ----------------------------------------------------------------------


def _read_manifest(uri: str | None) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    if uri is None:
        return []
    table = pq.read_table(unquote(uri.removeprefix("file://")))
    wanted = [n for n in table.column_names if n not in ("received_at",)]
    return [dict(row) for row in table.select(wanted).to_pylist()]


def run_case(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Retrieve from one misbehaving PACS and write down all that can be asserted later."""
    from airflow_dicom_get import GetScu
    from airflow_dicom_get.config.groups import Deadlines

    folder.mkdir(parents=True)
    destination = folder / "destination"
    record: dict[str, Any] = {"case": name}
    peer = {"max_seconds": 30.0, "max_bytes": 64 << 20} | case.peer
    with MisbehavingPacs(case.mode or None, **peer) as pacs:
        started = time.monotonic()
        try:
            scu = GetScu(
                f"PACS@127.0.0.1:{pacs.port}",
                destination=str(destination),
                deadlines=Deadlines() if case.cancel else Deadlines(**DEADLINES),
                retries=case.retries,
                **case.scu,
            )
            if case.cancel:
                threading.Timer(CANCEL_AFTER, scu.cancel, ["a test"]).start()
            events: Counter[str] = Counter()
            result = scu.get_study(
                {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": pacs.study_uid},
                on_completed=lambda event: events.update([event.verdict]),
            )
            record["result"] = result.to_json()
            record["rows"] = _read_manifest(result.manifest_uri)
            record["completed_events"] = dict(events)
        except Exception as error:
            record["raised"] = f"{type(error).__name__}: {error}"
        record["seconds"] = time.monotonic() - started
        record["sent"] = dict(pacs.sent)
        record["statuses"] = pacs.statuses
        record["answers"] = pacs.answers
        record["associations"] = pacs.associations
        record["faults"] = pacs.faults
        good = {uid: len(pacs.dataset(uid)) for uid in pacs.uids} if len(pacs.uids) <= ALL else {}
        whole = {}
        for path in sorted(destination.rglob("*.dcm")):
            if path.stem in good:
                whole[path.stem] = path.read_bytes().endswith(pacs.dataset(path.stem))
        record["whole"] = whole
    record["leftovers"] = [p.name for p in destination.rglob("*") if p.name.endswith(".part")]
    record["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    if good and "result" in record:
        record["resumed"] = _resume(destination)
    record["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return record


def _resume(destination: Path) -> dict[str, Any]:
    """Retrieve the same study again, from a peer that is well."""
    from airflow_dicom_get import GetScu

    held = {path.stem for path in destination.rglob("*.dcm")}
    with MisbehavingPacs() as pacs:
        scu = GetScu(f"PACS@127.0.0.1:{pacs.port}", destination=str(destination))
        result = scu.get_study({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": pacs.study_uid})
        return {
            "verdict": result.verdict,
            "skipped": result.skipped,
            "held_before": len(held & set(pacs.uids)),
            "missing_before": sorted(set(pacs.uids) - held),
            "sent": dict(pacs.sent),
        }


def main(root: Path, names: list[str]) -> None:
    """Run the named cases below ``root``, write a line of JSON for each to ``root``/results."""
    logging.basicConfig(level=logging.DEBUG, format="%(threadName)s %(name)s %(levelname)s %(message)s")
    mutex = threading.Lock()

    def run(name: str) -> None:
        threading.current_thread().name = name.replace(" ", "_")
        record = run_case(name, CASES[name], root / "cases" / name.replace(" ", "_").replace(",", ""))
        with mutex, (root / "results").open("a", encoding="utf-8") as out:
            out.write(json.dumps(record, default=str) + "\n")

    run("well")  # loads what is loaded on first use, so that later growth is the peer's doing
    for name in names:
        if CASES[name].alone:
            run(name)
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(run, [name for name in names if not CASES[name].alone and name != "well"]))
    with (root / "results").open("a", encoding="utf-8") as out:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        out.write(json.dumps({"case": "", "rss": peak}) + "\n")


# --- the table of the documentation ------------------------------------------------------------------

TABLE = Path(__file__).parents[2] / "docs" / "hostile-peers.md"
_INTRODUCTION = """\
# How a retrieval ends with a peer that misbehaves

Written by `HOSTILE_TABLE=1 make test ARGS=tests/functional/test_hostile.py`, which retrieves a study of eight instances
from the misbehaving PACS in each of its modes, with short deadlines (about one second each) and one retry. Each mode
breaks one rule, and keeps breaking it unless its name contains "once" or "then ok". The rows marked *healed* show the
result if it happens only the first time.

You can use this PACS in your own tests: `from airflow_dicom_get.testing.misbehave import MisbehavingPacs`, or, in a
shell, `dicom-get pacs --misbehave MODE` (`list` shows the modes; `MODE:PARAM` sets a mode's parameter).

"""


def _plain(sentence: str) -> str:
    return sentence.replace("``", "`")


def table(records: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown: one line for each mode, then some that heal."""
    lines = ["| mode | what the peer does | verdict | held | in |", "| --- | --- | --- | --- | --- |"]
    for name, case in CASES.items():
        if name in MODES or name.endswith(", healed"):
            result = records[name]["result"]
            verdict = result["verdict"] + (f", {result['reason']}" if result["reason"] else "")
            what = _plain(MODES[case.mode]) if name in MODES else "Only the first time."
            held = f"{result['completed']} of {result['total']}"
            lines.append(f"| `{name}` | {what} | {verdict} | {held} | {records[name]['seconds']:.1f} s |")
    floods = max(record["rss"] for name, record in records.items() if name and CASES[name].alone)
    growth = (floods - records["well"]["rss"]) >> 20
    lines += ["", f"The floods took {growth} MiB more memory than a normal retrieval, including the peer's own."]
    return _INTRODUCTION + "\n".join(lines) + "\n"


# --- the tests ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the program left behind."""

    root: Path
    records: dict[str, dict[str, Any]]
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    root = tmp_path_factory.mktemp("hostile")
    every = [getattr(item, "callspec", _NONE).params for item in request.session.items]
    wanted = {params["name"] for params in every if "name" in params}
    names = [name for name in CASES if name in wanted or not wanted]
    # One arena for all threads: what is measured is what is in use, not what malloc keeps for each thread.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    with (root / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, str(root), json.dumps(names)], stdout=output, stderr=output, env=environment
        )
        try:
            process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    lines = (root / "results").read_text().splitlines() if (root / "results").exists() else []
    records = {record["case"]: record for record in map(json.loads, lines)}
    if "HOSTILE_TABLE" in os.environ and records.keys() >= CASES.keys():
        TABLE.write_text(table(records), encoding="utf-8")
    return Run(root, records, (root / "output").read_text(errors="replace"))


class _NoSpec:
    params: dict[str, Any] = {}  # noqa: RUF012


_NONE = _NoSpec()


def test_every_mode_has_a_case() -> None:
    assert {case.mode for case in CASES.values()} - {""} == MODES.keys()


@pytest.mark.parametrize("name", CASES)
def test_verdict(run: Run, name: str) -> None:
    case = CASES[name]
    record = run.records.get(name)
    assert record is not None, f"no end: {run.output[-2000:]}"
    assert record["faults"] == []
    assert "raised" not in record, record["raised"]
    result = record["result"]
    assert result["verdict"] in case.verdicts, result
    assert case.held[0] <= result["completed"] <= case.held[1], result
    assert record["seconds"] < case.seconds
    assert record["completed_events"] == {result["verdict"]: 1}
    if case.reason is not None:
        assert case.reason in {row["reason"] for row in record["rows"]}, record["rows"]
    if case.errors is not None:
        assert any(case.errors in f"{e['error']} {e['hint']}" for e in result["errors"]), result["errors"]
    if case.check is not None:
        case.check(record)


@pytest.mark.parametrize("name", CASES)
def test_what_lies_on_disk_is_what_the_manifest_says(run: Run, name: str) -> None:
    record = run.records[name]
    assert all(record["whole"].values()) or CASES[name].mode in OTHER_BYTES, record["whole"]
    under_final_names = {p for p in record["files"] if "_manifests" not in p}
    held = {
        f"destination/{row['study_instance_uid']}/{row['series_instance_uid']}/{row['sop_instance_uid']}.dcm"
        for row in record["rows"]
        # In a conflict the first stays, and so does what has left the list since.
        if row["state"] in ("stored", "held", "unexpected", "conflict") or (row["state"] == "withdrawn" and row["uri"])
    }
    assert under_final_names == held
    assert record["leftovers"] == []
    numbers = record["result"]
    if numbers["verdict"] == "complete":
        assert numbers["completed"] == numbers["total"]
        assert not [row for row in record["rows"] if row["state"] in ("failed", "missing", "conflict")]
    assert numbers["failed"] == numbers["total"] - numbers["completed"]


@pytest.mark.parametrize("name", CASES)
def test_the_next_run_fetches_what_is_missing_and_no_more(run: Run, name: str) -> None:
    resumed = run.records[name].get("resumed")
    case = CASES[name]
    if resumed is None or case.peer.keys() & {"pairs", "size", "series", "instances"} or case.mode == "mutate":
        pytest.skip("another study than the one that is resumed")
    if case.mode == "dup_diff":
        pytest.skip("the source is asked again which of the two contents it holds")
    assert resumed["verdict"] == "complete", resumed
    assert resumed["skipped"] == resumed["held_before"], resumed
    assert resumed["sent"] == dict.fromkeys(resumed["missing_before"], 1)


def test_nothing_was_written_outside_the_destinations(run: Run) -> None:
    for folder in (run.root / "cases").iterdir():
        assert [p.name for p in folder.iterdir()] in (["destination"], [])
    assert not [p for p in run.root.rglob("*") if "PWNED" in p.name]
    assert not Path("/tmp/PWNED").exists()


def test_no_patient_stands_in_any_output(run: Run) -> None:
    assert "HOSTILE" not in run.output
    for path in (run.root / "cases").rglob("*"):
        if path.is_file() and path.suffix != ".dcm":
            assert b"HOSTILE" not in path.read_bytes(), path
    for record in run.records.values():
        assert "HOSTILE" not in json.dumps(record)


def test_text_of_a_peer_cannot_forge_a_log_line(run: Run) -> None:
    assert "\x1b" not in run.output
    assert not [line for line in run.output.splitlines() if line.startswith("FAKELOGLINE")]


def test_no_thread_died(run: Run) -> None:
    assert "Traceback" not in run.output, run.output[run.output.index("Traceback") - 500 :][:3000]


def test_memory_stays_bounded(run: Run) -> None:
    before = run.records["well"]["rss"]
    for name, record in run.records.items():
        if name and CASES[name].alone:
            assert record["rss"] < before + FLOOD_GROWTH, f"{record['rss'] >> 20} MiB after {name}"
    assert run.records[""]["rss"] < before + MAX_GROWTH, f"{run.records['']['rss'] >> 20} MiB"


def test_the_documentation_has_a_line_for_each_mode() -> None:
    lines = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    written = {cells[0].strip("| `"): (cells[1], cells[2].split(",")[0]) for cells in lines}
    assert {name: what for name, (what, _) in written.items() if name in MODES} == {
        name: _plain(sentence) for name, sentence in MODES.items()
    }
    assert all(verdict in CASES[name].verdicts for name, (_, verdict) in written.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
