"""Small DIMSE exchanges: whole responses, without bulk data."""

from __future__ import annotations

from airflow_dicom_get import clock
from airflow_dicom_get.dicom.command import MAX_COMMAND_LENGTH, Command
from airflow_dicom_get.errors import PeerProtocolError, TooMuch
from airflow_dicom_get.net.association import Association


def read_response(
    association: Association,
    context_id: int,
    message_id: int,
    field: int,
    limit: float,
    phase: str,
    *,
    keep: int = 0,
    most: int = 0,
) -> tuple[Command, bytearray | None, int]:
    """Read one response with its data set.

    Parameters
    ----------
    keep : int
        Bytes of the data set that are kept; what goes beyond is read, and counted.
    most : int
        Bytes that it may have.

    Returns
    -------
    (Command, bytearray or None, int)
        The command, the data set if there is one, and how many bytes that had.

    Raises
    ------
    PeerProtocolError
        Another message, another message id or another context; the association is aborted.
    TooMuch
        More bytes than ``most``; the association is aborted.
    """

    def broken(what: str) -> PeerProtocolError:
        association.abort(2)
        return PeerProtocolError(f"{association.node} {what}.", node=str(association.node))

    command: Command | None = None
    raw = bytearray()
    dataset, size = bytearray(), 0
    while True:
        association.in_message = bool(raw) or command is not None
        fragment = association.fragment(limit, phase)
        association.in_message = False
        if fragment.context_id != context_id:
            raise broken(f"answered on presentation context {fragment.context_id} instead of {context_id}")
        if fragment.is_command:
            if command is not None:
                raise broken("sent a command where a data set was expected")
            raw += fragment.data
            if len(raw) > MAX_COMMAND_LENGTH:
                raise broken(f"sent a command set of more than {MAX_COMMAND_LENGTH} bytes")
            if not fragment.last:
                continue
            try:
                command = association.commands.parse(raw)
            except PeerProtocolError as error:
                raise broken(f"sent an invalid command set ({error})") from error
            if association.told is not None and not (command.has_dataset and command.responded_id == message_id):
                association.told.received(context_id, command)
            if command.field != field:
                raise broken(f"sent message {command.field:04X}H where {field:04X}H was expected")
            if command.responded_id != message_id:
                raise broken(f"answered message {command.responded_id} instead of {message_id}")
            if not command.has_dataset:
                return command, None, 0
        else:
            if command is None:
                raise broken("sent a data set without its command")
            dataset += fragment.data[: max(keep - size, 0)]
            size += len(fragment.data)
            if size > most:
                raise TooMuch(broken(f"sent a data set of more than {most} bytes").message, node=str(association.node))
            if fragment.last:
                if association.told is not None:
                    association.told.received(context_id, command, dataset)
                return command, dataset, size


def context_for(association: Association, abstract_syntax: str) -> int | None:
    """Id of the first accepted context of an abstract syntax."""
    for number, proposal in association.accepted.contexts.items():
        if proposal.abstract_syntax == abstract_syntax:
            return number
    return None


def deadline(seconds: float) -> float:
    """``clock.monotonic()`` value in ``seconds`` from now."""
    return clock.monotonic() + seconds
