"""With packed products a node's logits are equal bits alone, in a chain and in a tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.target import row_attention
from spectool.decode.target.open import open_target
from spectool.decode.tree import Draft, chain
from spectool.kernels import build
from spectool.model.loading import load_model
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize

pytestmark = pytest.mark.skipif(build.missing_products() is not None, reason="no kernels here")

# torch computes an activation function by vectors, but the rest of a tensor one by one and rounded
# differently: a row's last bits then depend on where it stands, unless rows are whole vectors.
_WHOLE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
FAMILIES = {
    "llama": _WHOLE,
    "qwen3": _WHOLE,
    "mistral": _WHOLE,
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
}


@pytest.fixture(scope="module")
def packed(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`packed("llama")`: a tiny checkpoint at 4 bits, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("packed") / family
            job = QuantizeJob(method="rtn", config=RTN.Config(bits=4, group_size=32))
            source = checkpoint(family, **FAMILIES[family])
            quantize(open_checkpoint(source), made[family], job)
        return made[family]

    return make


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_does_not_depend_on_its_mates(
    packed: Callable[[str], Path], family: str, dtype: torch.dtype, activations: str
) -> None:
    model = load_model(
        open_checkpoint(packed(family)), dtype=dtype, runtime="packed", activations=activations
    )
    open_target(model)
    # Opened a second time, it attends in the same way.
    target = open_target(model)
    assert model.config._attn_implementation == row_attention.NAME
    prompt, text = list(range(5, 19)), [7, 30, 11, 25, 9, 6, 40, 12]
    cache = target.cache(1)
    target.prefill(cache, [prompt])
    alone = []
    for token in text:
        alone.append(target.verify(cache, [chain([token], kind="deterministic")]).logits_BNV[0, 0])
        cache.commit([[token]], [[0]])
    for width in (2, 3, 8):
        cache = target.cache(1)
        target.prefill(cache, [prompt])
        for start in range(0, len(text), width):
            part = text[start : start + width]
            found = target.verify(cache, [chain(part, kind="deterministic")]).logits_BNV[0]
            assert torch.equal(found, torch.stack(alone[start : start + width]))
            cache.commit([part], [range(len(part))])
    # The text's tokens among others, at every second node.
    parents = [-1, 0, 0, 2, 2, 4, 4, 6]
    tree = Draft([7, 31, 30, 8, 11, 3, 25, 4], parents)
    cache = target.cache(1)
    target.prefill(cache, [prompt])
    found = target.verify(cache, [tree]).logits_BNV[0, [0, 2, 4, 6]]
    assert torch.equal(found, torch.stack(alone[:4]))


def test_dense_models_keep_the_attention_of_transformers(checkpoint: Callable[..., Path]) -> None:
    model = load_model(open_checkpoint(checkpoint("llama")), dtype=torch.float32)
    open_target(model)
    assert model.config._attn_implementation != row_attention.NAME
