"""C-FIND (PS3.4 C.4.1) as SCU: rows as raw identifiers."""

from __future__ import annotations

from collections.abc import Iterator

from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom.identifier import MAX_IDENTIFIER
from airflow_dicom_get.dicom.status import describe, is_pending
from airflow_dicom_get.errors import AssociationAborted, ListTooLong, NotNegotiated, OperationFailed
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.messages import context_for, deadline, read_response

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"


def c_find(
    association: Association, model: str, identifier: bytes, *, row_seconds: float, max_rows: int
) -> Iterator[bytearray]:
    """Send a C-FIND and yield each matching identifier (implicit VR).

    Parameters
    ----------
    model : str
        UID of the query model, one of the two constants of this module.
    row_seconds : float
        Deadline per row, ``find_response``.
    max_rows : int
        A peer that sends more is aborted: the answer is without end.

    Raises
    ------
    NotNegotiated
        The peer accepted no context for the model.
    OperationFailed
        The final status is not a success.
    ListTooLong
        More than ``max_rows`` rows came.
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
    rows = 0
    while True:
        try:
            answer, row = read_response(
                association,
                context_id,
                message_id,
                c.C_FIND_RSP,
                deadline(row_seconds),
                "find_response",
                MAX_IDENTIFIER,
            )
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
                raise ListTooLong(
                    f"{association.node} sent more than {max_rows} rows in response to one C-FIND.",
                    node=str(association.node),
                )
            yield row if row is not None else bytearray()
            continue
        if status == 0:
            return
        raise OperationFailed(
            f"{association.node} answered the C-FIND with {describe(status)}.",
            hint="Check that it supports the keys and the level of the query.",
            node=str(association.node),
            status=status or 0,
        )
