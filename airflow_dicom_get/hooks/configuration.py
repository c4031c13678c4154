"""The ``[dicom_get]`` section of Airflow's configuration."""

from __future__ import annotations

from airflow.sdk.configuration import conf

from airflow_dicom_get.get_provider_info import get_provider_info

SECTION = "dicom_get"


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
