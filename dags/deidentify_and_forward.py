"""Retrieve the studies of a day, de-identify a copy of each with dicognito, and store the copies at another node.

The originals stay as received, proven by their manifests. The copies are other instances: other UIDs, other dates,
other bytes. You decide what has to be removed, and check it (PS3.15 Annex E): `clean` below is a starting point, and
does not look at pixels. docs/deidentify.md says what is proven before and after it, and what remains in the copies.

What it reads:

* connection `dicom_default`: the PACS to retrieve from, as type DICOM
* connection `dicom_target`: the node to store the copies at, as type DICOM
* pool `pacs`, with as many slots as each PACS allows associations:
  `airflow pools set pacs 2 'associations of the PACS'` (a task whose pool is missing waits, and no log says so)
* variable `dicom_deidentify_secret`: the new UIDs, IDs, names and dates are derived from it. At least 32 characters;
  anyone who has it can check whether a copy belongs to a patient whose ID they know. Another secret changes all UIDs:
  `airflow variables set dicom_deidentify_secret "$(openssl rand -hex 32)"`
* param `study_date`: `20240115`, `2024-01-15`, `today-1`, or a range as `2024-01-01/2024-01-31`
* param `destination`: the folder of the originals, one of those in the environment variable `DICOM_DESTINATION`,
  absolute paths with commas between them; by default the folder `dicom` in Airflow's home. The copies go to a folder of
  that name with `-deidentified` behind it. The task owns the folder of a study in it, and deletes files in it that do
  not belong to the copy.

dicognito must be installed on the workers: `pip install dicognito`, or the extra `examples`.

The DAG can be cleared and run again safely: originals that are held are not fetched again, the copies get the same UIDs
again, and what the other node has acknowledged is not sent again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

from airflow.sdk import DAG, Param, Variable, task
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.operators.dicom import (
    DicomFindOperator,
    DicomGetOperator,
    DicomStoreOperator,
    DicomVerifyOperator,
)
from airflow_dicom_get.tasks import final_errors

# Whoever triggers a run chooses one of these, and can name no other.
DESTINATIONS = os.environ.get("DICOM_DESTINATION", "").split(",")
if not DESTINATIONS[0]:
    DESTINATIONS = [os.path.expanduser(os.path.join(os.environ.get("AIRFLOW_HOME") or "~/airflow", "dicom"))]
# Beside the originals, never among them.
COPIES = "{{ params.destination }}-deidentified"


def clean(dataset, anonymizer) -> None:
    """De-identify one instance in place. Adapt this function.

    Raise for an instance that must not be sent: neither its study nor any other of the run is forwarded then.
    """
    if dataset.get("BurnedInAnnotation", "NO") != "NO":
        raise ValueError("patient data is burned into its pixels")
    # Private elements may contain anything; dicognito knows only their value representation.
    dataset.remove_private_tags()
    # UIDs, names, IDs, addresses, dates and times. Not descriptions, comments and texts of reports.
    anonymizer.anonymize(dataset)


# What dicognito goes by: any other value representation than that of the dictionary would leave a value as it is.
BY_VR = {"PN": "name", "UI": "UID", "DA": "date", "DT": "date", "TM": "time", "SQ": "sequence"}


def check_vrs(dataset) -> None:
    """Raise if a name, a UID, a date or a time is none by its value representation, also in a sequence."""
    from pydicom.datadict import dictionary_VR

    for element in dataset:
        try:
            usual = dictionary_VR(element.tag)
        except KeyError:  # private elements are removed
            continue
        if usual in BY_VR and usual != element.VR:
            raise ValueError(f"a {BY_VR[usual]} has another value representation")
        for item in element.value if element.VR == "SQ" else ():
            check_vrs(item)


def refuse_links(*folders: Path) -> None:
    """Whoever else may write to the folder of the copies could have others written to, and tidied up."""
    for folder in folders:
        if folder.is_symlink():
            raise AirflowFailException(f"{folder} is a link, which is not followed. Remove it, and clear this task.")


def write(dataset, path) -> bytes:
    """Write a file under a temporary name and rename it, so that files under final names are complete; its content."""
    from airflow_dicom_get.storage.files import replace_whole

    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    content = file.getvalue()
    replace_whole(path, lambda file: file.write(content), temporary=f".{uuid4().hex}.part", private=True)
    return content


def row_of(dataset, path, content) -> dict:
    """The row of a copy in the manifest of the copies: by its digest another file in its place is found out."""
    return {
        "study_instance_uid": dataset.StudyInstanceUID,
        "series_instance_uid": dataset.SeriesInstanceUID,
        "sop_instance_uid": dataset.SOPInstanceUID,
        "sop_class_uid": dataset.SOPClassUID,
        "transfer_syntax_uid": dataset.file_meta.TransferSyntaxUID,
        "state": "stored",
        "uri": Path(path).as_uri(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def tidy_up(folder, written) -> None:
    """Remove the files below a folder that were not written, through no link, whatever is put in its way meanwhile."""
    from airflow_dicom_get.storage.files import disk, files_below

    for path in files_below(folder, lambda name: True, lambda *_: None):
        if path not in written:
            disk.remove(path)


with DAG(
    dag_id="deidentify_and_forward",
    schedule=None,
    catchup=False,
    # Two runs at once would write the same copies.
    max_active_runs=1,
    tags=["dicom"],
    doc_md=__doc__,
    params={
        "study_date": Param(
            "20240115",
            type="string",
            minLength=1,
            title="Study date",
            description="A day, today, today-1, or a range as 2024-01-01/2024-01-31.",
        ),
        "destination": Param(
            DESTINATIONS[0],
            type="string",
            enum=DESTINATIONS,
            title="Folder of the originals",
            description="Below it each study gets a folder named by its UID.",
        ),
    },
    default_args={
        # A retry after a lost connection, a restarted worker or a full disk does only what is missing.
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        # Each task that talks to a PACS has at most one association with it, and so one slot. One pool serves both: its
        # slots are the lower of the two limits.
        "pool": "pacs",
    },
) as dag:
    # One C-FIND. Its output is a list of Items, one for each study, without patient data.
    find = DicomFindOperator(
        task_id="find",
        dicom_conn_id="dicom_default",
        study_date="{{ params.study_date }}",
        # A day without studies is a success: the tasks below are skipped.
        on_empty="return",
    )

    # One task for each study, which succeeds only if the study is held completely. So no copy is made of half a study.
    get = DicomGetOperator.partial(
        task_id="get",
        dicom_conn_id="dicom_default",
        destination="{{ params.destination }}",
        manifest_xcom="reference",
    ).expand(study=find.output)

    @task(max_active_tis_per_dag=2, pool="default_pool")
    def deidentify(manifest, copies: str) -> dict:
        """Copy what a manifest lists, de-identified, and return the manifest of the copies, as a reference."""
        import pandas as pd
        from dicognito.anonymizer import Anonymizer
        from pydicom.config import disable_value_validation
        from pydicom.dataset import FileMetaDataset

        from airflow_dicom_get import combine_manifests, load_manifest
        from airflow_dicom_get.manifest.schema import COLUMNS
        from airflow_dicom_get.notebook import read_instances
        from airflow_dicom_get.storage.files import Below

        # Without a long secret, anyone who knows an original's UID could compute the copy's.
        secret = Variable.get("dicom_deidentify_secret", default="")
        if len(secret) < 32:
            raise AirflowFailException(
                "The variable dicom_deidentify_secret is not set or has fewer than 32 characters. Set it under Admin, "
                "Variables, to a random text that nobody else knows."
            )
        with final_errors():
            # A DataFrame or a reference to a file, whichever the task before returned.
            frame = load_manifest(manifest)
        rows = frame[frame["state"].isin(["stored", "held"])]
        # The same secret gives the same UIDs, for every instance of the study and in every try.
        anonymizer = Anonymizer(seed=secret)
        # Invalid values are common, and what pydicom says of them, in warnings and log, would quote them in the log.
        logging.getLogger("pydicom").setLevel(logging.CRITICAL)
        made, written, folders = [], set(), set()
        for number, row in enumerate(rows.itertuples()):
            try:
                with disable_value_validation(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    # Nothing but this instance, and not by a link out of the destination.
                    (dataset,) = read_instances(rows.iloc[[number]])
                    # Of the original's preamble and file meta information, keep only the transfer syntax.
                    meta = FileMetaDataset()
                    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
                    dataset.file_meta, dataset.preamble = meta, bytes(128)
                    check_vrs(dataset)
                    clean(dataset, anonymizer)
                    study, series, sop = dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID
                    if {study, series, sop} & {row.study_instance_uid, row.series_instance_uid, row.sop_instance_uid}:
                        raise ValueError("the copy has a UID of the original")
                    folder = Below(Path(copies), (study,))
                    path = folder / series / f"{sop}.dcm"
                    refuse_links(Path(folder), Path(path.parent))
                    made.append(row_of(dataset, path, write(dataset, path)))
            except (AirflowFailException, OSError):
                raise  # a link; or, for example, a full disk, which is worth a retry
            except Exception as error:
                # Not the error's own text, nor its traceback: both may quote the patient.
                raise AirflowFailException(
                    f"Instance {row.sop_instance_uid} was not de-identified ({type(error).__name__}), so nothing of "
                    "this run is forwarded. Look at the instance, change `clean`, and clear this task."
                ) from None
            written.add(path)
            folders.add(folder)
        if len(written) != len(rows) or len(folders) != 1:
            raise AirflowFailException(
                f"{len(rows)} instances of one study gave {len(written)} copies in {len(folders)} studies. Nothing is "
                "forwarded."
            )
        (folder,) = folders
        # Left by a killed try, or by an original that the PACS has withdrawn since.
        refuse_links(Path(folder))
        tidy_up(folder, written)
        # What is forwarded is opened below this place, through no link, and is what was written.
        listed = pd.DataFrame(made, columns=COLUMNS)
        listed["source"] = listed["destination"] = Path(copies).as_uri()
        with final_errors():
            return combine_manifests(listed, f"{copies}/_manifests/{folder.names[0]}.parquet")

    copy = deidentify.partial(copies=COPIES).expand(manifest=get.output)

    # Waits until every study of the run is de-identified. Its manifest says for each copy what the other node answered.
    store = DicomStoreOperator.partial(
        task_id="store",
        target_conn_id="dicom_target",
        # Manifest and ledger, by which another run knows what was sent.
        manifest_root=COPIES + "/_forwarded",
        max_active_tis_per_dag=2,
    ).expand(manifest=copy)

    # An acknowledgement is only a promise. This checks what the other node lists.
    confirm = DicomVerifyOperator.partial(
        task_id="confirm",
        destination="dicom://dicom_target",
        # A PACS may need minutes until it lists what it has stored.
        listed_within=timedelta(minutes=10),
        retries=5,
        # Not in the pool of the PACS: it waits for minutes, and has an association for moments of them. What is held
        # meanwhile is a slot of a worker, by at most so many studies at once.
        pool="default_pool",
        max_active_tis_per_dag=8,
    ).expand(manifest=store.output)
