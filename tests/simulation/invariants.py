"""What must hold after each run of a history, whatever happened in it (DESIGN, section 7)."""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.misbehaving.archive import Instance
from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES
from airflow_dicom_get.vocabulary import CONTENT_IN_DOUBT, HELD, NOT_HELD
from tests.simulation.destinations import ROOT, path_of
from tests.simulation.disk import PAGE
from tests.simulation.marks import in_history, mark
from tests.simulation.pacs import MODALITY, SERIES, SOP, SOP_CLASS, Find, Key, listed
from tests.simulation.world import HOURS_BEGIN, Played, World, key_of

_LOOKS = ("read", "open", "status", "head_object", "get_object")
"""What a comparison with what lies there needs."""

LONGEST = 2 * 3600.0
"""Seconds within which any run ends: the operation's hour, and what may come after it."""


def after_run(world: World, run: Played) -> None:
    """Add what is wrong after a run to the findings of its world."""
    files = run.after[0] if run.after is not None else world.place.files()
    _nothing_foreign(world, files)
    _nothing_changed(world, run, files)
    _nothing_torn(world, run, files)
    if run.seconds > LONGEST:
        world.finding("it took too long", run.seconds)
    if run.killed:
        return
    if run.beside is None:
        _nothing_left_behind(world, run, files)
        _not_asked_again(world, run)
    else:
        _at_once(world, run, run.beside)
    _cancels(world, run)
    if run.result is not None:
        if len(world.history.studies) > 1:
            _mark_two(run.result)
        _numbers(world, run)
        _has_rows(world, run, files)
        _second_list(world, run)
        _truncated(world, run, files)
        if run.result.verdict == "complete":
            _complete(world, run, files)
        elif run.result.reason == "nothing_asked" and any(
            meant(world, key, run.run.options.get("sop_classes")) for key in run.asked or ()
        ):
            world.finding("nothing is asked for, and the manifest lists something")


# --- what lies there -------------------------------------------------------------------------------


def final_files(files: dict[str, bytes]) -> Iterator[tuple[str, str, Key, bytes]]:
    """Path, study, (series, sop) and content of what lies under a final name."""
    for path, content in files.items():
        if path.endswith(".dcm") and not path.rpartition("/")[2].startswith("."):
            study, series, name = path.removeprefix(f"{ROOT}/").split("/")
            yield path, study, (series, name.removesuffix(".dcm")), content


def data_set(content: bytes) -> bytes:
    """The data set of a file, whether or not it has file meta information."""
    if content[128:132] != b"DICM":
        return content
    (length,) = struct.unpack_from("<I", content.ljust(144, b"\0"), 140)  # it may be torn
    return content[144 + length :]


def _is_whole(world: World, path: str, key: Key, content: bytes) -> bool:
    return data_set(content) in world.pacs.sent[key] or world.theirs.get(path) == content


def _nothing_foreign(world: World, files: dict[str, bytes]) -> None:
    for path, study, key, content in final_files(files):
        if study not in world.history.studies or ((study, *key) not in world.pacs.ever and not world.pacs.sent[key]):
            world.finding("stored though it is not meant", path)
        elif not meant(world, key, world.classes) or (
            world.classes is not None and (found := class_of(data_set(content))) and found not in world.classes
        ):
            world.finding("stored though the query does not mean it", path)


def meant(world: World, key: Key, classes: Collection[str] | None) -> bool:
    """Whether the query means an instance of the study, in these classes; what was never there may be meant."""
    query, known = world.history.query, world.pacs.known.get(key)
    if query.get("SeriesInstanceUID", key[0]) != key[0] or query.get("SOPInstanceUID", key[1]) != key[1]:
        return False
    if known is None:
        return "Modality" not in query or any(
            series == key[0] and i.modality == query["Modality"] for (series, _), i in world.pacs.known.items()
        )
    return query.get("Modality", known.modality) == known.modality and (classes is None or known.sop_class in classes)


def class_of(data: bytes) -> str:
    """The SOP Class UID that a data set in little endian names; empty where it is torn off."""
    at = data.find(b"\x08\x00\x16\x00", 0, 100)
    if at < 0:
        return ""
    (length,) = struct.unpack_from("<H", data, at + (6 if data[at + 4 : at + 6] == b"UI" else 4))
    return data[at + 8 : at + 8 + length].decode("latin-1").strip("\0")


def _nothing_changed(world: World, run: Played, files: dict[str, bytes]) -> None:
    """What was whole under a final name stays as it was, or is replaced by another whole one where that is asked for.

    What was not synced before this run is not there any more where power was lost in it.
    """
    cut = any(fault.ends == "power" for _, _, fault in run.met)
    for path, _, key, content in final_files(run.lasting if cut else run.before):
        if files.get(path) == content or not _is_whole(world, path, key, content):
            continue
        if data_set(content) in world.pacs.truncated and (
            _records_lost(world)
            or any(one.killed or _left_unrecorded(one) for one in world.runs)
            or run.run.options.get("checksum", "") is None
        ):
            continue  # no record that is left need say that it came so
        if world.theirs.get(path) == content and any(
            len(cut) == len(data_set(content)) for cut in world.pacs.truncated
        ):
            continue  # somebody wrote over a truncated one: nothing says that this came so
        if world.place.node is not None and (path not in run.confirmed or path in world.theirs):
            continue  # nobody knew, or could see, that the node has it, or what
        if path not in files:
            world.finding("lost", path)
        elif run.run.options.get("on_conflict") != "replace" or not _is_whole(world, path, key, files[path]):
            world.finding("changed", path)
        else:
            mark("replaced")


def _nothing_torn(world: World, run: Played, files: dict[str, bytes]) -> None:
    if any(fault.ends == "power" for _, _, fault in run.met):
        return
    for path, _, key, content in final_files(files):
        if run.before.get(path) != content and not _is_whole(world, path, key, content):
            world.finding("torn under a final name", path, len(content))


def _nothing_left_behind(world: World, run: Played, files: dict[str, bytes]) -> None:
    if any(operation in ("unlink", "close") for operation, _, _ in run.met):
        return
    for path in files:
        name = path.rpartition("/")[2]
        if path not in run.before and (name.endswith((".part", ".lock"))):
            world.finding("left behind", path)


# --- what was said ---------------------------------------------------------------------------------


def _numbers(world: World, run: Played) -> None:
    result = run.result
    assert result is not None
    if result.completed + result.failed != result.total:
        world.finding("numbers do not add up", result.total, result.completed, result.failed)
    if any(row["state"] is None for row in run.rows):
        world.finding("a row without a state")
    if result.verdict == "complete" and result.completed != result.total:
        world.finding("complete, and not all of it", result.total, result.completed)
    for error in result.errors:
        if "nexpected" in str(error):
            world.finding("an error that nobody expected", error)


def _has_rows(world: World, run: Played, files: dict[str, bytes]) -> None:
    """Whatever ended a run, what it stored has a row, of each of several studies."""
    if len(files) == len(run.before) and files.keys() == run.before.keys():
        return
    if run.beside is not None or (world.place.node is not None and (run.met or run.run.node or run.cancels > 1)):
        return  # the other run may have stored it, or a node have taken what it never answered, or was heard to
    named = {key_of(row) for row in run.rows}
    for path, _, key, _ in final_files(files):
        if path not in run.before and key not in named:
            world.finding("stored, and no row of it", path)


def _mark_two(result: Result) -> None:
    """Take note of what became of two studies."""
    mark("get: of two studies")
    for first, second in itertools.pairwise(result.studies):
        if first.completed and second.verdict == "failed":
            mark("a failure before the second of two studies")


def _second_list(world: World, run: Played) -> None:
    """Where all is held and the second list was not had, nothing is proven, and it may be tried again; it says when."""
    result = run.result
    assert result is not None
    if all(row["state"] not in NOT_HELD for row in run.rows):
        for study in result.studies:
            if study.expected and study.verdict in ("partial", "failed") and study.reason != "still_growing":
                world.finding("all that is listed is held, and it is not said so", study.verdict, study.reason)
    unproven = any(study.reason == "list_not_repeated" for study in result.studies)
    if unproven:
        mark("a second list was not had")
        if run.hours_over:
            mark("a second list was not had: the hours are over")
    if unproven and result.verdict == "unverified" and not result.transient:
        world.finding("a second list was not had, and trying again is of no use")
    waits = any(study.reason == "window" for study in result.studies)
    if waits:
        mark("the hours are over")
        if len(result.studies) > 1 and any(study.reason != "window" for study in result.studies):
            mark("the hours are over in one of two studies")
    if (waits or (unproven and run.hours_over)) and (result.resume_at != HOURS_BEGIN or not result.transient):
        world.finding("the hours are over, and when it may go on is not said", result.verdict, result.reason)
    if result.resume_at is not None and not run.hours_over:
        world.finding("it is to wait for hours that are not over", result.resume_at)


def _truncated(world: World, run: Played, files: dict[str, bytes]) -> None:
    """The row of a data set whose end is missing says so, in the run that took it and in those after it."""
    if not world.pacs.truncated or (world.place.node is not None and any(one.met for one in world.runs)):
        return  # or no record that is left need say so: a node has taken what a run could not record
    for row in run.rows:
        path = path_of(row)
        if _keeps_another(world, run, path, key_of(row)):
            continue
        if row["state"] in HELD and path in files and path not in world.theirs:
            cut = data_set(files[path]) in world.pacs.truncated
            mark_of = f"truncated: {row['state']}"
            if cut:
                mark(mark_of)
            if cut and row["reason"] is None:
                world.finding("truncated, and its row does not say so", row["state"], path)
            elif not cut and row["reason"] == "truncated_dataset" and run.run.options.get("checksum", "") is not None:
                world.finding("whole, and its row calls it truncated", row["state"], path)


def _keeps_another(world: World, run: Played, path: str, key: Key) -> bool:
    """Whether a node says that it took a data set, and keeps the one that it had, of this run or an earlier one."""
    node = world.place.node
    return node is not None and node.again == "keeps" and (path in run.before or len(set(world.pacs.sent[key])) > 1)


def _may_be_replaced(world: World, run: Played, trait: str) -> bool:
    """Whether a run beside may put its own in place of what this one took, and may not have synced it yet.

    By its option, or where a trait of the destination says that it cannot tell whether there is something.
    """
    if run.beside is None:
        return False
    return run.beside.run.options.get("on_conflict") == "replace" or trait in world.history.traits


def _at_once(world: World, run: Played, beside: Played) -> None:
    """Another run of the same retrieval costs this one nothing: what it has on its way is not cleaned up."""
    if beside.killed or world.runs[-1].number == run.number:
        left = [path for path in world.place.files() if path.endswith((".part", ".lock")) and path not in run.before]
        if left and not beside.killed and not run.met and not beside.met:
            world.finding("left behind", left)
    # A disk that fails says so to whoever has the file or the folder open.
    failing = any(operation.startswith("sync") for operation, _, _ in beside.met)
    quiet = not (run.met or run.run.ill or run.run.breaks or run.changed or failing)
    if quiet:
        mark("get: two at once, and nothing goes wrong in one")
        if beside.killed:
            mark("get: two at once, and one is killed")
    for row in run.rows:
        if quiet and row["state"] == "failed" and row["reason"] == "destination_error":
            world.finding("another run at the same time costs an instance", row)


def _cancels(world: World, run: Played) -> None:
    """A cancel is spent by one call: the one that is on, or the next one."""
    refused = run.refused is not None or (run.result is not None and run.result.reason == "nothing_asked")
    if run.verdict == "cancelled" and not run.cancels:
        world.finding("cancelled, and nobody asked for it")
    if 0 in run.run.cancels and run.verdict != "cancelled" and not refused:
        world.finding("a cancel between two calls is lost", run.verdict)
    if run.cancels and world.pacs.associations > run.opened + (0 not in run.run.cancels):
        world.finding("it goes on after a cancel", run.opened, world.pacs.associations)


def _path(world: World, key: Key) -> str:
    """Where an instance of these studies lies under its final name."""
    return f"{ROOT}/{world.study_of(key)}/{key[0]}/{key[1]}.dcm"


def _complete(world: World, run: Played, files: dict[str, bytes]) -> None:
    """All that the last two lists name, and all that there is, is held, durable, as it was sent first."""
    finds = [find for find in world.pacs.finds if find.run == run.number]
    classes = run.run.options.get("sop_classes")
    wanted: set[Key] = set()
    for study in world.history.studies if run.asked is None else sorted(set(run.asked.values())):
        lists = [named for named, whole in listed(finds, study).values() if whole]
        if len(lists) < 2:
            world.finding("complete without a second list", len(lists))
            return
        if run.asked is None:
            wanted |= {key for named in lists[-2:] for key in named if meant(world, key, classes)}
    wanted |= {key for key in run.asked or () if meant(world, key, classes)}
    if classes is not None:
        wanted -= _of_other_classes(finds, classes)
    if (
        run.asked is None
        and not run.changed
        and not _lists_lie(run)
        and not (world.history.habits.cap and _cut_unseen(world, finds))
    ):
        wanted |= {key for key in _listable(world) if meant(world, key, classes)}
    if any(not is_uid(sop) or not is_uid(series) for series, sop in wanted):
        world.finding("complete, and a listed UID is malformed", wanted)
    node = world.place.node
    if node is not None and node.down and wanted:
        world.finding("complete, and the destination was not reached")
    durable = run.after[1] if run.after is not None else world.place.durable()
    durable = durable if run.run.options.get("durable", True) else files
    for series, sop in sorted(wanted):
        path = _path(world, (series, sop))
        if node is not None and path in world.deleted and node.find == "no":
            continue  # our records of its answers stand
        if node is not None and node.again == "keeps" and path not in files and sop in node.held:
            continue  # it said that it took it, and kept one of another series that no record of ours names
        if path not in files:
            world.finding("complete, and not there", path)
        elif durable.get(path) != files[path] and not _may_be_replaced(world, run, "renames"):
            world.finding("complete, and not durable", path)
        elif not _is_whole(world, path, (series, sop), files[path]):
            if not (run.run.options.get("adopt") and _torn_unseen(world, run, path, (series, sop))):
                world.finding("complete, and other bytes than were sent", path)
        elif (
            _is_theirs(world, path, (series, sop), files[path])
            and _is_looked_at(world, run)
            and not (run.run.options.get("adopt") and _records_lost(world))  # no record is left that says otherwise
        ):
            world.finding("complete, and somebody else's file", path)
    drained = {key_of(row) for row in run.rows if row["reason"] == "other_transfer_syntax"}
    for key, data in _taken(world, run):
        if key in drained:
            continue  # in another transfer syntax: said, and not compared
        path = _path(world, key)
        if _may_be_replaced(world, run, "conditions"):
            continue  # nothing tells this one
        if node is not None and (_keeps_another(world, run, path, key) or path in world.theirs):
            continue  # or somebody put his there, which nothing shows
        if key in wanted and path in files and data_set(files[path]) != data:
            world.finding("complete, and other bytes came", path)


def _taken(world: World, run: Played) -> Iterator[tuple[Key, bytes]]:
    """What the PACS was told that we took in a run, but for what was asked for once more to confirm a list."""
    held = {key_of(row) for row in run.rows if row["state"] == "held"}
    for get in world.pacs.gets:
        if get.run != run.number:
            continue
        for key, data in get.taken:
            if get.level == "IMAGE" or key not in held:
                yield key, data
        held |= {key for key, _ in get.taken}


def _of_other_classes(finds: list[Find], classes: Collection[str]) -> set[Key]:
    """What lists say is of a class that is not wanted."""
    return {
        (find.query.get(SERIES, ""), row[SOP])
        for find in finds
        for row in find.rows
        if find.level == "IMAGE" and SOP in row and row.get(SOP_CLASS, "") not in ("", *classes)
    }


def _is_theirs(world: World, path: str, key: Key, content: bytes) -> bool:
    """Whether somebody else wrote it: not where he put back what there was, as with each second of his changes."""
    return content == world.theirs.get(path) and data_set(content) not in world.pacs.sent[key]


def _is_looked_at(world: World, run: Played) -> bool:
    """Whether a run sees that somebody has put other bytes of the same size under a name: by digest, or by ETag."""
    if world.place.node is not None:
        return False
    if world.history.destination == "bucket":
        return bool(world.history.traits.get("etags", True))
    return run.run.options.get("verify_held") == "digest"


def _torn_unseen(world: World, run: Played, path: str, key: Key) -> bool:
    """Whether nobody can see that a file is torn.

    A power cut took pages out of the middle of one that was not confirmed, or less than a block of one that was cut
    short besides; or it has no file meta information, and so may be anything.
    """
    content = data_set(world.place.files().get(path, b""))
    if not run.run.options.get("store_with_file_meta", True) or (world.place.cuts > 0 and path in world.torn):
        return world.place.cuts > 0 or path in world.torn
    padded = len(content.rstrip(b"\0")) < len(content)  # less than a block of zeros, as somebody may put behind his
    return world.place.cuts > 0 and (
        padded or any(len(content) == len(sent) != 0 or _little_lost(content, sent) for sent in world.pacs.sent[key])
    )


def _little_lost(content: bytes, sent: bytes) -> bool:
    """Whether the zeros where a file ceases to be what was sent are fewer than the block that shows that it is torn."""
    at = next((n for n, (one, other) in enumerate(zip(content, sent, strict=False)) if one != other), len(content))
    zeros = len(content) - at - len(content[at:].lstrip(b"\0"))
    return 0 < zeros < PAGE


def _lists_lie(run: Played) -> bool:
    return any("find" in MODE_CLASSES[mode].stages for _, mode, _ in run.run.ill)


def _listable(world: World) -> dict[Key, Instance]:
    return {key: i for key, i in world.pacs.held().items() if key not in world.pacs.unlisted}


def _cut_unseen(world: World, finds: list[Find]) -> bool:
    """Whether a list was cut, and nothing that is known of lists shows it.

    A count of all series says nothing of a list of those of one modality.
    """
    if "list_limit" in world.runs[-1].run.options:
        return False
    return any(find.cut and (world.history.habits.counts == "none" or find.query.get(MODALITY)) for find in finds)


def _not_asked_again(world: World, run: Played) -> None:
    """What an earlier run confirmed, and nobody touched, is not asked for by its UID."""
    if run.run.options.get("resume") is False or not run.number > 1:
        return
    if any(operation in (*_LOOKS, "scan", "open_folder") for operation, _, _ in run.met):
        return
    node = world.place.node
    if node is not None and (
        node.find in ("fails", "short") or run.run.node or run.met or world.runs[run.number - 2].met
    ):
        return  # it does not tell what it holds, or our records do not
    if _records_lost(world):
        return
    if world.history.destination == "bucket" and _left_unrecorded(world.runs[run.number - 2]):
        return  # those that could not be put were nowhere else
    confirmed = Counter[Key]()
    for row in _confirmed(world, run):
        confirmed[row] += 1
    for get in world.pacs.gets:
        if get.run == run.number and get.level == "IMAGE":
            for sop in get.uids:
                if not confirmed[get.series, sop]:
                    continue
                if (get.series, sop) in _ended_by_each_other(run):
                    mark("two at once, each of which ended the other's record")
                else:
                    world.finding("asked for again", get.series, sop)
        elif get.run == run.number and get.level != "IMAGE" and any(confirmed[key] for key in get.sent):
            mark("asked for again as a whole series or study")


def _ended_by_each_other(run: Played) -> set[Key]:
    """Instances of which two runs, begun within one second, each ended what the other had recorded.

    Each found the other's file unconfirmed. Nothing is recorded of it any more, and so it is fetched once more.
    """
    ended: dict[Key, dict[str, set[str]]] = {}
    for path, content in run.before.items():
        if "/.ledger/" in path:
            name = path.rpartition("/")[2].partition(".")[0]
            for line in content.splitlines():
                if b'"dropped"' in line:
                    with suppress(ValueError):  # a torn line
                        entry = json.loads(line)
                        runs = ended.setdefault((entry["series"], entry["uid"]), {})
                        runs.setdefault(name, set()).update(entry.get("runs", ()))
    return {key for key, runs in ended.items() if any(named & runs.keys() for named in runs.values())}


def _left_unrecorded(run: Played) -> bool:
    """Whether a run could not write or sync its ledger: what it has recorded may be gone.

    One that is to end at once leaves it, where that may take long.
    """
    return (
        _sync_failed(run)
        or run.cancels > 1
        or (run.result is not None and any("ledger" in said["error"] for said in run.result.errors))
    )


def _sync_failed(run: Played) -> bool:
    return any(operation == "sync" and fault.error is not None for operation, _, fault in run.met)


def _records_lost(world: World) -> bool:
    """Whether the records of a run that did not or could not sync its ledger are gone; those of one that was killed
    count once the next run has synced them."""
    return (world.place.cuts > 0 or "between: evict" in in_history) and any(
        _left_unrecorded(one) or not one.run.options.get("durable", True) for one in world.runs
    )


def _confirmed(world: World, run: Played) -> Iterator[Key]:
    last = next((r for r in reversed(world.runs[: run.number - 1]) if not r.killed), None)
    if last is None or last.number != run.number - 1:
        return
    if not last.run.options.get("durable", True):
        if world.place.cuts:
            return  # nor were its records synced
        if last.run.options.get("checksum", "") is None:
            return  # nothing says that what was taken is still what it was
        if "between: read-only" in in_history:
            return  # what was only taken is written once more before it counts, and may not be
    in_doubt = (
        (run.run.verb == "manifest" and any(row["reason"] in CONTENT_IN_DOUBT for row in last.rows))
        or run.run.options.get("verify_held") == "digest"
        or _sync_failed(run)  # that of the ledgers, and so what they say to be durable is not
    )
    if in_doubt and any(one.run.options.get("checksum", "") is None for one in world.runs[: run.number - 1]):
        return  # what is held is looked at by its digest, and has none
    now = {key: (path, content) for path, _, key, content in final_files(run.before)}
    for row in last.rows:
        key = key_of(row)
        if row["state"] in HELD and key in now:
            path, content = now[key]
            if path in world.read_only and (_sync_failed(run) or not last.run.options.get("durable", True)):
                continue  # it cannot be written once more, and so not be made durable
            if _is_whole(world, path, key, content) and path not in world.theirs:
                yield key


# --- the end ---------------------------------------------------------------------------------------


def has_ended(world: World, run: Played) -> bool:
    """Whether a run in which all was well ended in ``complete``, or in a verdict that names what cannot be had."""
    there = [key for key in _listable(world) if meant(world, key, run.run.options.get("sop_classes"))]
    if run.result is None:
        return run.refused is not None and (not there or _says_nothing(world))
    verdict, habits = run.result.verdict, world.history.habits
    if verdict == "complete":
        return True
    if verdict == "empty":
        if habits.cap and habits.matching == "ignores":
            return True  # it answers any query with the same few rows
        return {world.study_of(key) for key in there} < {*world.history.studies}
    malformed = {key for key in there if not (is_uid(key[0]) and is_uid(key[1]))}
    if verdict == "unverified":
        # An answer of as many rows as the option names may be cut, and a PACS that ignores keys gives no other.
        limited = bool(habits.cap) or "list_limit" in run.run.options
        # What is not listed comes again each night with what is asked for, where no list tells its class.
        comes = habits.gets == "series" and not habits.classes and "sop_classes" in run.run.options
        return habits.counts == "high" or limited or bool(malformed) or (comes and bool(world.pacs.unlisted))
    if verdict == "failed" and run.result.reason == "invalid_query" and world.history.model == "PatientRoot":
        return True  # it shows no row of a study that was named, and so not whose it is
    for row in run.rows:
        key = key_of(row)
        match row["state"]:
            case "conflict" if world.place.node is not None and _two_of(world, key[1]):
                mark("node: two instances of one UID")
            case "conflict":
                if len(set(world.pacs.sent[key])) < 2 and path_of(row) not in world.theirs:
                    if not _torn_unseen(world, run, path_of(row), key):
                        return False
                    mark("torn, and whole to look at: a conflict")
            case "missing" if row["reason"] == "uid_mismatch" and habits.cap and _two_of(world, key[1]):
                mark("its other series was cut off the list: what it sends names another than the list")
            case "missing":
                if row["reason"] != "bad_uid":
                    return False
            case "failed" if _never_confirmed(world, run, row):
                mark("node: a duplicate of what it never confirmed")
            case "failed":
                known = world.pacs.known.get(key)
                if world.place.node is None or known is None or world.place.node.refuses != known.sop_class:
                    return False
    return bool(run.rows)


def _two_of(world: World, sop: str) -> bool:
    """Whether two instances of one SOP Instance UID were there, of which a node holds one."""
    return sum(uid == sop for _, uid in world.pacs.known) > 1


def _never_confirmed(world: World, run: Played, row: Mapping[str, Any]) -> bool:
    """Whether a node refuses as a duplicate what it has, and no run was told that it has."""
    node = world.place.node
    return node is not None and node.again == "refuses" and path_of(row) not in run.confirmed


def _says_nothing(world: World) -> bool:
    """Whether the PACS leaves a key of the query out, or empty, in all its answers."""
    return world.history.habits.matching in ("leaves out", "empties") and any(
        not keyword.endswith("InstanceUID") for keyword in world.history.query
    )


def agrees(world: World, run: Played, exit_code: int) -> None:
    """``verify`` says 0 exactly where the get after it is ``complete`` and has nothing to fetch.

    A node has to be reached, and to tell what it holds: our records of what it took are none of its list, nor does that
    tell other bytes, as a source may send of what it was not asked for again.
    """
    node = world.place.node
    if node is not None and (node.down or node.find in ("no", "fails")):
        if exit_code != (1 if node.down else 4):
            world.finding(f"verify says {exit_code}, and the node does not tell", node.find, node.down)
        return
    # Where nothing else confirms a list, not even what a first C-GET counts, a get has all of it sent again by a
    # second one; verify does not.
    gets = Counter((get.level, get.series) for get in world.pacs.gets if get.run == run.number)
    again = any(number > 1 for number in gets.values())
    nothing = run.verdict == "complete" and not again and all(row["state"] in ("held", "withdrawn") for row in run.rows)
    unknown = all(
        row["state"] in ("held", "withdrawn", "unexpected")
        or (
            row["state"] == "conflict"
            and (node is not None or path_of(row) not in world.confirmed or _records_lost(world))
        )
        or (row["state"] in ("stored", "forwarded") and path_of(row) in run.before)
        or (row["state"] == "failed" and _never_confirmed(world, run, row))
        for row in run.rows
    )
    if exit_code == 0 and not nothing and unknown:
        mark("verify: a whole file that no record names")
        return
    if exit_code == 3 and nothing and world.theirs and not _is_looked_at(world, run):
        mark("verify: it sees what a get by size does not")
        return
    if nothing != (exit_code == 0):
        world.finding(f"verify says {exit_code}", run.verdict, run.rows)
