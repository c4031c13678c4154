"""The sink contract: where instances go, whatever lies behind it.

``take`` decides what the source is told; only a confirmation makes an instance count. A sink is
idempotent by Series and SOP Instance UID, names objects by their UIDs alone, shows nothing half-written under a
final name, and cleans up only after runs that are dead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from airflow_dicom_get.errors import SinkError
from airflow_dicom_get.records import Instance, Key, Stored
from airflow_dicom_get.vocabulary import State


def ended_early() -> SinkError:
    """What is raised in a run that is to end before what is held was read or compared, which may take long."""
    return SinkError("The run ended before it was known what is held.", hint="Run again.")


class Taken(NamedTuple):
    """The sink's answer for a whole instance: the DIMSE status for the source, and why if it was not taken.

    It was taken where ``reason`` is None, also with the status of a warning; ``state`` is what it is then, and
    ``remark`` a reason that its row shows nevertheless.
    """

    status: int
    reason: str | None = None
    error: str | None = None
    state: State = "stored"
    remark: str | None = None


class Confirmation(NamedTuple):
    """An instance is now durable, or (``error``) could not be; ``remark`` as in :class:`Taken`.

    It was taken before, or its :meth:`Writer.take` raised :class:`~airflow_dicom_get.errors.ForwardLate`.
    """

    instance: Instance
    error: str | None = None
    reason: str = "destination_error"
    remark: str | None = None


class Writer(Protocol):
    """Takes the data set of one instance as it arrives."""

    def write(self, view: memoryview) -> None:
        """Take the next bytes; the view is void afterwards.

        Raises
        ------
        ForwardLost
            The source cannot be answered in time: give its association up.
        SinkError
            The instance is lost; the next one may not be.
        """

    def take(self) -> Taken:
        """The data set is whole. Fills size, digest and URI of the instance.

        Raises
        ------
        ForwardLost
            The source cannot be answered in time: give its association up. After :class:`ForwardLate`
            a confirmation of the instance will still come.
        """

    def abort(self) -> None:
        """The data set will never be whole; leave nothing behind."""


class Sink(Protocol):
    """A destination. Thread-safe: several associations write at once."""

    def inventory(self, study: str, patient: Mapping[int, bytes] = {}) -> dict[Key, Stored]:
        """What is held of a study, by series and SOP Instance UID, verified as far as ``verify_held`` asks.

        ``patient`` is the key above the study in Patient Root, where it is known: a node may ask for it.

        Raises
        ------
        LedgerError
            A ledger file is of a newer schema or broken beyond its last line.
        """

    def head(self, held: Stored, size: int) -> bytes:
        """The first bytes of what is held, at most ``size``; empty where it cannot be read back."""

    def begin(self, instance: Instance) -> Writer | Taken:
        """Begin an instance whose study, series, sop, sop_class and syntax are known, or refuse it.

        Raises as :meth:`Writer.write`.
        """

    def confirmations(self, *, wait: bool = False) -> list[Confirmation]:
        """Those that came since the last call; with ``wait`` all that are still due."""

    def end_study(self, study: str) -> None:
        """Give back what is held open for a study, of which nothing more comes in this run; close raises its errors."""

    def close(self) -> None:
        """Confirm what is due, give back locks and files.

        Raises
        ------
        SinkError
            What was recorded may be lost. All is closed nevertheless.
        """
