"""Packable matrices: plain linear layers whose weight no other module computes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PhimoeConfig

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.model.kernels import KernelLinear
from spectool.model.matrices import computes_product, explain_dense, find_matrices
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.int8 import Int8
from spectool.quantize.plan import make_plan
from spectool.quantize.rules import Rule
from spectool.quantize.run import quantize

Checkpoints = Callable[..., Path]


class WrittenOut(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Chooses(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return F.linear(input, self.weight, self.bias).topk(2)


class Clips(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias).clamp(-1, 1)


class Listens(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.loudness  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (nn.Linear, True),
        (KernelLinear, True),
        (WrittenOut, True),
        (Chooses, False),
        (Clips, False),
        (Listens, False),
    ],
)
def test_a_subclass_is_plain_if_it_computes_the_product(kind: type[nn.Linear], plain: bool) -> None:
    assert computes_product(kind) is plain
    block = nn.Sequential(kind(6, 4), nn.Linear(4, 4))
    names = [matrix.name for matrix in find_matrices(block, "b")]
    assert names == (["b.0", "b.1"] if plain else ["b.1"])
    if not plain:
        assert explain_dense(block, "b") == {"b.0": f"{kind.__name__} is no plain linear layer"}


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.asked, self.trained = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.called, self.sliced = nn.Linear(4, 4), nn.Linear(4, 4)
        self.imitates = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.asked.weight.dtype) @ self.used.weight
        if self.training:
            return x @ self.trained.weight
        y: Tensor = x @ self.sliced.weight if self.imitates else self.sliced(x)
        return self.called(self.trained(self.asked(y)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Reads()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x / block.called.weight.norm()
        return x


def test_a_weight_that_others_compute_with_stays_dense() -> None:
    outer = Outer().eval()
    block = outer.blocks[0]
    assert set(explain_dense(block, "blocks.0")) == {"blocks.0.used"}
    found = explain_dense(block, "blocks.0", (outer,))
    assert set(found) == {"blocks.0.used", "blocks.0.called"}
    assert set(found.values()) == {"its weight is used outside its forward"}
    block.imitates = True
    assert "blocks.0.sliced" in explain_dense(block, "blocks.0")


def test_weights_that_blocks_share_stay_dense(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint("zamba", num_hidden_layers=6, tie_word_embeddings=True)
    job = QuantizeJob(method="int8", config=Int8.Config(), allow_dense=True)
    quantize(open_checkpoint(source), tmp_path / "out", job)
    ids_BL = torch.arange(20)[None]
    models = AutoModelForCausalLM.from_pretrained(source).eval(), spectool.load(tmp_path / "out")
    with torch.inference_mode():
        want, got = (model(input_ids=ids_BL, use_cache=False).logits for model in models)
    assert 0 < float((want - got).norm() / want.norm()) < 0.2
    architecture = Architecture(open_checkpoint(source))
    reasons = [
        reason
        for block in architecture.blocks
        for reason in architecture.explain_dense(block).values()
    ]
    assert "shares its weight with another block" in reasons


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_next", "jamba"])
def test_routers_stay_dense(checkpoint: Checkpoints, family: str) -> None:
    architecture = Architecture(open_checkpoint(checkpoint(family)))
    names = [
        matrix.name
        for block in architecture.blocks
        for matrix in architecture.block_matrices(block)
    ]
    assert any(".experts." in name for name in names)
    assert not any(name.endswith(("router", ".gate", "expert_gate")) for name in names)


class Picks(nn.Module):
    """A router whose own class multiplies with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))


def _layers(**named: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, module in named.items():
        parent.add_module(name, module)
    return parent


def test_a_router_is_told_by_its_name_or_place_and_not_by_its_width_alone() -> None:
    four = lambda: nn.Linear(8, 4)  # noqa: E731
    experts = nn.ModuleList([_layers(gate_proj=four()) for _ in range(4)])
    inside = _layers(down=nn.Linear(8, 16), mlp=_layers(fc=nn.Linear(16, 5)))
    moe = _layers(
        experts=experts, gate=inside, choose=four(), shared=_layers(up_proj=four()),
        shared_gate=nn.Linear(8, 1),
    )  # fmt: skip
    attention = _layers(k_proj=four(), out_gate=nn.Linear(8, 32), forget_gate=_layers(f=four()))
    block = _layers(moe=moe, attention=attention)
    dense = {"moe.gate.down", "moe.gate.mlp.fc", "moe.choose", "moe.shared_gate"}
    assert set(explain_dense(block, "b")) == {f"b.{name}" for name in dense}
    # Experts may be of a kind that is not known, and a router no linear layer.
    assert set(explain_dense(_layers(router=_layers(layer=four())), "")) == {"router.layer"}
    assert set(explain_dense(_layers(experts=experts, gate=Picks()), "")) == {"gate"}


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phimoe")
    config = PhimoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_router_that_is_a_subclass(phimoe: Path, tmp_path: Path) -> None:
    quantize(
        open_checkpoint(phimoe), tmp_path / "out", QuantizeJob(method="int8", config=Int8.Config())
    )
    ids_BL = torch.arange(20)[None]
    models = AutoModelForCausalLM.from_pretrained(phimoe).eval(), spectool.load(tmp_path / "out")
    with torch.inference_mode():
        want, got = (model(input_ids=ids_BL, use_cache=False).logits for model in models)
    assert float((want - got).norm() / want.norm()) < 0.2


def test_rules_for_what_stays_dense(phimoe: Path) -> None:
    architecture = Architecture(open_checkpoint(phimoe))
    choice = Int8()
    name = f"{architecture.blocks[0]}.mlp.router"
    skipped = make_plan(architecture, choice, rules=[Rule("*.router", None, "--skip")]).skipped
    assert skipped[name] == "chooses or weighs experts"
    with pytest.raises(UsageError, match=r"router stays dense: chooses"):
        make_plan(architecture, choice, rules=[Rule("*.router", choice, "rule 1")])
