"""Certificates of losslessness: texts and sampled texts beside plain decoding's."""

from __future__ import annotations

from collections.abc import Sequence

from spectool.evaluate.report.content import Cell, Section, Table, figure, filled
from spectool.evaluate.report.runs import Run


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from certificates."""
    certificates = [run for run in runs if "promises" in run.data]
    if not certificates:
        return None
    text = [_summary(run) for run in certificates]
    rows = []
    for run in certificates:
        laws = {(law["forward"], law["drafter"]): law for law in run.data["laws"]}
        for each in run.data["texts"]:
            gaps = [p["gap"] for p in each["partings"] if p.get("gap") is not None]
            law = laws.get((each["forward"], each["drafter"]), {})
            whole = each["identical"] == each["prompts"]
            rows.append(
                [
                    Cell(each["drafter"] + ("" if each["lossless"] else " (lossy)")),
                    Cell(each["forward"]),
                    figure(each["batch_size"]),
                    Cell(
                        f"{each['identical']} of {each['prompts']}",
                        each["identical"] / max(1, each["prompts"]),
                        good=whole or None,
                    ),
                    figure(each["tokens"]),
                    figure(max(gaps, default=None)),
                    figure(law.get("statistic")),
                    figure(law.get("degrees")),
                    figure(law.get("p_value")),
                    Cell(run.name),
                ]
            )
    headings = [
        "Drafter", "Layers by", "Batch", "Texts identical", "Tokens", "Widest near tie",
        "Chi-square", "Degrees", "p", "Result",
    ]  # fmt: skip
    table = filled(Table(caption="Drafters beside plain decoding", headings=headings, rows=rows))
    return Section(name="losslessness", title="Losslessness", text=text, tables=[table])


def _summary(run: Run) -> str:
    """Say what was compared, what was promised, and whether it was kept."""
    found = run.data
    promised = "; ".join(
        f"layers by {forward}: {', '.join(kinds)}" for forward, kinds in found["promises"].items()
    )
    broken = "; ".join(found["broken"])
    return (
        f"{run.name}: {found['tokens']:,} tokens of {found['prompts']} prompts compared, "
        f"{found['dtype']}, {found['activations']} activations. Promised: {promised}. "
        + (f"Not kept: {broken}." if broken else "All promises are kept.")
    )
