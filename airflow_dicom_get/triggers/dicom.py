"""The trigger that waits for studies at a PACS."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.triggers.base import BaseEventTrigger, BaseTrigger, TriggerEvent

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.engine.arrivals import LEAST_INSTANCES, SPAN, Awaited, find_arrivals
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks._errors import may_pass
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.triggers._announced import Announced, digest, stores_of
from airflow_dicom_get.triggers._looks import wait_for_look
from airflow_dicom_get.triggers._streams import Listing, Question, StudyProducer, stream_of, today

if TYPE_CHECKING:
    from airflow.triggers.shared_stream import SharedStreamProducer


class _OfConnection(BaseTrigger):
    """A trigger that looks at the PACS of a connection."""

    dicom_conn_id: str
    _kwargs: dict[str, Any]

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The arguments that make it again."""
        return f"{type(self).__module__}.{type(self).__qualname__}", self._kwargs

    def __repr__(self) -> str:
        # The query may name a patient, and this goes to logs.
        return f"<{type(self).__name__} on {self.dicom_conn_id}>"


class DicomStudyTrigger(_OfConnection):
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


class DicomStudyEventTrigger(_OfConnection, BaseEventTrigger):
    """Make an event of each study that has newly come to a PACS and no longer grows, for an ``AssetWatcher``.

    The event's ``extra["payload"]`` is the Item of the study: what ``DicomGetOperator`` takes. Each study is announced
    at least once, through restarts of the triggerer too, and once more whenever it has grown and settled again. An
    event may come twice; then it has the same Item. What was announced is kept in the state of the asset.

    A triggerer has one loop of C-FINDs for each connection, however many DAGs and assets watch it: watchers with the
    same query share its C-FIND, others ask one after the other. If the PACS is down or busy, that look is lost.

    :param query: DICOM keywords or tags, and values, that narrow what is announced, as in ``{"ModalitiesInStudy":
        "CT"}``; by default all studies
    :param settled_for: how long the number of instances must not change
    :param min_instances: how many instances a study must have
    :param dicom_conn_id: the ``dicom`` connection to the PACS
    :param poke_interval: seconds between two looks
    :param lookback: how old a study may be by its Study Date, in whole days of the PACS's time zone: an imported prior
        is announced if its Study Date is not before
    """

    def __init__(
        self,
        *,
        query: Mapping[str, Any] | None = None,
        settled_for: timedelta = timedelta(minutes=10),
        min_instances: int = 1,
        dicom_conn_id: str = DicomHook.default_conn_name,
        poke_interval: float = 60,
        lookback: timedelta = timedelta(days=1),
    ) -> None:
        super().__init__()
        self.settled_seconds = SPAN.check("settled_for", settled_for).total_seconds()
        self.min_instances = LEAST_INSTANCES.check("min_instances", min_instances)
        SPAN.check("lookback", lookback)
        seconds: Any = poke_interval
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise invalid("poke_interval", f"{shown(seconds)} is not allowed", "Give a number of seconds above 0.")
        given: Any = query
        if given is not None and not isinstance(given, Mapping):
            raise invalid("query", "is not a mapping of keys to values", 'For example, {"ModalitiesInStudy": "CT"}.')
        self.dicom_conn_id = dicom_conn_id
        self.poke_interval = float(seconds)
        self._days = math.ceil(lookback / timedelta(days=1))
        self._query = {**(query or {}), "StudyDate": f"today-{self._days}/"}
        if query:  # to know keywords costs an import: not where a DAG without a query is parsed
            parsed = parse_query(self._query)
            if parsed.level != "STUDY" or parsed.studies or "StudyDate" in query:
                raise invalid(
                    "query",
                    "names a date, a level or a UID",
                    "Give lookback for the date, and leave the others out: studies are announced.",
                )
        self._kwargs = {
            "query": None if query is None else dict(query),
            "settled_for": settled_for,
            "min_instances": min_instances,
            "dicom_conn_id": dicom_conn_id,
            "poke_interval": poke_interval,
            "lookback": lookback,
        }

    # --- the stream that all triggers of a connection share ----------------------------------------

    def shared_stream_key(self) -> Hashable:
        """All triggers of a connection share one loop, whatever they ask."""
        return ("dicom-studies", self.dicom_conn_id)

    @classmethod
    def create_shared_stream_producer(cls, kwargs: dict[str, Any]) -> SharedStreamProducer:
        """The loop of the connection, which is told what has come to Airflow's database."""
        return StudyProducer(kwargs["dicom_conn_id"])

    async def filter_shared_stream(self, shared_stream: AsyncIterator[Listing]) -> AsyncIterator[TriggerEvent]:
        """One event for each study that has settled, is large enough and was not announced yet."""
        question = Question.of(self._query, self.poke_interval)
        announced = Announced(stores_of(self.asset_state_store), self._state_key(question), self._days)
        await announced.load()
        with stream_of(self.dicom_conn_id).watched(question, announced):
            async for listing in shared_stream:
                if listing.question != question:
                    continue
                for item, since in listing.studies:
                    count = item["expected_instances"]
                    one = digest(item["study_instance_uid"], count)
                    if not announced.is_new(one, today()):
                        continue
                    if count >= self.min_instances and listing.at - since >= self.settled_seconds:
                        announced.add(one, listing.number, today())
                        yield TriggerEvent(item)

    def _state_key(self, question: Question) -> str:
        """One for each query: an asset may have several watchers."""
        name = hashlib.blake2b(f"{self.dicom_conn_id}\0{question.query}".encode(), digest_size=6).hexdigest()
        return f"dicom_get_announced_{name}"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """The same without a triggerer that shares streams."""
        from airflow.triggers.shared_stream import AdvanceItem, AdvanceOutcome

        producer = StudyProducer(self.dicom_conn_id)

        async def listings() -> AsyncIterator[Listing]:
            async for listing, number in producer.open_stream():
                yield listing
                await producer.advance([AdvanceItem(number, AdvanceOutcome(acked=1, failed=0))])

        async for event in self.filter_shared_stream(listings()):
            yield event
