"""Destinations and manifest roots as a DAG names them, with what their connections say in place of the connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown
from airflow_dicom_get.config.destination import (
    Destination,
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.config.groups import MAX_PDU_LENGTH, ForwardTarget, Window
from airflow_dicom_get.errors import InvalidOption

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import S3Config
    from airflow_dicom_get.hooks.dicom import DicomHook


@dataclass(frozen=True, slots=True)
class Place:
    """One place, without its connection."""

    destination: Destination
    s3_config: S3Config | None = None
    conn_id: str | None = None
    """The connection by which a bucket is reached."""
    target: DicomHook | None = None
    """The connection of a node to forward to."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where instances go, and where manifests and ledgers."""

    destination: Place
    root: Place | None = None
    """None: below the destination."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``GetScu``."""
        place, root = self.destination, self.root
        values: dict[str, Any] = {"destination": place.destination}
        if place.target is not None:
            values["forward_target"] = forward_target(place.target)
        if root is not None:
            values["manifest_root"] = root.destination
        config = place.s3_config or (root.s3_config if root is not None else None)
        if config is not None:
            values["s3_config"] = config
        return values

    @property
    def manifest_conn_id(self) -> str | None:
        """The connection by which manifests are read; None if they lie in a folder."""
        return self.destination.conn_id if self.root is None else self.root.conn_id


def resolve_place(value: Any, option: str, s3_conn_id: str | None = None) -> Place:
    """Look up the connection that a place needs.

    :param value: an absolute path, ``s3://[CONN_ID@]bucket/prefix``, ``dicom://CONN_ID`` or ``dicom://[AE@]host:port``
    :param s3_conn_id: the connection of a bucket whose address names none
    :raises InvalidOption: it is malformed, a relative path, or a bucket without a connection
    """
    place = parse_destination(check_place(value, option), option)
    if isinstance(place, S3Destination):
        from airflow_dicom_get.hooks.dicom_s3 import DicomS3Hook

        conn_id = place.conn_id or s3_conn_id
        if not conn_id:
            # boto3 would take whatever credentials it finds on the worker.
            raise invalid(
                option,
                f"{shown(str(place))} names no connection",
                f"Give s3_conn_id, or write s3://CONN_ID@{place.bucket}/{place.prefix}.",
            )
        bucket = S3Destination(place.bucket, place.prefix)
        return Place(bucket, DicomS3Hook(conn_id).config, conn_id)
    if isinstance(place, ForwardDestination) and place.conn_id is not None:
        from airflow_dicom_get.hooks.dicom import DicomHook

        hook = DicomHook(place.conn_id)
        return Place(ForwardDestination(hook.node), target=hook)
    return Place(place)


def check_place(value: Any, option: str) -> str:
    """Refuse a relative path: tasks run in a folder that nobody chose, on any worker."""
    text = str(value).strip() if value is not None else ""
    if not text or text == "None":
        raise invalid(option, "is empty, or its template rendered to nothing", "Give an absolute path.")
    place = parse_destination(text, option)
    relative = isinstance(place, FilesystemDestination) and not place.path.is_absolute()
    if relative or text.startswith("~"):
        raise invalid(option, f"{shown(text)} is no absolute path", "Write it from the root, as in /data/dicom.")
    return text


def resolve_places(destination: Any, *, manifest_root: Any = None, s3_conn_id: str | None = None) -> Places:
    """Look up what both places of a retrieval need; see :func:`resolve_place`."""
    place = resolve_place(destination, "destination", s3_conn_id)
    forwards = isinstance(place.destination, ForwardDestination)
    root = resolve_root(manifest_root, s3_conn_id=s3_conn_id, configured=forwards)
    if root is not None and place.conn_id and root.conn_id and root.conn_id != place.conn_id:
        raise invalid(
            "manifest_root",
            f"is reached by the connection {root.conn_id}, and the destination by {place.conn_id}",
            "Give one connection for both.",
        )
    return Places(place, root)


def resolve_root(manifest_root: Any, *, s3_conn_id: str | None = None, configured: bool = True) -> Place | None:
    """The place that ``manifest_root`` names, or else ``[dicom_get] manifest_root`` where that is asked for."""
    option = "manifest_root"
    if manifest_root is None and configured:
        from airflow.sdk.configuration import conf

        option = "[dicom_get] manifest_root"
        manifest_root = (conf.get("dicom_get", "manifest_root", fallback="") or "").strip() or None
    if manifest_root is None:
        return None
    root = resolve_place(manifest_root, option, s3_conn_id)
    if isinstance(root.destination, ForwardDestination):
        raise invalid(
            option, "a DICOM node holds no manifests", "Give an absolute path, or s3://CONN_ID@bucket/prefix."
        )
    return root


# --- another node ----------------------------------------------------------------------------------


def forward_target(hook: DicomHook) -> ForwardTarget:
    """How a connection says that its node is called."""
    _, settings = hook.settings()
    options = hook.options()
    return ForwardTarget(
        calling_ae_title=settings.get("calling_ae_title", ForwardTarget().calling_ae_title),
        max_pdu_length=min(options.max_pdu_length, MAX_PDU_LENGTH),
        tls=options.tls,
    )


@dataclass(frozen=True, slots=True)
class BothWindows(Window):
    """The hours in which two nodes may be used, each in its own time zone."""

    other: Window = field(kw_only=True)
    other_zone: tzinfo = field(kw_only=True)

    def __str__(self) -> str:
        return f"{Window.__str__(self)} and {self.other}"

    def _around(self, moment: datetime, zone: tzinfo) -> list[tuple[datetime, datetime]]:
        spans = []
        for start, end in Window._around(self, moment, zone):
            for other_start, other_end in self.other._around(moment, self.other_zone):
                if max(start, other_start) < min(end, other_end):
                    spans.append((max(start, other_start), min(end, other_end)))
        return sorted(spans)


def both_windows(
    first: Window | None, first_zone: tzinfo, second: Window | None, second_zone: tzinfo, conn_id: str
) -> tuple[Window | None, tzinfo]:
    """The window that holds for both nodes, and the zone to read it in.

    :raises InvalidOption: they never overlap
    """
    if first is None or second is None:
        return (first, first_zone) if second is None else (second, second_zone)
    both = BothWindows(first.start, first.end, other=second, other_zone=second_zone)
    if not both._around(datetime.now(first_zone), first_zone):
        raise InvalidOption(
            f"window: {first} of the source and {second} of the connection {conn_id} never overlap.",
            hint="Mend one of them, or give outside_window='ignore'.",
            option="window",
        )
    return both, first_zone
