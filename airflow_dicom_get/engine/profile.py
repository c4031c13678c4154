"""What a probe has found out about a node: a small JSON file, for runs that are given it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_dicom_get import clock
from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.storage import files

if TYPE_CHECKING:
    from airflow_dicom_get.net.peer import Peer

SCHEMA = 1
_LIMIT = 1 << 20


@dataclass(slots=True)
class Profile:
    """How a node behaves towards our AE title. ``None`` where the probe could not tell.

    Attributes
    ----------
    implementation : str
        The implementation version that the node named. A node that names another one by now is
        another one: its profile is not used.
    converts : bool or None
        Whether it sends an uncompressed instance in whichever encoding is proposed first.
    takes_lists : bool or None
        Whether a C-GET brings all instances of a UID list.
    counts, tells_classes, tells_syntaxes : bool
        Whether C-FIND answers hold numbers of related instances, SOP classes, transfer syntaxes.
    associations : int
        How many associations it allowed at a time, tried up to our own limit.
    accepted : dict
        Transfer syntaxes that it accepted, by SOP class of the study that was looked at.
    """

    node: str
    calling: str
    probed_at: str
    implementation: str = ""
    converts: bool | None = None
    takes_lists: bool | None = None
    counts: bool = False
    tells_classes: bool = False
    tells_syntaxes: bool = False
    associations: int = 0
    accepted: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def write_profile(path: Path, profile: Profile) -> None:
    """Write it, whole or not at all. Raises :class:`InvalidOption`."""
    text = json.dumps({"profile": SCHEMA, **profile.to_json()}, indent=1) + "\n"
    try:
        files.replace_whole(
            path, lambda file: file.write(text.encode("ascii")), temporary=f".{path.name}.{clock.token()}.part"
        )
    except OSError as error:
        raise invalid(
            "profile", f"{shown_path(path)} cannot be written: {error.strerror or error}", "Give another file."
        ) from None


def read_profile(path: Path, peer: Peer) -> Profile:
    """The profile of a node, as it was called when it was probed.

    Raises
    ------
    InvalidOption
        The file holds none, or that of another node or of another AE title of ours.
    """
    try:
        with files.opened(path) as fd:
            values = json.loads(files.disk.read_at(fd, _LIMIT, 0))
        if not isinstance(values, dict) or values.get("profile") != SCHEMA:
            raise ValueError("another schema")
        known = {item.name for item in fields(Profile)}
        found = Profile(**{name: value for name, value in values.items() if name in known})
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise invalid(
            "profile",
            f"{shown_path(path)} holds no profile of a node ({type(error).__name__})",
            "Create a new one: dicom-get echo NODE --study UID --profile FILE.",
        ) from None
    if (found.node, found.calling) != (str(peer), peer.calling):
        raise invalid(
            "profile",
            f"{shown_path(path)} is that of {shown(found.node)} called by {shown(found.calling)}, "
            f"and not of {peer} called by {peer.calling}",
            "Give the profile of this node, or leave it out.",
        )
    return found
