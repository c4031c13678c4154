"""An embedded PACS: serves a folder of Part 10 files by C-ECHO, C-FIND, C-GET and C-STORE.

It sends each file's own data set bytes in the file's own transfer syntax, never decoded, never
re-encoded: where no context with exactly that class and syntax was accepted, the sub-operation
fails. pynetdicom carries the associations; what is sent is written to the socket past its queue of
primitives, which holds whole messages and costs a poll for each.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty
from types import TracebackType
from typing import Any, Self

from pynetdicom import AE, build_context, evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_GET, C_STORE
from pynetdicom.dsutils import decode
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import ServiceClass, StorageServiceClass
from pynetdicom.sop_class import uid_to_service_class
from pynetdicom.transport import AddressInformation, AssociationSocket, RequestHandler, ThreadedAssociationServer

from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.testing import archive as ar
from airflow_dicom_get.testing.archive import Archive, BadIdentifierError, Entry, NotIndexedError, text_values
from airflow_dicom_get.testing.encoding import (
    HAS_DATASET,
    NO_DATASET,
    Fragment,
    chunks,
    command_set,
    fragments,
    identifier,
    p_data,
    part10_header,
)
from airflow_dicom_get.testing.ending import told_to_end
from airflow_dicom_get.vocabulary import noun

logger = logging.getLogger(__name__)

SUCCESS, PENDING, CANCELLED = 0x0000, 0xFF00, 0xFE00
SUB_OPERATIONS_FAILED, SOME_FAILED = 0xA702, 0xB000
OUT_OF_RESOURCES, NOT_MATCHING, CANNOT_UNDERSTAND = 0xA700, 0xA900, 0xC000

_VERIFICATION = "1.2.840.10008.1.1"
_PATIENT_ROOT_FIND, _PATIENT_ROOT_GET = "1.2.840.10008.5.1.4.1.2.1.1", "1.2.840.10008.5.1.4.1.2.1.3"
_STUDY_ROOT_FIND, _STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
_FIND = frozenset({_PATIENT_ROOT_FIND, _STUDY_ROOT_FIND})
_GET = frozenset({_PATIENT_ROOT_GET, _STUDY_ROOT_GET})
_PATIENT_ROOT = frozenset({_PATIENT_ROOT_FIND, _PATIENT_ROOT_GET})
_QUERY_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_IMPLICIT = "1.2.840.10008.1.2"

_MAX_PDU = 131072
_TICK = 0.005
_WARNINGS = frozenset({0xB000, 0xB006, 0xB007})


class _PeerGoneError(Exception):
    """The association ended, or fell silent, while an operation was running."""


class EmbeddedPacs:
    """A PACS over a folder.

    Parameters
    ----------
    folder : str or Path
        Indexed recursively at ``start``; instances that are stored go below it.
    ae_title, host, port
        Where it listens; port 0 takes a free one, see ``port`` after ``start``.
    require_called_ae : bool
        Reject associations that call another AE title.
    max_associations : int
        One more is rejected as a transient failure (local limit exceeded).
    dimse_timeout : float
        Seconds to wait for the response to a sub-operation before the association is aborted.
    ssl_context : ssl.SSLContext, optional
        Speak TLS.
    hide : iterable of str
        SOP Instance UIDs that are listed, but neither sent nor counted when requested.
    fail : iterable of str
        SOP Instance UIDs whose sub-operation is counted as failed without being sent.
    omit_classes, omit_syntaxes, omit_counts : bool
        Leave out of C-FIND answers, as many PACS do: SOP classes, Available Transfer Syntax UID,
        and the numbers of related series and instances with the modalities in the study.
    omit_counters : bool
        Leave the numbers of sub-operations out of C-GET responses.
    pending : bool
        Send a pending response after each sub-operation.
    no_find, no_get : bool
        Refuse the contexts of the service.
    answer_roles : bool
        Answer role selection. If false, sub-operations are sent anyway, as some PACS do.
    final_status : int, optional
        The status of every final C-GET response, whatever happened.
    before_send : callable, optional
        Called with the SOP Instance UID before each sub-operation, in the thread of its association.
        An exception aborts the association.

    Attributes
    ----------
    sent : Counter
        C-STORE requests sent in full, by SOP Instance UID.
    associations, peak_associations, total_associations : int
        Associations open now, at most at one time, and ever.
    requests : deque of (str, str, dict)
        The last 1000 requests: ``"C-FIND"`` or ``"C-GET"``, the level, and the keys as text by tag.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        ae_title: str = "PACS",
        host: str = "127.0.0.1",
        port: int = 0,
        require_called_ae: bool = False,
        max_associations: int = 10,
        dimse_timeout: float = 60.0,
        ssl_context: ssl.SSLContext | None = None,
        hide: Iterable[str] = (),
        fail: Iterable[str] = (),
        omit_classes: bool = False,
        omit_syntaxes: bool = False,
        omit_counts: bool = False,
        omit_counters: bool = False,
        pending: bool = True,
        no_find: bool = False,
        no_get: bool = False,
        answer_roles: bool = True,
        final_status: int | None = None,
        before_send: Callable[[str], None] | None = None,
    ) -> None:
        self.archive = Archive(Path(folder))
        self.ae_title, self.host, self.port = ae_title, host, port
        self.require_called_ae, self.max_associations = require_called_ae, max_associations
        self.dimse_timeout, self.ssl_context = dimse_timeout, ssl_context
        self.hide, self.fail = set(hide), set(fail)
        self.omit_classes, self.omit_syntaxes, self.omit_counts = omit_classes, omit_syntaxes, omit_counts
        self.omit_counters, self.pending, self.answer_roles = omit_counters, pending, answer_roles
        self.no_find, self.no_get = no_find, no_get
        self.final_status, self.before_send = final_status, before_send

        self.sent: Counter[str] = Counter()
        self.requests: deque[tuple[str, str, dict[int, str]]] = deque(maxlen=1000)
        self.peak_associations = self.total_associations = 0
        self._open: set[_Association] = set()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    @property
    def associations(self) -> int:
        return len(self._open)

    def start(self) -> Self:
        """Index the folder and listen. ``OSError`` if the address is in use."""
        self.archive.load()
        ae = AE(self.ae_title)
        ae.require_called_aet = self.require_called_ae
        ae.maximum_pdu_size = _MAX_PDU
        ae.dimse_timeout = self.dimse_timeout
        # The limit is kept by ourselves: pynetdicom counts threads, also those that have just released.
        ae.maximum_associations = 100_000
        server = ae.make_server(
            (self.host, self.port),
            contexts=[build_context(_VERIFICATION)],
            ssl_context=self.ssl_context,
            evt_handlers=[
                (evt.EVT_REQUESTED, self._requested),
                (evt.EVT_RELEASED, self._ended),
                (evt.EVT_ABORTED, self._ended),
            ],
            server_class=_Server,
            request_handler=_Handler,
        )
        assert isinstance(server, _Server)
        server.pacs = self
        ae._servers.append(server)
        self.port = server.server_address[1]
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.1,), name=f"pacs-{self.port}", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and cut the associations that are open."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        for association in server.active_associations:
            assert isinstance(association, _Association)
            association.cut()
            association.join(5.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def unsupported(self) -> frozenset[int]:
        """The C-FIND keys that are neither matched nor returned."""
        tags: tuple[int, ...] = ()
        if self.omit_classes:
            tags += (ar.SOP_CLASS, ar.SOP_CLASSES_IN_STUDY)
        if self.omit_syntaxes:
            tags += (ar.AVAILABLE_SYNTAX,)
        if self.omit_counts:
            tags += (
                ar.PATIENT_STUDIES, ar.PATIENT_SERIES, ar.PATIENT_INSTANCES, ar.STUDY_SERIES, ar.STUDY_INSTANCES,
                ar.SERIES_INSTANCES, ar.MODALITIES_IN_STUDY,
            )  # fmt: skip
        return frozenset(tags)

    def count_sent(self, sop: str) -> None:
        with self._lock:
            self.sent[sop] += 1

    def _requested(self, event: evt.Event) -> None:
        association = event.assoc
        assert isinstance(association, _Association)
        with self._lock:
            admitted = len(self._open) < self.max_associations
            if admitted:
                self._open.add(association)
                self.total_associations += 1
                self.peak_associations = max(self.peak_associations, len(self._open))
        if not admitted:
            association.acse.send_reject(0x02, 0x03, 0x02)
            association.kill()
            return
        request = association.requestor.primitive
        assert request is not None
        association.acceptor.supported_contexts = self._supported(request.presentation_context_definition_list)

    def _ended(self, event: evt.Event) -> None:
        assert isinstance(event.assoc, _Association)
        self.leave(event.assoc)

    def leave(self, association: _Association) -> None:
        """Count an association as over."""
        with self._lock:
            self._open.discard(association)

    def _supported(self, proposed: list[PresentationContext]) -> list[PresentationContext]:
        """Everything that is proposed, in the role of a storage SCU where a role was asked for."""
        offered: dict[str, dict[str, None]] = {}
        for context in proposed:
            offered.setdefault(str(context.abstract_syntax), {}).update(dict.fromkeys(context.transfer_syntax))
        supported = []
        for sop_class, syntaxes in offered.items():
            if sop_class in _FIND | _GET:
                if (self.no_find and sop_class in _FIND) or (self.no_get and sop_class in _GET):
                    continue
                context = build_context(sop_class, list(_QUERY_SYNTAXES))
            elif sop_class == _VERIFICATION:
                context = build_context(sop_class, list(syntaxes))
            elif uid_to_service_class(sop_class) in (StorageServiceClass, ServiceClass):
                # Where one context offers several syntaxes, one in which the class is held does most good.
                held = [syntax for syntax in self.archive.syntaxes(sop_class) if syntax in syntaxes]
                context = build_context(sop_class, list(dict.fromkeys([*held, *syntaxes])))
                if self.answer_roles:
                    context.scu_role = context.scp_role = True
            else:
                continue
            supported.append(context)
        return supported


def serve(folder: str | Path, host: str, port: int, ae_title: str) -> None:
    """Serve a folder until SIGINT or SIGTERM. Prints one line on stdout when it is ready, with its address."""
    if not Path(folder).is_dir():
        raise InvalidOption(f"--dir: {str(folder)!r} is not a folder.", hint="Name an existing folder.", option="--dir")
    with (
        told_to_end() as wait,
        EmbeddedPacs(folder, host=host, port=port, ae_title=ae_title, max_associations=50) as pacs,
    ):
        shown = f"[{host}]" if ":" in host else host
        instances, studies = len(pacs.archive.entries()), len(pacs.archive.studies())
        held = f"{instances} {noun(instances, 'instance')} of {studies} {noun(studies, 'study', 'studies')}"
        print(f"PACS {ae_title}@{shown}:{pacs.port} serving {held}", flush=True)
        wait()


class _Socket(AssociationSocket):
    """Waits a moment for data instead of polling, and reads a PDU in as few calls as it can."""

    def __init__(self, assoc: Association, client_socket: socket.socket) -> None:
        super().__init__(assoc, client_socket=client_socket)
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encrypted = isinstance(client_socket, ssl.SSLSocket)

    @property
    def ready(self) -> bool:
        # Under TLS all that is sent comes from the loop that would wait here.
        if self.encrypted or self.socket is None:
            return super().ready
        with suppress(OSError, ValueError):
            select.select([self.socket], [], [], _TICK)
        return super().ready

    def recv(self, nr_bytes: int) -> bytearray:
        buffer = bytearray(nr_bytes)
        view, got = memoryview(buffer), 0
        assert self.socket is not None
        while got < nr_bytes:
            # A client with Nagle's algorithm on sends the rest of a message only once the first part is acknowledged.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            count = self.socket.recv_into(view[got:])
            if not count:
                break
            got += count
        view.release()
        del buffer[got:]
        return buffer

    def _shutdown_socket(self) -> None:
        # pynetdicom leaves a socket open whose peer was quicker to shut it down.
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()


class _Server(ThreadedAssociationServer):
    request_queue_size = 64
    pacs: EmbeddedPacs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gc = [0, 600]

    def _bind_defaults(self) -> None:
        # Without pynetdicom's logging handlers, which format every PDU and name patients.
        for event in evt._INTERVENTION_EVENTS:
            self.bind(event, evt.get_default_handler(event))

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("connection refused", exc_info=True)


class _Handler(RequestHandler):
    def _create_association(self) -> Association:
        server = self.server
        assert isinstance(server, _Server)
        association = _Association(server.pacs, self.ae)
        association._server = server
        association.name = f"AcceptorThread@{server.pacs.port}"
        association.set_socket(_Socket(association, self.request))
        association.dul._run_loop_delay = 0.001 if server.ssl_context else 0
        acceptor, requestor = association.acceptor, association.requestor
        acceptor.maximum_length = self.ae.maximum_pdu_size
        acceptor.ae_title = server.ae_title
        acceptor.address_info = self.local
        acceptor.implementation_class_uid = self.ae.implementation_class_uid
        acceptor.implementation_version_name = self.ae.implementation_version_name
        acceptor.supported_contexts = list(server.contexts)
        requestor.address_info = AddressInformation.from_tuple(self.client_address)
        for event in server.get_events():
            handlers: Any = server.get_handlers(event)
            for handler, arguments in [handlers] if event.is_intervention else handlers:
                association.bind(event, handler, arguments)
        return association


class _Association(Association):
    """Serves C-ECHO, C-FIND, C-GET and C-STORE by itself; the rest is pynetdicom's."""

    def __init__(self, pacs: EmbeddedPacs, ae: AE) -> None:
        super().__init__(ae, MODE_ACCEPTOR)
        self.pacs = pacs
        self.daemon = self.dul.daemon = True

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        finally:
            self.pacs.leave(self)

    def cut(self) -> None:
        """End the connection from another thread, without a word."""
        wrapper = self.dul.socket
        if wrapper is not None and wrapper.socket is not None:
            with suppress(OSError):
                wrapper.socket.shutdown(socket.SHUT_RDWR)

    def _serve_request(self, msg: Any, context_id: int) -> None:
        services: dict[type, Callable[[Any, PresentationContext], None]] = {
            C_ECHO: self._echo,
            C_FIND: self._find,
            C_GET: self._get,
            C_STORE: self._store,
        }
        service = services.get(type(msg))
        context = self._accepted_cx.get(context_id)
        if service is None or context is None or not msg.is_valid_request:
            super()._serve_request(msg, context_id)
            return
        self.dimse.cancel_req = {}
        try:
            service(msg, context)
        except (OSError, _PeerGoneError):
            # The reactor sees the end of the connection for itself.
            self.cut()
        except Exception:
            logger.exception("%s failed", type(msg).__name__)
            self.abort()
        finally:
            self.dimse.cancel_req = {}

    # --- sending ---------------------------------------------------------------------------------

    @property
    def _fragment_size(self) -> int:
        announced = self.requestor.maximum_length or _MAX_PDU
        return max(min(announced, _MAX_PDU) - 6, 2) & ~1

    def _send(self, context_id: int, parts: Iterator[Fragment]) -> None:
        wrapper = self.dul.socket
        sock = wrapper.socket if wrapper is not None else None
        if sock is None:
            raise _PeerGoneError
        if not isinstance(sock, ssl.SSLSocket):
            first = True
            held = b""
            for part in parts:
                held += p_data(context_id, part)
                # The command goes out with the first fragment of its data set, in one segment train.
                if first:
                    first = False
                    continue
                sock.sendall(held)
                held = b""
            if held:
                sock.sendall(held)
            return
        # One SSL object must not be used by two threads at once, so the reactor sends.
        for control, data in parts:
            primitive = P_DATA()
            primitive.presentation_data_value_list.append((context_id, bytes([control]) + data))
            self.dul.send_pdu(primitive)
            while self.dul.to_provider_queue.qsize() > 8:
                if not self.dul.is_alive():
                    raise _PeerGoneError
                time.sleep(0.001)

    def _respond(self, context_id: int, elements: dict[int, str | int], dataset: bytes = b"") -> None:
        command = command_set({**elements, 0x0800: HAS_DATASET if dataset else NO_DATASET})
        size = self._fragment_size
        self._send(context_id, fragments(chunks(command, size), chunks(dataset, size)))

    def _is_cancelled(self, message_id: int) -> bool:
        return message_id in self.dimse.cancel_req

    # --- services --------------------------------------------------------------------------------

    def _echo(self, msg: C_ECHO, context: PresentationContext) -> None:
        self._respond(
            _id(context),
            {0x0002: _VERIFICATION, 0x0100: 0x8030, 0x0120: msg.MessageID or 0, 0x0900: SUCCESS},
        )

    def _keys(self, msg: C_FIND | C_GET, context: PresentationContext) -> tuple[str, dict[int, str]]:
        implicit = context.transfer_syntax[0] == _IMPLICIT
        assert msg.Identifier is not None
        keys = text_values(decode(msg.Identifier, implicit, True))
        return keys.pop(ar.RETRIEVE_LEVEL, ""), keys

    def _find(self, msg: C_FIND, context: PresentationContext) -> None:
        answer: dict[int, str | int] = {
            0x0002: str(context.abstract_syntax),
            0x0100: 0x8020,
            0x0120: msg.MessageID or 0,
        }
        level, keys = self._keys(msg, context)
        self.pacs.requests.append(("C-FIND", level, keys))
        top = "PATIENT" if context.abstract_syntax in _PATIENT_ROOT else "STUDY"
        if level not in ar.LEVELS[ar.LEVELS.index(top) :]:
            self._respond(_id(context), {**answer, 0x0900: NOT_MATCHING, 0x0902: "Query/Retrieve Level"})
            return
        unsupported = self.pacs.unsupported()
        always = [ar.UNIQUE_KEYS[name] for name in ar.LEVELS[ar.LEVELS.index(top) : ar.LEVELS.index(level) + 1]]
        wanted = [tag for tag in {*keys, *always} if tag not in unsupported and tag != ar.CHARACTER_SET]
        implicit = context.transfer_syntax[0] == _IMPLICIT
        extra = {ar.RETRIEVE_LEVEL: level, ar.RETRIEVE_AE: self.pacs.ae_title, ar.AVAILABILITY: "ONLINE"}
        for row in self.pacs.archive.find(level, keys, unsupported):
            if self._is_cancelled(msg.MessageID or 0):
                self._respond(_id(context), {**answer, 0x0900: CANCELLED})
                return
            values = {tag: row.get(tag, "") for tag in wanted} | extra
            self._respond(_id(context), {**answer, 0x0900: PENDING}, identifier(values, implicit_vr=implicit))
        self._respond(_id(context), {**answer, 0x0900: SUCCESS})

    def _get(self, msg: C_GET, context: PresentationContext) -> None:
        level, keys = self._keys(msg, context)
        self.pacs.requests.append(("C-GET", level, keys))
        run = _Retrieval(self, msg.MessageID or 0, context)
        try:
            entries = self.pacs.archive.select(level, keys, patient_root=context.abstract_syntax in _PATIENT_ROOT)
        except BadIdentifierError as exc:
            run.refuse(str(exc))
            return
        run.execute([entry for entry in entries if entry.sop not in self.pacs.hide])

    def _store(self, msg: C_STORE, context: PresentationContext) -> None:
        status = self._keep(msg, str(context.transfer_syntax[0]))
        self._respond(
            _id(context),
            {
                0x0002: str(msg.AffectedSOPClassUID),
                0x0100: 0x8001,
                0x0120: msg.MessageID or 0,
                0x0900: status,
                0x1000: str(msg.AffectedSOPInstanceUID),
            },
        )

    def _keep(self, msg: C_STORE, syntax: str) -> int:
        if msg.DataSet is None:
            return CANNOT_UNDERSTAND
        folder = self.pacs.archive.folder
        temporary = folder / f".{threading.get_ident()}-{time.monotonic_ns()}.part"
        sop_class, sop = str(msg.AffectedSOPClassUID), str(msg.AffectedSOPInstanceUID)
        try:
            with temporary.open("xb") as file:
                file.write(part10_header(sop_class, sop, syntax, sender=str(self.requestor.ae_title)))
                file.write(msg.DataSet.getbuffer())
            _, _, _, row = ar.read_header(temporary)
            if (row[ar.SOP_CLASS], row[ar.SOP_INSTANCE]) != (sop_class, sop):
                return NOT_MATCHING
            final = folder / row[ar.STUDY_UID] / row[ar.SERIES_UID] / f"{sop}.dcm"
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, final)
            self.pacs.archive.add(final, replace=True)
        except NotIndexedError:
            return CANNOT_UNDERSTAND
        except OSError:
            logger.exception("an instance could not be stored")
            return OUT_OF_RESOURCES
        finally:
            temporary.unlink(missing_ok=True)
        return SUCCESS


class _Retrieval:
    """One C-GET: its sub-operations, their counts, its responses."""

    def __init__(self, association: _Association, message_id: int, context: PresentationContext) -> None:
        self.association, self.pacs = association, association.pacs
        self.message_id, self.context = message_id, context
        self.remaining = self.completed = self.warning = 0
        self.failed: list[str] = []
        self._sub_operation_id = message_id

    def refuse(self, comment: str) -> None:
        elements = {**self._head(NOT_MATCHING), 0x0902: comment[:64]}
        self.association._respond(_id(self.context), elements)

    def execute(self, entries: list[Entry]) -> None:
        contexts = self._contexts()
        self.remaining = len(entries)
        for entry in entries:
            if self.association._is_cancelled(self.message_id):
                self._finish(CANCELLED)
                return
            if self.pacs.before_send is not None:
                self.pacs.before_send(entry.sop)
            context_id = contexts.get((entry.sop_class, entry.syntax))
            if context_id is None or entry.sop in self.pacs.fail:
                status = None
            else:
                status = self._sub_operation(entry, context_id)
            self.remaining -= 1
            if status == SUCCESS:
                self.completed += 1
            elif status in _WARNINGS:
                self.warning += 1
            else:
                self.failed.append(entry.sop)
            if self.pacs.pending and self.remaining:
                self.association._respond(_id(self.context), self._head(PENDING))
        if not self.failed and not self.warning:
            self._finish(SUCCESS)
        elif len(self.failed) == len(entries):
            self._finish(SUB_OPERATIONS_FAILED)
        else:
            self._finish(SOME_FAILED)

    def _contexts(self) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for context_id, context in self.association._accepted_cx.items():
            if context.as_scu or not self.pacs.answer_roles:
                found.setdefault((str(context.abstract_syntax), str(context.transfer_syntax[0])), context_id)
        return found

    def _head(self, status: int) -> dict[int, str | int]:
        elements: dict[int, str | int] = {
            0x0002: str(self.context.abstract_syntax),
            0x0100: 0x8010,
            0x0120: self.message_id,
            0x0900: status,
        }
        if not self.pacs.omit_counters and status != NOT_MATCHING:
            # Sixteen bits is all there are: they wrap, as elsewhere.
            elements[0x1021] = self.completed & 0xFFFF
            elements[0x1022] = len(self.failed) & 0xFFFF
            elements[0x1023] = self.warning & 0xFFFF
            if status in (PENDING, CANCELLED):
                elements[0x1020] = self.remaining & 0xFFFF
        return elements

    def _finish(self, status: int) -> None:
        if self.pacs.final_status is not None:
            status = self.pacs.final_status
        failed = b""
        if self.failed and status not in (SUCCESS, PENDING):
            # An explicit VR identifier cannot hold more than 64 KiB of UIDs, and the list is a help, not a proof.
            uids = "\\".join(self.failed[:900])
            failed = identifier({0x00080058: uids}, implicit_vr=self.context.transfer_syntax[0] == _IMPLICIT)
        self.association._respond(_id(self.context), self._head(status), failed)

    def _sub_operation(self, entry: Entry, context_id: int) -> int | None:
        self._sub_operation_id = self._sub_operation_id % 0xFFFF + 1
        command = command_set(
            {
                0x0002: entry.sop_class,
                0x0100: 0x0001,
                0x0110: self._sub_operation_id,
                0x0700: 0,
                0x0800: HAS_DATASET,
                0x1000: entry.sop,
            }
        )
        commands = chunks(command, self.association._fragment_size)
        self.association._send(context_id, fragments(commands, self._dataset(entry)))
        self.pacs.count_sent(entry.sop)
        return self._response()

    def _dataset(self, entry: Entry) -> Iterator[bytes]:
        size, left = self.association._fragment_size, entry.length
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while left:
                chunk = file.read(min(size, left))
                if not chunk:
                    raise OSError(f"{entry.path} was truncated")
                left -= len(chunk)
                yield chunk

    def _response(self) -> int | None:
        association = self.association
        deadline = time.monotonic() + self.pacs.dimse_timeout
        while time.monotonic() < deadline:
            try:
                context_id, msg = association.dimse.msg_queue.get(timeout=0.25)
            except Empty:
                if not association.dul.is_alive() or association.acse.is_aborted():
                    raise _PeerGoneError from None
                continue
            if msg is None or context_id is None:
                raise _PeerGoneError
            if isinstance(msg, C_STORE) and msg.is_valid_response:
                return msg.Status
            if isinstance(msg, C_ECHO) and msg.is_valid_request:
                association._echo(msg, association._accepted_cx[context_id])
                continue
            logger.warning("unexpected %s during a C-GET", type(msg).__name__)
        association.abort()
        raise _PeerGoneError


def _id(context: PresentationContext) -> int:
    assert context.context_id is not None
    return context.context_id
