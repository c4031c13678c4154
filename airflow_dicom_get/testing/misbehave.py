"""A PACS that misbehaves in a chosen way, for tests of DICOM clients.

Plain sockets and struct, one thread per association, loopback only, nothing of the engine in its
data path. Without a mode it is a well-behaved SCP of C-ECHO, C-FIND and C-GET that serves one
synthetic study from memory, each instance in its own transfer syntax; with a mode it breaks exactly
one rule::

    with MisbehavingPacs("drop", heal_after=1) as pacs:
        retrieve("127.0.0.1", pacs.port, pacs.study_uid)
        assert pacs.sent[pacs.uids[0]] == 1

:data:`MODES` describes each mode in a sentence. All patients are called
``HOSTILE^PATIENT``, so that a test can check that the name does not leak.
"""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from airflow_dicom_get.testing.ending import told_to_end
from airflow_dicom_get.testing.misbehaving import (
    archive,
    modes_association,
    modes_list,
    modes_object,
    modes_status,
    modes_wire,
    wire,
)
from airflow_dicom_get.testing.misbehaving.archive import CT, Instance
from airflow_dicom_get.testing.misbehaving.behaviour import MODE_CLASSES, MODES, Site
from airflow_dicom_get.testing.misbehaving.line import SocketLine
from airflow_dicom_get.testing.misbehaving.link import Link
from airflow_dicom_get.testing.misbehaving.scp import Scp
from airflow_dicom_get.testing.misbehaving.wire import EXPLICIT_LE

__all__ = ["MODES", "MisbehavingPacs", "many_pairs", "serve"]

_MODE_MODULES = (modes_association, modes_list, modes_object, modes_status, modes_wire)
"""Imported for what they register."""

_JOIN_SECONDS = 5.0


def many_pairs(count: int) -> list[tuple[str, str]]:
    """``count`` different pairs of SOP class and transfer syntax, for a study that needs many contexts."""
    classes = [f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("1", "1.1", "2", "4", "7", "12.1", "20", "128")]
    classes += [f"1.2.826.0.1.3680043.9.9999.{n}" for n in range(1, count // 4 + 1)]
    syntaxes = [EXPLICIT_LE, wire.IMPLICIT_LE, wire.JPEG_2000, "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.70"]
    return [(c, s) for c in classes for s in syntaxes][:count]


class MisbehavingPacs:
    """A server on a loopback port, to be used as a context manager.

    Parameters
    ----------
    mode : str or None
        A name of :data:`MODES`, also as ``name:param``; ``None`` behaves correctly.
    heal_after : int or None
        So many associations misbehave; later ones behave correctly. An association counts from where the mode
        can act: one that only does a C-FIND does not use up a mode of C-GET.
    param : str or float or None
        Parameter of the mode, if its description names one.
    series, instances : int
        Number of series, and of instances in each.
    size : int
        Bytes of a data set.
    host, port : str, int
        A loopback address; port 0 takes a free one.
    ae_title : str or None
        If given, other called AE titles are rejected.
    pairs : sequence of (str, str)
        SOP classes and transfer syntaxes, dealt out to the instances in turn.
    list_syntaxes : bool
        Whether C-FIND answers contain (0008,3002) Available Transfer Syntax UID.
    victim : int or None
        Number (from 0) of the instance that a mode which spoils one object spoils, whenever it is asked for;
        by default such a mode spoils the middle one of whatever a C-GET asks for.
    max_seconds, max_bytes : float or None, int or None
        Bounds of a misbehaving association, instead of those of the mode (at most 120 s, 512 MiB).

    Attributes
    ----------
    study_uid : str
    uids : list of str
        SOP Instance UIDs that the study holds.
    sent : Counter of str
        How often each SOP Instance UID was sent whole.
    statuses : list of int
        Statuses of the C-STORE-RSPs that were received.
    finals : list of int
        Statuses of the final C-GET-RSPs that were sent; -1 for one without.
    associations : int
        Connections that were accepted.
    faults : list of str
        Tracebacks of bugs in this server itself; should be empty.
    """

    def __init__(
        self,
        mode: str | None = None,
        *,
        heal_after: int | None = None,
        param: str | float | None = None,
        series: int = 2,
        instances: int = 4,
        size: int = 4096,
        host: str = "127.0.0.1",
        port: int = 0,
        ae_title: str | None = None,
        pairs: Sequence[tuple[str, str]] = ((CT, EXPLICIT_LE),),
        list_syntaxes: bool = False,
        victim: int | None = None,
        max_seconds: float | None = None,
        max_bytes: int | None = None,
    ) -> None:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"{host!r} is not a loopback address; a misbehaving PACS serves on loopback only")
        name, _, tail = (mode or "").partition(":")
        if name and name not in MODE_CLASSES:
            near = ", ".join(difflib.get_close_matches(name, MODES, n=3)) or "nothing like it"
            raise ValueError(f"there is no mode {name!r}, but {near}; 'list' shows all {len(MODES)}")
        self.mode = name or None
        self.host = host
        ill = MODE_CLASSES.get(name)
        if heal_after is None and ill is not None:
            heal_after = ill.heal_after
        held = archive.build(series=series, instances=instances, size=size, pairs=pairs)
        self._site = Site(
            held,
            param if param is not None else tail or None,
            ae_title,
            list_syntaxes,
            None if victim is None else held[victim].sop,
        )
        self._scp = Scp(self._site, ill, heal_after, (max_seconds, max_bytes))
        self._closing = threading.Event()
        self._lines: set[SocketLine] = set()
        self._threads: list[threading.Thread] = []
        self._connections = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        self.port: int = self._listener.getsockname()[1]

    # --- what a test asks ----------------------------------------------------------------------

    @property
    def study_uid(self) -> str:
        """Study Instance UID of the only study."""
        return archive.STUDY_UID

    @property
    def instances(self) -> list[Instance]:
        """What the study holds."""
        return list(self._site.instances)

    @property
    def uids(self) -> list[str]:
        """SOP Instance UIDs of the study."""
        return [i.sop for i in self._site.instances]

    def dataset(self, sop: str) -> bytes:
        """The data set of an instance, as a good association sends it."""
        return next(i for i in self._site.instances if i.sop == sop).dataset()

    @property
    def sent(self) -> Counter[str]:
        """How often each instance was sent whole."""
        with self._site.lock:
            return self._site.sent.copy()

    @property
    def answers(self) -> list[tuple[int, int]]:
        """Command field and status of every response that was received."""
        with self._site.lock:
            return list(self._site.answers)

    @property
    def statuses(self) -> list[int]:
        """Statuses of the C-STORE-RSPs that were received."""
        return [status for field, status in self.answers if field == wire.C_STORE | wire.RESPONSE]

    @property
    def finals(self) -> list[int]:
        """Statuses of the final C-GET-RSPs that were sent."""
        with self._site.lock:
            return list(self._site.finals)

    @property
    def associations(self) -> int:
        """Connections accepted so far."""
        return self._connections

    @property
    def faults(self) -> list[str]:
        """See the class."""
        return self._scp.faults

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve in a thread of its own until :meth:`close`."""
        thread = threading.Thread(target=self._accept, name=f"misbehaving-pacs-{self.port}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End all associations and the server."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._site.lock:
            lines = list(self._lines)
        for line in lines:
            line.close()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def __enter__(self) -> MisbehavingPacs:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- associations --------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._connections += 1
            line = SocketLine(sock)
            with self._site.lock:
                self._lines.add(line)
            thread = threading.Thread(target=self._serve, args=(line, self._connections), daemon=True)
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
            thread.start()

    def _serve(self, line: SocketLine, number: int) -> None:
        try:
            self._scp.serve(Link(line, number))
        finally:
            with self._site.lock:
                self._lines.discard(line)
            line.free()


def serve(mode: str | None, host: str = "127.0.0.1", port: int = 11112, **options: object) -> int:
    """Serve until SIGINT or SIGTERM; prints one line on standard output once it listens.

    Parameters
    ----------
    mode : str or None
        As for :class:`MisbehavingPacs`, whose other parameters are taken too; ``list`` prints the
        modes and serves nothing.

    Returns
    -------
    int
        0.
    """
    if mode == "list":
        for name, sentence in sorted(MODES.items()):
            print(f"{name:26} {sentence}")
        return 0
    with (
        told_to_end() as wait,
        MisbehavingPacs(mode, host=host, port=port, **options) as pacs,  # type: ignore[arg-type]
    ):
        shown = f"[{host}]" if ":" in host else host
        what = f"misbehaving: {mode}" if mode else "behaving well"
        print(f"PACS on {shown}:{pacs.port}, study {pacs.study_uid}, {what}", flush=True)
        wait()
    for fault in pacs.faults:
        print(fault, file=sys.stderr)
    return 0
