"""What is made of the disk's calls."""

from __future__ import annotations

import fcntl
import io
import os
import threading
from pathlib import Path

import pytest

from airflow_dicom_get.storage import files


def test_who_failed_to_write_a_file_cannot_end_it_in_another_ones_descriptor(tmp_path: Path) -> None:
    """As pyarrow does: its writer is cleared away after the error, and then tries to write its footer."""
    kept: list[io.RawIOBase] = []

    def write(file: io.RawIOBase) -> None:
        kept.append(file)
        file.write(b"half")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        files.replace_whole(tmp_path / "manifest", write, temporary=".part")
    others = [os.open(tmp_path / f"other-{n}", os.O_CREAT | os.O_WRONLY) for n in range(4)]
    try:
        with pytest.raises(ValueError, match="closed"):
            kept[0].write(b"footer")
    finally:
        for fd in others:
            os.close(fd)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"other-{n}": b"" for n in range(4)}


def test_what_somebody_changes_while_a_file_is_written_again_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"as it was, and more")
    with path.open("r+b") as file:
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"this file system has no leases: {error}")

    def edit() -> None:
        with path.open("r+b") as file:
            file.write(b"EDITED")

    editor = threading.Thread(target=edit)

    class Meddled(files.Disk):
        def read_at(self, fd: int, size: int, position: int) -> bytes:
            data = super().read_at(fd, size, position)
            if not position:
                editor.start()
                editor.join(0.5)
            return data

    monkeypatch.setattr(files, "disk", Meddled())
    files.write_again(path)
    editor.join()
    assert path.read_bytes() == b"EDITEDwas, and more"
