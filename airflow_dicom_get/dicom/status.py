"""DIMSE status codes (PS3.7 Annex C, PS3.4 B.2.3 and C.4.3.1.4)."""

from __future__ import annotations

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
