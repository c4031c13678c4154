"""The Airflow hook of a DICOM node."""
