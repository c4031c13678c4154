"""What Airflow is told of the page: an entry under Browse, and a tab on each task instance."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from airflow_dicom_get.plugins.urls import URL_PREFIX

log = logging.getLogger(__name__)


class DicomPlugin(AirflowPlugin):
    """The page, where this Airflow has what it is built on.

    The page stands on parts of the API server that Airflow does not promise to keep. Should one be gone, there is no
    page, and all else works. They are looked for when the API server asks for its apps: every other component loads
    this class too, and has no need of them.
    """

    name = "airflow_dicom_get"

    @cached_property
    def _app(self) -> Any:
        try:
            from airflow_dicom_get.plugins.web import app
        except Exception as error:
            log.warning(
                "The page of DICOM retrievals is not available: it does not support this version of Airflow: %s",
                error,
                exc_info=True,
            )
            return None
        return app

    @cached_property
    def fastapi_apps(self) -> list[Any]:  # type: ignore[override]
        """The app below ``/dicom-get``."""
        if self._app is None:
            return []
        return [{"app": self._app, "url_prefix": URL_PREFIX, "name": "DICOM retrievals"}]

    @cached_property
    def external_views(self) -> list[Any]:  # type: ignore[override]
        """Where the web interface shows it."""
        if self._app is None:
            return []
        from airflow_dicom_get.hooks.configuration import MANIFEST_TAB, base_path

        root = base_path() + URL_PREFIX
        return [
            {
                "name": "DICOM retrievals",
                "href": f"{root}/",
                "destination": "nav",
                "category": "browse",
                "url_route": "dicom-get",
            },
            {
                "name": "DICOM manifest",
                "href": f"{root}/dags/{{DAG_ID}}/runs/{{RUN_ID}}/tasks/{{TASK_ID}}/{{MAP_INDEX}}",
                "destination": "task_instance",
                "url_route": MANIFEST_TAB,
            },
        ]
