"""Links on a task instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from airflow.sdk import BaseOperatorLink
from airflow.sdk.configuration import conf

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator

TAB = "dicom-manifest"
"""Of the tab with the manifest, as the plugin names it."""


class DicomManifestLink(BaseOperatorLink):
    """Opens the tab with the manifest of the task instance."""

    name = "DICOM manifest"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """The address of the tab, on this Airflow.

        :param operator: whose link it is
        :param ti_key: the task instance
        """
        base = urlsplit(conf.get("api", "base_url", fallback="") or "").path.rstrip("/")
        dag_id, run_id, task_id = (quote(part, safe="") for part in (ti_key.dag_id, ti_key.run_id, ti_key.task_id))
        index = -1 if ti_key.map_index is None else ti_key.map_index
        mapped = f"/mapped/{index}" if index >= 0 else ""
        return f"{base}/dags/{dag_id}/runs/{run_id}/tasks/{task_id}{mapped}/plugin/{TAB}"
