"""The operator that stores at a DICOM node what was retrieved before."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_dicom_get.config.checks import invalid
from airflow_dicom_get.config.destination import ForwardDestination, S3Destination
from airflow_dicom_get.hooks._destinations import ResolvedDestination, resolve_destination, resolve_root
from airflow_dicom_get.hooks._redaction import shown_manifest
from airflow_dicom_get.operators._manifests import connection_of, load_given, one_table, place_of_objects
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.operators._transfer import Transfer, TransferOperator
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import CANCELLED, FAILED, PARTIAL

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_dicom_get.config.options import Options
    from airflow_dicom_get.store import StoreScu

_WINDOW, _DEADLINE = "window", "deadline"


class DicomStoreOperator(TransferOperator):
    """Store at a DICOM node what a manifest says is held, or what lies in a folder or a bucket.

    Retrieve first, forward later: with the destination's own answer for every instance::

        get = DicomGetOperator.partial(task_id="get", destination="/data/dicom", retries=3).expand(study=find.output)
        DicomStoreOperator.partial(task_id="store", dicom_conn_id="archive").expand(manifest=get.output)

    The task succeeds if the verdict is one of ``accept``. Else another try, which sends only what the node has not
    taken yet, follows where that can help, and none where it cannot.

    :param manifest: manifest of a retrieval, of any shape, or several: the objects that they list (templated)
    :param source: an absolute path or ``s3://[CONN_ID@]bucket/prefix``, in place of a manifest (templated)
    :param dicom_conn_id: the ``dicom`` connection of the node to store at (templated)
    :param s3_conn_id: ``dicom_s3`` or ``aws`` connection of the bucket in which the objects lie; by default the one
        that the address of source or manifest names (templated)
    :param associations: associations that the task uses at a time; give as many ``pool_slots``
    :param accept: verdicts that are a success: ``complete``, ``partial``, ``failed``
    :param resume: skip what the node took before
    :param strict_forward: end at the first instance that the node refuses
    :param manifest_root: absolute path or ``s3://[CONN_ID@]bucket/prefix`` for manifest and ledger; by default
        ``[dicom_get] manifest_root`` (templated)
    :param manifest_xcom: as in ``DicomGetOperator``
    :param outside_window: outside the hours of the connection ``defer`` until they begin, ``fail``, or ``ignore`` them
    """

    template_fields: Sequence[str] = ("manifest", "source", "dicom_conn_id", "s3_conn_id", "manifest_root")
    phase = "store"

    def __init__(
        self,
        *,
        manifest: Any = None,
        source: str | None = None,
        dicom_conn_id: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(manifest=manifest, dicom_conn_id=dicom_conn_id, **kwargs)
        self.source = source

    def shown(self, name: str, value: Any) -> Any:
        """Hide manifests."""
        return shown_manifest(value) if name == "manifest" else value

    def map_label(self) -> str:
        """Name what is stored, without patient data."""
        manifest = self.given("manifest")
        return str(self.source if manifest is None else shown_manifest(manifest))[:200]

    def prepare(self, context: Context, name: str, ends: float) -> Transfer:
        """Look up the connections, and load the manifest."""
        kind, value = self.one_of("manifest", "source")
        objects: ResolvedDestination | None
        given: dict[str, Any]
        if kind == "manifest":
            tables = load_given(value, self.s3_conn_id)
            objects = place_of_objects(tables, self.s3_conn_id or connection_of(value))
            given = {"manifest": one_table(tables)}
        else:
            place = objects = resolve_destination(value, "source", self.s3_conn_id)
            given = {"source": _address(place)}
        root = resolve_root(self.manifest_root, s3_conn_id=self.s3_conn_id)
        buckets = [place for place in (objects, root) if place is not None and place.s3_config is not None]
        if len({place.conn_id for place in buckets}) > 1:
            raise invalid(
                "manifest_root",
                f"is reached by the connection {buckets[1].conn_id}, and the objects by {buckets[0].conn_id}",
                "Give one connection for both.",
            )
        scratch = self.scratch() if root is None else None
        options: dict[str, Any] = {
            "manifest_root": root.destination if root is not None else scratch.name if scratch is not None else None,
            "s3_config": buckets[0].s3_config if buckets else None,
            "strict_forward": self.strict_forward,
            "resume": self.resume,
        }
        hook = self.hook
        hours = hook.options()
        make = partial(hook.get_store_scu, associations=self.associations, **options)
        make()  # what is wrong with the options shows here
        run = partial(self._run, make, given, name, hours, ends)
        return Transfer(run, name, root.conn_id if root is not None else None, scratch)

    # --- traffic -----------------------------------------------------------------------------------

    def _run(
        self, make: Any, given: dict[str, Any], name: str, hours: Options, ends: float, progress: Progress
    ) -> list[Result]:
        window = None if self.outside_window == "ignore" else hours.window
        closes = None
        if window is not None:
            now = datetime.now(UTC)
            closes = window.closes_at(now, hours.timezone)
            if closes is None:
                return [Result(PARTIAL, _WINDOW, resume_at=window.opens_at(now, hours.timezone), transient=True)]
        scu: StoreScu = make(seconds=ends - time.monotonic())
        self._scu = scu
        if self._killed:
            return [Result(CANCELLED)]
        with _until(closes, ends, scu):
            result = scu.store(
                **given,
                on_sub_operation=progress.on_sub_operation,
                on_completed=progress.on_completed,
                on_unusable=self._unusable,
                manifest_name=name,
            )
        if result.verdict == CANCELLED and not self._killed:
            result.verdict, result.transient = PARTIAL if result.completed else FAILED, True
            if result.reason == _WINDOW and window is not None:
                result.verdict, result.resume_at = PARTIAL, window.opens_at(datetime.now(UTC), hours.timezone)
        return [result]

    def _unusable(self, name: str, why: str) -> None:
        self.log.warning("Left out: %s %s", name, why)


@contextmanager
def _until(closes: datetime | None, ends: float, scu: StoreScu) -> Iterator[None]:
    """End the transfer when the hours do, or the time of the task."""
    seconds, reason = ends - time.monotonic(), _DEADLINE
    if closes is not None and (left := (closes - datetime.now(UTC)).total_seconds()) < seconds:
        seconds, reason = left, _WINDOW
    if seconds == float("inf"):
        yield
        return
    timer = threading.Timer(max(seconds, 0), scu.cancel, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _address(place: ResolvedDestination) -> str:
    if isinstance(place.destination, ForwardDestination):
        raise invalid("source", "is a DICOM node", "Give an absolute path, or s3://CONN_ID@bucket/prefix.")
    if isinstance(place.destination, S3Destination):
        return f"s3://{place.destination.bucket}/{quote(place.destination.prefix)}"
    return str(place.destination.path)
