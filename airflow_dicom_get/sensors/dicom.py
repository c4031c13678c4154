"""The sensor that waits for studies at a PACS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseSensorOperator, PokeReturnValue
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from airflow_dicom_get.config.checks import Check, Choice, Flag, invalid
from airflow_dicom_get.engine.arrivals import LEAST_INSTANCES, SPAN, Awaited, Counts, find_arrivals
from airflow_dicom_get.engine.query import parse_query
from airflow_dicom_get.errors import DicomGetError
from airflow_dicom_get.hooks._errors import final_errors, may_pass
from airflow_dicom_get.hooks._redaction import label_of, shown_query, shown_study
from airflow_dicom_get.hooks._studies import study_queries
from airflow_dicom_get.hooks._task import DicomTask
from airflow_dicom_get.hooks.dicom import DicomHook
from airflow_dicom_get.triggers._looks import LONGEST, look
from airflow_dicom_get.triggers.dicom import DicomStudyTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.engine.items import Item


SETTLED_FOR = timedelta(minutes=10)


class DicomStudySensor(DicomTask, BaseSensorOperator):
    """Wait until studies are at a PACS and no longer grow, and return one Item each: what ``DicomGetOperator`` takes.

    A study has settled once its number of instances has not changed for ``settled_for``. All studies are queried
    together; the first time by the worker, then by the triggerer.

    :param study: Study Instance UID, Item, or a list of either: all of them, and each series that an Item names, must
        be there (templated)
    :param query: DICOM keywords or tags, and values: at least one study must match, and all that match must have
        settled (templated)
    :param settled_for: how long the number of instances must not change
    :param min_instances: how many instances each study must have
    :param deferrable: wait in the triggerer rather than in a worker slot; Airflow's ``[operators]
        default_deferrable`` by default
    :param dicom_conn_id: the ``dicom`` connection to the PACS (templated)
    """

    template_fields: Sequence[str] = ("study", "query", "dicom_conn_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"study": "json", "query": "json"}
    checks: ClassVar[Mapping[str, Check]] = {
        "settled_for": SPAN,
        "min_instances": LEAST_INSTANCES,
        "mode": Choice("poke", "reschedule"),
        "deferrable": Flag(),
    }

    def __init__(
        self,
        *,
        study: str | Item | Sequence[str | Item] | None = None,
        query: Mapping[str, Any] | None = None,
        settled_for: timedelta = SETTLED_FOR,
        min_instances: int = 1,
        poke_interval: timedelta | float = 60,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        dicom_conn_id: str = DicomHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, **kwargs)
        self.dicom_conn_id = dicom_conn_id
        self.study = study
        self.query = query
        self.settled_for = self.checked("settled_for", settled_for)
        self.min_instances = self.checked("min_instances", min_instances)
        self.deferrable = self.checked("deferrable", deferrable)
        self.check_together({"mode": self.mode, "settled_for": self.settled_for, "deferrable": self.deferrable})
        self._counts: Counts = {}

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any]) -> None:
        """Refuse to look from a process that forgets what it counted."""
        deferrable = parameters.get("deferrable", conf.getboolean("operators", "default_deferrable", fallback=False))
        if parameters.get("mode") == "reschedule" and parameters.get("settled_for", SETTLED_FOR) and not deferrable:
            hint = "Set deferrable=True, which frees the worker slot as well, or settled_for=timedelta(0)."
            raise invalid("mode", "reschedule forgets in between what was counted before", hint)

    def shown(self, name: str, value: Any) -> Any:
        """Hide the values of identifying keys."""
        hide = {"study": shown_study, "query": shown_query}.get(name)
        return hide(value) if hide else value

    def map_label(self) -> str:
        """Name what is waited for, without patient data."""
        return label_of(self.given("study"), self.given("query"), None)

    def execute(self, context: Context) -> Any:
        """Query; if not everything is there, defer to the triggerer, or query again."""
        with final_errors():
            awaited = self._awaited()
        if not self.deferrable:
            return super().execute(context)
        done = self.poke(context)
        if done:
            return done.xcom_value
        self.defer(
            trigger=DicomStudyTrigger(awaited.to_json(), self._counts, self.poke_interval, self.dicom_conn_id),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> list[Item]:
        """Return what the trigger found."""
        if "error" in event:
            with final_errors():
                raise AirflowFailException(str(event["error"]))
        return list(event["items"])

    def poke(self, context: Context) -> PokeReturnValue:
        """Query once. A PACS that is down or busy is queried again later."""
        with final_errors():
            try:
                awaited = self._awaited()
                seen = look(self.hook, awaited.queries, LONGEST, self.ends_with_task)
            except (DicomGetError, AirflowNotFoundException) as error:
                if not may_pass(error) or self._killed:
                    raise
                self.log.warning("The PACS could not be queried: %s", error)
                return PokeReturnValue(False)
        found = find_arrivals(awaited, seen, self._counts)
        self._counts = found.counts
        self.log.info("%s.", found.text)
        return PokeReturnValue(found.all_settled, found.items if found.all_settled else None)

    def _awaited(self) -> Awaited:
        """What is waited for, checked before any traffic."""
        study, query = self.given("study"), self.given("query")
        if (study is None) == (query is None):
            what = "both are given" if study is not None else "neither is given"
            raise invalid("study, query", what, "Give one of the two. A template may have rendered to nothing.")
        if study is not None:
            queries = study_queries(study)
        elif isinstance(query, Mapping) and query:
            queries = [dict(query)]
        else:
            raise invalid("query", "is not a mapping of keys to values", 'For example, give {"PatientID": "…"}.')
        queries = [self._frozen(one) for one in queries]
        named = [] if study is None else [uid for one in queries for uid in one["StudyInstanceUID"]]
        if study is not None and not named:
            raise invalid("study", "is an empty list", "Give at least one study.")
        return Awaited(
            queries, named, settled_seconds=self.settled_for.total_seconds(), min_instances=self.min_instances
        )

    def _frozen(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """The query, checked, with ``today`` as the date of now: it may be asked still after midnight."""
        hook = self.hook
        parsed = parse_query(query, query_model=hook.query_model, timezone=hook.timezone)
        keys: dict[str, Any] = {item.keyword: item.value for item in parsed.filters}
        for name, uids in (
            ("StudyInstanceUID", parsed.studies),
            ("SeriesInstanceUID", parsed.series),
            ("SOPInstanceUID", parsed.instances),
        ):
            if uids:
                keys[name] = list(uids)
        level = query.get("QueryRetrieveLevel")
        return {"QueryRetrieveLevel": level, **keys} if level else keys
