"""What operators and sensor have in common: the hook, cancelling, what is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

from airflow.sdk import BaseOperator

from airflow_dicom_get.hooks.dicom import DicomHook

if TYPE_CHECKING:
    from airflow.sdk import Context

LABEL_KEY = "dicom_label"


class Cancellable(Protocol):
    """What an operator runs, and ends from a signal handler."""

    def cancel(self, reason: str) -> None:
        """Ask for an orderly end; a second call asks for an abort. No locks."""


class DicomTask(BaseOperator):
    """Base of the DICOM operators and the sensor."""

    ui_color = "#d9ebf2"
    dicom_conn_id: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._given: dict[str, Any] = {}
        self._scu: Cancellable | None = None
        self._killed = False

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Name the mapped tasks by what they work on, unless the DAG names them itself.

        A class attribute would not do: the default that ``partial`` fills in hides it.
        """
        kwargs.setdefault("map_index_template", "{{ " + LABEL_KEY + " }}")
        return super().partial(**kwargs)

    @property
    def hook(self) -> DicomHook:
        """The hook of the connection."""
        return DicomHook(dicom_conn_id=self.dicom_conn_id)

    def on_kill(self) -> None:
        """End the association. Runs inside a signal handler: no lock, no log."""
        self._killed = True
        if self._scu is not None:
            self._scu.cancel("the task was ended")

    def given(self, name: str) -> Any:
        """The rendered value of a field, where the field itself holds only what may be shown."""
        return self._given.get(name, getattr(self, name))

    def shown(self, name: str, value: Any) -> Any:
        """What the rendered field ``name`` shows for ``value``."""
        return value

    def map_label(self) -> str:
        """A name for what this task works on, without patient data."""
        return ""

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
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)
        if parent is not self:
            return
        self._given = {}  # a new one: tasks are copied, and the copies would share it
        for name in template_fields:
            value = getattr(self, name)
            shown = self.shown(name, value)
            if shown is not value:
                self._given[name] = value
                setattr(self, name, shown)
        cast(dict[str, Any], context)[LABEL_KEY] = self.map_label()
