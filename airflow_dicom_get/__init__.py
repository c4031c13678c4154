"""DICOM C-GET retrieval, complete and provably so. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "GetScu": "getscu",
    "StoreScu": "store",
    "Node": "node",
    "Deadlines": "options",
    "Result": "result",
    "Plan": "result",
    "EchoReport": "result",
    "SubOperation": "records",
    "Completed": "records",
    "Verification": "verify",
    "load_manifest": "manifest",
    "load_manifests": "manifest",
    "combine_manifests": "manifest",
    "read_manifest": "manifest",
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
