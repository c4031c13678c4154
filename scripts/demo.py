"""Retrieve a day's studies from the embedded PACS through Airflow, then half a study from one that calls it Success.

Everything lies under .demo/. Airflow runs the DAG of dags/retrieve_studies.py in one process (`airflow dags test`),
with a home and an SQLite database of its own; its log goes into a file. Nothing is left running. What a run has
retrieved stays there, and the next run fetches nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
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

from airflow_dicom_get.manifest.files import read_table
from airflow_dicom_get.manifest.schema import metadata_of
from airflow_dicom_get.testing.sample_data import STUDY_DATE
from airflow_dicom_get.vocabulary import worst

WAS_THERE = "held"
HELD = {"stored", WAS_THERE}
HEAD = 8
HALF = home.FOLDER / "half"
LIE = "success_partial"
PARTIAL_STATUS = 3


def run_dag(console: Console) -> home.DemoError | None:
    """Run the DAG with the PACS behind it; returns what Airflow complains of, if it does."""
    log = home.LOGS / "airflow.log"
    log.unlink(missing_ok=True)
    with home.pacs() as (node, ready):
        console.print(f"PACS      {ready.removeprefix('PACS ')}")
        environment = home.airflow_environment(
            {"AIRFLOW_CONN_DICOM_DEFAULT": f"dicom://{node}", "DICOM_DESTINATION": str(home.RETRIEVED)}
        )
        console.print(f"Airflow   {home.shown(home.AIRFLOW_HOME)}, its log in {home.shown(log)}")
        if not home.prepared():
            console.print("          creating its database, about 15 s …")
            home.prepare_database(environment, log)
        console.print(f"DAG       {home.DAG_ID}: the studies of {STUDY_DATE}, one mapped task for each, about 20 s …")
        began = time.monotonic()
        conf = json.dumps({"study_date": STUDY_DATE, "destination": str(home.RETRIEVED)})
        try:
            home.airflow("dags", "test", home.DAG_ID, "--conf", conf, environment=environment, log=log, timeout=180)
        except home.DemoError as error:
            return error
        console.print(f"          {time.monotonic() - began:.0f} s")
    return None


def runs() -> set[Path]:
    """The folders with the manifests of each run so far."""
    return set((home.RETRIEVED / "_manifests" / home.DAG_ID).glob("*/get"))


def manifests(folders: set[Path]) -> list[tuple[Path, pa.Table]]:
    """The manifests of a run: one for each study, that of its last try."""
    latest: dict[tuple[Path, str], tuple[int, Path]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.parquet")):
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
    as_held = exactness.pop("as_listed", 0)
    otherwise = "".join(f"; {count} {word}" for word, count in exactness.items())
    before = whole["state"].to_pylist().count(WAS_THERE)
    news = f"{whole.num_rows - before} fetched, {before} already there"
    if before == whole.num_rows:
        news = "all of them already there: nothing was fetched"
    colour = "green" if verdict == "complete" else "red"
    console.print(
        f"\n[bold {colour}]Verdict   {verdict}[/]: {verdicts.count('complete')} of {len(tables)} studies complete"
        f"\nCounts    {held(whole)} instances held and verified, {series} series, {size(whole) / 1e6:.1f} MB; {news}"
        f"\nSyntaxes  {as_held} received in the transfer syntax in which the PACS stores them{otherwise}:"
        f"\n          {names(whole, 'transfer_syntax_uid')}\n"
    )
    studies = Table("verdict", "what", "held", "kB", box=None, padding=(0, 2, 0, 0))
    for table, its_verdict in zip(tables, verdicts, strict=True):
        what = names(table, "sop_class_uid")
        studies.add_row(its_verdict, what, held(table), f"{size(table) / 1e3:.0f}")
    console.print(studies)

    path, largest = max(found, key=lambda item: item[1].num_rows)
    columns = ("series_number", "instance_number", "state", "bytes", "sha256")
    head = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in largest.slice(0, HEAD).to_pylist():
        # Of digests the beginning is compared.
        row["sha256"] = f"{row['sha256'] or '':.12}…"
        head.add_row(*(str(row[column]) for column in columns))
    console.print(f"\nThe first rows of {home.shown(path)}, some of its {largest.num_columns} columns:")
    console.print(head)
    return verdict


def show_half(console: Console) -> bool:
    """Retrieve a study from a PACS that sends half of it and says Success, by getscu and by dicom-get.

    Returns whether dicom-get noticed.
    """
    console.print(
        "\n[bold]Half a study[/]  from a PACS that sends half of what it lists, and counts all as completed"
        f"\n              (dicom-get pacs --misbehave {LIE}):\n"
    )
    shutil.rmtree(HALF, ignore_errors=True)
    tool = Path(sys.executable).parent / "dicom-get"
    with home.pacs(LIE) as (node, ready):
        found = re.search(r"study ([\d.]+)", ready)
        assert found is not None
        study, (host, port) = found[1], node.split(":")
        getscu = dcmtk_getscu()
        if getscu is None:
            console.print("  DCMTK's getscu is not installed; to compare with it: sudo apt-get install dcmtk\n")
        else:
            folder = HALF / "getscu"
            folder.mkdir(parents=True)
            keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"]
            run(console, [getscu, "-S", "-od", home.shown(folder), *keys, host, port])
            console.print(f"  {len(list(folder.iterdir()))} files in {home.shown(folder)}\n")
        return run(console, [str(tool), "get", node, "--study", study, "--to", home.shown(HALF / "dicom-get")]) == (
            PARTIAL_STATUS
        )


def dcmtk_getscu() -> str | None:
    """DCMTK's getscu, if it is installed. In an activated environment pynetdicom's has the same name."""
    own = Path(sys.executable).parent
    folders = [folder for folder in os.get_exec_path() if Path(folder) != own]
    return shutil.which("getscu", path=os.pathsep.join(folders))


def run(console: Console, command: list[str]) -> int:
    """Run a command in the project's folder; print it, what it says and its exit status, which is returned."""
    console.print(f"  $ {shlex.join([Path(command[0]).name, *command[1:]])}", markup=False)
    done = subprocess.run(
        command,
        cwd=home.ROOT,
        stdout=subprocess.PIPE,
        # In the order in which a terminal shows them.
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    for line in done.stdout.splitlines():
        console.print(f"  {line}", markup=False)
    said = "" if done.stdout else ", no output"
    console.print(f"  [bold]exit status {done.returncode}[/]{said}")
    return done.returncode


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
        "\n                 serves the same PACS; then, in another terminal:"
        f"\n  {tool} find {home.AE_TITLE}@127.0.0.1:11112 -k StudyDate={STUDY_DATE}"
        f"\n  {tool} get {home.AE_TITLE}@127.0.0.1:11112 --study {study} --to {home.shown(home.RETRIEVED)}"
        "\n                 fetches nothing, because everything is held; delete a file, and it fetches that one"
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
        before = runs()
        failure = run_dag(console)
        found = manifests(runs() - before)
        verdict = show(console, found) if found else "failed"
        if failure:
            raise failure
        if not found:
            raise home.DemoError(f"No manifest was written; see {home.shown(home.LOGS)}/airflow.log")
        noticed = show_half(console)
        show_next(console, found)
    except KeyboardInterrupt:
        errors.print("\nStopped: nothing is left running.")
        return 130
    except home.DemoError as error:
        errors.print(f"\n{error}", markup=False)
        return 1
    return 0 if verdict == "complete" and noticed else 1


if __name__ == "__main__":
    sys.exit(main())
