"""The skeletons in docs/adding are short, and work when they are added as the page says."""

from __future__ import annotations

import importlib
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spectool.checkpoint.tensors import open_checkpoint
from spectool.evaluate.context import Context, Request
from spectool.evaluate.suite import evaluate
from spectool.methods import METHODS, Method

PAGES = sorted((Path(__file__).parent.parent / "docs/adding").glob("*.md"))
# A check takes the module of the skeleton and pytest's request, for fixtures.
Check = Callable[[ModuleType, pytest.FixtureRequest], None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_skeleton_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    code = textwrap.dedent(block)
    assert len(code.splitlines()) <= 25
    (tmp_path / f"added_{page.stem}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    CHECKS[page.stem](importlib.import_module(f"added_{page.stem}"), request)


def add_method(request: pytest.FixtureRequest, name: str, method: Method) -> None:
    """Add a row to the table of methods for one test."""
    request.getfixturevalue("monkeypatch").setitem(METHODS, name, method)


def check_measure(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="measure", target="added_measure:CrossEntropy", summary="...", source="...")
    add_method(request, "cross-entropy", row)
    checkpoint = open_checkpoint(request.getfixturevalue("checkpoint")("llama"))
    options = Request(measures=["perplexity", "cross-entropy"], window=32, limit=2000)
    evaluation = evaluate(Context(checkpoint, options), gates=["cross_entropy>0"])
    perplexity: Any
    perplexity, added = evaluation.measures
    assert evaluation.as_json()["cross_entropy"] == evaluation.gates[0].value
    assert list(added.lines()) == [f"cross-entropy: {evaluation.gates[0].value:.4f} nats per token"]
    assert evaluation.gates[0].value == pytest.approx(math.log(perplexity.perplexity.value))


CHECKS: dict[str, Check] = {"measure": check_measure}
