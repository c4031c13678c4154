"""Destinations and manifest roots as a DAG names them, with what their connections say in place of the connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.config.destination import (
    Destination,
    FilesystemDestination,
    ForwardDestination,
    S3Destination,
    parse_destination,
)
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.hooks._node_config import NodeConfig, read_node_config

if TYPE_CHECKING:
    from airflow_dicom_get.config.groups import S3Config


@dataclass(frozen=True, slots=True)
class ResolvedDestination:
    """A destination, a manifest root or a source, with what its connection says in place of the connection."""

    destination: Destination
    s3_config: S3Config | None = None
    conn_id: str | None = None
    """The connection by which a bucket is reached."""
    target: NodeConfig | None = None
    """The connection of a node to forward to."""


@dataclass(frozen=True, slots=True)
class Destinations:
    """Where instances go, and where manifests and ledgers."""

    destination: ResolvedDestination
    root: ResolvedDestination | None = None
    """None: below the destination."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``GetScu``."""
        destination, root = self.destination, self.root
        values: dict[str, Any] = {"destination": destination.destination}
        if destination.target is not None:
            values["forward_target"] = destination.target.forward_target()
        if root is not None:
            values["manifest_root"] = root.destination
        config = destination.s3_config or (root.s3_config if root is not None else None)
        if config is not None:
            values["s3_config"] = config
        return values

    @property
    def manifest_conn_id(self) -> str | None:
        """The connection by which manifests are read; None if they lie in a folder."""
        return self.destination.conn_id if self.root is None else self.root.conn_id


def resolve_destination(
    value: Any, option: str, s3_conn_id: str | None = None, *, configured: bool = False
) -> ResolvedDestination:
    """Look up the connection that a destination needs.

    :param value: an absolute path, ``s3://[CONN_ID@]bucket/prefix``, ``dicom://CONN_ID`` or ``dicom://[AE@]host:port``
    :param s3_conn_id: the connection of a bucket whose address names none
    :param configured: whether the configuration names it, not a DAG
    :raises InvalidOption: it is malformed, a relative path, a bucket without a connection, or none of ``[dicom_get]
        allowed_destinations``
    """
    place = parse_destination(check_address(value, option), option)
    if not configured:
        check_allowed(place, option)
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
        return ResolvedDestination(bucket, DicomS3Hook(conn_id).config, conn_id)
    if isinstance(place, ForwardDestination) and place.conn_id is not None:
        target = read_node_config(place.conn_id)
        return ResolvedDestination(ForwardDestination(target.node), target=target)
    return ResolvedDestination(place)


def check_allowed(place: Destination, option: str) -> None:
    """Refuse a place that is none of ``[dicom_get] allowed_destinations``.

    :raises InvalidOption: it is none of these
    """
    if not configuration.is_allowed(place):
        raise invalid(
            option,
            f"{shown_path(place)} is none of [dicom_get] allowed_destinations",
            "Give one of these, or ask the administrator of this Airflow to add it.",
        )


def check_address(value: Any, option: str) -> str:
    """Refuse a relative path: tasks run in a folder that nobody chose, on any worker."""
    text = str(value).strip() if value is not None else ""
    if not text or text == "None":
        raise invalid(option, "is empty, or its template rendered to an empty string", "Give an absolute path.")
    place = parse_destination(text, option)
    relative = isinstance(place, FilesystemDestination) and not place.path.is_absolute()
    if relative or text.startswith("~"):
        raise invalid(
            option, f"{shown(text)} is not an absolute path", "Write it as an absolute path, such as /data/dicom."
        )
    return text


def resolve_destinations(destination: Any, *, manifest_root: Any = None, s3_conn_id: str | None = None) -> Destinations:
    """Look up what destination and manifest root of a retrieval need; see :func:`resolve_destination`."""
    place = resolve_destination(destination, "destination", s3_conn_id)
    forwards = isinstance(place.destination, ForwardDestination)
    root = resolve_root(manifest_root, s3_conn_id=s3_conn_id, configured=forwards)
    if root is not None and place.conn_id and root.conn_id and root.conn_id != place.conn_id:
        raise invalid(
            "manifest_root",
            f"uses the connection {root.conn_id}, but the destination uses {place.conn_id}",
            "Give one connection for both.",
        )
    return Destinations(place, root)


def resolve_root(
    manifest_root: Any, *, s3_conn_id: str | None = None, configured: bool = True
) -> ResolvedDestination | None:
    """What ``manifest_root`` names, or else ``[dicom_get] manifest_root`` where that is asked for."""
    option = "manifest_root"
    ours = manifest_root is None and configured
    if ours:
        option = "[dicom_get] manifest_root"
        manifest_root = configuration.text("manifest_root") or None
    if manifest_root is None:
        return None
    root = resolve_destination(manifest_root, option, s3_conn_id, configured=ours)
    if isinstance(root.destination, ForwardDestination):
        raise invalid(
            option, "a DICOM node cannot hold manifests", "Give an absolute path, or s3://CONN_ID@bucket/prefix."
        )
    return root
