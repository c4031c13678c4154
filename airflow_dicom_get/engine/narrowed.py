"""From a query to what its manifest says of the scope of the run, and from that to the query of a comparison."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.query import Query, parse_query
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.manifest.scopes import Narrowed, Scopes

_SAY_NOTHING = frozenset({"UI", "CS", "IS"})
"""Value representations of keys that say nothing of a patient: UIDs, codes and numbers."""
_ANY = "2.25.1"
"""The UID of a study: a part can be asked for of any or of none."""


def narrowed_by(query: Query, sop_classes: Collection[str] | None) -> Narrowed | None:
    """What of each of its studies a query means; None where that is all, or is not said, since a value might be
    a patient's."""
    lower = [x for x in query.filters if x.value and x.level != "STUDY"]
    if any(x.vr not in _SAY_NOTHING for x in lower):
        return None
    uids = {"SeriesInstanceUID": query.series, "SOPInstanceUID": query.instances}
    keys = {keyword: "\\".join(values) for keyword, values in uids.items() if values}
    keys |= {x.keyword: x.value for x in lower}
    narrowed = Narrowed(tuple(sorted(keys.items())), tuple(sorted(sop_classes or ())))
    return narrowed if any(narrowed) else None


def query_within(
    studies: Sequence[str], narrowed: Narrowed | None, query_model: str
) -> tuple[Query, Collection[str] | None]:
    """The query for a part of some studies, and the classes that are wanted of it.

    Raises
    ------
    InvalidQuery
        The part is not one that :func:`narrowed_by` says.
    """
    keys, classes = narrowed or Narrowed()
    query = parse_query({**dict(keys), "StudyInstanceUID": list(studies)}, query_model=query_model)
    if narrowed_by(query, classes) != narrowed or not all(map(is_uid, classes)):
        raise InvalidQuery("The manifest does not say what it is of.", hint="Its studies are meant as a whole.")
    return query, classes or None


def that_can_be_asked(scopes: Scopes) -> Scopes:
    """The scopes of a manifest, as far as a run may have written them: any other study is meant as a whole."""
    can = {scope: all(map(_can_be_asked, scope)) for scope in set(scopes.values())}
    return {study: scope for study, scope in scopes.items() if can[scope]}


def _can_be_asked(narrowed: Narrowed) -> bool:
    try:
        return query_within([_ANY], narrowed, "StudyRoot") is not None
    except InvalidQuery:
        return False


def in_series(series: Mapping[str, Collection[str]]) -> Scopes:
    """The scopes of some studies of which these series alone are meant."""
    keys = {study: (("SeriesInstanceUID", "\\".join(sorted(uids))),) for study, uids in series.items()}
    return {study: frozenset([Narrowed(of_study)]) for study, of_study in keys.items()}


def in_classes(scopes: Scopes, sop_classes: Collection[str] | None, studies: Iterable[str]) -> Scopes:
    """The scopes of a get by a manifest: those of the manifest, in the classes that it is to ask for, if some are."""
    if sop_classes is None:
        return scopes
    classes = tuple(sorted(sop_classes))
    return {
        study: frozenset(one._replace(sop_classes=classes) for one in scopes.get(study, (Narrowed(),)))
        for study in studies
    }
