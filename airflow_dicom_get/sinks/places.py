"""Where a retrieval puts things: the place of its instances, and the root of its manifests and ledgers.

:func:`open_destination` makes both for every kind of destination. ``GetScu`` knows no more of a
destination than these two protocols.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from airflow_dicom_get.config.checks import shown_path
from airflow_dicom_get.config.destination import FilesystemDestination, ForwardDestination, S3Destination
from airflow_dicom_get.config.groups import ForwardTarget
from airflow_dicom_get.config.options import GetOptions, RootOptions
from airflow_dicom_get.errors import InvalidOption
from airflow_dicom_get.manifest.files import MANIFESTS
from airflow_dicom_get.manifest.scopes import NO_SCOPES, Scopes, metadata_for
from airflow_dicom_get.sinks.ledger import OWN, FolderLedgers, Ledgers
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below, Folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from airflow_dicom_get.net.association import CancelToken
    from airflow_dicom_get.records import Written
    from airflow_dicom_get.sinks.base import Sink

log = logging.getLogger(__name__)


class Root(Protocol):
    """Where manifests and ledgers lie."""

    def attend(self, cancel: CancelToken) -> None:
        """Write no record and no manifest once the run was left to itself."""

    def prepare(self) -> None:
        """Find out before any traffic to the source whether it can be used. Raises :class:`SinkError`."""

    def ledgers(self, destination: str) -> Ledgers:
        """The ledgers of all runs for a destination, given by what its :class:`Place` is recorded as."""

    def write_manifest(
        self, rows: Any, name: str, *, verdict: str, evidence: str, run: str, scopes: Scopes = NO_SCOPES
    ) -> tuple[str, Written]:
        """Write ``<root>/<name>.parquet`` whole or not at all; its URI, and what it is. Raises :class:`SinkError`."""


class Place(Protocol):
    """Where instances go."""

    uri: str
    """As the column ``destination`` of the manifest has it."""

    @property
    def recorded_as(self) -> str:
        """As ledgers have it: no other place is called so."""

    def attend(self, cancel: CancelToken) -> None:
        """Let the end of the run end the waits for the destination too."""

    def expect(self, sop_classes: Iterable[str]) -> None:
        """SOP classes that are to come."""

    def prepare(self) -> None:
        """Find out before any traffic to the source what would make every instance fail. Raises :class:`SinkError`."""

    def check_room(self) -> None:
        """Refuse to begin a study without room for it. Raises :class:`DestinationFull`."""

    def sink(self, ledgers: Ledgers, run: str, *, read_only: bool = False) -> Sink:
        """The sink of one run; a ``read_only`` one only takes inventory and leaves no trace."""


@dataclass(frozen=True, slots=True)
class OpenDestination:
    """Both places of a retrieval."""

    place: Place
    root: Root

    def attend(self, cancel: CancelToken) -> None:
        """Let the end of the run end the waits for both."""
        self.place.attend(cancel)
        self.root.attend(cancel)

    def prepare(self) -> None:
        """Find out before any traffic to the source what would make all of it vain. Raises :class:`SinkError`."""
        self.root.prepare()
        self.place.prepare()

    def sink(self, run: str, *, read_only: bool = False) -> Sink:
        """The sink of one run, with its ledgers under the root."""
        return self.place.sink(self.root.ledgers(self.place.recorded_as), run, read_only=read_only)


def open_destination(options: GetOptions) -> OpenDestination:
    """The places that the options name, as far as they can be looked at without writing.

    Raises
    ------
    InvalidOption
        There is none, or one cannot be what it is named as.
    """
    destination = options.destination
    if isinstance(destination, FilesystemDestination):
        folder = FolderPlace(destination.path, options)
        return OpenDestination(folder, named_root(options) or FolderRoot(Below(folder.path) / MANIFESTS))
    if isinstance(destination, S3Destination):
        from airflow_dicom_get.sinks.s3_places import BucketPlace, BucketRoot, root_of

        bucket = BucketPlace(destination, options)
        return OpenDestination(bucket, named_root(options) or BucketRoot(bucket.bucket, root_of(destination.prefix)))
    if isinstance(destination, ForwardDestination):
        return OpenDestination(ForwardPlace(destination, options), root_for(options))
    raise InvalidOption(
        "destination is missing.",
        hint="Give destination: a folder, s3://bucket/prefix or dicom://[AE@]host:port.",
        option="destination",
    )


def root_for(options: RootOptions) -> Root:
    """Where manifests and ledgers lie for a node to store at."""
    named = named_root(options)
    if named is not None:
        return named
    state = state_folder()
    try:
        files.make_private(state)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ELOOP):  # of all else it says what is wrong who writes there
            raise InvalidOption(
                f"The folder {shown_path(state)} cannot hold the state: {error.strerror}.",
                hint="Set XDG_STATE_HOME to a folder in which nobody else may write, or give manifest_root.",
                option="manifest_root",
            ) from None
    return FolderRoot(state)


def named_root(options: RootOptions) -> Root | None:
    """The root that ``manifest_root`` names."""
    root = options.manifest_root
    if isinstance(root, S3Destination):
        from airflow_dicom_get.sinks.s3_places import BucketRoot
        from airflow_dicom_get.storage.bucket import Bucket

        return BucketRoot(Bucket(root.bucket, options.s3_config), root.prefix)
    return FolderRoot(Below(root.path.absolute())) if isinstance(root, FilesystemDestination) else None


# --- folders ---------------------------------------------------------------------------------------


class FolderPlace:
    """A folder: see :class:`Place`."""

    def __init__(self, path: Path, options: GetOptions) -> None:
        try:
            at = files.nearest(path.absolute())
            is_folder = files.is_folder(at)
        except OSError as error:
            raise _unseen("destination", path, error) from error
        if not is_folder:
            raise InvalidOption(
                f"destination: {at} is a file.",
                hint="Give a folder, or a path where one can be created.",
                option="destination",
            )
        if not files.disk.is_writable(at):
            raise InvalidOption(
                f"destination: {at} is not writable.",
                hint="Change its permissions, or give another folder.",
                option="destination",
            )
        self.path = path.absolute()
        self.uri = FilesystemDestination(self.path).uri
        self._options = options
        self._cancel: CancelToken | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def recorded_as(self) -> str:
        """See :class:`Place`."""
        return self.uri

    def attend(self, cancel: CancelToken) -> None:
        """See :meth:`Place.attend`."""
        self._cancel = cancel

    def expect(self, sop_classes: Iterable[str]) -> None:
        """See :meth:`Place.expect`: a folder takes any."""

    def prepare(self) -> None:
        """See :meth:`Place.prepare`: the options were checked against the folder already."""

    def check_room(self) -> None:
        """See :meth:`Place.check_room`."""
        from airflow_dicom_get.sinks.filesystem import Room

        Room(self.path).check_start()

    def sink(self, ledgers: Ledgers, run: str, *, read_only: bool = False) -> Sink:
        """See :meth:`Place.sink`."""
        from airflow_dicom_get.sinks.filesystem import FilesystemSink

        return FilesystemSink(self.path, ledgers, run, self._options, read_only=read_only, cancel=self._cancel)


class FolderRoot:
    """Manifests and ledgers in a folder: see :class:`Root`."""

    def __init__(self, path: Below) -> None:
        try:
            is_file = files.exists(path) and not files.is_folder(path)
        except OSError as error:
            raise _unseen("manifest_root", path, error) from error
        if is_file:
            raise InvalidOption(
                f"manifest_root: {path} is a file, or a link, which is not followed.",
                hint="Give a folder.",
                option="manifest_root",
            )
        self.path = path
        self._cancel: CancelToken | None = None

    def attend(self, cancel: CancelToken) -> None:
        """See :meth:`Root.attend`."""
        self._cancel = cancel

    def prepare(self) -> None:
        """See :meth:`Root.prepare`: the options were checked against the folder already."""

    def ledgers(self, destination: str) -> Ledgers:
        """See :meth:`Root.ledgers`."""
        own = FilesystemDestination(Path(self.path)).uri == f"{destination}/{MANIFESTS}"
        return FolderLedgers(self.path, OWN if own else destination, self._left)

    def write_manifest(
        self, rows: Any, name: str, *, verdict: str, evidence: str, run: str, scopes: Scopes = NO_SCOPES
    ) -> tuple[str, Written]:
        """See :meth:`Root.write_manifest`."""
        from airflow_dicom_get.manifest.files import manifest_uri, write_manifest
        from airflow_dicom_get.sinks.filesystem import sink_error

        path = self.path / f"{name}.parquet"
        try:
            written = write_manifest(
                rows,
                path,
                verdict=verdict,
                evidence=evidence,
                run=run,
                extra=metadata_for(scopes),
                go_on=lambda: not self._left(),
            )
        except OSError as error:
            raise sink_error(error, f"The manifest {path} cannot be written") from error
        return manifest_uri(path), written

    def _left(self) -> bool:
        return self._cancel is not None and self._cancel.left


def state_folder() -> Below:
    """Where the shell keeps manifests and ledgers of destinations that hold none themselves: its user's alone."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return Below(base, ("dicom-get",), private=1)


# --- another node ----------------------------------------------------------------------------------


class ForwardPlace:
    """Another node, where instances go as they arrive: see :class:`Place`."""

    def __init__(self, destination: ForwardDestination, options: GetOptions) -> None:
        from airflow_dicom_get.net.association import CancelToken
        from airflow_dicom_get.net.peer import Peer

        assert destination.node is not None
        target = options.forward_target or ForwardTarget()
        self.target = Peer.of_target(destination.node, target, options)
        self.uri = f"dicom://{self.target}"
        self._options = options
        self._cancel = CancelToken()
        self._classes: dict[str, None] = {}

    def __str__(self) -> str:
        return self.uri

    @property
    def recorded_as(self) -> str:
        """See :class:`Place`."""
        return self.uri

    def attend(self, cancel: CancelToken) -> None:
        """See :meth:`Place.attend`."""
        self._cancel = cancel

    def expect(self, sop_classes: Iterable[str]) -> None:
        """See :meth:`Place.expect`: they are proposed together with the first that comes."""
        self._classes.update(dict.fromkeys(sop_classes))

    def prepare(self) -> None:
        """See :meth:`Place.prepare`: the node is called when the first instance is there, and its context known."""
        if self._options.tls is not None and self.target.tls is None:
            log.warning(
                "%s is called without TLS, though the source is called with it: what comes encrypted goes on in clear. "
                "Give forward_target.tls, or use_tls in its connection.",
                self.uri,
            )

    def check_room(self) -> None:
        """See :meth:`Place.check_room`: another node does not tell."""

    def sink(self, ledgers: Ledgers, run: str, *, read_only: bool = False) -> Sink:
        """See :meth:`Place.sink`."""
        from airflow_dicom_get.sinks.forward import ForwardSink

        return ForwardSink(self.target, ledgers, run, self._options, cancel=self._cancel, classes=self._classes)


def _unseen(option: str, path: Folder, error: OSError) -> InvalidOption:
    return InvalidOption(
        f"{option}: {path} cannot be looked at: {error.strerror or error}.",
        hint="Check permissions and mount.",
        option=option,
    )
