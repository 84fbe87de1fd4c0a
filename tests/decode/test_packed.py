"""Drafting on packed checkpoints: greedy text is plain decoding's, for every method with a kernel.

Products and attention of one row and of several are equal bit for bit, with exact activations and
with rounded ones, and so are the texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.policy.curve import machine_key
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.open import open_target
from spectool.decode.tree import chain
from spectool.kernels import build
from spectool.kernels.precision import EXACT_ONLY, PRECISIONS, precisions_of
from spectool.kernels.products import PackedProduct
from spectool.kernels.registry import Product
from spectool.methods import import_method
from spectool.model.kernels import product_bytes
from spectool.model.loading import describe_runtime, load_model
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

from ..conftest import COMMON, SHARED, tokenizer
from .conftest import first_layers
from .drafters import test_lossless as untrained
from .drafters import test_trained as trained
from .target.test_fused import alone

pytestmark = pytest.mark.skipif(build.missing_products() is not None, reason="no kernel here")

# Options with which a matrix is packed quickly; what is fitted to a text matters little here.
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3, "group_size": 48},
    "nf4": {},
    "int8": {},
    "ptq161": {"epochs": 0},
    "gptq": {"bits": 2},
    "hqq": {},
    "olive": {},
    "jlcm": {"epochs": 0},
    "scalar": {"epochs": 0},
    "vq": {"codes": 32},
}
CALIBRATION = Path(__file__).parents[2] / "core/data/calibration/mixed.txt"
BUNDLED = Path(__file__).parents[2] / "examples/tiny-python"
STORIES = SHARED / "models/codestory-10M"
EACH = [(method, name) for method in OPTIONS for name in precisions_of(method)]
Packed = Callable[[Path, str], Path]


def test_every_method_with_a_kernel_is_here() -> None:
    assert OPTIONS.keys() == PRECISIONS.keys() | set(EXACT_ONLY)


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model whose rows hold whole blocks of nf4."""
    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**{**COMMON, **sizes})).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixture_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a mixture of experts whose layers are whole vectors of every processor."""
    path = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(2)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(**{**COMMON, **sizes, **experts, "initializer_range": 0.2})
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`packed(source, "rtn")`: the artifact, made once."""
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, method: str) -> Path:
        if (source, method) not in made:
            if method == "nf4":
                pytest.importorskip("bitsandbytes")
            config = import_method(method, "quantizer").Config(**OPTIONS[method])
            job = QuantizeJob(
                method=method, config=config, calibration=(str(CALIBRATION),), samples=2, seq_len=32
            )
            made[source, method] = tmp_path_factory.mktemp("packed") / method
            quantize(open_checkpoint(source), made[source, method], job)
        return made[source, method]

    return make


def load(path: Path, activations: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = load_model(open_checkpoint(path), dtype=dtype, activations=activations)
    generation: Any = model.generation_config
    generation.eos_token_id = None
    return model


@pytest.mark.parametrize(("method", "activations"), EACH)
def test_drafted_text_is_plain_text(
    packed: Packed,
    tiny_source: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    activations: str,
) -> None:
    model = load(packed(tiny_source, method), activations)
    way = f"7 linears packed (by kernel, {activations} activations), float32"
    assert describe_runtime(model) == way
    rows: list[int] = []
    kind: Any = Product if method == "vq" else PackedProduct
    original = kind.__call__

    def multiply(self: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        product: torch.Tensor = original(self, x, bias)
        last = x.flatten(0, -2)[-1:].clone()
        assert torch.equal(original(self, last, bias), product.flatten(0, -2)[-1:])
        return product

    monkeypatch.setattr(kind, "__call__", multiply)
    prompts = untrained.prompts_of(3)
    plain = [Runner(model).generate([each], max_new_tokens=20)[0] for each in prompts]
    rows.clear()
    together = Runner(model, draft="recycle").generate(prompts, max_new_tokens=20, batch_size=3)
    assert max(rows[len(rows) // 2 :]) > len(prompts)
    assert all(each.drafted > 0 and each.lossless for each in together)
    assert [each.token_ids for each in together] == [each.token_ids for each in plain]


# Layers with matrices of `vq` keep their modules, which promise less.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "activations"), [each for each in EACH if each[0] != "vq"])
def test_a_token_of_packed_experts_does_not_depend_on_its_mates(
    packed: Packed, mixture_source: Path, method: str, activations: str, dtype: torch.dtype
) -> None:
    model = load(packed(mixture_source, method), activations, dtype)
    prompts = [[5, 9, 3, 17, 22, 8, 11], [7, 4]]
    texts = [[(7 * row + 3 * i) % 60 for i in range(64)] for row in range(2)]
    target: Any = open_target(model, forward="fused")
    assert target.rows_are_independent
    expected = [alone(target, *each) for each in zip(prompts, texts, strict=True)]
    for width in range(1, 65):
        cache = target.cache(2)
        target.prefill(cache, prompts)
        chains = [chain(text[:width], kind="deterministic") for text in texts]
        passed = target.verify(cache, chains).logits_BNV
        for rows, one in zip(passed, expected, strict=True):
            assert torch.equal(rows, one[:width]), width


def test_what_a_pass_costs_is_kept_by_the_precision_of_products(
    packed: Packed, tiny_source: Path
) -> None:
    models = [
        load(packed(tiny_source, method), activations)
        for method, activations in (("rtn", "exact"), ("rtn", "int8"), ("int8", "exact"))
    ]
    keys = [machine_key(AttentionTarget(model)) for model in models]
    assert keys[0] != keys[1] and ", float32, int8 products;" in keys[1]
    assert product_bytes(models[0]) < product_bytes(models[2])


def runners(model: PreTrainedModel, source: Path) -> dict[str, Runner]:
    """Open every drafter on a packed model; draft models are the first layers of its source."""
    small = first_layers(load(source, "auto"), 2)
    opened = {name: untrained.open_on(model, name, small) for name in untrained.SPECS}
    return opened | {name: trained.open_on(model, name) for name in trained.ALL}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "activations"), EACH)
@pytest.mark.parametrize("source", [BUNDLED, STORIES], ids=lambda path: str(path.name))
def test_every_drafter_on_real_models(
    packed: Packed, source: Path, method: str, activations: str
) -> None:
    if not source.exists():
        pytest.skip("the shared models are not here")
    model = load(packed(source, method), activations)
    vocab, rng = model.config.vocab_size, random.Random(0)
    prompts = [[rng.randrange(2, vocab) for _ in range(length)] for length in (3, 20, 41)]
    plain = [Runner(model).generate([each], max_new_tokens=24)[0].token_ids for each in prompts]
    for name, runner in runners(model, source).items():
        for batch_size in (1, 3):
            found = runner.generate(prompts, max_new_tokens=24, batch_size=batch_size)
            assert [each.token_ids for each in found] == plain, name
