"""For notebooks: manifests out of Airflow's REST interface or out of files, a picture, pixels, and exports."""

from airflow_dicom_get.exports.verb import export
from airflow_dicom_get.notebook.frames import latest, load_manifests, read_instances, read_manifest, read_manifests
from airflow_dicom_get.notebook.pictures import overview
from airflow_dicom_get.vocabulary import HELD, NOT_HELD

__all__ = [
    "HELD",
    "NOT_HELD",
    "export",
    "latest",
    "load_manifests",
    "overview",
    "read_instances",
    "read_manifest",
    "read_manifests",
]
