"""The parts of the misbehaving PACS; its door is :mod:`airflow_dicom_get.testing.misbehave`."""
