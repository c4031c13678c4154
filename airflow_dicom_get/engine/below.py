"""How many instances a source says there are below a series or a study: by one C-GET that is cancelled at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import NamedTuple

from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom import identifier as i
from airflow_dicom_get.dicom import status as s
from airflow_dicom_get.dicom.syntaxes import IMPLICIT_LE
from airflow_dicom_get.dicom.uids import uid_or_blank
from airflow_dicom_get.engine.contexts import with_other_classes
from airflow_dicom_get.engine.requests import Request
from airflow_dicom_get.engine.resolve import Scope
from airflow_dicom_get.engine.source import Source
from airflow_dicom_get.errors import GetNotOffered
from airflow_dicom_get.net.acse import Proposal
from airflow_dicom_get.net.association import Association
from airflow_dicom_get.net.get import PATIENT_ROOT_GET, STUDY_ROOT_GET, Most, StoreRequest, c_get

log = logging.getLogger(__name__)

UIDS = frozenset({h.SOP_INSTANCE_UID, h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID})
_MOST_OBJECTS = 200_000


def retrieve_model(query_model: str) -> str:
    """UID of the retrieve model of a query model."""
    return PATIENT_ROOT_GET if query_model == "PatientRoot" else STUDY_ROOT_GET


class Drain:
    """Takes objects and keeps nothing of them (an :class:`~airflow_dicom_get.net.get.ObjectReceiver`)."""

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        self.uids: set[str] = set()
        """SOP Instance UIDs of what began to come, as :func:`uid_or_blank` keeps them."""

    def begin(self, request: StoreRequest) -> None:
        """An object begins."""
        self.uids.add(uid_or_blank(request.sop_instance))

    def data(self, view: memoryview, last: bool) -> bool:
        """Its next bytes."""
        self.bytes += len(view)
        return True

    def finish(self) -> int:
        """It is whole."""
        self.objects += 1
        return s.SUCCESS

    def answered(self) -> None:
        """The C-STORE-RSP was sent."""

    def abandon(self) -> None:
        """It will never be whole."""

    def give_up(self, error: str) -> None:
        """It goes beyond its bounds."""

    def refused(self, sop_instance: str, status: int) -> None:
        """It had no context, or no data set."""
        self.objects += 1
        self.uids.add(uid_or_blank(sop_instance))


class Counted(NamedTuple):
    """What one C-GET of a series, or of a study, has told of it."""

    total: int | None
    """Remaining, completed, failed and with a warning together, modulo 65,536; None where the source gives no
    counters, or they contradict each other."""
    bytes: int
    """What came of instances."""
    uids: Set[str]
    """The SOP Instance UIDs of those that began to come, as their C-STORE-RQ gives them."""


def count_below(
    source: Source, scope: Scope, series: str | None, query_model: str, proposals: Sequence[Proposal], retries: int
) -> Counted:
    """What the counters of one C-GET come to that is cancelled after its first instance.

    Parameters
    ----------
    series : str or None
        The series; None is the whole study.
    proposals : sequence of Proposal
        Presentation contexts for what is listed below it; those of other classes are added.

    Raises
    ------
    GetNotOffered, and whatever ends an association
    """
    model = retrieve_model(query_model)
    request = Request("STUDY" if series is None else "SERIES", series)
    drain = Drain()

    def ask(association: Association) -> int | None:
        if model not in {p.abstract_syntax for p in association.accepted.contexts.values()}:
            raise GetNotOffered(f"{association.node} does not offer C-GET ({query_model}).", node=str(association.node))
        outcome = c_get(
            association,
            model,
            i.encode_identifier(request.keys(scope, query_model), UIDS),
            drain,
            next_object=source.deadlines.next_object,
            most=Most(_MOST_OBJECTS),
            enough=lambda: drain.objects > 0,
        )
        source.check_stopped()
        log.info("%s counts %s instances below %s", source.node, outcome.total, series or scope.study)
        return outcome.total

    proposals = with_other_classes(proposals)
    classes = tuple(dict.fromkeys(p.abstract_syntax for p in proposals))
    total = source.with_retries(retries, [Proposal(model, IMPLICIT_LE), *proposals], ask, classes)
    return Counted(total, drain.bytes, drain.uids)
