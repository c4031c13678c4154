"""Every error of the package, below one root.

An error says what happened, to which node, study or instance, and what to do next. It keeps its
facts as attributes, says by ``transient`` whether trying again can help, and by ``at_fault`` who
failed, and survives pickling: Airflow moves exceptions between processes.

Messages may contain UIDs and AE titles, but nothing that identifies a patient.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Fault = Literal["input", "us", "peer", "source", "destination"]

_TEXT_LIMIT = 64


def peer_text(value: object, limit: int = _TEXT_LIMIT) -> str:
    """Text from a peer made fit for a log line: escaped, on one line, cut at ``limit`` characters."""
    text = str(value).encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(value: object) -> str:
    """Text that others may have written, made fit for a terminal or a log: what would control either is escaped."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in text)


def sentences(message: str, hint: str = "") -> str:
    """What happened and what to do about it as one text, with a full stop between the two."""
    if hint and message and message[-1] not in ".!?…":
        message += "."
    return f"{message} {hint}".strip()


class DicomGetError(Exception):
    """Root of all errors of this package.

    Parameters
    ----------
    message : str
        What happened, and to whom; made :func:`printable`, as names of files and texts of manifests may stand in it.
    hint : str
        What to do next; appended to the message.
    **facts : Any
        Kept as attributes of the same name (``node``, ``study``, ``sop_instance_uid``, ...).
    """

    transient: ClassVar[bool] = False
    at_fault: ClassVar[Fault] = "us"
    word: ClassVar[str] = "error"
    """The word of :data:`~airflow_dicom_get.vocabulary.REASONS` for a retrieval that this error ended."""

    def __init__(self, message: str, *, hint: str = "", **facts: Any) -> None:
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(sentences(self.message, self.hint))
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence alone. The stack says nothing that the sentence does not."""
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.facts))


def _rebuild(cls: type[DicomGetError], message: str, hint: str, facts: dict[str, Any]) -> DicomGetError:
    return cls(message, hint=hint, **facts)


def unexpected(error: BaseException) -> DicomGetError:
    """What no part of the package was prepared for, as an error of ours; log it where it is caught."""
    return DicomGetError(f"Unexpected {type(error).__name__}: {peer_text(error, 200)}")


# --- input: refused before any traffic where that can be known ---------------------------------


class InvalidOption(DicomGetError, ValueError):
    """An option is malformed, out of range, or contradicts another one."""

    word = "invalid_option"
    at_fault = "input"


class InvalidQuery(DicomGetError, ValueError):
    """The query is malformed, selects nothing, or selects more than ``max_studies``."""

    word = "invalid_query"
    at_fault = "input"


# --- the peer and the line -----------------------------------------------------------------------


class PeerError(DicomGetError):
    """The peer, or the network to it, failed. The node is in ``node``."""

    at_fault = "peer"


class ConnectFailed(PeerError):
    """No TCP connection, or no TLS session, could be made."""

    word = "connect_failed"
    transient = True


class TlsFailed(ConnectFailed):
    """A certificate or a TLS version is not what one side asks for; ``tls_reason`` has OpenSSL's name for it."""

    word = "tls_failed"
    transient = False


class AssociationRejected(PeerError):
    """A-ASSOCIATE-RJ (PS3.8 9.3.4), with ``result``, ``source`` and ``reason`` as received."""

    word = "association_rejected"

    @property
    def transient(self) -> bool:  # type: ignore[override]
        return self.facts.get("result") == 2


class AssociationAborted(PeerError):
    """The association ended by A-ABORT, A-RELEASE or a lost connection while it was in use."""

    word = "association_lost"
    transient = True


class DeadlineExceeded(PeerError):
    """A wait took longer than its deadline; ``phase`` is the name of the deadline, ``seconds`` its value."""

    word = "deadline"
    transient = True


class NotNegotiated(PeerError):
    """The peer accepted no presentation context for what was to be done."""

    word = "not_negotiated"


class GetNotOffered(NotNegotiated):
    """The peer does not offer C-GET."""

    word = "get_not_offered"


class NotAuthorised(PeerError):
    """The peer accepted the association and refused the request: our AE title is probably not allowed to make it."""

    word = "not_authorised"


class PeerProtocolError(PeerError):
    """The peer broke the protocol (PS3.7, PS3.8)."""

    word = "peer_protocol_error"
    transient = True


class TooMuch(PeerProtocolError):
    """The peer sent more objects or rows than the plan allows for; requesting them again would have the same result."""

    word = "too_much"
    transient = False


class ListTooLong(TooMuch):
    """The answer to a C-FIND has no end."""


class OperationFailed(PeerError):
    """A DIMSE operation ended with a failure status, kept in ``status`` (int)."""

    word = "operation_failed"

    @property
    def transient(self) -> bool:  # type: ignore[override]
        status = int(self.facts.get("status", 0))
        return 0xA700 <= status <= 0xA7FF


# --- the destination -----------------------------------------------------------------------------


class SinkError(DicomGetError):
    """The destination failed to store an instance."""

    word = "destination_error"
    at_fault = "destination"
    transient = True


class DestinationFull(SinkError):
    """The destination is full."""

    word = "destination_full"


class DestinationSlow(SinkError):
    """The destination took longer than the source may wait: the association with the source is aborted."""


class ForwardLost(SinkError):
    """The node to forward to cannot be reached, closed the association, or did not accept an instance in time.

    The source is not answered then: its association is aborted, and what is missing is requested again.
    """

    @property
    def transient(self) -> bool:  # type: ignore[override]
        return bool(self.facts.get("may_pass", True))


class ForwardLate(ForwardLost):
    """The node to forward to has received a whole instance, but has not answered yet; its answer still counts."""


class S3Error(SinkError):
    """An S3 request failed: ``bucket``, ``key``, ``operation``, ``code`` and ``status`` say which, and how."""

    @property
    def transient(self) -> bool:  # type: ignore[override]
        return bool(self.facts.get("passing", True))


class LedgerError(DicomGetError):
    """A ledger file is damaged or has a newer schema. It is not changed."""

    word = "ledger_error"
    at_fault = "destination"


class ManifestError(DicomGetError):
    """A manifest cannot be read, or does not match its reference."""

    word = "manifest_error"
    at_fault = "input"


# --- outcomes ------------------------------------------------------------------------------------


class Cancelled(DicomGetError):
    """The run was cancelled by a signal or by ``cancel()``."""

    word = "cancelled"
    at_fault = "us"


class NotProven(DicomGetError):
    """What is to be exported is not complete, or is not what its manifest says; ``verdict`` says how it stands."""

    word = "incomplete"
    at_fault = "input"


class IncompleteRetrieval(DicomGetError):
    """A retrieval did not end as ``complete``; ``verdict`` and ``reason`` say how it ended."""

    word = "incomplete"
    at_fault = "source"
    transient = True
