"""Croissant 1.1, the metadata of MLCommons: one record set over the instances, each with its file, digest and UIDs.

The instances stand in a Parquet file beside the metadata, or within them where nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.exports.cohort import Cohort, files_of
from airflow_dicom_get.exports.tables import encoded

if TYPE_CHECKING:
    from pandas import DataFrame

    from airflow_dicom_get.config.options import ExportOptions
    from airflow_dicom_get.exports.writing import Target

VERSION = "http://mlcommons.org/croissant/1.1"
_TABLE = "instances-table"
_FIELDS = (
    ("path", "sc:Text", "File, relative to the destination."),
    ("uri", "sc:Text", "Where the file lay when it was exported."),
    ("sha256", "sc:Text", "SHA-256 of the file."),
    ("bytes", "sc:Integer", "Size of the file."),
    ("study_instance_uid", "sc:Text", "Study Instance UID (0020,000D)."),
    ("series_instance_uid", "sc:Text", "Series Instance UID (0020,000E)."),
    ("sop_instance_uid", "sc:Text", "SOP Instance UID (0008,0018)."),
    ("sop_class_uid", "sc:Text", "SOP Class UID (0008,0016)."),
    ("transfer_syntax_uid", "sc:Text", "Transfer Syntax UID (0002,0010)."),
    ("modality", "sc:Text", "Modality (0008,0060)."),
    ("series_number", "sc:Integer", "Series Number (0020,0011)."),
    ("instance_number", "sc:Integer", "Instance Number (0020,0013)."),
)
_MISSING = ("study_instance_uid", "series_instance_uid", "sop_instance_uid", "reason")
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of the specification."""


def instances(cohort: Cohort, columns: Sequence[str] = ()) -> DataFrame:
    """The table that the record set is over: one row a file."""
    rows: DataFrame = files_of(cohort).rows[[*(name for name, _, _ in _FIELDS), *columns]]
    return rows


def metadata(cohort: Cohort, options: ExportOptions) -> dict[str, Any]:
    """The metadata, with the instances in them."""
    found = _described(cohort, options)
    found["recordSet"][0]["data"] = _records("instances", instances(cohort, options.columns))
    return found


def contents(cohort: Cohort, options: ExportOptions, target: Target) -> list[tuple[str, bytes]]:
    """The Parquet file, and the metadata that name it."""
    name = f"{target.stem}.parquet"
    table = encoded(instances(cohort, options.columns), name)
    found = _described(cohort, options)
    found["distribution"] = [
        {
            "@type": "cr:FileObject",
            "@id": _TABLE,
            "name": name,
            "description": "The instances, one row a file.",
            "contentUrl": name,
            "contentSize": f"{len(table)} B",
            "encodingFormat": "application/x-parquet",
            "sha256": sha256(table).hexdigest(),
        }
    ]
    for field in found["recordSet"][0]["field"]:
        column = field["@id"].partition("/")[2]
        field["source"] = {"fileObject": {"@id": _TABLE}, "extract": {"column": column}}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    return [(name, table), (target.name, f"{text}\n".encode())]


def _described(cohort: Cohort, options: ExportOptions) -> dict[str, Any]:
    """What is said of the data set. What is not given is left out: nothing is made up."""
    said = {
        "name": options.name,
        "description": " ".join(text for text in (options.description, cohort.lack()) if text) or None,
        "license": options.licence,
        "citeAs": options.citation,
    }
    fields = [*_FIELDS, *((name, "sc:Text", "A column of tags of the manifest.") for name in options.columns)]
    key = {"@id": "instances/path"}
    sets = [{**_record_set("instances", "Instances that are held and verified.", fields), "key": key}]
    missing = cohort.missing
    if len(missing):
        what = [(name, "sc:Text", f"{name} of the manifest.") for name in _MISSING]
        lacking = _record_set("missing", "Instances that are listed and not held.", what)
        sets.append({**lacking, "data": _records("missing", missing[list(_MISSING)])})
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        **{name: text for name, text in said.items() if text is not None},
        "recordSet": sets,
    }


def _record_set(name: str, description: str, fields: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "field": [
            {"@type": "cr:Field", "@id": f"{name}/{field}", "name": field, "description": about, "dataType": kind}
            for field, kind, about in fields
        ],
    }


def _records(name: str, rows: DataFrame) -> list[dict[str, Any]]:
    """The rows as the data of a record set."""
    plain = rows.astype(object).where(rows.notna(), None)
    names = {column: f"{name}/{column}" for column in plain.columns}
    records: list[dict[str, Any]] = plain.rename(columns=names).to_dict("records")
    return records
