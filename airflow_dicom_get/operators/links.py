"""Links on a task instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from airflow_dicom_get.hooks.configuration import MANIFEST_TAB, base_path

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator


class DicomManifestLink(BaseOperatorLink):
    """Opens the tab with the manifest of the task instance."""

    name = "DICOM manifest"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """The address of the tab, on this Airflow.

        :param operator: whose link it is
        :param ti_key: the task instance
        """
        dag_id, run_id, task_id = (quote(part, safe="") for part in (ti_key.dag_id, ti_key.run_id, ti_key.task_id))
        index = -1 if ti_key.map_index is None else ti_key.map_index
        mapped = f"/mapped/{index}" if index >= 0 else ""
        return f"{base_path()}/dags/{dag_id}/runs/{run_id}/tasks/{task_id}{mapped}/plugin/{MANIFEST_TAB}"
