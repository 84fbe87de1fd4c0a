"""Real checkpoints: drafted text is plain text, token for token, in fp32."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.decode.generate import Runner
from spectool.decode.sampling import Control

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(shared: Path) -> list[str]:
    """The beginnings of 24 stories, of unequal length."""
    text = gzip.decompress((shared / "data/text/tinystories_valid.txt.gz").read_bytes()).decode()
    stories = [story.strip() for story in text.split("\n\n") if len(story.strip()) > 300]
    return [" ".join(story.split()[: 4 + 3 * (i % 8)]) for i, story in enumerate(stories[:24])]


@pytest.fixture(scope="module")
def runner(shared: Path) -> Runner:
    return Runner(shared / "models/stories260K", dtype=torch.float32)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("draft", ["ngram", "ngram:min_n=1,nodes=24,depth=6", "llama2xs-279K"])
def test_greedy_text_is_plain_text(
    shared: Path, runner: Runner, prompts: list[str], draft: str, batch_size: int
) -> None:
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=128)
    runner.use(draft if draft.startswith("ngram") else str(shared / "models" / draft))
    results = runner.generate(prompts, max_new_tokens=128, batch_size=batch_size)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert [r.text for r in results] == [r.text for r in plain]
    assert sum(len(r.token_ids) for r in results) > 20 * 100
    assert all(r.lossless for r in results)
    if draft == "llama2xs-279K":
        assert sum(r.forwards for r in results) < 0.6 * sum(r.forwards for r in plain)


def test_greedy_text_is_transformers_text(runner: Runner, prompts: list[str]) -> None:
    runner.use("ngram")
    assert runner.tokenizer is not None
    for prompt in prompts[:8]:
        ids = runner.tokenizer(prompt, return_tensors="pt")
        output = runner.target.model.generate(**ids, max_new_tokens=64, do_sample=False)
        expected = output[0, ids["input_ids"].shape[1] :].tolist()
        assert runner.generate([prompt], max_new_tokens=64)[0].token_ids == expected


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.9}])
@pytest.mark.parametrize("draft", ["none", "ngram:min_n=1", "llama2xs-279K"])
def test_second_tokens_follow_the_targets_law(
    shared: Path, runner: Runner, draft: str, options: dict[str, Any]
) -> None:
    """Marginal of the second token: the mixture, over first tokens, of the target's laws."""
    runner.use(draft if "llama" not in draft else str(shared / "models" / draft))
    prompt, size = [1, *range(400, 412), *range(400, 406)], 6000
    results = runner.generate([prompt] * size, max_new_tokens=3, batch_size=500, seed=2, **options)
    control = Control(**options)
    with torch.inference_mode():
        model = runner.target.model
        first = control.laws(model(torch.tensor([prompt])).logits[:, -1:])[0, 0]
        kept = first.nonzero()[:, 0]
        rows = torch.tensor([[*prompt, token] for token in kept.tolist()])
        laws = control.laws(model(rows).logits[:, -1:])[:, 0]
        ends = torch.tensor([token in runner._end_ids() for token in kept.tolist()])
        expected = (first[kept] * ~ends) @ laws
    seen = [r.token_ids[1] for r in results if len(r.token_ids) > 1]
    counts = torch.bincount(torch.tensor(seen), minlength=len(expected)) / size
    distance = (counts - expected).abs().sum() / 2
    floor = (2 * expected * (1 - expected) / (torch.pi * size)).sqrt().sum() / 2
    assert distance < 1.5 * floor
