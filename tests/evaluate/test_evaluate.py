from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spectool.checkpoint.tensors import open_checkpoint
from spectool.errors import CheckpointError, UsageError
from spectool.evaluate.evaluate import Request, evaluate
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import Job, quantize


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text())
    return str(path)


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    quantize(
        open_checkpoint(checkpoint("llama")),
        tmp_path / "packed",
        Job(method="rtn", config=RTN.Config()),
    )
    return tmp_path / "packed"


def test_reference_by_checkpoint_and_by_file_agree(
    checkpoint: Callable[..., Path], packed: Path, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "reference"
    request = Request(texts=[text], window=32, save_reference=file)
    dense = evaluate(open_checkpoint(checkpoint("llama")), request)
    live = evaluate(
        open_checkpoint(packed),
        Request(texts=[text], window=32, reference=str(checkpoint("llama"))),
    )
    read = evaluate(open_checkpoint(packed), Request(reference=str(file)))
    assert live["reference"]["perplexity"] == pytest.approx(dense["perplexity"]["value"])
    for metric in ("perplexity_ratio", "kl", "top1_agreement"):
        assert read[metric] == pytest.approx(live[metric], rel=1e-5)
    assert live["kl"] > 0 and not live["kl_is_lower_bound"]
    assert len(live["layers"]) == 14
    assert all(0 < layer["error"] < 0.02 for layer in live["layers"])


def test_block_by_block_gives_the_same_figures(packed: Path, text: str) -> None:
    whole = evaluate(open_checkpoint(packed), Request(texts=[text], window=32))
    parts = evaluate(open_checkpoint(packed), Request(texts=[text], window=32, blockwise=True))
    assert parts["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)


def test_what_does_not_fit_together_is_refused(
    checkpoint: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    path = str(checkpoint("llama"))
    with pytest.raises(UsageError, match="context is 256"):
        evaluate(open_checkpoint(path), Request(texts=[text], window=512))
    other = checkpoint("llama", vocab_size=352)
    with pytest.raises(UsageError, match="vocabulary size differs"):
        evaluate(open_checkpoint(path), Request(texts=[text], window=32, reference=str(other)))
    file = tmp_path / "reference"
    evaluate(open_checkpoint(path), Request(texts=[text], window=32, save_reference=file))
    for given in ({"texts": [text]}, {"window": 16}, {"bos": True}, {"limit": 9}):
        with pytest.raises(UsageError, match="contains the tokens"):
            evaluate(open_checkpoint(path), Request(reference=str(file), **given))
    short = checkpoint("llama", max_position_embeddings=16)
    with pytest.raises(UsageError, match="windows of 32 tokens"):
        evaluate(open_checkpoint(short), Request(reference=str(file)))
    with pytest.raises(CheckpointError, match="no such directory"):
        evaluate(
            open_checkpoint(path),
            Request(texts=[text], window=32, reference=str(tmp_path / "absent")),
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("stories260K", 4.135), ("llama2xs-279K", 8.228)])
def test_published_perplexities_of_small_models(
    name: str, expected: float, shared: Path, tmp_path: Path
) -> None:
    with gzip.open(shared / "data/text/tinystories_valid.txt.gz", "rt") as file:
        stories = file.read()
    (tmp_path / "text.txt").write_text(re.sub(r"\n\n+", "\n", stories)[:200_000])
    request = Request(texts=[str(tmp_path / "text.txt")], bos=True)
    result = evaluate(open_checkpoint(shared / "models" / name), request)
    assert result["perplexity"]["tokens"] == 97105
    assert result["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_published_perplexity_of_codestory(shared: Path, tmp_path: Path) -> None:
    with lzma.open(shared / "data/text/books_heldout.jsonl.xz", "rt") as file:
        book = json.loads(next(iter(file)))["text"][:200_000]
    (tmp_path / "text.txt").write_text(book)
    request = Request(texts=[str(tmp_path / "text.txt")], bos=True, window=512, dtype="float32")
    result = evaluate(open_checkpoint(shared / "models/codestory-10M"), request)
    assert result["perplexity"]["tokens"] == 66239
    assert result["perplexity"]["value"] == pytest.approx(121.850, rel=1e-3)
