"""What is retrieved from: the SCP from memory, and Orthanc and dcmqrscp as Debian ships them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory_scp import STUDY

from airflow_dicom_get.testing.archive import ACCESSION, SERIES_UID, SOP_INSTANCE, STUDY_UID
from airflow_dicom_get.testing.sample_data import big_study, make_uid, set_elements
from airflow_dicom_get.testing.servers import HOST, Dcmqrscp, Orthanc, free_port

_HERE = Path(__file__).parent
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Source:
    """A node with one study."""

    key: str
    title: str
    ae_title: str
    port: int
    study: str
    instances: int
    size: int
    """Bytes of pixel data of an instance."""

    host: str = HOST

    @property
    def node(self) -> str:
        return f"{self.ae_title}@{self.host}:{self.port}"

    @property
    def bytes(self) -> int:
        return self.instances * self.size


def in_words(instances: int, size: int) -> str:
    """``1000 × 512 KiB``."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size % unit == 0:
            return f"{instances} × {size // unit} {name}"
    return f"{instances} × {size} B"


@contextmanager
def memory_source(key: str, instances: int, size: int) -> Iterator[Source]:
    """The SCP from memory, in a process of its own."""
    port = free_port()
    command = [sys.executable, str(_HERE / "memory_scp.py"), "--port", str(port)]
    command += ["--instances", str(instances), "--size", str(size)]
    # A session of its own: interrupted from the terminal, it must outlive the clients that use it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise RuntimeError("the SCP from memory does not start")
        title = f"memory, {in_words(instances, size)}"
        yield Source(key, title, "MEMORY", port, STUDY, instances, size)
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


def accession_number(number: int) -> str:
    """The accession number of a study of a cohort."""
    return f"ACC{number:06}"


@contextmanager
def cohort_source(folder: Path, studies: int) -> Iterator[str]:
    """The embedded PACS with so many studies of one small instance each, in a process of its own; its address."""
    folder.mkdir()
    big_study(folder, 1, 2, name="cohort")
    (first,) = folder.iterdir()
    part10 = first.read_bytes()
    first.unlink()
    for number in range(studies):
        uid = make_uid(f"cohort {number}")
        values = {
            STUDY_UID: uid,
            SERIES_UID: f"{uid}.1",
            SOP_INSTANCE: f"{uid}.1.1",
            ACCESSION: accession_number(number),
        }
        (folder / f"{number:06}.dcm").write_bytes(set_elements(part10, values))
    port = free_port()
    command = [sys.executable, "-m", "airflow_dicom_get.cli", "pacs", "--dir", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        if "serving" not in process.stdout.readline():
            raise RuntimeError("the embedded PACS does not start")
        yield f"PACS@{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def pacs_sources(folder: Path, names: list[str], instances: int, size: int) -> Iterator[list[Source]]:
    """Orthanc and dcmqrscp, each with the same generated CT study; no ``TCP_NODELAY`` in their environment."""
    study = big_study(folder / "study", instances, size, name="benchmark", series=4)
    files = sorted((folder / "study").iterdir())
    with ExitStack() as stack:
        sources = []
        for name in names:
            server: Orthanc | Dcmqrscp
            if name == "orthanc":
                server = stack.enter_context(Orthanc(folder / name, MaximumPduLength=16384))
                server.load(files)
            else:
                server = Dcmqrscp(folder / name, max_pdu=16384)
                server.register(files)
                stack.enter_context(server)
            title = f"{'Orthanc' if name == 'orthanc' else name}, {in_words(instances, size)}"
            sources.append(Source(name, title, server.ae_title, server.port, study, instances, size))
        for path in files:
            path.unlink()
        yield sources
