"""Read one manifest for the page, in a process of its own: ``python -m airflow_dicom_get.plugins.reader FORM [PLACE]``.

What lies under the name of a manifest was put there by a DAG. Whatever a file that was made to do harm does to the
library that decodes it, it does here: take all the memory that there is, hang, or crash. This process has little of
it, is ended after a while, and the API server goes on.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from airflow_dicom_get.plugins.contents import contents_of, csv_lines
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below

if TYPE_CHECKING:
    import pyarrow.parquet as pq

CONTENTS, CSV = "contents", "csv"
"""What is written to stdout: the JSON of :class:`~airflow_dicom_get.plugins.contents.Contents`, or all rows."""

NO_FILE, NOT_READABLE = 3, 4
"""Exit status: there is no such file of this task; it is damaged, too large, or no manifest."""

MAX_MEMORY = 512 << 20
MAX_CPU_SECONDS = 600
MAX_MANIFEST_ROWS = 1_000_000
MAX_COLUMNS = 256
MAX_ROW_GROUPS = 10_000
MAX_COLUMN_BYTES = 256 << 20
"""Of one column, before compression, as the footer says."""
MAX_BYTES = 1 << 30
"""Of all columns."""


class TooLarge(Exception):
    """The footer claims more than is read here."""


def main(arguments: Sequence[str]) -> int:
    """Write a manifest to stdout, as ``FORM`` says.

    :param arguments: the form, then the root of the manifest and the names below it; without them it is stdin
    """
    _give_up_rights()
    form, *place = arguments
    try:
        given = _opened(place[0], place[1:]) if place else io.BytesIO(sys.stdin.buffer.read())
    except OSError:
        return NO_FILE
    try:
        with given, _parquet(given) as file, open(1, "w", encoding="utf-8", errors="backslashreplace") as output:
            check_claims(file.metadata)
            if form == CSV:
                output.writelines(csv_lines(file))
            else:
                json.dump(asdict(contents_of(file)), output)
    except BrokenPipeError:
        os._exit(NOT_READABLE)  # nobody reads any more; and nothing is left to be flushed
    except Exception:
        return NOT_READABLE
    return 0


def _give_up_rights() -> None:
    """Bound the memory of this process and its time, and have it write no file."""
    limits = {
        resource.RLIMIT_DATA: MAX_MEMORY,
        resource.RLIMIT_CPU: MAX_CPU_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, limit in limits.items():
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def _opened(root: str, names: Sequence[str]) -> BinaryIO:
    return open(files.disk.open(Below(Path(root), tuple(names)), files.READ), "rb")


def _parquet(given: BinaryIO) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(given)


def check_claims(footer: Any) -> None:
    """Hold what the footer of a Parquet file says against the bounds, before anything is read.

    :param footer: its ``pyarrow.parquet.FileMetaData``
    :raises TooLarge: it says more, or nonsense
    """
    columns, groups = footer.num_columns, footer.num_row_groups
    if not (0 <= footer.num_rows <= MAX_MANIFEST_ROWS and columns <= MAX_COLUMNS and groups <= MAX_ROW_GROUPS):
        raise TooLarge
    sizes = [0] * columns
    for group in map(footer.row_group, range(groups)):
        for number in range(columns):
            size = group.column(number).total_uncompressed_size
            sizes[number] += size if size >= 0 else MAX_BYTES + 1
    if max(sizes, default=0) > MAX_COLUMN_BYTES or sum(sizes) > MAX_BYTES:
        raise TooLarge


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
