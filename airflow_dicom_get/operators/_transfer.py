"""What the operators have in common that move instances: their outcome, their manifest, their end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Asset
from airflow.sdk.definitions.asset import AssetRef
from airflow.sdk.exceptions import AirflowFailException

from airflow_dicom_get.config.checks import Check, Choice, Flag, Parsed, invalid, shown, shown_path
from airflow_dicom_get.config.options import OPTIONS, GetOptions, Options
from airflow_dicom_get.errors import sentences
from airflow_dicom_get.hooks import configuration
from airflow_dicom_get.hooks._errors import final_errors, said_first
from airflow_dicom_get.hooks._task import ENDED, DicomTask
from airflow_dicom_get.operators._lineage import Moved, lineage_of
from airflow_dicom_get.operators._manifests import MODES, Manifest, run_name_of
from airflow_dicom_get.operators._outcome import check_accept, raise_for, summary
from airflow_dicom_get.operators._progress import Progress
from airflow_dicom_get.operators.links import DicomManifestLink
from airflow_dicom_get.result import Result
from airflow_dicom_get.vocabulary import CANCELLED

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

OUTSIDE_WINDOW = ("defer", "fail", "ignore")
ENGINE_OPTIONS = (
    "verify_held", "on_conflict", "adopt", "trust_destination", "checksum", "durable", "ack", "sop_classes",
    "require_exact", "retries", "transfer_syntaxes", "deadlines", "transcript",
)  # fmt: skip
"""Options of the engine that a task may set itself: what a connection says is for all tasks alike."""
DEFAULT_POOL = "default_pool"
_GRACE_SECONDS = 1.0
"""From the word that ends a task to the abort: Airflow kills the process after five."""
_POLL_SECONDS = 0.2


def engine_options_of(verb: type[Options]) -> Check:
    """The check of options of the engine, each alone.

    :param verb: the options that the engine has for what the task does
    """
    return Parsed(lambda option, given: _check_engine_options(given, verb), "a mapping", optional=True)


def _check_engine_options(given: Any, verb: type[Options]) -> Any:
    """Return the options as they are given, since the engine checks them once more, together.

    :raises InvalidOption: one is malformed, or is not for a task to set
    """
    if not isinstance(given, Mapping):
        raise invalid("engine_options", "is not a mapping", 'For example, give {"verify_held": "digest"}.')
    allowed = verb.own(dict.fromkeys(ENGINE_OPTIONS))
    for name, value in given.items():
        if name not in allowed:
            raise invalid(
                "engine_options",
                f"{shown(name)} is not one of them",
                f"They are {', '.join(allowed)}. Limits, hours, titles and TLS belong to the connection.",
            )
        checked = OPTIONS[name].check(name, value)
        if isinstance(checked, Path) and not checked.is_absolute():
            raise invalid(name, f"{shown_path(checked)} is not an absolute path", "Write an absolute path.")
    return given


@dataclass(frozen=True)
class Transfer:
    """One transfer, all of it checked and nothing of it begun."""

    run: Callable[[Progress], list[Result]]
    name: str
    """Of the manifest, below its root."""
    sources: Sequence[str]
    """Where the instances come from: addresses of nodes (``dicom://…``), folders or buckets."""
    destination: str
    conn_id: str | None = None
    """The connection by which manifests are read back."""
    scratch: TemporaryDirectory[str] | None = None
    """Holds ledger and manifest of a transfer that has no root: gone with the task."""
    by_study: bool = True
    """Whether the sources have the studies by their UIDs."""


class TransferOperator(DicomTask):
    """Base of the operators that end with a verdict and a manifest."""

    operator_extra_links = (DicomManifestLink(),)
    phase = "get"
    checks: ClassVar[Mapping[str, Check]] = {
        "associations": OPTIONS["associations"].check,
        "accept": Parsed(lambda option, given: check_accept(given), "verdicts"),
        "strict_forward": Flag(),
        "resume": Flag(),
        "manifest_xcom": Choice(*MODES),
        "outside_window": Choice(*OUTSIDE_WINDOW),
        "engine_options": engine_options_of(GetOptions),
    }

    def __init__(
        self,
        *,
        manifest: Any = None,
        s3_conn_id: str | None = None,
        associations: int = 1,
        accept: Sequence[str] = ("complete",),
        strict_forward: bool = False,
        resume: bool = True,
        manifest_root: str | None = None,
        manifest_xcom: str = "auto",
        outside_window: str = "defer",
        engine_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.manifest = manifest
        self.s3_conn_id = s3_conn_id
        self.associations = self.checked("associations", associations)
        self.accept = self.checked("accept", accept)
        self.strict_forward = self.checked("strict_forward", strict_forward)
        self.resume = self.checked("resume", resume)
        self.manifest_root = manifest_root
        self.manifest_xcom = self.checked("manifest_xcom", manifest_xcom)
        self.outside_window = self.checked("outside_window", outside_window)
        self.engine_options = self.checked("engine_options", engine_options)
        self._moved: Moved | None = None

    def execute(self, context: Context) -> Any:
        """Do the transfer, and return the manifest or a reference to it."""
        return self._transfer(context, first=True)

    def execute_after_window(self, context: Context, event: Any = None) -> Any:
        """Resume when the window of the connection has opened."""
        self.log.info("The window of the node has opened; resuming.")
        return self._transfer(context)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage:
        """Source and destination as datasets, one for each study; called where OpenLineage's provider is installed."""
        return lineage_of(self._moved)

    def prepare(self, context: Context, name: str, ends: float) -> Transfer:
        """Check all that can be checked before any traffic.

        :param name: of the manifest, below its root
        :param ends: ``time.monotonic()`` value at which the engine is to have ended
        """
        raise NotImplementedError

    def _transfer(self, context: Context, *, first: bool = False) -> Any:
        from airflow_dicom_get.engine.report import merge

        with final_errors():
            ends = time.monotonic() + self._seconds()
            self._check_dependants(context)
            transfer = self.prepare(context, run_name_of(context["ti"]), ends)
            if first:
                self._warn_of_limits(context)
            progress = Progress(
                log=self.log,
                store=context.get("task_state_store"),
                interval=configuration.integer("progress_interval"),
                associations=self.associations,
                phase=self.phase,
            )
            with progress, self._ending_soon():
                results = transfer.run(progress)
            if time.monotonic() >= ends and self.execution_timeout is not None:
                self.log.warning(
                    "The execution_timeout of the task (%s) was about to end, so the transfer was stopped in time to "
                    "write its manifest. The next try resumes it; raise execution_timeout if it needs longer.",
                    self.execution_timeout,
                )
            result = merge(results)
            self.log.info("%s.", result.summary())
            for error in result.errors:
                self.log.warning("%d × %s", error["count"], sentences(error["error"], error["hint"] or ""))
            if transfer.scratch is not None:
                for one in results:
                    one.manifest_uri = None
            manifest = Manifest(results, transfer.name, mode=self.manifest_xcom, conn_id=transfer.conn_id)
            self._moved = Moved(
                transfer.sources, transfer.destination, manifest.studies, result, by_study=transfer.by_study
            )
            if transfer.scratch is not None:
                transfer.scratch.cleanup()
        progress.finish("done")
        with said_first():
            refused = next((one for one in (result, *results) if not one.accepted(self.accept)), None)
            return self._end(context, result, refused, manifest, progress)

    @contextmanager
    def _ending_soon(self) -> Iterator[None]:
        """While this lasts, abort what goes on a moment after :meth:`on_kill` asked for its end."""
        over = threading.Event()

        def abort() -> None:
            while not over.wait(_POLL_SECONDS):
                if self._killed:
                    if not over.wait(_GRACE_SECONDS) and self._scu is not None:
                        self._scu.cancel(ENDED)
                    return

        # The handler itself may take no locks, and starting a thread does.
        thread = threading.Thread(target=abort, daemon=True, name="dicom-get-end")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # --- before traffic ----------------------------------------------------------------------------

    def _seconds(self) -> float:
        """How long the engine may run: a little less than the task, to end with a verdict and a manifest."""
        if self.execution_timeout is None:
            return float("inf")
        seconds = self.execution_timeout.total_seconds()
        return seconds - min(10.0, 0.2 * seconds)

    def _check_dependants(self, context: Context) -> None:
        """Refuse what Airflow would fail only after the work: to map over what one task returns."""
        if getattr(context["ti"], "is_mapped", False):
            return
        consumer = next(self.iter_mapped_dependants(), None)
        if consumer is not None:
            raise AirflowFailException(
                f"{consumer.node_id} is mapped over the output of {self.task_id}, which is one manifest, not a list. "
                f"Map {self.task_id} itself: {type(self).__name__}.partial(…).expand(…=[…]); or give its output as it "
                f"is: manifest={self.task_id}.output without expand."
            )

    def _warn_of_limits(self, context: Context) -> None:
        """Say what the DAG leaves to chance; refuse the default pool where the configuration asks for that."""
        if context["ti"].max_tries == 0:
            self.log.warning(
                "retries is 0, so any interruption ends this task. With retries=3, for example, a retry resumes it."
            )
        text = ""
        if self.pool == DEFAULT_POOL:
            text = (
                "This task runs in default_pool, so nothing limits the associations of all tasks to what the PACS "
                "allows. Create a pool with as many slots (airflow pools set pacs 2 '') and set pool='pacs'."
            )
            if configuration.boolean("require_pool"):
                raise AirflowFailException(f"{text} [dicom_get] require_pool is set.")
            most = self.max_active_tis_per_dag
            if most is not None and most * self.associations <= self.hook.config.own.max_associations:
                return
        elif self.pool_slots < self.associations:
            text = (
                f"associations={self.associations} but pool_slots={self.pool_slots}, so the pool {self.pool} counts "
                f"too few associations. Set pool_slots={self.associations}."
            )
        if text and self._speaks_for_the_run(context):
            self.log.warning("%s", text)

    def _speaks_for_the_run(self, context: Context) -> bool:
        """Whether this is the one of the tasks of a run with too wide a pool that says so, and its first try."""
        ti = context["ti"]
        if ti.try_number > 1 or (ti.map_index or 0) > 0:
            return False

        def too_wide(task: Any) -> bool:
            associations = getattr(task, "partial_kwargs", vars(task)).get("associations", 1)
            return task.pool == DEFAULT_POOL or task.pool_slots < associations

        tasks = [
            task for task in self.dag.tasks if issubclass(getattr(task, "operator_class", type(task)), TransferOperator)
        ]
        found = [(task.max_active_tis_per_dag is not None, task.task_id) for task in tasks if too_wide(task)]
        return min(found)[1] == self.task_id

    def one_of(self, *names: str) -> tuple[str, Any]:
        """The one field of these that is given, and its value."""
        given = [name for name in names if self.given(name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none of them is given"
            raise invalid(", ".join(names), what, "Give exactly one. A template may have rendered to nothing.")
        return given[0], self.given(given[0])

    def scratch(self) -> TemporaryDirectory[str]:
        """A temporary folder where there is no root; logs what that means."""
        self.log.warning(
            "There is no manifest_root, so nothing records what was sent: a retry sends all of it again. Give "
            "manifest_root, or set [dicom_get] manifest_root."
        )
        return TemporaryDirectory(prefix="dicom-get-")

    # --- after it ----------------------------------------------------------------------------------

    def _end(
        self, context: Context, result: Result, refused: Result | None, manifest: Manifest, progress: Progress
    ) -> Any:
        """Leave summary and manifest in XCom, whatever the verdict; then succeed, raise or defer.

        :param refused: the result, or the first one of its parts, whose verdicts are not all accepted
        """
        ti = context["ti"]
        told = summary(result, kind=self.phase, manifest=manifest.counts(), try_number=ti.try_number)
        self._push(ti, "summary", told, result)
        value = manifest.value
        if manifest.remark is not None and manifest.problem is None:
            # The last line: a task that takes the reference for a frame counts its keys, and is green.
            self.log.warning("%s", manifest.remark)
        if refused is None and result.resume_at is None and manifest.problem is None:
            self._tell_outlets(context, manifest, result)
            return value
        if self.do_xcom_push:
            self._push(ti, "return_value", value, result)
        if manifest.problem is not None:
            # Where the transfer itself failed, that is the error to see: often the reason for this one too.
            if refused is None:
                raise AirflowFailException(manifest.problem)
            self.log.warning("%s", manifest.problem)
        if result.resume_at is not None and self.outside_window == "defer":
            self._defer(result, progress)
        if result.resume_at is not None and result.verdict != CANCELLED:
            raise AirflowFailException(f"{result.summary()}. outside_window is 'fail'.")
        raise_for(refused or result, self.accept)
        self._tell_outlets(context, manifest, result)
        return value

    def _tell_outlets(self, context: Context, manifest: Manifest, result: Result) -> None:
        """Give the events of the task's assets the reference, the verdict and the counts."""
        for outlet in self.outlets:
            if isinstance(outlet, Asset | AssetRef):
                context["outlet_events"][outlet].extra.update(manifest.extra_of_event(result))

    def _push(self, ti: Any, key: str, value: Any, result: Result) -> None:
        try:
            ti.xcom_push(key, value)
        except Exception as error:
            # A task that was ended from outside may write no more; its own error is the one to see.
            if result.verdict != CANCELLED:
                raise
            self.log.warning("XCom %s could not be written: %s", key, type(error).__name__)

    def _defer(self, result: Result, progress: Progress) -> None:
        from airflow.providers.standard.triggers.temporal import DateTimeTrigger

        assert result.resume_at is not None
        progress.window(result.resume_at)
        self.log.info("The window of the node has closed; the task is deferred until %s.", result.resume_at.isoformat())
        self.defer(trigger=DateTimeTrigger(moment=result.resume_at), method_name="execute_after_window")
