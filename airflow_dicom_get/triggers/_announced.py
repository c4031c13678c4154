"""Which studies were announced as events, kept in the state of the assets that watch."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from asgiref.sync import sync_to_async

log = logging.getLogger(__name__)

SCHEMA = 1
HASH_BYTES = 8
MARGIN_DAYS = 2
"""Beyond the days of the look back: time zones, and a day on which nothing was asked."""
TRIES, WAIT_SECONDS = 10, 3.0
"""For reading the state: without it, all would be announced again."""


class Store(Protocol):
    """The state of one asset, as Airflow gives it to a trigger."""

    async def aget(self, key: str, default: Any = None) -> Any:
        """The value of a key."""

    async def aset(self, key: str, value: Any) -> None:
        """Write the value of a key."""


class _Waiting:
    """The same of Airflow 3.3.1, whose accessors wait for the answer; the event loop may not."""

    def __init__(self, accessor: Any) -> None:
        self._accessor = accessor

    def __repr__(self) -> str:
        return repr(self._accessor)

    async def aget(self, key: str, default: Any = None) -> Any:
        return await sync_to_async(self._accessor.get)(key, default)

    async def aset(self, key: str, value: Any) -> None:
        await sync_to_async(self._accessor.set)(key, value)


def stores_of(accessors: Any) -> list[Store]:
    """The state of each asset that a trigger serves.

    Equal watchers of several assets are one trigger, and the accessor that it is given works by itself for one asset
    alone; the names of the assets are known to nobody but that accessor.
    """
    if accessors is None:
        return []
    by_name, by_uri = getattr(accessors, "_by_name", {}), getattr(accessors, "_by_uri", {})
    stores = [*by_name.values(), *by_uri.values()] or [accessors]
    return [store if hasattr(store, "aget") else _Waiting(store) for store in stores]


def digest(study: str, count: int | None) -> bytes:
    """What is kept of a study: another number of instances is another digest."""
    return hashlib.blake2b(f"{study}\0{count}".encode(), digest_size=HASH_BYTES).digest()


class Announced:
    """The studies that a trigger has announced: those that are known to be in Airflow's database, and newer ones.

    :param stores: the state of each asset
    :param key: under which it stands there
    :param days: how long a study is listed after its date
    """

    def __init__(self, stores: Sequence[Store], key: str, days: int) -> None:
        self._stores = stores
        self._key = key
        self._days = days
        self._seen: dict[bytes, int] = {}
        """By digest: the day on which it was last listed."""
        self._unsure: dict[int, set[bytes]] = {}
        """By the number of the look: what was announced then, and may not have come to Airflow's database."""
        self._saved_on = -1
        self._due = False

    async def load(self) -> None:
        """Read what was announced before. A study counts once all assets know of it: one that is new hears of all.

        :raises Exception: the state cannot be read
        """
        known: dict[bytes, int] | None = None
        for store in self._stores:
            found = _decoded(await self._read(store))
            known = (
                found if known is None else {one: max(day, found[one]) for one, day in known.items() if one in found}
            )
        self._seen = known or {}
        self._saved_on = max(self._seen.values(), default=-1)

    async def _read(self, store: Store) -> Any:
        for again in reversed(range(TRIES)):
            try:
                return await store.aget(self._key)
            except Exception as error:
                if not again:
                    raise
                log.warning("The state of %r cannot be read: %s. Trying again.", store, type(error).__name__)
                await asyncio.sleep(WAIT_SECONDS)
        raise AssertionError

    def is_new(self, one: bytes, today: int) -> bool:
        """Whether a study that is listed today was not announced yet."""
        if one not in self._seen:
            return True
        self._seen[one] = today
        return False

    def add(self, one: bytes, look: int, today: int) -> None:
        """A study is announced now, out of a look of this number."""
        self._seen[one] = today
        self._unsure.setdefault(look, set()).add(one)

    async def confirm(self, looks: Iterable[int], today: int) -> None:
        """What was announced out of these looks is in Airflow's database: keep that. Never raises."""
        found = [self._unsure.pop(look, set()) for look in looks]
        if not any(found) and not self._due and self._saved_on in (today, -1):
            return
        self._due = True  # until it was written
        oldest = today - self._days - MARGIN_DAYS
        self._seen = {one: day for one, day in self._seen.items() if day >= oldest}
        unsure: set[bytes] = set().union(*self._unsure.values())
        state = _encoded({one: day for one, day in self._seen.items() if one not in unsure})
        for store in self._stores:
            try:
                await store.aset(self._key, state)
            except Exception as error:
                log.warning("The state of %r cannot be written: %s. It is tried again.", store, type(error).__name__)
                return
        self._due, self._saved_on = False, today


def _encoded(seen: dict[bytes, int]) -> dict[str, Any]:
    days: dict[str, list[bytes]] = {}
    for one, day in sorted(seen.items()):
        days.setdefault(str(day), []).append(one)
    return {"schema": SCHEMA, "days": {day: base64.b64encode(b"".join(ones)).decode() for day, ones in days.items()}}


def _decoded(state: Any) -> dict[bytes, int]:
    """What stands in a state; nothing, with a warning, where it is not ours."""
    if state is None:
        return {}
    found: dict[bytes, int] = {}
    try:
        if state["schema"] != SCHEMA:
            raise ValueError
        for day, text in state["days"].items():
            ones = base64.b64decode(text, validate=True)
            found |= {ones[at : at + HASH_BYTES]: int(day) for at in range(0, len(ones), HASH_BYTES)}
    except (AttributeError, KeyError, TypeError, ValueError):
        log.warning("The state of announced studies cannot be understood; all of them are announced again.")
        return {}
    return found
