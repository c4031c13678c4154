"""The standard streams of the process: the exit status is the verdict's, whoever reads what is printed.

A reader may go away, as ``head`` does, or a stream may not be open at all, as under some service managers. Python
takes the first for an error, once more when it flushes at exit (status 120), and leaves ``None`` for the second, with
a descriptor that the next socket or file would get. Here both are settled once, for prints, logs and tracebacks.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from select import select
from typing import Any, NoReturn, TextIO

_FAILED = 1
_UNREAD = frozenset({errno.EPIPE, errno.ECONNRESET, errno.EBADF})


class _Stream(io.RawIOBase):
    """Writes to a descriptor, and never raises: what cannot be written is dropped from the first failure on."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any, /) -> int:
        size = len(data)
        left = memoryview(data)
        while left and self.failure is None:
            try:
                left = left[os.write(self._number, left) :]
            except BlockingIOError:  # another process of this terminal or pipe made it non-blocking
                select([], [self._number], [])
            except OSError as error:
                self.failure = error
        return size

    def lost(self) -> OSError | None:
        """Why something is lost to a reader that is there. None where all was written, or nobody reads."""
        if self.failure is None or self.failure.errno in _UNREAD:
            return None
        # A terminal that was closed.
        if self.failure.errno == errno.EIO and stat.S_ISCHR(os.fstat(self._number).st_mode):
            return None
        return self.failure


def run(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` as the whole of this process, and exit with what it returns.

    The status is 1 where the result could not be written for another reason than that nobody reads it.
    """
    _open_all()
    out = _Stream(1)
    sys.stdout = _text(out, sys.stdout, line_buffering=out.isatty())
    sys.stderr = _text(_Stream(2), sys.stderr, line_buffering=True)
    try:
        status: int | str | None = main()
    except SystemExit as ended:  # argparse, after a help or a wrong option
        status = ended.code
    sys.stdout.flush()
    lost = out.lost()
    if lost is not None:
        status = _FAILED
        print(
            f"dicom-get: error: the result could not be written to stdout: {lost.strerror}. "
            "Make room there, or write it to another place.",
            file=sys.stderr,
        )
    if any(thread.name.startswith("dicom-get") for thread in threading.enumerate()):
        # A call that was left to itself: Python would wait for some of its threads.
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else status is not None)
    sys.exit(status)


def write_at_once(text: str) -> None:
    """Write to stderr past all buffers, from a signal handler.

    That nobody reads it is not an error, and not waited for: a pipe may be full, and a terminal stopped.
    """
    with suppress(OSError):
        if select((), (2,), (), 0)[1]:
            os.write(2, text.encode())


def _open_all() -> None:
    """Lead the standard descriptors that are not open to nowhere, so that no socket or file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)


def _text(stream: _Stream, before: TextIO | None, *, line_buffering: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding="utf-8" if before is None else before.encoding,
        errors="backslashreplace",  # texts of a peer may hold characters that the locale does not have
        line_buffering=line_buffering,
    )
