"""What tasks have in common: what is shown; and operators and sensor: the hook, cancelling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from airflow.sdk import BaseOperator

from airflow_dicom_get.config.checks import Check
from airflow_dicom_get.hooks._redaction import study_in
from airflow_dicom_get.hooks.dicom import DicomHook

if TYPE_CHECKING:
    from airflow.sdk import Context

LABEL_KEY = "dicom_label"
ENDED = "the task was ended"


class Cancellable(Protocol):
    """What an operator runs, and ends from a signal handler."""

    def cancel(self, reason: str) -> None:
        """Ask for an orderly end; a second call asks for an abort. No locks."""


class ShownFields(BaseOperator):
    """Base of tasks whose rendered fields hold only what every viewer of the DAG may see."""

    _given: Mapping[str, Any] = MappingProxyType({})

    def given(self, name: str) -> Any:
        """The rendered value of a field, where the field itself holds only what may be shown."""
        return self._given.get(name, getattr(self, name))

    def shown(self, name: str, value: Any) -> Any:
        """What the rendered field ``name`` shows for ``value``."""
        return value

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: Any,
        seen_oids: set[int],
    ) -> None:
        # Airflow stores what the fields hold after this call, in clear, for every viewer of the DAG. The
        # argument names are Airflow's: mapped tasks pass them by keyword.
        before = {name: getattr(parent, name, None) for name in template_fields}
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)
        if parent is not self:
            return
        given = {}  # a new one: tasks are copied, and the copies would share it
        for name in template_fields:
            value = getattr(self, name)
            shown = self.shown(name, value)
            if shown is not value:
                given[name] = value
                setattr(self, name, shown)
        self._given = given
        self.rendered(before, context)

    def rendered(self, before: Mapping[str, Any], context: Context) -> None:
        """Called once the fields are rendered, with what they were before."""


class DicomTask(ShownFields):
    """Base of the DICOM operators and the sensor."""

    ui_color = "#d9ebf2"
    dicom_conn_id: str
    checks: ClassVar[Mapping[str, Check]] = {}
    """How each parameter that is a choice or a number is checked, and what makes of it what the task uses."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._emptied: set[str] = set()
        self._scu: Cancellable | None = None
        self._killed = False

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Check what ``__init__`` checks, which runs for mapped tasks only when they do; and name these.

        They are named by what they work on, unless the DAG names them itself. A class attribute would not do: the
        default that ``partial`` fills in hides it.

        :raises InvalidOption: a parameter is malformed; the DAG is not imported, and the error stands on its page
        """
        cls.check_together({name: cls.checked(name, value) for name, value in kwargs.items()})
        kwargs.setdefault("map_index_template", "{{ " + LABEL_KEY + " }}")
        return super().partial(**kwargs)

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """Check a parameter as soon as the DAG is parsed, and return what the task uses.

        What a subclass has as a template has no value yet, and is left as it is.

        :raises InvalidOption: it is malformed
        """
        check = cls.checks.get(name)
        return value if check is None or name in cls.template_fields else check(name, value)

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any]) -> None:
        """Check parameters against each other, those that are given.

        :raises InvalidOption: two of them contradict each other
        """

    @property
    def hook(self) -> DicomHook:
        """The hook of the connection."""
        return DicomHook(dicom_conn_id=self.dicom_conn_id)

    def on_kill(self) -> None:
        """End the association. Runs inside a signal handler: no lock, no log."""
        self._killed = True
        if self._scu is not None:
            self._scu.cancel(ENDED)

    def ends_with_task(self, scu: Cancellable) -> None:
        """Have what is run from here ended with the task; at its start where the task was ended before."""
        self._scu = scu
        if self._killed:
            scu.cancel(ENDED)

    def rendered_to_nothing(self, name: str) -> bool:
        """Whether a field was given, and its template or the task before left null, or nothing, of it."""
        value = self.given(name)
        return name in self._emptied or (isinstance(value, str) and value.strip() in ("", "None"))

    def map_label(self) -> str:
        """A name for what this task works on, without patient data."""
        return ""

    def label_by(self, context: Context, table: Any) -> None:
        """Name the task by the study of a manifest that had to be read first, if it is of one; shown when it ends."""
        study = study_in(table["study_instance_uid"].unique().to_pylist())
        if study is not None:
            cast(dict[str, Any], context)[LABEL_KEY] = study

    def rendered(self, before: Mapping[str, Any], context: Context) -> None:
        """Note which fields came to nothing, and name the task by what it works on."""
        self._emptied = {name for name, value in before.items() if value is not None and self.given(name) is None}
        cast(dict[str, Any], context)[LABEL_KEY] = self.map_label()
