"""Items: what find hands to get, one a study; and their packing into shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Item = dict[str, Any]
"""``study_instance_uid, series_instance_uids, expected_instances, modalities, label, keys``."""

_MODALITY = re.compile(r"[A-Z0-9_]{1,16}")


def values(value: Any) -> list[str]:
    """The values of one attribute of a C-FIND row as texts, empty ones left out."""
    if value is None:
        return []
    if isinstance(value, str):
        parts: Iterable[Any] = value.split("\\")
    else:  # a name of pydicom's can be iterated over, too: by its letters
        parts = value if isinstance(value, Sequence) else [value]
    return [text for part in parts if part is not None and (text := str(part).strip())]


def first(value: Any) -> str:
    """The first value as text; empty if there is none."""
    return next(iter(values(value)), "")


def count(value: Any) -> int | None:
    """A count of instances, if the row holds one."""
    text = first(value)
    return int(text) if text.isascii() and text.isdigit() else None


def is_modality(text: str) -> bool:
    """Whether a text has the form of a modality code (PS3.5 6.2, VR CS)."""
    return _MODALITY.fullmatch(text) is not None


def modalities_of(value: Any) -> list[str]:
    """The modality codes in one attribute; a text that is none could be anything and is left out."""
    return sorted({text for text in values(value) if is_modality(text)})


def make_item(
    study: str,
    *,
    series: Sequence[str] | None = None,
    expected: int | None = None,
    modalities: Sequence[str] = (),
    keys: Mapping[str, str] | None = None,
) -> Item:
    """Make an Item. Its label holds the study's UID and modalities: nothing of the patient."""
    label = study
    if modalities:
        label += f" {'/'.join(modalities)}"
    if series is not None:
        label += f" ({len(series)} series)"
    return {
        "study_instance_uid": study,
        "series_instance_uids": None if series is None else list(series),
        "expected_instances": expected,
        "modalities": list(modalities),
        "label": label,
        "keys": dict(keys or {}),
    }


def pack(items: Sequence[Item], *, target: int, at_most: int) -> list[list[Item]]:
    """Pack items in their order into shards of about ``target`` instances, at most ``at_most`` shards.

    An item of unknown size counts as a whole shard. Where there would be too many shards, all grow.
    """
    weights = [target if item["expected_instances"] is None else item["expected_instances"] for item in items]
    size = target
    while True:
        shards: list[list[Item]] = []
        filled = 0
        for item, weight in zip(items, weights, strict=True):
            if not shards or filled + weight > size:
                shards.append([])
                filled = 0
            shards[-1].append(item)
            filled += weight
        if len(shards) <= at_most:
            return shards
        size *= 2


def split_by_series(item: Item, sizes: Mapping[str, int | None], *, target: int) -> list[Item]:
    """Split an item over its series so that each part has about ``target`` instances, if their sizes are known.

    It stays whole where these are of less than it is: what its series leave out would be of no part.
    """
    known = [size for size in sizes.values() if size is not None]
    if len(known) < max(2, len(sizes)) or sum(known) < (item["expected_instances"] or 0):
        return [item]
    series = [
        make_item(item["study_instance_uid"], series=[uid], expected=size, modalities=item["modalities"])
        for uid, size in sizes.items()
    ]
    return [
        make_item(
            item["study_instance_uid"],
            series=[uid for part in shard for uid in part["series_instance_uids"]],
            expected=sum(part["expected_instances"] for part in shard),
            modalities=item["modalities"],
            keys=item["keys"],
        )
        for shard in pack(series, target=target, at_most=len(series))
    ]
