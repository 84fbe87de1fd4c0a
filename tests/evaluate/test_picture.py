from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectool.errors import MissingExtra, UsageError
from spectool.evaluate.bench import Part, Row, Run
from spectool.evaluate.picture import draw
from spectool.picture import check_picture

MACHINE = {"processor": "A processor", "threads": 2, "versions": {"spectool": "0.1.0"}}


def rows(*speeds: float) -> dict[str, Any]:
    names = [
        "none",
        "ngram",
        "/some/where/very/long/that/nobody/reads:depth=4",
        "transformers plain",
    ]
    counts = dict.fromkeys(("prompts", "new_tokens", "forwards", "drafted", "accepted"), 4)
    rates = dict.fromkeys(("tokens_per_forward", "tokens_per_second", "seconds"), 1.0)
    baseline, *made = (
        Row(name=name, speedup=speed, lossless=True, identical=None, **counts, **rates)  # type: ignore[arg-type]
        for name, speed in zip(names, (1.0, *speeds), strict=True)
    )
    return {"baseline": baseline, "drafters": made[:2], "baselines": made[2:]}


def run(batch_size: int, *categories: str) -> Run:
    return Run(
        **rows(1.5, 0.7, 1.0),
        categories=[Part(category=name, **rows(1.2, 0.8, 1.1)) for name in categories],
        model="/models/small",
        runtime="dense, float32",
        dtype="float32",
        activations="exact",
        kv="dense",
        kv_bytes_per_token=None,
        prompts=4,
        prompts_left_out=0,
        definitions={},
        turns=4,
        turns_left_out=0,
        batch_size=batch_size,
        kept_share=1.0,
        prompts_cut=0,
    )


def test_bars_and_small_print_are_in_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.svg"
    draw([run(1, "qa", "rag"), replace(run(4, "qa"), baselines=[])], MACHINE, path)
    first = path.read_bytes()
    for word in ("qa", "all", "speed-up over plain", "small: dense, float32, batch size 4",
                 "...ry/long/that/nobody/reads:depth=4", "1.50", "transformers plain",
                 "A processor, threads: 2; float32; 4 prompts; spectool 0.1.0"):  # fmt: skip
        assert f">{word}</text>".encode() in first, word
    draw([run(1, "qa", "rag"), replace(run(4, "qa"), baselines=[])], MACHINE, path)
    assert path.read_bytes() == first and [path] == list(tmp_path.iterdir())


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.PNG"
    nothing = replace(run(1), drafters=[], baselines=[])
    for one in (run(1, *"abcdefgh"), nothing):
        draw([one], MACHINE, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plot", "plot.pdf"):
        with pytest.raises(UsageError, match=r"ends with \.png or \.svg"):
            check_picture(tmp_path / name)
    with pytest.raises(UsageError, match="no folder"):
        check_picture(tmp_path / "absent" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match="needs the package matplotlib") as caught:
        check_picture(tmp_path / "plot.png")
    assert caught.value.hint == "pip install 'spectool[eval]'"
