"""A real file system, on FUSE, whose files can be opened and never read, as on a server of files that went away.

``python hanging_disk.py MOUNT`` serves it. Every name that ends in ``.parquet`` is a file there, all others folders.
A process that reads one of them cannot be killed before the file system is gone.
"""

from __future__ import annotations

import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZE = 100_000


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A mount of it; see :func:`tests.support.forgetful.lacking` for what it needs."""
    from tests.support.forgetful import start, unmount  # not there for the script

    server = start(__file__, folder)
    try:
        yield folder
    finally:
        server.kill()
        server.wait()
        unmount(folder)


def serve(mount: str) -> None:
    """Serve it until it is killed."""
    import mfusepy

    class Hanging(mfusepy.Operations):
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            is_file = path.endswith(".parquet")
            mode = stat.S_IFREG | 0o644 if is_file else stat.S_IFDIR | 0o755
            return {"st_mode": mode, "st_nlink": 1, "st_size": SIZE if is_file else 0}

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            threading.Event().wait()
            return b""

    mfusepy.FUSE(Hanging(), mount, foreground=True, fsname="hanging")


if __name__ == "__main__":
    serve(sys.argv[1])
