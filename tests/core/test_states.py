from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectool.data.states import StateCodec

VOCABULARY, WIDTH = 421, 24


def lm_head() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    return weight_VD, torch.randn(VOCABULARY, generator=generator)


def log_probs(scale: float = 1.0, cap: float | None = None) -> Tensor:
    states_RD = 3 * torch.randn(43, WIDTH, generator=torch.Generator().manual_seed(1))
    weight_VD, bias_V = lm_head()
    logits_RV = scale * (states_RD @ weight_VD.T) + bias_V
    return torch.log_softmax(logits_RV if cap is None else cap * torch.tanh(logits_RV / cap), -1)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shown", [WIDTH + 1, WIDTH + 100, VOCABULARY])
def test_a_few_log_probabilities_give_all_others(shown: int, scale: float) -> None:
    weight_VD, bias_V = lm_head()
    rows = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[:shown]
    logp_RV = log_probs(scale)
    states_RD = StateCodec(weight_VD[rows], bias_V[rows]).encode(logp_RV[:, rows])
    assert states_RD.shape == (43, WIDTH) and states_RD.dtype == torch.float32
    error = (StateCodec(weight_VD, bias_V).decode(states_RD) - logp_RV).abs().max()
    # With not one to spare the roundings of float32 are multiplied by the condition of W.
    assert error < (2e-5 if shown > WIDTH + 1 else 1e-2)


def test_too_few_log_probabilities_or_capped_logits_do_not() -> None:
    weight_VD, bias_V = lm_head()
    whole, logp_RV = StateCodec(weight_VD, bias_V), log_probs()
    few = StateCodec(weight_VD[: WIDTH - 4], bias_V[: WIDTH - 4])
    assert (whole.decode(few.encode(logp_RV[:, : WIDTH - 4])) - logp_RV).abs().max() > 0.1
    capped_RV = log_probs(cap=2.0)
    assert (whole.decode(whole.encode(capped_RV)) - capped_RV).abs().max() > 0.1
