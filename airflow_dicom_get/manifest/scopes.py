"""What of its studies a run was to retrieve, where that was not all of them: kept in the metadata of its manifest.

Whoever compares the manifest with a PACS asks for no more. It says nothing of the rows of the manifest, which count
whatever it says, and anybody may have written it: where it cannot be read, the studies are meant as a whole.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from airflow_dicom_get.manifest.schema import metadata_of

if TYPE_CHECKING:
    import pyarrow as pa

_SCOPES = "scopes"


class Narrowed(NamedTuple):
    """What of a study a query meant."""

    keys: tuple[tuple[str, str], ...] = ()
    """Keywords below the study and their values, several UIDs with a backslash between them."""
    sop_classes: tuple[str, ...] = ()
    """The classes that were wanted; all, where it is empty."""


Scopes = Mapping[str, frozenset[Narrowed]]
"""By study; of several, what any of them means. A study that is not in it is meant as a whole."""
NO_SCOPES: Scopes = {}


def metadata_for(scopes: Scopes) -> dict[str, str]:
    """The scopes of a manifest as more metadata of its file."""
    studies: defaultdict[frozenset[Narrowed], list[str]] = defaultdict(list)
    for study, narrowed in scopes.items():
        studies[narrowed].append(study)
    return {_SCOPES: json.dumps([[sorted(one), of] for one, of in studies.items()])} if studies else {}


def scopes_of(tables: Sequence[pa.Table]) -> Scopes:
    """The scopes of the studies of which some manifests have rows, all together."""
    told_by_each = [_read(metadata_of(table).get(_SCOPES)) for table in tables]
    if not any(told_by_each):
        return NO_SCOPES
    found: dict[str, frozenset[Narrowed]] = {}
    whole: set[str] = set()
    for table, told in zip(tables, told_by_each, strict=True):
        for study in table["study_instance_uid"].unique().to_pylist():
            if told.get(study):
                found[study] = found.get(study, frozenset()) | told[study]
            else:
                whole.add(study)
    return {study: scope for study, scope in found.items() if study not in whole}


def _read(text: str | None) -> Scopes:
    try:
        return {
            str(study): frozenset(
                Narrowed(tuple((str(keyword), str(value)) for keyword, value in keys), tuple(map(str, classes)))
                for keys, classes in scope
            )
            for scope, studies in json.loads(text or "[]")
            for study in studies
        }
    except (TypeError, ValueError, RecursionError):
        return {}
