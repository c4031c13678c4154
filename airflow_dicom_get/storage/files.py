"""The disk: every call of the operating system that destinations, ledgers, locks and manifests are read and written by.

:data:`disk` is the one that all use. A simulation puts a :class:`Disk` of its own in its place; what stands
below the class is made of its calls alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from airflow_dicom_get import clock

CHUNK = 1 << 18
"""Bytes read at a time: small enough to stay in the cache of a core."""
LARGEST = (16 << 30) + (1 << 20)
"""Bytes of the file of an instance: none that comes is larger, and of what another has put there no more is read."""
READ, CREATE, APPEND = os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND | os.O_CREAT
CHANGE, REPLACE, NEW = os.O_RDWR, os.O_RDWR | os.O_CREAT | os.O_TRUNC, os.O_RDWR | os.O_CREAT | os.O_EXCL
"""Ways to open a file."""
_WRITE_BACK = 8 << 20
_DEEPEST = 64
"""Folders below the one that is looked through."""
_BLOCK = 512
"""Bytes that a disk writes as one; a file system loses whole multiples of it."""
_RENAME_NOREPLACE = 1
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ON_THE_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Where = str | os.PathLike[str]
GoOn = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Below:
    """A path below a folder that somebody named. That folder may be a link; no link is followed on the way from it.

    Where several may write, a link further down leads wherever one of them wants.
    """

    top: Path
    names: tuple[str, ...] = ()
    private: int = 0
    """How many of its names lead to a folder for our user alone. That is looked at on every way through it: who may
    write to the folder above can put another one in its place."""

    def __fspath__(self) -> str:
        return str(self.top.joinpath(*self.names))

    __str__ = __fspath__

    def __truediv__(self, names: str) -> Below:
        return replace(self, names=(*self.names, *names.split("/")))

    def at(self, path: Where) -> Below:
        """A path further down, given whole. Raises :class:`ValueError` where it is none."""
        return replace(self, names=Path(path).relative_to(self.top).parts)

    @property
    def name(self) -> str:
        """The last of its names."""
        return self.names[-1]

    @property
    def parent(self) -> Folder:
        """The folder that it lies in."""
        return self.parents[0]

    @property
    def parents(self) -> tuple[Folder, ...]:
        """The folders above it, innermost first, those above the one that was named included."""
        return (*(replace(self, names=self.names[:n]) for n in reversed(range(len(self.names)))), *self.top.parents)


Folder = Path | Below


class Free(NamedTuple):
    """What may still be written on a disk, and all that it has room for: bytes, and files and folders.

    ``all_files`` is 0 where the file system does not count them.
    """

    size: int
    all_sizes: int
    block: int
    files: int
    all_files: int


class Disk:
    """The calls of the operating system. All raise :class:`OSError`.

    Of a path that is :class:`Below` another, and of a name in an open folder, no link is followed.
    """

    # --- open files --------------------------------------------------------------------------

    def open(self, path: Where, how: int, folder: int | None = None, mode: int = 0o666) -> int:
        """Open a file, by its name in an open ``folder`` if one is given, or a folder to be synced; its descriptor.

        What is neither, as a FIFO, is refused, and nothing is waited for; but what a person names to be written to may
        be a pipe or a terminal.
        """
        named = 0
        if folder is not None:  # once an instance: no context manager
            fd = _open(path, how | os.O_NONBLOCK, folder, mode)
        else:
            with _name_in(path) as (name, at):
                named = at is None and how & os.O_WRONLY
                fd = _open(name, how if named else how | os.O_NONBLOCK, at, mode)
        try:
            if not named and not how & os.O_EXCL and not _is_file_or_folder(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(path))
        except OSError:
            os.close(fd)
            raise
        return fd

    def open_folder(self, path: Where) -> int:
        """Open a folder; its descriptor."""
        with _name_in(path) as (name, at):
            return _open(name, _FOLDER, at)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Write where the file stands; how much it took."""
        return os.write(fd, data)

    def writev(self, fd: int, data: tuple[bytes | memoryview, ...]) -> int:
        """As :meth:`write`, of several pieces."""
        return os.writev(fd, data)

    def read_at(self, fd: int, size: int, position: int) -> bytes:
        """Read at most so many bytes; none at the end."""
        return os.pread(fd, size, position)

    def read_into(self, fd: int, view: memoryview, position: int) -> int:
        """Read into a view; how much, 0 at the end."""
        return os.preadv(fd, [view], position)

    def size(self, fd: int) -> int:
        """Bytes of an open file."""
        return os.fstat(fd).st_size

    def truncate(self, fd: int, size: int) -> None:
        """Cut an open file."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Make a file or a folder durable, as it is now."""
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        """Make the content of a file durable, and what of its metadata is needed to read it."""
        os.fdatasync(fd)

    def start_write_back(self, fd: int, begin: int = 0, length: int = 0) -> None:
        """Let the kernel begin to write a range out, without waiting: many files then share one commit."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)

    def lock(self, fd: int, *, wait: bool) -> bool:
        """Lock an open file for this process; False if another has it, and ``wait`` is False.

        Raises
        ------
        OSError
            There are no locks on this file system.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def keep_others_out(self, fd: int) -> None:
        """Let whoever opens this file wait until it is closed here, as far as the file system knows leases.

        None is given while others have the file open: what these write at the time may be lost.
        """
        with suppress(OSError, AttributeError):
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # of the default, SIGIO, a process may die
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def host(self) -> str:
        """The machine and its boot, whose locks are seen here: they may not reach across a network file system."""
        with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{os.uname().nodename} {file.read().strip()}"
        return os.uname().nodename

    def is_at(self, fd: int, path: Where) -> bool:
        """Whether it is this open file or folder that lies under a path."""
        return os.path.samestat(os.fstat(fd), self.status(path))

    def identity(self, fd: int) -> tuple[int, int]:
        """Which file or folder it is that is open, among all that there are at the time."""
        found = os.fstat(fd)
        return found.st_dev, found.st_ino

    def close(self, fd: int) -> None:
        """Close."""
        os.close(fd)

    # --- names in an open folder -------------------------------------------------------------

    def rename_new(self, old: str, new: str, folder: int) -> None:
        """Rename within a folder, never over a file that is there.

        One call where kernel and file system know renameat2; a hard link and an unlink where not.

        Raises
        ------
        FileExistsError
            ``new`` is there.
        """
        if _renameat2 is not None:
            if _renameat2(folder, old.encode(), folder, new.encode(), _RENAME_NOREPLACE) == 0:
                return
            code = ctypes.get_errno()
            if code not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(code, os.strerror(code), new)
        try:
            os.link(old, new, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)  # no hard links either
        else:
            os.unlink(old, dir_fd=folder)

    def rename_over(self, old: str, new: str, folder: int) -> None:
        """Rename within a folder, over whatever is there."""
        os.replace(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def has(self, name: str, folder: int) -> bool:
        """Whether there is an entry of this name in an open folder."""
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def unlink(self, name: str, folder: int) -> None:
        """Remove a file from an open folder."""
        os.unlink(name, dir_fd=folder)

    # --- paths -------------------------------------------------------------------------------

    def make_folders(self, path: Where) -> None:
        """Make a folder and those above it, as far as they are not there."""
        if isinstance(path, Below):
            self.make_folders(path.top)
            for folder in reversed((path, *path.parents[: len(path.names)])):
                self.make_folder(folder)
            mode = self.status(path).st_mode
            if stat.S_ISLNK(mode):
                raise _link_at(path)
            if not stat.S_ISDIR(mode):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        else:
            os.makedirs(path, exist_ok=True)

    def make_folder(self, path: Where) -> None:
        """Make a folder if it is not there; the one above it must be."""
        with _name_in(path) as (name, at), suppress(FileExistsError):
            os.mkdir(name, dir_fd=at)

    def close_to_others(self, path: Where) -> None:
        """Let nobody but us look into a folder of ours; another user's is refused, also one that we may not read."""
        _check_ours(self.status(path), path)
        folder = self.open_folder(path)
        try:
            found = os.fstat(folder)
            _check_ours(found, path)
            if found.st_mode & 0o077:
                os.fchmod(folder, 0o700)
        finally:
            os.close(folder)

    def remove_folder(self, path: Where) -> None:
        """Remove an empty folder."""
        with _name_in(path) as (name, at):
            os.rmdir(name, dir_fd=at)

    def remove(self, path: Where) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError), _name_in(path) as (name, at):
            os.unlink(name, dir_fd=at)

    def status(self, path: Where) -> os.stat_result:
        """What lies under a path: kind, size, age. Raises :class:`FileNotFoundError`."""
        with _name_in(path) as (name, at):
            return os.stat(name, dir_fd=at, follow_symlinks=at is None)

    def scan(self, path: Where) -> Iterator[os.DirEntry[str]]:
        """What lies in a folder, in no order. Ask an entry for its status while the scan goes on, and for no path.

        Raises :class:`FileNotFoundError`, :class:`NotADirectoryError`.
        """
        folder = self.open_folder(path)
        try:
            with os.scandir(folder) as entries:
                yield from entries
        finally:
            os.close(folder)

    def real_path(self, path: Where) -> Path:
        """Where a path leads, all links followed; also where nothing lies there.

        Raises :class:`OSError` (``ELOOP``) for a chain of some thousand links, which leads nowhere.
        """
        try:
            return Path(os.path.realpath(path))
        except RecursionError:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None

    def is_writable(self, path: Where) -> bool:
        """Whether we may write in a folder."""
        return os.access(path, os.W_OK | os.X_OK)

    def free(self, path: Where) -> Free:
        """What we may still write below a folder."""
        found = os.statvfs(path)
        block = found.f_frsize
        return Free(found.f_bavail * block, found.f_blocks * block, block, found.f_favail, found.f_files)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the time being, on this machine."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


@contextmanager
def _name_in(path: Where) -> Iterator[tuple[Where, int | None]]:
    """A name, and the open folder in which it is no link to be followed; a path that may lead anywhere as it is."""
    if not isinstance(path, Below) or not path.names:
        yield os.fspath(path), None
        return
    if not {"", ".", ".."}.isdisjoint(path.names):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    at = os.open(path.top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *way, last = (*path.names, ".") if len(path.names) == path.private else path.names
        for passed, name in enumerate(way, 1):
            above, at = at, _open(name, _ON_THE_WAY, at)
            os.close(above)
            if passed == path.private:
                _check_private(os.fstat(at), path)
        yield last, at
    finally:
        os.close(at)


def _open(name: Where, how: int, folder: int | None, mode: int = 0o666) -> int:
    if folder is None:
        return os.open(name, how | os.O_CLOEXEC, mode)
    try:
        return os.open(name, how | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, folder):
            raise _link_at(name) from None
        raise


def _link_at(path: Where) -> OSError:
    return OSError(errno.ELOOP, "it is a link, which is not followed", str(path))


def _is_link(name: Where, folder: int) -> bool:
    with suppress(OSError):
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _check_ours(found: os.stat_result, path: Where) -> None:
    if found.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "it belongs to another user", str(path))


def _check_private(found: os.stat_result, path: Where) -> None:
    _check_ours(found, path)
    if found.st_mode & 0o077:
        raise OSError(errno.EPERM, "others may look into the folder", str(path))


def _is_file_or_folder(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


disk = Disk()
"""The disk that all use."""


class _Shut:
    def __init__(self, disk: Disk, left: Callable[[], bool]) -> None:
        self._disk, self._left = disk, left

    def __getattr__(self, name: str) -> Any:
        if name != "close" and self._left():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return getattr(self._disk, name)


def shut_when(left: Callable[[], bool]) -> Disk:
    """:data:`disk` as one run has it: shut but for closing, once the run was left to itself.

    So whoever returns late, from a call of it or from anything else, changes nothing any more.
    """
    return cast(Disk, _Shut(disk, left))


# --- what is made of these calls -------------------------------------------------------------------


@contextmanager
def opened(path: Where, how: int = READ, folder: int | None = None, mode: int = 0o666) -> Iterator[int]:
    """An open file, closed at the end."""
    fd = disk.open(path, how, folder, mode)
    try:
        yield fd
    finally:
        disk.close(fd)


def exists(path: Where) -> bool:
    """Whether anything lies under a path."""
    try:
        disk.status(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Where) -> bool:
    """Whether it is a folder that lies under a path."""
    try:
        return stat.S_ISDIR(disk.status(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def nearest(path: Path) -> Path:
    """The path, or the folder nearest to it that is there."""
    return next(p for p in (path, *path.parents) if exists(p))


def names_in(path: Where) -> list[str]:
    """What lies in a folder, in order; nothing if it is not there."""
    try:
        return sorted(entry.name for entry in disk.scan(path))
    except FileNotFoundError:
        return []


def make_folders(path: Folder, by: Disk | None = None) -> list[Folder]:
    """Make a folder and those above it; those in which one is new, to be synced for it to last, innermost first."""
    changed = []
    for folder, above in pairwise((path, *path.parents)):
        if exists(folder):
            break
        changed.append(above)
    (by or disk).make_folders(path)
    return changed


def make_private(path: Below) -> None:
    """Make a folder for our user alone; one of ours that is there is closed to others.

    Raises
    ------
    OSError
        It cannot be made; or a link is there (``ELOOP``), another user's folder, or one that cannot be closed to others
        (``EPERM``): what lies in it is not ours.
    """
    named = replace(path, private=0)
    disk.make_folders(named)
    try:
        disk.close_to_others(named)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        raise OSError(errno.EPERM, error.strerror or str(error), str(path)) from error


def files_below(
    path: Below, wanted: Callable[[str], bool], left_out: Callable[[Below, OSError], object]
) -> Iterator[Below]:
    """The files below a folder in order, through those folders, and of those names, that are ``wanted``.

    Folders that cannot be read, or lie too deep, and links, are ``left_out``.
    """
    waiting = [path]
    while waiting:
        at = waiting.pop()
        folders, found = [], []
        try:
            if len(at.names) > len(path.names) + _DEEPEST:
                raise OSError(errno.ENAMETOOLONG, f"it lies more than {_DEEPEST} folders deep")
            for entry in disk.scan(at):
                if not wanted(entry.name):
                    continue
                if entry.is_symlink():
                    left_out(at / entry.name, _link_at(entry.name))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    found.append(entry.name)
        except OSError as error:
            left_out(at, error)
        for name in sorted(found):
            yield at / name
        waiting += (at / name for name in sorted(folders, reverse=True))


def check_size(size: int) -> None:
    """Refuse a file that is too large for an instance. Raises :class:`OSError`."""
    if size > LARGEST:
        raise OSError(errno.EFBIG, f"it is larger than {LARGEST >> 30} GiB, and so no instance")


def read_chunks(path: Where, go_on: GoOn = lambda: None) -> Iterator[memoryview]:
    """The content of a file; each view is void when the next one is asked for.

    ``go_on`` is called before each chunk but the first, and raises what ends it, here and in what compares files.

    Raises :class:`OSError` also where it is too large for an instance, or grows to that meanwhile.
    """
    view = memoryview(bytearray(CHUNK))
    position = 0
    with opened(path) as fd:
        check_size(disk.size(fd))
        while size := disk.read_into(fd, view, position):
            if position:
                go_on()
            yield view[:size]
            position += size
            check_size(position)


def read_whole(path: Where, most: int) -> bytes:
    """The content of a file. Raises :class:`OSError` where it is larger than ``most`` bytes."""
    content = bytearray()
    with opened(path) as fd:
        if disk.size(fd) <= most:
            while len(content) <= most and (piece := disk.read_at(fd, CHUNK, len(content))):
                content += piece
            if len(content) <= most:
                return bytes(content)
    raise too_large(path, most)


def too_large(path: Where, most: int) -> OSError:
    """The error of a file of more than ``most`` bytes."""
    return OSError(errno.EFBIG, f"it is larger than {most >> 20} MiB", str(path))


def append_to(path: Where, data: bytes) -> None:
    """Put something behind what is in a file, made if absent, by one write; nobody else's comes in between.

    Raises
    ------
    OSError
        It cannot be written, or not as a whole.
    """
    fd = disk.open(path, APPEND)
    try:
        if disk.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        disk.close(fd)


def sync_path(path: Where) -> None:
    """Make a file or folder durable by its name."""
    with opened(path) as fd:
        disk.sync(fd)


def write_again(path: Where, folder: int | None = None, go_on: GoOn = lambda: None) -> bool:
    """Write a file once more as it is, where we may: a sync of it is then one of what it holds. Whether we may.

    After a sync that failed, what could not be written counts as written; the next sync succeeds and writes nothing.
    So it is of no worth to sync what another process has written, or a run before this one. Whoever changes the file
    meanwhile waits, or has it open already. ``go_on`` is called before each piece, and raises what ends it.
    """
    try:
        fd = disk.open(path, CHANGE, folder)
    except OSError:
        return False
    try:
        disk.keep_others_out(fd)
        position = 0
        while chunk := disk.read_at(fd, CHUNK, position):
            go_on()
            write_all(fd, chunk)
            position += len(chunk)
            check_size(position)
    finally:
        disk.close(fd)
    return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of it, also where the disk takes a part at a time (a signal, a disk that gets full)."""
    view = memoryview(data)
    while view:
        written = disk.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view = view[written:]


def replace_whole(
    path: Folder,
    write: Callable[[io.RawIOBase], object],
    *,
    temporary: str,
    private: bool = False,
    go_on: Callable[[], bool] = lambda: True,
    new: bool = False,
) -> None:
    """Write a file under a temporary name, sync it, and rename it. An older one is replaced whole.

    Parameters
    ----------
    path : Path
        Where it goes; folders are made.
    write : callable
        Called with a file to write to.
    temporary : str
        Its name until then.
    private : bool
        Who may read it: user and group at most, or our user alone where another one has made the folder, or one above.
        He may have chosen the group, or an access control list that stands in the place of the umask; while the group
        of the mode may nothing, nobody on such a list may either.
    go_on : callable
        Asked after each call of the disk, which may not return for long: nothing is changed any more where it says no.
    new : bool
        Replace nothing: where something lies under ``path``, it is a :class:`FileExistsError`.

    Raises
    ------
    OSError
        Nothing is left under ``path`` that was not there before.
    """

    def check() -> None:
        if not go_on():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    new_in = make_folders(path.parent)
    folder = disk.open_folder(path.parent)
    try:
        check()
        mode = 0o666 if not private else 0o640 if _is_ours(folder, path.parent) else 0o600
        with opened(temporary, NEW, folder, mode) as fd, _Output(fd, check) as output:
            try:
                write(output)
                check()
                disk.sync(fd)
                check()
                (disk.rename_new if new else disk.rename_over)(temporary, path.name, folder)
            except BaseException:
                with suppress(OSError):
                    check()
                    disk.unlink(temporary, folder)
                raise
        disk.sync(folder)
        for above in new_in:
            sync_path(above)
    finally:
        disk.close(folder)


def _is_ours(folder: int, path: Folder) -> bool:
    """Whether an open folder, and those above it, whose group and lists it may have, are ours or root's."""
    real = disk.real_path(path)
    if not disk.is_at(folder, real):
        return False
    return all(disk.status(at).st_uid in (0, os.geteuid()) for at in (real, *real.parents))


class _Output(io.RawIOBase):
    """An open file of the disk as one of Python, for what writes to such files alone.

    Closing it closes nothing, and ends all writing: a writer that failed half-way may try to finish its file when it is
    finalised, and by then the descriptor may belong to another file.
    """

    def __init__(self, fd: int, check: Callable[[], None]) -> None:
        self._fd, self._position, self._check = fd, 0, check

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("The file is closed.")
        size = memoryview(data).nbytes
        self._check()
        write_all(self._fd, data)
        self._position += size
        return size

    def tell(self) -> int:
        return self._position


def digest_of(fd: int, go_on: GoOn = lambda: None) -> bytes:
    """Sha256 of a whole open file. Raises :class:`OSError` as :func:`read_chunks`."""
    digest = hashlib.sha256()
    for chunk, position in _pieces(fd, 0, go_on):
        digest.update(chunk)
        check_size(position + len(chunk))
    return digest.digest()


def _pieces(fd: int, begin: int, go_on: GoOn) -> Iterator[tuple[bytes, int]]:
    """What an open file holds from a position on, in pieces that end where its chunks do, and where each begins."""
    position = begin
    while piece := disk.read_at(fd, CHUNK - position % CHUNK, position):
        if position > begin:
            go_on()
        yield piece, position
        position += len(piece)


def digest_of_path(path: Where, go_on: GoOn = lambda: None) -> bytes:
    """Sha256 of a file by its name; ``go_on`` is called before each chunk, and raises what ends it."""
    digest = hashlib.sha256()
    for view in read_chunks(path):
        go_on()
        digest.update(view)
    return digest.digest()


def same_content(one: int, one_pos: int, other: int, other_pos: int, go_on: GoOn = lambda: None) -> bool:
    """Whether two open files are alike from these positions to their ends."""
    begin = one_pos
    while True:
        if one_pos > begin:
            go_on()
        a = disk.read_at(one, CHUNK, one_pos)
        b = disk.read_at(other, CHUNK, other_pos)
        if a != b:
            return False
        if not a:
            return True
        one_pos += len(a)
        other_pos += len(b)


def starts_alike(short: int, short_pos: int, long: int, long_pos: int, go_on: GoOn = lambda: None) -> bool:
    """Whether an open file is, from its position to its end, the beginning of another from its own."""
    return all(
        piece == disk.read_at(long, len(piece), long_pos + position - short_pos)
        for piece, position in _pieces(short, short_pos, go_on)
    )


def differ_by_lost_blocks(there: int, there_pos: int, whole: int, whole_pos: int, go_on: GoOn = lambda: None) -> bool:
    """Whether each block in which an open file differs from a whole one, from these positions on, is of zeros.

    So a crash leaves what was written and not synced; what a program has changed differs in other bytes.
    """
    for piece, position in _pieces(there, there_pos, go_on):
        other = disk.read_at(whole, len(piece), whole_pos + position - there_pos)
        if piece != other:
            edges = [0, *range(-position % _BLOCK or _BLOCK, len(piece), _BLOCK), len(piece)]
            for begin, end in pairwise(edges):
                if piece[begin:end] != other[begin:end] and any(piece[begin:end]):
                    return False
    return True


class Follower:
    """Digests a growing file behind its writer, out of the page cache, and starts its write-back.

    Parameters
    ----------
    fd : int
        The file, open for reading too.
    digest : hashlib object
        Has seen the first ``done`` bytes.
    """

    def __init__(self, fd: int, digest: Any, done: int) -> None:
        self._fd, self._digest, self._done = fd, digest, done
        self._written = self._announced = self._pushed = done
        self._ended = False
        self._wake = clock.condition()
        self._error: OSError | None = None
        self._worker = clock.spawn(self._run, "dicom-get-digest")

    def grown(self, size: int) -> None:
        """The file holds ``size`` bytes now."""
        self._written = size
        if size - self._announced >= CHUNK:
            with self._wake:
                self._announced = size
                self._wake.notify()

    def finish(self) -> None:
        """Wait for the digest of all that was written. Raises :class:`OSError`."""
        with self._wake:
            self._announced = self._written
            self._ended = True
            self._wake.notify()
        self._worker.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        view = memoryview(bytearray(CHUNK))
        try:
            while True:
                with self._wake:
                    while self._done >= self._announced and not self._ended:
                        self._wake.wait()
                    target = self._announced
                if self._done >= target:
                    return
                self._read_up_to(target, view)
        except OSError as error:
            self._error = error

    def _read_up_to(self, target: int, view: memoryview) -> None:
        while self._done < target:
            size = disk.read_into(self._fd, view[: min(target - self._done, CHUNK)], self._done)
            if not size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._digest.update(view[:size])
            self._done += size
        if self._done - self._pushed >= _WRITE_BACK:
            disk.start_write_back(self._fd, self._pushed, self._done - self._pushed)
            self._pushed = self._done
