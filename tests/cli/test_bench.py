"""`spectool bench`: categories, batch sizes, baselines, the picture, and refused options."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectool.checkpoint.artifact import listed_files
from spectool.checkpoint.headers import CERTIFICATE, PACKED_INDEX
from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.text import read_rows
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.base import Pass
from spectool.machine import version

from ..conftest import contents

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    rows = [("qa", "from pathlib"), ("qa", "import os"), ("rag", "def run("), ("rag", "def " * 300)]
    lines = [json.dumps({"category": name, "prompt": text}) for name, text in rows]
    path.write_text("\n".join(lines))
    return path


def test_a_row_for_each_category_and_drafter(
    spectool: Spectool, checkpoint: Checkpoint, mixed: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "plot.svg"
    words = ["bench", checkpoint("llama"), "--prompts", mixed, "--max-new-tokens", 3]
    words += ["--draft", "ngram", "--draft", checkpoint("llama", seed=1), "--baselines"]
    if has_matplotlib():
        words += ["--plot", plot]
    done = spectool(*words)
    assert done.code == 0, done.err
    names = ["none", "ngram", str(checkpoint("llama", seed=1))]
    names += [f"transformers {way}" for way in ("plain", "prompt lookup", "assisted")]
    table = [" ".join(line.split()) for line in done.out.splitlines()]
    for category in ("qa", "rag", "all"):
        for name in names:
            assert any(line.startswith(f"{category} {name} ") for line in table), (category, name)
    assert "too long for the context: 1" in done.out and "1 of 4 prompts left out" in done.err
    assert plot.is_file() == has_matplotlib()


def test_per_category_takes_the_first_of_each(
    spectool: Spectool, checkpoint: Checkpoint, mixed: Path
) -> None:
    words = ["bench", checkpoint("llama"), "--prompts", mixed, "--max-new-tokens", 6, "--json"]
    result = spectool(*words, "--per-category", 1).json
    assert [part["category"] for part in result["categories"]] == ["qa", "rag"]
    assert result["prompts"] == 2 and result["prompts_left_out"] == 0
    assert spectool(*words, "--limit", 3).json["prompts"] == 3
    one = spectool(*words, "--limit", 2)
    assert [part["category"] for part in one.json["categories"]] == ["qa"]


def test_each_batch_size_is_a_run(
    spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    words = ["bench", checkpoint("llama"), "--prompts", prompts, "--max-new-tokens", 6]
    words += ["--draft", "ngram", "--batch-size", "1, 2,1", "--baselines"]
    done = spectool(*words, "--json")
    assert done.code == 0, done.err
    runs = [done.json, *done.json["other_runs"]]
    assert [run["batch_size"] for run in runs] == [1, 2]
    assert [len(run["baselines"]) for run in runs] == [2, 0]
    assert all(run["drafters"][0]["identical"] == 2 for run in runs)
    short = [3 if word == 6 else word for word in words if word != "--baselines"]
    people = spectool(*short, "--reference", checkpoint("llama"))
    assert people.code == 0 and "batch" in people.out and "of the reference" in people.out


def test_a_protocol_has_a_table_of_its_own(
    spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"turns": ["import os", "def run("], "category": "writing"},
            {"turns": ["from pathlib"], "category": "qa"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    words = ["bench", checkpoint("llama"), "--prompts", path, "--protocol", "spec-bench"]
    refused = spectool(*words, "--draft", "ngram")
    assert refused.code == 2 and "no chat template" in refused.err
    words += ["--field", "turns", "--draft", "ngram", "--max-new-tokens", 8]
    done = spectool(*words, "--by-depth", "--batch-size", "1,2")
    assert done.code == 0, done.err
    table = [" ".join(line.split()) for line in done.out.splitlines()]
    for name in ("conversation", "qa", "overall"):
        assert sum(f" {name} ngram " in line for line in table) >= 2, name
    assert "tokens per forward: new tokens" in done.out and "3 turns of 2 questions" in done.out
    assert "accepted length: tokens a step, mean over all steps" in done.out
    assert any("drafter depth 1" in line for line in table)
    found = spectool(*words, "--json").json
    assert found["protocol"] == "spec-bench" and found["turns"] == 3
    row = found["drafters"][0]
    assert row["scores"]["speedup"].keys() == {"value", "lower", "upper"}
    assert row["acceptance_by_depth"] and "tokens_per_forward" in found["definitions"]
    greedy = spectool(*words, "--temperature", 0.5)
    assert greedy.code == 2 and "decodes greedily" in greedy.err


def test_a_stored_reference_predicts_acceptance(
    spectool: Spectool, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    stored = tmp_path / "stored"
    words = ["eval", checkpoint("llama"), "--text", text, "--window", 64, "--limit", 900]
    assert spectool(*words, "--save-reference", stored, "--measure", "perplexity").code == 0
    draft = f"{checkpoint('llama', seed=1)}:depth=2"
    words = ["bench", stored, "--replay", "ngram", "--replay", draft]
    found = spectool(*words, "--prompt-tokens", 8, "--json")
    assert found.code == 0, found.err
    names = [each["drafter"] for each in found.json["predictions"]]
    assert names == ["ngram", draft] and found.json["prompt_tokens"] == 8
    sampled = spectool(*words, "--temperature", 1)
    assert sampled.code == 0 and "the model prefers" in sampled.out
    assert "predicted new tokens by passes" in sampled.out
    refused = spectool(*words, "--prompts", text)
    assert refused.code == 2 and "leave --prompts out" in refused.err
    missing = spectool("bench", checkpoint("llama"), "--draft", "ngram")
    assert missing.code == 2 and "--prompts FILE" in missing.err


@pytest.mark.parametrize("sizes", ["", "0", "1,,4", "1,x", "-1", "2.5", "1;4"])
def test_batch_sizes_that_are_none(
    sizes: str, spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    done = spectool("bench", checkpoint("llama"), "--prompts", prompts, f"--batch-size={sizes}")
    assert done.code == 2 and f"--batch-size {sizes}: expected positive numbers" in done.err


@pytest.mark.parametrize(
    "words", [("--per-category", 0), ("--plot", "plot"), ("--plot", "plot.jpg")]
)
def test_options_that_are_refused_before_anything_runs(
    words: tuple[object, ...], spectool: Spectool, checkpoint: Checkpoint, prompts: Path
) -> None:
    done = spectool("bench", checkpoint("llama"), "--prompts", prompts, *words)
    assert done.code == 2 and "dense" not in done.err


def test_mt_benchs_categories_are_one_of_spec_benchs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows: list[dict[str, Any]] = [
        {"turns": ["a"], "category": "math"},
        {"turns": ["b"], "category": "writing"},
        {"turns": ["c"], "category": "qa"},
        {"prompt": "d", "category": "math"},
        {"prompt": "e", "category": ["math"]},
        {"prompt": "f"},
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = [row.category for row in read_rows(str(path), prompts=True)]
    assert found == ["conversation", "conversation", "qa", "math", None, None]


def test_spec_bench_has_six_categories(shared: Path) -> None:
    path = shared / "data/prompts/spec_bench.jsonl.gz"
    found = [row.category for row in read_rows(str(path), prompts=True)]
    names = ["conversation", "translation", "summarization", "qa", "math_reasoning", "rag"]
    assert list(dict.fromkeys(found)) == names
    assert {found.count(name) for name in names} == {80}


def has_matplotlib() -> bool:
    return version("matplotlib") is not None


def test_chains_are_first_paths_so_many_tokens_deep(
    spectool: Spectool, checkpoint: Checkpoint, mixed: Path
) -> None:
    """A chain of k tokens yields at most k + 1 tokens per forward, and a longer one never less."""
    words = ["bench", checkpoint("llama"), "--prompts", mixed, "--max-new-tokens", 16]
    words += [
        "--draft",
        "ngram:min_n=1,nodes=24",
        "--draft",
        checkpoint("llama"),
        "--chain-lengths",
        3,
    ]
    done = spectool(*words, "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    first, second = done.json["drafters"]
    assert len(first["chain"]) == 3 and first["chain"] == sorted(first["chain"])
    assert all(1 <= rate <= depth + 1 for depth, rate in enumerate(first["chain"], start=1))
    assert first["chain"][-1] <= first["tokens_per_forward"]
    # A draft model keeps account of the drafts that it made itself.
    assert "chain" not in second and "no chains, since" in done.err
    people = spectool(*words, "--limit", 1, "--max-new-tokens", 4)
    assert "chain of 3" in people.out


def test_a_certificate_is_written_and_attached(
    spectool: Spectool,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectool.evaluate.certificate.WIDTHS", (1, 4))
    monkeypatch.setattr("spectool.evaluate.certificate.BATCHES", (1, 2))
    monkeypatch.setattr("spectool.evaluate.certificate.LAW_SAMPLES", 20)
    packed, file = tmp_path / "packed", tmp_path / "c.json"
    source = checkpoint("llama", hidden_size=256, intermediate_size=256)
    assert spectool("quantize", "rtn", source, packed).code == 0
    before, fingerprint = contents(packed), open_checkpoint(packed).fingerprint()
    words = ["--prompts", prompts, "--draft", "recycle", "--max-new-tokens", 6, "--certify", file]
    done = spectool("bench", packed, *words)
    assert done.code == 0, done.err
    assert contents(packed) == before and "certificate: " not in spectool("inspect", packed).out
    assert "promised: " in done.out and "recycle" in done.out
    attached = spectool("bench", packed, *words, "--attach", "--json")
    assert attached.code == 0, attached.err
    found = json.loads(file.read_text())
    assert found["model"] == fingerprint and found["broken"] == []
    assert found == {key: attached.json[key] for key in found}
    now = contents(packed)
    assert now.pop(CERTIFICATE) == file.read_bytes()
    assert now.keys() == before.keys()
    assert [name for name in now if now[name] != before[name]] == [PACKED_INDEX]
    assert CERTIFICATE in listed_files(packed)
    assert open_checkpoint(packed).fingerprint() == fingerprint
    assert "certificate: " in (told := spectool("inspect", packed, "--checksums").out)
    assert "and kept" in told
    assert spectool("inspect", packed, "--json").json["certificate"]["drafters"] == ["recycle"]
    # The same run attaches the same bytes, and OUT may still be replaced.
    both = contents(packed)
    assert spectool("bench", packed, *words, "--attach").code == 0 and contents(packed) == both
    assert spectool("quantize", "rtn", source, packed, "--overwrite").code == 0
    assert contents(packed) == before


def test_a_broken_promise_exits_with_3(
    spectool: Spectool,
    checkpoint: Checkpoint,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectool.evaluate.certificate.WIDTHS", (1, 4))
    monkeypatch.setattr("spectool.evaluate.certificate.BATCHES", (1,))
    monkeypatch.setattr("spectool.evaluate.certificate.LAW_SAMPLES", 5)
    original = AttentionTarget.verify

    def verify(self: Any, cache: Any, drafts: Any, needs: Any = None) -> Pass:
        done = original(self, cache, drafts, needs)
        if len(drafts[0]) > 1:
            done = Pass(done.logits_BNV.roll(1, -1), done.features)
        return done

    monkeypatch.setattr(AttentionTarget, "verify", verify)
    words = ["--prompts", prompts, "--draft", "recycle", "--max-new-tokens", 6, "--certify"]
    done = spectool("bench", checkpoint("llama"), *words, tmp_path / "c.json")
    assert done.code == 3 and "promised and not kept: " in done.err
    for forward in ("modules", "fused"):
        assert f"{forward}, recycle: 2 of 2 texts" in done.err
    assert json.loads((tmp_path / "c.json").read_text())["broken"]
    assert "passes of 4 nodes: 8 of 8 rows" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attach",), "--attach needs --certify"),
        (("--certify", "c.json", "--attach"), "no checkpoint that spectool wrote"),
        (("--certify", "c.json", "--baselines"), "leave --baselines out"),
        (("--certify", "none/c.json"), "no such folder: none"),
    ],
)
def test_certificates_that_are_refused_before_anything_runs(
    words: tuple[str, ...],
    message: str,
    spectool: Spectool,
    checkpoint: Checkpoint,
    prompts: Path,
) -> None:
    done = spectool("bench", checkpoint("llama"), "--prompts", prompts, *words)
    assert done.code == 2 and message in done.err and "dense" not in done.err
