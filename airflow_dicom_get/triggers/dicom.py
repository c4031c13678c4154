"""The trigger that waits for studies at a PACS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_dicom_get.engine.arrivals import Arrivals, Awaited, find_arrivals
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks._errors import may_pass
from airflow_dicom_get.hooks.dicom import DicomHook

if TYPE_CHECKING:
    from airflow_dicom_get.getscu import GetScu

ASK_SECONDS = 120.0
"""The longest that the PACS is asked at a time."""
GRACE_SECONDS = 10.0
"""What that gets beyond its own deadline before it is given up."""


def ask(
    hook: DicomHook,
    awaited: Awaited,
    before: Mapping[str, Sequence[float]],
    *,
    on_scu: Callable[[GetScu], None],
) -> Arrivals:
    """Ask the PACS of a connection once: what the sensor does in a worker, and the trigger in a thread.

    :param before: the counts of the last time
    :param on_scu: takes the client before it is used, to cancel it by
    """
    scu = hook.get_scu(seconds=ASK_SECONDS)
    on_scu(scu)
    model = hook.query_model

    def find(query: Mapping[str, Any], level: str, return_keys: Sequence[str]) -> Any:
        return scu.find(query, level=level, query_model=model, return_keys=return_keys)

    return find_arrivals(awaited, find, before, time.time(), model=model, timezone=hook.timezone)


class DicomStudyTrigger(BaseTrigger):
    """Query a PACS repeatedly until the studies are there and have settled.

    The C-FIND runs in a thread with a deadline: the loop of the triggerer, which all triggers share, never waits
    for it. If the PACS is down or busy, the trigger keeps trying, until the timeout of the sensor.

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
        self._scu: GetScu | None = None

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
                found = await self._ask()
            except (DicomGetError, AirflowNotFoundException) as error:
                if not may_pass(error):
                    yield TriggerEvent({"error": str(error)})
                    return
                self.log.warning("The PACS could not be queried: %s", error)
                continue
            except TimeoutError:
                self.log.warning("The PACS did not answer within %d s.", ASK_SECONDS + GRACE_SECONDS)
                continue
            except Exception as error:  # costs this query alone; its text may hold what the PACS sent
                self.log.warning("The PACS could not be queried: unexpected %s", type(error).__name__)
                continue
            self.counts = found.counts
            self.log.info("%s.", found.text)
            if found.all_settled:
                yield TriggerEvent({"items": found.items})
                return

    async def _ask(self) -> Arrivals:
        def in_thread() -> Arrivals:
            hook = DicomHook(self.dicom_conn_id)
            return ask(hook, self.awaited, self.counts, on_scu=self._take)

        try:
            return await asyncio.wait_for(asyncio.to_thread(in_thread), ASK_SECONDS + GRACE_SECONDS)
        finally:
            # A thread cannot be ended, but its association can, and the thread with it.
            self._cancel()
            self._scu = None

    def _take(self, scu: GetScu) -> None:
        self._scu = scu

    def _cancel(self) -> None:
        if self._scu is not None:
            self._scu.cancel("the trigger no longer waits for the answer")

    async def cleanup(self) -> None:
        """End what is under way: the triggerer lets go of the trigger."""
        self._cancel()

    async def on_kill(self) -> None:
        """End what is under way: the task was ended by its user."""
        self._cancel()
