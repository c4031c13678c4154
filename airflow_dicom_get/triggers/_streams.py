"""One loop of looks for each PACS, whoever watches it: what the triggers of new studies share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.triggers.shared_stream import AdvanceItem, SharedStreamProducer

from airflow_dicom_get import clock
from airflow_dicom_get.engine.arrivals import Counts, Sighting, counts_of
from airflow_dicom_get.engine.items import Item
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.triggers._announced import Announced
from airflow_dicom_get.triggers._looks import wait_for_look

log = logging.getLogger(__name__)

DAY = 86400


def today() -> int:
    """The day in UTC, as a number."""
    return int(clock.now() // DAY)


@dataclass(frozen=True)
class Question:
    """What is asked of a PACS, and how often."""

    query: str
    """As JSON."""
    poke_interval: float

    @classmethod
    def of(cls, query: Mapping[str, Any], poke_interval: float) -> Question:
        """The same for the same query, in whatever order of its keys."""
        return cls(json.dumps(dict(query), sort_keys=True, default=str), poke_interval)


@dataclass(frozen=True)
class Listing:
    """What a PACS has answered to a question: the raw event that all watchers of the PACS receive."""

    number: int
    question: Question
    at: float
    studies: Sequence[tuple[Item, float]]
    """Each study, and since when its number of instances has been the same."""


@dataclass
class _Asked:
    """A question, and what is kept of it from look to look while somebody watches."""

    due: float
    counts: Counts = field(default_factory=dict)
    watchers: list[Announced] = field(default_factory=list)


class StudyStream:
    """The loop of one connection."""

    def __init__(self, conn_id: str) -> None:
        self._conn_id = conn_id
        self._asked: dict[Question, _Asked] = {}
        self._changed = asyncio.Event()
        self._numbers = 0

    @contextmanager
    def watched(self, question: Question, announced: Announced) -> Iterator[None]:
        """Ask this question, too, while this lasts."""
        asked = self._asked.setdefault(question, _Asked(due=clock.monotonic()))
        asked.watchers.append(announced)
        self._changed.set()
        try:
            yield
        finally:
            asked.watchers.remove(announced)
            if not asked.watchers:
                del self._asked[question]
            self._changed.set()

    async def listings(self) -> AsyncIterator[Listing]:
        """Ask each question when it is due, one after the other, for ever. What fails costs that look."""
        while True:
            self._changed.clear()
            question = min(self._asked, key=lambda one: self._asked[one].due, default=None)
            if question is None:
                await self._changed.wait()
                continue
            asked = self._asked[question]
            wait = asked.due - clock.monotonic()
            if wait > 0:
                try:
                    # Not wait_for: in Python 3.11 it loses a cancel that comes with what it waits for.
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                    continue
                except TimeoutError:
                    pass
            asked.due = clock.monotonic() + question.poke_interval
            seen = await self._look(question)
            if seen is None:
                continue
            asked.counts = counts_of(seen, asked.counts)
            self._numbers += 1
            studies = [(item, asked.counts[item["study_instance_uid"]][1]) for item in seen.items]
            yield Listing(self._numbers, question, seen.at, studies)

    async def _look(self, question: Question) -> Sighting | None:
        try:
            return await wait_for_look(self._conn_id, [json.loads(question.query)], question.poke_interval)
        except (DicomGetError, AirflowNotFoundException, TimeoutError) as error:
            # A connection that is wrong may be mended while this runs, so nothing ends it.
            log.warning("Connection %s: new studies could not be queried: %s", self._conn_id, error)
        except Exception as error:  # its text may hold what the PACS sent
            log.warning("Connection %s: new studies could not be queried: %s", self._conn_id, type(error).__name__)
        return None

    async def confirm(self, numbers: Sequence[int]) -> None:
        """All that was announced out of these listings is in Airflow's database."""
        watchers = [one for asked in self._asked.values() for one in asked.watchers]
        for announced in watchers:
            await announced.confirm(numbers, today())


class StudyProducer(SharedStreamProducer):
    """The stream of one connection as Airflow's triggerer drives it: told of what has come to the database."""

    def __init__(self, conn_id: str) -> None:
        self._stream = stream_of(conn_id)

    async def open_stream(self) -> AsyncIterator[tuple[Listing, int]]:
        """Each listing, and its number."""
        async for listing in self._stream.listings():
            yield listing, listing.number

    async def advance(self, batch: Sequence[AdvanceItem]) -> None:
        """Keep what was announced, unless a watcher failed at it: then it is announced again by whoever comes next."""
        await self._stream.confirm([item.broker_payload for item in batch if item.outcome.is_clean])


_streams: dict[tuple[str, asyncio.AbstractEventLoop], StudyStream] = {}


def stream_of(conn_id: str) -> StudyStream:
    """The stream of a connection, in the loop that runs."""
    return _streams.setdefault((conn_id, asyncio.get_running_loop()), StudyStream(conn_id))
