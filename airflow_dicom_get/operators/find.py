"""The operator that asks a PACS which studies it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.engine.items import Item, is_modality, pack, split_by_series
from airflow_dicom_get.engine.search import Search
from airflow_dicom_get.hooks._errors import final_errors
from airflow_dicom_get.hooks._redaction import label_of, shown_query
from airflow_dicom_get.hooks._task import DicomTask

if TYPE_CHECKING:
    from airflow.sdk import Context

LEVELS = ("STUDY", "SERIES")
ON_EMPTY = ("return", "skip", "fail")


class DicomFindOperator(DicomTask):
    """Find studies on a PACS by C-FIND, and return one Item each: what ``DicomGetOperator`` takes as ``study``.

    An Item is a dict of ``study_instance_uid``, ``series_instance_uids`` (None: all), ``expected_instances``
    (None where the PACS does not say), ``modalities``, ``label`` and ``keys``. It holds nothing of the patient
    but what ``return_keys`` asks for.

    :param query: DICOM keywords or tags, and values (templated)
    :param level: ``STUDY``, or ``SERIES`` to get those series only that match
    :param study_date: StudyDate of the query: ``20240131``, ``2024-01-31``, ``2024-01-01/2024-01-31``, ``today``,
        ``today-1`` in the connection's time zone (templated)
    :param modalities: one or several modalities, of which a study (or series) has at least one (templated)
    :param return_keys: keywords whose values stand in each Item's ``keys``. They go to XCom, which every viewer of
        the DAG can read.
    :param split_on_truncation: ask again by parts of the date range where the PACS seems to cut its answer
    :param shard_instances: return lists of Items of about so many instances together, a study over several of them
        by series if need be; never more lists than tasks can be mapped
    :param on_empty: what happens if nothing matches: ``return`` an empty list, ``skip`` or ``fail`` the task
    :param query_model: ``StudyRoot`` or ``PatientRoot``; the connection's by default
    :param dicom_conn_id: the ``dicom`` connection to the PACS (templated)
    """

    template_fields: Sequence[str] = ("query", "study_date", "modalities", "dicom_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"query": "json"}

    def __init__(
        self,
        *,
        query: Mapping[str, Any] | None = None,
        level: str = "STUDY",
        study_date: str | None = None,
        modalities: str | Sequence[str] | None = None,
        return_keys: Sequence[str] = (),
        split_on_truncation: bool = True,
        shard_instances: int | None = None,
        on_empty: str = "return",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.query = query
        self.level = level
        self.study_date = study_date
        self.modalities = modalities
        self.return_keys = return_keys
        self.split_on_truncation = split_on_truncation
        self.shard_instances = shard_instances
        self.on_empty = on_empty

    def shown(self, name: str, value: Any) -> Any:
        """Hide the values of identifying keys."""
        return shown_query(value) if name == "query" else value

    def map_label(self) -> str:
        """Name what is asked for, without patient data."""
        if self.study_date:
            return f"StudyDate={self.study_date}"[:100]
        return label_of(None, self.given("query"), None) if self.given("query") else ""

    def execute(self, context: Context) -> list[Item] | list[list[Item]]:
        """Ask, and return the Items."""
        with final_errors():
            query, modalities = self._checked()
            search = self._search(modalities)
            items = search.items(query)
            shards = self._shards(search, items) if self.shard_instances else None
        found: list[Any] = items if shards is None else shards
        self._summarise(context, search, items, found)
        if not items:
            self._empty()
        self._check_mappable(found)
        return found

    def _checked(self) -> tuple[dict[str, Any], list[str]]:
        """The query as one mapping, and the modalities; before any traffic."""
        for name, allowed in (("level", LEVELS), ("on_empty", ON_EMPTY)):
            if getattr(self, name) not in allowed:
                raise invalid(name, f"{shown(getattr(self, name))} is not allowed", f"Give {' or '.join(allowed)}.")
        size: Any = self.shard_instances
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise invalid("shard_instances", f"{shown(size)} is not allowed", "Give a whole number of at least 1.")
        given = self.given("query")
        if given is not None and not isinstance(given, Mapping):
            raise invalid("query", "is no mapping", 'Give {"PatientID": "…"}, for example.')
        query = dict(given or {})
        if query.pop("QueryRetrieveLevel", self.level) != self.level:
            raise invalid("query", "holds another QueryRetrieveLevel than level", "Give level alone.")
        for name, key in (("study_date", "StudyDate"), ("modalities", self._modality_key)):
            if getattr(self, name) and query.get(key):
                raise invalid(name, f"is given, and {key} in query too", "Give one of them.")
        if self.study_date is not None:
            if not str(self.study_date).strip() or str(self.study_date) == "None":
                raise invalid("study_date", "rendered to nothing", "Mend its template.")
            query["StudyDate"] = str(self.study_date).strip()
        return query, self._modality_codes()

    def _modality_codes(self) -> list[str]:
        given: Any = self.modalities or []
        codes = [str(one).strip() for one in (given.replace("\\", ",").split(",") if isinstance(given, str) else given)]
        for code in codes:
            if not is_modality(code):
                hint = (
                    "Give codes such as CT. A list in a template needs render_template_as_native_obj=True on the DAG."
                )
                raise invalid("modalities", f"{shown(code)} is no modality", hint)
        return codes

    @property
    def _modality_key(self) -> str:
        return "ModalitiesInStudy" if self.level == "STUDY" else "Modality"

    def _search(self, modalities: list[str]) -> Search:
        hook = self.hook
        self._scu = scu = hook.get_scu()
        model = self.query_model or hook.query_model

        def find(query: Mapping[str, Any], level: str, return_keys: Sequence[str]) -> Iterable[Any]:
            return scu.find(query, level=level, query_model=model, return_keys=return_keys)

        return Search(
            find,
            level=self.level,
            model=model,
            modalities=modalities,
            return_keys=self.return_keys,
            split=self.split_on_truncation,
            timezone=hook.timezone,
        )

    def _shards(self, search: Search, items: list[Item]) -> list[list[Item]]:
        target = int(self.shard_instances or 0)
        parts: list[Item] = []
        for item in items:
            expected = item["expected_instances"]
            if expected is not None and expected > target:
                parts += split_by_series(item, search.series_sizes(item), target=target)
            else:
                parts.append(item)
        return pack(parts, target=target, at_most=conf.getint("core", "max_map_length", fallback=1024))

    def _summarise(self, context: Context, search: Search, items: list[Item], found: list[Any]) -> None:
        counts = [item["expected_instances"] for item in items]
        instances = None if any(one is None for one in counts) else sum(counts)
        summary = {
            "schema": 1,
            "matched": len({item["study_instance_uid"] for item in items}),
            "returned": len(found),
            "queries": search.queries,
            "truncated": search.truncated,
            "instances": instances,
        }
        context["ti"].xcom_push("summary", summary)
        self.log.info(
            "%d studies match, %s instances, %d queries.",
            summary["matched"],
            "an unknown number of" if instances is None else instances,
            search.queries,
        )
        if search.truncated:
            self.log.warning(
                "The PACS seems to have cut its answer: more studies may match than were returned. Ask for less."
            )

    def _empty(self) -> None:
        if self.on_empty == "skip":
            raise AirflowSkipException("No study matches.")
        if self.on_empty == "fail":
            raise AirflowFailException("No study matches, and on_empty is 'fail'.")

    def _check_mappable(self, found: list[Any]) -> None:
        """Airflow fails a task whose list is too long to map over, and does not say what to do."""
        limit = conf.getint("core", "max_map_length", fallback=1024)
        if len(found) > limit and next(self.iter_mapped_dependants(), None) is not None:
            raise AirflowFailException(
                f"{len(found)} studies match, and Airflow maps over at most {limit} ([core] max_map_length). "
                "Give shard_instances=2000, say: each mapped task then gets a list of studies."
            )
