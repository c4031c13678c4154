"""Measure this package against other clients, and write docs/performance.md with its plot.

    make bench                                    all of it; takes minutes
    make bench ARGS=--quick                       a small sample, printed only
    make bench ARGS='--runs 3 --only ct,orthanc'  a part

Servers listen for loopback clients only as long as their part lasts. A machine that does something
else at the same time spoils the figures; the load at the start is written into the report.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from clients import Bench, Run
from deliveries import DELAY, Forward, Runs, buckets, missing
from latency import far_away
from report import write_report
from results import CLIENTS, SINGLE, Results, Series
from sources import KIB, MIB, Source, cohort_source, memory_source, pacs_sources

from airflow_dicom_get.testing.servers import Storescp, find_binary

ROOT = Path(__file__).parent.parent
MEMORY = {"ct": (1000, 512 * KIB), "mr": (5000, 7440), "big": (8, 128 * MIB)}
QUICK_MEMORY = {"ct": (20, 512 * KIB), "mr": (50, 7440), "big": (2, 4 * MIB)}
PACS = {"orthanc": "Orthanc", "dcmqrscp": "dcmqrscp"}
PARTS = (*MEMORY, "far", *PACS, "forward", "s3", "s3far", *SINGLE)
SELDOM = {"one": 2, "shipped": 1, "two_steps": 1, "one_by_one": 1, "pynetdicom": 2}
"""How often slow clients are run."""
_HUGE_NEEDS = 9 << 30


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Session:
    """What is to be measured, and what has been."""

    def __init__(self, bench: Bench, results: Results, parts: list[str], runs: int) -> None:
        self.bench, self.results, self.parts, self.runs = bench, results, parts, runs
        self.quick = results.quick

    def memory(self) -> None:
        """Retrievals from memory."""
        for key, (instances, size) in (QUICK_MEMORY if self.quick else MEMORY).items():
            if key in self.parts:
                with memory_source(key, instances, size) as source:
                    # As shipped, 5000 instances would take four minutes, and pynetdicom one.
                    slow = {"ct": ["shipped", "pynetdicom"], "big": ["pynetdicom"]}.get(key, [])
                    fast = ["warm", "process", "tuned"]
                    if not self.quick:
                        fast += ["bare", "no_digest", "control"]
                    self.compare(key, source, self.to_disk([*fast, *slow]))
                    self.results.profiles[key] = self.bench.profile(source)

    def far(self) -> None:
        """Retrievals from memory at a distance, where several associations help."""
        if "far" in self.parts:
            instances, size = QUICK_MEMORY["ct"] if self.quick else MEMORY["ct"]
            with memory_source("far", instances, size) as near, far_away(near) as source:
                counts = {"one": 1, "four": 4, "eight": 8}
                self.compare("far", source, {key: self.bench.over(count) for key, count in counts.items()})

    def pacs(self, folder: Path) -> None:
        """Retrievals from real PACS."""
        names = [name for name in PACS if name in self.parts or (name == "dcmqrscp" and "forward" in self.parts)]
        for name in [name for name in names if find_binary(PACS[name]) is None]:
            self.skip(f"{PACS[name]} (not installed)")
            names.remove(name)
        if names:
            instances, size = QUICK_MEMORY["ct"] if self.quick else MEMORY["ct"]
            say("generating a study, loading it")
            with pacs_sources(folder, names, instances, size) as sources:
                slow = ["pynetdicom"] if self.quick else ["bare", "process", "shipped", "pynetdicom"]
                for source in sources:
                    if source.key in self.parts:
                        self.compare(source.key, source, self.to_disk(["warm", "tuned", *slow]))
                    if source.key == "dcmqrscp" and "forward" in self.parts:
                        self.forward(folder, source)

    def forward(self, folder: Path, source: Source) -> None:
        """Deliveries from one node to another."""
        with Storescp(folder / "storescp", accept_all=True) as target:
            runs = Forward(self.bench, target).runs
            self.compare("forward", source, runs, f"{source.title}, to storescp")

    def buckets(self, folder: Path) -> None:
        """Deliveries to S3."""
        if not {"s3", "s3far"} & set(self.parts):
            return
        if absent := missing(["juicefs", "getscu"]):
            self.skip(f"S3 ({absent} is not installed)")
            return
        instances, size = QUICK_MEMORY["ct"] if self.quick else MEMORY["ct"]
        with memory_source("s3", instances, size) as source, buckets(self.bench, folder / "juicefs") as (near, far):
            with near.files(source):
                if "s3" in self.parts:
                    self.compare("s3", source, near.near(), f"{source.title}, to S3")
            with far.files(source):
                if "s3far" in self.parts:
                    self.compare("s3far", source, far.far(), f"{source.title}, to S3, {DELAY * 1000:.0f} ms a request")

    def singles(self, folder: Path) -> None:
        """One command each: a small study, the help, a cohort, and what takes memory."""
        few, many = (10, 100) if self.quick else (5000, 100_000)
        huge = 8 * MIB if self.quick else 2 << 30
        sets = {"small": (10, 512 * KIB), "tiny": (few, 1000), "many": (many, 1000), "huge": (1, huge)}
        if "help" in self.parts:
            self.results.series["help"] = Series("help", 0, 0, {"process": [self.bench.help() for _ in self.rounds()]})
        if "cohort" in self.parts:
            studies = 20 if self.quick else 5000
            with cohort_source(folder / "cohort", studies) as node:
                taken = [self.bench.cohort(node, studies) for _ in self.rounds()]
            self.results.series["cohort"] = Series("cohort", studies, 0, {"process": taken})
            say(f"{studies} accession numbers: {taken[0].wall:.2f} s")
        for key, (instances, size) in sets.items():
            if key not in self.parts:
                continue
            if size == 2 << 30 and available_memory() < _HUGE_NEEDS:
                self.skip("one instance of 2 GiB (the SCP needs 9 GiB of free memory)")
                continue
            self.empty_page_cache()
            with memory_source(key, instances, size) as source:
                if key == "many":
                    first, again = self.bench.process_and_again(source)
                    runs = {"process": [first], "again": [again]}
                else:
                    rounds = self.rounds() if key == "small" else range(1)
                    runs = {"process": [self.bench.process(source) for _ in rounds]}
            self.results.series[key] = Series(source.title, instances, size, runs)
            say(f"{source.title}: dicom-get {runs['process'][0].wall:.2f} s")

    def to_disk(self, keys: list[str]) -> Runs:
        """Clients that retrieve to disk, by their keys."""
        bench = self.bench
        runs: Runs = {
            "warm": bench.warm,
            "bare": bench.bare,
            "no_digest": bench.no_digest,
            "process": bench.process,
            "tuned": bench.tuned_getscu,
            "shipped": bench.shipped_getscu,
            "pynetdicom": bench.pynetdicom,
            "control": bench.control,
        }
        return {key: runs[key] for key in keys}

    def compare(self, key: str, source: Source, clients: Runs, title: str | None = None) -> None:
        """Run clients by turns; each round begins with another one."""
        title = title or source.title
        if find_binary("getscu") is None:
            self.skip("getscu (not installed)", once=True)
            clients = {name: run for name, run in clients.items() if name not in ("tuned", "shipped", "two_steps")}
        names = list(clients)
        taken: dict[str, list[Run]] = {name: [] for name in names}
        for number in range(self.runs):
            self.empty_page_cache()
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if number < SELDOM.get(name, self.runs):
                    run = clients[name](source)
                    taken[name].append(run)
                    say(f"{title}: {CLIENTS[name]} {run.wall:.2f} s")
        self.results.series[key] = Series(title, source.instances, source.size, taken)

    def empty_page_cache(self) -> None:
        """Begin with an empty page cache, but in a quick run, beside which others may run."""
        if not self.quick:
            self.bench.empty_page_cache()

    def rounds(self) -> range:
        return range(self.runs)

    def skip(self, what: str, *, once: bool = False) -> None:
        if not (once and what in self.results.skipped):
            say(f"not measured: {what}")
            self.results.skipped.append(what)


def available_memory() -> int:
    """Bytes that the system could give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def about(folder: Path, *, quick: bool) -> dict[str, str]:
    """Where, when and with what it is measured."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    release = platform.freedesktop_os_release()
    commit = _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    versions = [
        f"airflow-dicom-get {version('airflow-dicom-get')} ({commit})",
        f"Python {platform.python_version()}",
        f"pynetdicom {version('pynetdicom')}",
        f"pydicom {version('pydicom')}",
        *(
            line.removeprefix("$dcmtk: ").removeprefix("/usr/sbin/").split("$")[0].strip()
            for binary in ("getscu", "Orthanc")
            if (path := find_binary(binary)) and (line := _first_line([path, "--version"]))
        ),
    ]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"`{' '.join(['benchmarks/run.py', *sys.argv[1:]])}`",
        "machine": f"{os.cpu_count()} × {cpu}, {memory:.0f} GiB memory, {_file_system(folder)}",
        "system": f"{release['PRETTY_NAME']}, Linux {platform.release()}",
        "versions": ", ".join(versions),
        "page cache": "as it was"
        if quick
        else "emptied before each round"
        if os.access("/proc/sys/vm/drop_caches", os.W_OK)
        else "not emptied: only root may do so",
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _first_line(command: list[str]) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    except OSError:
        return ""
    return next((line.strip() for line in output.splitlines() if line.strip()), "")


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    path = str(folder.resolve())
    holding = [mount for mount in mounts if os.path.commonpath([path, mount[0]]) == mount[0]]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else "unknown file system"


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[Session, Path]]:
    """A session with its folder and its worker, warmed up."""
    with tempfile.TemporaryDirectory(prefix="dicom-get-bench-", dir=args.folder) as name:
        folder = Path(name)
        results = Results(about(folder, quick=args.quick), quick=args.quick)
        with Bench(folder) as bench:
            with memory_source("warm-up", 20, 64 * KIB) as source:
                bench.warm(source)
                bench.bare(source)
                if not args.quick:
                    bench.process(source)
            yield Session(bench, results, args.only, args.runs), folder


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one run on small samples: shows that the script works")
    parser.add_argument("--runs", type=int, metavar="N", help="runs of each fast client; 5 by default")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="folder for the report; docs, or with --quick none")
    parser.add_argument("--folder", type=Path, help="where to retrieve to; the system's temporary folder by default")
    parser.add_argument("--render", type=Path, metavar="JSON", help="measure nothing, write the report of this file")
    args = parser.parse_args()
    args.runs = args.runs or (1 if args.quick else 5)
    args.only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if args.output is None and not args.quick:
        args.output = ROOT / "docs"
    return args


def measure(args: argparse.Namespace) -> Results:
    """Measure all parts. What is there when one of them fails is kept in a file."""
    start = time.monotonic()
    with prepared(args) as (session, folder):
        try:
            session.memory()
            session.far()
            session.pacs(folder)
            session.buckets(folder)
            session.singles(folder)
        except BaseException:
            handle, kept = tempfile.mkstemp(prefix="dicom-get-bench-", suffix=".json")
            os.close(handle)
            session.results.save(Path(kept))
            say(f"ended early; what was measured is in {kept} (for --render)")
            raise
    session.results.about["took"] = f"{time.monotonic() - start:.0f} s"
    return session.results


def main() -> None:
    """Measure, and write the report."""
    args = parse()
    if args.render:
        results = Results.load(args.render)
    else:
        # Ended by a signal, it takes its servers with it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        results = measure(args)
    with tempfile.TemporaryDirectory() as nowhere:
        page = write_report(results, args.output or Path(nowhere))
        print(page.read_text() if args.output is None else f"written: {page}")


if __name__ == "__main__":
    main()
