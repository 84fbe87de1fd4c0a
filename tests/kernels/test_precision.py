"""The choice of `--activations auto`, and its table against the measured figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectool.kernels.precision import EXACT_ONLY, PRECISIONS, Row, choose, precisions_of
from spectool.methods import list_methods

RESULT = Path(__file__).parents[2] / "benchmarks/results/activations-codestory-10M.json"


@pytest.mark.parametrize(
    ("own", "added", "auto"),
    [
        (0.1, 0.0019, "int8"),
        (0.1, 0.0021, "exact"),
        (0.001, 0.00009, "int8"),
        (0.001, 0.00011, "exact"),
        (0.1, -0.001, "int8"),
    ],
)
def test_rounding_may_add_two_percent_or_a_tenth_of_a_millinat(
    own: float, added: float, auto: str
) -> None:
    assert Row(own, added).auto == auto


def test_the_choice_is_that_of_the_row_or_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lossy, close = Row(0.1, 0.0), Row(0.001, 0.1)
    monkeypatch.setitem(PRECISIONS, "rtn", {2: lossy, 4: close})
    chosen = {bits: choose("rtn", bits, "auto") for bits in (1, 2, 2.5, 4, 8)}
    assert chosen == {1: "int8", 2: "int8", 2.5: "exact", 4: "exact", 8: "exact"}
    monkeypatch.setitem(PRECISIONS, "rtn", {2: lossy})
    assert choose("rtn", 3, "auto") == "exact" and choose("rtn", None, "auto") == "int8"
    assert choose("rtn", 4, "int8") == "int8" and choose("rtn", 2, "exact") == "exact"
    # No product with integers, no product at all.
    assert precisions_of("scalar") == ("exact",) and precisions_of("olive-activations") == ()
    assert {choose(name, 2, "int8") for name in ("scalar", "olive-activations", "")} == {"exact"}


def test_the_table_holds_the_measured_figures() -> None:
    assert PRECISIONS.keys() | set(EXACT_ONLY) <= set(list_methods("quantizer"))
    measured: dict[str, list[tuple[float, float]]] = {}
    for row in json.loads(RESULT.read_text())["rows"]:
        measured.setdefault(row["method"], []).append((row["kl"], row["added"]))
    table = {method: rows for method, rows in PRECISIONS.items() if rows}
    assert measured.keys() == table.keys()
    for method, rows in table.items():
        found = sorted(measured[method], reverse=True)
        assert len(found) == len(rows)
        for (_, row), (own, added) in zip(sorted(rows.items()), found, strict=True):
            assert row.own == pytest.approx(own, rel=1e-2)
            assert row.added == pytest.approx(added, rel=1e-2) and row.auto == Row(own, added).auto
