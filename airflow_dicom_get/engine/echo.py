"""C-ECHO, and which services a node accepts."""

from __future__ import annotations

from airflow_dicom_get import clock
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.echo import VERIFICATION, c_echo
from airflow_dicom_get.net.find import PATIENT_ROOT_FIND, STUDY_ROOT_FIND
from airflow_dicom_get.net.get import PATIENT_ROOT_GET, STUDY_ROOT_GET
from airflow_dicom_get.result import EchoReport

_SERVICES = {
    "C-ECHO": VERIFICATION,
    "C-FIND StudyRoot": STUDY_ROOT_FIND,
    "C-FIND PatientRoot": PATIENT_ROOT_FIND,
    "C-GET StudyRoot": STUDY_ROOT_GET,
    "C-GET PatientRoot": PATIENT_ROOT_GET,
}
_STORAGE = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture
    "1.2.840.10008.5.1.4.1.1.1.1",  # digital X-ray
)
"""Classes of which a node that stores anything takes one."""


def echo(source: Source) -> EchoReport:
    """One association with a C-ECHO on it."""
    proposals = [Proposal(uid, IMPLICIT_LE) for uid in (*_SERVICES.values(), *_STORAGE)]
    with source.association(proposals) as association:
        accepted = {p.abstract_syntax for p in association.accepted.contexts.values()}
        began = clock.monotonic()
        c_echo(association)
        return EchoReport(
            node=str(source.node),
            round_trip_ms=(clock.monotonic() - began) * 1000,
            accepted={
                **{name: uid in accepted for name, uid in _SERVICES.items()},
                "C-STORE": not accepted.isdisjoint(_STORAGE),
            },
            implementation_version=association.accepted.implementation or None,
            max_pdu_length=association.accepted.max_pdu_length,
        )
