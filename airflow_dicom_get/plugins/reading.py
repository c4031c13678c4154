"""How the API server has the manifest of a task instance read: which file that may be, by whom, and for how long."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from weakref import WeakValueDictionary

from starlette.concurrency import run_in_threadpool

from airflow_dicom_get.config.destination import FilesystemDestination
from airflow_dicom_get.errors import ManifestError
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.manifest.files import place_of, safe_name, task_run_name
from airflow_dicom_get.manifest.frames import parquet_in_xcom
from airflow_dicom_get.plugins import database
from airflow_dicom_get.plugins.contents import Contents
from airflow_dicom_get.plugins.database import Task
from airflow_dicom_get.plugins.reader import CONTENTS, CSV, NO_FILE

log = logging.getLogger(__name__)

SECONDS = 20.0
"""How long a page waits for its manifest, its turn included, and a download for its first rows."""
DOWNLOAD_SECONDS = 600.0
AT_ONCE = 4
"""Manifests read at a time for pages, and as many for downloads; one of them for each user."""

NOT_SHOWN = (
    "The manifest cannot be shown here. The API server reads what the task returned, or the file that this very task "
    "instance wrote, if it is a manifest that it can read in time; it opens nothing else, and no bucket. To read it "
    "where it is, use airflow_dicom_get.notebook.read_manifest()."
)
"""The one answer, so that nobody learns from it what there is."""

_MAX_JSON = 16 << 20
_PIECE = 1 << 16
_LIGHT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# --- which manifest --------------------------------------------------------------------------------


def own_file(task: Task, uri: Any) -> tuple[str, ...] | None:
    """What an address names, if that is the file of this very task instance: its root, and the names below it.

    Whoever makes a DAG can put any address into its XComs, so the end of the path has to be that of the task, and
    nothing in it may be a link; the root is that of ``[dicom_get] manifest_root`` where there is one.
    """
    try:
        place = place_of(uri)
        configured = configuration.text("manifest_root")
        root = place_of(configured) if configured else None
    except ManifestError:
        return None
    if not isinstance(place, FilesystemDestination) or not place.path.is_absolute():
        return None
    name = re.fullmatch(r"-?\d+-(\d{1,9})\.parquet", place.path.name)
    if name is None:
        return None
    run = task_run_name(
        dag_id=task.dag_id,
        run_id=task.run_id,
        task_id=task.task_id,
        map_index=task.map_index,
        try_number=int(name[1]),
    )
    below = tuple(f"{run}.parquet".split("/"))
    if place.path.parts[-len(below) :] != below:
        return None
    above = Path(*place.path.parts[: -len(below)])
    if root is not None and not (isinstance(root, FilesystemDestination) and above == root.path):
        return None
    # Two DAGs whose names differ only in what a file name cannot hold share a folder.
    if any(other != task.dag_id and safe_name(other) == below[0] for other in database.dag_ids()):
        return None
    return str(above), *below


def _source(task: Task) -> tuple[IO[bytes] | None, tuple[str, ...]] | None:
    """The manifest of a task instance: what it returned, as an open file, or the place of its own file."""
    returned = database.returned(task)
    try:
        content = parquet_in_xcom(returned)
    except ManifestError:
        return None
    if content is None:
        place = own_file(task, returned.get("manifest_uri") or (task.summary or {}).get("manifest_uri"))
        return None if place is None else (None, place)
    given = TemporaryFile()  # noqa: SIM115
    given.write(content)
    given.seek(0)
    return given, ()


# --- by whom ---------------------------------------------------------------------------------------


class NotRead(Exception):
    """A manifest could not be read; the text says why, for the log alone."""


class Reader:
    """A process that reads one manifest, and what it writes."""

    def __init__(
        self, process: subprocess.Popen[bytes], output: asyncio.StreamReader, stream: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._output = output
        self._stream = stream

    async def pieces(self) -> AsyncIterator[bytes]:
        """What it writes, to the end. Raises :class:`NotRead` if that is not all of it."""
        try:
            while piece := await self._output.read(_PIECE):
                yield piece
            while (status := self._process.poll()) is None:
                await asyncio.sleep(0.005)
            if status:
                why = "there is no such file" if status == NO_FILE else f"it is not readable (status {status})"
                raise NotRead(why)
        finally:
            self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._stream.close()


class Turns:
    """Places for so many at a time, one for each user: whoever asks for more waits, and nobody else does."""

    def __init__(self, at_once: int) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, user: str) -> AsyncIterator[None]:
        """Wait for a place, and keep it to the end of the block."""
        turn = self._turns.setdefault(user, asyncio.Lock())
        async with turn, self._free:
            yield


class Readers:
    """Processes that read manifests, each at its place among :class:`Turns`.

    A process keeps its place until it is gone. One that waits for a disk that hangs cannot be killed.
    """

    def __init__(self, at_once: int, seconds: float) -> None:
        self._seconds = seconds
        self._turns = Turns(at_once)
        self._watched: set[asyncio.Task[None]] = set()

    async def start(self, user: str, form: str, task: Task) -> Reader:
        """Begin to read the manifest of a task. Raises :class:`NotRead` if it has none, :class:`OSError`."""
        async with AsyncExitStack() as entered:
            await entered.enter_async_context(self._turns.of(user))
            source = await run_in_threadpool(_source, task)
            if source is None:
                raise NotRead("it is not the file of this task instance")
            process, end = _launch(form, *source)
            watch = asyncio.create_task(self._watch(process, entered.pop_all()))
            self._watched.add(watch)
            watch.add_done_callback(self._watched.discard)
        output, stream = await asyncio.open_connection(sock=end, limit=_PIECE)
        return Reader(process, output, stream)

    async def _watch(self, process: subprocess.Popen[bytes], place: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._seconds
        async with place:
            try:
                while process.poll() is None:
                    late = loop.time() > ends
                    if late:
                        process.kill()
                    await asyncio.sleep(1 if late else 0.02)
            finally:
                if process.poll() is None:
                    process.kill()


def _launch(
    form: str, given: IO[bytes] | None, place: tuple[str, ...]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process; with the end of the socket that it writes to.

    No pipe: uvloop closes the descriptor of one twice, and by the second time it may be another viewer's connection.
    """
    ours, its = socket.socketpair()
    with its, given or nullcontext():
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "airflow_dicom_get.plugins.reader", form, *place],
                stdin=given or subprocess.DEVNULL,
                stdout=its.fileno(),
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_LIGHT},
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return process, ours


_PAGES = Readers(AT_ONCE, SECONDS)
_DOWNLOADS = Readers(AT_ONCE, DOWNLOAD_SECONDS)

_FAILURES = (NotRead, OSError, ValueError, TimeoutError)
"""ValueError: an address that no command line can hold."""


async def contents_of(task: Task, user: str) -> Contents | None:
    """What the page shows of the manifest of a task; None if it cannot be shown."""
    reader = None
    try:
        async with asyncio.timeout(SECONDS):
            reader = await _PAGES.start(user, CONTENTS, task)
            told = bytearray()
            async for piece in reader.pieces():
                told += piece
                if len(told) > _MAX_JSON:
                    raise NotRead("there is too much to show")
            return Contents.of(json.loads(told))
    except _FAILURES as error:
        _say(task, error)
        return None
    finally:
        if reader is not None:
            reader.close()


async def csv_of(task: Task, user: str) -> AsyncIterator[bytes] | None:
    """The manifest of a task as CSV, piece by piece; None if it cannot be read."""
    reader = None
    try:
        async with asyncio.timeout(SECONDS):
            reader = await _DOWNLOADS.start(user, CSV, task)
            pieces = reader.pieces()
            first = await anext(pieces)
    except (*_FAILURES, StopAsyncIteration) as error:
        if reader is not None:
            reader.close()
        _say(task, error)
        return None

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return whole()


def _say(task: Task, error: Exception) -> None:
    why = str(error) if isinstance(error, NotRead) else type(error).__name__
    place = task.dag_id, task.run_id, task.task_id, task.map_index
    log.info("The manifest of %s %s %s [%s] was not read: %s", *place, why)
