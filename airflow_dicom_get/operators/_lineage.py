"""What a task tells OpenLineage: which studies it took from where, and where they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.destination import ForwardDestination, S3Destination, parse_destination
from airflow_dicom_get.config.node import Node
from airflow_dicom_get.config.options import OPTIONS
from airflow_dicom_get.result import Result

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

MOST_STUDIES = 200
"""Named one by one in an event; with more, node or place are named as a whole."""


@dataclass(frozen=True)
class StudyCounts:
    """What a manifest says of one study."""

    study: str | None
    listed: int
    held: int
    bytes: int


@dataclass(frozen=True)
class Moved:
    """What a task has moved."""

    sources: Sequence[str]
    """Addresses as :func:`dataset_name` takes them."""
    destination: str
    studies: Sequence[StudyCounts]
    result: Result
    by_study: bool = True
    """Whether the sources have the studies by their UIDs."""


def dataset_name(address: str, study: str | None) -> tuple[str, str]:
    """Namespace and name of a study at a place, as OpenLineage names datasets.

    :param address: a path, ``file://``, ``s3://`` or ``dicom://`` address
    :param study: None: all that is there
    """
    place = parse_destination(address)
    below = "" if study is None else f"/{study}"
    if isinstance(place, ForwardDestination):
        node = place.node or Node(str(place.conn_id), 0)
        title = node.ae_title or str(OPTIONS["called_ae_title"].default)
        host = f"[{node.host}]" if ":" in node.host else node.host
        return f"dicom://{host}:{node.port}", f"{title}{below}"
    if isinstance(place, S3Destination):
        return f"s3://{place.bucket}", f"{place.prefix.strip('/')}{below}".strip("/") or "/"
    return "file", f"{str(place.path).rstrip('/')}{below}" or "/"


def lineage_of(moved: Moved | None) -> OperatorLineage:
    """The datasets and facets of what a task has moved; none where it did not come that far."""
    import attr
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import RunFacet, input_statistics_input_dataset, output_statistics_output_dataset

    if moved is None:
        return OperatorLineage()

    @attr.define
    class DicomTransferRunFacet(RunFacet):
        """Verdict and counts."""

        verdict: str = attr.field()
        reason: str | None = attr.field()
        counts: dict[str, int] = attr.field()
        manifest: str | None = attr.field()

    named = moved.studies if len(moved.studies) <= MOST_STUDIES else [_sum(moved.studies)]
    inputs = []
    for source in moved.sources:
        for one in named if moved.by_study else [_sum(moved.studies)]:
            listed = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(fileCount=one.listed)
            namespace, name = dataset_name(source, one.study)
            inputs.append(InputDataset(namespace=namespace, name=name, inputFacets={"inputStatistics": listed}))
    outputs = []
    for one in named:
        if one.held:
            written = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                fileCount=one.held, size=one.bytes
            )
            namespace, name = dataset_name(moved.destination, one.study)
            outputs.append(OutputDataset(namespace=namespace, name=name, outputFacets={"outputStatistics": written}))
    result = moved.result
    facet = DicomTransferRunFacet(
        verdict=result.verdict,
        reason=result.reason,
        counts=result.counts(),
        manifest=result.manifest_uri,
    )
    return OperatorLineage(inputs=inputs, outputs=outputs, run_facets={"dicomTransfer": facet})


def _sum(studies: Sequence[StudyCounts]) -> StudyCounts:
    return StudyCounts(
        None,
        sum(one.listed for one in studies),
        sum(one.held for one in studies),
        sum(one.bytes for one in studies),
    )


def counts_by_study(table: Any) -> list[StudyCounts]:
    """What the rows of a manifest say of each study, in the order of their UIDs."""
    import pyarrow as pa
    from pyarrow import compute

    from airflow_dicom_get.vocabulary import OUTSIDE_LIST, PRESENT

    def is_one_of(states: frozenset[Any]) -> Any:
        return compute.is_in(table["state"], value_set=pa.array(sorted(states)))

    held = is_one_of(PRESENT)
    counted = pa.table(
        {
            "study": table["study_instance_uid"],
            "listed": compute.invert(is_one_of(OUTSIDE_LIST)).cast(pa.int64()),
            "held": held.cast(pa.int64()),
            "bytes": compute.if_else(held, compute.fill_null(table["bytes"].cast(pa.int64()), 0), 0),
        }
    )
    grouped = counted.group_by("study").aggregate([(name, "sum") for name in ("listed", "held", "bytes")])
    return [
        StudyCounts(row["study"], row["listed_sum"], row["held_sum"], row["bytes_sum"])
        for row in grouped.sort_by("study").to_pylist()
        if row["study"]
    ]
