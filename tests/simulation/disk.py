"""A model disk in the place of :data:`airflow_dicom_get.storage.files.disk`: a page cache above a medium.

A :class:`Volume` is the file system, a :class:`ModelDisk` what one process sees of it. Writes, names and sizes are in
the cache at once and on the medium only when they are synced: a killed process loses nothing, a power cut
(:meth:`Volume.cut`) leaves any state that POSIX allows. Of names it allows more than most file systems do: each
creation, rename and removal since the last sync of its folder may have happened or not, whatever became of the others.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from airflow_dicom_get import clock
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Free, Where
from tests.simulation.faults import Chance, Fault, Killed, Least, Process
from tests.simulation.marks import mark

PAGE = 512
"""Bytes that are written to the medium as one; small, so that small files tear too."""
_NAME_MAX = 255
_PATH_MAX = 4096
_WRITING = os.O_WRONLY | os.O_RDWR

F = TypeVar("F", bound=Callable[..., Any])


def _error(code: int, name: object = None) -> OSError:
    return OSError(code, os.strerror(code), *((str(name),) if name is not None else ()))


# --- what lies on the volume -----------------------------------------------------------------------


class Node:
    """A file or a folder, under as many names as it has."""

    __slots__ = ("mode", "mtime", "number")

    def __init__(self, number: int, mode: int) -> None:
        self.number, self.mode = number, mode
        self.mtime = clock.now()

    def allows(self, bits: int) -> bool:
        """Whether its owner, who is not root, may."""
        return self.mode >> 6 & bits == bits


class File(Node):
    """The content of a file: as it is read now, and as it is on the medium."""

    __slots__ = ("content", "dirty", "lost", "mourned", "stored")

    def __init__(self, number: int, content: bytes = b"", mode: int = 0o644) -> None:
        super().__init__(number, stat.S_IFREG | mode)
        self.content, self.stored = bytearray(content), bytearray(content)
        self.dirty: set[int] = set()
        """Pages that are to be written out."""
        self.lost: set[int] = set()
        """Pages that could not be written out: clean as far as the cache knows."""
        self.mourned = 0
        """How often that happened. Whoever had it open then is told once."""

    def is_dirty(self) -> bool:
        """Whether the medium lacks something that a sync would bring there."""
        return bool(self.dirty) or (len(self.content) != len(self.stored) and not self.lost)

    def may_change(self) -> bool:
        """Whether a power cut may leave something else than there is."""
        return self.is_dirty() and self.stored != self.content

    def put(self, data: bytes | memoryview, position: int) -> None:
        """Write into the cache."""
        if not data:
            return
        if position > len(self.content):
            self.cut_to(position)
        end = position + len(data)
        self.content[position:end] = data
        self._soil(position, end)

    def _soil(self, begin: int, end: int) -> None:
        if end > begin:
            pages = range(begin // PAGE, (end - 1) // PAGE + 1)
            self.dirty.update(pages)
            self.lost.difference_update(pages)

    def cut_to(self, size: int) -> None:
        """Truncate, or grow with zeros."""
        old = len(self.content)
        if size < old:
            del self.content[size:]
        else:
            self.content += bytes(size - old)
            self._soil(old, size)
        pages = -(-size // PAGE)
        self.dirty = {page for page in self.dirty if page < pages}
        self.lost = {page for page in self.lost if page < pages}

    def write_out(self) -> None:
        """What is dirty reaches the medium, and the size with it."""
        size = len(self.content)
        if len(self.stored) < size:
            self.stored += bytes(size - len(self.stored))
        else:
            del self.stored[size:]
        for page in self.dirty:
            self.stored[page * PAGE : (page + 1) * PAGE] = self.content[page * PAGE : (page + 1) * PAGE]
        self.dirty.clear()

    def fail_to_write_out(self, chance: Chance) -> None:
        """What is dirty counts as clean, and is not on the medium, or is there but for the answer (as Linux does)."""
        self.mourned += 1
        match chance.randrange(3):
            case 0:
                mark("disk: a failed sync kept nothing")
                self.lost |= self.dirty
            case 1:
                mark("disk: a failed sync kept the size alone")
                self.lost |= self.dirty
                self.stored += bytes(max(0, len(self.content) - len(self.stored)))
            case _:
                mark("disk: a failed sync kept all")
                self.write_out()
        self.dirty.clear()

    def forget(self, left: str, chance: Chance) -> None:
        """Power is cut: the cache is gone, and what was dirty is ``lost``, ``kept`` or ``torn``."""
        if left == "kept":
            self.write_out()
        elif left == "torn" and self.is_dirty():
            self._tear(chance)
        self.content = bytearray(self.stored)
        self.dirty.clear()
        self.lost.clear()

    def _tear(self, chance: Chance) -> None:
        old, new = len(self.stored), len(self.content)
        sizes = sorted({old, new, *range(min(old, new) // PAGE * PAGE + PAGE, max(old, new), PAGE)})
        size = sizes[chance.randrange(len(sizes))]
        if size != new:
            mark("disk: a file lost its size")
        whole = bytearray(self.stored[:size]) + bytes(max(0, size - old))
        for page in sorted(self.dirty):
            begin, end = page * PAGE, min((page + 1) * PAGE, size, new)
            if begin >= end:
                continue
            match chance.randrange(3):
                case 0:
                    mark("disk: a page was lost")
                case 1:
                    whole[begin:end] = self.content[begin:end]
                case _:
                    mark("disk: a page was torn")
                    end -= (end - begin + 1) // 2
                    whole[begin:end] = self.content[begin:end]
        self.stored = whole

    def evict(self) -> None:
        """Memory is short: pages that are clean are read from the medium when they are next asked for."""
        for page in self.lost:
            begin, end = page * PAGE, min((page + 1) * PAGE, len(self.content))
            self.content[begin:end] = bytes(self.stored[begin:end]).ljust(end - begin, b"\0")


class Folder(Node):
    """The names in a folder: as they are now, and as they are on the medium."""

    __slots__ = ("changes", "entries", "removed", "stored")

    def __init__(self, number: int, mode: int = 0o755) -> None:
        super().__init__(number, stat.S_IFDIR | mode)
        self.entries: dict[str, File | Folder] = {}
        self.stored: dict[str, File | Folder] = {}
        self.changes: list[dict[str, File | Folder | None]] = []
        """Since the last sync, in order; each is made whole or not at all."""
        self.removed = False

    def change(self, change: dict[str, File | Folder | None]) -> None:
        """Give, take or move names."""
        _apply(self.entries, change)
        self.changes.append(change)
        self.mtime = clock.now()

    def sync(self) -> None:
        """The names as they are now reach the medium."""
        self.stored = dict(self.entries)
        self.changes.clear()

    def forget(self, left: str, chance: Chance) -> None:
        """Power is cut: the changes since the last sync are ``lost``, ``kept``, or each is one or the other."""
        for change in self.changes:
            if left == "kept" or (left == "torn" and chance.randrange(2)):
                _apply(self.stored, change)
            else:
                mark("disk: a name was lost")
        self.entries = dict(self.stored)
        self.changes.clear()
        self.removed = False


def _apply(entries: dict[str, File | Folder], change: dict[str, File | Folder | None]) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class _Handle:
    """An open file or folder."""

    __slots__ = ("how", "mourned", "name", "node", "position")

    def __init__(self, node: File | Folder, how: int, name: str) -> None:
        self.node, self.how, self.name = node, how, name
        self.position = 0
        self.mourned = node.mourned if isinstance(node, File) else 0


class Volume:
    """A file system, and the machine's page cache above it.

    Parameters
    ----------
    chance : Chance
        Chooses what a power cut and a failed sync leave.

    Attributes
    ----------
    read_only : bool
        Every change fails with ``EROFS``.
    capacity : int or None
        Bytes that the content of all files may take.
    locks : {"all", "host", "none"}
        ``host``: a lock is seen by the processes of its own machine alone, as on some network file systems;
        ``none``: there are none.
    renames : {"new", "link", "plain"}
        What it knows to rename without replacing: ``renameat2``, hard links, or neither.
    """

    def __init__(self, chance: Chance | None = None) -> None:
        self.chance: Chance = chance or Least()
        self.read_only = False
        self.capacity: int | None = None
        self.locks = "all"
        self.renames = "new"
        self.cuts = 0
        self._numbers = 1
        self.root = Folder(1)
        self.disks: list[ModelDisk] = []
        self.scratches = 0
        """Folders that were made for a moment: a name is given once, whatever a killed run has left."""
        self.held: dict[tuple[int, str], _Handle] = {}
        self._touched: dict[int, File | Folder] = {}

    def disk(self, process: Process | None = None, *, host: str = "") -> ModelDisk:
        """The volume as a process sees it."""
        return ModelDisk(self, process or Process(), host)

    # --- what a machine does -----------------------------------------------------------------

    def cut(self, chance: Chance | None = None) -> None:
        """Power is lost: all processes are dead, and of what was not synced something is there, or nothing, or all."""
        chance = chance or self.chance
        self.cuts += 1
        for disk in self.disks:
            disk.process.die()
        self.disks.clear()
        self.held.clear()
        names, content = (_LEFT[chance.randrange(3)] for _ in range(2))
        for node in self._touched.values():
            node.forget(names if isinstance(node, Folder) else content, chance)
        self._touched.clear()
        mark(f"disk: power cut, names {names}, content {content}")

    def evict(self) -> None:
        """Memory is short: what could not be written out is lost from the cache too."""
        for node in self._touched.values():
            if isinstance(node, File):
                node.evict()

    def touch(self, node: File | Folder) -> None:
        """It may differ from the medium from now on."""
        self._touched[node.number] = node

    def create(self, parent: Folder, name: str, node: File | Folder) -> None:
        """A new file or folder under a name."""
        self.touch(node)
        self.rename(parent, {name: node})

    def rename(self, parent: Folder, change: dict[str, File | Folder | None]) -> None:
        """Change the names in a folder."""
        self.touch(parent)
        parent.change(change)

    def number(self) -> int:
        """The number of a new file or folder."""
        self._numbers += 1
        return self._numbers

    def room(self) -> int:
        """Bytes that are free."""
        if self.capacity is None:
            return 1 << 40
        return max(0, self.capacity - sum(len(file.content) for file in {f.number: f for f in self._all()}.values()))

    def _all(self) -> Iterator[File]:
        for _, node in _walk(self.root, "", lambda folder: folder.entries):
            if isinstance(node, File):
                yield node

    # --- what others do, and what a history asks ---------------------------------------------

    def find(self, path: Where) -> File | Folder:
        """What lies under a path. Raises :class:`OSError`."""
        node: File | Folder = self.root
        for name in _parts(path):
            node = _child(node, name, path)
        return node

    def put(self, path: Where, content: bytes, *, mode: int = 0o644) -> None:
        """Somebody else writes a file, folders included, and syncs it."""
        folder = self.make(os.path.dirname(os.fspath(path)))
        node = File(self.number(), content, mode)
        self.rename(folder, {os.path.basename(os.fspath(path)): node})
        folder.sync()

    def make(self, path: Where) -> Folder:
        """Somebody else makes a folder and those above it, and syncs them."""
        node: File | Folder = self.root
        for name in _parts(path):
            assert isinstance(node, Folder), path
            if name not in node.entries:
                self.rename(node, {name: Folder(self.number())})
                node.sync()
            node = node.entries[name]
        assert isinstance(node, Folder), path
        return node

    def overwrite(self, path: Where, content: bytes) -> None:
        """Somebody else writes other content into a file in its place, and syncs it."""
        node = self.find(path)
        assert isinstance(node, File), path
        node.content, node.stored = bytearray(content), bytearray(content)
        node.dirty.clear()
        node.lost.clear()
        node.mtime = clock.now()

    def remove(self, path: Where) -> None:
        """Somebody else removes a file, or a folder with all below it, and syncs that."""
        folder, name = self.find(os.path.dirname(os.fspath(path))), os.path.basename(os.fspath(path))
        assert isinstance(folder, Folder), path
        node = folder.entries[name]
        for _, below in [("", node), *_walk(node, "", lambda folder: folder.entries)]:
            if isinstance(below, Folder):
                below.removed = True
        self.rename(folder, {name: None})
        folder.sync()

    def set_mode(self, path: Where, mode: int) -> None:
        """Change what its owner may."""
        node = self.find(path)
        node.mode = stat.S_IFMT(node.mode) | mode

    def files(self) -> dict[str, bytes]:
        """The content of all files by their paths, as it is read now."""
        return _contents(self.root, lambda folder: folder.entries, lambda file: file.content)

    def durable(self) -> dict[str, bytes]:
        """What surely outlasts a power cut now: files whose names no change may move, and that are not dirty.

        A file into which its own bytes are written once more stays what it is, whatever reaches the medium.
        """
        return _contents(self.root, _certain, lambda file: None if file.may_change() else file.stored)

    def folders(self) -> list[str]:
        """The paths of all folders but the root, as they are now."""
        return [p for p, n in _walk(self.root, "", lambda folder: folder.entries) if isinstance(n, Folder)]

    def left_open(self) -> list[str]:
        """What living processes have open, or hold locked."""
        return sorted(f"open: {handle.name}" for disk in self.disks for handle in disk.handles.values()) + sorted(
            f"locked: {handle.name}" for handle in self.held.values()
        )


_LEFT = ("lost", "kept", "torn")


def _certain(folder: Folder) -> dict[str, File | Folder]:
    """The names that are the same whichever of the changes are made, or the content under which is."""
    moving = {(name, node) for change in folder.changes for name, node in change.items()}
    unsure = {name for name, node in moving if not _alike(folder.stored.get(name), node)}
    return {name: node for name, node in folder.stored.items() if name not in unsure}


def _alike(one: File | Folder | None, other: File | Folder | None) -> bool:
    """Whether it is the same to a reader which of two is there after a power cut."""
    if isinstance(one, File) and isinstance(other, File) and one is not other:
        return not (one.may_change() or other.may_change()) and one.stored == other.stored
    return one is other


def _walk(
    node: File | Folder, path: str, names: Callable[[Folder], dict[str, File | Folder]]
) -> Iterator[tuple[str, File | Folder]]:
    if isinstance(node, Folder):
        for name, below in names(node).items():
            yield f"{path}/{name}", below
            yield from _walk(below, f"{path}/{name}", names)


def _contents(
    root: Folder,
    names: Callable[[Folder], dict[str, File | Folder]],
    content: Callable[[File], bytearray | None],
) -> dict[str, bytes]:
    found = {}
    for path, node in _walk(root, "", names):
        if isinstance(node, File) and (data := content(node)) is not None:
            found[path] = bytes(data)
    return found


def _parts(path: Where) -> tuple[str, ...]:
    return _split(os.fspath(path))


@lru_cache(10_000)
def _split(path: str) -> tuple[str, ...]:
    if not path:
        raise _error(errno.ENOENT, path)
    if len(os.fsencode(path)) >= _PATH_MAX:
        raise _error(errno.ENAMETOOLONG, path)
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _child(node: File | Folder, name: str, path: object) -> File | Folder:
    if not isinstance(node, Folder):
        raise _error(errno.ENOTDIR, path)
    _may_look_in(node, name, path)
    try:
        return node.entries[name]
    except KeyError:
        raise _error(errno.ENOENT, path) from None


def _may_look_in(folder: Folder, name: str, path: object) -> None:
    """Whether a name can be looked up in a folder at all."""
    if not folder.allows(1):
        raise _error(errno.EACCES, path)
    if folder.removed:
        raise _error(errno.ENOENT, path)
    if 4 * len(name) > _NAME_MAX and len(os.fsencode(name)) > _NAME_MAX:
        raise _error(errno.ENAMETOOLONG, path)


# --- what a process sees ---------------------------------------------------------------------------


def _call(operation: str) -> Callable[[F], F]:
    """A call that the process counts, and that meets the faults planned for ``operation``."""

    def decorate(method: F) -> F:
        @wraps(method)
        def called(self: ModelDisk, *args: Any, **named: Any) -> Any:
            fault = self.process.call(operation)
            if fault is None:
                return method(self, *args, **named)
            return self._faulty(operation, fault, method, args, named)

        return cast(F, called)

    return decorate


class Entry:
    """What :meth:`ModelDisk.scan` gives: as :class:`os.DirEntry`."""

    __slots__ = ("_disk", "_node", "_path", "name")

    def __init__(self, disk: ModelDisk, node: File | Folder, name: str, path: str) -> None:
        self._disk, self._node, self.name, self._path = disk, node, name, path

    def inode(self) -> int:
        """See :meth:`os.DirEntry.inode`."""
        return self._node.number

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """See :meth:`os.DirEntry.is_dir`."""
        return isinstance(self._node, Folder)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """See :meth:`os.DirEntry.is_file`."""
        return isinstance(self._node, File)

    def is_symlink(self) -> bool:
        """See :meth:`os.DirEntry.is_symlink`."""
        return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """See :meth:`os.DirEntry.stat`."""
        return self._disk.status(self._path)


class ModelDisk(files.Disk):
    """The calls of one process. Paths are absolute; descriptors are numbers that are given only once.

    Attributes
    ----------
    handles : dict
        What is open, by descriptor.
    """

    def __init__(self, volume: Volume, process: Process, host: str = "") -> None:
        self.volume, self.process = volume, process
        self._host, self._boot = host, volume.cuts
        self.handles: dict[int, _Handle] = {}
        self._next = 3
        volume.disks.append(self)
        process.at_death.append(self._died)
        process.at_power_cut.append(volume.cut)

    def _died(self) -> None:
        for handle in self.handles.values():
            self._unlock(handle)
        self.handles.clear()
        if self in self.volume.disks:
            self.volume.disks.remove(self)

    def _faulty(
        self, operation: str, fault: Fault, method: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Any:
        code = fault.error
        if fault.short:
            if operation != "write":
                raise self.process.breach(f"{operation} cannot be short")
            mark("disk: a write was short")
            fd, data = args
            pieces = b"".join(bytes(x) for x in data) if isinstance(data, tuple) else bytes(data)
            result = self._append(fd, pieces[: len(pieces) // 2])
        elif operation == "close":
            result = method(self, *args)  # the descriptor is gone, whatever is said of it
        elif isinstance(code, int) and not fault.after:
            if operation == "sync":
                self._fail_to_sync(args[0])
            mark(f"disk: {operation} failed by {errno.errorcode[code]}")
            raise _error(code, operation)
        else:
            result = method(self, *args, **named)
        self.process.end_of_call(fault)
        if isinstance(code, int) and not fault.short:
            mark(f"disk: {operation} failed by {errno.errorcode[code]}")
            raise _error(code, operation)
        return result

    def _fail_to_sync(self, fd: int) -> None:
        handle = self._handle(fd)
        if isinstance(handle.node, File):
            handle.node.fail_to_write_out(self.volume.chance)
            handle.mourned = handle.node.mourned

    def _handle(self, fd: int) -> _Handle:
        try:
            return self.handles[fd]
        except KeyError:
            given = "was closed" if 3 <= fd < self._next else "was never given"
            raise self.process.breach(f"descriptor {fd} is used and {given}") from None

    def _file(self, fd: int, how: int | None = None) -> tuple[_Handle, File]:
        handle = self._handle(fd)
        if how is not None and handle.how & os.O_ACCMODE not in (how, os.O_RDWR):
            raise _error(errno.EBADF)
        if not isinstance(handle.node, File):
            raise _error(errno.EISDIR if how == os.O_RDONLY else errno.EBADF)
        return handle, handle.node

    def _parent(self, path: Where, folder: int | None = None) -> tuple[Folder, str]:
        """The folder that a path ends in, and the last name."""
        text = os.fspath(path)
        node: File | Folder = self.volume.root
        if not text.startswith("/"):
            if folder is None:
                raise self.process.breach(f"{text} is a relative path")
            node = self._handle(folder).node
        *above, name = _parts(path) or ("",)
        if ".." in above or name == "..":
            raise self.process.breach(f"{text} leads upwards")
        for part in above:
            node = _child(node, part, path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOTDIR, path)
        if name:
            _may_look_in(node, name, path)
        return node, name

    def _find(self, path: Where, folder: int | None = None) -> File | Folder:
        parent, name = self._parent(path, folder)
        return _child(parent, name, path) if name else parent

    def _may_change(self, parent: Folder, path: object) -> None:
        """Whether names in a folder may be given and taken."""
        if self.volume.read_only:
            raise _error(errno.EROFS, path)
        if not parent.allows(3):
            raise _error(errno.EACCES, path)

    def _opened(self, node: File | Folder, how: int, path: object) -> int:
        fd, self._next = self._next, self._next + 1
        self.handles[fd] = _Handle(node, how, str(path))
        return fd

    # --- open files --------------------------------------------------------------------------

    @_call("open")
    def open(self, path: Where, how: int, folder: int | None = None, mode: int = 0o666) -> int:
        """See :meth:`files.Disk.open`."""
        parent, name = self._parent(path, folder)
        node = parent.entries.get(name) if name else parent
        writes = bool(how & _WRITING)
        if node is None:
            if not how & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            self._may_change(parent, path)
            node = File(self.volume.number(), mode=mode & 0o755)
            self.volume.create(parent, name, node)
            return self._opened(node, how, path)
        if how & os.O_CREAT and how & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        if isinstance(node, Folder) and (writes or how & os.O_CREAT):
            raise _error(errno.EISDIR, path)
        wanted = (4 if how & os.O_ACCMODE != os.O_WRONLY else 0) | (2 if writes else 0)
        if not node.allows(wanted):
            raise _error(errno.EACCES, path)
        if writes and self.volume.read_only:
            raise _error(errno.EROFS, path)
        if how & os.O_TRUNC and isinstance(node, File):
            self.volume.touch(node)
            node.cut_to(0)
        return self._opened(node, how, path)

    @_call("open_folder")
    def open_folder(self, path: Where) -> int:
        """See :meth:`files.Disk.open_folder`."""
        node = self._find(path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOTDIR, path)
        if not node.allows(4):
            raise _error(errno.EACCES, path)
        return self._opened(node, os.O_RDONLY, path)

    @_call("write")
    def write(self, fd: int, data: bytes | memoryview) -> int:
        """See :meth:`files.Disk.write`."""
        return self._append(fd, data)

    @_call("write")
    def writev(self, fd: int, data: tuple[bytes | memoryview, ...]) -> int:
        """See :meth:`files.Disk.writev`."""
        return self._append(fd, b"".join(bytes(piece) for piece in data))

    def _append(self, fd: int, data: bytes | memoryview) -> int:
        handle, file = self._file(fd, os.O_WRONLY)
        position = len(file.content) if handle.how & os.O_APPEND else handle.position
        if self.volume.capacity is not None:
            grows = max(0, position + len(data) - len(file.content))
            room = self.volume.room()
            if grows > room:
                data = data[: max(0, len(data) - (grows - room))]
                if not data:
                    mark("disk: full")
                    raise _error(errno.ENOSPC)
        self.volume.touch(file)
        file.put(data, position)
        file.mtime = clock.now()
        handle.position = position + len(data)
        return len(data)

    @_call("read")
    def read_at(self, fd: int, size: int, position: int) -> bytes:
        """See :meth:`files.Disk.read_at`."""
        return bytes(self._file(fd, os.O_RDONLY)[1].content[position : position + size])

    @_call("read")
    def read_into(self, fd: int, view: memoryview, position: int) -> int:
        """See :meth:`files.Disk.read_into`."""
        data = self._file(fd, os.O_RDONLY)[1].content[position : position + len(view)]
        view[: len(data)] = data
        return len(data)

    @_call("status")
    def size(self, fd: int) -> int:
        """See :meth:`files.Disk.size`."""
        return _status(self._handle(fd).node).st_size

    @_call("truncate")
    def truncate(self, fd: int, size: int) -> None:
        """See :meth:`files.Disk.truncate`."""
        handle = self._handle(fd)
        if not isinstance(handle.node, File) or not handle.how & _WRITING:
            raise _error(errno.EINVAL)
        self.volume.touch(handle.node)
        handle.node.cut_to(size)

    @_call("sync")
    def sync(self, fd: int) -> None:
        """See :meth:`files.Disk.sync`."""
        self._sync(fd)

    @_call("sync")
    def sync_data(self, fd: int) -> None:
        """See :meth:`files.Disk.sync_data`."""
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        handle = self._handle(fd)
        node = handle.node
        if isinstance(node, Folder):
            node.sync()
            return
        node.write_out()
        if handle.mourned != node.mourned:
            handle.mourned = node.mourned
            raise _error(errno.EIO)

    @_call("start_write_back")
    def start_write_back(self, fd: int, begin: int = 0, length: int = 0) -> None:
        """See :meth:`files.Disk.start_write_back`: what may happen anyway, and promises nothing."""
        self._handle(fd)

    @_call("lock")
    def lock(self, fd: int, *, wait: bool) -> bool:
        """See :meth:`files.Disk.lock`."""
        handle = self._handle(fd)
        if self.volume.locks == "none":
            raise _error(errno.EOPNOTSUPP)
        key = self._lock_key(handle)
        while self.volume.held.get(key, handle) is not handle:
            mark("disk: locked by another")
            if not wait:
                return False
            self.process.wait(f"the lock of {handle.name}")
        self.volume.held[key] = handle
        return True

    def _lock_key(self, handle: _Handle) -> tuple[int, str]:
        return handle.node.number, self._host if self.volume.locks == "host" else ""

    def _unlock(self, handle: _Handle) -> None:
        key = self._lock_key(handle)
        if self.volume.held.get(key) is handle:
            del self.volume.held[key]

    def keep_others_out(self, fd: int) -> None:
        """See :meth:`files.Disk.keep_others_out`: here nobody comes in between two calls of a run."""
        self._handle(fd)

    @_call("host")
    def host(self) -> str:
        """See :meth:`files.Disk.host`."""
        return f"{self._host or 'model'} {self._boot}"

    @_call("status")
    def is_at(self, fd: int, path: Where) -> bool:
        """See :meth:`files.Disk.is_at`."""
        return self._handle(fd).node is self._find(path)

    def identity(self, fd: int) -> tuple[int, int]:
        """See :meth:`files.Disk.identity`."""
        return 1, self._handle(fd).node.number

    @_call("close")
    def close(self, fd: int) -> None:
        """See :meth:`files.Disk.close`."""
        self._unlock(self._handle(fd))
        del self.handles[fd]

    # --- names in an open folder -------------------------------------------------------------

    def _moved(self, old: str, new: str, folder: int) -> tuple[Folder, File | Folder, File | Folder | None]:
        parent, _ = self._parent(old, folder)
        node = _child(parent, old, old)
        _may_look_in(parent, new, new)
        return parent, node, parent.entries.get(new)

    @_call("rename")
    def rename_new(self, old: str, new: str, folder: int) -> None:
        """See :meth:`files.Disk.rename_new`."""
        parent, node, there = self._moved(old, new, folder)
        if there is not None and self.volume.renames != "plain":
            raise _error(errno.EEXIST, new)
        self._may_change(parent, new)
        if self.volume.renames == "link":
            self.volume.rename(parent, {new: node})
            self.volume.rename(parent, {old: None})
        else:
            self.volume.rename(parent, {old: None, new: node})

    @_call("rename")
    def rename_over(self, old: str, new: str, folder: int) -> None:
        """See :meth:`files.Disk.rename_over`."""
        parent, node, there = self._moved(old, new, folder)
        self._may_change(parent, new)
        if there is node:
            return
        if isinstance(there, Folder) and not isinstance(node, Folder):
            raise _error(errno.EISDIR, new)
        if isinstance(node, Folder) and there is not None:
            if not isinstance(there, Folder):
                raise _error(errno.ENOTDIR, new)
            if there.entries:
                raise _error(errno.ENOTEMPTY, new)
            there.removed = True
            self.volume.touch(there)
        self.volume.rename(parent, {old: None, new: node})

    @_call("status")
    def has(self, name: str, folder: int) -> bool:
        """See :meth:`files.Disk.has`."""
        try:
            self._find(name, folder)
        except FileNotFoundError:
            return False
        return True

    @_call("unlink")
    def unlink(self, name: str, folder: int) -> None:
        """See :meth:`files.Disk.unlink`."""
        self._unlink(name, folder)

    def _unlink(self, path: Where, folder: int | None = None) -> None:
        parent, name = self._parent(path, folder)
        node = _child(parent, name, path)
        self._may_change(parent, path)
        if isinstance(node, Folder):
            raise _error(errno.EISDIR, path)
        self.volume.rename(parent, {name: None})

    # --- paths -------------------------------------------------------------------------------

    def make_folders(self, path: Where) -> None:
        """See :meth:`files.Disk.make_folders`: a call for each folder that is not there."""
        text = os.fspath(path)
        missing = []
        while True:
            try:
                there = self._find(text)
            except FileNotFoundError:
                missing.append(text)
                text = os.path.dirname(text)
                continue
            if not isinstance(there, Folder):
                raise _error(errno.ENOTDIR if missing else errno.EEXIST, text)
            break
        for text in reversed(missing):
            self.make_folder(text)

    @_call("make_folder")
    def make_folder(self, path: Where) -> None:
        """See :meth:`files.Disk.make_folder`."""
        parent, name = self._parent(path)
        if not name or name in parent.entries:
            return
        self._may_change(parent, path)
        self.volume.create(parent, name, Folder(self.volume.number()))

    def close_to_others(self, path: Where) -> None:
        """See :meth:`files.Disk.close_to_others`."""
        self.volume.set_mode(path, 0o700)

    @_call("remove_folder")
    def remove_folder(self, path: Where) -> None:
        """See :meth:`files.Disk.remove_folder`."""
        parent, name = self._parent(path)
        if not name:
            raise _error(errno.EBUSY, path)
        node = _child(parent, name, path)
        self._may_change(parent, path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOTDIR, path)
        if node.entries:
            raise _error(errno.ENOTEMPTY, path)
        node.removed = True
        self.volume.touch(node)
        self.volume.rename(parent, {name: None})

    @_call("unlink")
    def remove(self, path: Where) -> None:
        """See :meth:`files.Disk.remove`."""
        try:
            self._unlink(path)
        except FileNotFoundError:
            pass

    @_call("status")
    def status(self, path: Where) -> os.stat_result:
        """See :meth:`files.Disk.status`."""
        return _status(self._find(path))

    def real_path(self, path: Where) -> Path:
        """See :meth:`files.Disk.real_path`: there are no links here."""
        return Path(path)

    def scan(self, path: Where) -> Iterator[os.DirEntry[str]]:
        """See :meth:`files.Disk.scan`."""
        for entry in self._scanned(path):
            yield cast("os.DirEntry[str]", entry)

    @_call("scan")
    def _scanned(self, path: Where) -> list[Entry]:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise _error(errno.ENOTDIR, path)
        if not node.allows(4):
            raise _error(errno.EACCES, path)
        text = os.fspath(path)
        entries = [Entry(self, below, name, os.path.join(text, name)) for name, below in node.entries.items()]
        return entries[::-1]  # no order is promised

    def is_writable(self, path: Where) -> bool:
        """See :meth:`files.Disk.is_writable`."""
        try:
            return self._find(path).allows(3) and not self.volume.read_only
        except OSError:
            return False

    @_call("status")
    def free(self, path: Where) -> Free:
        """See :meth:`files.Disk.free`."""
        self._find(path)
        return Free(self.volume.room(), self.volume.capacity or 1 << 50, 1, 0, 0)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """See :meth:`files.Disk.scratch`."""
        self.volume.scratches += 1
        path = Path(f"/tmp/{self.volume.scratches}")
        self.make_folders(path)
        try:
            yield path
        finally:
            if self.process.dead:
                raise Killed("scratch")
            self.volume.remove(path)


def _status(node: File | Folder) -> os.stat_result:
    size = len(node.content) if isinstance(node, File) else 0
    when = int(node.mtime)
    return os.stat_result((node.mode, node.number, 1, 1, 0, 0, size, when, when, when))
