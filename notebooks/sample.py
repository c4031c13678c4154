"""What the notebooks show where you name nothing of your own: the Airflow of `make ui`, a PACS, a month of manifests.

The PACS is the embedded one of this package, and what it holds is made up: a CT of an ellipsoid with a sphere in it,
sliced along a tilted axis. The month is made up too, by a model of two PACS and 30 nights, and written by the very code
that writes the manifest of a retrieval. Nothing here is of a patient; all of it is the same each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

from airflow_dicom_get.manifest.files import task_run_name, write_manifest
from airflow_dicom_get.manifest.schema import manifest_rows
from airflow_dicom_get.records import Instance
from airflow_dicom_get.testing.pacs import EmbeddedPacs
from airflow_dicom_get.testing.sample_data import make_uid
from airflow_dicom_get.vocabulary import COMPLETE, FAILED, PARTIAL

_KEPT: list[object] = []
"""Folders and servers that live as long as the kernel."""


def folder() -> Path:
    """A new folder, removed when the kernel ends."""
    made = tempfile.TemporaryDirectory(prefix="dicom-get-notebook-")
    _KEPT.append(made)
    return Path(made.name)


# --- an Airflow ------------------------------------------------------------------------------------


def airflow() -> dict[str, str] | None:
    """Address and token of the Airflow that `make ui` runs; None where it does not."""
    home = Path(os.environ.get("DICOM_DEMO_FOLDER") or Path(__file__).parent.parent / ".demo") / "airflow"
    try:
        address = (home / "address").read_text("utf-8").strip()
        password = json.loads((home / "secrets.json").read_text("utf-8"))["password"]
        body = json.dumps({"username": "admin", "password": password}).encode()
        asked = Request(f"{address}/auth/token", body, {"Content-Type": "application/json"})
        with urlopen(asked, timeout=10) as answer:
            return {"base_url": address, "token": json.load(answer)["access_token"]}
    except (OSError, ValueError, KeyError):
        return None


# --- a PACS ----------------------------------------------------------------------------------------

STUDY = make_uid("notebooks: tilted CT")
"""The study that the PACS holds."""
SPHERE_CENTRE, SPHERE_RADIUS = (-40.0, 5.0, 30.0), 22.0
"""Where the sphere of 300 HU is, in mm, in the coordinates of the patient."""


def pacs(*, refuses: int = 0) -> EmbeddedPacs:
    """Start a PACS that holds `STUDY`: two series of one volume, 40 slices across and 24 along it.

    ``refuses`` instances fail when they are asked for, until ``fail`` of the PACS is cleared.
    """
    held = folder()
    # Tilted about the axis from left to right, as a gantry is: no axis of the slices is one of the patient.
    tilt = np.deg2rad(20)
    across = np.array([[1, 0, 0], [0, np.cos(tilt), np.sin(tilt)]])
    along = np.array([[1, 0, 0], [0, 0, -1]])
    _write_series(held, _Series(1, "tilted", across, slices=40, gap=5.0, spacing=(2.0, 2.5), size=(96, 80)))
    _write_series(held, _Series(2, "coronal", along, slices=24, gap=8.0, spacing=(4.0, 4.0), size=(64, 56)))
    server = EmbeddedPacs(held).start()
    server.fail = {make_uid(f"notebooks: tilted {10 + n}") for n in range(refuses)}
    _KEPT.append(server)
    return server


# --- a cohort at a PACS ----------------------------------------------------------------------------

_COHORT = (
    ("CT", 16, 64),
    ("CT", 12, 64),
    ("CT", 18, 64),
    ("CT", 14, 64),
    ("MR", 20, 48),
    ("MR", 18, 48),
    ("CR", 2, 128),
)
"""Studies: modality, slices and their size in pixels. Every second one has the sphere."""
_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage, "CR": ComputedRadiographyImageStorage}


def cohort_pacs(*, refuses: int = 0) -> tuple[EmbeddedPacs, Path]:
    """Start a PACS that holds a cohort of seven small studies, and write the list of it: UIDs and groups in CSV.

    ``refuses`` instances of the fifth study fail when they are asked for, until ``fail`` of the PACS is cleared.
    """
    held = folder()
    lines = ["StudyInstanceUID,Group"]
    for number, (modality, slices, size) in enumerate(_COHORT):
        case = number % 2 == 0
        study = make_uid(f"notebooks: cohort {number}")
        lines.append(f"{study},{'sphere' if case else 'none'}")
        _write_member(held, number, _Series(1, modality, np.eye(3)[:2], slices, 8.0, (3.2, 3.2), (size, size)), case)
    listed = folder() / "cohort.csv"
    listed.write_text("\n".join([*lines, ""]), "utf-8")
    server = EmbeddedPacs(held).start()
    server.fail = {make_uid(f"notebooks: cohort 4 {n}") for n in range(refuses)}
    _KEPT.append(server)
    return server, listed


def _write_member(held: Path, number: int, series: _Series, case: bool) -> None:
    rows, columns = np.mgrid[: series.size[0], : series.size[1]]
    spread = 200 / series.size[0]
    for k in range(series.slices):
        height = 30 + 8.0 * (k - (series.slices - 1) / 2)
        points = np.stack([columns * spread - 100, rows * spread - 100, np.full(rows.shape, height)], axis=-1)
        values = _hounsfield(points)
        if not case:
            values[values == 300] = 0
        ds = _slice(series, points[0, 0], values)
        ds.StudyInstanceUID = make_uid(f"notebooks: cohort {number}")
        ds.SeriesInstanceUID = make_uid(f"notebooks: cohort series {number}")
        ds.SOPInstanceUID = make_uid(f"notebooks: cohort {number} {k}")
        ds.SOPClassUID, ds.Modality = _CLASSES[series.name], series.name
        ds.InstanceNumber = k + 1
        ds.save_as(held / f"{number}-{k:03}.dcm", enforce_file_format=True)


@dataclass(frozen=True)
class _Series:
    """Slices of the phantom: along which axes, how many, and how far apart, in mm."""

    number: int
    name: str
    axes: np.ndarray
    slices: int
    gap: float
    spacing: tuple[float, float]
    size: tuple[int, int]


def spoil(uri: str) -> None:
    """Cut off the end of a file, as a bad disk may."""
    path = Path(unquote(urlsplit(uri).path))
    path.write_bytes(path.read_bytes()[:-2])


def _write_series(held: Path, series: _Series) -> None:
    right, down = series.axes
    rows, columns = np.mgrid[: series.size[0], : series.size[1]]
    middle = down * series.spacing[0] * (series.size[0] - 1) / 2 + right * series.spacing[1] * (series.size[1] - 1) / 2
    plane = rows[..., None] * series.spacing[0] * down + columns[..., None] * series.spacing[1] * right
    for k in range(series.slices):
        corner = np.cross(right, down) * series.gap * (k - (series.slices - 1) / 2) - middle
        ds = _slice(series, corner, _hounsfield(corner + plane))
        # Numbered from the other end, and in no order on disk: only positions tell where a slice belongs.
        ds.InstanceNumber = series.slices - k
        ds.SOPInstanceUID = make_uid(f"notebooks: {series.name} {ds.InstanceNumber}")
        ds.save_as(held / f"{series.number}-{k * 7 % series.slices:03}.dcm", enforce_file_format=True)


def _hounsfield(points: np.ndarray) -> np.ndarray:
    """A body of water with a spine and a sphere in it, and air around it."""
    x, y, z = np.moveaxis(points, -1, 0)
    values = np.zeros(x.shape)
    values[(x / 12) ** 2 + ((y - 42) / 12) ** 2 < 1] = 800
    values[((points - SPHERE_CENTRE) ** 2).sum(axis=-1) < SPHERE_RADIUS**2] = 300
    values[(x / 90) ** 2 + (y / 65) ** 2 + (z / 120) ** 2 >= 1] = -1000
    return values


def _slice(series: _Series, corner: np.ndarray, hounsfield: np.ndarray) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.StudyInstanceUID = STUDY
    ds.SeriesInstanceUID = make_uid(f"notebooks: {series.name}")
    ds.FrameOfReferenceUID = make_uid("notebooks: frame of reference")
    ds.StudyDate, ds.StudyTime = "20260302", "083000"
    ds.PatientName, ds.PatientID = "Sample^Made Up", "SAMPLE-1"
    ds.Modality, ds.SeriesDescription, ds.SeriesNumber = "CT", series.name, series.number
    ds.ImagePositionPatient = [f"{value:.6g}" for value in corner]
    ds.ImageOrientationPatient = [f"{value:.6g}" for value in series.axes.ravel()]
    ds.PixelSpacing, ds.SliceThickness = list(series.spacing), series.gap
    ds.Rows, ds.Columns = series.size
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.PixelData = (hounsfield + 1024).astype("<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


# --- a month ---------------------------------------------------------------------------------------

_FIRST_NIGHT = datetime(2026, 3, 1, 22, 0, tzinfo=UTC)
_NIGHTS = 30
_SYNTAX = "1.2.840.10008.1.2.1"


@dataclass(frozen=True)
class _Kind:
    """Studies of one modality: how they are made up, and their share of all."""

    modality: str
    sop_class: str
    kilobytes: int
    instances: int
    series: int
    share: float


@dataclass(frozen=True)
class _Source:
    """A PACS of the model: how long it thinks about each instance, and how fast its line is."""

    name: str
    thinks_ms: float
    megabytes_per_second: float
    associations: int


_KINDS = (
    _Kind("CT", "1.2.840.10008.5.1.4.1.1.2", 526, 60, 3, 0.40),
    _Kind("MR", "1.2.840.10008.5.1.4.1.1.4", 180, 30, 5, 0.30),
    _Kind("CR", "1.2.840.10008.5.1.4.1.1.1", 7800, 2, 1, 0.20),
    _Kind("MG", "1.2.840.10008.5.1.4.1.1.1.2", 26000, 4, 1, 0.10),
)
_ARCHIVE = _Source("ARCHIVE@10.0.0.5:104", 14, 60, 1)
_CARDIO = _Source("CARDIO@10.0.0.9:11112", 45, 25, 2)


def month() -> Path:
    """Write the manifests of 30 nights of two PACS, with what went wrong in them; gives their folder.

    On most nights all is well, or a second run in the morning fetches the little that is missing. From the 12th to the
    14th one PACS refuses mammograms. On the 20th the window closes before the other is done; it goes on the next day.
    """
    root = folder() / "manifests"
    random = np.random.default_rng(20260301)
    for night in range(_NIGHTS):
        for source in (_ARCHIVE, _CARDIO):
            began = _FIRST_NIGHT + timedelta(days=night)
            rows = [row for number in range(_count(night)) for row in _study(random, source, night, number)]
            _write_run(root, source, began, rows)
            left = [row for row in rows if row.state != "stored"]
            if left:
                later = began + timedelta(hours=23 if left[-1].reason == "window" else 9)
                _write_run(root, source, later, [_again(random, row, later, n) for n, row in enumerate(left)])
    return root


def cohort_csv() -> Path:
    """Write a table as a researcher brings it along, the studies of a cohort by pseudonym and group; gives its path."""
    random = np.random.default_rng(7)
    nights = [(source, night) for source in (_ARCHIVE, _CARDIO) for night in range(_NIGHTS)]
    uids = [_study_uid(source, night, n) for source, night in nights for n in range(_count(night))]
    chosen = [uids[place] for place in sorted(random.choice(len(uids), 90, replace=False))]
    # Three that were never retrieved, and one that stands there twice, as in every real table.
    chosen += [*(make_uid(f"notebooks: elsewhere {n}") for n in range(3)), chosen[10]]
    path = folder() / "cohort.csv"
    pd.DataFrame(
        {
            "pseudonym": [f"P{n + 1:03}" for n in range(len(chosen))],
            "group": random.choice(["case", "control"], len(chosen)),
            "age_band": random.choice(["40-49", "50-59", "60-69", "70-79"], len(chosen)),
            "study_instance_uid": chosen,
        }
    ).to_csv(path, index=False)
    return path


def _study_uid(source: _Source, night: int, number: int) -> str:
    return f"{make_uid('notebooks: ' + source.name)[:24]}.{night + 1}.{number + 1}"


def _count(night: int) -> int:
    """Studies of a night: fewer at weekends."""
    return 2 if (_FIRST_NIGHT + timedelta(days=night)).weekday() >= 5 else 4


def _study(random: np.random.Generator, source: _Source, night: int, number: int) -> Iterator[Instance]:
    """The rows of a study: one every two hours of the night, its series dealt out to the associations."""
    mammogram = number == 0 and source is _ARCHIVE and 11 <= night <= 13
    kind = _KINDS[3 if mammogram else random.choice(len(_KINDS), p=[kind.share for kind in _KINDS])]
    start = _FIRST_NIGHT + timedelta(days=night, hours=2 * number, seconds=4)
    # In the evening the archive is still busy with what the day has left.
    busy = 1 + 1.5 * np.exp(-number)
    clocks = [start.timestamp()] * source.associations
    study = _study_uid(source, night, number)
    for series in range(1, kind.series + 1):
        lane = int(np.argmin(clocks))
        localizer = kind.modality == "CT" and series == 1
        instances = 2 if localizer else max(1, int(kind.instances * random.uniform(0.6, 1.2)))
        for n in range(1, instances + 1):
            row = Instance(study, f"{study}.{series}", f"{study}.{series}.{n}", kind.sop_class)
            row.modality, row.series_number, row.instance_number = kind.modality, series, n
            row.state = "stored"
            if mammogram:
                row.state, row.reason = "failed", "class_refused"
            elif source is _CARDIO and night == 19 and number >= 2:
                row.state, row.reason = "missing", "window"
            elif random.random() < 0.0008:
                row.state, row.reason = "missing", "not_sent"
            elif random.random() < 0.0004:
                row.state, row.reason, row.dimse_status = "failed", "sub_operation_failed", 0xA702
            if row.state == "stored":
                size = int(kind.kilobytes * 1000 * random.normal(1, 0.05))
                seconds = size / 1e6 / source.megabytes_per_second * random.gamma(30, 1 / 30)
                clocks[lane] += random.gamma(4, source.thinks_ms / 4000) * busy + seconds
                _stored(row, size, clocks[lane], seconds, lane + 1)
            yield row


def _again(random: np.random.Generator, row: Instance, began: datetime, place: int) -> Instance:
    """What a later run makes of what one has left: most of it comes, and what is refused stays so."""
    new = Instance(row.study, row.series, row.sop, row.sop_class)
    for name in ("modality", "series_number", "instance_number", "state", "reason", "dimse_status"):
        setattr(new, name, getattr(row, name))
    if row.reason == "window" or (row.reason != "class_refused" and random.random() < 0.7):
        new.state, new.reason, new.dimse_status = "stored", None, None
        kilobytes = next(kind.kilobytes for kind in _KINDS if kind.modality == row.modality)
        _stored(new, kilobytes * 1000, began.timestamp() + 4 + 0.1 * place, 0.03, 1)
    return new


def _stored(row: Instance, size: int, at: float, seconds: float, association: int) -> None:
    row.syntax, row.exactness, row.attempt, row.association = _SYNTAX, "as_listed", 1, association
    row.bytes, row.dataset_offset = size, 376
    row.sha256 = hashlib.sha256(row.sop.encode()).digest()
    row.received_at, row.duration_ms = at, round(seconds * 1000)
    row.where = f"file:///data/dicom/{row.study}/"


def _write_run(root: Path, source: _Source, began: datetime, rows: list[Instance]) -> None:
    """Write the manifest of a run of Airflow where a task writes it: its name says nothing of when that was."""
    name = f"{began:%Y%m%dT%H%M%SZ}-{hashlib.sha256(f'{source.name} {began}'.encode()).hexdigest()[:8]}"
    held = sum(row.state == "stored" for row in rows)
    place = task_run_name(
        dag_id=f"nightly_{source.name.partition('@')[0].lower()}",
        run_id=f"{'scheduled' if began.hour == _FIRST_NIGHT.hour else 'manual'}__{began.isoformat()}",
        task_id="get",
        map_index=0,
        try_number=1,
    )
    write_manifest(
        manifest_rows(rows, source=source.name, destination="/data/dicom"),
        root / f"{place}.parquet",
        verdict=COMPLETE if held == len(rows) else PARTIAL if held else FAILED,
        evidence="list+counts",
        run=name,
    )
