from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.options import CacheOptions
from spectool.errors import CheckpointError, UsageError
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate
from spectool.methods import import_method, list_methods
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize
from spectool.report import PlainDecoding

from ..heard import Heard


def run(model: str | Path, *, dtype: str | None = None, **options: Any) -> dict[str, Any]:
    load = CacheOptions(model=str(model), dtype=dtype)
    return evaluate(Context(load, EvalOptions(**options))).as_json()


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text()[:2000])
    return str(path)


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    source = open_checkpoint(checkpoint("llama"))
    quantize(source, tmp_path / "packed", QuantizeJob(method="rtn", config=RTN.Config()))
    return tmp_path / "packed"


def test_reference_by_checkpoint_and_by_file_agree(
    checkpoint: Callable[..., Path], packed: Path, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "reference"
    dense = run(checkpoint("llama"), text=[text], window=32, save_reference=file)
    live = run(packed, text=[text], window=32, reference=str(checkpoint("llama")))
    read = run(packed, reference=str(file))
    assert "kl" not in dense and "layers" not in read
    assert live["reference"]["perplexity"] == pytest.approx(dense["perplexity"]["value"])
    for metric in ("perplexity_ratio", "perplexity_difference", "kl", "rms_delta_p", "reverse_kl"):
        assert read[metric] == pytest.approx(live[metric], rel=1e-5)
    for metric in ("top1_agreement", "top5_agreement", "flips"):
        assert read[metric] == pytest.approx(live[metric], abs=1e-6)
    assert live["kl"]["value"] > 0 and not live["kl_is_lower_bound"]
    assert len(live["layers"]) == 14
    assert all(0 < layer["error"] < 0.02 for layer in live["layers"])


def test_block_by_block_gives_the_same_figures(packed: Path, text: str) -> None:
    whole = run(packed, text=[text], window=32)
    parts = run(packed, text=[text], window=32, blockwise=True)
    assert parts["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)


def test_what_does_not_fit_together_is_refused(
    checkpoint: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    path = str(checkpoint("llama"))
    with pytest.raises(UsageError, match="context is 256"):
        run(path, text=[text], window=512)
    other = checkpoint("llama", vocab_size=352)
    with pytest.raises(UsageError, match="vocabulary size differs"):
        run(path, text=[text], window=32, reference=str(other))
    file = tmp_path / "reference"
    run(path, text=[text], window=32, save_reference=file)
    for given in ({"text": [text]}, {"window": 16}, {"bos": True}, {"limit": 9}):
        with pytest.raises(UsageError, match="contains the tokens"):
            run(path, reference=str(file), **given)
    short = checkpoint("llama", max_position_embeddings=16)
    with pytest.raises(UsageError, match="windows of 32 tokens"):
        run(short, reference=str(file))
    with pytest.raises(CheckpointError, match="no such directory"):
        run(path, text=[text], window=32, reference=str(tmp_path / "absent"))


def test_only_the_measures_that_are_named_run(
    checkpoint: Callable[..., Path], packed: Path, text: str
) -> None:
    reference = str(checkpoint("llama"))
    named = run(packed, measure=["layers"], reference=reference)
    assert named.keys() == {"layers", "gates", "setting"}
    alone = run(packed, measure=["perplexity"], text=[text], window=32, reference=reference)
    assert alone.keys() == {"perplexity", "gates", "setting"}
    for name, missing in {"divergence": "--reference", "speed": "--prompts"}.items():
        with pytest.raises(UsageError, match=f"--measure {name} needs {missing}"):
            run(packed, measure=[name], text=[text])
    # The source of a packed model is another's.
    other = str(checkpoint("llama", seed=1))
    with pytest.raises(UsageError, match=r"--measure layers needs .* was quantized"):
        run(packed, measure=["layers"], reference=other)
    with pytest.raises(UsageError, match="no measure is called 'spede'"):
        run(packed, measure=["spede"])
    with pytest.raises(UsageError, match="--save-reference needs a measure of a text"):
        run(packed, measure=["layers"], reference=reference, save_reference=packed / "x")


def test_drafting_is_measured_on_prompts_once(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("from pathlib\nimport os\n")
    heard = Heard()
    options = EvalOptions(
        measure=("speed", "losslessness"),
        prompts=str(prompts),
        draft=("ngram", "recycle"),
        max_new_tokens=8,
        gate=("losslessness>=1", "speed.tokens_per_second>0"),
    )
    load = CacheOptions(model=str(checkpoint("llama")), dtype="float32")
    evaluation = evaluate(Context(load, options, reporter=heard))
    assert all(gate.holds for gate in evaluation.gates)
    result = evaluation.as_json()
    assert result["losslessness"]["drafters"] == {"ngram": 2, "recycle": 2}
    speeds = [row["speedup"] for row in result["speed"]["drafters"]]
    assert result["speed"]["value"] == max(speeds) and len(speeds) == 2
    assert heard.of(PlainDecoding) == [PlainDecoding(2)]


def test_no_two_measures_share_a_key() -> None:
    keys = [
        field.name
        for name in list_methods("measure")
        for field in fields(import_method(name, "measure"))
    ]
    assert len(keys) == len(set(keys)) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "expected", "whole"),
    [
        ("stories260K", 97105, 4.135, 4.021),
        ("llama2xs-279K", 97105, 8.228, 7.352),
        ("TinyStories-656K", 45901, 28.704, 21.883),
        ("babyllama-char-a", 200001, 2.200, 1.864),
        ("babyllama-char-b", 200001, 2.324, 1.981),
    ],
)
def test_published_perplexities_of_small_models(
    name: str, tokens: int, expected: float, whole: float, shared: Path, tmp_path: Path
) -> None:
    """Check those of windows of one text, and of whole stories, each with its end."""
    path, measure = shared / "models" / name, ["perplexity"]
    with gzip.open(shared / "data/text/tinystories_valid.txt.gz", "rt") as file:
        stories = file.read()
    (tmp_path / "text.txt").write_text(re.sub(r"\n\n+", "\n", stories)[:200_000])
    result = run(path, measure=measure, text=[str(tmp_path / "text.txt")], bos=True)
    assert abs(result["perplexity"]["tokens"] - tokens) <= 1
    assert result["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)
    with gzip.open(shared / "data/text/tinystories_train.jsonl.gz", "rt") as file:
        rows = [line for line in file if json.loads(line)["case"] == "original"][:200]
    (tmp_path / "stories.jsonl").write_text("".join(rows))
    text = [str(tmp_path / "stories.jsonl")]
    found = run(path, measure=measure, text=text, protocol="documents", bos=True)
    assert found["perplexity"]["value"] == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
def test_published_perplexity_of_codestory(shared: Path, tmp_path: Path) -> None:
    with lzma.open(shared / "data/text/books_heldout.jsonl.xz", "rt") as file:
        book = json.loads(next(iter(file)))["text"][:200_000]
    (tmp_path / "text.txt").write_text(book)
    options = {"bos": True, "window": 512, "dtype": "float32"}
    path = shared / "models/codestory-10M"
    result = run(path, text=[str(tmp_path / "text.txt")], **options)
    assert result["perplexity"]["tokens"] == 66239
    assert result["perplexity"]["value"] == pytest.approx(121.850, rel=1e-3)
