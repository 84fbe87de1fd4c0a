"""Hydra against loops over the equations, its alignment, and drafting that changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from spectool.decode.drafters.hydra import HydraDrafter, HydraHeads
from spectool.decode.generate import Runner
from spectool.decode.heads.base import TOP
from spectool.decode.heads.layer import DecoderLayer, Rotary
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.losses import compute_probs
from spectool.distill.teacher import read_features
from spectool.training import TrainingBatch

from ...conftest import DENSE, VOCAB
from ..trees import path_to
from . import bare
from .bare import bare_model, check_loss, llama_layer, make_batch

PATHS = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0], [3], [1, 0, 2], [0, 0, 1]]
TREE = [(path, 0.1) for path in PATHS]
VARIANTS = ["plain", "plus"]
make_heads = functools.partial(bare.make_heads, HydraHeads)


def disable_dropout(heads: HydraHeads) -> None:
    """Disable dropout."""
    for module in heads.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def state_of(heads: HydraHeads, i: int, h_D: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Compute head i's state after h and these tokens, one equation per line."""
    head: Any = heads.heads[i]
    z = torch.cat([h_D, *(heads.frozen.embed(torch.tensor(token)) for token in tokens)])
    w = head.W.weight @ z + head.W.bias
    state = head.R.weight @ z + w * torch.sigmoid(w)
    for block in head.blocks:
        u = block.weight @ state + block.bias
        state = state + u * torch.sigmoid(u)
    return state


def logits_of(heads: HydraHeads, i: int, h_D: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    output: Any = heads.heads[i].lm_head  # type: ignore[union-attr]
    logits: torch.Tensor = output.weight @ state_of(heads, i, h_D, tokens) + output.bias
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_the_equations(variant: str) -> None:
    batch = make_batch()
    heads = make_heads(bare_model(bias=True), variant=variant, num_heads=3)
    disable_dropout(heads)
    output = heads.frozen.output

    def by_head() -> Iterator[tuple[list[torch.Tensor], int]]:
        states = list(batch.features["final"])
        if heads.prefix is not None:
            states = [llama_layer(heads.prefix, final_LD) for final_LD in states]
        for i in range(3):
            losses, right = [], 0
            for row, position in itertools.product(range(3), range(23)):
                ahead = position + 2 + i
                if ahead < 23 and batch.loss_mask_BL[row, ahead]:
                    tokens = batch.tokens_BL[row].tolist()
                    between = tokens[position + 1 : ahead]
                    logits_V = logits_of(heads, i, states[row][position], between)
                    probs_V = nn.functional.one_hot(batch.tokens_BL[row, ahead], 17).float()
                    if variant == "plus":
                        teacher_D = batch.features["final"][row, ahead - 1]
                        probs_V = (output.weight @ teacher_D + output.bias).softmax(-1).detach()
                    losses.append(-(probs_V * torch.log_softmax(logits_V, -1)).sum())
                    right += int(logits_V.argmax() == tokens[ahead])
            yield losses, right

    check_loss(heads, batch, by_head)


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_heads_predict_what_the_target_predicts(
    tiny: Callable[..., PreTrainedModel], family: str, variant: str
) -> None:
    """Plain heads exactly; those with attention once their random layer's output is zero."""
    model = tiny(family)
    heads = HydraHeads(HydraHeads.Config(variant=variant), model, None).eval()
    if heads.prefix is not None:
        nn.init.zeros_(heads.prefix.self_attn.o_proj.weight)
        nn.init.zeros_(heads.prefix.mlp.down_proj.weight)
    tokens_BL = torch.randint(2, VOCAB, (1, 9))
    features = read_features(AttentionTarget(model), tokens_BL, heads.needs)
    batch = TrainingBatch(tokens_BL=tokens_BL, loss_mask_BL=tokens_BL > 0, features=features)
    with torch.no_grad():
        logits_V = model(tokens_BL).logits[0, 4]
        states = list(heads.states(batch, torch.tensor([0]), torch.tensor([4])))
        torch.testing.assert_close(
            compute_probs(heads, features["final"][0, 4:5])[0],
            logits_V.softmax(-1),
            rtol=1e-4,
            atol=1e-6,
        )
    for i, state_1D in enumerate(states):
        assert heads.guess(state_1D, i, 1).item() == logits_V.argmax()


def test_a_token_changes_what_follows_it_and_no_other_path() -> None:
    heads = make_heads(bare_model(), variant="plain")
    state_BD = torch.randn(2, 12)
    path_BPA = torch.randint(0, 17, (2, 3, 3))
    before = heads.step(state_BD, path_BPA, 2)
    changed = path_BPA.clone()
    changed[0, 1, 1] = (changed[0, 1, 1] + 1) % 17
    after = heads.step(state_BD, changed, 2)
    differs = (before != after).any(-1)
    assert differs.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40}, {"shared_head": True}])
def test_trees_are_those_of_a_loop_over_their_paths(
    tiny: Callable[..., PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    variant: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nodes are the guesses of their rank after their path; prefix attention reads all tokens."""
    model = tiny("llama")
    token_map = torch.arange(0, 120, 3) if "draft_vocab" in options else None
    heads = make_heads(model, token_map=token_map, variant=variant, **options)
    runner = Runner(model)
    drafter = HydraDrafter(heads, TREE)
    runner.use(drafter)
    propose, seen = drafter.propose, [0]

    def checked(rows: Any, budget: Any) -> Any:
        drafts = propose(rows, budget)
        for request, draft in zip(rows, drafts, strict=True):
            tokens_1L = torch.tensor([request.tokens[:-1]])
            features = read_features(runner.target, tokens_1L, heads.needs)
            final_1LD = features["final"]
            if heads.prefix is not None:
                final_1LD = heads.prefix(final_1LD, heads.rotary.text(final_1LD))
            state_D = drafter._states[request]
            torch.testing.assert_close(state_D, final_1LD[0, -1], rtol=1e-4, atol=1e-5)
            for node in range(1, len(draft)):
                above = [draft.tokens[n] for n in path_to(draft, draft.parents[node])]
                out_D = state_of(heads, len(above) - 1, state_D, above)
                guesses = heads.guess(out_D[None], len(above) - 1, TOP)[0].tolist()
                assert draft.tokens[node] == guesses[draft.sources[node][-1]]
                seen[0] += 1
        return drafts

    monkeypatch.setattr(drafter, "propose", checked)
    with torch.inference_mode():
        runner.generate([prompt_of(n) for n in (9, 30, 2)], max_new_tokens=12, batch_size=3)
    assert seen[0] > 100


def test_the_layer_has_llamas_names_and_rotary_angles_are_never_rounded() -> None:
    config = LlamaConfig(hidden_size=12, intermediate_size=24, num_attention_heads=2)
    names = set(LlamaDecoderLayer(config, 0).state_dict())
    assert set(DecoderLayer(config).state_dict()) == names
    cos, _ = Rotary(config).at(torch.tensor([[1001]]), torch.zeros(1, dtype=torch.bfloat16))
    want = torch.tensor(1001.0).cos().bfloat16()
    assert cos.dtype == torch.bfloat16 and cos[0, 0, 0] == want
