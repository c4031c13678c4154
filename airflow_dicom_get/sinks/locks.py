"""Which runs are alive: each holds a lock file in the study's folder, and the leftovers of others are removed."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600
_PART = re.compile(r"\.[0-9.]{1,64}\.(?P<run>[0-9A-Za-z-]+)\.part")


def hold(path: Path) -> int:
    """Make a lock file and lock it; whoever cleans up may have removed it in between."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            log.info("%s: no file locks on this file system; leftovers of other runs are kept for a day", path.parent)
            return lock
        os.close(lock)


def clean_dead_runs(folder: Path, own: str) -> None:
    """Remove temporary files and locks of runs that hold no lock any more."""
    leftovers: dict[str, list[Path]] = {}
    for path in folder.glob("*/.*.part"):
        match = _PART.fullmatch(path.name)
        if match is not None:
            leftovers.setdefault(match["run"], []).append(path)
    for path in folder.glob(".*.lock"):
        leftovers.setdefault(path.name[1 : -len(".lock")], [])
    leftovers.pop(own, None)
    for run, left in leftovers.items():
        with _if_dead(folder / f".{run}.lock", left) as dead:
            if dead:
                log.info("removing the leftovers of run %s", run)
                for path in left:
                    path.unlink(missing_ok=True)


@contextmanager
def _if_dead(lock: Path, left: list[Path]) -> Iterator[bool]:
    """Whether a run is dead; its lock is held meanwhile, and removed then."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead = True
        except BlockingIOError:
            dead = False
        except OSError:  # no locks on this file system
            dead = all(time.time() - path.stat().st_mtime > _STALE_SECONDS for path in [lock, *left])
        yield dead
        if dead:
            lock.unlink(missing_ok=True)
    finally:
        os.close(fd)
