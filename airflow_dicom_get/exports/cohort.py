"""What is exported: the newest row of each instance of some manifests, what of it is held, and what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from airflow_dicom_get.config.checks import invalid, shown, shown_path
from airflow_dicom_get.config.destination import FilesystemDestination, S3Destination, parse_destination
from airflow_dicom_get.dicom.uids import is_uid
from airflow_dicom_get.engine.report import has_rows_of_all, verdict_of_manifests
from airflow_dicom_get.errors import InvalidOption, ManifestError, NotProven
from airflow_dicom_get.manifest.files import Room
from airflow_dicom_get.manifest.frames import began, each_of, facts_of, frame_of, newest_rows, one_table, runs_of
from airflow_dicom_get.manifest.schema import COLUMNS
from airflow_dicom_get.sinks.objects import Listed, Named, load_listed
from airflow_dicom_get.vocabulary import (
    ACCEPTABLE,
    COMPLETE,
    NOT_HELD,
    PRESENT,
    READABLE,
    REASONS,
    Verdict,
    accepted,
    noun,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pandas import DataFrame, Series

    from airflow_dicom_get.config.groups import S3Config
    from airflow_dicom_get.sinks.objects import Places

_USED = (
    "study_instance_uid",
    "series_instance_uid",
    "sop_instance_uid",
    "sop_class_uid",
    "transfer_syntax_uid",
    "modality",
    "series_number",
    "instance_number",
    "state",
    "reason",
    "uri",
    "bytes",
    "sha256",
    "dataset_offset",
    "forwarded_to",
    "source",
    "destination",
)
"""The columns that some form has, or the order of the rows and a check of the objects rest on."""
_FROM, _AT, _IN = "manifest", "run_at", "places"
_SHOWN = 10
"""What a message names at most."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Several manifests as one."""

    rows: DataFrame
    """The newest row of each instance that is held or missing; what was withdrawn is of no scope."""
    verdict: Verdict
    numbers: Series
    """The number of the places of each row."""
    places: tuple[Places, ...]
    """Where objects of rows may be opened: see :class:`~airflow_dicom_get.sinks.objects.Listed`."""
    said: Sequence[Verdict] = ()
    """The verdict of each manifest that counts."""
    unlisted: Sequence[int] = ()
    """Which manifests, counted from 1, lack a row here and may be of studies of which they had none."""

    @property
    def held(self) -> DataFrame:
        """What there is an object of, in the order of the UIDs."""
        there = self.rows["state"].isin(PRESENT)
        return self.rows if there.all() else self.rows[there]

    @property
    def missing(self) -> DataFrame:
        """What is listed and not held."""
        missing: DataFrame = self.rows[self.rows["state"].isin(NOT_HELD)]
        return missing

    @property
    def columns(self) -> list[str]:
        """The columns beside those of every manifest: of ``tags``, and labels."""
        return [name for name in self.rows.columns if name not in COLUMNS]

    def lack(self) -> str:
        """What is missing, as a sentence; empty where nothing is."""
        missing = self.missing
        if not len(missing):
            return ""
        reasons = missing["reason"].fillna("no reason").value_counts()
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{len(missing)} of {len(self.rows)} instances are missing ({why}); the verdict is {self.verdict}."

    def doubt(self) -> str:
        """Which manifests may be of studies that they do not name, as a sentence; empty where none may."""
        if not self.unlisted:
            return ""
        which = ", ".join(map(str, self.unlisted[:_SHOWN])) + (", …" if len(self.unlisted) > _SHOWN else "")
        return (
            f"{noun(len(self.unlisted), 'Manifest')} {which} may be of studies without a row: "
            "leave out what a newer retrieval of all of these studies replaces."
        )

    def check_columns(self, wanted: Sequence[str]) -> None:
        """Refuse a column that the manifests do not have. Raises :class:`InvalidOption`."""
        for name in wanted:
            if name not in self.columns:
                has = f"It has {', '.join(self.columns)}." if self.columns else "It has none beside its own."
                raise invalid("columns", f"{shown(name)} is no column of tags of the manifest", has)


def load_cohort(manifests: Any, s3: S3Config | None = None, root: Named | Sequence[Named] | None = None) -> Cohort:
    """Load manifests of any shape, and keep the newest row of each instance.

    The newest is the one of the run that began last; where a manifest does not say when its run began, of the manifest
    that was given last. A manifest of which no row is left no longer counts for the verdict, unless it may be of
    studies that it has no rows of.

    Raises
    ------
    ManifestError
        One cannot be read, or they list nothing.
    """
    given = [run for one in each_of(manifests) for run in _runs_of(one)]
    room = Room()
    listed = [load_listed(one, s3, root, room) for one in given if one is not None]
    parts = [part for one in listed for part in one.parts]
    places = {opened: number for number, opened in enumerate(dict.fromkeys(opened for _, opened in parts))}
    of_each = [number for size, opened in parts for number in repeat(places[opened], size)]
    tables = [one.table for one in listed]
    facts = facts_of(tables, given)
    sizes = [*map(len, tables), *(0 for one in given if one is None)]
    unlisted = {n for n, fact in enumerate(facts) if not sizes[n] or not has_rows_of_all(*fact)}
    rows = _numbered(tables).assign(**{_IN: of_each})
    del listed, tables  # of a large manifest they are most of what is held here
    _give_back()
    rows = newest_rows(rows)
    _give_back()
    left = set(rows[_FROM].unique())
    in_scope = rows["state"].isin(PRESENT | NOT_HELD)
    if not in_scope.any():
        raise ManifestError(
            "The manifests list no instance that is held or missing.",
            hint="Look at the verdict of the retrieval that wrote them.",
        )
    said = [facts[number][0] for number in left | unlisted]
    verdict = verdict_of_manifests(said, bool(rows["state"].isin(NOT_HELD).any()))
    key = ["study_instance_uid", "series_instance_uid", "sop_instance_uid"]
    rows = rows.drop(columns=[_AT, "source", "destination"])
    if not (known := rows["reason"].isin(REASONS) | rows["reason"].isna()).all():  # anybody may have written it
        rows["reason"] = rows["reason"].where(known)
    kept = (rows if in_scope.all() else rows[in_scope]).sort_values(key, kind="stable", ignore_index=True)
    numbers = [number for number, one in enumerate(given, 1) if one is not None]
    named = [numbers[n] for n in sorted(unlisted - left) if n < len(numbers) and facts[n][0] != COMPLETE]
    return Cohort(kept.drop(columns=[_FROM, _IN]), verdict, kept[_IN], tuple(places), said, named)


def _runs_of(manifest: Any) -> Iterator[Any]:
    """The runs in a frame that notebooks read, which has those of many manifests; anything else as it is."""
    if not {"run", _AT, "verdict"} <= set(getattr(manifest, "columns", ())):
        yield manifest
        return
    labels = ["run", _AT, "verdict", *(name for name in ("task_id", "map_index") if name in manifest.columns)]
    from pandas import isna

    for _, rows in manifest.groupby("run", sort=False, dropna=False):
        first = rows.iloc[0]
        frame = rows.drop(columns=labels)
        at = first[_AT]
        frame.attrs = {"verdict": str(first["verdict"]), "run": f"{at:%Y%m%dT%H%M%SZ}" if not isna(at) else ""}
        yield frame


def _numbered(tables: Sequence[pa.Table]) -> DataFrame:
    """The rows of all manifests, with the number of theirs, and the time or the place by which they are ordered."""
    import pandas as pd
    from pyarrow import compute

    if not tables:
        raise invalid("manifests", "names none", "Give a manifest, a reference or an address.")
    frame = frame_of(one_table([_labelled(table, number) for number, table in enumerate(tables)]))
    frame.attrs.clear()
    names, sizes, latest = [], [], []
    for table in tables:
        start = 0
        for name, size in runs_of(table):  # of a manifest that was combined each has its own time
            names.append(name)
            sizes.append(size)
            latest.append(compute.max(table["received_at"].slice(start, size)).value or 0)
            start += size
    runs = began(pd.Series(names, dtype="string"))
    order = list(range(len(runs)))
    if runs.notna().all():
        # The name of a run has seconds, and a second run may begin in the same one: what it received came later.
        order.sort(key=lambda number: (runs[number], latest[number]))
    places = pd.Series(range(len(runs)), index=order).sort_index()
    return frame.assign(**{_AT: places.repeat(sizes).to_numpy()})


def _give_back() -> None:
    """What was needed to read is needed no more: the pool of Arrow would keep it."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _labelled(table: pa.Table, number: int) -> pa.Table:
    import pyarrow as pa

    wanted = [name for name in table.column_names if name in _USED or name not in {*COLUMNS, _FROM, _AT, _IN}]
    return table.select(wanted).append_column(_FROM, pa.array([number] * table.num_rows, pa.int64()))


def check_proof(cohort: Cohort, accept: Sequence[Verdict]) -> None:
    """Refuse what is not complete, unless its verdict and that of each manifest are accepted.

    Raises
    ------
    NotProven
    """
    if cohort.verdict == COMPLETE or accepted(cohort.verdict, cohort.said, accept):
        return
    lacking = sorted({cohort.verdict, *cohort.said} - {COMPLETE, *accept})
    acceptable = all(verdict in ACCEPTABLE for verdict in lacking)
    said = f"The verdict is {cohort.verdict}, and nothing was written.", cohort.lack(), cohort.doubt()
    raise NotProven(
        " ".join(filter(None, said)),
        hint="Retrieve what is missing" + (f", or accept {' and '.join(lacking)}." if acceptable else "."),
        verdict=cohort.verdict,
    )


def check_objects(cohort: Cohort, s3: S3Config | None) -> None:
    """Read every object that is held, and compare its digest.

    Raises
    ------
    NotProven
        One is not there, cannot be read, or is another one.
    S3Error
        A bucket cannot be reached.
    """
    from airflow_dicom_get.config.options import VerifyOptions
    from airflow_dicom_get.manifest.frames import table_of
    from airflow_dicom_get.verify import examine

    held = cohort.held.reindex(columns=list(COLUMNS))
    numbers = cohort.numbers[held.index].sort_values(kind="stable")
    parts = tuple((len(rows), cohort.places[number]) for number, rows in numbers.groupby(numbers))
    found = examine(VerifyOptions.check({"s3_config": s3}), Listed(table_of(held.loc[numbers.index]), parts))
    if found.same:
        return
    what = [str(difference) for difference in found.differences[:_SHOWN]] or [found.uncompared or ""]
    more = f" and {len(found.differences) - _SHOWN} more" if len(found.differences) > _SHOWN else ""
    raise NotProven(
        f"What is stored is not what the manifest says, and nothing was written: {'; '.join(what)}{more}.",
        hint="A get with the manifest that verify writes fetches what is missing or different.",
        verdict=cohort.verdict,
    )


# --- where it lies ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a cohort, below one place."""

    rows: DataFrame
    """Of the files alone, with a column ``path``: relative to the place."""
    place: FilesystemDestination | S3Destination


def files_of(cohort: Cohort) -> Files:
    """The files of a cohort by their paths relative to the destination.

    Raises
    ------
    ManifestError
        There is no file of something that is held, it has no digest, its row is malformed, or the files lie in several
        places.
    """
    held = cohort.held
    _refuse(
        held, ~held["state"].isin(READABLE), "was forwarded to a node, and has no file", "Export `series` or `omop`."
    )
    _refuse(
        held,
        ~held["sha256"].fillna("").str.fullmatch(r"[0-9a-f]{64}").astype(bool),
        "has no digest in the manifest",
        "Verify it, and export the manifest that verify writes; retrieve with a checksum.",
    )
    path = paths_of(held)
    places = roots_of(held, path)
    _refuse(held, places.isna(), "lies at a place that is not of our layout", "Give a manifest that a get wrote.")
    roots = sorted(places.unique())
    if len(roots) > 1:
        raise ManifestError(
            f"The files lie in {len(roots)} places: {', '.join(map(shown_path, roots[:_SHOWN]))}.",
            hint="Export each place by itself.",
        )
    if not roots:
        raise ManifestError("Nothing of it is held, so there is no file.", hint="Retrieve it first.")
    place = parse_destination(roots[0], "uri")
    assert isinstance(place, FilesystemDestination | S3Destination)
    return Files(held.assign(path=path), place)


def paths_of(rows: DataFrame) -> Series[str]:
    """Where an instance lies below its destination.

    Raises
    ------
    ManifestError
        A UID is malformed: it is no part of a path.
    """
    for name in ("study_instance_uid", "series_instance_uid", "sop_instance_uid"):
        uids = rows[name].unique()
        bad = [uid for uid in uids if not (isinstance(uid, str) and is_uid(uid))]
        if bad:
            raise ManifestError(
                f"{shown(bad[0])} in the column {name} of the manifest is not a valid UID.",
                hint="Find out who wrote this manifest.",
            )
    return rows["study_instance_uid"] + "/" + rows["series_instance_uid"] + "/" + rows["sop_instance_uid"] + ".dcm"


def roots_of(rows: DataFrame, paths: Series[str]) -> Series[str]:
    """The place in which each file lies by its path; null where its address says another path, or none."""
    import pandas as pd

    found, known = [], {}
    for uri, path in zip(rows["uri"], paths, strict=True):
        fits = isinstance(uri, str) and uri.endswith(f"/{path}")
        root = uri[: -len(path) - 1] if fits else None
        if root not in known:
            known[root] = root if root is not None and _is_place(root) else None
        found.append(known[root])
    return pd.Series(found, index=rows.index, dtype="string")


def _is_place(root: str) -> bool:
    try:
        place = parse_destination(root, "uri")
    except InvalidOption:
        return False
    return isinstance(place, S3Destination) or (isinstance(place, FilesystemDestination) and place.path.is_absolute())


def _refuse(rows: DataFrame, bad: Any, what: str, hint: str) -> None:
    """Refuse what is held and cannot stand in a list of files."""
    wrong = rows.loc[bad.to_numpy(), "sop_instance_uid"]
    if len(wrong):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ManifestError(f"The {noun(1, 'instance')} {shown(wrong.iloc[0])}{more} {what}.", hint=hint)
