"""`quantize auto`: the choice for a size, and the command that it prints."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.quantize.auto import STEPS, Auto, cache_bytes, parse_size, pick
from spectool.quantize.base import parse_quantizer
from spectool.quantize.plan import make_plan
from spectool.quantize.rules import Rule

from ..conftest import contents

Checkpoints = Callable[..., Path]

# Wide enough for group scales to cost little relative to the codes.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320}


@pytest.fixture
def wide(checkpoint: Checkpoints) -> Path:
    return checkpoint("llama", **WIDE)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("500 MB", 5 * 10**8), ("1e9", 10**9), ("1.5kb", 1500), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "3x", "-1GB", "0", "inf", "nan", "1 GB 2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        Auto.Config(fit=text)


def test_the_first_step_that_fits(wide: Path) -> None:
    """Every step is picked at a size that just fits it."""
    architecture = Architecture(open_checkpoint(wide))
    cache = cache_bytes(architecture, 100)
    sizes = []
    for step in STEPS:
        embeddings = parse_quantizer("int8") if step.bits < 3 else None
        plan = make_plan(architecture, parse_quantizer(step.method), embeddings=embeddings)
        sizes.append(plan.file_bytes)
        found = pick(architecture, Auto.Config(fit=str(plan.file_bytes + cache), context=100))
        assert str(found.quantizer) == str(parse_quantizer(step.method))
        assert found.embeddings == embeddings and found.budget is None
        assert step.why in found.why and "a cache of 100 tokens" in found.why
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(UsageError, match="the smallest method takes"):
        pick(architecture, Auto.Config(fit=str(sizes[-1] + cache - 1), context=100))
    with pytest.raises(UsageError, match="it fits as it is"):
        pick(architecture, Auto.Config(fit="1GB"))
    with pytest.raises(UsageError, match="bits or a size"):
        pick(architecture, Auto.Config())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_the_cache_is_as_large_as_transformers_makes_it(
    checkpoint: Checkpoints, family: str
) -> None:
    import torch
    from transformers import DynamicCache

    from spectool.decode.target.attention import AttentionTarget

    source = checkpoint(family)
    model: Any = spectool.load(source, dtype="bfloat16")
    kept = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids_BL = torch.zeros(1, 10, dtype=torch.long)
        model(ids_BL, use_cache=True, **{AttentionTarget(model).cache_name: kept})
    size = sum(2 * layer.keys.numel() + 2 * layer.values.numel() for layer in kept.layers)
    assert cache_bytes(Architecture(open_checkpoint(source)), 10) == size


@pytest.mark.parametrize(
    ("bits", "choice", "budget"),
    [(8.0, "int8", None), (4.0, "gptq", None), (3.0, "gptq:bits=3", None),
     (2.0, "jlcm", None), (1.6, "ptq161", None), (1.99, "ptq161", None), (2.4, "gptq", 2.4),
     (7.0, "gptq", 7.0)],
)  # fmt: skip
def test_by_bits(wide: Path, bits: float, choice: str, budget: float | None) -> None:
    found = pick(Architecture(open_checkpoint(wide)), Auto.Config(bits=bits))
    assert str(found.quantizer) == choice
    assert (found.budget and found.budget.bits) == budget
    assert (found.embeddings is not None) == (bits < 3)
    rtn = parse_quantizer("rtn")
    assert (
        pick(Architecture(open_checkpoint(wide)), Auto.Config(bits=bits), embeddings=rtn).embeddings
        == rtn
    )


def test_short_rows_do_not_go_below_two_bits(checkpoint: Checkpoints, wide: Path) -> None:
    small = Architecture(open_checkpoint(checkpoint("llama")))
    for bits in (1.6, 1.9):
        with pytest.raises(UsageError, match=r"ptq161 takes .* bits a weight"):
            pick(small, Auto.Config(bits=bits))
    pinned = [Rule("*.self_attn.*", parse_quantizer("rtn:bits=4,group_size=32"), "")]
    assert pick(Architecture(open_checkpoint(wide)), Auto.Config(bits=1.6), rules=pinned).why
    with pytest.raises(UsageError, match=r"ptq161 takes 1\.\d+ bits a weight"):
        pick(Architecture(open_checkpoint(wide)), Auto.Config(bits=1.61))


def test_the_printed_command_makes_the_same(wide: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n * n} sheep jump over {n} fences." for n in range(300)))
    runner = CliRunner()
    more = ["--calibration", str(text), "--samples", "2", "--seq-len", "16", "--seed", "3"]
    out = tmp_path / "out"
    done = runner.invoke(app, ["quantize", "auto", str(wide), str(out), "--bits", "3", *more])
    assert done.exit_code == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "by hand: " in line]
    words = shlex.split(line.partition("by hand: ")[2])
    assert words[:3] == ["spectool", "quantize", "gptq"] and "--bits" in words
    words[4] = str(tmp_path / "again")
    again = runner.invoke(app, words[1:])
    assert again.exit_code == 0, again.stderr
    assert contents(out) == contents(tmp_path / "again")
    both = ["quantize", "auto", str(wide), str(tmp_path / "b"), "--bits", "3"]
    for wrong, message in (
        (["--fit", "1GB"], "give only one of them"),
        (["--bits-budget", "3"], "leave --bits-budget out"),
        (["--dry-run", "--bits", "2.5"], "a budget of 2.5 bits needs measured errors"),
    ):
        done = runner.invoke(app, [*both, *wrong])
        assert done.exit_code == 2 and message in done.stderr, done.stderr
