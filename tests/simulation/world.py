"""A history played: the engine whole, between the models, in one thread.

:func:`play` gives what was wrong with it. What must hold is in :mod:`~tests.simulation.invariants`.
"""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any

from airflow_dicom_get import verify
from airflow_dicom_get.errors import DicomGetError, InvalidOption, InvalidQuery
from airflow_dicom_get.getscu import GetScu
from airflow_dicom_get.net import transport
from airflow_dicom_get.net.transcript import MemoryTranscript
from airflow_dicom_get.result import Result
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from airflow_dicom_get.testing.misbehaving.line import Line
from airflow_dicom_get.verify import Verification
from airflow_dicom_get.vocabulary import HELD, OUTSIDE_LIST
from tests.simulation.codecs import CODECS
from tests.simulation.destinations import DESTINATIONS, Destination, path_of
from tests.simulation.faults import Fault, Faults, Killed, Process
from tests.simulation.history import Between, History, Planned, Run
from tests.simulation.line import Network
from tests.simulation.loop import EPOCH, EndlessError, Loop, looped
from tests.simulation.manifests import PLAIN, plain_rows
from tests.simulation.marks import in_history, mark
from tests.simulation.node import DOWN, ModelNode
from tests.simulation.pacs import CHANGES, Change, Key, ModelPacs

NODE = "ANY-SCP@pacs.example:104"
DEADLINES = {"acse": 5, "find_response": 10, "next_object": 20, "idle": 10, "operation": 3600}
HOURS = "22:00-06:00"
IN_HOURS, AFTER_HOURS, HOURS_BEGIN = (
    datetime(2026, 1, day, hour, tzinfo=UTC) for day, hour in ((20, 23), (21, 7), (21, 22))
)
"""Of a PACS that has hours: two times of its day, in and after them, and when they begin again."""
PAUSE = 60.0
"""Seconds between two runs: the names of runs tell their order by whole seconds."""
_ASIDE = 0.15
"""Share of the calls of the disk before which another process goes on, where there is one."""
PARQUET = 40
"""Each so many-th history writes its manifests as Parquet."""


@dataclass(slots=True)
class Played:
    """What one run left."""

    number: int
    run: Run
    before: dict[str, bytes]
    """All files, as they were."""
    lasting: dict[str, bytes] = field(default_factory=dict)
    """Of these what outlasts a power cut, where there will be one."""
    confirmed: frozenset[str] = frozenset()
    """Paths of what earlier runs said they hold, for good."""
    asked: Mapping[Key, str] | None = None
    """What the manifest lists that is asked for, with its study."""
    result: Result | None = None
    refused: Exception | None = None
    """It raised, as it may where nothing was fetched."""
    killed: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    met: list[tuple[str, int, Fault]] = field(default_factory=list)
    changed: bool = False
    """The archive changed meanwhile."""
    seconds: float = 0.0
    healing: bool = False
    hours_over: bool = False
    """The hours of the PACS ended meanwhile."""
    cancels: int = 0
    """How often it was cancelled, before it began and while it ran."""
    manifest: Any = None
    """What is asked for, where it is no query."""
    beside: Played | None = None
    """The run that went on at the same time."""
    after: tuple[dict[str, bytes], dict[str, bytes]] | None = None
    """All files when it ended, and what of them was durable, where another run went on."""
    opened: int = 0
    """Associations that the PACS had accepted when it was cancelled first."""

    @property
    def verdict(self) -> str:
        """The verdict, or how it ended without one."""
        if self.result is not None:
            return self.result.verdict
        return "killed" if self.killed else f"raised {type(self.refused).__name__}"


class Told(MemoryTranscript):
    """What was said in one run; it looks at the time without letting any pass, so that the history stays the same."""

    def __init__(self, run: int, loop: Loop, entries: list[dict[str, Any]]) -> None:
        super().__init__(str(run))
        self.entries, self._loop = entries, loop

    def now(self) -> float:
        """See :class:`Transcript`."""
        return EPOCH + self._loop.at

    def monotonic(self) -> float:
        """See :class:`Transcript`."""
        return self._loop.at


class World:
    """The models of one history, and what they saw.

    Attributes
    ----------
    findings : list of str
        What was wrong; empty, one hopes.
    theirs : dict
        What somebody else put under a final name, by path.
    told : list of dict, optional
        Takes the transcript of all runs.
    trace, sends : list
        By run what it did; and how often the PACS sent something.
    confirmed : set of str
        Paths of what some run said it holds, for good.
    torn, deleted, read_only : set of str
        Paths of what somebody has cut short, removed, or made read-only.
    classes : frozenset of str, optional
        The SOP classes that any run wants; None for all.
    """

    def __init__(self, history: History, loop: Loop, told: list[dict[str, Any]] | None = None) -> None:
        self.history, self.loop, self.told = history, loop, told
        self.place: Destination = DESTINATIONS[history.destination](loop.chance, history.traits)
        self.pacs = ModelPacs(history.instances, history.habits, history.changes, history.studies)
        self.network = Network(loop, self.accept)
        self.node = self.place.node or ModelNode()
        """Where instances are stored."""
        self.runs: list[Played] = []
        self.findings: list[str] = []
        self.theirs: dict[str, bytes] = {}
        self.confirmed: set[str] = set()
        self.torn: set[str | None] = set()
        self.read_only: set[str | None] = set()
        self.deleted: set[str | None] = set()
        self.trace: list[Any] = []
        self.sends: list[int] = []
        self.manifest: Any = None
        """Of the last run that left one."""
        self._client: tuple[Mapping[str, Any], GetScu] | None = None
        """Of the last run, with its options: it serves the next one too, if that has the same."""
        self._numbers: dict[Process | None, int] = {}
        """Of runs that go on at the same time."""
        self._unspent = 0
        """Cancels of a call that was refused for its input before it began: they wait for the next one."""
        wanted = [step.options.get("sop_classes") for step in history.steps if isinstance(step, Run)]
        self.classes = (
            frozenset(uid for uids in wanted for uid in uids or ()) if wanted and None not in wanted else None
        )

    def study_of(self, key: Key) -> str:
        """The study of an instance that a query or manifest means."""
        studies = self.history.studies
        if len(studies) == 1:
            return studies[0]
        known = self.pacs.known.get(key)
        return known.study if known is not None else self.pacs.study_of_series.get(key[0], studies[0])

    def finding(self, what: str, *details: object) -> None:
        """Something is wrong."""
        number = self.runs[-1].number if self.runs else 0
        self.findings.append(f"{what} (run {number}){': ' if details else ''}{', '.join(map(str, details))}")

    def accept(self, line: Line, port: int) -> Callable[[], object]:
        """See :class:`~tests.simulation.line.Network`."""
        process = self.loop.process
        if process in self._numbers:
            self.pacs.run = self._numbers[process]
        return self.pacs.accept(line, port) if port == 104 else self.node.accept(line)

    # --- steps ---------------------------------------------------------------------------------

    def play(self) -> None:
        """All of it."""
        from tests.simulation import invariants, storing

        steps = list(self.history.steps)
        while steps:
            step = steps.pop(0)
            if isinstance(step, Between):
                self.between(step)
            elif steps and isinstance(other := steps[0], Run) and other.beside:
                del steps[0]
                for played in self.at_once(step, other):
                    invariants.after_run(self, played)
            else:
                self.run(step)
                invariants.after_run(self, self.runs[-1])
            if self.findings:
                return
        self.heal()
        for _ in range(3):
            self.run(Run(self.healing_options()), healing=True)
            invariants.after_run(self, self.runs[-1])
            if self.findings:
                return
            if invariants.has_ended(self, self.runs[-1]):
                self.verified()
                if self.history.store and self.runs[-1].verdict == "complete" and not self.findings:
                    storing.store(self)
                return
        self.finding("it never comes to an end", [run.verdict for run in self.runs], self.runs[-1].rows)

    def verified(self) -> None:
        """``verify`` says 0 exactly where the next get, which looks at the digests, has nothing to fetch."""
        from tests.simulation import invariants

        options = self.healing_options()
        if not self.history.verify or not options.get("store_with_file_meta", True) or "checksum" in options:
            return  # it reads files of DICOM, and a digest there must be to be looked at
        if "sop_classes" in options:
            return  # it compares all that is listed
        for harm in self.history.harms:
            self.between(harm)
        down = (DOWN,) if any(harm.what == "down" for harm in self.history.harms) else ()
        exit_code = self.verify(down)
        self.run(Run(options | {"verify_held": "size" if self.history.quick else "digest"}, node=down), healing=True)
        invariants.after_run(self, self.runs[-1])
        invariants.agrees(self, self.runs[-1], exit_code)

    def heal(self) -> None:
        """Faults and changes are over."""
        self.pacs.healed = True
        self.place.heal()

    def healing_options(self) -> dict[str, Any]:
        """Of the runs in which all is well: those of the others, but for what makes a run fetch all again."""
        runs = [step for step in self.history.steps if isinstance(step, Run)]
        options = dict(runs[-1].options) if runs else {}
        options.pop("resume", None)
        options.pop("strict_forward", None)
        return options | {"durable": True}

    def run(self, run: Run, *, healing: bool = False) -> None:
        """One run of the retrieval."""
        played, process = self._begin(run, healing=healing)
        began, changes = self._enter(run, played)
        error = self.call(self._work(played), process)
        self._end(played, process, error, began, changes)

    def at_once(self, one: Run, other: Run) -> tuple[Played, Played]:
        """Two runs of the retrieval at the same time, in processes of their own on one machine."""
        mark("get: two at once")
        (first, process), (second, beside) = self._begin(one), self._begin(other)
        first.beside, second.beside = second, first
        self._client = None
        began, changes = self._enter(one, first)
        self._numbers = {process: first.number, beside: second.number}
        for each in (process, beside):
            each.pause = lambda: self.loop.stand_aside(0.01)
        errors = self.call_both((self._work(first), process), (self._work(second), beside))
        self._numbers = {}
        self._client = None
        for played, own, error in zip((first, second), (process, beside), errors, strict=True):
            self._end(played, own, error, began, changes)
        return first, second

    def _begin(self, run: Run, *, healing: bool = False) -> tuple[Played, Process]:
        process = Process(Faults({(f.operation, f.number): fault_of(f) for f in run.faults}))
        played = Played(len(self.runs) + 1, run, self.place.files(), healing=healing)
        played.confirmed = frozenset(self.confirmed)
        if any(fault.what.startswith("power") for fault in run.faults):
            played.lasting = self.place.durable()
        manifest = self.manifest if run.verb == "manifest" else None
        if manifest is not None:
            mark("get: by a manifest")
            rows = [row for row in plain_rows(manifest) if row["state"] not in OUTSIDE_LIST]
            played.asked = {key_of(row): row["study_instance_uid"] or STUDY_UID for row in rows}
        self.runs.append(played)
        played.manifest = manifest
        return played, process

    def _enter(self, run: Run, played: Played) -> tuple[float, int]:
        self.pacs.begin(played.number, {n: (mode, param) for n, mode, param in run.ill}, dict(run.breaks))
        if self.place.node is not None:
            self.place.node.begin(run.node)
        self.loop.at += PAUSE
        return self.loop.at, len(self.pacs.log)

    def _work(self, played: Played) -> Callable[[], None]:
        manifest = played.manifest

        def work() -> None:
            scu = self._client_of(played)
            self._watch(scu, played)
            query = self.history.query if manifest is None else None
            played.result = scu.get_study(query, query_model=self.history.model, manifest=manifest)
            if played.result.rows is not None:
                self.manifest = played.result.rows()
                played.rows = plain_rows(self.manifest)
            if played.beside is not None:
                played.after = self.place.files(), self.place.durable()

        return work

    def _end(self, played: Played, process: Process, error: BaseException | None, began: float, changes: int) -> None:
        run = played.run
        self.pacs.on_moment = lambda number: None
        played.killed = isinstance(error, Killed)
        if played.killed:
            self._client = None
        if played.refused is None:
            self._unspent = 0
        if isinstance(error, InvalidQuery | InvalidOption):
            played.refused = error
        elif error is not None and not played.killed:
            raise error
        if run.options.get("durable", True):
            if any(not earlier.run.options.get("durable", True) for earlier in self.runs):
                mark("durable after a run that was not")
            if self.place.node is None or not process.faults.met:  # what it was told may not be in our records
                self.confirmed |= {path_of(row) for row in played.rows if row["state"] in HELD}
        played.met = list(process.faults.met)
        played.seconds = self.loop.at - began
        played.changed = any(entry[0] == "change" for entry in self.pacs.log[changes:])
        self.trace.append((played.verdict, self.loop.at, played.rows, process.faults.trace))
        self.sends.append(self.pacs.sends)
        mark(f"verdict: {played.verdict}")
        if "sop_classes" in run.options:
            mark("sop_classes" if self.history.habits.classes else "sop_classes, and lists tell none")
        for operation, _, fault in played.met:
            mark(f"fault: {operation} {fault.ends or fault.error or 'short'}")

    def _client_of(self, played: Played) -> GetScu:
        """The client of a run: that of the one before, where its options are the same and it was not killed."""
        options = {**self.place.options, **played.run.options}
        if played.run.hours is not None:
            options["window"] = HOURS
        if self._client is not None and self._client[0] == options:
            return self._client[1]
        transcript = Told(played.number, self.loop, self.told) if self.told is not None else None
        scu = GetScu(NODE, destination=self.place.address, deadlines=DEADLINES, transcript=transcript, **options)
        self._unspent = 0
        if self.told is None:
            self._client = options, scu
        return scu

    def _watch(self, scu: GetScu, played: Played) -> None:
        """Let the hours of the PACS be over, and the run be cancelled, when it is time."""
        run = played.run
        played.cancels, self._unspent = self._unspent, 0

        def cancel() -> None:
            played.cancels += 1
            if played.cancels == 1:
                played.opened = self.pacs.associations
            self._unspent = played.cancels
            scu.cancel("asked")

        def look(number: int) -> None:
            played.hours_over = played.hours_over or number == run.hours
            for moment in run.cancels:
                if moment == number:
                    mark("cancel: while a run is on")
                    cancel()

        for moment in run.cancels:
            if not moment:
                mark("cancel: between two calls")
                cancel()
        if run.hours is not None:
            scu._clock = lambda: AFTER_HOURS if played.hours_over else IN_HOURS
        if run.hours is not None or run.cancels:
            self.pacs.on_moment = look

    def verify(self, met: Sequence[tuple[int, str]]) -> int:
        """Its exit status; ``met`` is what the node does, if one is the destination."""
        seen: list[Verification] = []

        def work() -> None:
            options = dict(self.place.options)
            of_runs = self.healing_options()
            options |= {name: of_runs[name] for name in ("list_limit", "trust_destination") if name in of_runs}
            result = verify.verify(
                study=STUDY_UID,
                addr=NODE,
                destination=self.place.address,
                query_model=self.history.model,
                quick=self.history.quick,
                deadlines=DEADLINES,
                **options,
            )
            seen.append(result)

        self.pacs.begin(0, {}, {})
        if self.place.node is not None:
            self.place.node.begin(met)
        self.loop.at += PAUSE
        error = self.call(work, Process())
        if error is not None and not isinstance(error, DicomGetError):
            raise error
        exit_code = seen[0].exit_code if seen else 1
        self.trace.append(("verify", exit_code, self.loop.at))
        of = " of a node" if self.place.node is not None else " --quick" if self.history.quick else ""
        mark(f"verify{of}: {exit_code}")
        return exit_code

    def call(self, work: Callable[[], object], process: Process) -> BaseException | None:
        """Do something in a process, and look at what it leaves; what it raised, :class:`Killed` where it was."""
        manifests = [] if self.history.seed % PARQUET == 0 else PLAIN
        with seams([(transport, "connect", self.network.connect), *self.place.seams(process), *manifests]):
            main = self.loop.run(work, process)
            error = main.error
            if process.dead:
                error, main.error = Killed(), None
                self.loop.bury(process)
                gc.collect(1)  # whatever is left of it ends on its own disk, not on that of the next run
            else:
                self.loop.settle(process)
                if left := self.loop.of(process):
                    self.finding("left running", [task.name for task in left])
                if left_open := self.place.left_open():
                    self.finding("left open or locked", left_open)
                if self.network.left_open:
                    self.finding("left connected", self.network.left_open)
        process.die()
        if process.breaches:
            self.finding("breach of the model", process.breaches)
        if self.pacs.faults:
            self.finding("mistake of the model PACS", self.pacs.faults[0])
        return error

    def call_both(self, *calls: tuple[Callable[[], object], Process]) -> list[BaseException | None]:
        """As :meth:`call`, for two at the same time."""
        manifests = [] if self.history.seed % PARQUET == 0 else PLAIN
        models = zip(*(self.place.seams(process) for _, process in calls), strict=True)
        both = [
            (module, name, Each(self.loop, dict(zip((p for _, p in calls), (m for *_, m in same), strict=True))))
            for same in models
            for module, name, _ in same[:1]
        ]
        with seams([(transport, "connect", self.network.connect), *both, *manifests]):
            tasks = [self.loop.spawn(work, "main", process) for work, process in calls]
            for task in tasks:
                self.loop.until(task)
            errors: list[BaseException | None] = []
            for task, (_, process) in zip(tasks, calls, strict=True):
                errors.append(Killed() if process.dead else task.error)
                if process.dead:
                    task.error = None
                    self.loop.bury(process)
                else:
                    self.loop.settle(process)
                    if left := self.loop.of(process):
                        self.finding("left running", [one.name for one in left])
            gc.collect(1)
            if left_open := self.place.left_open():
                self.finding("left open or locked", left_open)
            if self.network.left_open:
                self.finding("left connected", self.network.left_open)
        for _, process in calls:
            process.die()
            if process.breaches:
                self.finding("breach of the model", process.breaches)
        if self.pacs.faults:
            self.finding("mistake of the model PACS", self.pacs.faults[0])
        return errors

    def between(self, step: Between) -> None:
        """What others do between two runs."""
        mark(f"between: {step.what}")
        if step.what in CHANGES:
            self.pacs.change(Change(0, step.what, step.which))
            return
        there = self.place.files()
        final = sorted(path for path in there if path.endswith(".dcm"))
        path = final[step.which % len(final)] if final else None
        content = there[path] if path is not None else b""
        match step.what:
            case "overwrite":
                # What no run has confirmed may be what a crash left of ours: it is nobody else's.
                if path not in self.confirmed or path in self.torn or len(content) < 200:
                    return
                assert path is not None
                content = content[:-60] + bytes(255 - byte for byte in content[-60:-20]) + content[-20:]
                self.theirs[path] = content
            case "read-only":
                self.read_only.add(path)
            case "tear":
                content = content[: len(content) // 2]
                self.torn.add(path)
            case "delete":
                self.deleted.add(path)
                self.confirmed.discard(path or "")
        self.place.harm(step.what, path, content)


class Each:
    """In the place of a model, where several processes go on: each has its own, and others go on before its calls."""

    def __init__(self, loop: Loop, models: Mapping[Process, Any]) -> None:
        self._loop, self._models = loop, models

    def _own(self) -> Any:
        process = self._loop.process
        assert process is not None
        return self._models[process]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._own(), name)
        if not callable(found):
            return found

        def call(*args: Any, **named: Any) -> Any:
            if self._loop.chance.random() < _ASIDE:
                self._loop.stand_aside(self._loop.chance.random() * 0.01)
            return found(*args, **named)

        return call

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._own()(*args, **named)


def key_of(row: Mapping[str, Any]) -> Key:
    """Series and SOP Instance UID of a row of a manifest."""
    return row["series_instance_uid"] or "", row["sop_instance_uid"] or ""


def fault_of(planned: Planned) -> Fault:
    """What a planned fault does."""
    what, _, when = planned.what.partition(" ")
    after = when == "after"
    if what == "short":
        return Fault(short=True)
    if what in ("kill", "power"):
        return Fault(ends="kill" if what == "kill" else "power", after=after)
    return Fault(error=getattr(errno, what, what), after=after)


@contextmanager
def seams(models: list[tuple[Any, str, object]]) -> Iterator[None]:
    """Put models in the places of what they are models of: module, name and model of each."""
    replaced = [*models, *CODECS]
    real = [getattr(module, name) for module, name, _ in replaced]
    for module, name, model in replaced:
        setattr(module, name, model)
    try:
        yield
    finally:
        for (module, name, _), value in zip(replaced, real, strict=True):
            setattr(module, name, value)


_numbers = count()


def _freeze() -> None:
    """Let what a history leaves be all that is looked through after a kill: modules and caches are not, nor old ones.

    What was in use at such a time and is garbage later is found at one of the rare times when all is looked through.
    """
    if next(_numbers) % 1000:
        gc.collect(1)
    else:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def play(history: History, told: list[dict[str, Any]] | None = None) -> World:
    """Play a history, with nothing logged; ``told`` takes its transcript."""
    quiet = logging.root.manager.disable >= logging.CRITICAL
    if not quiet:
        logging.disable(logging.CRITICAL)
    in_history.clear()
    _freeze()
    collects = gc.isenabled()
    gc.disable()  # garbage is collected where the history says, not by chance
    try:
        with looped(history.seed) as loop:
            world = World(history, loop, told)
            try:
                world.play()
            except EndlessError as error:
                world.finding("it never returns", error)
            return world
    finally:
        if collects:
            gc.enable()
        if not quiet:
            logging.disable(logging.NOTSET)
