"""Hidden Transfer: number of parameters, choice of layers, and that training works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from spectool.decode.drafters.hidden_transfer import HiddenTransferHeads
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import UnsupportedError, UsageError

from .bare import bare_model
from .test_inpass import batch_of
from .test_ppd import fall


def test_training_lowers_the_loss(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    heads = HiddenTransferHeads(HiddenTransferHeads.Config(), model, None)
    first, last = fall(heads, AttentionTarget(model), rate=0.01)
    assert last < first - 0.1
    model.zero_grad(set_to_none=True)


def test_parameters_of_7b() -> None:
    """3 (d^2 + d), 50.3 M at width 4096."""
    with torch.device("meta"):
        model = bare_model(4096, 5)
        model.config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32)
        heads = HiddenTransferHeads(HiddenTransferHeads.Config(), model, None)
    assert sum(p.numel() for p in heads.parameters()) == 3 * (4096**2 + 4096)
    assert heads.layers == [16, 16, 16] and heads.needs.layers == (15,)


@pytest.mark.parametrize(
    ("asked", "num_layers", "message"),
    [
        ("4-4", 8, "expected 3 layers"),
        ("4-5-4", 8, "none before an earlier"),
        ("0-1-2", 8, "layers 1 to 7"),
        ("6-7-8", 8, "layers 1 to 7"),
        ("4-x-4", 8, "expected positive numbers"),
    ],
)
def test_layers_that_will_not_do(asked: str, num_layers: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        HiddenTransferHeads(HiddenTransferHeads.Config(layers=asked), bare_model(), None)


def test_one_layer_is_too_few() -> None:
    model = bare_model()
    model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedError, match="two layers at least"):
        HiddenTransferHeads(HiddenTransferHeads.Config(), model, None)


def test_each_row_is_the_nodes_state_at_its_layer_times_its_matrix(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    """Inputs of the layers at the extra rows, captured by hooks."""
    model = tiny("llama-deep")
    target = AttentionTarget(model)
    options = {"layers": "1-2-2"}
    heads = HiddenTransferHeads(HiddenTransferHeads.Config(**options), model, None)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens_BL = torch.tensor([prompt_of(12)])
    batch = batch_of(target, heads, tokens_BL)
    seen: dict[int, torch.Tensor] = {}

    def watch(layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            seen[layer] = inputs[0]

        return hook

    layers: Any = target.layers()
    handles = [layers[n].input_layernorm.register_forward_pre_hook(watch(n)) for n in (1, 2)]
    with torch.no_grad():
        list(heads.states(batch, torch.tensor([0]), torch.tensor([7])))
        for handle in handles:
            handle.remove()
        states = model(tokens_BL, output_hidden_states=True).hidden_states
        for slot, layer in enumerate((1, 2, 2)):
            wanted_D = heads.transfer[slot](states[layer][0, 7])
            torch.testing.assert_close(seen[layer][0, slot], wanted_D, rtol=1e-4, atol=1e-5)
