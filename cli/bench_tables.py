"""The tables that `spectool bench` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]


def table(runs: Sequence[Metrics]) -> Any:
    """One model's runs, with a row for each batch size, category and drafter."""
    several = len(runs) > 1
    by_category = any(len(run["categories"]) > 1 for run in runs)
    with_baselines = any(run["baselines"] for run in runs)
    made = _empty(
        *["batch"] * several,
        *["category"] * by_category,
        "drafter",
        "tok/s",
        "speed-up",
        *["over\ngenerate", "over\nlookup"] * with_baselines,
        "tokens/\nforward",
        "accepted",
        "prompt/\ndraft/\nhost",
        "identical",
    )
    for run in runs:
        parts = [*run["categories"], {"category": "all", **run}] if by_category else [run]
        for part in parts:
            for row in (part["baseline"], *part["drafters"], *part["baselines"]):
                made.add_row(
                    *[str(run["batch_size"])] * several,
                    *[part.get("category")] * by_category,
                    row["name"] + ("" if row["lossless"] else " (lossy)"),
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['speedup']:.2f}",
                    *_over(row) * with_baselines,
                    f"{row['tokens_per_forward']:.2f}",
                    f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "-",
                    _split(row),
                    "-" if row["identical"] is None else f"{row['identical']}/{row['prompts']}",
                )
            if by_category or several:
                made.add_section()
    return _whole(made)


def chains(run: Metrics, deepest: int) -> Any:
    """Tokens per forward of every drafter's first paths, a column a depth."""
    made = _empty("drafter", *(f"chain of {depth}" for depth in range(1, deepest + 1)))
    for row in run["drafters"]:
        made.add_row(row["name"], *(f"{rate:.2f}" for rate in row.get("chain", [])))
    return _whole(made)


def comparison(runs: Sequence[Metrics]) -> Any:
    """The best of every run beside plain decoding of the reference, the last model, as batched."""
    several = len({run["batch_size"] for run in runs}) > 1
    made = _empty(
        "runs", *["batch"] * several, "plain tok/s", "best tok/s", "drafter", "of the reference"
    )
    plain = {run["batch_size"]: run["baseline"]["tokens_per_second"] for run in runs}
    for run in runs:
        best = max(
            [run["baseline"], *run["drafters"]], key=lambda row: float(row["tokens_per_second"])
        )
        made.add_row(
            f"{run['model']}: {run['runtime']}",
            *[str(run["batch_size"])] * several,
            f"{run['baseline']['tokens_per_second']:.1f}",
            f"{best['tokens_per_second']:.1f}",
            best["name"],
            f"{best['tokens_per_second'] / plain[run['batch_size']]:.2f}",
        )
    return _whole(made)


def _empty(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE)
    for heading in headings:
        left = heading in ("runs", "category", "drafter")
        # A path that is cut short could be any of several.
        made.add_column(heading, justify="left" if left else "right", overflow="fold")
    return made


def _whole(made: Any) -> Any:
    """Off a terminal no cell is folded; on one, cells are rather than lines."""
    from rich.console import Console

    if not sys.stdout.isatty():
        made.width = Console(width=1000).measure(made).maximum
    return made


def _over(row: Metrics) -> list[str]:
    keys = ("speedup_over_transformers", "speedup_over_prompt_lookup")
    return [f"{row[key]:.2f}" if key in row else "-" for key in keys]


def _split(row: Metrics) -> str:
    """Shares of the time that drafting and the loop itself took; the target's is the rest."""
    if "draft_share" not in row:
        return "-"
    return f"{row['prompt_share']:.0%}/{row['draft_share']:.0%}/{row['host_share']:.0%}"
