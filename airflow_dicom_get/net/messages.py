"""Small DIMSE exchanges: whole responses, without bulk data."""

from __future__ import annotations

from airflow_dicom_get import clock
from airflow_dicom_get.dicom.command import MAX_COMMAND_LENGTH, Command
from airflow_dicom_get.errors import PeerProtocolError
from airflow_dicom_get.net.association import Association


def read_response(
    association: Association, context_id: int, message_id: int, field: int, limit: float, phase: str, max_dataset: int
) -> tuple[Command, bytearray | None]:
    """Read one response with its data set, whole.

    Raises
    ------
    PeerProtocolError
        Another message, another message id, another context, or more bytes than allowed; the
        association is aborted.
    """

    def broken(what: str) -> PeerProtocolError:
        association.abort(2)
        return PeerProtocolError(f"{association.node} {what}.", node=str(association.node))

    command: Command | None = None
    raw = bytearray()
    dataset = bytearray()
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
                return command, None
        else:
            if command is None:
                raise broken("sent a data set without its command")
            dataset += fragment.data
            if len(dataset) > max_dataset:
                raise broken(f"sent a data set of more than {max_dataset} bytes")
            if fragment.last:
                if association.told is not None:
                    association.told.received(context_id, command, dataset)
                return command, dataset


def context_for(association: Association, abstract_syntax: str) -> int | None:
    """Id of the first accepted context of an abstract syntax."""
    for number, proposal in association.accepted.contexts.items():
        if proposal.abstract_syntax == abstract_syntax:
            return number
    return None


def deadline(seconds: float) -> float:
    """``clock.monotonic()`` value in ``seconds`` from now."""
    return clock.monotonic() + seconds
