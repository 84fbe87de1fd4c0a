from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner, generate
from spectool.decode.options import SamplingParams
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.target import attention
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import SpectoolError, UnsupportedError

Tiny = Callable[..., PreTrainedModel]


def widened(model: PreTrainedModel, vocab: int) -> PreTrainedModel:
    """Resize the model's lm_head and embedding; shared ids keep their meaning."""
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(vocab, mean_resizing=False)
    return wide.eval()


def request_of(tokens: list[int], temperature: float, index: int = 0) -> Request:
    return Request(
        index=index,
        tokens=list(tokens),
        draws=Draws(0, index),
        sampling=SamplingParams(temperature=temperature, top_k=5),
        max_new_tokens=100,
        context=256,
    )


Begin = Callable[..., None]


def outcome_of(request: Request, path: list[int]) -> Any:
    return type("Outcome", (), {"row": request, "path": path})()


@pytest.mark.parametrize("vocab", [320, 384, 300])
def test_q_is_the_distribution_the_tokens_were_drawn_from(
    tiny: Tiny, begin: Begin, vocab: int
) -> None:
    """q is warped, and covers the target's vocabulary with zeros for ids that the draft lacks."""
    model, draft_model = tiny("llama"), widened(tiny("llama", 1), vocab)
    drafter = DraftModelDrafter(draft_model, target=AttentionTarget(model))
    request = request_of([5, 6, 7], 0.7)
    begin(drafter, [request])
    draft = drafter.propose([request], [9])[0]
    assert draft.kinds[1:] == ["iid"] * 4
    assert draft.probs_NV is not None
    assert draft.probs_NV.shape == (4, 320)
    with torch.inference_mode():
        logits = draft_model(torch.tensor([[5, 6, *draft.tokens]])).logits[0, 2:6, :320]
    kept = logits.topk(5).values[:, -1:]
    expected = (logits / 0.7).masked_fill(logits < kept, -torch.inf).softmax(-1)
    torch.testing.assert_close(draft.probs_NV[:, : expected.shape[1]], expected)
    assert (draft.probs_NV[:, expected.shape[1] :] == 0).all()
    assert all(draft.probs_NV[i, token] > 0 for i, token in enumerate(draft.tokens[1:]))


@pytest.mark.parametrize("accepted", [0, 2, 4])
def test_the_cache_follows_what_was_accepted(
    tiny: Tiny, endless: Any, begin: Begin, accepted: int
) -> None:
    """Also after full acceptance, where the last drafted token was never fed."""
    model = endless(tiny("llama"))
    drafter = DraftModelDrafter(model, target=AttentionTarget(model))
    request = request_of([5, 6, 7], 0)
    begin(drafter, [request])
    for _ in range(3):
        draft = drafter.propose([request], [9])[0]
        request.tokens += [*draft.tokens[1 : accepted + 1], 11]
        drafter.observe([outcome_of(request, list(range(accepted + 1)))])
        held = drafter._cache.tokens[0]
        assert held == request.tokens[: len(held)]
        assert len(held) == len(request.tokens) - (2 if accepted == 4 else 1)
    expected = generate(model, [request.tokens], max_new_tokens=4)[0].token_ids
    assert drafter.propose([request], [9])[0].tokens[1:] == expected


def test_no_deeper_than_budget_or_its_own_context(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, begin: Begin
) -> None:
    model = tiny("llama")
    drafter = DraftModelDrafter(
        tiny("llama", 1), DraftModelDrafter.Config(depth=5), target=AttentionTarget(model)
    )
    monkeypatch.setattr(drafter.draft_model, "context", 20)
    requests = [request_of([3] * size, 0, size) for size in (4, 17, 30, 6)]
    begin(drafter, requests)
    drafts = drafter.propose(requests, [9, 9, 9, 0])
    assert [len(draft) - 1 for draft in drafts] == [5, 3, 0, 0]


def test_a_target_with_a_longer_context_than_its_draft(tiny: Tiny, endless: Any) -> None:
    model = endless(tiny("llama"))
    short = copy.deepcopy(tiny("gpt2"))
    short.config.n_positions = 30
    drafter = DraftModelDrafter(short, target=AttentionTarget(model))
    plain = generate(model, [[5, 6, 7], [4] * 40], max_new_tokens=50, batch_size=2)
    result = generate(model, [[5, 6, 7], [4] * 40], draft=drafter, max_new_tokens=50, batch_size=2)
    assert [r.token_ids for r in result] == [r.token_ids for r in plain]
    assert result[0].drafted > 0
    assert result[1].drafted == 0


def test_a_tree_that_is_full_before_its_depth(tiny: Tiny, endless: Any) -> None:
    model, config = endless(tiny("llama")), DraftModelDrafter.Config(tree="rsd-c", nodes=2)
    drafter = DraftModelDrafter(tiny("llama", 1), config, target=AttentionTarget(model))
    result, plain = (
        generate(model, [[5, 6, 7]], draft=draft, max_new_tokens=9) for draft in (drafter, None)
    )
    assert result[0].token_ids == plain[0].token_ids and result[0].drafted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_of_nan_weights_is_refused(tiny: Tiny, temperature: float) -> None:
    broken = copy.deepcopy(tiny("llama", 1))
    broken.get_output_embeddings().weight.data[7] = torch.nan
    drafter = DraftModelDrafter(broken, target=AttentionTarget(tiny("llama")))
    with pytest.raises(SpectoolError, match=r"the draft model .* gave logits that are NaN"):
        generate(tiny("llama"), [[5, 6]], draft=drafter, max_new_tokens=9, temperature=temperature)


class Sealed(list[int]):
    """A list whose items may be read one by one, but which may not be copied as a whole."""

    def __iter__(self) -> Any:
        raise AssertionError("the whole text was walked through")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            assert key.start is not None
            assert key.start >= 2
        return list.__getitem__(self, key)


def test_a_step_does_not_walk_through_the_text(tiny: Tiny, begin: Begin) -> None:
    drafter = DraftModelDrafter(tiny("llama", 1), target=AttentionTarget(tiny("llama")))
    request = request_of([5, 6, 7], 0)
    begin(drafter, [request])
    drafter.propose([request], [9])
    request.tokens.append(8)
    drafter.observe([outcome_of(request, [0])])
    request.tokens = Sealed(request.tokens)
    assert len(drafter.propose([request], [9])[0]) == 5


def test_prompts_are_fed_in_chunks_too(
    tiny: Tiny, endless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = endless(tiny("llama"))
    monkeypatch.setattr(attention, "CHUNK", 8)
    drafter = DraftModelDrafter(model, target=AttentionTarget(model))
    result = generate(model, [list(range(2, 42))], draft=drafter, max_new_tokens=21)[0]
    assert result.accepted == result.drafted == 16


@pytest.mark.parametrize("vocab", [384, 300])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_padded_heads_work_in_the_loop(
    tiny: Tiny, endless: Any, vocab: int, temperature: float
) -> None:
    model = endless(tiny("llama"))
    drafter = DraftModelDrafter(widened(model, vocab), target=AttentionTarget(model))
    runner = Runner(model)
    plain = runner.generate([[5, 6, 7]], max_new_tokens=20)[0]
    runner.use(drafter)
    result = runner.generate([[5, 6, 7]], max_new_tokens=20, temperature=temperature)[0]
    assert result.lossless
    if vocab == 384:
        assert result.accepted > 0
    if temperature == 0:
        assert result.token_ids == plain.token_ids


def test_a_token_that_the_draft_has_not_ends_its_drafting(tiny: Tiny, begin: Begin) -> None:
    drafter = DraftModelDrafter(widened(tiny("llama"), 300), target=AttentionTarget(tiny("llama")))
    requests = [request_of([5, 310, 7], 0, 0), request_of([5, 6, 7], 0, 1)]
    begin(drafter, requests)
    for _ in range(2):
        drafts = drafter.propose(requests, [9, 9])
        assert [len(draft) - 1 for draft in drafts] == [0, 4]
        for request in requests:
            request.tokens.append(8)
        drafter.observe([outcome_of(request, [0]) for request in requests])


def test_another_vocabulary_is_refused(tiny: Tiny) -> None:
    target = AttentionTarget(tiny("llama"))
    with pytest.raises(UnsupportedError, match="draft model has 999 tokens, the target 320"):
        DraftModelDrafter(widened(tiny("llama"), 999), target=target)

    def words(*texts: str) -> PreTrainedTokenizerFast:
        vocab = {text: index for index, text in enumerate(texts)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token=texts[0]))
        )

    one, other = words("?", "a", "b"), words("?", "b", "a")
    DraftModelDrafter(tiny("llama", 1), target=target, tokenizer=one, target_tokenizer=one)
    with pytest.raises(
        UnsupportedError, match="2 tokens differ, 'a' has id 2 in it and 1 in the target's"
    ):
        DraftModelDrafter(tiny("llama", 1), target=target, tokenizer=other, target_tokenizer=one)
