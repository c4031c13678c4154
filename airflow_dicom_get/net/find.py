"""C-FIND (PS3.4 C.4.1) as SCU: rows as raw identifiers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from airflow_dicom_get import clock
from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom.status import CANCEL, describe, is_pending
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.errors import AssociationAborted, ListTooLong, NotNegotiated, OperationFailed, PeerError, TooMuch
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.messages import context_for, deadline, read_response

if TYPE_CHECKING:
    from airflow_dicom_get.config.node import Node

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"
FIND_PROPOSALS = (Proposal(STUDY_ROOT_FIND, IMPLICIT_LE), Proposal(PATIENT_ROOT_FIND, IMPLICIT_LE))

log = logging.getLogger(__name__)

MAX_ROW, MAX_ANSWER = 1 << 16, 64 << 20
"""Bytes of one row, and of all rows of one C-FIND; a search that keeps as many sends no further C-FIND."""
MAX_ROWS = 200_000
"""Rows of one C-FIND."""
_CANCEL_GRACE = 5.0
"""Seconds that a peer may go on with its answer after the C-CANCEL."""


def c_find(
    association: Association,
    model: str,
    identifier: bytes,
    *,
    row_seconds: float,
    max_rows: int = MAX_ROWS,
    enough: Callable[[], bool] | None = None,
) -> Iterator[bytearray]:
    """Send a C-FIND and yield each matching identifier (implicit VR), an empty one for a row of too many bytes.

    Parameters
    ----------
    model : str
        UID of the query model, one of the two constants of this module.
    row_seconds : float
        Deadline per row, ``find_response``.
    max_rows : int
        A peer that sends more is aborted, as one that sends more than :data:`MAX_ANSWER`: the answer is without end.
    enough : callable, optional
        Asked after each row; once it is true, a C-CANCEL-RQ is sent (PS3.7 9.3.2.3) and what still comes is not
        yielded. A peer that does not end its answer within five seconds is aborted; no error is raised then.

    Raises
    ------
    NotNegotiated
        The peer accepted no context for the model.
    OperationFailed
        The final status is not a success.
    ListTooLong
        More than ``max_rows`` rows, or more bytes, came.
    """
    context_id = context_for(association, model)
    if context_id is None:
        raise NotNegotiated(f"{association.node} does not offer C-FIND.", node=str(association.node))
    message_id = association.next_message_id()
    association.send_message(
        context_id,
        c.encode(
            {
                c.AFFECTED_SOP_CLASS: model,
                c.COMMAND_FIELD: c.C_FIND_RQ,
                c.MESSAGE_ID: message_id,
                c.PRIORITY: 0,
                c.DATASET_TYPE: c.DATASET_FOLLOWS,
            }
        ),
        identifier,
    )
    rows = came = 0
    while True:
        try:
            answer, row, size = read_response(
                association,
                context_id,
                message_id,
                c.C_FIND_RSP,
                deadline(row_seconds),
                "find_response",
                keep=MAX_ROW,
                most=MAX_ANSWER - came,
            )
        except TooMuch:
            raise too_long(association.node, f"{MAX_ANSWER >> 20} MiB") from None
        except AssociationAborted as error:
            if rows:
                raise
            raise AssociationAborted(
                f"{association.node} accepted the association, but closed it on the C-FIND request.",
                hint="If this persists, our AE title is probably not allowed to query: ask the PACS admin.",
                node=str(association.node),
            ) from error
        status = answer.status
        if status is not None and is_pending(status):
            rows += 1
            if rows > max_rows:
                association.abort()
                raise too_long(association.node, f"{max_rows} rows")
            came += size
            if size > MAX_ROW:
                if association.remarks.is_new("row that is too long"):
                    log.warning("%s sent a C-FIND row of more than %d KiB.", association.node, MAX_ROW >> 10)
                row = None
            yield row if row is not None else bytearray()
            if enough is not None and enough():
                _cancel(association, context_id, message_id)
                return
            continue
        if status == 0:
            return
        raise OperationFailed(
            f"{association.node} answered the C-FIND with {describe(status)}.",
            hint="Check that it supports the keys and the level of the query.",
            node=str(association.node),
            status=status or 0,
        )


def too_long(node: Node, what: str, where: str = "one C-FIND") -> ListTooLong:
    """The error of an answer that goes beyond a bound."""
    return ListTooLong(
        f"{node} sent more than {what} in response to {where}.",
        hint="Narrow the query. If it is narrow, ask the PACS admin what its log says about it.",
        node=str(node),
    )


def _cancel(association: Association, context_id: int, message_id: int) -> None:
    """Cancel a C-FIND (PS3.4 C.4.1.3) and read what is on its way, so that the association can be used on."""
    association.send_message(
        context_id,
        c.encode({c.COMMAND_FIELD: c.C_CANCEL_RQ, c.RESPONDED_MESSAGE_ID: message_id, c.DATASET_TYPE: c.NO_DATASET}),
    )
    limit = deadline(_CANCEL_GRACE)
    try:
        while True:
            answer, _, _ = read_response(
                association, context_id, message_id, c.C_FIND_RSP, limit, "find_response", most=MAX_ANSWER
            )
            if answer.status is None or not is_pending(answer.status):
                if answer.status not in (CANCEL, 0):
                    log.info("%s answered the C-CANCEL with %s", association.node, describe(answer.status or 0))
                return
            if clock.monotonic() >= limit:
                break
    except PeerError as error:
        log.info("after the C-CANCEL: %s", error.message)
    association.abort()
