"""Destinations that retrievals over sockets go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airflow_dicom_get.testing.s3_servers import BUCKET, Moto
from airflow_dicom_get.testing.servers import Storescp


@pytest.fixture(params=["folder", "bucket", "node"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A destination of each kind."""
    if request.param == "folder":
        return {"destination": tmp_path / "to"}
    if request.param == "bucket":
        moto: Moto = request.getfixturevalue("moto")
        config = {key: value for key, value in moto.config.items() if key != "bucket"}
        return {"destination": f"s3://{BUCKET}/{tmp_path.name}", "s3_config": config}
    storescp: Storescp = request.getfixturevalue("storescp")
    return {"destination": f"dicom://{storescp.node}", "manifest_root": tmp_path / "state"}
