"""longrope: a text keeps to one set of rotary factors, as if it had been read in one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode.generate import Runner
from spectool.errors import UsageError

from ...conftest import VOCAB, make_model

ORIGINAL = 32
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 2.0, 8.0, 3.0],
}  # fmt: skip


def longrope(family: str) -> PreTrainedModel:
    overrides: dict[str, Any] = (
        {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    )
    model = make_model(family, rope_parameters=LONGROPE, **overrides)
    model.generation_config.eos_token_id = None
    return model


def ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


@torch.no_grad()
def top_ids(model: PreTrainedModel, text: list[int], begin: int, length: int) -> list[int]:
    """Return the top ids from token `begin` on in one pass of the text, padded to a length."""
    padded = text + [3] * (length - len(text))
    logits_1LV = model(input_ids=torch.tensor([padded]), use_cache=False).logits
    return logits_1LV[0, begin - 1 : len(text) - 1].argmax(-1).tolist()


@pytest.mark.parametrize("family", ["phi3", "llama"])
@pytest.mark.parametrize("draft", ["none", "ngram+recycle"])
def test_each_text_has_the_factors_of_its_length(family: str, draft: str) -> None:
    model = longrope(family)
    runner = Runner(model, draft=draft)
    for prompt, new in ((10, 8), (31, 1), (28, 20), (10, 40), (40, 12)):
        text = ids(prompt, prompt + new)
        (found,) = runner.generate([text], max_new_tokens=new)
        whole = text + found.token_ids
        length = len(whole) if len(whole) <= ORIGINAL else max(len(whole), ORIGINAL + 1)
        assert found.token_ids == top_ids(model, whole, prompt, length)
        # Also the first new token: nothing was read with the short factors.
        if len(whole) > ORIGINAL:
            early = top_ids(model, whole[: prompt + 1], prompt, ORIGINAL + 1)
            assert found.token_ids[:1] == early


def test_a_prompt_beyond_the_original_is_as_transformers_has_it() -> None:
    model, text = longrope("phi3"), ids(40, 1)
    wanted = model.generate(
        torch.tensor([text]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    (found,) = Runner(model).generate([text], max_new_tokens=12)
    assert text + found.token_ids == wanted[0].tolist()


def test_a_batch_of_short_and_long_texts_is_each_of_them_alone() -> None:
    runner = Runner(longrope("phi3"), draft="ngram")
    prompts = [ids(length, length) for length in (5, 40, 20, 33, 6)]
    alone = [runner.generate([prompt], max_new_tokens=12)[0].token_ids for prompt in prompts]
    together = runner.generate(prompts, max_new_tokens=12, batch_size=3)
    assert [result.token_ids for result in together] == alone


def test_a_chat_that_grows_beyond_it_reads_all_again() -> None:
    model = longrope("phi3")
    runner, text = Runner(model, draft="ngram"), ids(8, 0)
    for turn in range(4):
        (kept,) = runner.generate([text], max_new_tokens=6, reuse_cache=True)
        (fresh,) = Runner(model).generate([text], max_new_tokens=6)
        assert kept.token_ids == fresh.token_ids
        text += kept.token_ids + ids(4, turn)
    assert len(text) > ORIGINAL


def test_dynamic_frequencies_end_the_context_with_a_reason() -> None:
    rope = {**LONGROPE, "rope_type": "dynamic", "factor": 4.0}
    model = make_model("llama", rope_parameters=rope)
    assert Runner(model).target.context == ORIGINAL
    with pytest.raises(UsageError, match="holds at most 32") as caught:
        Runner(model, context=64)
    assert "dynamic rotary frequencies change" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="the context holds 32") as caught:
        Runner(model).generate([ids(40, 0)])
    assert "dynamic rotary frequencies change" in (caught.value.hint or "")
