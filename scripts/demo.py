"""Retrieve a day's studies from the embedded PACS through Airflow, and show what came of it.

Everything lies under .demo/. Airflow runs the DAG of dags/retrieve_studies.py in one process (`airflow dags test`),
with an own home and SQLite database; its log goes into a file. Nothing is left running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import demo_home as home
import pyarrow as pa
from pydicom.uid import UID
from rich.console import Console
from rich.table import Table

from airflow_dicom_get.manifest.files import metadata_of, read_table
from airflow_dicom_get.testing.sample_data import STUDY_DATE
from airflow_dicom_get.vocabulary import worst

HELD = {"stored", "held"}
HEAD = 8


def run_dag(console: Console) -> home.DemoError | None:
    """Run the DAG with the PACS behind it; returns what Airflow complains of, if it does."""
    log = home.LOGS / "airflow.log"
    log.unlink(missing_ok=True)
    with home.pacs() as (uri, ready):
        console.print(f"PACS      {ready.removeprefix('PACS ')}")
        environment = home.airflow_environment(
            {"AIRFLOW_CONN_DICOM_DEFAULT": uri, "DICOM_DESTINATION": str(home.RETRIEVED)}
        )
        console.print(f"Airflow   {home.shown(home.AIRFLOW_HOME)}, its log in {home.shown(log)}")
        home.airflow("db", "migrate", environment=environment, log=log)
        console.print(f"DAG       {home.DAG_ID}: the studies of {STUDY_DATE}, one mapped task each …")
        began = time.monotonic()
        conf = json.dumps({"study_date": STUDY_DATE, "destination": str(home.RETRIEVED)})
        try:
            home.airflow("dags", "test", home.DAG_ID, "--conf", conf, environment=environment, log=log, timeout=180)
        except home.DemoError as error:
            return error
        console.print(f"          {time.monotonic() - began:.0f} s")
    return None


def manifests() -> list[tuple[Path, pa.Table]]:
    """The manifests of the run: one for each study, that of its last try."""
    latest: dict[tuple[Path, str], tuple[int, Path]] = {}
    for path in sorted((home.RETRIEVED / "_manifests" / home.DAG_ID).glob("*/get/*.parquet")):
        map_index, _, attempt = path.stem.rpartition("-")
        latest[path.parent, map_index] = max(latest.get((path.parent, map_index), (0, path)), (int(attempt), path))
    return [(path, read_table(path)) for _, path in latest.values()]


def names(table: pa.Table, column: str) -> str:
    """The UIDs that stand in a column, each once and by its name."""
    uids = [UID(value) for value in dict.fromkeys(table[column].to_pylist()) if value]
    return ", ".join(f"private {uid}" if uid.is_private else uid.name.removesuffix(" Storage") for uid in uids)


def size(table: pa.Table) -> int:
    """The bytes of what is held."""
    return sum(filter(None, table["bytes"].to_pylist()))


def held(table: pa.Table) -> str:
    """How many instances are held, of how many."""
    return f"{sum(state in HELD for state in table['state'].to_pylist())} of {table.num_rows}"


def show(console: Console, found: list[tuple[Path, pa.Table]]) -> str:
    """Print verdict, counts and the head of a manifest; returns the verdict of the whole."""
    tables = [table for _, table in found]
    verdicts: list[Any] = [metadata_of(table)["verdict"] for table in tables]
    verdict: str = worst(verdicts)
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    series = len(set(whole["series_instance_uid"].to_pylist()))
    exactness = Counter(filter(None, whole["exactness"].to_pylist()))
    colour = "green" if verdict == "complete" else "red"
    console.print(
        f"\n[bold {colour}]Verdict   {verdict}[/]: {verdicts.count('complete')} of {len(tables)} studies complete"
        f"\nCounts    {held(whole)} instances held and verified, {series} series, {size(whole) / 1e6:.1f} MB"
        f"\nExactness {', '.join(f'{count} {word}' for word, count in exactness.items())}"
        f"\nSyntaxes  {names(whole, 'transfer_syntax_uid')}\n"
    )
    studies = Table("verdict", "proof", "what", "held", "kB", box=None, padding=(0, 2, 0, 0))
    for table, its_verdict in zip(tables, verdicts, strict=True):
        what = names(table, "sop_class_uid")
        evidence = metadata_of(table)["evidence"]
        studies.add_row(its_verdict, evidence, what, held(table), f"{size(table) / 1e3:.0f}")
    console.print(studies)

    path, largest = max(found, key=lambda item: item[1].num_rows)
    columns = ("series_number", "instance_number", "state", "exactness", "bytes", "sha256")
    head = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in largest.slice(0, HEAD).to_pylist():
        # Of digests the beginning is compared.
        row["sha256"] = f"{row['sha256'] or '':.12}…"
        head.add_row(*(str(row[column]) for column in columns))
    console.print(f"\nThe first rows of {home.shown(path)}, some of its {largest.num_columns} columns:")
    console.print(head)
    return verdict


def show_next(console: Console, found: list[tuple[Path, pa.Table]]) -> None:
    """Print where everything lies, and what to try."""
    path, table = max(found, key=lambda item: item[1].num_rows)
    bin_folder = Path(sys.executable).parent
    tool = home.shown(bin_folder / "dicom-get")
    study = table["study_instance_uid"][0].as_py()
    console.print(
        f"\nFiles     {home.shown(home.RETRIEVED)}/<study>/<series>/<instance>.dcm"
        f"\nManifests {home.shown(path.parent)}/"
        "\n\nTry next:"
        "\n  make ui        the same DAG in Airflow's web interface"
        f"\n  {tool} pacs --dir {home.shown(home.PACS_DATA)} --ae-title {home.AE_TITLE}"
        "\n                 that PACS for the shell; then, in another terminal:"
        f"\n  {tool} find {home.AE_TITLE}@127.0.0.1:11112 -k StudyDate={STUDY_DATE}"
        f"\n  {tool} get {home.AE_TITLE}@127.0.0.1:11112 --study {study} --to {home.shown(home.RETRIEVED)}"
        "\n                 fetches nothing: all of it is held. Delete a file, and it fetches that one."
        f"\n  {home.shown(bin_folder / 'python')} -c 'from airflow_dicom_get import read_manifest; "
        f'print(read_manifest("{home.shown(path)}").iloc[0])\'',
        markup=False,
    )


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    # Lines of a log or a pipe are as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    home.end_by_signals()
    try:
        home.make_folders()
        # Each demo begins with nothing held.
        shutil.rmtree(home.RETRIEVED, ignore_errors=True)
        failure = run_dag(console)
        found = manifests()
        verdict = show(console, found) if found else "failed"
        if failure:
            raise failure
        if not found:
            raise home.DemoError(f"No manifest was written; see {home.shown(home.LOGS)}/airflow.log")
        show_next(console, found)
    except KeyboardInterrupt:
        errors.print("\nStopped: nothing is left running.")
        return 130
    except home.DemoError as error:
        errors.print(f"\n{error}", markup=False)
        return 1
    return 0 if verdict == "complete" else 1


if __name__ == "__main__":
    sys.exit(main())
