"""``python -m airflow_dicom_get.cli``, where the console script is not on the path."""

import sys

from airflow_dicom_get.cli.main import main

sys.exit(main())
