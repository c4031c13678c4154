"""The trigger that waits for studies at a PACS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_dicom_get.engine.arrivals import Awaited, find_arrivals
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks._errors import may_pass
from airflow_dicom_get.triggers._looks import wait_for_look


class DicomStudyTrigger(BaseTrigger):
    """Query a PACS repeatedly until the studies are there and have settled.

    The C-FIND runs on a thread of its connection, with a deadline of a quarter of ``poke_interval``: neither the loop
    of the triggerer, which all triggers share, nor its pool of threads waits for it. A connection has one look at a
    time, and triggers that ask the same share it. If the PACS is down or busy, the trigger keeps trying, until the
    timeout of the sensor.

    After a restart of the triggerer, the trigger starts again with its original arguments: what it has seen since
    is forgotten, and studies have to settle again.

    :param awaited: the fields of what is waited for
    :param counts: what the sensor has seen already
    :param poke_interval: seconds between two queries
    :param dicom_conn_id: the ``dicom`` connection to the PACS
    """

    def __init__(
        self,
        awaited: Mapping[str, Any],
        counts: Mapping[str, Sequence[float]],
        poke_interval: float,
        dicom_conn_id: str,
    ) -> None:
        super().__init__()
        self.awaited = Awaited(**awaited)
        self.counts = {study: list(values) for study, values in counts.items()}
        self.poke_interval = poke_interval
        self.dicom_conn_id = dicom_conn_id
        self._kwargs = {
            "awaited": dict(awaited),
            "counts": dict(counts),
            "poke_interval": poke_interval,
            "dicom_conn_id": dicom_conn_id,
        }

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The arguments that make it again."""
        return f"{type(self).__module__}.{type(self).__qualname__}", self._kwargs

    def __repr__(self) -> str:
        # The query may name a patient, and this goes to logs.
        return f"<{type(self).__name__} on {self.dicom_conn_id}>"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Ask until all is there; one event, with the Items or what is wrong."""
        while True:
            await asyncio.sleep(self.poke_interval)
            try:
                seen = await wait_for_look(self.dicom_conn_id, self.awaited.queries, self.poke_interval)
            except (DicomGetError, AirflowNotFoundException) as error:
                if not may_pass(error):
                    yield TriggerEvent({"error": str(error)})
                    return
                self.log.warning("The PACS could not be queried: %s", error)
                continue
            except TimeoutError as error:
                self.log.warning("The PACS could not be queried: %s", error)
                continue
            except Exception as error:  # costs this query alone; its text may hold what the PACS sent
                self.log.warning("The PACS could not be queried: unexpected %s", type(error).__name__)
                continue
            found = find_arrivals(self.awaited, seen, self.counts)
            self.counts = found.counts
            self.log.info("%s.", found.text)
            if found.all_settled:
                yield TriggerEvent({"items": found.items})
                return
