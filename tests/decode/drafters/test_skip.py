"""The thinned model lacks the skipped blocks while it drafts, and only then."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from spectool.decode.cache import TreeCache
from spectool.decode.drafters import skip
from spectool.decode.drafters.skip import SkipDrafter
from spectool.decode.generate import Runner
from spectool.decode.request import Request
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import UnsupportedError

from ..conftest import request_of
from ..trees import path_to

Tiny = Callable[..., PreTrainedModel]
Begin = Callable[..., None]
FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "mixtral"]


def random_tokens(seed: int, size: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 320) for _ in range(size)]


def attach(model: PreTrainedModel, **options: int) -> tuple[SkipDrafter, AttentionTarget]:
    drafter, target = SkipDrafter(SkipDrafter.Config(**options)), AttentionTarget(model)
    drafter.attach(target)
    return drafter, target


def begin_batch(
    model: PreTrainedModel, begin: Begin, texts: list[list[int]], **options: int
) -> tuple[SkipDrafter, list[Request], TreeCache]:
    """Begin a batch whose cache holds all tokens of these texts but the last."""
    drafter, target = attach(model, **options)
    requests, cache = (
        [request_of(text, index) for index, text in enumerate(texts)],
        target.cache(len(texts)),
    )
    target.prefill(cache, [text[:-1] for text in texts])
    begin(drafter, requests, cache)
    return drafter, requests, cache


@torch.inference_mode()
def logits_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@contextmanager
def without_layers(layers: list[nn.Module]) -> Iterator[None]:
    """Let these layers return their inputs."""

    def hook(module: nn.Module, given: Any, named: Any, output: Any) -> Any:
        hidden = given[0] if given else named["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_two_blocks_and_is_nothing_without_them(tiny: Tiny, family: str) -> None:
    """The first and the last layer are never skipped."""
    model = tiny(f"{family}-deep")
    drafter, target = attach(model)
    assert len(drafter._blocks) == 2 * (5 - 2)
    tokens = random_tokens(0, 12)
    for layer in (1, 2, 3):
        with drafter._thinned(frozenset([2 * layer - 2, 2 * layer - 1])):
            found = logits_of(model, tokens)
        with without_layers([target.layers()[layer]]):
            expected = logits_of(model, tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, logits_of(model, tokens), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_is_skipped_by_itself(tiny: Tiny, family: str) -> None:
    model = tiny(f"{family}-deep")
    drafter, _ = attach(model)
    found = []
    for at in range(len(drafter._blocks)):
        with drafter._thinned(frozenset([at])):
            found.append(logits_of(model, [5, 6, 7])[-1])
    found.append(logits_of(model, [5, 6, 7])[-1])
    assert torch.stack(found).unique(dim=0).shape[0] == len(found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
        ("GPTNeoXJapanese", {}),
    ],
)
def test_what_blocks_return_besides_is_none(name: str, options: dict[str, Any]) -> None:
    """GPT-OSS's MLP returns its router's scores, GPT-NeoX Japanese's attention a bias."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    counts = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **counts, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    drafter, target = attach(model)
    with drafter._thinned(frozenset([0, 1])):
        found = [logits_of(model, [5, 6, 7]) for _ in range(2)]
    with without_layers([target.layers()[1]]):
        expected = logits_of(model, [5, 6, 7])
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_matrices_with_a_kernel_are_skipped_too() -> None:
    """OPT's MLP is two linear layers of the decoder layer."""
    config = transformers.OPTConfig(
        vocab_size=320,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    drafter, target = attach(model)
    skipped = frozenset(at for at in range(len(drafter._blocks)) if at % 2 == 1)
    tokens = random_tokens(0, 12)
    with drafter._thinned(skipped):
        expected = logits_of(model, tokens)[-1]
        found = target.prefill(target.cache(1), [tokens]).logits_BV[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_at_first_every_second_layer_is_skipped(tiny: Tiny) -> None:
    assert attach(tiny("llama-deep"))[0].skipped == {0, 1, 4, 5}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_with_nothing_skipped_all_drafts_are_accepted(
    tiny: Tiny,
    endless: Any,
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    monkeypatch.setattr(skip, "_SURE", 0.0)
    # The chain fills the tree, so there are no siblings; 1 + 4 * 7 tokens take four full drafts.
    drafter = SkipDrafter(SkipDrafter.Config(nodes=6, depth=6, search=0))
    runner = Runner(endless(tiny("llama-deep")), draft=drafter)
    drafter.skipped = frozenset()
    prompts = [prompt_of(9), prompt_of(20, seed=3)]
    results = runner.generate(prompts, max_new_tokens=29, batch_size=batch_size)
    assert [(r.drafted, r.accepted, r.forwards) for r in results] == [(24, 24, 5)] * 2


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_the_chain_is_what_the_thinned_model_finds_likeliest(
    tiny: Tiny, begin: Begin, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Against the thinned model after the target's cache, for unequal lengths and budgets."""
    monkeypatch.setattr(skip, "_SURE", 0.0)
    model = tiny(f"{family}-deep")
    texts = [random_tokens(1, 21), random_tokens(2, 6)]
    drafter, requests, _ = begin_batch(model, begin, texts, nodes=64, depth=5)
    drafts = drafter.propose(requests, [9, 3])
    for text, draft, depth in zip(texts, drafts, (5, 3), strict=True):
        assert max(draft.depths) == depth
        assert draft.tokens[0] == text[-1]
        spine = path_to(draft, depth)
        for at, node in enumerate(spine):
            logits_V = thinned_logits(model, drafter, text[:-1], draft.tokens[: at + 1])[-1]
            children = [n for n in range(len(draft)) if draft.parents[n] == node]
            if at < depth:
                assert children[0] == spine[at + 1]
                # The largest logits in order, up to swaps of rounding size.
                found = logits_V[[draft.tokens[n] for n in children]]
                best = logits_V.topk(len(children)).values
                torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-5)
                # By the probability of the chain's token: 3, 5, 8 or 10, the token itself included.
                share = float(logits_V.softmax(-1).max())
                wanted = 3 if share >= 0.95 else 5 if share >= 0.8 else 8 if share >= 0.5 else 10
                assert len(children) == wanted
            else:
                assert children == []


@torch.inference_mode()
def thinned_logits(
    model: PreTrainedModel, drafter: SkipDrafter, text: list[int], tokens: list[int]
) -> Tensor:
    """Return the thinned model's logits after `tokens`; the whole model read the text before."""
    past: Any = {AttentionTarget(model).cache_name: DynamicCache(config=model.config)}
    model(torch.tensor([text]), use_cache=True, **past)
    with drafter._thinned(drafter.skipped):
        logits: Tensor = model(torch.tensor([tokens]), **past).logits[0]
    return logits


def test_a_chain_ends_after_a_token_it_is_not_sure_of(
    tiny: Tiny, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, requests, _ = begin_batch(
        tiny("llama-deep"), begin, [random_tokens(1, 9)] * 3, depth=6
    )
    shares = iter([[0.9, 0.7, 0.9], [0.9, 0.9, 0.81], [0.1, 0.9, 0.9], *[[0.9] * 3] * 3])
    take_likeliest = skip._take_likeliest

    def top_ids(logits_BV: Tensor) -> tuple[list[list[int]], list[float]]:
        return take_likeliest(logits_BV)[0], next(shares)

    monkeypatch.setattr(skip, "_take_likeliest", top_ids)
    assert [max(draft.depths) for draft in drafter.propose(requests, [9, 9, 9])] == [3, 1, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_targets_cache_is_left_alone(tiny: Tiny, begin: Begin, family: str) -> None:
    """Drafting and scoring write into the tail only."""
    texts = [random_tokens(1, 60), random_tokens(2, 45)]
    drafter, requests, cache = begin_batch(tiny(f"{family}-deep"), begin, texts)
    # As if all but a few tokens had been generated.
    for request in requests:
        request.num_prompt = 5

    def committed() -> list[Tensor]:
        return [
            kept[b, :, :length].clone()
            for store in cache.stores
            for kept in store.fields
            for b, length in enumerate(cache.lengths)
        ]

    before, held = committed(), [list(tokens) for tokens in cache.tokens]
    for _ in range(3):
        drafter.propose(requests, [9, 2])
    assert drafter.tried == 2
    assert cache.tokens == held
    assert len(before) == 2 * 2 * 5
    assert all(torch.equal(one, two) for one, two in zip(before, committed(), strict=True))


def own_forwards(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_the_model_is_whole_again_also_after_an_error(tiny: Tiny, begin: Begin) -> None:
    model = tiny("opt-deep")
    text = random_tokens(3, 12)
    plain = logits_of(model, text)
    drafter, requests, _ = begin_batch(model, begin, [text])
    thinned = []

    def fail(module: nn.Module, given: Any) -> None:
        thinned.extend(own_forwards(model))
        raise RuntimeError("out of memory")

    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            drafter.propose(requests, [9])
    finally:
        handle.remove()
    # Attention, fc1 and fc2 of the second and the fourth layer.
    assert len(thinned) == 6
    assert own_forwards(model) == []
    assert torch.equal(logits_of(model, text), plain)
    drafter.propose(requests, [9])
    assert own_forwards(model) == []


@pytest.mark.parametrize("skipped", [frozenset(), frozenset([1, 2]), frozenset(range(6))])
def test_a_set_is_scored_by_the_tokens_that_it_predicts(
    tiny: Tiny, begin: Begin, skipped: frozenset[int]
) -> None:
    """The last 32 tokens of the first request, against a pass by transformers alone."""
    model = tiny("llama-deep")
    half = random_tokens(4, 11)
    with torch.inference_mode():
        text = model.generate(
            torch.tensor([half]), max_new_tokens=50, do_sample=False, eos_token_id=None
        )[0].tolist()
    drafter, requests, _ = begin_batch(model, begin, [text, random_tokens(5, 40)])
    drafter.skipped = skipped
    logits = thinned_logits(model, drafter, text[:-33], text[-33:-1])
    right = (logits.argmax(-1) == torch.tensor(text[-32:])).sum()
    assert drafter._score(requests, skipped) == float(right / 32)
    if not skipped:
        assert right == 32


def test_the_search_keeps_the_best_set(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, _ = attach(tiny("llama-deep"), search=5)
    first, request = drafter.skipped, request_of([5])
    scores = iter([0.5, 0.4, 0.7, 0.7, 0.6, 0.9, 1.0])
    asked: list[frozenset[int]] = []

    def score(requests: list[Request], skipped: frozenset[int]) -> float:
        asked.append(skipped)
        return next(scores)

    monkeypatch.setattr(drafter, "_score", score)
    request.tokens += range(32)
    drafter._search([request])
    assert asked == []
    request.tokens.append(7)
    kept = []
    for _ in range(9):
        drafter._search([request])
        kept.append(drafter.skipped)
    # The best set so far is scored first, then at most `search` others.
    assert asked[0] == first
    assert len(asked) == 6
    assert all(len(candidate) == int(6 * 0.45) for candidate in asked[1:])
    # The best scores after each step: .5, .5, .7, .7, .7 and .9.
    assert kept == [first, first, asked[2], asked[2], asked[2], *[asked[5]] * 4]
    assert drafter.score == 0.9


def test_the_search_ends_with_a_set_that_is_good_enough(
    tiny: Tiny, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best set so far is scored again on each text."""
    drafter, _ = attach(tiny("llama-deep"))
    calls: list[Any] = []
    monkeypatch.setattr(drafter, "_score", lambda requests, skipped: calls.append(skipped) or 0.96)
    for _ in range(2):
        request = request_of([5])
        request.tokens += range(40)
        begin(drafter, [request])
        for _ in range(4):
            drafter._search([request])
        drafter.remove(request)
    assert calls == [drafter.skipped] * 2
    assert drafter.tried == 0


def test_a_model_of_two_layers_decodes_plainly_and_says_so(tiny: Tiny, endless: Any) -> None:
    runner = Runner(endless(tiny("llama")))
    plain = runner.generate([[5, 6, 7]], max_new_tokens=9)[0]
    runner.use("skip")
    result = runner.generate([[5, 6, 7]], max_new_tokens=9)[0]
    assert result.token_ids == plain.token_ids
    assert (result.drafted, result.forwards) == (0, 9)
    assert runner.target.notes == ["skip: a model of 2 layers has none to skip; decoding plainly"]


def test_the_note_is_given_once(tiny: Tiny) -> None:
    """Also where the drafter is changed and chosen again, as in a chat."""
    runner = Runner(tiny("llama"))
    for draft in ("skip", "ngram", "skip"):
        runner.use(draft)
    assert len(runner.target.notes) == 1


@pytest.mark.parametrize(
    ("children", "message"),
    [
        ([], "skip: found no attention block in a layer of llama"),
        (["self_attn"], "skip: found no MLP block in a layer of llama"),
        (["attn", "fc1"], "skip: found no MLP block in a layer of llama"),
        (["mlp"], "skip: found no attention block in a layer of llama"),
    ],
)
def test_a_layer_without_such_blocks_is_refused_by_name(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, children: list[str], message: str
) -> None:
    target = AttentionTarget(tiny("llama"))
    layer = nn.Module()
    for name in children:
        layer.add_module(name, nn.Identity())
    monkeypatch.setattr(target, "layers", lambda: [layer] * 3)
    with pytest.raises(UnsupportedError, match=message):
        SkipDrafter().attach(target)
