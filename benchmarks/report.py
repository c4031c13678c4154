"""The report: ``performance.md`` and its plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import matplotlib as mpl
from aims import aims, growth
from clients import Run
from results import CLIENTS, SINGLE, Results, Series

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_NOTES = "<!-- Written by hand from here on; make bench does not change it. -->"
_OURS, _OTHERS, _CONTROL = "#0072b2", "#d55e00", "#767676"
_COLOURS = dict.fromkeys(
    ("warm", "bare", "no_digest", "process", "one", "four", "eight", "forward", "forward_process", "s3", "s3_process"),
    _OURS,
) | {"control": _CONTROL}


def write_report(results: Results, folder: Path) -> Path:
    """Write the data, the plot and the page; notes at the end of an older page stay."""
    page = folder / "performance.md"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    results.save(folder / "performance.json")
    if _compared(results):
        draw(results, folder / "images" / "performance.png")
    old = page.read_text() if page.exists() else ""
    notes = old.partition(_NOTES)[2]
    page.write_text("\n".join([*_page(results), _NOTES, *([f"\n{notes.strip()}"] if notes.strip() else [])]) + "\n")
    return page


def _compared(results: Results) -> list[Series]:
    """What several clients did."""
    return [series for key, series in results.series.items() if key not in SINGLE]


def _page(results: Results) -> Iterator[str]:
    yield "# How fast it is\n"
    yield "Written by `make bench`, which measures this package and other clients in the same run, in turn.\n"
    if results.quick:
        yield "**A quick run on small samples (`--quick`): it proves that the script works, and measures nothing.**\n"
    yield from (f"- {name}: {value}" for name, value in results.about.items())
    if results.skipped:
        yield from (f"- not measured: {what}" for what in results.skipped)
    yield "\n![Wall time of each client from each source](images/performance.png)\n" if _compared(results) else ""
    if not results.quick:
        yield from _aims(results)
    yield "\n## Retrievals\n"
    yield "Wall time in seconds, min / median / max; CPU is user and system time of the client, median.\n"
    for series in _compared(results):
        yield from _table(series)
    yield "## Memory and small things\n"
    yield "| what | runs | wall s | CPU s | peak RSS MB |\n| --- | --- | --- | --- | --- |"
    for key, title in SINGLE.items():
        if (one := results.series.get(key)) is not None:
            words = "" if key in ("help", "small") else f" ({one.words})" if one.size else f" ({one.instances})"
            for client, runs in one.runs.items():
                what = f"{title}{words}{', the same again' if client == 'again' else ''}"
                yield f"| {what} | {len(runs)} | {_spread(runs)} | {one.cpu(client):.2f} | {_peak(runs)} |"
    if (more := growth(results)) is not None:
        yield f"\nEach additional instance takes {more:.2f} KB."
    yield from _profiles(results)
    yield _METHOD


def _aims(results: Results) -> Iterator[str]:
    found = list(aims(results))
    reached = sum(aim.measured is not None and aim.reached for aim in found)
    measured = sum(aim.measured is not None for aim in found)
    yield f"## Aims\n\n{reached} of {measured} reached. Times are medians; memory is the maximum of all runs.\n"
    yield "| aim | limit | measured | |\n| --- | --- | --- | --- |"
    yield from (aim.row for aim in found)


def _table(series: Series) -> Iterator[str]:
    yield f"### From {series.title}\n"
    yield "| client | runs | wall s | MB/s | instances/s | CPU s | peak RSS MB | × tuned getscu |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for client, title in CLIENTS.items():
        if runs := series.runs.get(client):
            wall = median(run.wall for run in runs)
            ratio = series.ratio(client, "tuned")
            yield (
                f"| {title} | {len(runs)} | {_spread(runs)} | {series.instances * series.size / wall / 1e6:.0f}"
                f" | {series.instances / wall:.0f} | {series.cpu(client):.2f} | {_peak(runs)}"
                f" | {'–' if ratio is None else f'{ratio:.2f}'} |"
            )
    yield ""


def _profiles(results: Results) -> Iterator[str]:
    if not results.profiles:
        return
    yield "\n## Where the time goes\n"
    yield (
        "One additional retrieval each by `GetScu` with digest, sync, ledger and manifest, not in the tables above,"
        " with a sampling profiler: every few milliseconds it records the line of the package that each thread is in,"
        " including waits. Shares are of the wall time; threads run in parallel, so the shares add up to more than"
        " 100 %.\n"
    )
    for key, lines in results.profiles.items():
        yield f"### From {results.series[key].title}\n"
        yield "| share | thread | where | line |\n| --- | --- | --- | --- |"
        for line in lines:
            text = str(line["line"]).replace("|", "\\|")
            yield f"| {line['share']:.0%} | {line['thread']} | {line['where']} | `{text}` |"
        yield ""


def _spread(runs: list[Run]) -> str:
    walls = [run.wall for run in runs]
    if len(walls) == 1:
        return f"{walls[0]:.2f}"
    return f"{min(walls):.2f} / {median(walls):.2f} / {max(walls):.2f}"


def _peak(runs: list[Run]) -> str:
    peaks = [run.rss for run in runs if run.rss is not None]
    return f"{max(peaks) / 1e6:.0f}" if peaks else "–"


# --- the plot --------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """One panel a source, one row a client: median, and the range of the runs, on a common logarithmic axis."""
    series = _compared(results)
    heights = [len(one.runs) + 1.2 for one in series]
    figure, panels = plt.subplots(
        len(series), 1, sharex=True, squeeze=False, height_ratios=heights, figsize=(9, 0.27 * sum(heights) + 1)
    )
    for panel, one in zip(panels[:, 0], series, strict=True):
        _draw_panel(panel, one)
    bottom = panels[-1, 0]
    bottom.set_xlabel("wall time, s (logarithmic; dot: median, line: min to max)")
    low, high = bottom.get_xlim()
    bottom.set_xlim(low, high * 1.8)  # room for the last labels
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_panel(panel: Axes, one: Series) -> None:
    clients = [client for client in CLIENTS if client in one.runs]
    for place, client in enumerate(clients):
        walls = [run.wall for run in one.runs[client]]
        colour = _COLOURS.get(client, _OTHERS)
        panel.plot([min(walls), max(walls)], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
        panel.plot(median(walls), place, "o", color=colour, markersize=6)
        label = f"{median(walls):.2f}" if median(walls) < 10 else f"{median(walls):.1f}"
        panel.annotate(
            label, (max(walls), place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_yticks(range(len(clients)), [CLIENTS[client] for client in clients], fontsize=8.5)
    panel.set_ylim(len(clients) - 0.4, -0.6)
    panel.set_title(f"From {one.title}", fontsize=10, loc="left", fontweight="bold")
    panel.grid(axis="x", which="major", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


_METHOD = """
## How it was measured

- *GetScu, warm process*: the time of the call in a process that has imported everything and retrieved once before.
  Digest, sync, ledger and manifest are as by default; *no digest, no sync* is `checksum=None, durable=False`.
- *Whole process*, and all other clients: from before the process is created until it has ended, including the start of
  the interpreter, measured by a launcher that itself uses almost no memory (`benchmarks/launch.py`). The package is
  compiled beforehand, as an installed one is, whatever `PYTHONDONTWRITEBYTECODE` says here.
- *Control*: the time this machine needs to hash and write as many files of that size, while four threads sync them,
  without receiving anything.
- Each run writes into a new, empty folder. Before it, all dirty pages are written (`sync`); after it, exit status,
  verdict, number and size of the files are checked. The clients run in turn, in a different order each round. A page
  cache that has filled the memory slows every write down; it is emptied before each round where the bench may do so
  (see *page cache* above), and what the clients load from disk is loaded again.
- *From memory*: `benchmarks/memory_scp.py`, which sends prepared objects, one write each, and waits for each response.
  All its data sets are labelled CT, including the small ones. *Orthanc* and *dcmqrscp*: Debian's packages, without
  `TCP_NODELAY`, with one generated CT study of four series, loaded by REST and by `dcmqridx`.
- *find_cohort*: what the task asks, by `GetScu` in the warm process over one association, from the embedded PACS, which
  holds a study of one instance for each accession number.
- *20 ms away*: through a relay on the same machine that delays bytes by 10 ms each way.
- *The same again*: the process that finds the study complete in the folder: both lists, the ledger, the files.
- Server and client run on the same machine and use the loopback interface, which has almost no round-trip time.
- *To storescp*: from that dcmqrscp to Debian's storescp, started with `+xa +B`. *To S3*: the gateway of juicefs, which
  is MinIO's, on a folder of the same disk; with a delay, a proxy in Python waits before it passes a request on, and its
  CPU time slows all clients. We have up to 32 requests in progress (`max_concurrency=8`). *boto3 alone* uploads files
  that are already there: its figure does not include retrieving them.
- *getscu* and *pynetdicom* do not hash, sync or verify anything. Because they take long, *getscu as shipped* is run
  once and *pynetdicom* twice; *as shipped*, 5000 instances would take four minutes.
"""
