"""`generate` and `Runner`: texts, stop strings, streams, caches, refused options."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import spectool
from spectool.decode.cache import TreeCache
from spectool.decode.generate import Runner, generate
from spectool.decode.options import SamplingParams
from spectool.decode.request import Request
from spectool.decode.streaming import TextStream
from spectool.errors import CheckpointError, SpectoolError, UsageError

from ..conftest import VOCAB

Tiny = Callable[..., PreTrainedModel]


@pytest.fixture
def opened(checkpoint: Callable[..., Path], endless: Any, tiny: Tiny) -> Runner:
    """Open the tiny Llama with its tokenizer and no end-of-text token."""
    path = checkpoint("llama")
    return Runner(endless(tiny("llama")), tokenizer=AutoTokenizer.from_pretrained(path))


def stopped_text(text: str, stop: str) -> str:
    return text[: text.index(stop)]


def test_the_public_function_opens_a_checkpoint(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    received: list[str] = []
    results = spectool.generate(
        path,
        prompts=["def make", "return the"],
        draft="ngram",
        max_new_tokens=12,
        dtype=torch.float32,
        on_tokens=lambda index, tokens, text, drafted: received.append(text),
    )
    plain = spectool.generate(path, prompts=["def make", "return the"], max_new_tokens=12)
    for result, other in zip(results, plain, strict=True):
        assert result.token_ids == other.token_ids
        assert result.text == other.text
        assert result.lossless
        assert other.forwards == len(other.token_ids)
    assert "".join(received) == "".join(result.text for result in results)


def test_text_continues_the_prompt(opened: Runner) -> None:
    prompt = "from __future__ import"
    result = opened.generate([prompt], max_new_tokens=20)[0]
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    ids = tokenizer(prompt)["input_ids"] + result.token_ids
    assert prompt + result.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_token_ids_are_taken_as_they_are(opened: Runner) -> None:
    assert opened.tokenizer is not None
    ids = opened.tokenizer("return")["input_ids"]
    assert (
        opened.generate([ids, "return"], max_new_tokens=5, batch_size=2)[0]
        == (opened.generate(["return"], max_new_tokens=5)[0])
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stop_strings_inside_an_accepted_path(
    opened: Runner, scripted: Any, batch_size: int
) -> None:
    """The text ends before the stop string, the tokens with the one that completed it."""
    prompts = ["def make", "import"]
    plain = opened.generate(prompts, max_new_tokens=40)
    assert opened.tokenizer is not None
    known = [
        opened.tokenizer(p)["input_ids"] + r.token_ids for p, r in zip(prompts, plain, strict=True)
    ]

    def oracle(tokens: list[int], limit: int) -> list[list[int]]:
        whole = next(ids for ids in known if ids[: len(tokens)] == tokens)
        return [whole[len(tokens) : len(tokens) + 7]]

    opened.use(scripted(oracle))
    text = plain[0].text
    stops = [text[at : at + 3] for at in range(1, len(text) - 3) if text[at : at + 3].isascii()]
    for stop in stops[::5]:
        received: dict[int, str] = {0: "", 1: ""}

        def on_tokens(index: int, tokens: Sequence[int], text: str, drafted: int) -> None:
            received[index] += text  # noqa: B023
            assert stop not in received[index]  # noqa: B023

        results = opened.generate(
            prompts, max_new_tokens=40, stop=[stop], batch_size=batch_size, on_tokens=on_tokens
        )
        assert results[0].text == stopped_text(plain[0].text, stop) == received[0]
        assert results[0].finish_reason == "stop"
        count = len(results[0].token_ids)
        assert results[0].token_ids == plain[0].token_ids[:count]
        assert stop in opened.tokenizer.decode(results[0].token_ids)
        assert results[1].text == received[1]


def test_end_of_text_ids_come_from_the_generation_config(
    opened: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = opened.generate(["def"], max_new_tokens=10)[0].token_ids
    config = opened.target.model.generation_config
    monkeypatch.setattr(config, "eos_token_id", [plain[3], plain[5]])
    monkeypatch.setattr(config, "temperature", 0.1)
    result = opened.generate(["def"], max_new_tokens=10)[0]
    assert result.finish_reason == "eos"
    assert result.token_ids == plain[: plain.index(plain[3]) + 1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_interrupted_text_was_streamed_whole(
    opened: Runner, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Ctrl-C strikes at every call to drafter, requests, texts, cache and callback in turn."""
    prompts = ["def make", "import torch", "return the"]
    opened.use("ngram:min_n=1")
    plain = opened.generate(prompts, max_new_tokens=8)
    # The end of this text may begin the stop string, so it is held back.
    options: dict[str, Any] = {"max_new_tokens": 8, "stop": [plain[0].text[3:5] + "\0"]}
    left = -1

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def struck(wrapped: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            strike()
            result = wrapped(*given, **named)
            strike()
            return result

        return call

    for owner, name in (
        (type(opened.drafter), "propose"),
        (TextStream, "push"),
        (TextStream, "finish"),
        (Request, "extend"),
        (Request, "finish_if_full"),
        (TreeCache, "commit"),
        (TreeCache, "select"),
    ):
        monkeypatch.setattr(owner, name, struck(getattr(owner, name)))
    at, reasons = 0, set[str]()
    while "interrupted" in reasons or at == 0:
        at += 7
        left, reasons = at, set()
        texts, tokens = [""] * 3, [list[int]() for _ in prompts]

        def on_tokens(index: int, new: list[int], text: str, drafted: int) -> None:
            texts[index] += text  # noqa: B023
            tokens[index] += new  # noqa: B023
            strike()

        results = opened.generate(
            prompts, batch_size=batch_size, on_tokens=on_tokens, keep_interrupted=True, **options
        )
        reasons = {result.finish_reason for result in results}
        for result, whole, text, new in zip(results, plain, texts, tokens, strict=True):
            assert new == result.token_ids == whole.token_ids[: len(new)]
            assert text == result.text
            assert whole.text.startswith(text.rstrip("\ufffd"))
    assert at > 100


def test_text_says_which_of_it_was_drafted(opened: Runner, scripted: Any) -> None:
    """In every commit the drafted tokens' text comes first, then that of the verifier's token."""
    assert opened.tokenizer is not None
    prompt: list[int] = opened.tokenizer("def make")["input_ids"]
    new = opened.generate([prompt], max_new_tokens=30)[0].token_ids
    opened.use(scripted(lambda tokens, limit: [(prompt + new)[len(tokens) : len(tokens) + 3]]))
    stream = TextStream(opened.tokenizer, prompt)
    received: list[tuple[list[int], str, int]] = []
    opened.generate(
        [prompt], max_new_tokens=30, on_tokens=lambda index, *commit: received.append(commit)
    )
    assert [len(tokens) for tokens, _, _ in received] == [1, 4, 4, 4, 4, 4, 4, 4, 1]
    for tokens, text, drafted in received[:-1]:
        assert text[:drafted] == "".join(map(stream.push, tokens[:-1]))
        assert text[drafted:] == stream.push(tokens[-1])
    received.clear()
    # An end inside an accepted path was drafted like the rest of it.
    at = next(i for i in range(1, 30) if i % 4 and new[i] not in new[:i])
    opened.generate(
        [prompt], eos=[new[at]], on_tokens=lambda index, *commit: received.append(commit)
    )
    tokens, text, drafted = received[-1]
    assert tokens == new[at - at % 4 + 1 : at + 1] and drafted == len(text)


def test_nothing_is_decoded_before_the_end_without_a_callback(
    opened: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real_decode = type(opened.tokenizer).decode
    monkeypatch.setattr(
        type(opened.tokenizer),
        "decode",
        lambda self, *given, **named: decoded.append(given) or real_decode(self, *given, **named),
    )
    result = opened.generate(["def make"], max_new_tokens=30)[0]
    assert result.text
    assert len(decoded) <= 2


def test_a_runner_opens_and_pairs_without_a_forward(
    opened: Runner, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]
) -> None:
    monkeypatch.setattr(opened.target, "prefill", None)
    small = opened.open(f"{checkpoint('llama', seed=1)}:depth=2")
    warm = SamplingParams(temperature=1)
    assert opened.verification(small, warm).name == "rejection"
    assert opened.verification(opened.open("auto:tune=false"), warm).name == "token-match"
    assert opened.verification(opened.open(None), warm).lossless
    with pytest.raises(UsageError, match="drawn independently"):
        opened.verification(opened.open("ngram"), warm, verify="k-seq")
    with pytest.raises(UsageError, match="no drafter is called ''"):
        opened.open("")
    assert opened.drafter_name == "none"
    opened.use(small)
    assert opened.drafter_name == "draft_model"
    opened.use("auto:tune=false")
    assert opened.drafter_name == "trigram+recycle"


def test_sampling_follows_the_seed_and_the_prompt(opened: Runner) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9}
    same = opened.generate(["def", "def"], seed=1, **options)
    again = opened.generate(["def", "def"], seed=1, batch_size=2, **options)
    assert same == again
    assert same[0].token_ids != same[1].token_ids
    assert opened.generate(["def"], seed=2, **options)[0].token_ids != same[0].token_ids


def test_a_kept_cache_changes_nothing_but_the_work(opened: Runner) -> None:
    """As in a chat: the next prompt is the conversation so far and something new."""
    first = opened.generate([[5, 6, 7, 8]], max_new_tokens=9)[0]
    longer = [5, 6, 7, 8, *first.token_ids, 9, 10, 11]
    fed: list[int] = []
    handle = opened.target.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: fed.append(inputs[0].shape[1])
    )
    kept = opened.generate([longer], max_new_tokens=9, reuse_cache=True)[0]
    handle.remove()
    assert fed[0] == 4
    assert kept == opened.generate([longer], max_new_tokens=9)[0]
    changed = [5, 6, 99, *longer[3:]]
    assert opened.generate([changed], max_new_tokens=9, reuse_cache=True) == opened.generate(
        [changed], max_new_tokens=9
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"temperature": -1}, "--temperature -1"),
        ({"stop": [""]}, "must not be empty"),
        ({"temperature": 1, "verify": "greedy"}, "changes the distribution"),
        ({"verify": "likely"}, "no verifier is called"),
    ],
)
def test_wrong_options(opened: Runner, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened.generate(["def"], **options)


@pytest.mark.parametrize("draft", ["none", "ngram:min_n=1"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_numbers_end_the_run(
    tiny: Tiny, draft: str, temperature: float
) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.get_output_embeddings().weight.data[7] = torch.nan
    with pytest.raises(SpectoolError, match="the model gave logits that are NaN or inf") as error:
        generate(model, [[5, 6]], draft=draft, max_new_tokens=9, temperature=temperature)
    assert error.value.exit_code == 1


def test_a_very_low_temperature_is_greedy(opened: Runner) -> None:
    plain = opened.generate(["def make"], max_new_tokens=20)[0]
    for temperature in (1e-45, 1e-12):
        cold = opened.generate(["def make"], max_new_tokens=20, temperature=temperature)[0]
        assert cold.token_ids == plain.token_ids


def test_lossy_is_reported(opened: Runner) -> None:
    result = opened.generate(["def"], max_new_tokens=3, temperature=1, verify="greedy", lossy=True)
    assert not result[0].lossless


def test_prompts_that_cannot_be_continued(opened: Runner, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="prompt 2 has 300 tokens; the context holds 256"):
        opened.generate([[3], [3] * 300])
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        opened.generate([[]])
    with pytest.raises(UsageError, match="needs a tokenizer"):
        generate(tiny("llama"), ["text"])
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        generate(tiny("llama"), [[3]], stop=["x"])
    with pytest.raises(UsageError, match="dtype is for a model given as a path"):
        generate(tiny("llama"), [[3]], dtype=torch.float32)


def test_an_empty_text_starts_from_the_start_token(opened: Runner) -> None:
    assert opened.generate([""], max_new_tokens=4) == opened.generate([[0]], max_new_tokens=4)


def test_low_precision_stays_near_greedy(checkpoint: Callable[..., Path]) -> None:
    """In bfloat16 passes of unequal size round differently; every token is close to the best."""
    path = checkpoint("llama")
    runner = Runner(path, draft="ngram:min_n=1", dtype=torch.bfloat16)
    prompt = list(range(20, 30)) * 2
    tokens = runner.generate([prompt], max_new_tokens=40)[0].token_ids
    with torch.inference_mode():
        logits = runner.target.model(torch.tensor([prompt + tokens])).logits[0].float()
    for at, token in enumerate(tokens, start=len(prompt) - 1):
        best = logits[at].max()
        ulp = 2.0 ** (torch.floor(torch.log2(best.abs())) - 7)
        assert best - logits[at, token] <= 8 * ulp


@pytest.mark.parametrize("token", [-1, VOCAB, 10**9])
def test_ids_that_the_model_has_not_are_refused(tiny: Tiny, token: int) -> None:
    with pytest.raises(CheckpointError, match=f"^prompt 2 gives id {token}, but the model has"):
        Runner(tiny("llama")).generate([[3, 4], [3, token]], max_new_tokens=2)
