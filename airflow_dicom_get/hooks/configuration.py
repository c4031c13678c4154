"""What is read of Airflow's configuration: the section ``[dicom_get]``, and how much may be mapped over."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from airflow.sdk.configuration import conf

from airflow_dicom_get.config.destination import Destination, FilesystemDestination, S3Destination
from airflow_dicom_get.get_provider_info import get_provider_info

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

    A path with ``..`` is not allowed: where it leads is not what it says.
    """
    patterns = [line.strip() for line in text("allowed_destinations").splitlines() if line.strip()]
    if not patterns:
        return True
    if isinstance(place, FilesystemDestination) and ".." in place.path.parts:
        return False
    name = str(replace(place, conn_id=None) if isinstance(place, S3Destination) else place)
    return any(fnmatchcase(name, pattern) or fnmatchcase(f"{name}/", pattern) for pattern in patterns)


def max_map_length() -> int:
    """Airflow's own limit: how long a list may be that is mapped over."""
    return conf.getint("core", "max_map_length", fallback=1024)
