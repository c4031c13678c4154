"""DicomStudyEventTrigger under Airflow's own shared streams, and what it keeps in the state of assets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import structlog
from airflow.api_fastapi.core_api.datamodels.assets import CreateAssetEventsBody
from airflow.sdk.execution_time.context import AssetStateStoreAccessors
from airflow.serialization.decoders import smart_decode_trigger_kwargs
from airflow.serialization.encoders import encode_trigger
from airflow.triggers.base import BaseEventTrigger
from airflow.triggers.shared_stream import SharedStreamManager

from airflow_dicom_get import clock
from airflow_dicom_get.engine.arrivals import Sighting
from airflow_dicom_get.engine.items import make_item
from airflow_dicom_get.errors import ConnectFailed, InvalidOption, InvalidQuery
from airflow_dicom_get.triggers import _announced, _streams
from airflow_dicom_get.triggers._announced import Announced, digest, stores_of
from airflow_dicom_get.triggers.dicom import DicomStudyEventTrigger

SECONDS = 60
ONE, TWO = "1.2.3.1", "1.2.3.2"


class Asset:
    """The state of one asset."""

    def __init__(self, name: str):
        self.name = name
        self.values: dict[str, Any] = {}
        self.failing = 0

    async def aget(self, key, default=None):
        self._fail()
        return self.values.get(key, default)

    async def aset(self, key, value):
        self._fail()
        self.values[key] = json.loads(json.dumps(value))

    def _fail(self):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("the API server is away")


class Pacs:
    """What a scripted PACS lists; each look is an hour after the one before."""

    def __init__(self, monkeypatch):
        self.sizes: dict[str, int] = {}
        self.looks: list[str] = []
        self.errors: list[Exception] = []
        self.now = 1_700_000_000.0
        monkeypatch.setattr(_streams, "wait_for_look", self.look)
        monkeypatch.setattr(clock, "now", lambda: self.now)

    async def look(self, conn_id, queries, poke_interval):
        await asyncio.sleep(0)
        self.looks.append(queries[0].get("ModalitiesInStudy", "all"))
        self.now += 3600
        if self.errors:
            raise self.errors.pop()
        return Sighting([make_item(uid, expected=size) for uid, size in self.sizes.items()], self.now)


@pytest.fixture
def pacs(monkeypatch):
    return Pacs(monkeypatch)


class Triggerer:
    """Drives triggers as Airflow's triggerer does: events are in the database once they are confirmed."""

    def __init__(self, *, persists: bool = True):
        self.manager = SharedStreamManager(log=structlog.get_logger(), max_subscriber_queue=1024, ack_timeout=SECONDS)
        self.events: dict[int, list[Any]] = {}
        self.persists = persists
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.manager.stop_all()

    def start(self, trigger: DicomStudyEventTrigger, *assets: Asset) -> list[Any]:
        accessors = AssetStateStoreAccessors(inlets=[])
        accessors._by_name = {asset.name: asset for asset in assets}  # type: ignore[misc]
        trigger.asset_state_store = accessors
        number = len(self._tasks) + 1
        self.events[number] = []
        self._tasks.append(asyncio.create_task(self._run(number, trigger)))
        return self.events[number]

    async def _run(self, number, trigger):
        key = trigger.shared_stream_key()
        stream = self.manager.subscribe(trigger_id=number, trigger=trigger, key=key)
        try:
            async for event in trigger.filter_shared_stream(stream):
                seq = self.manager.bind_pending_event(trigger_id=number, key=key)
                self.events[number].append(event.payload)
                if self.persists and seq is not None:
                    self.manager.confirm_persisted([seq])
        finally:
            await self.manager.unsubscribe(number, key)


async def until(what):
    async with asyncio.timeout(SECONDS):
        while not what():
            await asyncio.sleep(0.005)


async def looked(pacs, times=3):
    """Some looks later."""
    goal = len(pacs.looks) + times
    await until(lambda: len(pacs.looks) >= goal)


def make(**options) -> DicomStudyEventTrigger:
    often: dict[str, Any] = {"poke_interval": 0.01, "dicom_conn_id": "pacs", "settled_for": timedelta(hours=1)}
    return DicomStudyEventTrigger(**{**often, **options})


def told(events):
    return [(event["study_instance_uid"], event["expected_instances"]) for event in events]


def kept(asset):
    (state,) = asset.values.values()
    return _announced._decoded(state).keys()


def test_each_settled_study_is_announced_once_and_again_when_it_has_grown(pacs):
    asset = Asset("a")
    pacs.sizes = {ONE: 3, TWO: 1}

    async def run():
        async with Triggerer() as triggerer:
            events = triggerer.start(make(min_instances=2), asset)
            await until(lambda: events)
            assert len(pacs.looks) >= 2, "it has not settled at the first look"
            await looked(pacs)
            assert told(events) == [(ONE, 3)]
            pacs.sizes = {ONE: 5, TWO: 1}
            await until(lambda: len(events) > 1)
            await looked(pacs)
            assert told(events) == [(ONE, 3), (ONE, 5)]
            await until(lambda: kept(asset) == {digest(ONE, 3), digest(ONE, 5)})
        async with Triggerer() as again:
            later = again.start(make(min_instances=2), asset)
            await looked(pacs, 4)
            assert later == []
            pacs.sizes[TWO] = 2
            await until(lambda: later)
            assert told(later) == [(TWO, 2)]
        return events

    events = asyncio.run(run())
    assert events[0] == make_item(ONE, expected=3)


def test_equal_watchers_of_two_assets_are_one_trigger_and_both_keep_what_was_announced(pacs):
    """The accessor of Airflow works by itself for one asset alone."""
    first, second = Asset("a"), Asset("b")
    pacs.sizes = {ONE: 3}

    async def run():
        async with Triggerer() as triggerer:
            events = triggerer.start(make(), first, second)
            with pytest.raises(ValueError, match="2 concrete"):
                AssetStateStoreAccessors.get(_two(), "x")
            await until(lambda: first.values and second.values)
            assert told(events) == [(ONE, 3)]
        assert first.values == second.values
        async with Triggerer() as again:
            third = Asset("c")
            events = again.start(make(), first, second, third)
            await until(lambda: events)
            assert told(events) == [(ONE, 3)], "the new asset has not heard of it"
            await until(lambda: third.values)
        async with Triggerer() as once_more:
            events = once_more.start(make(), first, second, third)
            await looked(pacs, 4)
            assert events == []

    asyncio.run(run())


def _two():
    from airflow.sdk import Asset as RealAsset

    return AssetStateStoreAccessors(inlets=[RealAsset("a"), RealAsset("b")])


def test_the_states_of_all_assets_are_found_in_airflows_accessor():
    assert [repr(one) for one in stores_of(_two())] == [
        "<AssetStateStoreAccessor name='a'>",
        "<AssetStateStoreAccessor name='b'>",
    ]
    assert stores_of(None) == []


def test_accessors_that_wait_for_their_answer():
    """As those of Airflow 3.3.1 do, which have nothing else."""

    class Waits:
        kept: ClassVar[dict] = {}

        def get(self, key, default=None):
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            return self.kept.get(key, default)

        def set(self, key, value):
            self.kept[key] = value

    (store,) = stores_of(Waits())

    async def run():
        await store.aset("k", 1)
        return await store.aget("k"), await store.aget("other")

    assert asyncio.run(run()) == (1, None)


def test_what_did_not_come_to_the_database_is_announced_again_with_the_same_item(pacs):
    asset = Asset("a")
    pacs.sizes = {ONE: 3}

    async def run():
        async with Triggerer(persists=False) as triggerer:
            events = triggerer.start(make(), asset)
            await until(lambda: events)
            await looked(pacs)
            assert told(events) == [(ONE, 3)], "not again by the same triggerer"
            assert asset.values == {}
        async with Triggerer() as again:
            later = again.start(make(), asset)
            await until(lambda: later)
            assert later == events
            await until(lambda: asset.values)

    asyncio.run(run())


def test_one_loop_asks_each_question_once_however_many_watch(pacs):
    pacs.sizes = {ONE: 3}

    async def run():
        async with Triggerer() as triggerer:
            same = [
                triggerer.start(make(settled_for=timedelta(hours=hours)), Asset(f"a{hours}")) for hours in (1, 2, 3)
            ]
            other = triggerer.start(make(query={"ModalitiesInStudy": "CT"}), Asset("ct"))
            await until(lambda: all((*same, other)))
            assert len(triggerer.manager._groups) == 1
            pacs.looks.clear()
            await looked(pacs, 20)
            await asyncio.sleep(0)
        assert abs(pacs.looks.count("all") - pacs.looks.count("CT")) <= 2
        assert all(told(events) == [(ONE, 3)] for events in (*same, other))

    asyncio.run(run())


def test_a_look_that_fails_ends_nothing(pacs, caplog):
    pacs.sizes = {ONE: 3}
    pacs.errors = [ConnectFailed("refused"), InvalidOption("port: is missing"), ValueError("HOSTILE^PATIENT"),
                   TimeoutError("late")]  # fmt: skip

    async def run():
        async with Triggerer() as triggerer:
            events = triggerer.start(make(), Asset("a"))
            await until(lambda: events)

    asyncio.run(run())
    assert "HOSTILE" not in caplog.text


def test_a_state_that_cannot_be_read_or_written_for_a_moment_is_tried_again(pacs, monkeypatch):
    monkeypatch.setattr(_announced, "WAIT_SECONDS", 0.001)
    asset = Asset("a")
    pacs.sizes = {ONE: 3}

    async def run():
        asset.failing = 3
        async with Triggerer() as triggerer:
            events = triggerer.start(make(), asset)
            await until(lambda: not asset.failing)
            asset.failing = 1
            await until(lambda: events and asset.values)
            assert kept(asset) == {digest(ONE, 3)}
        asset.failing = _announced.TRIES
        with pytest.raises(RuntimeError, match="away"):
            await Announced([asset], "x", 1).load()

    asyncio.run(run())


@pytest.mark.parametrize("state", [{"schema": 2}, [], {"schema": 1, "days": {"x": "?"}}, "text", {"schema": 1}])
def test_a_state_that_is_not_ours_counts_as_none(state, caplog):
    assert _announced._decoded(state) == {}


def test_what_can_no_longer_be_listed_is_forgotten():
    async def run():
        asset = Asset("a")
        announced = Announced([asset], "key", 1)
        await announced.load()
        announced.add(b"old_____", 1, 100)
        announced.add(b"listed__", 1, 100)
        await announced.confirm([1], 100)
        for day in (101, 102, 103, 104):
            assert not announced.is_new(b"listed__", day)
            await announced.confirm([], day)
        assert kept(asset) == {b"listed__"}
        again = Announced([asset], "key", 1)
        await again.load()
        assert (again.is_new(b"listed__", 104), again.is_new(b"old_____", 104)) == (False, True)

    asyncio.run(run())


def test_it_works_without_shared_streams_too(pacs):
    pacs.sizes = {ONE: 3}
    trigger = make()
    trigger.asset_state_store = asset = Asset("a")  # type: ignore[assignment]

    async def run():
        async with contextlib.aclosing(trigger.run()) as events:  # type: ignore[type-var]
            async for event in events:
                assert told([event.payload]) == [(ONE, 3)]
                pacs.sizes[TWO] = 1
                if asset.values:
                    break
                async for second in events:
                    assert told([second.payload]) == [(TWO, 1)]
                    break
                break

    asyncio.run(run())
    assert kept(asset) == {digest(ONE, 3)}


def test_the_trigger_goes_to_the_database_and_back(pacs):
    given = {"ModalitiesInStudy": "CT", "PatientID": "SECRET^ID"}
    trigger = make(query=given, lookback=timedelta(hours=30))
    encoded = json.loads(json.dumps(encode_trigger(trigger)))
    kwargs = {key: smart_decode_trigger_kwargs(value) for key, value in encoded["kwargs"].items()}
    again = DicomStudyEventTrigger(**kwargs)
    assert encoded["classpath"] == "airflow_dicom_get.triggers.dicom.DicomStudyEventTrigger"
    assert again.serialize() == trigger.serialize()
    assert BaseEventTrigger.hash(encoded["classpath"], encoded["kwargs"]) == BaseEventTrigger.hash(*again.serialize())
    assert again.shared_stream_key() == ("dicom-studies", "pacs")
    assert "SECRET" not in repr(trigger)
    assert trigger._query["StudyDate"] == "today-2/"


BAD: list[dict[str, Any]] = [
    {"settled_for": 600},
    {"settled_for": timedelta(-1)},
    {"min_instances": 0},
    {"poke_interval": 0},
    {"poke_interval": "60"},
    {"lookback": timedelta(-1)},
    {"lookback": 1},
    {"query": "CT"},
    {"query": {"StudyDate": "today"}},
    {"query": {"StudyInstanceUID": "1.2"}},
    {"query": {"QueryRetrieveLevel": "SERIES", "Modality": "CT"}},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_parameters_are_refused_when_the_dag_is_parsed(options):
    with pytest.raises(InvalidOption):
        make(**options)


def test_a_bad_query_is_refused_when_the_dag_is_parsed():
    with pytest.raises(InvalidQuery, match="PatientNam"):
        make(query={"PatientNam": "x"})


def test_an_event_that_somebody_created_announces_no_study(load_dag):
    """Nor does it cost the studies of the other events of that run."""
    announced = load_dag("on_new_study_event").task_dict["announced"].python_callable
    real = [{"from_trigger": True, "payload": make_item(uid)} for uid in (ONE, TWO)]
    bodies: Any = ({}, {"payload": make_item("1.2.3.3")}, {"from_rest_api": False, **real[0]})
    created = [CreateAssetEventsBody(asset_id=1, extra=body).extra for body in bodies]
    odd: list[Any] = [None, {"payload": None}, {"payload": {"study_instance_uid": [ONE]}}, {"payload": {}}]
    events = [SimpleNamespace(extra=extra) for extra in (real[0], *created, *odd, real[1])]
    (first, second) = announced(triggering_asset_events={"dicom_studies": events})
    assert [first, second] == [[make_item(ONE)], [make_item(TWO)]]
    assert announced(triggering_asset_events={"dicom_studies": events[1:-1]}) == []
