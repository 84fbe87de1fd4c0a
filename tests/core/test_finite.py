"""The first module of a forward whose output is NaN or infinite is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import all_finite
from spectool.model.finite import first_not_finite

from ..conftest import make_model

IDS = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize(
    ("tensor", "finite"),
    [
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([1, 2]), True),
        (torch.tensor([]), True),
        (torch.tensor([1.0, torch.nan]), False),
        (torch.tensor([torch.inf, -torch.inf], dtype=torch.bfloat16), False),
        (torch.full((4,), 3e38), True),
        (torch.full((8,), 65504.0, dtype=torch.float16), True),
        (torch.tensor([1.0, torch.nan]).to(torch.float8_e5m2), False),
    ],
)
def test_all_finite(tensor: torch.Tensor, finite: bool) -> None:
    assert all_finite(tensor) is finite


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens", ""),
        ("model.layers.0", ".mlp.down_proj"),
        ("model.layers.1", ".mlp.up_proj"),
        ("lm_head", ""),
    ],
)
def test_the_first_place_is_named(name: str, part: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        next(model.get_submodule(name + part).parameters()).fill_(torch.inf)
    assert first_not_finite(model, IDS) == name


def test_a_sound_model_has_no_such_place(tiny: Callable[..., PreTrainedModel]) -> None:
    for family in ("gpt2", "qwen3_moe"):
        assert first_not_finite(tiny(family), IDS) is None
