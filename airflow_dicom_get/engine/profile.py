"""What a probe has found out about a node: a small JSON file that later runs read."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

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


def profile_path(folder: Path, node: object, calling: str) -> Path:
    """Where the profile of a node lies, as seen by one AE title of ours."""
    return folder / "nodes" / (re.sub(r"[^A-Za-z0-9._@-]", "_", f"{node}@{calling}")[:200] + ".json")


def write_profile(path: Path, profile: Profile) -> None:
    """Write it, whole or not at all. Raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps({"profile": SCHEMA, **profile.to_json()}, indent=1) + "\n", encoding="ascii")
    os.replace(temporary, path)


def read_profile(path: Path) -> Profile | None:
    """The profile, or None where there is none that can be used: a run does without."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_LIMIT))
        if not isinstance(values, dict) or values.get("profile") != SCHEMA:
            raise ValueError("another schema")
        known = {item.name for item in fields(Profile)}
        return Profile(**{name: value for name, value in values.items() if name in known})
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        log.warning("%s is no profile of a node (%s); probe it again", path, type(error).__name__)
        return None
