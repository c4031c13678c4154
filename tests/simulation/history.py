"""Histories: what a PACS holds and how it changes, runs with their faults, and what happens between them.

A history is plain data, made from a seed by :func:`history_of`, and can be kept as JSON. It is not Hypothesis' data:
a kept failure has to outlast changes of the generator and of Hypothesis, a million histories have to cost what the
engine costs and no more, and to shrink one by leaving out runs, faults and instances (:mod:`~tests.simulation.shrink`)
is simple where each of them is an element of a list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.testing.misbehaving import archive, wire
from airflow_dicom_get.testing.misbehaving.archive import CT, MR, STUDY_UID, Instance
from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES
from tests.simulation.node import DOWN, NODE_FAULTS
from tests.simulation.pacs import CHANGES, Change, Habits

T = TypeVar("T")

ROOM_TO_BEGIN = 64 << 20
"""Bytes that have to be free for a study to be begun."""
SECOND_UID = f"2.25.{int(STUDY_UID.removeprefix('2.25.')) + 5 * 10**20}"
"""Another study, of which some histories ask too."""

PAIRS = (
    ((CT, wire.EXPLICIT_LE),),
    ((CT, wire.EXPLICIT_LE), (MR, wire.EXPLICIT_LE)),
    ((CT, wire.JPEG_2000),),
    ((CT, wire.IMPLICIT_LE), (CT, wire.EXPLICIT_LE)),
)
"""SOP classes and transfer syntaxes of a study."""

EXPENSIVE = frozenset(
    {"ac_huge", "deflate_bomb", "endless_object", "endless_objects", "find_endless", "find_repeats", "pdu_huge"}
    | {"pending_flood", "cmd_bomb", "pdv_flood", "huge_modality"}
)
"""Modes that are nothing but many bytes: they cost a hundred histories and belong to tests over sockets."""
MODES = tuple(sorted(MODE_CLASSES.keys() - EXPENSIVE))
LIKELY = (
    *("find_ignores_keys", "find_prefix", "find_leaves_keys_out", "find_empties_keys", "find_folds"),
    *("find_foreign_rows", "find_hostile_rows", "dup_diff", "uid_mismatch", "success_partial", "list_shrinks"),
)
"""Modes that tell most about lists and conflicts: met as often as all others together."""
BREAKS = tuple(
    f"{when} {what}" for when in ("before", "half", "after") for what in ("close", "reset", "abort", "silence")
)

DISK_FAULTS: Mapping[str, tuple[str, ...]] = {
    "sync": ("EIO", "EIO", "kill", "power", "kill after", "power after"),
    "rename": ("EIO", "kill", "power", "kill after", "power after"),
    "write": ("ENOSPC", "ENOSPC", "EIO", "short", "kill", "power", "kill after", "power after"),
    "open": ("EACCES", "EMFILE", "kill", "kill after"),
    "close": ("kill", "power"),
    "unlink": ("EACCES", "kill", "kill after", "power after"),
    "make_folder": ("EACCES", "ENOSPC", "kill after", "power after"),
    "open_folder": ("EACCES", "kill after"),
    "remove_folder": ("kill", "power after"),
    "lock": ("EOPNOTSUPP", "kill after"),
    "scan": ("EIO", "kill"),
    "read": ("EIO", "kill"),
    "status": ("EIO", "kill"),
}
"""What may become of a call of the disk."""
_S3 = ("InternalError", "SlowDown", "closed", "closed after", "InternalError after", "kill", "kill after")
S3_FAULTS: Mapping[str, tuple[str, ...]] = {
    "put_object": (*_S3, "AccessDenied", "silent after"),
    "list_objects_v2": (*_S3, "AccessDenied"),
    "head_object": (*_S3, "AccessDenied"),
    "get_object": (*_S3, "short"),
    "delete_object": _S3,
}
"""What may become of a request."""
NETWORK_FAULTS: Mapping[str, tuple[str, ...]] = {
    "connect": ("ECONNREFUSED", "EHOSTUNREACH", "kill"),
    "send": ("ECONNRESET", "kill", "power"),
    "receive": ("ECONNRESET", "kill", "power"),
}
BETWEEN = ("power", "power", "overwrite", "tear", "delete", "read-only", "evict", "correct")

_AT_ANY_TIME = tuple(what for what in CHANGES if what != "restore")
"""Changes that come by chance: one that undoes a correction would seldom find it."""
NODE_HARMS = ("delete", "delete", "overwrite", "correct", "power", "down")
"""What happens before a node is compared with the PACS; ``down``: it cannot be reached any more."""


MATCHING = ("prefix", "folds", "ignores", "ignores", "leaves out", "empties")
"""Ways in which a PACS matches keys as it should not."""
MALFORMED = 0.15
"""Share of the studies in which a UID is malformed: none until these are rows."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault that a run meets: the ``number``-th call of an operation, and what becomes of it."""

    operation: str
    number: int
    what: str


@dataclass(frozen=True, slots=True)
class Run:
    """A run of one retrieval.

    Attributes
    ----------
    options : dict
        Of ``GetScu``, besides node and destination.
    faults : tuple of Planned
    ill : tuple
        Number of an association, from 1, its mode, and the mode's parameter.
    breaks : tuple
        Number of something that the PACS sends, and how the line ends there.
    verb : {"get", "manifest"}
        Whether the query is asked for, or what the manifest of the run before lists.
    node : tuple
        What the node that is the destination does, see :meth:`~tests.simulation.node.ModelNode.begin`.
    hours : int, optional
        Requests and sub-operations of the run after which the hours of the PACS are over; it has none without.
    cancels : tuple of int
        As many after which the run is cancelled; 0 is before it begins.
    beside : bool
        Whether it goes on at the same time as the run before it.
    """

    options: Mapping[str, Any]
    faults: tuple[Planned, ...] = ()
    ill: tuple[tuple[int, str, float | None], ...] = ()
    breaks: tuple[tuple[int, str], ...] = ()
    verb: str = "get"
    node: tuple[tuple[int, str], ...] = ()
    hours: int | None = None
    cancels: tuple[int, ...] = ()
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Between:
    """What happens between two runs: a name of :data:`BETWEEN`, and the number of the file to which it happens.

    The archive may change too, as in a run: a name of :data:`~tests.simulation.pacs.CHANGES`, and of the instance.
    """

    what: str
    which: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """All of it; the same history plays in the same way each time."""

    seed: int
    instances: tuple[Instance, ...]
    habits: Habits
    query: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    steps: tuple[Run | Between, ...] = ()
    destination: str = "folder"
    traits: Mapping[str, Any] = field(default_factory=dict)
    """Of the file system, or the service."""
    verify: bool = False
    """Whether ``verify`` is asked at the end, after ``harms``."""
    harms: tuple[Between, ...] = ()
    model: str = "StudyRoot"
    quick: bool = False
    """Whether it is ``verify --quick``."""
    store: tuple[Run, ...] = ()
    """Runs of ``store`` at the end, from the destination to a node."""

    @property
    def studies(self) -> tuple[str, ...]:
        """The studies that are asked for."""
        named = self.query.get("StudyInstanceUID", STUDY_UID)
        return (named,) if isinstance(named, str) else tuple(named)

    def to_json(self) -> str:
        """The history as text, to be kept."""
        plain = asdict(self)
        plain["store"] = [asdict(run) for run in self.store]
        plain["steps"] = [{"kind": type(step).__name__, **asdict(step)} for step in self.steps]
        return json.dumps(plain, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> History:
        """What :meth:`to_json` wrote."""
        plain = json.loads(text)
        steps: list[Run | Between] = []
        for step in plain.pop("steps"):
            if step.pop("kind") == "Between":
                steps.append(Between(**step))
                continue
            steps.append(_run_of(step))
        plain["instances"] = tuple(Instance(**item) for item in plain["instances"])
        plain["store"] = tuple(_run_of(run) for run in plain.get("store", ()))
        plain["habits"] = Habits(**plain["habits"])
        plain["harms"] = tuple(Between(**harm) for harm in plain["harms"])
        plain["changes"] = tuple(Change(**change) for change in plain["changes"])
        return cls(**plain, steps=tuple(steps))


def _run_of(plain: dict[str, Any]) -> Run:
    plain["faults"] = tuple(Planned(**fault) for fault in plain["faults"])
    plain["cancels"] = tuple(plain.get("cancels", ()))
    return Run(**plain | {name: _tuples(plain.get(name, [])) for name in ("ill", "breaks", "node")})


def _tuples(lists: list[list[Any]]) -> tuple[Any, ...]:
    return tuple(tuple(item) for item in lists)


# --- from a seed -----------------------------------------------------------------------------------


def history_of(seed: int) -> History:
    """A history by chance."""
    return _more(random.Random((1 << 40) + seed), _history_of(seed))


def _history_of(seed: int) -> History:
    chance = random.Random(seed)
    habits = _habits(chance)
    instances = _study(chance, habits)
    count = sum(i.study == STUDY_UID for i in instances)
    ill_chance = chance.choice((0.0, 0.3, 0.7))
    runs = chance.choice((1, 1, 2, 2, 3))
    destination = chance.choice(("folder",) * 4 + ("bucket",) * 2 + ("node",))
    common = _options(chance, destination)
    if habits.cap and chance.random() < 0.5:
        common["list_limit"] = str(habits.cap)
    steps: list[Run | Between] = []
    for number in range(runs):
        if number:
            steps += [Between(chance.choice(BETWEEN), chance.randrange(64)) for _ in range(chance.choice((0, 0, 1, 2)))]
        run = _run(chance, count, ill_chance, common, destination)
        steps.append(replace(run, verb="manifest") if number and chance.random() < 0.15 else run)
    moments = sorted(chance.randrange(4 * count * runs + 12) for _ in range(chance.choice((0, 1, 1, 2, 3, 5))))
    changes = tuple(Change(at, chance.choice(_AT_ANY_TIME), chance.randrange(64)) for at in moments)
    query, model = _query(chance, instances, habits)
    verify = query == {"StudyInstanceUID": STUDY_UID} and destination != "node" and chance.random() < 0.7
    harms = [Between(chance.choice(BETWEEN), chance.randrange(64)) for _ in range(chance.choice((0, 1, 1)))]
    history = History(
        seed,
        instances,
        habits,
        query,
        changes,
        tuple(steps),
        destination,
        _traits(chance, destination),
        verify,
        tuple(harms) if verify else (),
        model,
        verify and chance.random() < 0.5,
        _stores(chance, count, destination, common),
    )
    if destination == "node":
        return _unreachable(chance, history) if chance.random() < 0.15 else history
    return THEMES[chance.randrange(len(THEMES))](chance, history) if chance.random() < 0.2 else history


def _more(chance: random.Random, history: History) -> History:
    """What some histories meet besides. It is drawn apart, so that all others of a seed stay as they are."""
    if history.destination == "node" and chance.random() < 0.8:
        # Its list is compared with the PACS's: more often than not it has one.
        harms = [Between(chance.choice(NODE_HARMS), chance.randrange(64)) for _ in range(chance.choice((0, 0, 1)))]
        traits = {**history.traits, **({"find": "yes"} if chance.random() < 0.5 else {})}
        query = {"StudyInstanceUID": STUDY_UID}
        history = replace(history, query=query, traits=traits, verify=True, harms=tuple(harms))
    drawn = chance.random()
    for share, change in MORE:
        if drawn < share:
            return change(chance, history)
        drawn -= share
    return history


def _in_one_run(chance: random.Random, history: History, change: Callable[[Run], Run]) -> History:
    """The history with one of its runs changed."""
    at = chance.choice([number for number, step in enumerate(history.steps) if isinstance(step, Run)])
    run = history.steps[at]
    assert isinstance(run, Run)
    return replace(history, steps=(*history.steps[:at], change(run), *history.steps[at + 1 :]))


def _quietly(chance: random.Random, run: Run) -> Run:
    """The run, half the time with nothing that goes wrong in it."""
    return _alone(run) if chance.random() < 0.5 else run


def _alone(run: Run) -> Run:
    """The run, with nothing that goes wrong in it."""
    return replace(run, faults=(), ill=(), breaks=(), node=())


def _moments(history: History) -> int:
    """About how many requests and sub-operations there are in a run."""
    return sum(i.study in history.studies for i in history.instances) + 12


def _cancelled(chance: random.Random, history: History) -> History:
    """One run is cancelled: before it begins, while it runs, or twice."""
    moments = [0 if chance.random() < 0.4 else 1 + chance.randrange(_moments(history))]
    if chance.random() < 0.25:
        moments.append(moments[0] + chance.randrange(3))
    return _in_one_run(chance, history, lambda run: replace(_quietly(chance, run), cancels=tuple(moments)))


def _in_hours(chance: random.Random, history: History) -> History:
    """The hours of the PACS are over in one run: at any time, or about when all has come and is to be listed again."""
    moment = 1 + chance.randrange(_moments(history))
    if chance.random() < 0.7:
        history = replace(history, steps=tuple(_alone(x) if isinstance(x, Run) else x for x in history.steps))
        asked = [i for i in history.instances if i.study in history.studies]
        moment = len(asked) + 2 * len({i.series for i in asked}) + chance.randrange(4)
    return _in_one_run(chance, history, lambda run: replace(_quietly(chance, run), hours=moment))


def _of_two(chance: random.Random, history: History) -> History:
    """Two studies are asked for by their UIDs."""
    studies = [STUDY_UID, SECOND_UID]
    chance.shuffle(studies)
    made = archive.build(series=1, instances=chance.choice((1, 2, 3)), size=700, pairs=PAIRS[0], study=SECOND_UID)
    query = {"StudyInstanceUID": studies}
    instances = (*history.instances, *made)
    history = replace(history, instances=instances, query=query, verify=False, harms=(), quick=False, store=())
    if history.destination == "folder" and chance.random() < 0.4:
        # Room to begin one study, and not another one after it, until somebody makes more.
        stored = sum(i.size for i in history.instances if i.study in studies)
        history = replace(
            history, traits={**history.traits, "capacity": ROOM_TO_BEGIN + chance.randrange(1, 3 * stored)}
        )
    drawn = chance.random()
    return (_in_hours if drawn < 0.35 else _cancelled if drawn < 0.45 else _as_it_is)(chance, history)


def _truncated(chance: random.Random, history: History) -> History:
    """The PACS holds an instance of which the end is missing."""
    if chance.random() < 0.3 and history.destination != "node":
        first, second = _two(chance, history)  # the PACS has it whole later, and all of it is fetched again
        first = replace(first, ill=tuple((number, "ds_truncated", None) for number in range(1, 30)))
        return replace(history, steps=(first, _alone(replace(second, options={**second.options, "resume": False}))))
    alone = chance.random() < 0.2
    ill = tuple((number, "ds_truncated", None) for number in ((chance.randrange(1, 5),) if alone else range(1, 30)))
    return _in_one_run(chance, history, lambda run: replace(_quietly(chance, run), ill=ill))


def _honest(chance: random.Random, history: History) -> History:
    """All is as it should be with the PACS, and what else there is in the history stays."""
    instances = tuple(
        i if is_uid(i.sop) else replace(i, sop=f"{i.series}{n:03}") for n, i in enumerate(history.instances)
    )
    steps = tuple(replace(step, ill=(), breaks=()) if isinstance(step, Run) else step for step in history.steps)
    steps = tuple(step for step in steps if isinstance(step, Run) or step.what not in CHANGES)
    return replace(history, instances=instances, habits=Habits(), changes=(), steps=steps)


def _at_once(chance: random.Random, history: History) -> History:
    """Two runs of the same retrieval go on at the same time; one of them may be killed."""
    if history.destination == "node":
        return history
    first = history.steps[0]
    assert isinstance(first, Run)
    second = replace(first, beside=True, faults=tuple(x for x in first.faults if "power" not in x.what))
    drawn = chance.random()
    if drawn < 0.4:
        second = _alone(second)
    elif drawn < 0.8:
        count = sum(i.study in history.studies for i in history.instances)
        killed = Planned("send", 1 + chance.randrange(3 * count + 8), "kill")
        second = replace(_alone(second), faults=(killed,))
    if chance.random() < 0.4:
        history = _honest(chance, history)
        first, second = replace(first, ill=(), breaks=()), replace(second, ill=(), breaks=())
    return replace(history, steps=(_alone(first), second, *history.steps[1:]))


def _seldom(chance: random.Random, history: History) -> History:
    """What chance alone seldom puts together: associations or bytes that are wrong, and an early fault beside it."""
    first = history.steps[0]
    assert isinstance(first, Run)
    mode = chance.choice((*_OF_ASSOCIATIONS, *["dup_diff"] * 4, *["none"] * 4))
    ill = tuple((number, mode, None) for number in range(1, 30) if mode != "none")
    own = S3_FAULTS if history.destination == "bucket" else DISK_FAULTS
    operation, what = chance.choice(
        (
            ("connect", "ECONNREFUSED"),
            ("send", "ECONNRESET"),
            ("send", "kill"),
            ("receive", "power"),
            *[(name, what) for name in tuple(own)[:2] for what in own[name]],
        )
    )
    faults = (Planned(operation, 1 + chance.randrange(4), what),) if chance.random() < 0.8 else ()
    if mode == "none":  # more comes than what is left to ask for, once a first try broke off
        history = replace(history, habits=replace(history.habits, gets="series"))
        first = replace(first, options={**first.options, "retries": 5})
    alone = replace(first, ill=ill, breaks=first.breaks if mode == "none" else (), faults=faults)
    others = () if chance.random() < 0.5 else history.steps[1:]
    return replace(history, steps=(alone, *others))


_OF_ASSOCIATIONS = tuple(mode for mode in MODES if MODE_CLASSES[mode].stages == {"associate"})


def _as_it_is(chance: random.Random, history: History) -> History:
    return history


def _once_there(chance: random.Random, history: History) -> History:
    """What a node confirmed comes corrected, and once more as it was; it was deleted there, or is not listed."""
    if history.destination != "node":
        return history
    first, second = _two(chance, history)
    count = sum(i.study == STUDY_UID for i in history.instances)
    if chance.random() < 0.4:  # what it took last is not in our records
        lost = (1 + chance.randrange(count + 2), chance.choice(BREAKS))
        first = replace(first, options={**first.options, "retries": 0}, node=(lost,))
    deleted = [Between("delete", chance.randrange(64)) for _ in range(chance.choice((0, 1, 1, 2)))]
    corrected, restored = ([Between(what, n) for n in range(count)] for what in ("correct", "restore"))
    last = _alone(replace(second, options={**second.options, "resume": False}))
    second = _alone(second) if chance.random() < 0.6 else second
    traits = {
        **history.traits,
        "find": chance.choice(("yes", "short")),
        "again": chance.choice(("replaces", "refuses")),
    }
    steps: tuple[Run | Between, ...] = (first, *deleted, *corrected, second, *restored, last)
    return replace(history, habits=replace(history.habits, cap=0), traits=traits, changes=(), steps=steps)


MORE = (
    (0.05, _cancelled),
    (0.09, _in_hours),
    (0.12, _of_two),
    (0.05, _truncated),
    (0.05, _honest),
    (0.06, _at_once),
    (0.05, _seldom),
    (0.12, _once_there),
)
"""What some histories meet besides, and in which share of all."""


def _stores(chance: random.Random, count: int, destination: str, common: Mapping[str, Any]) -> tuple[Run, ...]:
    """Runs that store all of it at a node: they read files of DICOM."""
    if destination == "node" or not common.get("store_with_file_meta", True) or chance.random() >= 0.2:
        return ()
    runs = []
    for _ in range(chance.choice((1, 1, 2))):
        table = DISK_FAULTS if destination == "folder" else S3_FAULTS
        operation = chance.choice(("sync", "write", "open", "read") if destination == "folder" else tuple(table))
        fault = Planned(operation, 1 + chance.randrange(3 * count + 4), chance.choice(table[operation]))
        runs.append(
            Run(
                {"retries": chance.choice((0, 1)), "resume": chance.random() < 0.85},
                (fault,) if chance.random() < 0.5 else (),
                node=tuple(
                    (1 + chance.randrange(count + 4), chance.choice((*NODE_FAULTS, *BREAKS)))
                    for _ in range(chance.choice((0, 1, 2)))
                ),
            )
        )
    return tuple(runs)


def _corrected(chance: random.Random, history: History) -> History:
    """What is held is corrected at the PACS, and comes again beside something that was deleted here."""
    first, second = _two(chance, history)
    between = (Between("delete", chance.randrange(64)), Between("correct", chance.randrange(64)))
    habits = replace(history.habits, gets="series", cap=0)
    return replace(history, habits=habits, changes=(), steps=(first, *between, second))


def _replaced(chance: random.Random, history: History) -> History:
    """What is held is corrected at the PACS, and all of it is fetched again to take its place."""
    first, second = _two(chance, history)
    options = {**second.options, "on_conflict": "replace", "resume": False}
    options.pop("adopt", None)
    between = Between("correct", chance.randrange(64))
    if history.destination == "folder" and chance.random() < 0.5:
        count = sum(i.study == STUDY_UID for i in history.instances)
        what = chance.choice(("power", "power after"))
        second = replace(
            second, faults=(Planned(chance.choice(("rename", "sync")), 1 + chance.randrange(2 * count), what),)
        )
    return replace(history, changes=(), steps=(first, between, replace(second, options=options)))


def _by_manifest(chance: random.Random, history: History) -> History:
    """A run breaks off, somebody deletes what it had stored, and what its manifest lists is asked for."""
    first, second = _two(chance, history)
    count = sum(i.study == STUDY_UID for i in history.instances)
    broken = replace(
        first,
        options={**first.options, "retries": 0},
        breaks=((10 + chance.randrange(4 * count + 4), chance.choice(BREAKS)),),
    )
    between = Between("delete", chance.randrange(64))
    return replace(history, changes=(), steps=(broken, between, replace(second, verb="manifest")))


def _unreachable(chance: random.Random, history: History) -> History:
    """All is forwarded, and then the node cannot be reached."""
    first, second = _two(chance, history)
    return replace(history, changes=(), steps=(first, replace(second, faults=(), breaks=(), node=(DOWN,))))


def _two(chance: random.Random, history: History) -> tuple[Run, Run]:
    """Two runs, the first without faults."""
    begun = history.steps[0]
    assert isinstance(begun, Run)
    options = {name: value for name, value in begun.options.items() if name not in ("resume", "adopt")}
    second = next((step for step in history.steps[1:] if isinstance(step, Run)), Run(options))
    options = {**second.options, **options}
    return Run(options), replace(second, ill=(), options=options)


THEMES = (_corrected, _replaced, _by_manifest)
"""Courses of events that chance alone would seldom put together."""


def _study(chance: random.Random, habits: Habits) -> tuple[Instance, ...]:
    series = chance.choice((1, 1, 2, 2, 3))
    each = chance.choice((1, 2, 3, 3, 5, 8))
    size = chance.choice((700, 1500, 1500, 4000))
    instances = archive.build(series=series, instances=each, size=size, pairs=chance.choice(PAIRS))
    if chance.random() < 0.3:
        instances = [replace(i, modality="MR") if i.series_number == 2 else i for i in instances]
    if chance.random() < MALFORMED:
        _malform(chance, instances)
    if chance.random() < 0.1 and len({i.series for i in instances}) > 1:
        first, other = instances[0], next(i for i in instances if i.series != instances[0].series)
        instances.append(replace(first, series=other.series, modality=other.modality, salt=chance.choice((0, 1))))
    others = archive.others(size)
    if habits.matching == "folds":
        return (*instances, replace(others[4], patient_id="0hostile1", accession="Hostile-Acc"))
    return (*instances, *others[:2])


def _malform(chance: random.Random, instances: list[Instance]) -> None:
    which = chance.randrange(len(instances))
    sop = chance.choice(("1.2.ABC", "..", "", "1." + "2" * 80, f"{instances[which].sop}.00"))
    instances[which] = replace(instances[which], sop=sop)


def _habits(chance: random.Random) -> Habits:
    return Habits(
        counts=chance.choice(("true", "true", "none", "none", "high")),
        cap=chance.choice((0, 0, 0, 0, 0, 0, 0, 2, 3, 5)),
        syntaxes=chance.random() < 0.3,
        counters=chance.choice(("true", "true", "true", "none")),
        classes=chance.random() < 0.75,
        matching=chance.choice(MATCHING) if chance.random() < 0.3 else "exact",
        model="patient" if chance.random() < 0.15 else "both",
        gets="series" if chance.random() < 0.1 else "asked",
    )


def _query(chance: random.Random, instances: tuple[Instance, ...], habits: Habits) -> tuple[dict[str, Any], str]:
    """The query, and the information model in which it is asked."""
    first = instances[0]
    model = "PatientRoot" if habits.model == "patient" or chance.random() < 0.1 else "StudyRoot"
    study = {"StudyInstanceUID": STUDY_UID}
    match chance.randrange(7 if habits.matching != "exact" else 14):
        case 0:
            return study | {"SeriesInstanceUID": first.series}, model
        case 1 | 2:
            return {"AccessionNumber": first.accession}, model
        case 3 | 4:
            return {"PatientID": first.patient_id, "StudyDate": first.date}, model
        case 5:
            return study | {"Modality": chance.choice(("CT", "MR"))}, model
        case 6 if is_uid(first.sop):
            return study | {"SeriesInstanceUID": first.series, "SOPInstanceUID": first.sop}, model
        case _:
            return study, model


def _options(chance: random.Random, destination: str) -> dict[str, Any]:
    """Options that all runs of a history have."""
    options: dict[str, Any] = {
        "durable": chance.random() < 0.85,
        "verify_held": chance.choice(("size", "digest")),
        "retries": chance.choice((0, 1, 5)),
    }
    if chance.random() < 0.1:
        options["store_with_file_meta"] = False
    if chance.random() < 0.1 and destination != "node":  # there sizes alone tell two objects apart, as the docs say
        options["checksum"] = None
    if options.get("checksum", "") is None:
        options["verify_held"] = "size"
    if chance.random() < 0.15:
        options["ack"] = "durable"
    if chance.random() < 0.15:
        options["sop_classes"] = chance.choice(([CT], [MR], [MR], [CT, MR]))
    if destination == "node":
        options.pop("store_with_file_meta", None)
        for name in ("strict_forward", "trust_destination"):
            if chance.random() < 0.15:
                options[name] = True
    elif chance.random() < 0.1:
        options["on_conflict"] = "replace"
    return options


def _traits(chance: random.Random, destination: str) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    if destination == "node":
        traits["find"] = chance.choice(("yes", "yes", "no", "fails", "fails"))
        if chance.random() < 0.4:
            traits["again"] = "keeps"
        if chance.random() < 0.15:
            traits["refuses"] = chance.choice((CT, MR))
        return traits
    if destination == "folder":
        if chance.random() < 0.1:
            traits["renames"] = chance.choice(("link", "plain"))
        if chance.random() < 0.1:
            traits["locks"] = chance.choice(("host", "none"))
        return traits
    if chance.random() < 0.3:
        traits["conditions"] = chance.choice(("ignored", "refused"))
    for name in ("metadata", "etags", "checksums"):
        if chance.random() < 0.1:
            traits[name] = False
    if chance.random() < 0.1:
        traits["page"] = chance.choice((1, 2, 3))
    return traits


_CALLS = {
    "write": 2,
    "sync": 3,
    "rename": 1,
    "open": 3,
    "close": 3,
    "unlink": 1,
    "read": 3,
    "status": 6,
    "put_object": 1,
}
"""About how often an operation is called for each instance; others are called a few times in a run."""


def _run(chance: random.Random, count: int, ill_chance: float, common: Mapping[str, Any], destination: str) -> Run:
    options = dict(common)
    if chance.random() < (0.5 if "on_conflict" in options else 0.1):
        options["resume"] = False
    elif destination != "node" and chance.random() < 0.1:
        options["adopt"] = True
    faults = []
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        own = S3_FAULTS if destination == "bucket" else DISK_FAULTS
        table = chance.choice((own, own, NETWORK_FAULTS))
        # The first two thirds of the table's operations are those after which programs break.
        operation = chance.choice(tuple(table)[:4] if chance.random() < 0.6 else tuple(table))
        number = 1 + chance.randrange(_CALLS.get(operation, 0) * count + 4)
        faults.append(Planned(operation, number, chance.choice(table[operation])))
    ill: list[tuple[int, str, float | None]] = []
    if chance.random() < ill_chance:
        mode = chance.choice(chance.choice((MODES, LIKELY)))
        ill = (
            [(n, mode, None) for n in range(1, 30)] if chance.random() < 0.3 else [(chance.randrange(1, 5), mode, None)]
        )
    breaks = []
    if chance.random() < 0.3:
        breaks = [
            (1 + chance.randrange(6 * count + 12), chance.choice(BREAKS)) for _ in range(chance.choice((1, 1, 2)))
        ]
    node = []
    if destination == "node":
        for _ in range(chance.choice((0, 0, 1, 1, 2))):
            met = chance.choice((*NODE_FAULTS, *NODE_FAULTS, *BREAKS))
            node.append((1 + chance.randrange(count + 2 if met in NODE_FAULTS else 3 * count + 6), met))
        if chance.random() < 0.08:
            node = [DOWN]
    return Run(options, tuple(faults), tuple(ill), tuple(breaks), node=tuple(node))
