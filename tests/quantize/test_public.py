"""`spectool.quantize`: the package is the function that users call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.errors import UsageError


def test_the_options_of_the_method_are_keywords(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    report = spectool.quantize(checkpoint("llama"), tmp_path / "out", "rtn", bits=3)
    assert len(report.layers) == 14
    made_by = (read_layout(tmp_path / "out").quantization or {})["made_by"]
    assert made_by["method"] == "rtn" and made_by["options"]["bits"] == 3
    for options in ({"bits": 9}, {"bytes": 3}):
        with pytest.raises(UsageError):
            spectool.quantize(checkpoint("llama"), tmp_path / "other", "rtn", **options)
    with pytest.raises(UsageError, match="no quantizer is called 'cheese'"):
        spectool.quantize(checkpoint("llama"), tmp_path / "other", "cheese")
    assert not (tmp_path / "other").exists()
