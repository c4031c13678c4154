"""Mendings of what one thread cannot show, taken out one at a time: a test with real threads, files and signals fails.

Locks and neighbours, late answers, calls that do not return, and several associations. How a call ends has its own
table in ``test_endings``; what the simulation shows is in ``tests/simulation/mutations.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutations import Mutation

FUNCTIONAL = "tests/functional"
STUCK = f"{FUNCTIONAL}/test_slow_destination.py::test_a_source_is_let_go_while_the_destination_is_stuck"

MENDINGS: dict[str, tuple[Mutation, str]] = {
    # --- never answered late, and a source is not held by a destination that is stuck ---
    "a late answer is given": (
        Mutation("engine.receiver:Receiver._hold", "if waited > limit:", "if False:", "an answer after the deadline"),
        "tests/unit/engine/test_receiver.py::test_no_answer_is_late",
    ),
    "a source waits for a destination that is stuck": (
        Mutation("engine.receiver:_attend", "association.abort()", "pass", "its association stays open"),
        f"{STUCK}[deadline-write]",
    ),
    "a cancel waits for a destination that is stuck": (
        Mutation("engine.receiver:_attend", "if cancel.reason is not None:", "if False:", "its association stays open"),
        f"{STUCK}[cancelled-take]",
    ),
    # --- cancels, signals ---
    "a bucket that does not answer keeps a run": (
        Mutation("net.association:CancelToken.hasten", "hasten()", "pass", "its requests are not ended"),
        f"{FUNCTIONAL}/test_endings.py::test_a_bucket_that_does_not_answer_does_not_keep_a_run[from the start-cancel]",
    ),
    # --- runs that share a destination ---
    "a run that is alive is cleaned up": (
        Mutation(
            "sinks.locks:_if_dead",
            "dead = not old and disk.lock(fd, wait=False)",
            "dead = True",
            "its temporary file is gone",
        ),
        f"{FUNCTIONAL}/test_neighbours.py::test_a_live_run_of_this_machine_is_left_alone",
    ),
    "a run of another machine is cleaned up at once": (
        Mutation("sinks.locks:_seen_here", "not holder or", "True or", "its temporary file is gone"),
        f"{FUNCTIONAL}/test_neighbours.py::test_what_a_run_of_another_machine_writes_stays_for_a_day",
    ),
    "files of other programs are cleaned up": (
        Mutation(
            "sinks.locks:clean_dead_runs",
            "_PART.fullmatch(part)",
            "re.fullmatch(r'.*?(?P<run>[0-9]*).part', part)",
            "a temporary file of another program is gone",
        ),
        f"{FUNCTIONAL}/test_neighbours.py::test_what_is_not_named_as_ours_stays",
    ),
    "a folder that another run removed is not made again": (
        Mutation(
            "sinks.filesystem:FilesystemSink.begin",
            "except FileNotFoundError:",
            "except ZeroDivisionError:",
            "instances of that series fail",
        ),
        f"{FUNCTIONAL}/test_neighbours.py::test_a_folder_that_another_run_found_empty_is_made_again",
    ),
    "nobody waits for a file that is written again": (
        Mutation(
            "storage.files:Disk.keep_others_out",
            "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)",
            "pass",
            "a change of somebody else is lost",
        ),
        f"{FUNCTIONAL}/test_neighbours.py::test_who_opens_a_file_that_is_written_again_waits",
    ),
    # --- several associations ---
    "two associations write one temporary file": (
        Mutation("sinks.filesystem:_FileWriter.__init__", ".{next(sink.writers)}.part", ".part", "one of them fails"),
        f"{FUNCTIONAL}/test_neighbours.py::test_two_writers_of_one_instance_in_one_run_do_not_touch_each_other",
    ),
    "two associations fill one row": (
        Mutation("engine.retrieval:Intake.claim", "return free", "return True", "the row says what the other one sent"),
        "tests/unit/engine/test_receiver.py::test_one_that_comes_on_two_associations_at_a_time_fills_one_record_once",
    ),
    "a series is lost with its association": (
        Mutation("engine.spread:_serve", "queue.append(one)", "pass", "a list of the study lacks it"),
        f"{FUNCTIONAL}/test_spread.py::test_an_association_that_is_lost_leaves_its_series_to_the_others",
    ),
    "hours that are over stop one association alone": (
        Mutation("engine.retrieval:Intake.stop", "self.retrieval.source.cancel.cancel(reason)", "pass", "others go on"),
        f"{FUNCTIONAL}/test_limits.py::test_a_window_that_closes_stops_all_associations_and_later_studies",
    ),
}

SCRIPT = """
import sys
import pytest
from tests.functional.test_mendings import MENDINGS
from tests.simulation.mutations import taken_out
mutation, test = MENDINGS[sys.argv[1]]
with taken_out(sys.argv[1], mutation):
    sys.exit(pytest.main(["-n0", "-q", "-x", "-p", "no:cacheprovider", test]))
"""


SLOW = frozenset(
    {
        "a source waits for a destination that is stuck",
        "a cancel waits for a destination that is stuck",
        "a bucket that does not answer keeps a run",
    }
)
"""Those that wait until a limit of their test is over."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MENDINGS)
def test_each_is_missed(name: str) -> None:
    if name in SLOW and "KILLS" not in os.environ:
        pytest.skip("it waits as long as what it leaves out would: make test-kills")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout
