"""`train-heads` end to end: its result, `inspect` of the heads, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectool import methods
from spectool.checkpoint.headers import HEADS
from spectool.cli.inspect import heads_command

from .conftest import Done

Spectool = Callable[..., Done]
QUICK = ("--steps", 3, "--seq-len", 64, "--batch-tokens", 256, "--held-out", 4, "--num-heads", 2)


def test_a_dry_run_says_what_finished_heads_tell_and_writes_nothing(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, trained = checkpoint("llama"), tmp_path / "trained"
    text.write_text(text.read_text()[:1500])
    words = ["train-heads", "medusa", source]
    rest = ["--data", text, *QUICK]
    assert spectool(*words, trained / "0", *rest).code == 0
    record = json.loads((trained / "0" / HEADS).read_text())
    assert 0 < record["training"]["tokens"] <= 3 * 256
    dry = [*words, tmp_path / "out", *rest, "--dry-run"]
    unknown = spectool(*dry)
    assert unknown.code == 0, unknown.err
    assert "expected acceptance: not known; no finished training" in unknown.out
    assert "--trained" in unknown.err and not (tmp_path / "out").exists()
    few = spectool(*dry, "--trained", trained / "0", "--json").json["forecast"]
    assert few["trainings"] == 1 and few["reason"] and "tokens_per_forward" not in few
    assert few["tokens"] == record["training"]["tokens"]
    for number in range(1, 6):
        shutil.copytree(trained / "0", trained / str(number))
        training = record["training"] | {"tokens": 1000 * number}
        best = record["training"]["evaluations"][-1]
        scored = {**best, "score": 5.0 - 3 / number, "accuracy": [0.8 - 0.5 / number, 0.1]}
        training["evaluations"] = [*record["training"]["evaluations"], scored]
        told = json.dumps({**record, "training": training})
        (trained / str(number) / HEADS).write_text(told)
    told = spectool(*dry, "--trained", trained)
    assert "tokens per forward with the default tree" in told.out
    assert "from 6 finished trainings" in told.out and not (tmp_path / "out").exists()
    found = spectool(*dry, "--trained", trained, "--json").json
    assert found["dry_run"] and found["steps"] == 3
    assert found["forecast"]["tokens_per_forward"].keys() == {"value", "lower", "upper"}
    alone = spectool(*words, tmp_path / "out", *rest, "--trained", trained)
    assert alone.code == 2 and "--dry-run" in alone.err


def test_the_result_and_what_inspect_says_of_it(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "heads"
    text.write_text(text.read_text()[:1500])
    done = spectool("train-heads", "medusa", source, out, "--data", text, *QUICK, "--json")
    assert done.code == 0, done.err
    result = done.json
    assert set(result) == {
        "schema_version", "command", "machine", "out", "method", "parameters", "steps", "seconds",
        "accuracy",
        "conditional", "tokens_per_forward_estimate", "untrained_estimate", "tree", "read",
    }  # fmt: skip
    assert result["steps"] == 3 and len(result["accuracy"]) == len(result["conditional"]) == 2
    assert set(result["tree"]) == {"nodes", "depth"}
    assert "plan: medusa (num_heads=2" in done.err and "about" in done.err

    assert "is cut" not in done.err

    again = spectool("train-heads", "medusa", source, out, "--data", text, *QUICK)
    assert again.code == 2 and "exists already" in again.err
    seen = spectool("inspect", out, "--json").json
    assert seen["kind"] == "heads" and seen["parameters"] == result["parameters"]
    words = seen["command"].split()
    people = spectool("inspect", out)
    assert people.code == 0 and "medusa heads" in people.out
    assert "given that earlier heads were right: " in people.out

    words = [{"MODEL": source, "OUT": tmp_path / "second", "DATA": text}.get(w, w) for w in words]
    assert spectool(*words[1:]).code == 0
    for name in ("heads.safetensors", "spectool_heads.json"):
        assert (out / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    written = spectool(
        "generate", source, "--prompt", "def run(", "--draft", out, "--max-new-tokens", 9, "--json"
    ).json
    plain = spectool(
        "generate", source, "--prompt", "def run(", "--draft", "none", "--max-new-tokens", 9,
        "--json",
    ).json  # fmt: skip
    assert written["drafter"] == "medusa"
    assert written["results"][0]["token_ids"] == plain["results"][0]["token_ids"]


def test_the_plan_says_that_the_context_cuts_texts(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    text.write_text(text.read_text()[:1500])
    words = ["--data", text, *QUICK, "--steps", 1, "--seq-len", 300]
    done = spectool("train-heads", "medusa", checkpoint("llama"), tmp_path / "heads", *words)
    assert done.code == 0, done.err
    assert "at most 256 tokens, the model's context; --seq-len 300 is cut" in done.err


def test_inspect_says_all_that_was_asked(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = checkpoint("llama"), tmp_path / "heads"
    text.write_text(text.read_text()[:1500])
    asked = (
        "--sequence-packing",
        "--autocast",
        "bfloat16",
        "--features",
        f"offline:{tmp_path / 'kept'}",
    )
    done = spectool("train-heads", "medusa", source, out, "--data", text, *QUICK, *asked)
    assert done.code == 0, done.err
    assert f"plan: features stored in {tmp_path / 'kept'}" in done.err
    found = spectool("inspect", out, "--json").json
    for option in ("--sequence-packing", "--autocast bfloat16", "--features offline:FEATURES"):
        assert option in found["command"]
    training = found["training"] | {
        "processes": 2, "optimizer": "adamw8bit", "regenerate": True, "regenerate_model": "tiny",
    }  # fmt: skip
    command = heads_command({**found, "training": training}) or ""
    assert command.startswith("torchrun --nproc-per-node 2 -m spectool train-heads medusa MODEL")
    assert "--optimizer adamw8bit" in command
    assert "--regenerate-url http://HOST:PORT/v1 --regenerate-model tiny" in command
    # Heads from before there were these options.
    older = {key: training[key] for key in training if key not in (
        "processes", "optimizer", "autocast", "features", "sequence_packing", "regenerate_model",
    )}  # fmt: skip
    command = heads_command({**found, "training": older}) or ""
    assert command.startswith("spectool train-heads") and "--regenerate " in command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": None}, "no data"),
        ({"--data": "absent.txt"}, "absent.txt: no such file"),
        ({"--epochs": 2}, "--steps and --epochs exclude each other"),
        ({"--draft-vocab": 999}, "--draft-vocab 999: the target has 320 tokens"),
        ({"--num-heads": 0}, "--num-heads 0: must be at least 1"),
        ({"--dtype": "int3"}, "dtype int3: expected float32, bfloat16"),
        ({"--optimizer": "sgd"}, "--optimizer sgd: expected one of adamw, adamw8bit"),
        ({"--features": "offline"}, "--features offline: expected online, hybrid or offline:DIR"),
        ({"--features": "offline:."}, ".: holds no features"),
        ({"--autocast": "float16"}, "--autocast float16: expected bfloat16"),
        ({"--metrics": "absent/metrics.jsonl"}, "absent/metrics.jsonl: cannot be written"),
        ({"--device": "tpu"}, "device tpu: expected cpu"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    spectool: Spectool,
    checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    options = {**dict(zip(QUICK[::2], QUICK[1::2], strict=True)), "--data": text, **change}
    words = [word for key, value in options.items() if value is not None for word in (key, value)]
    out = tmp_path / "heads"
    done = spectool("train-heads", "medusa", checkpoint("llama"), out, *words)
    assert done.code == 2 and f"error: {message}" in done.err
    assert not list(tmp_path.glob("heads*"))


@pytest.mark.parametrize("method", ["ngram", "rtn", "hydro"])
def test_only_trained_drafters_are_trained(spectool: Spectool, method: str) -> None:
    done = spectool("train-heads", method, "model", "out")
    assert done.code == 2 and "known:" in done.err


def test_heads_of_another_model_are_refused_in_one_line(
    spectool: Spectool, checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "heads"
    text.write_text(text.read_text()[:1500])
    assert (
        spectool("train-heads", "medusa", checkpoint("llama"), out, "--data", text, *QUICK).code
        == 0
    )
    other = checkpoint("llama", seed=1)
    words = ("generate", other, "--prompt", "x", "--draft", out, "--max-new-tokens", 3)
    done = spectool(*words)
    assert done.code == 2 and "trained for another checkpoint" in done.err
    assert "--allow-other-target" in done.err
    assert spectool(*words, "--allow-other-target").code == 0
    assert spectool("generate", checkpoint("gpt2", n_embd=48, n_head=3), *words[2:]).code == 2


def test_damaged_heads_are_one_line(spectool: Spectool, tmp_path: Path) -> None:
    (tmp_path / "spectool_heads.json").write_text(json.dumps({"format_version": 1}))
    assert spectool("inspect", tmp_path).code == 2


@pytest.mark.parametrize("name", methods.list_trainable())
def test_every_method_has_a_command(spectool: Spectool, name: str) -> None:
    """No option of a method has the name of a shared option of the training."""
    done = spectool("train-heads", name, "--help")
    assert done.code == 0 and "--learning-rate" in done.out
