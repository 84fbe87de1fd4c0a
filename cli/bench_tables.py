"""Tables that `spectool bench` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.evaluate.bench import Row, Run
    from spectool.evaluate.certificate import Certificate
    from spectool.evaluate.intervals import Interval
    from spectool.evaluate.replay import Replay


def drafter_table(runs: Sequence[Run]) -> Any:
    """Build the table of one model's runs, with a row per batch size, category and drafter."""
    several = len(runs) > 1
    by_category = any(len(run.categories) > 1 for run in runs)
    with_baselines = any(run.baselines for run in runs)
    table = _empty_table(
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
        parts = [*run.categories, run] if by_category else [run]
        for part in parts:
            for row in part.rows:
                table.add_row(
                    *[str(run.batch_size)] * several,
                    *[part.category or "all"] * by_category,
                    row.name + ("" if row.lossless else " (lossy)"),
                    f"{row.tokens_per_second:.1f}",
                    f"{row.speedup:.2f}",
                    *_baseline_speedups(row) * with_baselines,
                    f"{row.tokens_per_forward:.2f}",
                    f"{row.accepted / row.drafted:.0%}" if row.drafted else "-",
                    _time_shares(row),
                    "-" if row.identical is None else f"{row.identical}/{row.prompts}",
                )
            if by_category or several:
                table.add_section()
    return _fit_width(table)


def chain_table(run: Run, deepest: int) -> Any:
    """Build the table of each drafter's tokens per forward, with a column per chain length."""
    table = _empty_table("drafter", *(f"chain of {depth}" for depth in range(1, deepest + 1)))
    for row in run.drafters:
        table.add_row(row.name, *(f"{rate:.2f}" for rate in row.chain or ()))
    return _fit_width(table)


def depth_table(run: Run) -> Any:
    """Build the table of each drafter's share of accepted drafts, with a column per depth."""
    deepest = max((len(row.acceptance_by_depth) for row in run.drafters), default=0)
    table = _empty_table("drafter", *(f"depth {depth}" for depth in range(1, deepest + 1)))
    for row in run.drafters:
        table.add_row(row.name, *(f"{share:.1%}" for share in row.acceptance_by_depth))
    return _fit_width(table)


def protocol_table(runs: Sequence[Run]) -> Any:
    """Build the table of a protocol's own figures, with a row per size, category and drafter."""
    several = len(runs) > 1
    table = _empty_table(
        *["batch"] * several, "category", "drafter", "tok/s", "speed-up", "accepted length"
    )
    for run in runs:
        parts = [*run.categories, run] if len(run.categories) > 1 else [run]
        for part in parts:
            for row in part.rows:
                assert row.scores is not None
                table.add_row(
                    *[str(run.batch_size)] * several,
                    part.category or "overall",
                    row.name,
                    f"{row.scores.tokens_per_second:.1f}",
                    _with_bounds(row.scores.speedup),
                    "-"
                    if row.scores.accepted_length is None
                    else _with_bounds(row.scores.accepted_length),
                )
        table.add_section()
    return _fit_width(table)


def replay_table(found: Replay) -> Any:
    """Build the table of predictions, with a row per drafter."""
    table = _empty_table("drafter", "tokens/\nforward", "along\nthe text", "accepted", "exact")
    for each in found.predictions:
        table.add_row(
            each.drafter,
            _with_bounds(each.tokens_per_forward),
            _with_bounds(each.along_text),
            _with_bounds(each.acceptance),
            "yes" if each.is_exact else "no",
        )
    return _fit_width(table)


def _with_bounds(figure: Interval) -> str:
    return f"{figure.value:.2f} ({figure.lower:.2f} to {figure.upper:.2f})"


def comparison_table(runs: Sequence[Run]) -> Any:
    """Build the table of each run's fastest drafter, relative to plain decoding of the reference.

    The reference is the last model of `runs`; speeds are compared at the same batch size.
    """
    several = len({run.batch_size for run in runs}) > 1
    table = _empty_table(
        "runs", *["batch"] * several, "plain tok/s", "best tok/s", "drafter", "of the reference"
    )
    # Later runs replace earlier ones, so that the reference's speeds remain.
    plain = {run.batch_size: run.baseline.tokens_per_second for run in runs}
    for run in runs:
        best = max([run.baseline, *run.drafters], key=lambda row: float(row.tokens_per_second))
        table.add_row(
            f"{run.model}: {run.runtime}",
            *[str(run.batch_size)] * several,
            f"{run.baseline.tokens_per_second:.1f}",
            f"{best.tokens_per_second:.1f}",
            best.name,
            f"{best.tokens_per_second / plain[run.batch_size]:.2f}",
        )
    return _fit_width(table)


def certificate_table(found: Certificate) -> Any:
    """Build the table of the drafters' texts and laws."""
    several = len(found.forward) > 1
    table = _empty_table(
        *["forward"] * several,
        "drafter",
        "batch",
        "texts\nidentical",
        "tokens",
        "widest\ngap",
        "chi-\nsquare",
        "degrees",
        "p",
    )
    laws = {(law.forward, law.drafter): law for law in found.laws}
    for each in found.texts:
        gaps = [parting.gap for parting in each.partings if parting.gap is not None]
        law = laws[each.forward, each.drafter]
        table.add_row(
            *[each.forward] * several,
            each.drafter + ("" if each.lossless else " (lossy)"),
            str(each.batch_size),
            f"{each.identical}/{each.prompts}",
            str(each.tokens),
            f"{max(gaps):.3g}" if gaps else "-",
            f"{law.statistic:.1f}",
            str(law.degrees),
            f"{law.p_value:.3g}",
        )
    return _fit_width(table)


def _empty_table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in headings:
        left = heading in ("runs", "category", "drafter")
        # Folded rather than cut: a shortened path could be any of several.
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    return table


def _fit_width(table: Any) -> Any:
    """Widen the table so that no cell is folded when stdout is not a terminal."""
    from rich.console import Console

    if not sys.stdout.isatty():
        table.width = Console(width=1000).measure(table).maximum
    return table


def _baseline_speedups(row: Row) -> list[str]:
    speedups = (row.speedup_over_transformers, row.speedup_over_prompt_lookup)
    return ["-" if speedup is None else f"{speedup:.2f}" for speedup in speedups]


def _time_shares(row: Row) -> str:
    """Format the shares of time for prompts, drafting and the loop; the target has the rest."""
    if row.prompt_share is None:
        return "-"
    return f"{row.prompt_share:.0%}/{row.draft_share:.0%}/{row.host_share:.0%}"
