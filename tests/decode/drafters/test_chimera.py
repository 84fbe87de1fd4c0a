"""Chimera against a loop over the equations, its alignment, and drafting that changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.decode.drafters.chimera import ChimeraDrafter, ChimeraHeads
from spectool.decode.generate import Runner
from spectool.decode.heads.base import TOP
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.teacher import read_features
from spectool.training import TrainingBatch

from ...conftest import DENSE
from ..trees import path_to
from . import bare
from .bare import bare_model, check_loss, llama_layer, make_batch

PATHS = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0], [3], [1, 0, 2], [0, 0, 1]]
PATHS += [[1, 0, 2, 0]]
TREE = [(path, 0.1) for path in PATHS]
make_heads = functools.partial(bare.make_heads, ChimeraHeads)


def trigram_of(heads: ChimeraHeads, tokens: list[int]) -> Tensor:
    """Compute g of the last of these tokens, which are a text from its beginning."""
    three = ([tokens[0]] * 2 + tokens)[-3:]
    z = torch.cat([heads.frozen.embed(torch.tensor(token)) for token in three])
    u = heads.trigram.block.weight @ z + heads.trigram.block.bias
    return heads.trigram.proj.weight @ (z + u * torch.sigmoid(u))


def chain(heads: ChimeraHeads, final_LD: Tensor, tokens: list[int], run: Any) -> Tensor:
    """Compute what the head after these tokens reads; the first L have the target's states."""
    length = len(final_LD)
    rows = [trigram_of(heads, tokens[:end]) for end in range(length + 1, len(tokens) + 1)]
    y_LD = run(heads.ctx.layer, torch.cat([final_LD, torch.stack(rows)]))
    return torch.cat([final_LD[-1], y_LD[-1]])


@pytest.mark.parametrize(("size", "probs_weight"), [(None, 1.0), (11, 0.25), (11, 0.0)])
def test_loss_and_gradient_are_those_of_the_equations(
    size: int | None, probs_weight: float
) -> None:
    """All positions at once against the layer over each position's own sequence."""
    token_map = None if size is None else torch.tensor([0, 1, 3, 4, 6, 8, 9, 11, 12, 14, 16])
    model = bare_model(bias=True)
    heads = make_heads(model, token_map=token_map, num_heads=3, probs_weight=probs_weight)
    batch = make_batch(length=15)
    kept = list(range(17)) if token_map is None else token_map.tolist()
    losses: list[list[Tensor]] = [[] for _ in range(3)]
    right = [0, 0, 0]
    for row, position, j in itertools.product(range(3), range(15), range(3)):
        tokens, ahead = batch.tokens_BL[row].tolist(), position + 2 + j
        if ahead >= 15 or not batch.loss_mask_BL[row, ahead] or tokens[ahead] not in kept:
            continue
        final_LD = batch.features["final"][row]
        scores_V = model.output(final_LD[ahead - 1]).detach()
        if probs_weight and int(scores_V.argmax()) not in kept:
            continue
        read = chain(heads, final_LD[: position + 1], tokens[:ahead], llama_layer)
        output: Any = heads.heads[j]
        logq_V = (output.weight @ read + output.bias).log_softmax(0)
        label_loss = -logq_V[kept.index(tokens[ahead])]
        probs_loss = -(scores_V[kept].softmax(0) * logq_V).sum()
        losses[j].append(label_loss + probs_weight * probs_loss)
        right[j] += kept[int(logq_V.argmax())] == tokens[ahead]
    check_loss(heads, batch, lambda: zip(losses, right, strict=True))


@pytest.mark.parametrize("family", [*DENSE, "mixtral"])
def test_untrained_heads_predict_what_the_target_predicts(
    tiny: Callable[..., PreTrainedModel], prompt_of: Callable[..., list[int]], family: str
) -> None:
    """With the random layer's output set to zero, which lm_head adds to the target's state."""
    model = tiny(family)
    heads = ChimeraHeads(ChimeraHeads.Config(), model, None).eval()
    for matrix in (heads.trigram.proj, heads.ctx.layer.self_attn.o_proj):
        nn.init.zeros_(matrix.weight)
    tokens_BL = torch.tensor([prompt_of(9)])
    features = read_features(AttentionTarget(model), tokens_BL, heads.needs)
    batch = TrainingBatch(tokens_BL=tokens_BL, loss_mask_BL=tokens_BL >= 0, features=features)
    with torch.no_grad():
        logits_V = model(tokens_BL).logits[0, 4]
        for j, read in enumerate(heads.states(batch, torch.tensor([0]), torch.tensor([4]))):
            assert heads.guess(read, j, 1).item() == logits_V.argmax()


def test_a_trigram_is_of_three_tokens_in_their_order() -> None:
    heads = make_heads(bare_model())
    tokens = [3, 4, 5]
    embedded_3D = heads.embed(torch.tensor(tokens))
    torch.testing.assert_close(heads.trigram(embedded_3D), trigram_of(heads, tokens))
    for order in ((1, 0, 2), (0, 2, 1)):
        assert not torch.allclose(heads.trigram(embedded_3D), heads.trigram(embedded_3D[[*order]]))


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40}])
def test_trees_are_those_of_a_loop_over_their_paths(
    tiny: Callable[..., PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every node is the guess of its rank after its own path, recomputed from the text.

    The layer's cache holds exactly the committed tokens.
    """
    model = tiny("llama")
    token_map = torch.arange(0, 120, 3) if "draft_vocab" in options else None
    heads = make_heads(model, token_map=token_map, **options)
    runner = Runner(model)
    drafter = ChimeraDrafter(heads, TREE)
    runner.use(drafter)
    propose, seen = drafter.propose, [0]

    def whole(layer: Any, x_LD: Tensor) -> Tensor:
        out_LD: Tensor = layer(x_LD[None], heads.rotary.text(x_LD[None]))[0]
        return out_LD

    def checked(rows: Any, budget: Any) -> Any:
        drafts = propose(rows, budget)
        if max(budget) > 0:
            assert drafter._draft_cache._cache.lengths == [
                len(request.tokens) - 1 for request in rows
            ]
        for request, draft in zip(rows, drafts, strict=True):
            final_LD = read_features(
                runner.target, torch.tensor([request.tokens[:-1]]), heads.needs
            )["final"][0]
            torch.testing.assert_close(drafter._states[request], final_LD[-1])
            for node in range(1, len(draft)):
                above = [draft.tokens[n] for n in path_to(draft, draft.parents[node])]
                read = chain(heads, final_LD, request.tokens[:-1] + above, whole)
                guesses = heads.guess(read, len(above) - 1, TOP)
                assert draft.tokens[node] == guesses[draft.sources[node][-1]]
                seen[0] += 1
        return drafts

    monkeypatch.setattr(drafter, "propose", checked)
    with torch.inference_mode():
        runner.generate([prompt_of(n) for n in (9, 30, 1)], max_new_tokens=[12, 5, 9], batch_size=3)
    assert seen[0] > 100
