"""DIMSE status codes (PS3.7 Annex C, PS3.4 B.2.3 and C.4.3.1.4)."""

from __future__ import annotations

from typing import Literal

SUCCESS = 0x0000
PENDING = 0xFF00
PENDING_OPTIONAL_KEYS = 0xFF01
CANCEL = 0xFE00
SUB_OPERATIONS_WARNING = 0xB000

# What we answer to a C-STORE
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
DUPLICATE_OTHER_CONTENT = 0xC001
CLASS_NOT_SUPPORTED = 0x0122
NOT_AUTHORISED = 0x0124
UNRECOGNISED_OPERATION = 0x0211

# What a C-STORE is answered besides
DUPLICATE_INSTANCE = 0x0111
RESOURCE_LIMITATION = 0x0213
_STORE_WARNINGS = frozenset({0xB000, 0xB006, 0xB007})
_STORE_NAMES = {
    0x0107: "attribute list error",
    0x0110: "processing failure",
    0x0111: "duplicate SOP instance: the node already has this UID",
    0x0116: "attribute value out of range",
    0x0213: "resource limitation",
    0xA900: "data set does not match SOP class",
    0xB000: "stored, with coerced data elements",
    0xB006: "stored, with elements discarded",
    0xB007: "stored, though the data set does not match the SOP class",
}

_NAMES = {
    0x0000: "success",
    0x0117: "invalid SOP instance",
    0x0122: "SOP class not supported",
    0x0124: "not authorised",
    0x0210: "duplicate invocation",
    0x0211: "unrecognised operation",
    0x0212: "mistyped argument",
    0xA700: "out of resources",
    0xA701: "out of resources: cannot count matches",
    0xA702: "out of resources: cannot perform sub-operations",
    0xA900: "identifier does not match SOP class",
    0xB000: "sub-operations complete, one or more failures or warnings",
    0xFE00: "cancelled",
}


def is_pending(status: int) -> bool:
    """FF00 or FF01."""
    return status in (PENDING, PENDING_OPTIONAL_KEYS)


def store_outcome(status: int) -> Literal["ok", "warning", "duplicate", "busy", "refused"]:
    """What the answer to a C-STORE means (PS3.4 B.2.3, PS3.7 C): ``busy`` may pass, ``refused`` will not.

    ``duplicate``, 0111, is no status of the storage service, but given by some that hold another instance of this UID,
    of whatever content, and keep it.
    """
    if status == SUCCESS:
        return "ok"
    if status == DUPLICATE_INSTANCE:
        return "duplicate"
    if status in (0x0001, 0x0107, 0x0116) or 0xB000 <= status <= 0xBFFF:
        return "warning"
    if status == RESOURCE_LIMITATION or 0xA700 <= status <= 0xA7FF:
        return "busy"
    return "refused"


def store_status_for_source(status: int) -> int:
    """What the source is told where the destination answered ``status``: the same as far as the service has it."""
    outcome = store_outcome(status)
    if outcome in ("ok", "warning"):
        return status if status in _STORE_WARNINGS else SUCCESS
    if outcome == "busy":
        return OUT_OF_RESOURCES
    known = status in (0x0117, CLASS_NOT_SUPPORTED, NOT_AUTHORISED) or 0xA900 <= status <= 0xA9FF
    return status if known or 0xC000 <= status <= 0xCFFF else CANNOT_UNDERSTAND


def describe_store(status: int) -> str:
    """As :func:`describe`, for the answer to a C-STORE."""
    name = _STORE_NAMES.get(status)
    return f"{status:04X}H ({name})" if name else describe(status)


def describe(status: int | None) -> str:
    """``A702H (out of resources: cannot perform sub-operations)``."""
    if status is None:
        return "no status"
    name = _NAMES.get(status)
    if name is None:
        if 0xA700 <= status <= 0xA7FF:
            name = "out of resources"
        elif 0xC000 <= status <= 0xCFFF:
            name = "unable to process"
        else:
            name = "unknown status"
    return f"{status:04X}H ({name})"
