"""A table of series, in the names of the main table of idc-index where they say the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.exports.cohort import Cohort
from airflow_dicom_get.vocabulary import NOT_HELD

if TYPE_CHECKING:
    from pandas import DataFrame

_KEY = ["study_instance_uid", "series_instance_uid"]


def series_table(cohort: Cohort, columns: Sequence[str] = ()) -> DataFrame:
    """One row a series, in the order of the UIDs.

    As there, ``SeriesNumber`` is a text, sizes are in MB of 1,000,000 bytes, and several values stand in one text with
    commas between them; ``series_uri`` is the folder or prefix, or the node that the series was forwarded to.

    Parameters
    ----------
    columns : sequence of str
        Columns of tags to take along.
    """
    import pandas as pd

    rows = cohort.rows.assign(
        missing=cohort.rows["state"].isin(NOT_HELD),
        place=_folders(cohort.rows),
        number=cohort.rows["series_number"].astype("string"),
    )
    held = rows[~rows["missing"]]
    every = rows.groupby(_KEY, dropna=False, sort=True)
    there = held.groupby(_KEY, dropna=False, sort=True)
    table = pd.DataFrame({"missing": every["missing"].sum()})
    table["instanceCount"] = there.size()
    table["bytes"] = there["bytes"].sum()
    for name, column in (("Modality", "modality"), ("SeriesNumber", "number"), *((tag, tag) for tag in columns)):
        table[name] = _texts(rows, column)
    for name, column in (
        ("series_uri", "place"),
        ("sop_class_uids", "sop_class_uid"),
        ("transfer_syntax_uids", "transfer_syntax_uid"),
    ):
        table[name] = _texts(held, column)
    table = table.reset_index().rename(
        columns={"study_instance_uid": "StudyInstanceUID", "series_instance_uid": "SeriesInstanceUID"}
    )
    table["series_size_MB"] = table["bytes"].fillna(0).astype("float64") / 1e6
    for name in ("instanceCount", "missing"):
        table[name] = table[name].fillna(0).astype("Int64")
    ordered: DataFrame = table[[*SERIES_COLUMNS[:-1], *columns, SERIES_COLUMNS[-1]]]
    return ordered


SERIES_COLUMNS = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "SeriesNumber",
    "instanceCount",
    "series_size_MB",
    "series_uri",
    "sop_class_uids",
    "transfer_syntax_uids",
    "missing",
)


def _folders(rows: DataFrame) -> Any:
    """Where the series of each row lies: the folder of its file, or the node that it was forwarded to."""
    folder = rows["uri"].str.replace(r"/[^/]*$", "", regex=True)
    return folder.where(rows["uri"].notna(), "dicom://" + rows["forwarded_to"]).astype("string")


def _texts(rows: DataFrame, column: str) -> Any:
    """The values of each series as one text."""
    pairs = rows[[*_KEY, column]].dropna(subset=[column]).drop_duplicates().sort_values(column)
    return pairs.groupby(_KEY, dropna=False)[column].agg(",".join).astype("string")
