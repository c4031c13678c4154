"""C-FIND for studies, or for their series, as the Items that a get is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.options import parse_keywords
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.items import (
    Item,
    count,
    first,
    make_item,
    modalities_of,
    pack,
    split_by_series,
    values,
)
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.errors import InvalidQuery
from airflow_dicom_get.lists.matching import Contradiction, Dropped

if TYPE_CHECKING:
    from datetime import tzinfo

    from airflow_dicom_get.engine.find import Found

Find = Callable[[Mapping[str, Any], str, Sequence[str]], "Found"]
"""Sends a C-FIND at a level, asks for further keys, and gives the rows."""


class Search:
    """One search: its queries, and whether the answer may be short.

    :param find: see :data:`Find`; what it knows of an answer that may be cut it says of its rows
    :param level: ``STUDY`` or ``SERIES``
    :param model: the information model, for checks of the query
    :param modalities: of which a study, or a series at that level, has at least one
    :param return_keys: keywords whose values go into the Items
    :param timezone: of ``today``
    """

    def __init__(
        self,
        find: Find,
        *,
        level: str,
        model: str,
        modalities: Sequence[str] = (),
        return_keys: Sequence[str] = (),
        timezone: tzinfo | str = "UTC",
    ) -> None:
        self._find = find
        self._level = level
        self._model = model
        self._modalities = list(modalities)
        self._return_keys = parse_keywords("return_keys", return_keys)
        self._timezone = timezone
        self.queries = 0
        self.doubt: str | None = None
        """Why more may match, as a reason of the vocabulary."""
        self.unknown: frozenset[str] = frozenset()
        """UIDs that the query names, and of which the PACS lists nothing, though it lists something that matches."""
        self._series_there: set[str] = set()
        self._looked_at = Dropped()
        """Series that were looked at for their modality, which the PACS may leave out."""

    def items(self, query: Mapping[str, Any]) -> list[Item]:
        """Search, and return one Item a study, in the order of their UIDs.

        Raises
        ------
        InvalidQuery
            The query is refused, or the PACS does not tell the modality of any series.
        """
        study_keys, series_keys = self._by_level(query)
        rows: dict[str, Any] = {}
        # Only UIDs are matched by lists in one query (PS3.4 C.2.2.2.2).
        for modality in self._modalities or [""]:
            asked = modality or study_keys.get("ModalitiesInStudy", "")
            try:
                self._collect({**study_keys, "ModalitiesInStudy": asked}, rows)
            except InvalidQuery as error:
                # Some PACS know no ModalitiesInStudy, and match everything: then their series tell.
                selects = _selects(study_keys, "ModalitiesInStudy")
                if not modality or error.facts.get("key") != "ModalitiesInStudy" or not selects:
                    raise
                self._collect({**study_keys, "ModalitiesInStudy": ""}, rows)
                break
        found = []
        by_series = self._level == "SERIES" or bool(series_keys)
        for uid in sorted(rows):
            item = self._series_item(rows[uid], uid, series_keys) if by_series else self._study_item(rows[uid], uid)
            if item is not None:
                found.append(item)
        if not found and (unsupported := self._looked_at.unsupported()) is not None:
            raise unsupported
        if found:
            self.unknown = self._not_there(study_keys, series_keys, sorted(rows))
        return found

    def _not_there(
        self, study_keys: Mapping[str, Any], series_keys: Mapping[str, Any], found: Sequence[str]
    ) -> frozenset[str]:
        """Of the studies and series that are named those that the PACS does not have, as a get of the query tells them.

        What another key leaves out is there: by its UID alone it is asked for.
        """
        studies = set(study_keys.get("StudyInstanceUID", ())) - set(found)
        series = set(series_keys.get("SeriesInstanceUID", ())) - self._series_there
        patient = {key: value for key, value in study_keys.items() if key == "PatientID" and value}
        if studies and (self._modalities or _selects(study_keys, "StudyInstanceUID", "PatientID")):
            rows = self._rows({**patient, "StudyInstanceUID": sorted(studies)}, "STUDY")
            studies -= {first(getattr(row, "StudyInstanceUID", None)) for row in rows}
        if _selects(series_keys, "SeriesInstanceUID"):
            for study in found if series else ():
                rows = self._rows({"StudyInstanceUID": study, "SeriesInstanceUID": sorted(series)}, "SERIES")
                series -= {first(getattr(row, "SeriesInstanceUID", None)) for row in rows}
        return frozenset(studies | series)

    def shards(self, items: Sequence[Item], *, target: int, at_most: int) -> list[list[Item]]:
        """Pack Items into shards of about ``target`` instances, a larger one over several of them by its series.

        :param at_most: how many shards there may be; where there would be more, all grow
        """
        parts: list[Item] = []
        for item in items:
            expected = item["expected_instances"]
            if expected is not None and expected > target:
                parts += split_by_series(item, self._series_sizes(item), target=target)
            else:
                parts.append(item)
        return pack(parts, target=target, at_most=at_most)

    def _series_sizes(self, item: Item) -> dict[str, int | None]:
        """The series of an Item, and how many instances each has; none where there may be more of them.

        Then it is retrieved whole, which finds out, or says so.
        """
        rows = self._rows({"StudyInstanceUID": item["study_instance_uid"]}, "SERIES")
        sizes = {first(getattr(row, "SeriesInstanceUID", None)): _size(row) for row in rows}
        wanted = set(item["series_instance_uids"] or sizes)
        if rows.doubt is not None or not all(map(is_uid, sizes)) or wanted - sizes.keys():
            return {}
        return {uid: sizes[uid] for uid in sorted(wanted)}

    # --- studies -----------------------------------------------------------------------------------

    def _by_level(self, query: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys for studies and those for series. ``today`` becomes a date, once for all queries."""
        asked: dict[str, Any] = dict(query)
        if self._modalities:
            asked["ModalitiesInStudy"] = self._modalities[0]
        # The lowest level whose unique key is given: not taken from ``self._level``, which is about the Items.
        parsed = parse_query(asked, query_model=self._model, timezone=self._timezone)
        by_level: dict[str, dict[str, Any]] = {"STUDY": {}, "SERIES": {}, "IMAGE": {}}
        for item in parsed.filters:
            by_level[item.level][item.keyword] = item.value
        if by_level["IMAGE"] or parsed.instances:
            key = next(iter(by_level["IMAGE"]), "SOPInstanceUID")
            raise InvalidQuery(
                f"{key} is below the SERIES level.", hint="Omit it: find returns studies and series.", key=key
            )
        if parsed.studies:
            by_level["STUDY"]["StudyInstanceUID"] = list(parsed.studies)
        if parsed.series:
            by_level["SERIES"]["SeriesInstanceUID"] = list(parsed.series)
        return by_level["STUDY"], by_level["SERIES"]

    def _rows(self, query: Mapping[str, Any], level: str) -> Found:
        rows = self._find(query, level, self._return_keys if level == "STUDY" else ())
        self.queries += rows.queries
        return rows

    def _ask(self, query: Mapping[str, Any], level: str) -> Found:
        rows = self._rows(query, level)
        self.doubt = self.doubt or rows.doubt
        return rows

    def _collect(self, query: Mapping[str, Any], into: dict[str, Any]) -> None:
        for row in self._ask(query, "STUDY"):
            self._keep(row, "StudyInstanceUID", into)

    def _keep(self, row: Any, key: str, into: dict[str, Any]) -> None:
        """Keep a row by its UID; one that cannot be asked for is said to be left out."""
        uid = first(getattr(row, key, None))
        if is_uid(uid):
            into.setdefault(uid, row)
        else:
            self.doubt = self.doubt or "bad_uid"

    def _study_item(self, row: Any, uid: str) -> Item | None:
        modalities = modalities_of(getattr(row, "ModalitiesInStudy", None))
        if self._modalities:
            if not modalities:
                series = self._series(uid, {})
                if not series:
                    return self._without_series(row, uid)
                self._look_at(series)
                modalities = _modalities_of_series(series.values())
            if not set(modalities) & set(self._modalities):
                return None
        return self._whole(row, uid, modalities)

    def _whole(self, row: Any, uid: str, modalities: Sequence[str]) -> Item:
        return make_item(
            uid,
            expected=count(getattr(row, "NumberOfStudyRelatedInstances", None)),
            modalities=modalities,
            keys=self._keys(row),
        )

    def _without_series(self, row: Any, uid: str) -> Item | None:
        """A listed study with nothing listed below it, as one that arrives: whole, so that its get finds out.

        None where there is none by its own count.
        """
        related = ("NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances")
        if 0 in (count(getattr(row, keyword, None)) for keyword in related):
            return None
        return self._whole(row, uid, modalities_of(getattr(row, "ModalitiesInStudy", None)))

    def _keys(self, row: Any) -> dict[str, str]:
        return {key: "\\".join(values(getattr(row, key, None))) for key in self._return_keys}

    # --- series ------------------------------------------------------------------------------------

    def _series(self, study: str, keys: Mapping[str, Any]) -> dict[str, Any]:
        rows = self._ask({**keys, "StudyInstanceUID": study, "Modality": keys.get("Modality", "")}, "SERIES")
        found: dict[str, Any] = {}
        for row in rows:
            self._keep(row, "SeriesInstanceUID", found)
        self._series_there |= found.keys()
        return found

    def _look_at(self, series: Mapping[str, Any]) -> None:
        for each in series.values():
            told = bool(first(getattr(each, "Modality", None)))
            self._looked_at.add(Contradiction("Modality", "SERIES", told), {})

    def _series_item(self, row: Any, study: str, keys: Mapping[str, Any]) -> Item | None:
        series = self._series(study, keys)
        if not series and not any(keys.values()):
            return self._without_series(row, study)
        if self._modalities:
            self._look_at(series)
            series = {
                uid: each
                for uid, each in series.items()
                if set(modalities_of(getattr(each, "Modality", None))) & set(self._modalities)
            }
        if not series:
            return None
        sizes = [_size(each) for each in series.values()]
        return make_item(
            study,
            series=sorted(series),
            expected=None if None in sizes else sum(size for size in sizes if size is not None),
            modalities=_modalities_of_series(series.values()),
            keys=self._keys(row),
        )


def _selects(keys: Mapping[str, Any], *besides: str) -> bool:
    return any(bool(value) for key, value in keys.items() if key not in besides)


def _size(row: Any) -> int | None:
    return count(getattr(row, "NumberOfSeriesRelatedInstances", None))


def _modalities_of_series(rows: Iterable[Any]) -> list[str]:
    return sorted({one for row in rows for one in modalities_of(getattr(row, "Modality", None))})
