"""Charts of manifests, drawn with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_dicom_get.errors import printable
from airflow_dicom_get.manifest.frames import load_manifests
from airflow_dicom_get.notebook.frames import latest
from airflow_dicom_get.vocabulary import FETCHED, HELD, NOT_HELD

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_GOOD, _BAD = "#2a6fbb", "#d1495b"
_MOST = 10
_LONGEST = 40
"""Characters of a label."""


def overview(manifest: Any) -> Figure:
    """Draw a manifest: what was received, by modality and day; what is held, study by study; and why the rest is not.

    Parameters
    ----------
    manifest : DataFrame, dict, str or Path, or several of them
        Manifests of any shape. If several runs requested an instance, its last row counts.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError(
            "overview() draws with matplotlib, which is not installed: pip install 'airflow-dicom-get[notebook]'."
        ) from None
    runs = "run_at" in getattr(manifest, "columns", ())
    frame = manifest if runs else load_manifests(manifest)
    now = latest(frame) if runs else frame
    held, bad = now[now["state"].isin(HELD)], now[now["state"].isin(NOT_HELD)]
    studies = now["study_instance_uid"].nunique()
    # pyplot teaches the notebook to show figures; closed, this one is not shown a second time.
    figure = pyplot.figure(figsize=(11, 6.5), layout="constrained", facecolor="white")
    pyplot.close(figure)
    figure.suptitle(
        f"{len(held):,} of {len(held) + len(bad):,} instances held, "
        f"{studies:,} {'study' if studies == 1 else 'studies'}, {_megabytes(held):,.1f} MB"
    )
    handles = [Patch(color=_GOOD, label="held"), Patch(color=_BAD, label="not held")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    axes = figure.subplots(2, 2)
    _draw_modalities(axes[0, 0], held, bad)
    _draw_arrival(axes[0, 1], frame)
    _draw_studies(axes[1, 0], held, bad)
    _draw_reasons(axes[1, 1], bad)
    return figure


def _megabytes(rows: DataFrame) -> float:
    return float(rows["bytes"].sum()) / 1e6


def _draw_modalities(axes: Any, held: DataFrame, bad: DataFrame) -> None:
    import pandas as pd

    axes.set_title("Instances by modality, and size held")
    names = {"held": _plain(held["modality"].fillna("unknown")), "not held": _plain(bad["modality"].fillna("unknown"))}
    counts = pd.DataFrame({what: modality.value_counts() for what, modality in names.items()}).fillna(0)
    if not len(counts):
        _say(axes, "Nothing was listed.")
        return
    counts = counts.sort_values("held")
    sizes = held["bytes"].astype(float).groupby(names["held"]).sum().reindex(counts.index, fill_value=0)
    bars = _stack(axes, counts, list(counts.index))
    axes.bar_label(bars, [f"{size / 1e6:,.1f} MB" for size in sizes], padding=3, fontsize=8)


def _draw_arrival(axes: Any, frame: DataFrame) -> None:
    """By day, or within one where there is only one."""
    came = frame.dropna(subset=["received_at"])
    came = came[came["state"].isin(FETCHED) & came["bytes"].notna()].sort_values("received_at")
    axes.set_title("Received by day (UTC)")
    if not len(came):
        _say(axes, "Nothing was received: it is already there, or missing.")
        return
    when, size = came["received_at"].dt.tz_localize(None), came["bytes"].astype(float) / 1e6
    days = size.groupby(when.dt.normalize()).sum()
    if len(days) > 1:
        axes.bar(days.index.to_numpy(), days.to_numpy(), color=_GOOD)
    else:
        axes.set_title(f"Received on {days.index[0]:%Y-%m-%d} (UTC), in total")
        axes.step(when.to_numpy(), size.cumsum().to_numpy(), where="post", color=_GOOD)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MB")
    axes.tick_params(axis="x", labelrotation=30, labelsize=8)


def _draw_studies(axes: Any, held: DataFrame, bad: DataFrame) -> None:
    """Those with something missing first, the largest ones of the rest."""
    import pandas as pd

    studies = {"held": held["study_instance_uid"], "not held": bad["study_instance_uid"]}
    counts = pd.DataFrame({what: uids.value_counts() for what, uids in studies.items()})
    counts = counts.fillna(0).sort_values(["not held", "held"], ascending=False)
    part = counts.head(_MOST)[::-1]
    more = f", {len(part)} of {len(counts):,}" if len(counts) > len(part) else ""
    axes.set_title(f"Instances by study{more}")
    if not len(part):
        _say(axes, "Nothing was listed.")
        return
    _stack(axes, part, [f"…{uid[-12:]}" if len(uid) > 13 else uid for uid in _plain(part.index)])


def _draw_reasons(axes: Any, bad: DataFrame) -> None:
    axes.set_title("Not held, by reason")
    if not len(bad):
        _say(axes, "All that was listed is held.")
        return
    counts = _plain(bad["reason"].fillna("without a reason")).value_counts()[::-1]
    bars = axes.barh([str(reason) for reason in counts.index], counts.to_numpy(dtype=int), color=_BAD)
    axes.bar_label(bars, padding=3)
    axes.set_xlabel("instances")
    axes.margins(x=0.12)


def _plain(texts: Any) -> Any:
    """Texts that anybody may have written, as labels: short, printable, and no formula between two dollar signs."""
    return texts.map(lambda text: printable(text[:_LONGEST]).replace("\\", "/").replace("$", r"\$"))


def _stack(axes: Any, counts: DataFrame, names: list[str]) -> Any:
    """Bars of what is held and what is not, one behind the other; gives the outer ones."""
    places, held, bad = range(len(counts)), counts["held"].to_numpy(), counts["not held"].to_numpy()
    axes.barh(places, held, color=_GOOD)
    bars = axes.barh(places, bad, left=held, color=_BAD)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_xlabel("instances")
    axes.set_xlim(0, 1.25 * max(held + bad))
    return bars


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
