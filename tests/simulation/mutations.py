"""Mendings taken out: for each, a history that fails without it, found from fresh seeds and made small.

A mutation is a text in the source of one function that is replaced by another one. ``python -m
tests.simulation.mutations NAME --seeds 0:5000 [--keep]`` looks for a seed that shows it, and keeps the smallest history
under ``seeds/NAME.json``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.simulation import codecs
from tests.simulation.history import History, history_of
from tests.simulation.shrink import failure, smallest

SEEDS = Path(__file__).parent / "seeds"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mending taken out.

    Attributes
    ----------
    where : str
        ``module:function`` or ``module:Class.method``, below the package.
    old, new : str
        What its source says, and what it says instead.
    shows : str
        What is then wrong.
    """

    where: str
    old: str
    new: str
    shows: str


MUTATIONS: Mapping[str, Mutation] = {
    "adopted_file_not_written_again": Mutation(
        "storage.files:write_again", "fd = disk.open(path, CHANGE, folder)", "return True", "complete, and not durable"
    ),
    "a_file_that_may_not_be_written_again_is_synced_as_it_is": Mutation(
        "storage.files:write_again", "return False", "return True", "complete, and not durable"
    ),
    "a_ledger_whose_sync_failed_stays_open": Mutation(
        "sinks.filesystem:_Study.close",
        "unclosed = first_failure",
        "unclosed = failed or first_failure",
        "left open or locked",
    ),
    "a_quick_verify_passes_over_etags": Mutation("verify:_Verify._content", "and same:", ":", "verify says 0"),
    "zeros_in_a_ledger_are_damage": Mutation(
        "sinks.ledger:_entries", 'or b"\\0" in line', "", "it never comes to an end"
    ),
    "lock_kept_by_a_study_that_failed_to_open": Mutation(
        "sinks.filesystem:_Study.__init__", "self._give_back_lock()", "pass", "left open or locked"
    ),
    "unreadable_file_escapes_raw": Mutation(
        "sinks.filesystem:FilesystemSink.inventory",
        'raise sink_error(error, f"The destination cannot tell whether it holds instance {sop}") from error',
        "raise",
        "an error that nobody expected",
    ),
    "page_of_zeros_counts_as_whole": Mutation(
        "sinks.objects:looks_whole",
        "any(head[:PREAMBLE])",
        "any(head)",
        "it never comes to an end",
    ),
    "records_of_a_file_that_is_gone_count_for_the_next": Mutation(
        "sinks.filesystem:_FileWriter._place",
        "anew=self._sink.recorded(instance.study).may_count(instance.key)",
        "anew=False",
        "complete, and other bytes than were sent",
    ),
    "malformed_uids_are_skipped": Mutation(
        "engine.listing:Listing.keep_bad",
        "self.bad.setdefault(row.key, row)",
        "pass",
        "complete, and a listed UID is malformed",
    ),
    "counts_above_a_list_are_nothing": Mutation(
        "engine.verdict:contradicted", "lists.contradicted() or any(", "any(", "complete, and not there"
    ),
    "a_list_as_long_as_its_limit_is_whole": Mutation(
        "lists.whole:Below.doubtful",
        "return self.count != self.listed and cuts.may_be_cut(level, self.rows)",
        "return False",
        "complete, and not there",
    ),
    "rows_that_contradict_a_key_are_taken": Mutation(
        "lists.matching:Matcher.contradiction", "absent = None", "return None", "stored though it is not meant"
    ),
    "a_whole_file_of_other_bytes_counts_as_torn": Mutation(
        "sinks.filesystem:_FileWriter._is_torn", "return not objects", "return True or not objects", "changed"
    ),
    "what_is_not_synced_is_recorded_as_durable": Mutation(
        "sinks.filesystem:FilesystemSink._synced", "if self.options.durable else ()", "", "complete, and not durable"
    ),
    "a_folder_is_not_synced": Mutation(
        "sinks.filesystem:FilesystemSink._synced",
        "self.disk.sync(item.folder.fd)",
        "pass",
        "complete, and not durable",
    ),
    "metadata_of_an_object_prove_it": Mutation(
        "sinks.s3_objects:proves_itself",
        "base64.b64decode(checked, validate=True) == bytes.fromhex(said)",
        "True",
        "complete, and somebody else's file",
    ),
    "two_series_of_one_uid_are_one_instance": Mutation(
        "engine.listing:_Lister._take_row",
        "if not scope.names(series.uid, sop):",
        "if not scope.names(series.uid, sop) or any(x == sop and s != series.uid for s, x in listing.instances):",
        "complete, and not there",
    ),
    "the_patient_id_is_left_out_below_the_study": Mutation(
        "engine.listing:_Lister._keys",
        "self._scope.patient_keys() if self._finder.by_patient else {}",
        "{}",
        "it never comes to an end",
    ),
    "the_patient_id_is_left_out_of_a_get": Mutation(
        "engine.requests:Request.keys", "**scope.keys_above(query_model),", "", "it never comes to an end"
    ),
    "another_class_is_stored_once_it_is_sent": Mutation(
        "engine.receiver:Receiver._identify",
        "if self._state.sop_classes is not None and request.sop_class not in self._state.sop_classes:",
        "if False:",
        "stored though the query does not mean it",
    ),
    "counts_are_held_against_the_narrowed_list": Mutation(
        "engine.listing:Listing.lists",
        "Below(one.rows, one.listed, one.related_instances, self.images_filtered)",
        "Below(one.rows, sum(of == one.uid for of, _ in self.instances), one.related_instances, self.images_filtered)",
        "it never comes to an end",
    ),
    "a_conflict_after_the_answer_marks_a_record_of_its_own": Mutation(
        "engine.state:StudyState.confirm",
        'if not conflict and (record is not instance or record.state == "conflict"):',
        'if record is not instance or record.state == "conflict":',
        "complete, and other bytes came",
    ),
    "what_a_manifest_says_is_held_counts": Mutation(
        "engine.retry:asked_by",
        "if state in OUTSIDE_LIST or",
        'if state in (*OUTSIDE_LIST, "stored", "held") or',
        "nothing is asked for, and the manifest lists something",
    ),
    "the_second_of_two_in_one_run_takes_the_place_of_the_first": Mutation(
        "sinks.filesystem:_FileWriter._meet_first",
        'self._sink.options.on_conflict == "replace" and not placed',
        'self._sink.options.on_conflict == "replace"',
        "complete, and other bytes came",
    ),
    "what_replaces_another_is_not_synced_before": Mutation(
        "sinks.filesystem:_FileWriter._put_over", "self._sync_data()", "pass", "changed"
    ),
    "a_file_whose_sync_failed_came_again_in_the_same_run": Mutation(
        "sinks.filesystem:_FileWriter._is_unsure",
        "return self._after > 0",
        "return False",
        "complete, and not durable",
    ),
    "a_file_whose_sync_failed_in_a_run_beside": Mutation(
        "sinks.filesystem:_FileWriter._is_unsure",
        "return key not in recorded.durable",
        "return recorded.may_count(key) and key not in recorded.durable",
        "complete, and not durable",
    ),
    "a_node_that_cannot_be_reached_confirms_what_it_was_sent": Mutation(
        "sinks.forward:ForwardSink._listed",
        "raise lost from error",
        "return None",
        "complete, and the destination was not reached",
    ),
    "what_the_node_lists_is_sent_again_in_another_series": Mutation(
        "sinks.holdings:NodeHoldings.inventory",
        "for x in held.values():",
        "for x in [x for x in held.values() if x.bytes is not None]:",
        "complete, and not there",
    ),
    "a_list_that_is_contradicted_proves_something_to_be_gone": Mutation(
        "lists.instances:prove_absent", "if lists.contradicted():", "if False:", "changed"
    ),
    "another_data_set_takes_the_place_of_what_a_node_has": Mutation(
        "sinks.holdings:NodeHoldings.replaces", "return not all(", "return False and (", "changed"
    ),
    "a_duplicate_is_taken_for_ours": Mutation(
        "sinks.forward:ForwardSink.answered",
        "known = self._holdings.took_before(instance)",
        "known = True",
        "complete, and other bytes came",
    ),
    "the_answer_of_a_node_is_not_looked_at": Mutation(
        "sinks.forward:ForwardSink.answered",
        'if outcome in ("busy", "refused"):',
        "if False:",
        "complete, and not there",
    ),
    "a_store_that_cannot_close_its_ledger_ends_unexpectedly": Mutation(
        "store:_Run._closed",
        "except DicomGetError as error:",
        "except ZeroDivisionError as error:",
        "an error of a store that nobody expected",
    ),
    "one_list_is_enough": Mutation(
        "engine.verdict:_verdict", "if state.lists_agree else", "if True else", "complete without a second list"
    ),
    "a_data_set_that_is_truncated_has_no_remark": Mutation(
        "engine.receiver:Receiver._contradicted",
        "self._instance.truncated = not self._walk.whole",
        "pass",
        "truncated, and its row does not say so",
    ),
    "a_data_set_that_was_truncated_has_no_remark_later": Mutation(
        "records:Instance.adopt",
        "self.truncated, self.other_patient = stored.truncated, stored.other_patient",
        "pass",
        "truncated, and its row does not say so",
    ),
    "what_is_held_without_a_second_list_is_partial": Mutation(
        "engine.verdict:_verdict",
        '(UNVERIFIED, "list_not_repeated")',
        '(PARTIAL, state.stop_reason or "list_not_repeated")',
        "all that is listed is held, and it is not said so",
    ),
    "a_second_list_that_was_not_had_will_never_be": Mutation(
        "engine.report:_may_pass",
        "any_transient(end.rows()) or passing or any(map(is_transient, reasons))",
        "any_transient(end.rows())",
        "a second list was not had, and trying again is of no use",
    ),
    "hours_that_are_over_count_in_a_partial_result_alone": Mutation(
        "engine.report:End.unproven",
        'any(one.reason == "list_not_repeated" for one in self.numbers)',
        "False",
        "the hours are over, and when it may go on is not said",
    ),
    "hours_that_are_over_are_read_of_the_first_study": Mutation(
        "engine.report:End.waits",
        'any(state.stop_reason == "window" for state in self.states)',
        'any(state.stop_reason == "window" for state in self.states[:1])',
        "the hours are over, and when it may go on is not said",
    ),
    "a_failure_before_the_second_study_costs_the_rows_of_the_first": Mutation(
        "engine.study:run_studies",
        "except DicomGetError as error:\n                state.errors.append(error)",
        "except DicomGetError as error:\n                states.clear()\n                raise",
        "stored, and no row of it",
    ),
    "a_destination_that_cannot_be_closed_ends_unexpectedly": Mutation(
        "getscu:_close",
        "except DicomGetError as error:",
        "except ZeroDivisionError as error:",
        "an error that nobody expected",
    ),
    "a_manifest_that_cannot_be_written_escapes_raw": Mutation(
        "engine.ending:write_manifest",
        "except DicomGetError as error:\n        problem = error",
        "except DicomGetError as error:\n        raise",
        "raised SinkError",
    ),
    "what_broke_off_and_is_not_listed_is_a_row": Mutation(
        "engine.state:StudyState.conclude",
        "if self.instances[key].state is None:",
        "if False:",
        "a row without a state",
    ),
    "an_object_that_came_truncated_counts_as_torn": Mutation(
        "sinks.s3:S3Sink._store",
        "if not existing.whole and self._is_recorded(upload.instance, existing):",
        "if False:",
        "changed",
    ),
    "a_run_that_is_alive_is_cleaned_up": Mutation(
        "sinks.locks:_if_dead",
        "dead = not old and disk.lock(fd, wait=False)",
        "dead = True",
        "another run at the same time costs an instance",
    ),
    "a_client_is_cancelled_for_good": Mutation(
        "net.association:Cancels.call",
        "token = CancelToken(operation)",
        "token = self.__dict__.setdefault('token', CancelToken(operation))",
        "cancelled, and nobody asked for it",
    ),
    "a_cancel_between_two_calls_is_lost": Mutation(
        "net.association:Cancels.call", "self._hand_on()", "self._asked.clear()", "a cancel between two calls is lost"
    ),
    "a_cancel_goes_to_calls_that_have_ended": Mutation(
        "net.association:Cancels.call", "self._running.remove(token)", "pass", "a cancel between two calls is lost"
    ),
}


@contextmanager
def taken_out(name: str, mutation: Mutation | None = None) -> Iterator[Mutation]:
    """Take a mending out for a while: one of :data:`MUTATIONS` by its name, or another one."""
    mutation = mutation or MUTATIONS[name]
    module_name, _, path = mutation.where.partition(":")
    module = importlib.import_module(f"airflow_dicom_get.{module_name}")
    assert not any(module is where and path == known for where, known, _ in codecs.CODECS), f"{path} is remembered"
    *owners, last = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    real = inspect.getattr_static(owner, last)
    whole: Any = real.fget if isinstance(real, property) else getattr(owner, last)
    source = textwrap.dedent(inspect.getsource(whole))
    assert mutation.old in source, f"{name}: {mutation.where} no longer says {mutation.old!r}"
    scope: dict[str, Any] = {}
    exec(compile(source.replace(mutation.old, mutation.new), f"<{name}>", "exec"), module.__dict__, scope)
    setattr(owner, last, scope[last])
    codecs.forget()
    try:
        yield mutation
    finally:
        setattr(owner, last, real)
        codecs.forget()


def shown(name: str, history: History) -> str | None:
    """What is wrong with a history without a mending, where nothing is wrong with it."""
    with taken_out(name) as mutation:
        wrong = failure(history)
    return wrong if wrong == mutation.shows and failure(history) is None else None


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MUTATIONS))
    parser.add_argument("--seeds", default="0:5000", metavar="FROM:TO")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    unfound = 0
    for name in given.names:
        seeds = range(*map(int, given.seeds.split(":")))
        found = next((seed for seed in seeds if shown(name, history_of(seed))), None)
        print(f"{name}: {'not found' if found is None else f'seed {found}'}", flush=True)
        unfound += found is None
        if found is not None and given.keep:
            small = smallest(history_of(found), partial(shown, name))
            (SEEDS / f"{name}.json").write_text(small.to_json())
    return bool(unfound)


if __name__ == "__main__":
    sys.exit(main())
