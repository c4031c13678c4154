"""C-ECHO (PS3.7 9.1.5)."""

from __future__ import annotations

from airflow_dicom_get.dicom import command as c
from airflow_dicom_get.dicom.status import describe
from airflow_dicom_get.errors import NotNegotiated, OperationFailed
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.messages import context_for, deadline, read_response

VERIFICATION = "1.2.840.10008.1.1"


def c_echo(association: Association) -> None:
    """Send a C-ECHO and wait for success.

    Raises
    ------
    NotNegotiated, OperationFailed, and whatever ends an association
    """
    context_id = context_for(association, VERIFICATION)
    if context_id is None:
        raise NotNegotiated(f"{association.node} does not offer C-ECHO.", node=str(association.node))
    message_id = association.next_message_id()
    association.send_message(
        context_id,
        c.encode(
            {
                c.AFFECTED_SOP_CLASS: VERIFICATION,
                c.COMMAND_FIELD: c.C_ECHO_RQ,
                c.MESSAGE_ID: message_id,
                c.DATASET_TYPE: c.NO_DATASET,
            }
        ),
    )
    limit = deadline(association.deadlines.acse)
    answer, _, _ = read_response(association, context_id, message_id, c.C_ECHO_RSP, limit, "acse")
    if answer.status != 0:
        raise OperationFailed(
            f"{association.node} answered the C-ECHO with {describe(answer.status)}.",
            node=str(association.node),
            status=answer.status or 0,
        )
