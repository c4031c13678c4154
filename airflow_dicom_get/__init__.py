"""DICOM C-GET retrieval, complete and provably so. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # What type checkers see in place of the names that load on first use.
    from airflow_dicom_get.config.groups import Deadlines as Deadlines
    from airflow_dicom_get.config.node import Node as Node
    from airflow_dicom_get.exports.verb import export as export
    from airflow_dicom_get.getscu import GetScu as GetScu
    from airflow_dicom_get.manifest.frames import combine_manifests as combine_manifests
    from airflow_dicom_get.manifest.frames import load_manifest as load_manifest
    from airflow_dicom_get.manifest.frames import load_manifests as load_manifests
    from airflow_dicom_get.manifest.frames import read_manifest as read_manifest
    from airflow_dicom_get.records import Completed as Completed
    from airflow_dicom_get.records import SubOperation as SubOperation
    from airflow_dicom_get.result import EchoReport as EchoReport
    from airflow_dicom_get.result import Plan as Plan
    from airflow_dicom_get.result import Result as Result
    from airflow_dicom_get.store import StoreScu as StoreScu
    from airflow_dicom_get.verify import Verification as Verification

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "GetScu": "getscu",
    "StoreScu": "store",
    "Node": "config.node",
    "Deadlines": "config.groups",
    "Result": "result",
    "Plan": "result",
    "EchoReport": "result",
    "SubOperation": "records",
    "Completed": "records",
    "Verification": "verify",
    "load_manifest": "manifest.frames",
    "load_manifests": "manifest.frames",
    "combine_manifests": "manifest.frames",
    "read_manifest": "manifest.frames",
    "export": "exports.verb",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
