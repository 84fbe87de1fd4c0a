"""The gradient of a step does not depend on how its texts are packed into rows."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from spectool.decode.heads.base import Heads
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.features import OnlineTexts
from spectool.distill.data.samples import Sample
from spectool.distill.losses import compute_loss
from spectool.methods import import_method


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("medusa", {}),
        ("hydra", {"variant": "plain", "num_heads": 3}),
        ("hydra", {"variant": "plus", "num_heads": 3}),
        ("clover", {"num_heads": 3}),
    ],
)
def test_packed_texts_teach_what_they_teach_alone(
    tiny: Callable[..., PreTrainedModel], family: str, method: str, options: dict[str, object]
) -> None:
    """Neither labels nor attention cross from one text to the next."""
    target = AttentionTarget(tiny(family))
    rng = random.Random(0)
    samples = [
        Sample(
            [rng.randrange(2, 320) for _ in range(size)],
            # First tokens are in the loss too, although no token of their text precedes them.
            [i < 3 or rng.random() < 0.8 for i in range(size)],
        )
        for size in (40, 17, 23, 9, 31)
    ]
    kind = import_method(method, "drafter").Heads
    found = []
    for rows in ([[0], [1], [2], [3], [4]], [[0, 3], [4, 1], [2]]):
        torch.manual_seed(0)
        heads: Heads = kind(kind.Config(**options), target.model, None)
        for module in heads.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in heads.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        done = compute_loss(heads, OnlineTexts(target, heads.needs, samples).batch(rows))
        found.append((done, {name: p.grad for name, p in heads.named_parameters()}))
    (alone, slopes), (packed, packed_slopes) = found
    assert packed.counts == alone.counts and packed.right == alone.right
    assert packed.loss == pytest.approx(alone.loss, rel=1e-5)
    for name, slope in slopes.items():
        assert slope is not None
        torch.testing.assert_close(packed_slopes[name], slope, atol=2e-6, rtol=1e-4)
