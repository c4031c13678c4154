"""What the filesystem sink needs of the operating system beyond ``os``."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from typing import Any

CHUNK = 1 << 18
"""Bytes read at a time: small enough to stay in the cache of a core."""
_WRITE_BACK = 8 << 20
_RENAME_NOREPLACE = 1
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def rename_new(old: str, new: str, folder: int) -> None:
    """Rename within a folder, never over a file that is there.

    One call where kernel and file system know renameat2; a hard link and an unlink where not.

    Raises
    ------
    FileExistsError
        ``new`` is there.
    OSError
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


def exists(name: str, folder: int) -> bool:
    """Whether there is an entry of this name in an open folder."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def start_write_back(fd: int, begin: int = 0, length: int = 0) -> None:
    """Let the kernel begin to write a range out, without waiting: many files then share one commit."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, length, os.POSIX_FADV_DONTNEED)


def fsync_path(path: str) -> None:
    """Sync a file or folder by its name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def digest_of(fd: int) -> bytes:
    """Sha256 of a whole open file, its position left alone."""
    digest = hashlib.sha256()
    pos = 0
    while chunk := os.pread(fd, CHUNK, pos):
        digest.update(chunk)
        pos += len(chunk)
    return digest.digest()


def digest_of_path(path: str) -> bytes:
    """Sha256 of a file by its name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def same_content(one: int, one_pos: int, other: int, other_pos: int) -> bool:
    """Whether two open files are alike from these positions to their ends."""
    while True:
        a = os.pread(one, CHUNK, one_pos)
        b = os.pread(other, CHUNK, other_pos)
        if a != b:
            return False
        if not a:
            return True
        one_pos += len(a)
        other_pos += len(b)


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
        self._wake = threading.Condition()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="dicom-get-digest", daemon=True)
        self._thread.start()

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
        self._thread.join()
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
            size = os.preadv(self._fd, [view[: min(target - self._done, CHUNK)]], self._done)
            if not size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._digest.update(view[:size])
            self._done += size
        if self._done - self._pushed >= _WRITE_BACK:
            start_write_back(self._fd, self._pushed, self._done - self._pushed)
            self._pushed = self._done
