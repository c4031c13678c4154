"""Which runs are alive: each holds a lock file in the study's folder, and the leftovers of others are removed."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from airflow_dicom_get import clock
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Disk, Folder

log = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600
_TRIES = 16
"""How often others may remove a lock file, or its folder, in the moment in which it is made."""
_LOCK = re.compile(rf"\.(?P<run>{clock.RUN_NAME})\.lock")
_PART = re.compile(rf"\.[0-9.]{{1,64}}\.(?P<run>{clock.RUN_NAME})(?:\.[0-9]+)?\.part")
"""The temporary name of an instance. Earlier versions did not number the writers of a run."""


def hold(path: Folder, disk: Disk) -> int:
    """Make a lock file and lock it; whoever cleans up may have removed it in between.

    Nobody else may open it: whoever can may lock it, and we would wait for him for ever.

    Raises
    ------
    OSError
        It cannot be made, or is gone each time: a file server may take no names that begin with a dot.
    """
    for _ in range(_TRIES):
        try:
            lock = disk.open(path, files.NEW, mode=0o600)
        except FileExistsError:
            raise
        except FileNotFoundError:  # another run found the folder empty at its end, and removed it
            disk.make_folders(path.parent)
            continue
        except OSError:  # it may be there all the same
            with suppress(OSError):
                disk.remove(path)
            raise
        try:
            disk.lock(lock, wait=True)
            with suppress(OSError):  # a full disk: then it counts as one of this machine
                files.write_all(lock, disk.host().encode())
            if disk.is_at(lock, path):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            log.info("%s: no file locks on this file system; leftovers of other runs are kept for a day", path.parent)
            return lock
        disk.close(lock)
    raise FileNotFoundError(errno.ENOENT, f"a lock file ({path.name}) cannot be made there, or is gone at once")


def clean_dead_runs(folder: Folder, own: str, disk: Disk) -> None:
    """Remove temporary files and locks of runs that hold no lock any more; what another program left stays."""
    leftovers: dict[str, list[Folder]] = {}
    for name in files.names_in(folder):
        lock = _LOCK.fullmatch(name)
        if lock is not None:
            leftovers.setdefault(lock["run"], [])
        elif files.is_folder(folder / name):
            for part in files.names_in(folder / name):
                match = _PART.fullmatch(part)
                if match is not None:
                    leftovers.setdefault(match["run"], []).append(folder / name / part)
    leftovers.pop(own, None)
    for run, left in leftovers.items():
        with _if_dead(disk, folder / f".{run}.lock", left) as dead:
            if dead:
                log.info("removing the leftovers of run %s", run)
                for path in left:
                    disk.remove(path)


@contextmanager
def _if_dead(disk: Disk, lock: Folder, left: list[Folder]) -> Iterator[bool]:
    """Whether a run is dead; its lock is held meanwhile, and removed then."""
    try:
        fd = disk.open(lock, files.CHANGE)
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    try:
        try:
            # A lock that another machine holds may not be seen here, on a network file system.
            old = not _seen_here(disk.read_at(fd, 256, 0))
            dead = not old and disk.lock(fd, wait=False)
        except OSError:  # no locks on this file system
            old = True
        if old:
            try:
                dead = all(clock.now() - disk.status(path).st_mtime > _STALE_SECONDS for path in [lock, *left])
            except FileNotFoundError:  # it takes them away itself, at its end
                dead = False
        yield dead
        if dead:
            disk.remove(lock)
    finally:
        disk.close(fd)


def _seen_here(holder: bytes) -> bool:
    """Whether a lock file was written on this machine: in this boot of it, or in another of the same name."""
    ours = files.disk.host().encode()
    return not holder or holder == ours or holder.split(b" ")[0] == ours.split(b" ")[0]
