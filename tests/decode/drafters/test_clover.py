"""Clover-2 against a loop over the equations, its alignment, and drafting that changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.decode.drafters import clover
from spectool.decode.drafters.clover import CloverDrafter, CloverHeads
from spectool.decode.generate import Runner
from spectool.decode.heads.base import TOP
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.teacher import read_features
from spectool.training import TrainingBatch

from ..trees import path_to
from . import bare
from .bare import bare_model, check_loss, llama_layer, make_batch, rms

PATHS = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0], [3], [1, 0, 2], [0, 0, 1]]
PATHS += [[1, 0, 2, 0], [0, 0, 0, 0, 1]]
TREE = [(path, 0.1) for path in PATHS]
make_heads = functools.partial(bare.make_heads, CloverHeads)


def res_attn(attn: Any, x_D: Tensor, e_D: Tensor) -> Tensor:
    """Compute ResAttn, one attention head after the other."""
    q = attn.q_proj.weight @ rms(x_D, attn.norm) + attn.q_proj.bias
    k = attn.k_proj.weight @ e_D + attn.k_proj.bias
    v = attn.v_proj.weight @ e_D + attn.v_proj.bias
    out = []
    for at in torch.arange(len(x_D)).chunk(attn.num_heads):
        cosine = q[at] @ k[at] / (q[at].square().sum() * k[at].square().sum()).sqrt()
        out.append(x_D[at] + cosine * v[at])
    return torch.cat(out)


def h_of(heads: CloverHeads, f_LD: Tensor, tokens: list[int]) -> Tensor:
    """Compute h [L, D] from the states and the token after each, with transformers' layers."""
    e_LD = heads.frozen.output.weight[tokens].detach()
    x_LD = torch.stack([res_attn(heads.attn_dec, f, e) for f, e in zip(f_LD, e_LD, strict=True)])
    for layer in heads.aug.layers:
        x_LD = llama_layer(layer, x_LD)
    return torch.stack([rms(x_D, heads.norm) for x_D in x_LD])


def chain(heads: CloverHeads, h_D: Tensor, drafted: list[int]) -> Tensor:
    """Compute the state that the head after these drafted tokens guesses from."""
    if not drafted:
        return rms(heads.head0.weight @ h_D + heads.head0.bias, heads.norm_head0)
    s_D, e_D = h_D, h_D
    for token in drafted:
        e_D = heads.frozen.output.weight[token].detach()
        s_D = res_attn(heads.regr.attn, s_D, e_D)
    mix = heads.regr.mix
    return rms(mix.weight @ torch.cat([s_D, e_D]) + mix.bias, heads.norm_regr)


@pytest.mark.parametrize("size", [None, 5])
def test_loss_and_gradient_are_those_of_the_equations(size: int | None) -> None:
    token_map = None if size is None else torch.tensor([1, 4, 8, 9, 16])
    model = bare_model(bias=True)
    heads = make_heads(model, token_map=token_map, num_heads=3)
    batch = make_batch(length=17, needs=heads.needs)
    kept = list(range(17)) if token_map is None else token_map.tolist()
    losses: list[list[Tensor]] = [[] for _ in range(3)]
    right, skipped = [0, 0, 0], 0
    for row in range(3):
        tokens = batch.tokens_BL[row].tolist()
        h_LD = h_of(heads, batch.features["layer -1"][row, :-1], tokens[1:])
        for position, i in itertools.product(range(17), range(3)):
            ahead = position + 2 + i
            if ahead >= 17 or not batch.loss_mask_BL[row, ahead]:
                continue
            teacher_D = batch.features["final"][row, ahead - 1]
            scores_V = model.output(teacher_D).detach()
            if int(scores_V.argmax()) not in kept:
                skipped += 1
                continue
            out_D = chain(heads, h_LD[position], tokens[position + 2 : ahead])
            logits_V = model.output.weight.detach() @ out_D + model.output.bias.detach()
            probs_loss = -(scores_V[kept].softmax(0) * logits_V[kept].log_softmax(0)).sum()
            apart = (out_D - teacher_D).abs()
            smooth = torch.where(apart < 1, 0.5 * apart.square(), apart - 0.5).mean()
            losses[i].append(probs_loss + 10 * smooth)
            right[i] += kept[int(logits_V[kept].argmax())] == tokens[ahead]
    assert (skipped > 0) == (size is not None)
    check_loss(heads, batch, lambda: zip(losses, right, strict=True), decay=0.7)


def batch_of(model: PreTrainedModel, heads: CloverHeads, tokens: list[int]) -> TrainingBatch:
    tokens_BL = torch.tensor([tokens])
    features = read_features(AttentionTarget(model), tokens_BL, heads.needs)
    return TrainingBatch(tokens_BL=tokens_BL, loss_mask_BL=tokens_BL >= 0, features=features)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "mixtral"])
def test_untrained_heads_predict_what_the_target_predicts(
    tiny: Callable[..., PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the noise of initial weights and the output of the two layers set to zero."""
    monkeypatch.setattr(clover, "_NOISE", 0.0)
    model = tiny(family)
    heads = CloverHeads(CloverHeads.Config(), model, None).eval()
    for layer in heads.aug._each:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    batch = batch_of(model, heads, prompt_of(9))
    with torch.no_grad():
        logits_V = model(batch.tokens_BL).logits[0, 4]
        for i, state_1D in enumerate(heads.states(batch, torch.tensor([0]), torch.tensor([4]))):
            torch.testing.assert_close(state_1D[0], batch.features["final"][0, 4])
            assert heads.guess(state_1D, i, 1).item() == logits_V.argmax()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_layers_begin_as_the_targets_last_where_that_is_llamas(
    tiny: Callable[..., PreTrainedModel], family: str
) -> None:
    model: Any = tiny(family)
    heads = CloverHeads(CloverHeads.Config(), model, None)
    last = AttentionTarget(model).layers()[-1].state_dict()
    for layer in heads.aug._each:
        same = [name in last and torch.equal(value, last[name])
                for name, value in layer.state_dict().items() if "norm" not in name]  # fmt: skip
        assert all(same) if family in ("llama", "mistral") else not any(same)


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40}])
def test_trees_are_those_of_a_loop_over_their_paths(
    tiny: Callable[..., PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every node is the guess of its rank after its own path, recomputed from the text."""
    model = tiny("llama")
    token_map = torch.arange(0, 120, 3) if "draft_vocab" in options else None
    heads = make_heads(model, token_map=token_map, **options)
    runner = Runner(model)
    drafter = CloverDrafter(heads, TREE)
    runner.use(drafter)
    propose, seen = drafter.propose, [0]

    def checked(rows: Any, budget: Any) -> Any:
        drafts = propose(rows, budget)
        for request, draft in zip(rows, drafts, strict=True):
            batch = batch_of(model, heads, request.tokens)
            f_1LD = batch.features["layer -1"][:, :-1]
            h_1LD = heads.augment(
                f_1LD, heads.read(batch.tokens_BL[:, 1:]), heads.rotary.text(f_1LD)
            )
            state_D = drafter._states[request]
            torch.testing.assert_close(state_D, h_1LD[0, -1], rtol=1e-4, atol=1e-5)
            for node in range(1, len(draft)):
                above = [draft.tokens[n] for n in path_to(draft, draft.parents[node])[1:]]
                guesses = heads.guess(chain(heads, state_D, above)[None], len(above), TOP)[0]
                assert draft.tokens[node] == guesses[draft.sources[node][-1]]
                seen[0] += 1
        return drafts

    monkeypatch.setattr(drafter, "propose", checked)
    with torch.inference_mode():
        runner.generate([prompt_of(n) for n in (9, 30, 2)], max_new_tokens=12, batch_size=3)
    assert seen[0] > 100
