"""Bit budgets: measured errors, the choice of widths, and the command."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.quantize import budget as budgets
from spectool.quantize.base import parse_quantizer
from spectool.quantize.budget import choose, list_candidates, list_widths
from spectool.quantize.job import Budget
from spectool.quantize.ledger import measure
from spectool.quantize.methods.gptq import GPTQ
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.plan import QuantizePlan, make_plan
from spectool.quantize.rules import Rule, read_rules

from ..conftest import contents
from ..stopping import count, stopped

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]

RTNS = tuple(RTN(RTN.Config(bits=bits, group_size=16)) for bits in (2, 3, 4, 8))


def make(source: Path, **more: Any) -> QuantizePlan:
    return make_plan(Architecture(open_checkpoint(source)), RTNS[0], **more)


def test_all_widths_but_those_far_above() -> None:
    found = list_widths(GPTQ(GPTQ.Config(group_size=32)), 2.5)
    assert [choice.config.as_dict()["bits"] for choice in found] == [2, 3, 4, 5]
    assert all(choice.config.as_dict()["group_size"] == 32 for choice in found)
    assert [str(choice) for choice in list_widths(parse_quantizer("olive"), 5.0)] == ["olive"]
    with pytest.raises(UsageError, match="ptq161 has one width"):
        list_widths(parse_quantizer("ptq161"), 2.0)


@pytest.mark.parametrize("bits", [3.8, 4.2, 4.9, 6.0, 9.1])
def test_the_choice_is_about_the_best_there_is(checkpoint: Checkpoints, bits: float) -> None:
    """Compare with all combinations, for random errors that fall with the width."""
    plan = make(checkpoint("llama"))
    matrices = dict(list(plan.matrices["model.layers.0"].items())[:5])
    plan = QuantizePlan(
        **{
            **{name: getattr(plan, name) for name in QuantizePlan.__slots__},
            "matrices": {"model.layers.0": matrices},
            "num_weights": sum(matrix.num_weights for matrix in matrices.values()),
        }
    )
    generator = torch.Generator().manual_seed(int(10 * bits))
    errors = {
        name: torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        for name in matrices
    }
    wanted = dict.fromkeys(matrices, RTNS)
    found = choose(plan, Budget(bits, RTNS), wanted, errors)
    picked = {rule.match: RTNS.index(rule.quantizer) for rule in found if rule.quantizer}
    assert picked.keys() == matrices.keys()

    def size(picks: Any) -> int:
        return sum(
            RTNS[i].stored_bytes(matrices[n].shape) for n, i in zip(matrices, picks, strict=True)
        )

    def error(picks: Any) -> float:
        return sum(errors[n][i] for n, i in zip(matrices, picks, strict=True))

    limit = bits * plan.num_weights / 8
    ours = [picked[name] for name in matrices]
    assert size(ours) <= limit
    best = min(error(p) for p in itertools.product(range(4), repeat=5) if size(p) <= limit)
    assert error(ours) <= 1.25 * best + 1e-9


def test_every_width_is_measured_with_the_statistics_of_its_method(
    checkpoint: Checkpoints, compress: Compress, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a width does not depend on the widths that are measured before it."""
    found: list[dict[str, list[float]]] = []
    real = budgets.measure_candidates

    def spy(*given: Any) -> Any:
        found.append(real(*given))
        return found[-1]

    monkeypatch.setattr("spectool.quantize.run.measure_candidates", spy)
    source = checkpoint("llama")
    widths = [parse_quantizer(f"gptq:bits={bits},group_size=16") for bits in (3, 2)]
    for candidates in (widths, widths[::-1]):
        job = {
            "budget": Budget(4.5, tuple(candidates)),
            "calibration": [text_file],
            "samples": 3,
            "seq_len": 16,
        }
        compress(source, "gptq", out=f"out-{len(found)}", job=job)
    for name, (error_3, error_2) in found[0].items():
        assert found[1][name] == [error_2, error_3]


def test_measured_errors_are_those_of_one_packed_matrix(
    checkpoint: Checkpoints, compress: Compress, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with the second block's output in a whole model with one matrix packed."""
    seen: dict[str, Any] = {}
    real = budgets.measure_candidates

    def spy(stream: Any, *rest: Any) -> Any:
        seen["ids"] = stream.calibration.ids_SL
        seen["errors"] = real(stream, *rest)
        return seen["errors"]

    monkeypatch.setattr("spectool.quantize.run.measure_candidates", spy)
    source = checkpoint("llama")
    job = {"budget": Budget(4.5, RTNS[:2]), "calibration": [text_file], "samples": 3, "seq_len": 16}
    compress(source, "rtn", job=job)
    name = "model.layers.1.mlp.down_proj"
    outputs = []
    for bits in (None, 2, 3):
        model: Any = spectool.load(source)
        if bits is not None:
            linear = model.get_submodule(name)
            quantizer = RTN(RTN.Config(bits=bits, group_size=16))
            packed = quantizer.build(tuple(linear.weight.shape))
            fields = quantizer.pack(linear.weight.data, None, torch.Generator())
            packed.q.load_state_dict(fields)
            linear.weight.data = packed.dequantize()
        kept: list[Any] = []
        handle = model.get_submodule("model.layers.1").register_forward_hook(
            lambda module, args, out, kept=kept: kept.append(out)
        )
        with torch.inference_mode():
            model(seen["ids"])
        handle.remove()
        outputs.append(kept[0].double())
    want = [
        float((out - outputs[0]).square().sum() / outputs[0].square().sum()) for out in outputs[1:]
    ]
    assert seen["errors"][name] == pytest.approx(want, rel=1e-3)
    assert want[0] > want[1] > 0


def test_a_budget_is_kept_and_used(
    checkpoint: Checkpoints, compress: Compress, text_file: str
) -> None:
    source, text = checkpoint("llama"), {"calibration": [text_file], "samples": 4, "seq_len": 32}
    pin = Rule("layers.0.self_attn.q_proj", RTNS[3], "--rules")
    reports: list[Any] = []
    for bits in (4.2, 5.0, 6.0):
        job = {"budget": Budget(bits, RTNS), "rules": [pin], **text}
        out = compress(source, "rtn", out=str(bits), job=job, reports=reports)
        ledger = measure(read_layout(out))
        assert ledger.linears is not None and bits - 0.4 < ledger.linears <= bits
        entry = read_layout(out).modules["model.layers.0.self_attn.q_proj"]
        assert entry["options"]["bits"] == 8
    errors = [report.blocks[-1].output_error for report in reports]
    assert errors[0] > errors[1] > errors[2]
    assert not list(out.glob("survey-*"))
    # The rules that it wrote, given by hand.
    rules = read_rules(out / "rules.yaml")
    assert len(rules) == 1 + 14
    again = compress(source, "rtn", out="again", job={"rules": rules, **text})
    assert (out / "rules.yaml").read_bytes() == (again / "rules.yaml").read_bytes()
    assert read_layout(again).modules == read_layout(out).modules


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gemma2"])
def test_other_families(
    checkpoint: Checkpoints, compress: Compress, text_file: str, family: str
) -> None:
    job = {"budget": Budget(5.0, RTNS), "calibration": [text_file], "samples": 2, "seq_len": 32}
    out = compress(checkpoint(family), "rtn", job={**job, "allow_dense": True})
    linears = measure(read_layout(out)).linears
    assert linears is not None and 4.4 < linears <= 5.0


@pytest.mark.parametrize(("samples", "batch_size"), [(11, 3), (12, 10), (5, 16)])
def test_batches_of_any_size(
    checkpoint: Checkpoints, compress: Compress, text_file: str, samples: int, batch_size: int
) -> None:
    job = {"budget": Budget(5.0, RTNS[::2]), "calibration": [text_file], "seq_len": 16}
    more = {"job": {**job, "samples": samples}, "run": {"batch_size": batch_size}}
    assert (compress(checkpoint("llama"), "rtn", **more) / "rules.yaml").exists()


def test_several_methods_and_killed_while_measuring(
    checkpoint: Checkpoints, compress: Compress, text_file: str
) -> None:
    source = checkpoint("llama")
    choices = tuple(map(parse_quantizer, ("jlcm:epochs=1", "gptq:bits=3,group_size=16", "int8")))
    job = {"budget": Budget(5.0, choices), "calibration": [text_file], "samples": 4, "seq_len": 32}
    want = compress(source, "rtn", out="want", job=job)
    methods = {entry["method"] for entry in read_layout(want).modules.values()}
    assert methods < {"jlcm", "gptq", "int8"} and len(methods) > 1
    with stopped(budgets, "_measure_block", after=1):
        compress(source, "rtn", job=job)
    with pytest.MonkeyPatch.context() as patch:
        measured = count(patch, budgets, "_measure_block")
        out = compress(source, "rtn", job=job)
    assert measured == [1], "the first block's errors are known"
    assert contents(want) == contents(out)


def test_an_impossible_budget_is_one_line(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    with pytest.raises(UsageError, match=r"the smallest candidates take 3\.\d+ bits a weight"):
        list_candidates(make(source), Budget(2.0, RTNS), ())
    vq = parse_quantizer("vq:codes=4000")
    with pytest.raises(UsageError, match="more codes than the"):
        list_candidates(make(source), Budget(9.0, (vq,)), ())
    command = ["quantize", "rtn", str(source), str(out)]
    for more, message in (
        (["--bits-budget", "2", "--group-size", "16"], "the smallest candidates take"),
        (["--candidate", "int8"], "only with --bits-budget, which is not given"),
        (["--bits-budget", "inf"], "must be finite"),
        (["--bits-budget", "4", "--dry-run"], "a budget of 4 bits needs measured errors"),
        (["--bits-budget", "4", "--candidate", "rtn:bits=9"], "must be at most 8"),
    ):
        done = CliRunner().invoke(app, [*command, *more])
        assert done.exit_code == 2 and message in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_chose(
    checkpoint: Checkpoints, tmp_path: Path, text_file: str
) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    runner = CliRunner()
    command = ["quantize", "rtn", str(source), str(out), "--bits-budget", "4.5"]
    more = ["--group-size", "16", "--calibration", text_file, "--samples", "4", "--seq-len", "32"]
    done = runner.invoke(app, [*command, *more])
    assert done.exit_code == 0, done.stderr
    assert "blocks measured" in done.stderr and "of 14 linears" in done.stderr
    command = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)["command"]
    assert "--bits-budget 4.5 --candidate rtn:bits=2,group_size=16,symmetric=False" in command
