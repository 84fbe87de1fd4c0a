"""The benchmark of products measures right products, over more memory than caches hold."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"
MODULES = ("record", "peers", "peaks", "ggml", "products")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with short turns; benchmarks/ is no package."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    script: Any = importlib.import_module("products")
    monkeypatch.setattr(script, "TURN", 1e-4)
    monkeypatch.setattr(script, "TRIES", 1)
    for name in MODULES:
        # Forgotten again after the test.
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return script


def _setup(script: Any, shape: tuple[int, int], cache_bytes: int = 1 << 14) -> Any:
    return script.Setup(shape, cache_bytes, torch.Generator().manual_seed(0))


@pytest.mark.skipif(shutil.which("cc") is None, reason="the floors need a C compiler")
def test_it_measures_formats_beside_their_peers(
    products: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(products.peaks, "REPEATS", 2)
    monkeypatch.setattr(products.peaks, "ROUNDS", 1 << 12)
    monkeypatch.setattr(products, "find_folder", lambda: None)
    out = tmp_path / "result.json"
    options = [
        "--formats",
        "int8,rtn2",
        "--shapes",
        "42x256",
        "--threads",
        "1",
        "--rows",
        "1,3",
    ]
    options += ["--rounds", "3", "--cache-bytes", "65536", "--out", str(out)]
    products.main(options)
    result = json.loads(out.read_text("utf-8"))
    assert result["ggml"] is None and result["peaks"]["1"]["read"] > 0
    int8, rtn2 = result["products"]
    assert int8["format"] == "int8" and rtn2["format"] == "rtn2"
    assert set(int8["rows"][0]["ways"]) == {
        "ours int8",
        "ours int16",
        "ours exact",
        "_int_mm",
    }
    assert set(rtn2["rows"][0]["ways"]) == {"ours int8", "ours int16", "ours exact"}
    for line in int8["rows"]:
        own, peer = line["ways"]["ours int8"], line["ways"]["_int_mm"]
        # Codes, and one scale a row.
        assert own["bits"] == pytest.approx(8 + 32 / 256) and peer["bits"] == 8
        assert own["peer"] == "_int_mm" and own["ratio"] > 0
        floor = max(own["read_floor_ms"], own["multiply_floor_ms"])
        assert own["over_floor"] == pytest.approx(own["ms"] / floor, rel=1e-6)
        read_ms = 1e3 * 42 * (256 + 4) / result["peaks"]["1"]["read"]
        assert own["read_floor_ms"] == pytest.approx(read_ms, rel=1e-6)
    assert int8["rows"][0]["ways"]["ours int8"]["goal"] == 0.95
    assert int8["rows"][0]["ways"]["ours exact"]["goal"] is None
    assert "ours int8: " in capsys.readouterr().out


def test_rings_exceed_caches_and_parts_cover_them(products: Any) -> None:
    ring = products.IntMMRing(_setup(products, (42, 64)))
    assert ring.count * 42 * 64 > 4 << 14 >= (ring.count - 1) * 42 * 64
    assert len({matrix.data_ptr() for matrix in ring.matrices}) == ring.count
    for part in (1, 7, ring.count):
        slices = ring.slices(part)
        assert {len(each) for each in slices} == {part}
        assert set().union(*slices) == set(range(ring.count))


def test_a_wrong_product_is_refused(products: Any) -> None:
    class Wrong(products.IntMMRing):  # type: ignore[misc]
        def call(self, x: Tensor, matrix: Tensor) -> Tensor:
            return super().call(x, matrix.roll(1, 0))

    x_Nm = torch.randn(3, 64)
    products.measure([products.IntMMRing(_setup(products, (42, 64)))], x_Nm, 1, 1)
    with pytest.raises(SystemExit, match="_int_mm: the product has a relative error"):
        products.measure([Wrong(_setup(products, (42, 64)))], x_Nm, 1, 1)


def test_ratios_are_of_rounds_and_against_the_fastest(products: Any) -> None:
    """With a machine that slows down, medians of times would hide a ratio of 2."""
    setup = _setup(products, (32, 64))
    rings = [products.OurRing("rtn4", "int8", torch.float32, setup), products.IntMMRing(setup)]
    rings.append(products.DenseRing(torch.float32, setup))
    own, fast, slow = [1e-3, 2e-3, 9e-3], [2e-3, 4e-3, 1e-3], [9e-3, 9e-3, 9e-3]
    seconds = {"ours int8": own, "_int_mm": fast, "torch": slow}
    limits = products.Peaks(1e9, {"int8": 1e9, "float32": 1e9})
    line = products.compare(
        products.FORMATS["rtn4"], rings, 8, products.Timing(seconds, 0.0), limits
    )
    way = line["ways"]["ours int8"]
    assert way["peer"] == "_int_mm" and way["ratio"] == pytest.approx(2) and way["goal"] == 2.0
    assert way["ms"] == pytest.approx(2) and way["multiply_floor_ms"] == 1e3 * 8 * 32 * 64 / 1e9
