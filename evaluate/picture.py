"""Chart of a `bench` result: speed-up over plain decoding by category and drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectool.evaluate.bench import Part, Run
from spectool.picture import COLOURS, INK, MUTED, PAPER, SMALL, make_figure, save, style

# When the colours repeat, hatches distinguish the bars.
_HATCHES = ("", "//", "..", "xx")
_GREYS = ("#666666", "#999999", "#CCCCCC")
_LONGEST_NAME = 36


def draw(runs: Sequence[Run], machine: Mapping[str, Any], path: Path) -> None:
    """Draw a panel per run of `bench`, with a group of bars per category and one for all."""
    with style():
        figure = make_figure(8, 1 + 2.6 * len(runs))
        panels = figure.subplots(len(runs), squeeze=False)[:, 0]
        for panel, run in zip(panels, runs, strict=True):
            _bars(panel, run)
        # The panel with the most names has them all: baselines run at batch size 1 only.
        named = (panel.get_legend_handles_labels() for panel in panels)
        handles, labels = max(named, key=lambda found: len(found[1]))
        columns = 3 if max(map(len, labels), default=0) <= _LONGEST_NAME // 2 else 2
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        figure.supxlabel(_small_print(runs, machine), fontsize=SMALL - 1, color=MUTED)
        save(figure, path)


def _bars(panel: Any, run: Run) -> None:
    groups: list[tuple[str | None, Part]] = [(part.category, part) for part in run.categories]
    groups = [*groups, ("all", run)] if len(groups) > 1 else [("all prompts", run)]
    width = 0.8 / max(1, len(run.rows) - 1)
    for number, row in enumerate(run.rows[1:]):
        is_drafter = number < len(run.drafters)
        index = number if is_drafter else number - len(run.drafters)
        colours = COLOURS if is_drafter else _GREYS
        left = number * width - 0.4 + width / 2
        bars = panel.bar(
            [group + left for group in range(len(groups))],
            [part.rows[1 + number].speedup for _, part in groups],
            width * 0.92,
            label=_short(row.name),
            color=colours[index % len(colours)],
            hatch=_HATCHES[index // len(colours) % len(_HATCHES)],
            edgecolor=PAPER,
            linewidth=0,
        )
        if len(groups) * (len(run.rows) - 1) <= 24:
            background = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.4}
            panel.bar_label(bars, fmt="%.2f", fontsize=SMALL, padding=2, bbox=background)
    panel.axhline(1, color=INK, linewidth=0.8, zorder=0)
    panel.set_xticks(range(len(groups)), [name for name, _ in groups])
    panel.set_ylabel("speed-up over plain")
    name = Path(run.model).name or run.model
    title = f"{name}: {run.runtime}, batch size {run.batch_size}"
    panel.set_title(title)
    panel.tick_params(axis="x", length=0)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "..." + name[3 - _LONGEST_NAME :]


def _small_print(runs: Sequence[Run], machine: Mapping[str, Any]) -> str:
    dtypes = ", ".join(sorted({run.dtype for run in runs}))
    where = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{where}; {dtypes}; {runs[0].prompts} prompts; {versions}"
