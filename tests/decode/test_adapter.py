"""Drafters in transformers' own `generate`."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    TextIteratorStreamer,
    pipeline,
)

from spectool.decode import adapter, tree
from spectool.decode.adapter import drafting
from spectool.decode.drafters.ngram import NgramDrafter
from spectool.errors import UsageError

Tiny = Callable[..., PreTrainedModel]
ROOT = Path(__file__).parent.parent.parent
PRIVATE = {"_get_candidate_generator", "_get_stopping_criteria"}


def run(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0, **options}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new: list[int] = made[0, len(prompt) :].tolist()
    return new


@pytest.fixture
def tokenizer(checkpoint: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint("llama"))


@contextlib.contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Record the number of tokens of each of the model's passes."""
    sizes: list[int] = []
    hook = model.register_forward_hook(
        lambda module, given, named, out: sizes.append(named["input_ids"].shape[1]),
        with_kwargs=True,
    )
    yield sizes
    hook.remove()


@functools.cache
def plain_of(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    """Return the 30 tokens that transformers continues a prompt with, once for all drafters."""
    return run(model, list(prompt), max_new_tokens=30)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("draft", ["none", "ngram", "trigram", "ngram:depth=3+trigram"])
def test_greedy_text_is_transformers_own(
    tiny: Tiny, prompt_of: Callable[..., list[int]], family: str, draft: str
) -> None:
    model = tiny(family)
    prompts = [prompt_of(20, seed=seed) for seed in range(2)]
    plain = [plain_of(model, tuple(prompt)) for prompt in prompts]
    with drafting(model, draft):
        assert [run(model, prompt, max_new_tokens=30) for prompt in prompts] == plain
        assert run(model, prompts[0], max_new_tokens=1) == plain[0][:1]
        assert run(model, prompts[0], max_length=27) == plain[0][:7]


class Watched(NgramDrafter):
    """An n-gram drafter that records its drafts and their outcomes."""

    def __init__(self, config: NgramDrafter.Config | None = None) -> None:
        super().__init__(config)
        self.accepted = self.closed = 0
        # Length of the text and the token drafted to follow it.
        self.firsts: list[tuple[int, int]] = []

    def propose(self, rows: Sequence[Any], budget: Sequence[int]) -> list[tree.Draft]:
        drafts = super().propose(rows, budget)
        assert max(drafts[0].depths) <= budget[0]
        if len(drafts[0]) > 1:
            self.firsts.append((len(rows[0].tokens), drafts[0].tokens[1]))
        return drafts

    def observe(self, outcomes: Any) -> None:
        (outcome,) = outcomes
        assert outcome.draft.is_chain and outcome.request.tokens[-1] == outcome.next_token
        path = [outcome.draft.tokens[node] for node in outcome.path]
        assert outcome.request.tokens[-1 - len(path) : -1] == path
        self.accepted += len(path) - 1
        super().observe(outcomes)

    def close(self) -> None:
        self.closed += 1


def test_accepted_drafts_save_passes(tiny: Tiny, endless: Any) -> None:
    model, drafter = endless(tiny("llama")), Watched()
    plain = run(model, [5, 6, 7], max_new_tokens=120)
    with drafting(model, drafter) as given, passes(model) as sizes:
        assert given is drafter
        assert run(model, [5, 6, 7], max_new_tokens=120) == plain
    assert len(sizes) == 120 - drafter.accepted < 90
    assert not drafter.closed, "the owner of a drafter closes it"


def oracle(whole: list[int]) -> Any:
    return lambda tokens, limit: [whole[len(tokens) : len(tokens) + 9]]


class Ends(StoppingCriteria):
    """A criterion that ends a text at its first token divisible by a number."""

    def __init__(self, divisor: int, start: int) -> None:
        self.divisor, self.start = divisor, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
        fits = input_ids[:, -1] % self.divisor == 0
        return fits & (input_ids.shape[1] > self.start)


def test_an_end_inside_a_draft_ends_the_text(
    tiny: Tiny, endless: Any, scripted: Any, tokenizer: Any
) -> None:
    """A token, string, criterion or length ends it where it would in plain decoding."""
    model, prompt = endless(tiny("llama")), [5, 6, 7]
    new = run(model, prompt, max_new_tokens=40)
    words = [word for token in new if (word := tokenizer.decode(token)).isalnum()]
    cases: list[dict[str, Any]] = [{"eos_token_id": token} for token in sorted(set(new))[::3]]
    cases += [{"stop_strings": [word], "tokenizer": tokenizer} for word in sorted(set(words))[:4]]
    cases += [{"stopping_criteria": [Ends(n, len(prompt) + 2)]} for n in (3, 7)]
    cases += [{"max_new_tokens": n} for n in (1, 2, 9, 10, 11)]
    assert len(words) > 3
    for case in cases:
        options = {"max_new_tokens": 40, **case}
        plain = run(model, prompt, **options)
        with drafting(model, scripted(oracle(prompt + new))), passes(model) as sizes:
            assert run(model, prompt, **options) == plain, case
        # No draft comes before the first token, and the end itself is never drafted.
        assert len(sizes) <= 2 + (len(plain) + 8) // 10, case


@pytest.mark.parametrize("planted", [False, True])
def test_sampled_text_follows_the_models_distribution(
    monkeypatch: pytest.MonkeyPatch, planted: bool
) -> None:
    """Tokens and drafted tokens occur as often as their probability given the text before.

    Over a long text the sum of (occurred, or not) less the probability is a martingale: its square
    grows as the sum of p (1 - p). The planted fault that the same check must find: drafts that
    claim to be drawn from a flat distribution are accepted too often.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024, initializer_range=0.7,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, drafter = LlamaForCausalLM(config).eval(), Watched(NgramDrafter.Config(depth=3))
    honest = adapter.Candidates.get_candidates

    def lying(self: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        text, probs = honest(self, input_ids)
        size = text.shape[1] - input_ids.shape[1]
        return text, torch.zeros(1, size, 3) if size else probs

    if planted:
        monkeypatch.setattr(adapter.Candidates, "get_candidates", lying)
    prompt = [0, 1, 2, 0, 1]
    with drafting(model, drafter):
        text = prompt + run(model, prompt, max_new_tokens=600, do_sample=True, top_k=0)
    assert drafter.accepted > 100
    with torch.inference_mode():
        probs_TV = model(torch.tensor([text])).logits[0].double().softmax(-1)

    def deviation(guesses: list[tuple[int, int]]) -> float:
        came, size = 0.0, 0.0
        for at, guess in guesses:
            p = float(probs_TV[at - 1, guess])
            came, size = came + (text[at] == guess) - p, size + p * (1 - p)
        return abs(came) / size**0.5

    assert (deviation(drafter.firsts) > 4) == planted
    if not planted:
        for token in range(3):
            assert deviation([(at, token) for at in range(len(prompt), len(text))]) < 4


@pytest.mark.parametrize("draft", ["recycle", "jacobi", "ngram+recycle", "skip", "auto"])
def test_drafters_that_need_the_model_are_refused(tiny: Tiny, draft: str) -> None:
    named = draft.split("+")[-1].replace("auto", "recycle")
    with pytest.raises(UsageError, match=f"^{named} cannot draft"), drafting(tiny("llama"), draft):
        pass


def test_what_cannot_be_served_is_refused(tiny: Tiny, checkpoint: Callable[..., Path]) -> None:
    model = tiny("llama")
    for draft, message in {
        "ngrm": "no drafter is called 'ngrm'",
        "ngram:tune": "leave out tune",
        str(checkpoint("llama")): "needs the model",
    }.items():
        with pytest.raises(UsageError, match=message), drafting(model, draft):
            pass
    with drafting(model, "ngram"):
        with pytest.raises(UsageError, match="drafts already"), drafting(model, "trigram"):
            pass
        with pytest.raises(UsageError, match="without an assistant_model"):
            run(model, [5], max_new_tokens=4, assistant_model=tiny("llama", 1))
        with pytest.raises(ValueError, match="batch_size = 1"):
            model.generate(torch.tensor([[5], [6]]), max_new_tokens=4)
    assert not PRIVATE & vars(model).keys()


def test_the_model_is_left_as_it_was_also_after_an_error(
    tiny: Tiny, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    before = model.generation_config.to_dict()
    with pytest.raises(ZeroDivisionError), drafting(model, scripted(lambda *_: [[1 // 0]])):
        assert vars(model).keys() >= PRIVATE
        run(model, [5, 6], max_new_tokens=4)
    assert model.generation_config.to_dict() == before
    assert not PRIVATE & vars(model).keys()


def test_what_was_asked_to_be_kept_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    with drafting(tiny("llama"), f"trigram:state={tmp_path / 'table'}"):
        run(tiny("llama"), [5, 6, 7], max_new_tokens=8)
    assert (tmp_path / "table").stat().st_size > 0


def test_a_streamer_in_another_thread_gets_the_text(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("llama")
    prompt = tokenizer("def make")["input_ids"]
    new = run(model, prompt, max_new_tokens=25)
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    with drafting(model, "ngram"):
        options = {"max_new_tokens": 25, "streamer": streamer}
        player = threading.Thread(target=run, args=(model, prompt), kwargs=options)
        player.start()
        text = "".join(streamer)
        player.join()
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_pipeline_drafts_as_well(tiny: Tiny, endless: Any, tokenizer: Any) -> None:
    model, drafter = endless(tiny("llama")), Watched()
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    plain = writer("def make", **options)
    with drafting(model, drafter):
        assert writer("def make", **options) == plain
    assert drafter.accepted > 5


def test_the_guides_examples_print_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs/guides/library.md").read_text()
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```\n", guide, flags=re.DOTALL)
    assert len(blocks) == guide.count("```python") > 5
    names: dict[str, Any] = {}
    for code, expected in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, names)
        assert out.getvalue().strip() == expected.strip()
