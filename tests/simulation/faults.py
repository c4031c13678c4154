"""What goes wrong in a simulated history, and when: shared by all models.

A :class:`Process` is what dies when it is killed. Each model asks it before every call; it counts the calls by the
name of the operation, and tells which fault, if any, this one meets::

    process = Process(Faults({("sync", 3): Fault(error=errno.EIO), ("rename", 2): Fault(ends="power", after=True)}))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


class ModelError(AssertionError):
    """What no real system forgives, or what the model does not know: never a part of a legal history."""


class Killed(BaseException):
    """The process is dead. What it still tries, as in its ``finally``, raises this again and has no effect."""


class Chance(Protocol):
    """Where choices come from; :class:`random.Random` is one."""

    def randrange(self, stop: int, /) -> int:
        """A number from 0 to ``stop`` - 1."""


class Least:
    """Always the first choice."""

    def randrange(self, stop: int, /) -> int:
        """See :meth:`Chance.randrange`."""
        return 0


@dataclass(frozen=True, slots=True)
class Fault:
    """What a call meets.

    Attributes
    ----------
    error : int or str
        How it fails: an ``errno`` of the disk, a code of S3; what else is for each model to say.
    after : bool
        It has its effect first, and fails, or the process ends, then.
    short : bool
        A write takes half of what it is given.
    ends : {"kill", "power"}
        The process is killed, or the machine loses power.
    first : callable
        What somebody else does right before.
    """

    error: int | str | None = None
    after: bool = False
    short: bool = False
    ends: Literal["kill", "power"] | None = None
    first: Callable[[], object] | None = None


Plan = Callable[[str, int], Fault | None]
"""Asked for each call with its operation, and its number (from 1) among those of that operation."""


class Faults:
    """The faults of a history.

    Parameters
    ----------
    plan : mapping of (operation, number) to Fault, or a function of both

    Attributes
    ----------
    calls : Counter
        How often each operation was called.
    trace : list of str
        All calls in order: two runs of one seed have the same.
    met : list of (str, int, Fault)
        The faults that were made.
    """

    def __init__(self, plan: Mapping[tuple[str, int], Fault] | Plan | None = None) -> None:
        self._plan: Plan = plan if callable(plan) else _in(plan or {})
        self.calls: Counter[str] = Counter()
        self.trace: list[str] = []
        self.met: list[tuple[str, int, Fault]] = []

    def at(self, operation: str) -> Fault | None:
        """Count a call; what it meets."""
        number = self.calls[operation] = self.calls.get(operation, 0) + 1
        self.trace.append(operation)
        fault = self._plan(operation, number)
        if fault is not None:
            self.met.append((operation, number, fault))
        return fault


def _in(planned: Mapping[tuple[str, int], Fault]) -> Plan:
    return lambda operation, number: planned.get((operation, number))


class Process:
    """A process of ours: it lives until it is killed, or its machine loses power.

    Attributes
    ----------
    faults : Faults
        What its calls meet.
    dead : bool
    breaches : list of str
        What a :class:`ModelError` said: also of those that were caught and hidden on their way.
    at_death : list of callable
        What the models do when it dies, as closing its descriptors.
    at_power_cut : list of callable
        What they do besides when power is lost.
    pause : callable
        Lets others go on for a while. Without it there are no others.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.dead = False
        self.breaches: list[str] = []
        self.at_death: list[Callable[[], object]] = []
        self.at_power_cut: list[Callable[[], object]] = []
        self.pause: Callable[[], object] | None = None

    def call(self, operation: str) -> Fault | None:
        """Begin a call: the fault that the model has to make of it, and to hand to :meth:`end_of_call` afterwards.

        Raises
        ------
        Killed
            The process is dead, or dies now.
        """
        if self.dead:
            raise Killed(operation)
        fault = self.faults.at(operation)
        if fault is not None:
            if fault.first is not None:
                fault.first()
            if not fault.after and not fault.short:
                self.end_of_call(fault)
        return fault

    def end_of_call(self, fault: Fault) -> None:
        """The call had its effect. Raises :class:`Killed` where it ends the process."""
        if fault.ends is not None:
            self.die(power=fault.ends == "power")
            raise Killed(fault.ends)

    def die(self, *, power: bool = False) -> None:
        """It is killed; without ``power`` the machine goes on."""
        if not self.dead:
            self.dead = True
            for do in self.at_death:
                do()
        for do in self.at_power_cut if power else ():
            do()

    def wait(self, what: str) -> None:
        """Wait a while for something that others have to do."""
        if self.pause is None:
            raise self.breach(f"waits for ever for {what}")
        self.pause()
        if self.dead:
            raise Killed(what)

    def breach(self, text: str) -> ModelError:
        """An error to raise, which is kept here too."""
        self.breaches.append(text)
        return ModelError(text)
