"""Picture of a training's curve: the loss of each step, and each held-out metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectool.picture import COLOURS, make_figure, save, style

# Values of a metric at a step: one, or one for each head.
Points = list[tuple[int, list[float | None]]]


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draw a panel for the loss and one for each held-out metric in a file of metrics."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()[1:]]
    curves: dict[str, Points] = {}
    for line in lines:
        found = {"loss": line["loss"]} if "loss" in line else {}
        held_out = line.get("held_out", {}).items()
        found |= {f"held-out {name}": v for name, v in held_out if name not in ("step", "score")}
        for name, value in found.items():
            values = value if isinstance(value, list) else [value]
            # The calibration of an acceptance head is a table.
            if any(isinstance(each, dict) for each in values):
                continue
            curves.setdefault(name.replace("_", " "), []).append((line["step"], values))
    with style():
        figure = make_figure(6, 0.4 + 1.8 * len(curves))
        panels = figure.subplots(len(curves), squeeze=False, sharex=True)[:, 0]
        for panel, (name, points) in zip(panels, curves.items(), strict=True):
            _draw_panel(panel, name, points)
        panels[-1].set_xlabel("step")
        save(figure, picture)


def _draw_panel(panel: Any, name: str, points: Points) -> None:
    """Draw the curves of a metric; what was not finite is stored as null and leaves a gap."""
    steps = [step for step, _ in points]
    for number, series in enumerate(zip(*(values for _, values in points), strict=True)):
        panel.plot(
            steps,
            [float("nan") if value is None else value for value in series],
            color=COLOURS[number % len(COLOURS)],
            linewidth=1,
            marker="" if name == "loss" else "o",
            markersize=3,
            label=f"head {number + 1}",
        )
    if len(points[0][1]) > 1:
        panel.legend()
    panel.set_ylabel(name)
