"""A real file system, on FUSE, that forgets what was not synced.

``python forgetful.py MOUNT`` serves it. Making the folder ``.power-cut`` in its root takes everything back to what
was synced: content by the file's own sync, names by that of their folder. It is written apart from the model disk,
which is held against it.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CUT = ".power-cut"


def lacking() -> str | None:
    """What it needs and this machine lacks."""
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError, AttributeError):  # the last two: libfuse is missing, or too old
        return "mfusepy, with Debian's fuse3"
    if shutil.which("fusermount3") is None:
        return "fusermount3 (Debian package fuse3)"
    return None if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse"


def start(script: str, folder: Path) -> subprocess.Popen[bytes]:
    """Have a script serve a file system at a new folder; its process, once it is there."""
    folder.mkdir()
    server = subprocess.Popen([sys.executable, script, str(folder)])
    deadline = time.monotonic() + 30
    while not folder.is_mount():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            server.wait()
            unmount(folder)
            raise RuntimeError("the file system is not there")
        time.sleep(0.02)
    return server


def unmount(folder: Path) -> None:
    """Take a file system away, whoever still has files of it open."""
    subprocess.run(["fusermount3", "-u", "-z", str(folder)], check=False)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A mount of it."""
    server = start(__file__, folder)
    try:
        yield folder
    finally:
        unmount(folder)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def cut_power(mount: Path) -> None:
    """Take it back to what was synced."""
    with suppress(FileNotFoundError):  # it is not there afterwards
        (mount / CUT).mkdir()


def serve(mount: str) -> None:
    """Serve it until it is unmounted."""
    import mfusepy

    numbers = itertools.count(1)

    class Node:
        """A file or a folder: as it is, and as it was when it was synced."""

        def __init__(self, mode: int) -> None:
            self.number = next(numbers)
            self.mode, self.at = mode, time.time_ns()
            self.data, self.synced = bytearray(), b""
            self.names: dict[str, Node] = {}
            self.synced_names: dict[str, Node] = {}

        def sync(self) -> None:
            self.synced, self.synced_names = bytes(self.data), dict(self.names)

        def forget(self) -> None:
            self.data, self.names = bytearray(self.synced), dict(self.synced_names)
            for node in self.names.values():
                node.forget()

    class Forgetful(mfusepy.Operations):
        use_ns = True

        def __init__(self) -> None:
            self.root = Node(stat.S_IFDIR | 0o755)
            self.open_nodes: dict[int, Node] = {}

        def init_with_config(self, conn_info: Any, config: Any) -> None:
            config.use_ino = config.hard_remove = config.nullpath_ok = 1
            config.entry_timeout = config.attr_timeout = config.negative_timeout = 0

        def node(self, path: str | None, fh: int | None = None) -> Node:
            if path is None:
                return self.open_nodes[fh or 0]
            found = self.root
            for name in path.split("/")[1:]:
                if name:
                    found = self.below(found, name)
            return found

        def below(self, folder: Node, name: str) -> Node:
            if len(name.encode()) > 255:
                raise mfusepy.FuseOSError(errno.ENAMETOOLONG)
            if name not in folder.names:
                raise mfusepy.FuseOSError(errno.ENOENT)
            return folder.names[name]

        def place(self, path: str) -> tuple[dict[str, Node], str]:
            above, _, name = path.rpartition("/")
            if len(name.encode()) > 255:
                raise mfusepy.FuseOSError(errno.ENAMETOOLONG)
            return self.node(above).names, name

        def make(self, path: str, mode: int) -> Node:
            names, name = self.place(path)
            names[name] = Node(mode)
            return names[name]

        def open_node(self, node: Node) -> int:
            self.open_nodes[len(self.open_nodes) + 1] = node
            return len(self.open_nodes)

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            node = self.node(path, fh)
            times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), node.at)
            return {"st_mode": node.mode, "st_ino": node.number, "st_nlink": 1, "st_size": len(node.data), **times}

        def mkdir(self, path: str, mode: int) -> int:
            if path == f"/{CUT}":
                self.root.forget()
            else:
                self.make(path, stat.S_IFDIR | mode)
            return 0

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return self.open_node(self.make(path, stat.S_IFREG | mode))

        def open(self, path: str, flags: int) -> int:
            if flags & os.O_TRUNC:
                self.truncate(path, 0)
            return self.open_node(self.node(path))

        def opendir(self, path: str) -> int:
            return self.open_node(self.node(path))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return bytes(self.open_nodes[fh].data[offset : offset + size])

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            content = self.open_nodes[fh].data
            content += bytes(max(0, offset - len(content)))
            content[offset : offset + len(data)] = data
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            content = self.node(path, fh).data
            del content[length:]
            content += bytes(length - len(content))
            return 0

        def readdir(self, path: str, fh: int) -> Any:
            return [".", "..", *self.open_nodes[fh].names]

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            self.open_nodes[fh].sync()
            return 0

        fsyncdir = fsync

        def rename(self, old: str, new: str) -> int:
            (names, name), (others, other) = self.place(old), self.place(new)
            if other in others and others[other].names:
                raise mfusepy.FuseOSError(errno.ENOTEMPTY)
            others[other] = names.pop(name)
            return 0

        def link(self, target: str, source: str) -> int:
            names, name = self.place(target)
            names[name] = self.node(source)
            return 0

        def unlink(self, path: str) -> int:
            names, name = self.place(path)
            del names[name]
            return 0

        def rmdir(self, path: str) -> int:
            if self.node(path).names:
                raise mfusepy.FuseOSError(errno.ENOTEMPTY)
            return self.unlink(path)

        def statfs(self, path: str) -> dict[str, int]:
            return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bavail": 1 << 20, "f_bfree": 1 << 20}

    class Server(mfusepy.FUSE):
        def truncate_fuse_3(self, path: bytes | None, length: int, fip: Any) -> int:
            """Hand on the descriptor, too: a file that is open and has no name any more has no path."""
            return self.operations.truncate(path and path.decode(), length, fip.contents.fh if fip else None)

    Server(Forgetful(), mount, foreground=True, nothreads=True, default_permissions=True, fsname="forgetful")


if __name__ == "__main__":
    serve(sys.argv[1])
