"""``python -m airflow_dicom_get.cli``, where the console script is not on the path."""

from airflow_dicom_get.cli.main import run

run()
