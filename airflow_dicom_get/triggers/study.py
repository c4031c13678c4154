"""The trigger that waits for studies at a PACS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.operators._settling import LOOK_SECONDS, Look, Watch, look

if TYPE_CHECKING:
    from airflow_dicom_get.getscu import GetScu

GRACE_SECONDS = 10.0
"""What a look gets beyond its own deadline before it is given up."""


class DicomStudyTrigger(BaseTrigger):
    """Ask a PACS again and again, until the studies are there and have settled.

    The C-FIND runs in a thread with a deadline: the loop of the triggerer, which all triggers share, never waits
    for it. Where a PACS is down or busy the trigger goes on asking; the time-out of the sensor ends that.

    A triggerer that is restarted takes the trigger up again with what it was made with: what it saw since is then
    forgotten, and studies have to settle anew.

    :param watch: the fields of what is waited for
    :param seen: what the sensor has seen already
    :param poke_interval: seconds between two looks
    """

    def __init__(self, watch: Mapping[str, Any], seen: Mapping[str, Sequence[float]], poke_interval: float) -> None:
        super().__init__()
        self.watch = Watch(**watch)
        self.seen = {study: list(values) for study, values in seen.items()}
        self.poke_interval = poke_interval
        self._kwargs = {"watch": dict(watch), "seen": dict(seen), "poke_interval": poke_interval}
        self._scu: GetScu | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The arguments that make it again."""
        return f"{type(self).__module__}.{type(self).__qualname__}", self._kwargs

    def __repr__(self) -> str:
        # The query may name a patient, and this goes to logs.
        return f"<{type(self).__name__} on {self.watch.dicom_conn_id}>"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until all is there; one event, with the Items or what is wrong."""
        while True:
            await asyncio.sleep(self.poke_interval)
            try:
                found = await self._look()
            except DicomGetError as error:
                if not error.transient:
                    yield TriggerEvent({"error": str(error)})
                    return
                self.log.warning("The PACS could not be asked: %s", error)
                continue
            except TimeoutError:
                self.log.warning("The PACS did not answer within %d s.", LOOK_SECONDS + GRACE_SECONDS)
                continue
            self.seen = found.seen
            self.log.info("%s.", found.text)
            if found.done:
                yield TriggerEvent({"items": found.items})
                return

    async def _look(self) -> Look:
        def in_thread() -> Look:
            return look(self.watch, DicomHook(self.watch.dicom_conn_id), self.seen, time.time(), self._take)

        try:
            return await asyncio.wait_for(asyncio.to_thread(in_thread), LOOK_SECONDS + GRACE_SECONDS)
        finally:
            # A thread cannot be ended, but its association can, and the thread with it.
            self._cancel()
            self._scu = None

    def _take(self, scu: GetScu) -> None:
        self._scu = scu

    def _cancel(self) -> None:
        if self._scu is not None:
            self._scu.cancel("nobody waits for the answer any more")

    async def cleanup(self) -> None:
        """End what is under way: the triggerer lets go of the trigger."""
        self._cancel()

    async def on_kill(self) -> None:
        """End what is under way: the task was ended by its user."""
        self._cancel()
