"""Retrieve the studies of a list, a CSV file, and keep the label that each has in your own project.

The file has a column `StudyInstanceUID` or `AccessionNumber`, and one with a pseudonym or the name of a cohort:

    AccessionNumber,Cohort
    20240115-0001,case
    20240115-0002,control

The file is checked before the PACS is queried; an error names line and column. At the end one manifest is written, with
an additional column `cohort`, and if everything is held a table of the series with their cohorts, for people and tools
that do not read manifests. The DICOM files are not changed: they are not pseudonymised.

What it reads:

* connection `dicom_default`: the PACS, as type DICOM
* pool `pacs`, with as many slots as the PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* param `csv`: the file, in one of the folders in the environment variable `DICOM_LISTS`, absolute paths with commas
  between them; by default the folder `dicom-lists` in Airflow's home. All workers need access to it. Its accession
  numbers stay out of logs and XCom.
* param `label`: the column with the labels, one of those in the environment variable `DICOM_LABELS`, with commas
  between them; by default `Cohort`. Labels go to XCom and manifest, so no column with names or numbers of patients:
  one that is an attribute of a patient by its name, and that of the studies, are refused.
* param `unknown`: what to do with rows for which the PACS has no study
* param `destination`: one of the folders in the environment variable `DICOM_DESTINATION`, absolute paths with commas
  between them; by default the folder `dicom` in Airflow's home
"""

from __future__ import annotations

import os
from datetime import timedelta

from airflow.sdk import DAG, Param, task
from airflow.sdk.exceptions import AirflowSkipException

from airflow_dicom_get.operators.dicom import DicomGetOperator
from airflow_dicom_get.tasks import export_manifest, final_errors, report

# Whoever triggers a run chooses one of these, and can name no other.
DESTINATIONS = os.environ.get("DICOM_DESTINATION", "").split(",")
if not DESTINATIONS[0]:
    DESTINATIONS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom"))]
# Nor any file that a worker can read: only one in these folders.
LISTS = os.environ.get("DICOM_LISTS", "").split(",")
if not LISTS[0]:
    LISTS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom-lists"))]
# Nor any column of these files, which may say more than every viewer of this DAG should read.
LABELS = (os.environ.get("DICOM_LABELS") or "Cohort").split(",")

with DAG(
    dag_id="cohort_from_csv",
    schedule=None,
    catchup=False,
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "csv": Param(
            type="string",
            pattern="^/",
            title="CSV file",
            description="Absolute path of a file with StudyInstanceUID or AccessionNumber, and a label, in each row. "
            f"It has to lie in {' or '.join(LISTS)}.",
        ),
        "label": Param(
            LABELS[0],
            type="string",
            enum=LABELS,
            title="Column of the labels",
            description="Pseudonyms or cohorts. Every viewer of this DAG can read them.",
        ),
        "unknown": Param(
            "fail",
            type="string",
            enum=["fail", "skip"],
            values_display={"fail": "Retrieve nothing", "skip": "Go on without them"},
            title="If the PACS has no study for a row",
        ),
        "destination": Param(
            DESTINATIONS[0],
            type="string",
            enum=DESTINATIONS,
            title="Folder",
            description="Below it each study gets a folder named by its UID.",
        ),
    },
    default_args={
        # A retry after a lost connection, a restarted worker or a full disk fetches only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        # Each task that talks to the PACS has one association, and so one slot.
        "pool": "pacs",
    },
) as dag:
    # Reads the file, then queries the PACS row by row, in one task: what passes between tasks is stored in XCom, where
    # accession numbers should not be. The output is a list of lists of Items, almost always of one each.
    @task
    def find(params=None) -> list:
        from airflow_dicom_get.tasks import find_cohort

        return find_cohort(
            params["csv"],
            label=params["label"],
            within=LISTS,
            unknown=params["unknown"],
            dicom_conn_id="dicom_default",
        )

    found = find()

    # The tasks are named by the labels.
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination="{{ params.destination }}",
        max_active_tis_per_dag=2,
    ).expand(study=found)

    # One manifest with the labels beside the instances. Written also where something is missing: its verdict says so.
    @task(trigger_rule="all_done_min_one_success", pool="default_pool", multiple_outputs=False)
    def label(parts: list, manifests, to: str) -> dict:
        from airflow_dicom_get import combine_manifests, load_manifest

        labels = {item["study_instance_uid"]: item["label"] for part in parts for item in part}
        with final_errors():
            # A large manifest is a reference to a file, not a DataFrame: load_manifest takes either. One by one: each
            # keeps its own verdict, and the whole gets the worst of them.
            frames = [load_manifest(manifest) for manifest in manifests[:] if manifest is not None]
            if not frames:
                raise AirflowSkipException("No manifest was left. The log of `report` says why.")
            return combine_manifests(
                [frame.assign(cohort=frame["study_instance_uid"].map(labels)) for frame in frames],
                to,
                expected=len(parts),  # a task that was killed leaves no manifest
            )

    labelled = label(found, get.output, "{{ params.destination }}/_manifests/cohorts")

    # The cohort as others read it: a row a series, in the names of idc-index. Refused while something is missing. Each
    # try has a file of its own, as an export replaces none.
    export_manifest.override(task_id="export", pool="default_pool")(
        labelled,
        "series",
        "{{ params.destination }}/exports/{{ run_id }}-{{ ti.try_number }}.csv",
        options={"columns": ["cohort"]},
    )

    # The result: fails unless everything is held. With `export` it decides the state of the run.
    report.override(pool="default_pool")(found, get.output["summary"], get.output)
