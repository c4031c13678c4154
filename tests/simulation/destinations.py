"""The destinations of a history: a folder on the model disk, or a bucket of the model S3, asked and harmed alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from airflow_dicom_get.config import options
from airflow_dicom_get.storage import bucket, files
from airflow_dicom_get.testing.misbehaving.archive import STUDY_UID
from tests.simulation.bucket import ENDPOINT, Service
from tests.simulation.disk import Volume
from tests.simulation.faults import Chance, Process
from tests.simulation.node import ModelNode

ROOT = "/data"
"""Where instances lie: paths of a bucket begin with it too."""


def path_of(row: Mapping[str, Any]) -> str:
    """Where the instance of a row lies under its final name."""
    study = row["study_instance_uid"] or STUDY_UID
    return f"{ROOT}/{study}/{row['series_instance_uid']}/{row['sop_instance_uid']}.dcm"


class Destination(Protocol):
    """See the module."""

    @property
    def address(self) -> str:
        """What the verbs are given."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the verbs, besides the address."""

    @property
    def node(self) -> ModelNode | None:
        """The node that it is."""

    @property
    def cuts(self) -> int:
        """How often what was not synced was lost."""

    def seams(self, process: Process) -> list[tuple[Any, str, object]]:
        """Module, name and model of what a process of ours reaches it by."""

    def files(self) -> dict[str, bytes]:
        """What there is, by path."""

    def durable(self) -> dict[str, bytes]:
        """What outlasts a power cut now."""

    def left_open(self) -> list[str]:
        """What is open or locked after a run."""

    def heal(self) -> None:
        """Faults are over."""

    def harm(self, what: str, path: str | None, content: bytes = b"") -> None:
        """What others do; see :data:`~tests.simulation.history.BETWEEN`. Without a path it is nobody's file."""


class FolderDestination:
    """A folder; see :class:`Destination`."""

    address = ROOT
    options: Mapping[str, Any] = {}
    node = None

    def __init__(self, chance: Chance, traits: Mapping[str, Any]) -> None:
        self.volume = Volume(chance)
        for name, value in traits.items():
            setattr(self.volume, name, value)
        self.volume.make(ROOT)

    @property
    def cuts(self) -> int:
        """See :class:`Destination`."""
        return self.volume.cuts

    def seams(self, process: Process) -> list[tuple[Any, str, object]]:
        """See :class:`Destination`."""
        return [
            (files, "disk", self.volume.disk(process)),
            # Options are checked against the real disk, where an ordinary user may not write everywhere.
            (options, "check_folder", lambda path, option: None),
        ]

    def files(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return self.volume.files()

    def durable(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return self.volume.durable()

    def left_open(self) -> list[str]:
        """See :class:`Destination`."""
        return self.volume.left_open()

    def heal(self) -> None:
        """See :class:`Destination`: there is room again."""
        self.volume.capacity = None

    def harm(self, what: str, path: str | None, content: bytes = b"") -> None:
        """See :class:`Destination`."""
        match what:
            case "power":
                self.volume.cut()
            case "evict":
                self.volume.evict()
            case "overwrite" | "tear" if path is not None:
                self.volume.overwrite(path, content)
            case "delete" if path is not None:
                self.volume.remove(path)
            case "read-only" if path is not None:
                self.volume.set_mode(path, 0o444)


class BucketDestination:
    """A prefix of a bucket; see :class:`Destination`. What it has answered for is durable."""

    address = f"s3://dicom{ROOT}"
    options: Mapping[str, Any] = {"s3_config": {"access_key": "K", "secret_key": "S", "endpoint": ENDPOINT}}
    cuts = 0
    node = None

    def __init__(self, chance: Chance, traits: Mapping[str, Any]) -> None:
        self.service = Service("dicom")
        self.service.latency = 0.01
        for name, value in traits.items():
            setattr(self.service, name, value)
        self.machine = Volume(chance)
        """The disk of the machine that runs us."""

    def seams(self, process: Process) -> list[tuple[Any, str, object]]:
        """See :class:`Destination`."""
        return [
            (files, "disk", self.machine.disk(process)),
            (bucket, "make_client", self.service.make_client(process)),
        ]

    def files(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return {f"/{key}": body for key, body in self.service.files().items()}

    def durable(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return self.files()

    def left_open(self) -> list[str]:
        """See :class:`Destination`."""
        return self.service.left_open() + self.machine.left_open()

    def heal(self) -> None:
        """See :class:`Destination`: it has no faults of its own."""

    def harm(self, what: str, path: str | None, content: bytes = b"") -> None:
        """See :class:`Destination`: its machines never lose power."""
        if path is None:
            return
        key = path.removeprefix("/")
        match what:
            case "overwrite" | "tear":
                self.service.overwrite(key, content)
            case "delete":
                self.service.remove(key)


class NodeDestination:
    """Another node; see :class:`Destination`. What it has answered for is durable."""

    address = "dicom://STORE@node.example:11112"
    options: Mapping[str, Any] = {"manifest_root": "/state"}

    def __init__(self, chance: Chance, traits: Mapping[str, Any]) -> None:
        self.node = ModelNode()
        for name, value in traits.items():
            setattr(self.node, name, value)
        self.machine = Volume(chance)
        """The disk of the machine that runs us, with the ledgers."""

    @property
    def cuts(self) -> int:
        """See :class:`Destination`: of the machine with the ledgers."""
        return self.machine.cuts

    def seams(self, process: Process) -> list[tuple[Any, str, object]]:
        """See :class:`Destination`."""
        return [
            (files, "disk", self.machine.disk(process)),
            (options, "check_folder", lambda path, option: None),
        ]

    def files(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return {f"{ROOT}/{x.study}/{x.series}/{sop}.dcm": x.data for sop, x in self.node.held.items()}

    def durable(self) -> dict[str, bytes]:
        """See :class:`Destination`."""
        return self.files()

    def left_open(self) -> list[str]:
        """See :class:`Destination`."""
        return self.machine.left_open()

    def heal(self) -> None:
        """See :class:`Destination`: it has no faults of its own."""

    def harm(self, what: str, path: str | None, content: bytes = b"") -> None:
        """See :class:`Destination`: nobody tears what lies there, or makes it read-only."""
        sop = path.rpartition("/")[2].removesuffix(".dcm") if path is not None else ""
        match what:
            case "power":
                self.machine.cut()
            case "evict":
                self.machine.evict()
            case "overwrite" if sop:
                self.node.held[sop] = self.node.held[sop]._replace(data=content)
            case "delete" if sop:
                del self.node.held[sop]


DESTINATIONS: Mapping[str, Callable[[Chance, Mapping[str, Any]], Destination]] = {
    "folder": FolderDestination,
    "bucket": BucketDestination,
    "node": NodeDestination,
}
