"""What is read of Airflow's configuration: the section ``[dicom_get]``, and how much may be mapped over."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from airflow.sdk.configuration import conf

from airflow_dicom_get.config.destination import Destination, FilesystemDestination, S3Destination
from airflow_dicom_get.get_provider_info import get_provider_info
from airflow_dicom_get.storage import files

SECTION = "dicom_get"
MANIFEST_TAB = "dicom-manifest"
"""The tab with the manifest of a task instance, as its address in the web interface names it."""


def _default(option: str) -> str:
    """The default stands once, in the provider's description."""
    return str(get_provider_info()["config"][SECTION]["options"][option]["default"])


def text(option: str) -> str:
    """A text option, without surrounding spaces."""
    return (conf.get(SECTION, option, fallback=_default(option)) or "").strip()


def integer(option: str) -> int:
    """An integer option."""
    return conf.getint(SECTION, option, fallback=int(_default(option)))


def boolean(option: str) -> bool:
    """A yes-or-no option."""
    return conf.getboolean(SECTION, option, fallback=_default(option) == "True")


def base_path() -> str:
    """The path in ``[api] base_url``, which an address in the web interface has to begin with."""
    return urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")


def is_allowed(place: Destination) -> bool:
    """Whether ``[dicom_get] allowed_destinations`` has a place: one of its patterns fits, or there are none.

    A path with ``..`` is not allowed: where it leads is not what it says. Of one with links that counts where they
    lead, as whoever may write in an allowed folder can make some: links count as the administrator's own only in the
    part of a pattern before its first wildcard.
    """
    patterns = [line.strip() for line in text("allowed_destinations").splitlines() if line.strip()]
    if not patterns:
        return True
    if isinstance(place, FilesystemDestination) and ".." in place.path.parts:
        return False
    name = str(replace(place, conn_id=None) if isinstance(place, S3Destination) else place)
    if not isinstance(place, FilesystemDestination):
        return _fits(name, patterns)
    try:
        return any(_fits(name, [pattern]) and _fits(_real(place.path, pattern), patterns) for pattern in patterns)
    except OSError:  # it leads nowhere
        return False


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}/", pattern) for pattern in patterns)


def _real(path: Path, pattern: str) -> str:
    """Where a path leads that fits a pattern, written as the pattern writes it where that is still the same folder."""
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    top = Path(fixed if fixed == pattern else fixed.rpartition("/")[0] or "/")
    real, real_top = files.disk.real_path(path), files.disk.real_path(top)
    return str(top / real.relative_to(real_top) if real.is_relative_to(real_top) else real)


def max_map_length() -> int:
    """Airflow's own limit: how long a list may be that is mapped over."""
    return conf.getint("core", "max_map_length", fallback=1024)
