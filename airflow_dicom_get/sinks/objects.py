"""Objects that lie in folders, in a bucket, or where a manifest says, read piece by piece in one pass."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from airflow_dicom_get.config.checks import invalid, shown_path
from airflow_dicom_get.config.destination import (
    Destination,
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.config.groups import S3Config
from airflow_dicom_get.dicom import header as h
from airflow_dicom_get.dicom.identifier import int_value, patient_keys, text_value
from airflow_dicom_get.dicom.part10 import META_LIMIT, PREAMBLE, FileMeta, ends_in_meta, read_file_meta
from airflow_dicom_get.dicom.uids import is_uid, uid_value
from airflow_dicom_get.errors import Cancelled, DicomGetError, InvalidOption, printable
from airflow_dicom_get.manifest.files import MANIFESTS, S3, Room, place_above
from airflow_dicom_get.records import Instance, Stored
from airflow_dicom_get.storage import files
from airflow_dicom_get.storage.files import Below, Folder
from airflow_dicom_get.vocabulary import READABLE, UNVERIFIED, Evidence, Verdict

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_dicom_get.manifest.scopes import Scopes
    from airflow_dicom_get.storage.bucket import Bucket, Ending

T = TypeVar("T")

log = logging.getLogger(__name__)

Named = str | os.PathLike[str]
Places = tuple[FilesystemDestination | S3Destination, ...]
"""A folder, or an address ``s3://bucket/prefix``."""
_WANTED = h.MANDATORY | {
    h.SPECIFIC_CHARACTER_SET,
    h.PATIENT_ID,
    h.SOP_CLASS_UID,
    h.MODALITY,
    h.SERIES_NUMBER,
    h.INSTANCE_NUMBER,
}
_OURS = frozenset({MANIFESTS, ".ledger"})


class UnusableError(Exception):
    """An object is not a DICOM instance that could be stored; the text says why."""


class UnreadableError(Exception):
    """An object cannot be read; the text says why."""


class MissingError(UnreadableError):
    """There is no such object."""


class RefusedError(UnreadableError):
    """A manifest names it, and may not: it was not opened."""


@dataclass(slots=True)
class StoredObject:
    """An object, and what a manifest says of it."""

    name: str
    """Where it lies, for people and for the manifest."""
    path: Folder | None = None
    bucket: Any = None
    key: str = ""
    row: Instance | None = None
    refused: str | None = None
    """Why it is not opened."""

    def size(self) -> int:
        """Its size. Raises :class:`MissingError`, :class:`UnreadableError`, :class:`Cancelled`."""
        return self.status()[0]

    def status(self) -> tuple[int, str]:
        """Its size, and the service's mark of its content, empty for a file. Raises as :meth:`size`."""
        self._check()
        try:
            if self.path is not None:
                return files.disk.status(self.path).st_size, ""
            told = self.bucket.call("head_object", self.key)
            return int(told["ContentLength"]), str(told.get("ETag") or "")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingError("it does not exist") from error
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
        except DicomGetError as error:
            self._check_ended(error)
            kind = MissingError if error.facts.get("status") == 404 else UnreadableError
            raise kind(error.message) from error

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes; each view is void when the next one is asked for. Raises as :meth:`size`."""
        self._check()
        try:
            if self.path is None:
                for chunk in self.bucket.read(self.key):
                    yield memoryview(chunk)
                return
            yield from files.read_chunks(self.path)
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
        except DicomGetError as error:
            self._check_ended(error)
            raise UnreadableError(error.message) from error

    def _check_ended(self, error: DicomGetError) -> None:
        """Raise where a run that is to end may have broken the request off itself: that says nothing of the object."""
        if error.transient and self.bucket.is_ending():
            raise Cancelled("Cancelled while an object was read.") from error

    def _check(self) -> None:
        if self.refused is not None:
            raise RefusedError(self.refused)


@dataclass(slots=True)
class Opened:
    """An object whose header is read."""

    instance: Instance
    dataset_offset: int
    meta: FileMeta | None
    """File meta information; None for a bare data set."""
    patient: Mapping[int, bytes]
    """The key of its patient, as :func:`patient_keys` makes it."""
    head: list[bytes] = field(default_factory=list)
    """What was read so far, from the first byte on."""
    rest: Iterator[memoryview] = field(default_factory=lambda: iter(()))

    def chunks(self) -> Iterator[memoryview]:
        """The whole object, once."""
        for piece in self.head:
            yield memoryview(piece)
        self.head.clear()
        yield from self.rest


def open_object(item: StoredObject) -> Opened:
    """Read the header of an object: which instance it is, and where its data set begins.

    A bare data set is told by its manifest row alone.

    Raises
    ------
    UnusableError, UnreadableError, Cancelled
    """
    rest = item.chunks()
    head = [bytes(chunk) for chunk in _at_least(rest, META_LIMIT)]
    start = b"".join(head)
    meta = read_file_meta(start[:META_LIMIT])
    row = item.row
    if meta is not None:
        offset, syntax, sop_class = meta.dataset_offset, meta.syntax, meta.sop_class
    elif row is not None and row.dataset_offset == 0 and row.syntax and row.sop_class:
        offset, syntax, sop_class = 0, row.syntax, row.sop_class
    else:
        raise UnusableError("is not a DICOM file with file meta information")
    scan = h.HeaderScan(syntax, frozenset(_WANTED), max(_WANTED))
    try:
        piece: bytes | memoryview = start[offset:]
        while not scan.done:
            nxt = next(rest, None)
            scan.feed(piece, last=nxt is None)
            if nxt is not None:
                piece = bytes(nxt)
                head.append(piece)
    except h.HeaderError as error:
        raise UnusableError(f"is not an instance that can be stored: {error}") from None
    values = scan.values
    study, series, sop = (
        uid_value(values[tag]) for tag in (h.STUDY_INSTANCE_UID, h.SERIES_INSTANCE_UID, h.SOP_INSTANCE_UID)
    )
    # Where file meta information and data set disagree, it is the data set that is stored.
    sop_class = uid_value(values.get(h.SOP_CLASS_UID, b"")) or sop_class
    if study is None or series is None or sop is None or not is_uid(sop_class) or not is_uid(syntax):
        raise UnusableError("contains an invalid UID")
    instance = Instance(study, series, sop, sop_class)
    instance.syntax = syntax
    instance.modality = text_value(values.get(h.MODALITY))
    instance.series_number = int_value(values.get(h.SERIES_NUMBER))
    instance.instance_number = int_value(values.get(h.INSTANCE_NUMBER))
    patient_id = values.get(h.PATIENT_ID, b"").strip(b"\0 ")
    patient = patient_keys(patient_id, values.get(h.SPECIFIC_CHARACTER_SET, b""))
    return Opened(instance, offset, meta, patient, head, rest)


def is_instance(item: StoredObject, study: str, series: str, sop: str) -> bool:
    """Whether the header of an object names this instance; one that cannot be read, or not as DICOM, does not."""
    try:
        found = open_object(item).instance
    except (UnusableError, UnreadableError) as error:
        log.info("the object of instance %s is not adopted: %s", printable(sop), error)
        return False
    return (found.study, found.series, found.sop) == (study, series, sop)


def whole_instance(path: Folder, study: str, series: str, sop: str, go_on: files.GoOn = lambda: None) -> Stored | None:
    """A file that no ledger knows, if it is a whole Part 10 file of just this instance, and can be read.

    ``go_on`` is called on the way, and raises what ends it.
    """
    try:
        return _whole_instance(StoredObject(str(path), path), path, study, series, sop, go_on)
    except (UnusableError, UnreadableError) as error:
        log.info("the file of instance %s is not adopted: %s", printable(sop), error)
        return None


def _whole_instance(
    item: StoredObject, path: Folder, study: str, series: str, sop: str, go_on: files.GoOn
) -> Stored | None:
    opened = open_object(item)
    found, meta = opened.instance, opened.meta
    assert meta is not None  # without a row of a manifest nothing else opens
    if (found.study, found.series, found.sop, meta.sop_instance) != (study, series, sop, sop):
        return None
    if not _walked(path, meta, go_on=go_on).whole:  # a copy that was cut off
        return None
    digest, size = hashlib.sha256(), 0
    for view in opened.chunks():
        go_on()
        digest.update(view)
        size += len(view)
    return Stored(
        series,
        sop,
        found.sop_class,
        found.syntax,
        digest.digest(),
        size,
        opened.dataset_offset,
        found.modality,
        found.series_number,
        found.instance_number,
        where=str(path),
    )


def _walked(path: Folder, meta: FileMeta, walk: h.Walk | None = None, go_on: files.GoOn = lambda: None) -> h.Walk:
    """The file is read, not mapped: whoever cuts a mapped file off ends the process that looks at it."""
    walk, ahead = walk or h.walk_of(meta.syntax), meta.dataset_offset
    for view in files.read_chunks(path, go_on):
        walk.feed(view[ahead:])
        ahead = max(ahead - len(view), 0)
    return walk


def describes(meta: FileMeta | None, instance: Instance) -> bool:
    """Whether meta information is that of an instance as it came; a bare data set has none, which says nothing."""
    return meta is None or meta.is_of(instance.sop_class, instance.sop, instance.syntax)


def other_syntax(meta: FileMeta | None, instance: Instance) -> str | None:
    """The transfer syntax of a file, where it is of this instance and in another one than that in which it came."""
    if meta is None or meta.syntax == instance.syntax:
        return None
    return meta.syntax if meta.is_of(instance.sop_class, instance.sop, meta.syntax) else None


def looks_whole(path: Folder, head: bytes, size: int, go_on: files.GoOn = lambda: None) -> bool:
    """Whether a file of ``size`` bytes, which begins with ``head``, is whole as far as it tells by itself.

    Bytes that somebody has put behind its data set do not count against it.

    One that is no Part 10 file may be a bare data set or anything else, and is; but for one that is cut off before its
    data set, and one that begins with zeros, as crashes leave them.
    """
    meta = read_file_meta(head)
    if meta is None:
        return any(head[:PREAMBLE]) and not ends_in_meta(head, size)
    if size <= meta.dataset_offset:
        return False
    if not _walked(path, meta, go_on=go_on).torn:
        return True
    # Where it is whole so, its meta information is wrong, not the data set.
    return _walked(path, meta, h.walk_of_other_layouts(), go_on).whole


def _at_least(chunks: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    for chunk in chunks:
        yield chunk
        size -= len(chunk)
        if size <= 0:
            return


# --- what there is ---------------------------------------------------------------------------------


def objects_in(
    sources: Sequence[Named],
    s3: S3Config | None = None,
    root: Named | Sequence[Named] | None = None,
    ending: Ending | None = None,
) -> list[StoredObject]:
    """The files below some paths, and the objects below some prefixes. Hidden ones and our own are left out.

    A folder that cannot be read, and a link that leads out of the sources and of ``root``, is an object that is
    refused.

    Parameters
    ----------
    ending : Ending, optional
        Ends the listing, and the requests to buckets, also those that are made when an object is read.

    Raises
    ------
    InvalidOption
        A path does not exist, or a source is neither a path nor a prefix.
    S3Error
        A prefix cannot be listed.
    """
    found: list[StoredObject] = []
    places = [parse_destination(os.fspath(source), "source") for source in sources]
    tops = _real_folders([*places, *_named(root)])
    for source, place in zip(sources, places, strict=True):
        if isinstance(place, FilesystemDestination):
            if not files.exists(place.path):
                raise invalid("source", f"{shown_path(source)} does not exist", "Check the path.")
            if files.is_folder(place.path):
                found += objects_below(Below(place.path), tops, ending)
            else:
                found.append(StoredObject(str(place.path), place.path))
        elif isinstance(place, S3Destination):
            bucket = _bucket(place.bucket, s3, ending)
            prefix = f"{place.prefix}/" if place.prefix else ""
            found += [
                StoredObject(bucket.uri(item.key), bucket=bucket, key=item.key)
                for item in _until(ending, bucket.list(prefix))
                if not _OURS.intersection(item.key[len(prefix) :].split("/"))
                and not item.key.rpartition("/")[2].startswith(".")
                and not (item.key.endswith("/") and not item.size)  # what consoles make for a folder
            ]
        else:
            raise invalid(
                "source", f"{shown_path(source)} is not a path or an s3:// address", "Give paths or s3://bucket/prefix."
            )
    return found


def _bucket(name: str, s3: S3Config | None, ending: Ending | None) -> Bucket:
    """A bucket, whose requests end with the call."""
    from airflow_dicom_get.storage.bucket import Bucket

    bucket = Bucket(name, s3)
    if ending is not None:
        bucket.attend(ending)
    return bucket


def _until(ending: Ending | None, items: Iterable[T]) -> Iterator[T]:
    """These items. Raises :class:`Cancelled` before the next one where the call is to end."""
    for item in items:
        if ending is not None and ending.ending():
            raise Cancelled("Cancelled while the objects were listed.")
        yield item


def objects_below(folder: Below, tops: Sequence[Path] = (), ending: Ending | None = None) -> list[StoredObject]:
    """The files below a folder, also by links that lead to one below ``tops``, which are real paths.

    What cannot be read, or may not, is an object that is refused.
    """
    left: list[StoredObject] = []

    def leave(at: Below, error: OSError) -> None:
        inside = _within(at, tops) if error.errno == errno.ELOOP else None
        if inside is None:
            left.append(StoredObject(str(at), at, refused=error.strerror or str(error)))
        elif not files.is_folder(inside):  # which is looked through itself
            left.append(StoredObject(str(at), inside))

    found = files.files_below(folder, lambda name: name not in _OURS and not name.startswith("."), leave)
    return [*(StoredObject(str(file), file) for file in _until(ending, found)), *left]


def _within(path: Folder, folders: Iterable[Path]) -> Below | None:
    """Where a path leads, if that is below one of some folders, all given by their real paths."""
    try:
        real = files.disk.real_path(path)
    except OSError:  # it leads nowhere
        return None
    return next((Below(top, real.relative_to(top).parts) for top in folders if real.is_relative_to(top)), None)


def _real_folders(places: Iterable[Destination]) -> list[Path]:
    """Where these folders lead; one that leads nowhere holds nothing."""
    found = []
    for place in places:
        if isinstance(place, FilesystemDestination):
            with suppress(OSError):
                found.append(files.disk.real_path(place.path))
    return found


# --- what a manifest names -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listed:
    """A manifest that was loaded, or several as one, and the places below which objects that it names may be opened.

    A manifest is data: it does not say itself what is opened, and of several none what another one names.
    """

    table: pa.Table
    parts: tuple[tuple[int, Places], ...]
    """How many of the rows, one after another, are of one manifest and destination, and the places of each."""
    verdict: Verdict = UNVERIFIED
    """What it says of itself."""
    evidence: Evidence = "none"
    scopes: Scopes = field(default_factory=dict)
    """What of its studies it is of."""

    @property
    def places(self) -> Places:
        """The places of all parts."""
        return tuple(dict.fromkeys(chain.from_iterable(self._distinct())))

    def within(self, change: Callable[[Places], Iterable[FilesystemDestination | S3Destination]]) -> Listed:
        """The same with other places: what ``change`` makes of those of each part."""
        changed = {places: tuple(change(places)) for places in self._distinct()}
        return replace(self, parts=tuple((size, changed[places]) for size, places in self.parts))

    def rows(self, s3: S3Config | None = None, ending: Ending | None = None) -> Iterator[tuple[Instance, Opener]]:
        """Each row with what opens its object; ``s3`` and ``ending`` as in :class:`Opener`."""
        from airflow_dicom_get.manifest.schema import instances_of

        openers = {places: Opener(places, s3, ending) for places in self._distinct()}
        of_each = chain.from_iterable(repeat(openers[places], size) for size, places in self.parts)
        return zip(instances_of(self.table), of_each, strict=True)

    def _distinct(self) -> Iterable[Places]:
        return dict.fromkeys(places for _, places in self.parts)


def load_listed(
    manifest: Any, s3: S3 = None, root: Named | Sequence[Named] | None = None, room: Room | None = None
) -> Listed:
    """Load a manifest; what it names may lie in its own destination, or below a root that the caller names.

    Its own destination is the place in which its ``_manifests`` lies, or, for each row of a frame or a reference that
    was handed on, that of its column ``destination``.

    Parameters
    ----------
    manifest : pyarrow.Table, DataFrame, reference, URI, or Listed
        Any shape that :func:`~airflow_dicom_get.manifest.frames.load_manifest` takes.
    root : path or address, or several
        Further places.
    room : Room, optional
        Of all manifests that the call reads.

    Raises
    ------
    ManifestError
        It cannot be read.
    InvalidOption
        A root is no folder and no prefix of a bucket.
    """
    from airflow_dicom_get.manifest.frames import facts_of, load_table
    from airflow_dicom_get.manifest.scopes import scopes_of

    named = _named(root)
    if isinstance(manifest, Listed):
        return manifest.within(lambda places: (*places, *named))
    table = load_table(manifest, s3, room)
    if isinstance(manifest, str | os.PathLike):
        own = place_above(manifest)
        parts: Iterable[tuple[int, Places]] = [(table.num_rows, () if own is None else (own,))]
    else:
        parts = _by_destination(table)
    [facts] = facts_of([table])
    return Listed(table, tuple(parts), *facts, scopes_of([table])).within(lambda places: (*places, *named))


def _named(root: Named | Sequence[Named] | None) -> list[FilesystemDestination | S3Destination]:
    """The places that are given as ``root``. Raises :class:`InvalidOption`."""
    named = []
    for one in [] if root is None else [root] if isinstance(root, str | os.PathLike) else root:
        place = parse_destination(os.fspath(one), "root")
        if isinstance(place, ForwardDestination):
            raise invalid("root", f"{shown_path(one)} is a DICOM node", "Give a folder, or s3://bucket/prefix.")
        named.append(place)
    return named


def _by_destination(table: pa.Table) -> Iterator[tuple[int, Places]]:
    """How many rows, one after another, have one ``destination``, and it; a relative path is none, and a node neither.

    Each is held to its own: of several manifests that became one, one could name what another may.
    """
    known: dict[Any, Places] = {}
    for text, rows in groupby(chain.from_iterable(chunk.to_pylist() for chunk in table["destination"].chunks)):
        if text not in known:
            known[text] = tuple(_place_of_objects(text))
        yield len(list(rows)), known[text]


def _place_of_objects(text: Any) -> Iterator[FilesystemDestination | S3Destination]:
    try:
        place = parse_destination(text, "destination")
    except InvalidOption:
        return
    if isinstance(place, S3Destination) or (isinstance(place, FilesystemDestination) and place.path.is_absolute()):
        yield place


class Opener:
    """Opens what rows of a manifest name, and nothing outside its places.

    Parameters
    ----------
    s3 : S3Config, optional
        How buckets are reached; never as a row says.
    ending : Ending, optional
        Ends the requests to them.
    """

    def __init__(
        self,
        places: Places,
        s3: S3Config | None = None,
        ending: Ending | None = None,
    ) -> None:
        self._folders = _real_folders(places)
        self._prefixes = [
            (x.bucket, f"{x.prefix}/" if x.prefix else "") for x in places if isinstance(x, S3Destination)
        ]
        self._s3, self._ending = s3, ending
        self._buckets: dict[str, Any] = {}

    def object_of(self, row: Instance) -> StoredObject:
        """The object of a row; where it may not be opened, one that says so."""
        uri = row.uri or ""
        if not all(map(is_uid, (row.study, row.series, row.sop))):
            return StoredObject(shown_path(uri), row=row, refused="its row has a malformed UID")
        try:
            place = parse_destination(uri, "uri")
        except InvalidOption as error:
            return StoredObject(shown_path(uri), row=row, refused=error.message)
        if isinstance(place, FilesystemDestination):
            inside = self._below(place)
            if inside is not None:
                return StoredObject(str(place.path), inside, row=row)
        elif self._is_in_bucket(place):
            return StoredObject(uri, bucket=self._bucket(place.bucket), key=place.prefix, row=row)
        return StoredObject(shown_path(uri), row=row, refused="it lies outside the destination of the manifest")

    def _below(self, place: FilesystemDestination) -> Below | None:
        return _within(place.path, self._folders) if place.path.is_absolute() else None

    def _is_in_bucket(self, place: Destination) -> TypeGuard[S3Destination]:
        return isinstance(place, S3Destination) and any(
            place.bucket == name and place.prefix.startswith(prefix) for name, prefix in self._prefixes
        )

    def _bucket(self, name: str) -> Any:
        if name not in self._buckets:
            self._buckets[name] = _bucket(name, self._s3, self._ending)
        return self._buckets[name]


def objects_of(
    listed: Listed, s3: S3Config | None = None, ending: Ending | None = None
) -> tuple[list[StoredObject], list[Instance]]:
    """The objects that a manifest says are there, and its rows that have none; ``ending`` as in :class:`Opener`."""
    objects: list[StoredObject] = []
    others: list[Instance] = []
    for row, opener in listed.rows(s3, ending):
        if row.state in READABLE and row.uri:
            objects.append(opener.object_of(row))
        else:
            others.append(row)
    return objects, others
