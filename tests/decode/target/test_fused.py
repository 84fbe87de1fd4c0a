"""Fused layers against the modules they replace, and a node against its mates."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

from spectool.cli import app
from spectool.decode.generate import generate
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.open import open_target
from spectool.decode.tree import Draft, chain
from spectool.errors import UnsupportedError, UsageError
from spectool.kernels import build
from spectool.kernels.steps import Rotate

from ...conftest import DENSE, FAMILIES, make_model

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="no kernels here")

# Experts keep their modules, whose products are torch's.
INDEPENDENT = list(FAMILIES)
DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = [[5, 9, 3, 17, 22, 8, 11], [7, 4], [12, 30, 2, 6, 19, 25, 9, 40, 13, 3, 8]]
TREE = Draft([7, 31, 30, 8, 11, 3, 25, 4], [-1, 0, 0, 2, 2, 4, 4, 6])


def logits_of(target: Any) -> list[Tensor]:
    """Return the logits of prompts of different lengths, then of trees after them."""
    cache = target.cache(len(PROMPTS))
    first = target.prefill(cache, PROMPTS).logits_BV
    drafts = [TREE, Draft([1, 2], [-1, 0]), chain([6, 5, 4], kind="deterministic")]
    passed = target.verify(cache, drafts).logits_BNV
    return [first, *(rows[: len(draft)] for rows, draft in zip(passed, drafts, strict=True))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_compute_what_modules_do(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    expected = logits_of(open_target(model, forward="modules"))
    target = open_target(model, forward="fused")
    assert target.num_fused == target.num_layers and not target.unfused
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for found, other in zip(logits_of(target), expected, strict=True):
        # In bfloat16 a router may choose another expert for a row.
        wrong = ((found - other).abs().amax(-1) > tolerance * other.abs().max()).float().mean()
        assert wrong <= (0 if family in DENSE or dtype == torch.float32 else 0.2)
    # And back.
    released = logits_of(open_target(model, forward="modules"))
    assert all(map(torch.equal, released, expected))


def alone(target: AttentionTarget, prompt: list[int], text: Sequence[int]) -> Tensor:
    """Return the logits [N, V] after the tokens of a text, one a pass."""
    cache, found = target.cache(1), []
    target.prefill(cache, [prompt])
    for token in text:
        found.append(target.verify(cache, [chain([token], kind="deterministic")]).logits_BNV[0, 0])
        cache.commit([[token]], [[0]])
    return torch.stack(found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", INDEPENDENT)
def test_a_node_does_not_depend_on_its_mates(family: str, dtype: torch.dtype) -> None:
    target = AttentionTarget(make_model(family).to(dtype))
    texts = [[(7 * row + 3 * i) % 60 for i in range(64)] for row in range(len(PROMPTS))]
    expected = [alone(target, *each) for each in zip(PROMPTS, texts, strict=True)]
    for width in (2, 3, 17, 64):
        cache = target.cache(len(PROMPTS))
        target.prefill(cache, PROMPTS)
        for start in range(0, 64 - width + 1, width):
            parts = [text[start : start + width] for text in texts]
            chains = [chain(part, kind="deterministic") for part in parts]
            passed = target.verify(cache, chains).logits_BNV
            for rows, one in zip(passed, expected, strict=True):
                assert torch.equal(rows, one[start : start + width])
            cache.commit(parts, [range(width)] * len(parts))
    # The first tokens of a text among others, in a tree.
    tree = Draft([0, 31, 3, 8, 6, 5, 25, 9], [-1, 0, 0, 2, 2, 4, 4, 4])
    cache = target.cache(1)
    target.prefill(cache, PROMPTS[:1])
    passed = target.verify(cache, [tree]).logits_BNV[0, [0, 2, 4, 7]]
    assert torch.equal(passed, expected[0][:4])


@pytest.mark.parametrize("family", INDEPENDENT)
def test_drafted_text_is_plain_text_in_bfloat16(family: str) -> None:
    model = make_model(family).to(torch.bfloat16)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    prompts = [[*prompt, *prompt] for prompt in PROMPTS]
    plain = generate(model, prompts, max_new_tokens=48)
    for draft, batch in (("ngram", 1), ("trigram+recycle", 3), ("skip", 2)):
        drafted = generate(model, prompts, draft=draft, batch_size=batch, max_new_tokens=48)
        assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
        assert draft == "skip" or sum(each.forwards for each in drafted) < 3 * 48


def test_passes_call_no_module_inside_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_model("llama")
    target = AttentionTarget(model)

    def fail(*given: Any, **options: Any) -> None:
        raise AssertionError("a module ran")

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", fail)
    logits_of(target)
    with pytest.raises(AssertionError, match="a module ran"):
        logits_of(open_target(model, forward="modules"))


def test_layers_that_compute_something_else_keep_their_modules() -> None:
    model: Any = make_model("llama")
    kind = type(model.model.layers[1])

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
            states: Tensor = super().forward(hidden_states, **options)
            return states * 1.001

    model.model.layers[1].__class__ = Scaled
    expected = logits_of(AttentionTarget(model, forward="modules"))
    target = AttentionTarget(model)
    assert target.num_fused == 1
    assert target.unfused == {"its steps do not compute what its modules do": 1}
    for found, other in zip(logits_of(target), expected, strict=True):
        assert (found - other).abs().max() <= 1e-5 * other.abs().max()
    with pytest.raises(UnsupportedError, match="1 of 2 layers keep their modules"):
        open_target(model, forward="fused")


def test_bounds_that_random_states_may_not_reach_keep_the_modules() -> None:
    model: Any = make_model("llama")
    model.config.clip_qkv = 8.0
    target = AttentionTarget(model)
    assert target.unfused == {"clip_qkv bounds numbers inside": 2}


def test_capped_scores() -> None:
    model = make_model("gemma2", attn_logit_softcapping=0.7)
    expected = logits_of(open_target(model, forward="modules"))
    for found, other in zip(logits_of(open_target(model, forward="fused")), expected, strict=True):
        assert (found - other).abs().max() <= 1e-5 * other.abs().max()
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.attn_logit_softcapping = None
    assert not torch.allclose(logits_of(open_target(model))[0], expected[0], atol=1e-3)


def test_other_parameters_keep_the_modules() -> None:
    model: Any = make_model("llama")
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    target = AttentionTarget(model)
    assert target.unfused == {"parameters besides those of a standard layer": 1}


def test_other_caches_keep_the_modules() -> None:
    target = AttentionTarget(make_model("llama"), kv="int8")
    assert target.num_fused == 0
    assert target.unfused == {"keys and values are kept as int8": 2}


def test_changed_weights_are_seen() -> None:
    model: Any = make_model("llama")
    target = AttentionTarget(model)
    with torch.no_grad():
        # In C in place; the norm's weight, which C has a copy of, too.
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.model.layers[0].input_layernorm.weight.mul_(3)
        model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(
            model.model.layers[1].self_attn.q_proj.weight * 2
        )
    found = logits_of(target)
    for one, other in zip(found, logits_of(open_target(model, forward="modules")), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_hooks_inside_of_a_layer_are_called() -> None:
    model: Any = make_model("llama")
    target = AttentionTarget(model)
    called: list[Any] = []
    with model.model.layers[1].mlp.register_forward_hook(lambda *given: called.append(given)):
        logits_of(target)
    assert len(called) == 2
    logits_of(target)
    assert len(called) == 2


def test_a_wrong_forward_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="expected one of auto, fused, modules"):
        open_target(make_model("llama"), forward="quick")
    given = ["generate", str(checkpoint("llama")), "--prompt", "x", "--forward", "quick"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2 and "--forward quick" in result.output


def test_a_model_that_was_fused_can_be_trained_and_saved(tmp_path: Path) -> None:
    # The matrices of GPT-2 are laid out anew.
    model: Any = make_model("gpt2")
    expected = model(torch.tensor([[5, 6, 7]])).logits
    AttentionTarget(model)
    loss = model(torch.tensor([[5, 6, 7]])).logits.square().mean()
    loss.backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(again(torch.tensor([[5, 6, 7]])).logits, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_may_ignore_the_positions_that_they_are_given(dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
    config = transformers.SmolLM3Config(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
        no_rope_layers=[1, 0],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    target: Any = open_target(model, forward="fused")
    turned = [
        any(isinstance(step, Rotate) for step in layer.fused.program.steps)
        for layer in target.layers()
    ]
    assert turned == [True, False]


def test_a_sum_that_is_scaled_keeps_its_modules_in_bfloat16() -> None:
    config = transformers.GraniteConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        residual_multiplier=0.97,
        initializer_range=0.2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    assert AttentionTarget(model).num_fused == 0


def test_the_sum_with_experts_is_compared_too() -> None:
    model: Any = make_model("mixtral")
    layer = model.model.layers[0]

    class Shifted(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
            states: Tensor = super().forward(hidden_states, *args, **options)
            return states + 1

    layer.__class__ = Shifted
    target = AttentionTarget(model)
    assert target.unfused == {"more than a sum with its MLP": 1}


def test_a_router_that_is_almost_undecided_is_no_fault() -> None:
    model: Any = make_model("mixtral")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            rows_ED = layer.mlp.gate.weight
            rows_ED[:] = rows_ED[0].clone()
            # As after upcycling: the order of a sum decides which expert is chosen.
            for row_D in rows_ED:
                row_D[torch.randint(len(row_D), (2,), generator=generator)] *= 1 + 2**-23
    target = AttentionTarget(model)
    assert target.num_fused == 2 and target.rows_are_independent


@pytest.mark.parametrize("every", [True, False])
def test_an_mlp_whose_rows_depend_on_each_other_makes_no_promise(every: bool) -> None:
    model: Any = make_model("mixtral")
    mlp = model.model.layers[1].mlp

    class Mixing(type(mlp)):  # type: ignore[misc]
        def forward(self, hidden_BND: Tensor) -> Tensor:
            found: Tensor = super().forward(hidden_BND)
            mean = hidden_BND.mean((0, 1)) * 1e-6
            return found + mean if every else torch.cat([found[:, :-1], found[:, -1:] + mean], 1)

    mlp.__class__ = Mixing
    target = AttentionTarget(model)
    assert not target.rows_are_independent


def test_modules_that_were_replaced_are_seen() -> None:
    model: Any = make_model("llama")
    target = AttentionTarget(model)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj = torch.nn.Linear(*reversed(mlp.gate_proj.weight.shape), bias=False)
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(32))
    found = logits_of(target)
    for one, other in zip(found, logits_of(open_target(model, forward="modules")), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_an_activation_that_is_clipped_far_out_keeps_the_modules() -> None:
    target = AttentionTarget(make_model("llama", hidden_act="gelu_10"))
    assert target.unfused == {"an activation that there is no step for": 2}


def test_wide_heads_keep_the_modules() -> None:
    target = AttentionTarget(make_model("llama", head_dim=1280))
    assert target.unfused == {"1280 elements of a head are turned": 2}


def test_a_head_without_a_kernel_makes_no_promise() -> None:
    model: Any = make_model("llama")

    class Own(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Own
    target = AttentionTarget(model)
    assert target.num_fused == 2 and not target.rows_are_independent
    assert AttentionTarget(make_model("llama")).rows_are_independent


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_fused_model_can_be_copied_and_pickled(family: str) -> None:
    model = make_model(family)
    expected = logits_of(AttentionTarget(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        target = AttentionTarget(other)
        assert target.num_fused == 2
        assert all(map(torch.equal, logits_of(target), expected))
