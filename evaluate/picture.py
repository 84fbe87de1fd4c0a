"""The figures of `bench` as a picture: speed-up over plain decoding by category and drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectool.errors import UsageError, require
from spectool.files import replacing

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind tell apart, without the pale yellow. Hatches
# tell those apart that come after the last.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_HATCHES = ("", "//", "..", "xx")
_GREYS = ("#666666", "#999999", "#CCCCCC")
_LONGEST_NAME = 36


def check_picture(path: Path) -> None:
    """Whether a picture could be drawn and written there, before the long run that it shows.

    Raises:
        UsageError: neither .png nor .svg, or no such folder.
        MissingExtra: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: expected a name that ends with .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    _matplotlib()


def draw(runs: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], path: Path) -> None:
    """A panel for each run of `bench`, with a group of bars for each category and one for all."""
    plots, size = _matplotlib(), (8, 1 + 2.6 * len(runs))
    figure = plots.figure.Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(runs), squeeze=False)[:, 0]
    for panel, run in zip(panels, runs, strict=True):
        _bars(panel, run)
    # The longest list of names: peers run at batch size 1 only.
    handles, labels = max((p.get_legend_handles_labels() for p in panels), key=lambda h: len(h[1]))
    columns = 3 if max(map(len, labels), default=0) <= _LONGEST_NAME // 2 else 2
    style = {"ncols": columns, "frameon": False, "fontsize": 8}
    figure.legend(handles, labels, loc="outside upper center", **style)
    figure.supxlabel(_small_print(runs, machine), fontsize=6, color="#555555")
    # Equal figures give equal bytes: no date, no ids drawn at random.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    with replacing(path) as temporary, plots.rc_context({"svg.hashsalt": "spectool"}):
        figure.savefig(temporary, dpi=200, metadata=metadata)


def _matplotlib() -> Any:
    """With figures alone, which draw by Agg or as SVG: what looks for a display stays out."""
    require("matplotlib.figure", extra="eval", reason="--plot")
    return require("matplotlib", extra="eval", reason="--plot")


def _bars(panel: Any, run: Mapping[str, Any]) -> None:
    groups = [(part["category"], part) for part in run["categories"]]
    groups = [*groups, ("all", run)] if len(groups) > 1 else [("all prompts", run)]
    drafters, baselines = run["drafters"], run["baselines"]
    width = 0.8 / max(1, len(drafters) + len(baselines))
    for at, row in enumerate([*drafters, *baselines]):
        mine = at < len(drafters)
        kind, index = ("drafters", at) if mine else ("baselines", at - len(drafters))
        colours = _COLOURS if mine else _GREYS
        left = at * width - 0.4 + width / 2
        bars = panel.bar(
            [group + left for group in range(len(groups))],
            [part[kind][index]["speedup"] for _, part in groups],
            width * 0.92,
            label=_short(row["name"]),
            color=colours[index % len(colours)],
            hatch=_HATCHES[index // len(colours) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        if len(groups) * (len(drafters) + len(baselines)) <= 24:
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
            panel.bar_label(bars, fmt="%.2f", fontsize=6, padding=2, bbox=paper)
    panel.axhline(1, color="black", linewidth=0.8, zorder=0)
    panel.set_xticks(range(len(groups)), [name for name, _ in groups], fontsize=8)
    panel.set_ylabel("speed-up over plain", fontsize=8)
    panel.set_title(_title(run), fontsize=8, loc="left")
    panel.tick_params(axis="y", labelsize=8)
    panel.tick_params(axis="x", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def _title(run: Mapping[str, Any]) -> str:
    name = Path(str(run["model"])).name or run["model"]
    return f"{name}: {run['runtime']}, batch size {run['batch_size']}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "..." + name[3 - _LONGEST_NAME :]


def _small_print(runs: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    dtypes = ", ".join(sorted({run["dtype"] for run in runs}))
    where = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{where}; {dtypes}; {runs[0]['prompts']} prompts; {versions}"
