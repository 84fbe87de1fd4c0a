"""PPD: number of parameters, what prompt tokens attend to, and that training works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from spectool.decode.drafters.ppd import PPDDrafter, PPDHeads
from spectool.decode.heads.base import Heads
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.losses import compute_loss

from ...conftest import VOCAB
from .bare import bare_model
from .test_inpass import batch_of


def fall(heads: Heads, target: AttentionTarget, *, rate: float) -> tuple[float, float]:
    """Train on two texts; return the summed loss before and after."""
    generator = torch.Generator().manual_seed(2)
    tokens_BL = torch.randint(2, VOCAB, (2, 24), generator=generator)
    batch = batch_of(target, heads, tokens_BL)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate)
    losses = []
    torch.manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(sum(compute_loss(heads, batch).means))
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("ensemble", [1, 2])
def test_training_lowers_the_loss(tiny: Callable[..., Any], ensemble: int) -> None:
    model = tiny("llama")
    heads = PPDHeads(PPDHeads.Config(ensemble=ensemble), model, None)
    first, last = fall(heads, AttentionTarget(model), rate=0.05)
    assert last < first - 0.05
    model.zero_grad(set_to_none=True)


def test_parameters_are_the_embeddings_alone() -> None:
    """K n D numbers: 12,288 for an ensemble of one at width 4096."""
    model = bare_model(4096, 5)
    for ensemble in (1, 4):
        heads = PPDHeads(PPDHeads.Config(ensemble=ensemble), model, None)
        assert list(heads.state_dict()) == ["prompt_embeds"]
        assert sum(p.numel() for p in heads.parameters()) == 12288 * ensemble


def test_members_of_an_ensemble_attend_only_to_their_own_rows() -> None:
    heads = PPDHeads(PPDHeads.Config(num_heads=3, ensemble=2), bare_model(), None)
    # Rows 1 to 6 of node 0: the parent is the same ensemble member of the prompt token before.
    assert [parent for parent, _ in heads.extra_rows] == [0, 0, 1, 2, 3, 4]
    assert [slot for _, slot in heads.extra_rows] == [0, 1, 2, 3, 4, 5]
    drafter = PPDDrafter(heads, [((0,), 0.5), ((0, 0), 0.2)])
    draft = drafter._draft(9, [[4, 5], [6, 7]], 8)
    for row, (parent, slot) in enumerate(draft.extra_rows, start=len(draft)):
        if slot < 2:
            assert parent < len(draft)
        else:
            above = draft.extra_rows[parent - len(draft)]
            assert above[1] == slot - 2 and parent < row


def test_fresh_embeddings_are_like_the_targets() -> None:
    model = bare_model(64, 400)
    model.config = LlamaConfig(hidden_size=64, num_attention_heads=2)
    torch.nn.init.normal_(model.embedding.weight, mean=0.3, std=2.0)
    torch.manual_seed(0)
    heads = PPDHeads(PPDHeads.Config(num_heads=8), model, None)
    offset_D = heads.prompt_embeds.flatten(0, 1) - model.embedding.weight.mean(0)
    assert 0.1 < offset_D.std().item() < 0.3
