from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectool.decode.overhead import Overhead, measure_overhead


def test_share() -> None:
    assert abs(Overhead(loop=1.1, bare=1.0).share - 0.1) < 1e-12


def test_it_runs(tiny: Callable[..., PreTrainedModel]) -> None:
    measured = measure_overhead(tiny("llama"), [3, 4, 5], new_tokens=4)
    assert measured.loop > 0
    assert measured.bare > 0


@pytest.mark.slow
def test_the_loop_adds_at_most_a_tenth_to_a_model_of_100m() -> None:
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    assert measure_overhead(model, list(range(5, 37)), new_tokens=100).share < 0.1
