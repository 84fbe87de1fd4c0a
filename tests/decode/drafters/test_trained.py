"""What every trained drafter satisfies: text, kept prefixes, gradients, learning, size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from spectool.decode.generate import Runner
from spectool.decode.heads.base import Heads
from spectool.decode.heads.inpass import InPassHeads
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.features import OnlineTexts
from spectool.distill.data.samples import Sample
from spectool.distill.losses import compute_loss, rank_labels
from spectool.methods import import_method, list_trainable
from spectool.training import TrainingBatch

from ...conftest import VOCAB
from ..conftest import plain_text
from .bare import bare_model, disturb

Tiny = Callable[..., PreTrainedModel]
OPTIONS: dict[str, dict[str, Any]] = {
    "hydra-plain": {"variant": "plain"},
    "ppd-ensemble": {"ensemble": 3, "num_heads": 2},
    "hidden-transfer": {"layers": "1-1-1"},
}
ALL = list(dict.fromkeys([*list_trainable(), *OPTIONS]))
PATHS = [(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0), (3,), (0, 0, 1)]
TREE = [(path, 0.6 / (1 + i)) for i, path in enumerate(PATHS)]
# The drafters that run for a family in `make test`: all for one, one of each kind for two others.
QUICK = {
    "llama": ALL,
    "gemma3": ["eagle3", "ppd"],
    "gpt2": ["medusa", "hidden-transfer", "chimera"],
}
MORE = ["llama-tied", "qwen3", "mistral", "opt", "gpt_neox", "phi3", "mixtral"]


def drafter_of(name: str) -> Any:
    return import_method(name.removesuffix("-plain").removesuffix("-ensemble"), "drafter")


def make_heads(model: Any, name: str, **options: Any) -> Heads:
    kind = drafter_of(name).Heads
    torch.manual_seed(0)
    config = kind.Config(**{**OPTIONS.get(name, {}), **options})
    heads: Heads = disturb(kind(config, model, None)).eval()
    return heads


def open_on(model: PreTrainedModel, name: str) -> Runner:
    return Runner(model, draft=drafter_of(name)(make_heads(model, name), TREE))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(name, family, marks=[] if name in QUICK.get(family, []) else pytest.mark.slow)
        for name in ALL
        for family in (*QUICK, *MORE)
    ],
)
def test_greedy_output_is_plain_decodings(
    tiny: Tiny, prompt_of: Callable[..., list[int]], name: str, family: str
) -> None:
    model = tiny(family)
    prompts = [prompt_of(length, seed=length) for length in (1, 7, 40, 19)]
    limits = [20, 3, 1, 12]
    plain = list(map(plain_text, [model] * 4, prompts, limits))
    runner = open_on(model, name)
    for batch_size in (1, 3):
        results = runner.generate(prompts, max_new_tokens=limits, batch_size=batch_size)
        assert [r.token_ids for r in results] == plain
        assert results[0].drafted > 0 and all(r.lossless for r in results)


@pytest.mark.parametrize("name", ALL)
def test_drafting_goes_on_from_a_kept_prefix(
    tiny: Tiny, prompt_of: Callable[..., list[int]], name: str
) -> None:
    """A chat's next turn feeds only new tokens, and drafts as a fresh run would."""
    model = tiny("llama")
    runner, fresh = open_on(model, name), open_on(model, name)
    first, more = prompt_of(20), prompt_of(6, seed=4)
    (turn,) = runner.generate([first], max_new_tokens=10, reuse_cache=True)
    second = first + turn.token_ids + more
    (kept,) = runner.generate([second], max_new_tokens=5, reuse_cache=True)
    (whole,) = fresh.generate([second], max_new_tokens=5)
    assert kept == whole and kept.drafted > 0
    kept_drafter: Any = runner.drafter
    fresh_drafter: Any = fresh.drafter
    for found, wanted in zip(
        getattr(kept_drafter, "_states", {}).values(),
        getattr(fresh_drafter, "_states", {}).values(),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if getattr(kept_drafter, "_draft_cache", None) is not None:
        kept_cache = kept_drafter._draft_cache._cache
        fresh_cache = fresh_drafter._draft_cache._cache
        assert kept_cache.lengths == fresh_cache.lengths
        (length,) = kept_cache.lengths
        pairs = zip(kept_cache.stores, fresh_cache.stores, strict=True)
        for kept_store, fresh_store in pairs:
            torch.testing.assert_close(
                kept_store.view(length), fresh_store.view(length), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_heads_and_nothing_else(tiny: Tiny, name: str) -> None:
    """Also where the heads share the target's lm_head, of which they then store nothing."""
    model = tiny("llama-tied")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    options = {"shared_head": True} if name in ("medusa", "hydra", "hydra-plain", "eagle3") else {}
    heads = make_heads(model, name, **options)
    tokens = torch.randint(2, VOCAB, (2, 19), generator=torch.Generator().manual_seed(5)).tolist()
    texts = OnlineTexts(
        AttentionTarget(model), heads.needs, [Sample(row, [True] * 19) for row in tokens]
    )
    # Extra rows pass through the target's layers, whose weights a training freezes.
    frozen = isinstance(heads, InPassHeads)
    model.requires_grad_(not frozen)
    try:
        compute_loss(heads, texts.batch([[0], [1]]))
    finally:
        model.requires_grad_(True)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())
    for key, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[key])
    if options or name == "clover":
        assert not any(len(value) == VOCAB for value in heads.state_dict().values())


@pytest.mark.parametrize(
    "name",
    ["hydra", "hydra-plain", "eagle3", "chimera", pytest.param("clover", marks=pytest.mark.slow)],
)
def test_heads_learn_the_token_at_their_own_distance_and_no_other(name: str) -> None:
    """Each text is a walk whose step size only two tokens reveal, so h_t alone is not enough."""
    period = 11
    tokens_BL = torch.stack([torch.arange(24) * step % period for step in (1, 3, 4, 7)])
    kind = drafter_of(name).Heads
    count = {"ttt_steps" if name == "eagle3" else "num_heads": 3}
    torch.manual_seed(0)
    config = kind.Config(**OPTIONS.get(name, {}), **count)
    heads: Heads = kind(config, bare_model(12, period), None)
    for module in heads.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    state_BLD = torch.eye(12)[tokens_BL]
    batch = TrainingBatch(
        tokens_BL=tokens_BL,
        loss_mask_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        features={"final": state_BLD, **{f"layer {n}": state_BLD for n in heads.needs.layers}},
    )
    # Probabilities and states of a random target say nothing about these texts.
    heads.loss = replace(heads.loss, target="labels", state_weight=0.0)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.02)
    for _ in range(120 if name == "clover" else 60):
        optimizer.zero_grad()
        compute_loss(heads, batch)
        optimizer.step()
    assert (rank_labels(heads, batch) == 0).all()


@pytest.mark.parametrize("name", ["hydra", "hydra-plain", "chimera", "clover", "eagle3"])
def test_a_token_changes_the_heads_after_it_and_no_head_before(tiny: Tiny, name: str) -> None:
    model = tiny("llama")
    heads = make_heads(model, name)
    tokens = torch.randint(2, VOCAB - 1, (20,), generator=torch.Generator().manual_seed(5)).tolist()
    batch = OnlineTexts(AttentionTarget(model), heads.needs, [Sample(tokens, [True] * 20)]).batch(
        [[0]]
    )
    position = (torch.tensor([0]), torch.tensor([10]))
    before = list(heads.states(batch, *position))
    for drafted in range(heads.num_heads):
        changed_BL = batch.tokens_BL.clone()
        changed_BL[0, 11 + drafted] += 1
        after = heads.states(replace(batch, tokens_BL=changed_BL), *position)
        differs = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert differs == [k >= drafted for k in range(heads.num_heads)]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # 28 d^2 + 4 d V, without biases; Hydra++ has a decoder layer and 12 more blocks.
        ("hydra-plain", 994.1),
        ("hydra", 994.1 + 202.4 + 12 * 4096 * 4097 / 1e6),
        # Two layers and 9 d^2, as published: 556 M.
        ("clover", 2 * 202.4 + 9 * 4096**2 / 1e6),
        # 12 d^2, a layer and 8 d V.
        ("chimera", 12 * 4096**2 / 1e6 + 202.4 + 8 * 4096 * 32000 / 1e6),
    ],
)
def test_parameters_of_llama_7b(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = bare_model(4096, 32000)
        model.config = LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000
        )
        kind = drafter_of(name).Heads
        heads = kind(kind.Config(**OPTIONS.get(name, {})), model, None)
    found = sum(p.numel() for p in heads.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.6)
