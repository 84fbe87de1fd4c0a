from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spectool.cli import app
from spectool.data.text import read_prompts
from spectool.data.windows import Windows, cut
from spectool.decode.generate import generate
from spectool.decode.options import CacheOptions
from spectool.errors import UnsupportedError, UsageError
from spectool.evaluate.context import Context, cut_openings
from spectool.evaluate.measures.generation import Generation, ends_in_cycle, repeated_share
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.report import NotMeasured

from ..heard import Heard
from .looping import make_looping

ROOT = Path(__file__).parent.parent.parent


def run(model: Path, **options: Any) -> dict[str, Any]:
    load = CacheOptions(model=str(model), dtype="float32")
    given = {"measure": ("generation",), "limit": 3000, **options}
    return evaluate(Context(load, EvalOptions(**given))).as_json()["generation"]


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 16, True),
        ([7] * 15, False),
        ([1, 2, 3] + [4, 5] * 8, True),
        ([4, 5] * 8 + [6], False),
        # Of a longer cycle three rounds are needed.
        (list(range(10)) * 3, True),
        (list(range(10)) * 2 + list(range(9)), False),
        ([9, 9] + list(range(10)) * 3, True),
        (list(range(64)), False),
        ([], False),
    ],
)
def test_a_text_loops_if_it_ends_in_a_cycle(tokens: list[int], loops: bool) -> None:
    assert ends_in_cycle(tokens) is loops


def test_repetition_is_the_share_of_runs_that_occurred_before() -> None:
    tokens = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    before = [tokens[at : at + 4] for at in range(47)]
    repeated = sum(gram in before[:at] for at, gram in enumerate(before))
    assert 0 < repeated < 47
    assert repeated_share(tokens) == pytest.approx(repeated / 47)
    assert repeated_share(tokens[:3]) == 0


def test_figures_of_greedy_texts_are_those_of_the_definitions(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, file = checkpoint("llama"), tmp_path / "prompts.jsonl"
    prompts = ["import os", "def f(x):", "class A:"]
    answers = ["to be replaced", "no such line", "an answer\nof two lines is not compared"]

    def write() -> None:
        pairs = zip(prompts, answers, strict=True)
        file.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in pairs))

    write()
    given = [prompt.given for prompt in read_prompts(str(file), None)]
    texts = generate(path, given, dtype="float32", max_new_tokens=20)
    answers[0] = next(line.strip() for line in texts[0].text.splitlines() if line.strip())
    write()
    found = run(path, prompts=str(file), max_new_tokens=20, reference=str(path))
    tokens = [text.token_ids for text in texts]
    pairs = [pair for each in tokens for pair in itertools.pairwise(each)]
    greedy = found["greedy"]
    assert found["prompts"] == 3 and found["max_new_tokens"] == 20
    assert greedy["distinct"]["value"] == pytest.approx(len(set(pairs)) / len(pairs))
    assert greedy["repetition"]["value"] == pytest.approx(sum(map(repeated_share, tokens)) / 3)
    assert greedy["loops"]["value"] == pytest.approx(sum(map(ends_in_cycle, tokens)) / 3)
    assert greedy["ends"]["value"] == 0
    assert greedy["exact_match"]["value"] == 0.5
    # A checkpoint beside itself.
    assert found["agreement"] == {"value": 20, "lower": 20, "upper": 20}
    assert found["reference"] == {name: found[name] for name in ("greedy", "sampled")}
    assert found["sampled"] != greedy
    for figures in found["change"].values():
        assert all(each == {"value": 0, "lower": 0, "upper": 0} for each in figures.values())


def test_openings_are_cut_out_of_the_text(checkpoint: Callable[..., Path]) -> None:
    load = CacheOptions(model=str(checkpoint("llama")))
    context = Context(load, EvalOptions(window=64, limit=6000, bos=True))
    openings = [prompt.given for prompt in context.openings or ()]
    ids = torch.cat([ids_SL[:, 1:].flatten() for ids_SL in context.windows.groups]).tolist()
    assert len(openings) == 16 and context.new_tokens == 64
    assert openings[0] == [0, *ids[:32]] and openings[-1] == [0, *ids[-32:]]
    assert Context(load, EvalOptions(window=64, blockwise=True)).openings is None


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("stride", [None, 10])
def test_openings_of_windows_that_overlap_are_of_the_text(
    bos: int | None, stride: int | None
) -> None:
    ids = list(range(1, 1003))
    windows = cut(ids, length=48, bos=bos, stride=stride)
    (text,) = windows.texts()
    assert text.tolist() == ids[: len(text)] and len(text) >= 1000 - 48
    check_consecutive(windows, 16)


@pytest.mark.parametrize(("length", "count"), [(40, 2), (40, 30), (33, 30), (20, 5)])
def test_openings_are_of_one_document_each(length: int, count: int) -> None:
    rows = [list(range(1000 * row, 1000 * row + length)) for row in range(count)]
    windows = Windows((torch.tensor(rows),), length, None, protocol="c4")
    found = check_consecutive(windows, min(16, count))
    assert len({tokens[0] // 1000 for tokens in found}) == len(found)


def test_openings_of_whole_documents_end_before_the_token_that_ends_the_text() -> None:
    lengths = (300, 80, 40, 33, 20)
    rows = [list(range(1000 * row, 1000 * row + size)) for row, size in enumerate(lengths)]
    groups = tuple(torch.tensor([[0, *row, -1]]) for row in rows)
    found = check_consecutive(Windows(groups, 302, 0, protocol="documents"), 13)
    firsts = sorted(tokens[0] for tokens in found)
    # None overlap, and each document that is long enough has some.
    assert all(b - a >= 32 for a, b in itertools.pairwise(firsts))
    assert {first // 1000 for first in firsts} == {0, 1, 2, 3}


def check_consecutive(windows: Windows, count: int) -> list[list[int]]:
    """Return the openings after a start token, so many, of windows whose tokens count upwards."""
    prompts = [
        prompt.given for prompt in cut_openings(windows, lambda *_, **__: {"input_ids": [0]}, 2048)
    ]
    found = [list(tokens[1:]) for tokens in prompts if isinstance(tokens[0], int)]
    assert len(found) == count and all(tokens[0] == 0 for tokens in prompts)
    for tokens in found:
        assert tokens == list(range(tokens[0], tokens[0] + min(32, windows.length)))
    return found


def test_only_figures_that_the_run_has_can_be_gated(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    with pytest.raises(UsageError, match=r"no metric generation\.change\.greedy\.loops"):
        run(path, gate=("generation.change.greedy.loops<=0",))
    with pytest.raises(UsageError, match=r"no metric generation\.greedy\.exact_match"):
        run(path, gate=("generation.greedy.exact_match>=0",))
    with pytest.raises(UsageError, match="needs a model that fits in memory"):
        run(path, blockwise=True)


def test_a_model_that_cannot_be_decoded_is_scored_all_the_same(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Context) -> Generation:
        raise UnsupportedError("no tree")

    monkeypatch.setattr(Generation, "run", refuse)
    heard, load = Heard(), CacheOptions(model=str(checkpoint("llama")))
    evaluation = evaluate(Context(load, EvalOptions(limit=1000), reporter=heard))
    assert "perplexity" in evaluation.as_json() and "generation" not in evaluation.as_json()
    assert heard.of(NotMeasured) == [NotMeasured("generation", "no tree")]
    gated = EvalOptions(limit=1000, gate=("generation.greedy.loops<=1",))
    with pytest.raises(UnsupportedError):
        evaluate(Context(load, gated))


def test_a_checkpoint_that_loops_fails_its_gate_while_its_perplexity_holds(tmp_path: Path) -> None:
    source, text = ROOT / "examples/tiny-python", ROOT / "core/options.py"
    make_looping(source, tmp_path / "looping", text.read_text())
    loops = "sampled.loops<=0.25"
    gates = ("perplexity_ratio<=1.1", f"generation.reference.{loops}", f"generation.{loops}")
    words = ["eval", str(tmp_path / "looping"), "--reference", str(source), "--text", str(text)]
    words += ["--limit", "9000", "--measure", "divergence", "--measure", "generation", "--json"]
    words += [word for gate in gates for word in ("--gate", gate)]
    done = CliRunner().invoke(app, [*words, "--threads", "1"])
    assert done.exit_code == 3, done.output
    assert [gate["holds"] for gate in json.loads(done.stdout)["gates"]] == [True, True, False]
