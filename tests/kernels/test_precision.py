"""The choice of `--activations auto`, and its table against the measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectool.kernels.precision import EXACT_ONLY, PRECISIONS, Row, choose, precisions_of
from spectool.methods import list_methods

RESULT = Path(__file__).parents[2] / "benchmarks/results/activations-codestory-10M.json"


@pytest.mark.parametrize(
    ("own", "int8", "int16", "auto"),
    [
        (0.1, 0.0019, None, "int8"),
        (0.1, 0.0021, None, "exact"),
        (0.1, 0.0021, 0.0019, "int16"),
        (0.1, 0.0021, 0.0021, "exact"),
        (0.001, 0.00009, 0.0, "int8"),
        (0.001, 0.00011, 0.00009, "int16"),
        (0.001, 0.00011, 0.00011, "exact"),
        (0.1, -0.001, 0.0, "int8"),
    ],
)
def test_rounding_may_add_two_percent_or_a_tenth_of_a_millinat(
    own: float, int8: float, int16: float | None, auto: str
) -> None:
    assert Row(own, int8, int16).auto == auto


def test_the_choice_is_that_of_the_row_or_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lossy, close = Row(0.1, 0.0, 0.0), Row(0.001, 0.1, 0.0)
    monkeypatch.setitem(PRECISIONS, "rtn", {2: lossy, 4: close})
    chosen = {bits: choose("rtn", bits, "auto") for bits in (1, 2, 2.5, 4, 8)}
    assert chosen == {1: "int8", 2: "int8", 2.5: "int16", 4: "int16", 8: "exact"}
    monkeypatch.setitem(PRECISIONS, "rtn", {2: lossy})
    assert choose("rtn", 3, "auto") == "exact" and choose("rtn", None, "auto") == "int8"
    for asked in ("exact", "int16", "int8"):
        assert choose("rtn", 2, asked) == choose("rtn", 4, asked) == asked
    # No product with integers, no product at all.
    assert precisions_of("scalar") == ("exact",) and precisions_of("olive-activations") == ()
    assert {choose(name, 2, "int8") for name in ("scalar", "olive-activations", "")} == {"exact"}


def test_the_table_holds_the_measured_figures() -> None:
    assert PRECISIONS.keys() | set(EXACT_ONLY) <= set(list_methods("quantizer"))
    measured: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(RESULT.read_text())["rows"]:
        measured.setdefault(row["method"], []).append(row)
    assert measured.keys() == PRECISIONS.keys()
    for method, rows in PRECISIONS.items():
        found = sorted(measured[method], key=lambda each: -each["kl"])
        assert len(found) == len(rows)
        for (_, row), each in zip(sorted(rows.items()), found, strict=True):
            assert row.own == pytest.approx(each["kl"], rel=1e-2)
            assert row.int8 == pytest.approx(each["added"]["int8"], rel=1e-2)
            int16 = each["added"]["int16"]
            assert row.int16 == (None if int16 is None else pytest.approx(int16, rel=1e-2))
            assert row.auto == each["auto"]
