"""What of its studies a run was to retrieve, where that was not all of them: kept in the metadata of its manifest.

Whoever compares the manifest with a PACS asks for no more. It says nothing of the rows of the manifest, which count
whatever it says, and anybody may have written it: where it cannot be read, the studies are meant as a whole.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from airflow_dicom_get.manifest.schema import metadata_of

if TYPE_CHECKING:
    import pyarrow as pa

_SCOPES = "scopes"
_MOST_PARTS = 100
"""Parts of a study that are asked for one after the other; one of more is meant as a whole."""
_LONGEST = 8 << 20
"""Characters that are read, of what anybody may have written."""


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
    texts = [metadata_of(table).get(_SCOPES) for table in tables]
    if not any(texts):
        return NO_SCOPES
    found: dict[str, frozenset[Narrowed]] = {}
    whole: set[str] = set()
    together: dict[tuple[frozenset[Narrowed], frozenset[Narrowed]], frozenset[Narrowed]] = {}
    for table, text in zip(tables, texts, strict=True):
        studies = table.column("study_instance_uid").unique().to_pylist()
        told = _read(text, set(studies))
        whole.update(study for study in studies if study not in told)
        for study, scope in told.items():
            before = found.get(study, scope)
            # One set for all studies of which the same is said: there may be many of both.
            found[study] = together.setdefault((before, scope), before | scope)
            if len(found[study]) > _MOST_PARTS:
                whole.add(study)
    return {study: scope for study, scope in found.items() if study not in whole}


def _read(text: str | None, studies: Collection[str]) -> Scopes:
    """What a manifest says of some studies; nothing, where that is no text of ours."""
    if text is None or len(text) > _LONGEST:
        return {}
    try:
        said: dict[str, frozenset[Narrowed]] = {}
        for scope, of in json.loads(text):
            if 0 < len(scope) <= _MOST_PARTS:
                parts = frozenset(
                    Narrowed(tuple((str(keyword), str(value)) for keyword, value in keys), tuple(map(str, classes)))
                    for keys, classes in scope
                )
                said.update((study, parts) for study in of if study in studies)
        return said
    except (TypeError, ValueError, RecursionError):
        return {}
