"""Real checkpoints: drafted text is plain text, token for token, in fp32."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.result import Result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(many: list[str]) -> list[str]:
    """Return the beginnings of 24 stories, of unequal length."""
    return many[:24]


@pytest.fixture(scope="module")
def many(shared: Path) -> list[str]:
    """Return the beginnings of 50 stories, of unequal length."""
    text = gzip.decompress((shared / "data/text/tinystories_valid.txt.gz").read_bytes()).decode()
    stories = [story.strip() for story in text.split("\n\n") if len(story.strip()) > 300]
    return [" ".join(story.split()[: 4 + 3 * (i % 8)]) for i, story in enumerate(stories[:50])]


@pytest.fixture(scope="module")
def runner(shared: Path) -> Runner:
    return Runner(shared / "models/stories260K", dtype=torch.float32)


MODELS = ["stories260K", "llama2xs-279K", "TinyStories-656K", "babyllama-char-a",
          "babyllama-char-b", "codestory-10M"]  # fmt: skip
PLAIN = ["ngram", "recycle", "trigram", "ngram+recycle", "jacobi", "skip", "ngram+recycle:tune"]
TREES = ["depth=4", "tree=iid", "tree=rsd-c,width=2", "tree=rsd-s"]
# Draft models with the same tokenizer, where there is one.
SMALLER = {"stories260K": "llama2xs-279K", "babyllama-char-a": "babyllama-char-b"}
PAIRS = [(model, draft) for model in MODELS for draft in PLAIN] + [
    (model, f"{{shared}}/models/{draft}:{tree}")
    for model, draft in SMALLER.items()
    for tree in TREES
]


@pytest.fixture(scope="module")
def plain(shared: Path, many: list[str]) -> Callable[[str], tuple[Runner, list[Result]]]:
    """`plain(model)` returns a runner and its results without a drafter, run once per model."""

    @functools.cache
    def run(name: str) -> tuple[Runner, list[Result]]:
        runner = Runner(shared / "models" / name, dtype=torch.float32)
        return runner, runner.generate(many, max_new_tokens=64)

    return run


@pytest.mark.parametrize(("model", "draft"), PAIRS)
def test_greedy_text_is_plain_text(
    shared: Path, many: list[str], plain: Any, model: str, draft: str
) -> None:
    """50 prompts, some of which end by themselves, at a stop string or with the context."""
    runner, expected = plain(model)
    runner.use(draft.format(shared=shared))
    for batch_size in (1, 7):
        results = runner.generate(many, max_new_tokens=64, batch_size=batch_size)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        assert [r.text for r in results] == [r.text for r in expected]
        assert all(r.lossless for r in results)
        # Only codestory-10M and the character models have layers enough to skip, and tuning may
        # find that nothing pays.
        assert (
            sum(r.drafted for r in results) > 0 or runner.target.num_layers < 3 or "tune" in draft
        )
    stops = runner.generate(many[:10], max_new_tokens=64, stop=["the"])
    runner.use(None)
    assert [r.text for r in stops] == [
        r.text for r in runner.generate(many[:10], max_new_tokens=64, stop=["the"])
    ]


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
def test_second_tokens_follow_the_targets_distribution(
    shared: Path, runner: Runner, draft: str, options: dict[str, Any]
) -> None:
    """The marginal of the second token is the mixture of probabilities over first tokens."""
    runner.use(draft if "llama" not in draft else str(shared / "models" / draft))
    prompt, size = [1, *range(400, 412), *range(400, 406)], 6000
    results = runner.generate([prompt] * size, max_new_tokens=3, batch_size=500, seed=2, **options)
    control = SamplingParams(**options)
    with torch.inference_mode():
        model = runner.target.model
        first = control.probs(model(torch.tensor([prompt])).logits[:, -1:])[0, 0]
        kept = first.nonzero()[:, 0]
        rows = torch.tensor([[*prompt, token] for token in kept.tolist()])
        probs = control.probs(model(rows).logits[:, -1:])[:, 0]
        ends = torch.tensor([token in runner.end_ids() for token in kept.tolist()])
        expected = (first[kept] * ~ends) @ probs
    seen = [r.token_ids[1] for r in results if len(r.token_ids) > 1]
    counts = torch.bincount(torch.tensor(seen), minlength=len(expected)) / size
    distance = (counts - expected).abs().sum() / 2
    floor = (2 * expected * (1 - expected) / (torch.pi * size)).sqrt().sum() / 2
    assert distance < 1.5 * floor
