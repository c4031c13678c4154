"""What the calls return: :class:`Result` of a get, :class:`Plan` of a plan, :class:`EchoReport` of an echo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from airflow_dicom_get.errors import IncompleteRetrieval
from airflow_dicom_get.vocabulary import (
    COMPLETE,
    EMPTY,
    MAY_PASS,
    UNVERIFIED,
    Evidence,
    Verdict,
    accepted,
    exit_code,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from airflow_dicom_get.records import Instance, Written


@dataclass(frozen=True, slots=True)
class StudyResult:
    """The numbers of one study of a retrieval, with the meanings of :class:`Result`."""

    study_instance_uid: str
    verdict: Verdict
    reason: str | None = None
    expected: int | None = None
    total: int = 0
    completed: int = 0
    skipped: int = 0
    warning: int = 0
    failed: int = 0
    withdrawn: int = 0
    unexpected: int = 0
    conflicts: int = 0
    bytes: int = 0
    evidence: Evidence = "none"
    plan_at: datetime | None = None


COUNTS: tuple[str, ...] = tuple(
    item.name for item in fields(StudyResult) if item.type == "int" and item.name != "bytes"
)
"""The numbers of instances of a study and of a result, which add up."""

Kind = Literal["get", "store"]


@dataclass(slots=True)
class Result:
    """How a retrieval ended.

    Attributes
    ----------
    verdict : str
        ``complete``, ``partial``, ``unverified``, ``empty``, ``failed`` or ``cancelled``.
    reason : str or None
        Why it is not complete, in one word.
    expected, total : int
        Instances of the last plan (``expected`` is None without a plan; ``total`` is then what was sent).
    completed, skipped, warning : int
        Of these: confirmed at the destination; already there before; stored with a warning.
    failed : int
        ``total`` minus ``completed``.
    withdrawn, unexpected, conflicts : int
        No longer listed; sent but not listed; a different data set is held under the same UIDs.
    bytes : int
        Bytes received.
    associations, rounds : int
        Associations used, and rounds of list and get.
    plan_at : datetime or None
        When the last list was made, in UTC: complete as of then.
    evidence : str
        ``list+counts``, ``list`` or ``none``.
    resume_at : datetime or None
        When it may be resumed, if a window closed.
    errors : list of dict
        At most ten of ``{"error": …, "count": …, "hint": …}``.
    manifest_uri : str or None
        Where the manifest is.
    studies : list of StudyResult
        The same numbers per study.
    transient : bool
        Whether running again can help, decided by the rows that are not held and by what ended the run.
    kind : str
        ``get`` or ``store``: what the texts call it.
    rows : callable
        Gives the manifest as a ``pyarrow.Table`` where there is no file of it.
    """

    verdict: Verdict
    reason: str | None = None
    expected: int | None = None
    total: int = 0
    completed: int = 0
    skipped: int = 0
    warning: int = 0
    failed: int = 0
    withdrawn: int = 0
    unexpected: int = 0
    conflicts: int = 0
    bytes: int = 0
    duration_seconds: float = 0.0
    bytes_per_second: float = 0.0
    associations: int = 0
    rounds: int = 0
    plan_at: datetime | None = None
    evidence: Evidence = "none"
    resume_at: datetime | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    manifest_uri: str | None = None
    node: str | None = None
    destination: str | None = None
    studies: list[StudyResult] = field(default_factory=list)
    kind: Kind = field(default="get", repr=False)
    transient: bool = field(default=False, repr=False)
    rows: Callable[[], Any] | None = field(default=None, repr=False, compare=False)
    written: Written | None = field(default=None, init=False, repr=False, compare=False)
    """The manifest as it was written; None where it was not."""
    _manifest: DataFrame | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def manifest(self) -> DataFrame:
        """The manifest as a DataFrame, loaded on first use.

        Raises
        ------
        ManifestError
            The manifest cannot be read, or none was made.
        """
        if self._manifest is None:
            from airflow_dicom_get.manifest.frames import frame_of, read_manifest

            if self.rows is not None:
                self._manifest = frame_of(self.rows())
            else:
                self._manifest = read_manifest(self.manifest_uri)
        return self._manifest

    @property
    def exit_code(self) -> int:
        """Exit code of the shell."""
        return exit_code(self.verdict, self.reason)

    def accepted(self, accept: Sequence[str]) -> bool:
        """Whether the verdict is one of ``accept``, and so is that of each study that is not complete."""
        return accepted(self.verdict, (study.verdict for study in self.studies), accept)

    def raise_for_verdict(self, accept: Sequence[str] = (COMPLETE,)) -> None:
        """Return if the verdict is one of ``accept``, and so is that of each study that is not complete.

        Raises
        ------
        IncompleteRetrieval
            It is not. The error holds the numbers, and is transient if trying again can help.
        """
        if self.accepted(accept):
            return
        why = f" {self.errors[0]['error']}" if self.errors and not self.total else ""
        raise IncompleteRetrieval(
            f"{self.summary()}.{why}",
            hint=self.hint(),
            verdict=self.verdict,
            reason=self.reason,
            expected=self.expected,
            total=self.total,
            completed=self.completed,
            failed=self.failed,
            conflicts=self.conflicts,
            errors=list(self.errors),
            manifest_uri=self.manifest_uri,
            node=self.node,
            resume_at=self.resume_at,
            transient=self._may_pass(),
        )

    def _may_pass(self) -> bool:
        return self.transient and self.verdict in MAY_PASS

    def hint(self) -> str:
        """What to do about a verdict that is not ``complete``."""
        if self.resume_at is not None:
            return f"It may be resumed at {_iso(self.resume_at)}."
        if self.verdict == EMPTY:
            return "Check the query, and whether the study is at this node."
        if self.verdict == UNVERIFIED and not self.transient:
            return "All that was sent is held, but no list proves that it is all: compare with the source yourself."
        hints = [str(error["hint"]) for error in self.errors if error.get("hint")]
        if self._may_pass() and (self.total or not hints):
            return "Run it again: it resumes, and transfers only what is missing."
        return hints[0] if hints else "The manifest gives the reason for each instance."

    def summary(self) -> str:
        """One line for people: the verdict, its reason and the numbers that matter."""
        reason = f" ({self.reason})" if self.reason else ""
        if not self.total and self.verdict != EMPTY:
            return f"{self.verdict}{reason}: nothing was {'stored' if self.kind == 'store' else 'retrieved'}"
        if self.verdict == EMPTY and not self.total:
            return f"empty{reason}: the query matched nothing"
        if self.kind == "store":
            parts = [f"{self.completed} of {self.total} instances are stored at the node"]
        else:
            listed = "listed" if self.expected is not None else "sent"
            parts = [f"{self.completed} of {self.total} instances {listed} are held"]
        if self.skipped:
            parts.append(f"{self.skipped} already there")
        for count, what in (
            (self.failed, "not stored" if self.kind == "store" else "not held"),
            (self.warning, "with a warning"),
            (self.conflicts, "in conflict"),
            (self.withdrawn, "withdrawn"),
            (self.unexpected, "not listed"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return f"{self.verdict}{reason}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, with ``manifest`` for ``manifest_uri``; absent values are None."""
        return {("manifest" if name == "manifest_uri" else name): _plain(getattr(self, name)) for name in _JSON_FIELDS}

    def counts(self) -> dict[str, int]:
        """The fields that are whole numbers and known."""
        return {name: value for name, value in self.to_json().items() if type(value) is int}

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("node", self.node),
            ("destination", self.destination),
            ("held", f"{self.completed} of {self.total}, {self.skipped} already there"),
            ("not held", self.failed),
            ("withdrawn, not listed, in conflict", f"{self.withdrawn}, {self.unexpected}, {self.conflicts}"),
            (
                "received",
                f"{size_text(self.bytes)} in {self.duration_seconds:.1f} s, {size_text(self.bytes_per_second)}/s",
            ),
            ("evidence", f"{self.evidence}, as of {_iso(self.plan_at)}" if self.plan_at else self.evidence),
            ("manifest", self.manifest_uri),
            *(("error", f"{x.get('count', 1)} × {x.get('error')} {x.get('hint') or ''}") for x in self.errors),
            ("what next", self.hint() if self.verdict != COMPLETE and self.total else None),
        ]
        return html_table(f"{self.verdict}{f' ({self.reason})' if self.reason else ''}", rows)


_JSON_FIELDS = tuple(
    item.name for item in fields(Result) if item.name not in ("transient", "kind", "rows", "written", "_manifest")
)


@dataclass(slots=True)
class Plan:
    """What a get would fetch.

    Attributes
    ----------
    studies : list of str
        Study Instance UIDs that the query resolved to.
    series, instances, held, missing : int
        Series and instances listed; of these, held at the destination and still to fetch.
    classes : dict
        Instances by SOP class UID; None if the source does not list the class.
    contexts, associations : int
        Presentation contexts to propose, and the associations that they need.
    evidence : str
        ``list+counts``, ``list`` or ``none``.
    plan_at : datetime or None
        When the list was made, in UTC.
    errors : list of dict
        What is to be said of the answers: that there may be more, and C-FIND rows that were left out because they
        contradict the query, as ``{"error": …, "count": …, "hint": …}``.
    doubt : str or None
        Why there may be more than is listed: ``list_may_be_cut`` or ``list_contradicted``.
    unknown : list of str
        UIDs of series and instances that the query names, and the source does not list.
    rows : sequence of Instance
        One per instance listed; ``state`` is ``held`` or None.
    """

    node: str
    studies: list[str]
    series: int
    instances: int
    held: int
    missing: int
    classes: dict[str | None, int]
    contexts: int
    associations: int
    evidence: Evidence
    plan_at: datetime | None = None
    destination: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    doubt: str | None = None
    unknown: list[str] = field(default_factory=list)
    rows: Sequence[Instance] = field(default=(), repr=False, compare=False)

    @property
    def frame(self) -> DataFrame:
        """The instances listed as a DataFrame with the columns of the manifest."""
        from airflow_dicom_get.manifest.frames import frame_of
        from airflow_dicom_get.manifest.schema import manifest_table

        return frame_of(manifest_table(self.rows, source=self.node, destination=self.destination or ""))

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, without the rows; a class that is not listed is ``unknown``."""
        values = {item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.name != "rows"}
        values["classes"] = {uid or "unknown": count for uid, count in self.classes.items()}
        return values

    def _repr_html_(self) -> str:
        return html_table(
            f"Plan: {self.missing} of {self.instances} instances to fetch",
            [
                ("node", self.node),
                ("destination", self.destination),
                ("studies, series", f"{len(self.studies)}, {self.series}"),
                ("held", self.held),
                *((f"class {_class_name(uid)}", count) for uid, count in self.classes.items()),
                ("contexts, associations", f"{self.contexts}, {self.associations}"),
                ("evidence", f"{self.evidence}, as of {_iso(self.plan_at)}" if self.plan_at else self.evidence),
                ("doubt", self.doubt),
            ],
        )


@dataclass(slots=True)
class EchoReport:
    """What a node that answered a C-ECHO with success accepts.

    Attributes
    ----------
    round_trip_ms : float
        Time from the C-ECHO request to its response.
    accepted : dict
        Whether the node accepts a service, by its name: ``C-ECHO``, ``C-FIND StudyRoot``, ``C-GET PatientRoot``,
        ``C-STORE`` (of one of the common classes), ….
    max_pdu_length : int
        Largest PDU that the node accepts; 0 means no limit.
    profile : dict
        What a probe found out; None without one.
    """

    node: str
    round_trip_ms: float
    accepted: dict[str, bool]
    implementation_version: str | None = None
    max_pdu_length: int | None = None
    profile: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def _repr_html_(self) -> str:
        return html_table(
            f"{self.node}: answers in {self.round_trip_ms:.1f} ms",
            [
                *((name, "accepted" if yes else "refused") for name, yes in self.accepted.items()),
                ("implementation", self.implementation_version),
                ("maximum PDU length", self.max_pdu_length),
            ],
        )


# --- rendering -------------------------------------------------------------------------------------


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return _iso(value)
    if isinstance(value, StudyResult):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _class_name(uid: str | None) -> str:
    if uid is None:
        return "not told"
    from pydicom.uid import UID

    return str(UID(uid).name)


def html_table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values for a notebook; values that are None are left out."""
    body = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value is not None
    )
    return f"<table><caption style='text-align:left'><b>{escape(title)}</b></caption>{body}</table>"
