"""References to the files of manifests, as a retrieval returns them to its task."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from airflow_dicom_get.config.destination import FilesystemDestination
from airflow_dicom_get.manifest.files import content_of, manifest_uri, open_manifest, place_of
from airflow_dicom_get.manifest.frames import reference_to
from airflow_dicom_get.manifest.schema import metadata_of
from airflow_dicom_get.records import Written


def reference(uri: str | Path) -> dict[str, Any]:
    """The reference to a manifest file as it lies there now. Raises :class:`ManifestError`."""
    place = place_of(uri)
    assert isinstance(place, FilesystemDestination)
    content = content_of(place)
    file = open_manifest(content, str(uri))
    verdict = metadata_of(file.schema_arrow).get("verdict", "")
    written = Written(file.metadata.num_rows, len(content), hashlib.sha256(content).hexdigest(), verdict)
    return reference_to(manifest_uri(place.path), written)
