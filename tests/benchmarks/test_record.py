"""A benchmark's result is written in few lines and keeps its figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks/record.py"


def test_innermost_objects_take_a_line_and_figures_keep_eight_digits(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("record", SCRIPT)
    assert spec is not None and spec.loader is not None
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    rows = [{"name": f"row {i}", "loss": i / 7, "nll": [i / 3] * 40} for i in range(3)]
    result = {"machine": {"cores": 2}, "bytes": 25276502016, "rows": rows}
    record.write(tmp_path / "result.json", result)
    text = (tmp_path / "result.json").read_text("utf-8")
    read = json.loads(text)
    assert read["bytes"] == result["bytes"] and read["machine"] == result["machine"]
    for before, after in zip(rows, read["rows"], strict=True):
        assert after["loss"] == float(f"{before['loss']:.8g}")
        assert after["nll"] == [float(f"{v:.8g}") for v in before["nll"]]  # type: ignore[attr-defined]
    # A line for the list, one for each number of a row would be over a hundred.
    assert len(text.splitlines()) < 25
