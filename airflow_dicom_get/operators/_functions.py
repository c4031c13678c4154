"""Functions as tasks: what they are given is shown as in the fields of the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory

from airflow_dicom_get.hooks._redaction import shown_manifest, shown_study
from airflow_dicom_get.hooks._task import ShownFields

if TYPE_CHECKING:
    from airflow.sdk import Context

_HIDES: Mapping[str, Callable[[Any], Any]] = {"manifests": shown_manifest, "parts": shown_study}
"""Parameters of which every viewer of the DAG may see less than is given."""


class FunctionOperator(ShownFields, DecoratedOperator, PythonOperator):
    """A function as a task."""

    custom_operator_name = "@task"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Sequence[Any],
        op_kwargs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        called: dict[str, Any] = {"python_callable": python_callable, "op_args": op_args, "op_kwargs": op_kwargs}
        super().__init__(kwargs_to_upstream=called, **called, **kwargs)

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests, and the values of keys in Items."""
        if name == "op_args":
            return [_shown(*one) for one in zip(signature(self.python_callable).parameters, value, strict=False)]
        return {key: _shown(key, one) for key, one in value.items()} if name == "op_kwargs" else value

    def execute(self, context: Context) -> Any:
        """Call the function with what was given."""
        self.op_args, self.op_kwargs = self.given("op_args"), self.given("op_kwargs")
        return super().execute(context)


def _shown(parameter: str, value: Any) -> Any:
    hide = _HIDES.get(parameter)
    return hide(value) if hide else value


def function_task(**kwargs: Any) -> TaskDecorator:
    """As ``@task``, with parameters ``manifests`` and ``parts`` shown as the operators show theirs."""
    return task_decorator_factory(decorated_operator_class=FunctionOperator, multiple_outputs=False, **kwargs)
