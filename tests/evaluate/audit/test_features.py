from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectool.errors import NotFinite, TextError
from spectool.evaluate.audit.features import audit_features, classify
from spectool.evaluate.audit.options import FeaturesOptions
from spectool.shared_options import LoadOptions

Checkpoint = Callable[..., Path]


def test_the_probe_finds_clusters_and_only_those_it_saw() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 12, generator=generator)
    labels_R = torch.randint(0, 6, (300,), generator=generator)
    states_RD = centres[labels_R] + torch.randn(300, 12, generator=generator)
    guessed_R = classify(states_RD[:200], 10 * labels_R[:200], states_RD[200:])
    assert (guessed_R == 10 * labels_R[200:]).double().mean() > 0.9


def test_tokens_are_read_back_from_states_and_not_from_shuffled_ones(
    checkpoint: Checkpoint,
) -> None:
    load = LoadOptions(model=str(checkpoint("llama")))
    options = FeaturesOptions(limit=9000, places=(0, 1), gate=("most.lower>=0.99", "most<=1"))
    found = audit_features(load, options)
    assert [layer.name for layer in found.layers] == ["layer 0", "layer 1", "final"]
    for layer in found.layers:
        assert layer.read[0].lower > max(layer.control[0].upper, found.chance.upper)
        # In a model with small sums the token before is less plain than its own.
        assert layer.read[0].value > layer.read[1].value
    assert found.most.value == max(layer.read[0].value for layer in found.layers)
    assert found.gates[1].holds
    with pytest.raises(TextError, match="10 or more"):
        audit_features(load, FeaturesOptions(limit=600))


def test_a_model_that_overflows_is_refused(overflowing: Path) -> None:
    load = LoadOptions(model=str(overflowing), dtype="float32")
    with pytest.raises(NotFinite, match="cannot be audited: layer 1"):
        audit_features(load, FeaturesOptions(limit=9000))
