"""The skeletons in docs/adding are short, and work when they are added as the page says."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.cli.common import SCHEMA_VERSION
from spectool.cli.derive import Command, configs_of, derive
from spectool.decode.generate import Runner
from spectool.decode.options import CacheOptions
from spectool.distill.losses import compute_loss
from spectool.distill.train_weights import WeightsJob, train_weights
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.kernels import build
from spectool.methods import METHODS, Method
from spectool.model.kernels import ProductLinear, attach_products
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize
from spectool.training import TrainingBatch

FOLDER = Path(__file__).parent.parent / "docs/adding"
# README.md is the list of the pages.
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "README")
# A check takes the module of the skeleton and pytest's request, for fixtures.
Check = Callable[[ModuleType, pytest.FixtureRequest], None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_skeleton_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    code = textwrap.dedent(block)
    assert len(code.splitlines()) <= 25
    (tmp_path / f"added_{page.stem}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    CHECKS[page.stem](importlib.import_module(f"added_{page.stem}"), request)


def add_method(request: pytest.FixtureRequest, name: str, method: Method) -> None:
    """Add a row to the table of methods for one test."""
    request.getfixturevalue("monkeypatch").setitem(METHODS, name, method)


def check_command(module: ModuleType, request: pytest.FixtureRequest) -> None:
    counting = typer.Typer()
    run = derive(module.count, configs_of(module.count), words=["count"])
    counting.command("count", cls=Command)(run)
    checkpoint = request.getfixturevalue("checkpoint")("llama")
    for words, number in (([], len(open_checkpoint(checkpoint).layout.tensors)), (["--blocks"], 2)):
        done = CliRunner().invoke(counting, [*words, str(checkpoint), "--json"])
        command = shlex.join(["spectool", "count", str(checkpoint), *words])
        made = {"schema_version": SCHEMA_VERSION, "command": command}
        assert json.loads(done.stdout) == {**made, "count": number}


def check_measure(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="measure", target="added_measure:CrossEntropy", summary="...", source="...")
    add_method(request, "cross-entropy", row)
    load = CacheOptions(model=str(request.getfixturevalue("checkpoint")("llama")))
    measures, gate = ("perplexity", "cross-entropy"), ("cross_entropy>0",)
    options = EvalOptions(measure=measures, gate=gate, window=32, limit=2000)
    evaluation = evaluate(Context(load, options))
    perplexity: Any
    perplexity, added = evaluation.measures
    assert evaluation.as_json()["cross_entropy"] == evaluation.gates[0].value
    assert list(added.lines()) == [f"cross-entropy: {evaluation.gates[0].value:.4f} nats per token"]
    assert evaluation.gates[0].value == pytest.approx(math.log(perplexity.perplexity.value))


def check_kernel(module: ModuleType, request: pytest.FixtureRequest) -> None:
    if build.missing_products() is not None:
        pytest.skip("no library of kernels here")
    spec = {"signs": (torch.int8, (20, 50)), "scale": (torch.float32, (20, 1))}
    linear = module.TernaryLinear(spec, (20, 50))
    linear.q.signs = torch.randint(-1, 2, (20, 50), dtype=torch.int8)
    linear.q.scale = torch.rand(20, 1)
    x, matrix_nm = torch.randn(3, 50), linear.dequantize()
    attach_products(linear, torch.float32, "exact")
    assert isinstance(linear, ProductLinear)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), x @ matrix_nm.T)


def check_objective(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="objective", target="added_objective:Norms", summary="...", source="...")
    add_method(request, "norms", row)
    folder: Path = request.getfixturevalue("tmp_path")
    text = folder / "text.txt"
    text.write_text("def run(path: Path) -> None:\n    return path\n" * 60)
    source = open_checkpoint(request.getfixturevalue("checkpoint")("llama"))
    job = WeightsJob(
        method="norms", config=module.Norms.Config(), data=(str(text),), steps=4, seq_len=48,
        batch_tokens=96, learning_rate=0.1,
    )  # fmt: skip
    report = train_weights(source, folder / "out", job)
    assert report is not None and report.best["perplexity"] < report.initial["perplexity"]
    trained = open_checkpoint(folder / "out")
    changed = {n for n in source.layout.tensors if not torch.equal(source.read(n), trained.read(n))}
    assert changed == {name for name in source.layout.tensors if "norm" in name}


def check_kv(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="kv", target="added_kv:HalfStore", summary="...", source="...")
    add_method(request, "half", row)
    model, prompt = request.getfixturevalue("tiny")("llama"), [[5, 6, 7, 5, 6, 7, 5]]
    runner = Runner(model, draft="ngram:min_n=1", kv="half:scale=2")
    (drafted,) = runner.generate(prompt, max_new_tokens=20)
    assert isinstance(runner.target.cache(1).stores[0], module.HalfStore)
    # Keys and values of 2 layers, 2 heads and 8 channels, 2 bytes each.
    assert runner.target.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    runner.use(None)
    (plain,) = runner.generate(prompt, max_new_tokens=20)
    assert drafted.token_ids == plain.token_ids


def check_drafter(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="drafter", target="added_drafter:AgainDrafter", summary="...", source="...")
    add_method(request, "again", row)
    runner, prompts = Runner(request.getfixturevalue("tiny")("llama")), [[5, 6, 7, 5, 6], [9]]
    plain = runner.generate(prompts, max_new_tokens=20)
    runner.use("again")
    drafted = runner.generate(prompts, max_new_tokens=20, batch_size=2)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert sum(r.drafted for r in drafted) > 0


def check_head(module: ModuleType, request: pytest.FixtureRequest) -> None:
    runner, prompts = Runner(request.getfixturevalue("tiny")("llama")), [[5, 6, 7, 5, 6], [9]]
    plain = runner.generate(prompts, max_new_tokens=20)
    heads = module.LinearHeads(module.LinearHeads.Config(), runner.target.model, None)
    batch = TrainingBatch(
        tokens_BL=torch.randint(0, 300, (2, 12)),
        loss_mask_BL=torch.ones(2, 12, dtype=torch.bool),
        features={"final": torch.randn(2, 12, runner.target.width)},
    )
    compute_loss(heads, batch)
    assert all(head.weight.grad.abs().sum() > 0 for head in heads.heads)
    runner.use(module.LinearDrafter(heads, [((0,), 0.5), ((0, 0), 0.3), ((1,), 0.2)]))
    drafted = runner.generate(prompts, max_new_tokens=20, batch_size=2)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert sum(r.drafted for r in drafted) > 0


def check_control(module: ModuleType, request: pytest.FixtureRequest) -> None:
    runner, prompt = Runner(request.getfixturevalue("tiny")("llama")), [5, 6, 7, 5, 6]
    ends = set(runner.generate([prompt], max_new_tokens=9)[0].token_ids)
    controls = [[], [module.AtLeast(12, ends)]]
    for draft in ("none", "ngram"):
        runner.use(draft)
        free, held = runner.generate([prompt] * 2, eos=ends, controls=controls, batch_size=2)
        assert len(free.token_ids) == 1 and len(held.token_ids) > 12
        assert not ends & set(held.token_ids[:12])


def check_quantizer(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="quantizer", target="added_quantizer:Ternary", summary="...", source="...")
    add_method(request, "ternary", row)
    source, out = (
        request.getfixturevalue("checkpoint")("llama"),
        request.getfixturevalue("tmp_path"),
    )
    job = QuantizeJob(method="ternary", config=module.Ternary.Config())
    quantize(open_checkpoint(source), out / "packed", job)
    name = "model.layers.0.mlp.up_proj"
    weight_nm = open_checkpoint(source).read(f"{name}.weight").float()
    scale_n1 = weight_nm.abs().mean(1, keepdim=True)
    wanted_nm = torch.where(2 * weight_nm.abs() > scale_n1, weight_nm.sign() * scale_n1, 0)
    model: Any = spectool.load(out / "packed")
    torch.testing.assert_close(model.get_submodule(name).dequantize(), wanted_nm)


def check_lm_head(module: ModuleType, request: pytest.FixtureRequest) -> None:
    row = Method(kind="lm_head", target="added_lm-head:Centred", summary="...", source="...")
    add_method(request, "centred", row)
    source, out = (
        request.getfixturevalue("checkpoint")("llama"),
        request.getfixturevalue("tmp_path"),
    )
    words = ["quantize", "int8", str(source), str(out / "packed"), "--lm-head", "centred"]
    done = CliRunner().invoke(app, [*words, "--samples", "2", "--seq-len", "16", "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["lm_head"]
    assert 0 < report["loss_after"] < report["loss_start"]
    model: Any = spectool.load(out / "packed")
    assert model.get_output_embeddings().bias.abs().max() > 0


# A check for each page.
CHECKS: dict[str, Check] = {
    "control": check_control,
    "drafter": check_drafter,
    "head": check_head,
    "command": check_command,
    "kernel": check_kernel,
    "kv": check_kv,
    "lm-head": check_lm_head,
    "measure": check_measure,
    "objective": check_objective,
    "quantizer": check_quantizer,
}
