"""Points of other methods to compare with: the files that `benchmarks/fidelity.py` writes.

A row has a method with its options, the stored bits, and perplexity and KL on a text. The original
model is the method `original`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectool.evaluate.report.runs import Run

Curve = list[tuple[float, float]]


def curves_of(peers: Sequence[Run], text: str, field: str) -> dict[str, Curve]:
    """Return each method's curve of a figure over stored bits, means over seeds.

    `field`: `kl`, `perplexity`, or `ratio`, which is that of perplexities to the original's. A
    curve has the points that no other of its method betters in both bits and loss.
    """
    key = "kl" if field == "kl" else "perplexity"
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in peers:
        for row in run.data["rows"]:
            if row["text"] == text:
                grouped.setdefault((row["method"], repr(row.get("options"))), []).append(row)
    reference = 1.0
    points: dict[str, Curve] = {}
    for (method, _), rows in grouped.items():
        value = sum(row[key] for row in rows) / len(rows)
        if method != "original":
            points.setdefault(method, []).append((rows[0]["bits_linears"], value))
        elif field == "ratio":
            reference = value
    return {
        method: [(bits, value / reference) for bits, value in _best(curve)]
        for method, curve in points.items()
    }


def _best(points: Curve) -> Curve:
    """Return the points by bits, without those that another betters."""
    kept: Curve = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept
