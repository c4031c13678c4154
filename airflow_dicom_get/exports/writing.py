"""Where an export goes: a file or an object that appears whole or not at all, and never in place of another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import invalid, shown_path
from airflow_dicom_get.config.destination import (
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    check_folder,
    parse_destination,
)
from airflow_dicom_get.errors import InvalidOption, S3Error, SinkError
from airflow_dicom_get.manifest.files import bucket_of
from airflow_dicom_get.sinks.filesystem import sink_error
from airflow_dicom_get.storage import files

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import S3Config

Place = FilesystemDestination | S3Destination


class Target:
    """Where an export goes.

    Parameters
    ----------
    to : str, Path or address
        A file or an object.
    suffixes : sequence of str
        How its name may end; any if there are none.

    Raises
    ------
    InvalidOption
        It is no file, its name ends otherwise, or it cannot be written there.
    """

    def __init__(self, to: Any, suffixes: Sequence[str], s3: S3Config | None) -> None:
        place = parse_destination(to, "to")
        if isinstance(place, ForwardDestination):
            raise invalid("to", f"{shown_path(to)} is a DICOM node", "Give a file, or s3://bucket/key.")
        self.place: Place = place
        self._s3 = s3
        if not self.name:
            raise invalid("to", f"{shown_path(to)} names no file", "Give the name of a file.")
        if suffixes and not self.name.lower().endswith(tuple(suffixes)):
            raise invalid("to", f"{shown_path(to)} ends in none of {', '.join(suffixes)}", "Name the file so.")
        if isinstance(place, FilesystemDestination):
            check_folder(place.path.absolute().parent, "to")

    def __str__(self) -> str:
        return str(self.place)

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.place.path.name if isinstance(self.place, FilesystemDestination) else self._key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without what it ends in."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def _key(self) -> str:
        assert isinstance(self.place, S3Destination)
        return self.place.prefix

    def beside(self, name: str) -> Place:
        """Another file in the same folder."""
        if isinstance(self.place, FilesystemDestination):
            return FilesystemDestination(self.place.path.parent / name)
        return replace(self.place, prefix="/".join([*self._key.split("/")[:-1], name]))

    def check_free(self, *names: str) -> None:
        """Refuse names in its folder that are taken.

        Raises
        ------
        InvalidOption
        S3Error
            The bucket cannot be looked into.
        """
        for name in names:
            place = self.beside(name)
            if self._is_taken(place):
                raise _taken(place)

    def _is_taken(self, place: Place) -> bool:
        if isinstance(place, FilesystemDestination):
            return files.exists(place.path)
        try:
            bucket_of(place, self._s3).call("head_object", place.prefix)
        except S3Error as error:
            if error.facts.get("status") == 404:
                return False
            raise
        return True

    def write(self, contents: Sequence[tuple[str, bytes]], *, private: bool = False) -> list[str]:
        """Write files into its folder in this order, and give their names; none of them is left if one fails.

        Raises
        ------
        InvalidOption
            A name is taken by now.
        SinkError
            One cannot be written.
        """
        written: list[Place] = []
        try:
            for name, content in contents:
                place = self.beside(name)
                self._write(place, content, private)
                written.append(place)
        except BaseException:
            for place in written:
                with suppress(OSError, SinkError):
                    self._remove(place)
            raise
        return [str(place) for place in written]

    def _write(self, place: Place, content: bytes, private: bool) -> None:
        if isinstance(place, S3Destination):
            bucket_of(place, self._s3).put(place.prefix, content)
            return
        path = place.path.absolute()
        temporary = f".{path.name}.{clock.token()}.part"
        try:
            files.replace_whole(path, lambda file: file.write(content), temporary=temporary, private=private, new=True)
        except FileExistsError:
            raise _taken(place) from None
        except OSError as error:
            raise sink_error(error, f"The export {shown_path(path)} cannot be written") from error

    def _remove(self, place: Place) -> None:
        if isinstance(place, S3Destination):
            bucket_of(place, self._s3).call("delete_object", place.prefix)
        else:
            files.disk.remove(place.path)


def _taken(place: Place) -> InvalidOption:
    return invalid("to", f"{shown_path(place)} exists already", "Give another name, or move it away.")
