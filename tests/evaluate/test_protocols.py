"""Protocols of perplexity beside the scripts that published tables were made with.

The scripts' arithmetic is written out here on transformers' own model: that of GPTQ's evaluation
(`get_wikitext2`, `get_c4`, `llama_eval`; Frantar et al., 2023), and that of strided windows in the
documentation of transformers ("Perplexity of fixed-length models").
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectool.data.stored_log_probs import StoredLogProbs
from spectool.data.windows import cut
from spectool.decode.options import CacheOptions
from spectool.errors import TextError, UsageError
from spectool.evaluate.context import Context
from spectool.evaluate.options import EvalOptions
from spectool.evaluate.suite import evaluate

# Lines as in the raw WikiText-2 files: blank ones hold a space.
LINES = [
    " \n",
    " = from pathlib = \n",
    " \n",
    " import os , import sys @-@ import json . The rest is text , as long as a line may be . \n",
    " = = def run = = \n",
    " \n",
] * 12


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("llama"))


def perplexity(model: str, *text: Path, **options: Any) -> dict[str, Any]:
    load = CacheOptions(model=model, dtype="float32")
    options = {"measure": ("perplexity",), **options}
    context = Context(load, EvalOptions(text=tuple(map(str, text)), **options))
    found: Any = evaluate(context).as_json()["perplexity"]
    return found


@torch.inference_mode()
def script(model: str, ids_1N: Tensor, length: int) -> float:
    """Perplexity as `llama_eval` computes it."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = ids_1N.numel() // length
    nlls = []
    for i in range(samples):
        batch = ids_1N[:, i * length : (i + 1) * length]
        logits = hf(batch).logits
        loss = torch.nn.CrossEntropyLoss()(
            logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)
        )
        nlls.append(loss.float() * length)
    return float(torch.exp(torch.stack(nlls).sum() / (samples * length)))


@pytest.mark.parametrize("form", ["raw", "rows"])
def test_wikitext2_is_the_customary_script(model: str, tmp_path: Path, form: str) -> None:
    """As the official raw file, and as rows of the data set."""
    rows = [line if line.strip() else "" for line in LINES]
    path = tmp_path / ("wiki.test.raw" if form == "raw" else "wiki.jsonl")
    if form == "raw":
        path.write_text("".join(LINES))
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids_1N = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    found = perplexity(model, path, protocol="wikitext2", window=64)
    assert found["value"] == pytest.approx(script(model, ids_1N, 64), rel=1e-4)
    assert found["tokens"] == ids_1N.numel() // 64 * 63 and found["protocol"] == "wikitext2"


def test_c4_is_the_customary_script(model: str, tmp_path: Path) -> None:
    generator = random.Random(1)
    words = ["import", "os", "from", "pathlib", "def", "run", "return", "self", "sheep"]
    documents = [" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(30)]
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = 24
    random.seed(0)
    valenc = []
    for _ in range(256):
        while True:
            i = random.randint(0, len(documents) - 1)
            tmp = tokenizer(documents[i], return_tensors="pt")
            if tmp.input_ids.shape[1] > length:
                break
        i = random.randint(0, tmp.input_ids.shape[1] - length - 1)
        valenc.append(tmp.input_ids[:, i : i + length])
    assert any(len(tokenizer(each).input_ids) <= length for each in documents)
    found = perplexity(model, path, protocol="c4", window=length)
    assert found["value"] == pytest.approx(script(model, torch.hstack(valenc), length), rel=1e-4)
    with pytest.raises(TextError, match="no document has more tokens than a window of 256"):
        perplexity(model, path, protocol="c4", window=256)


@pytest.mark.parametrize("bos", [False, True])
def test_documents_are_scored_one_by_one_with_the_end(
    model: str, tmp_path: Path, bos: bool
) -> None:
    """Also from a saved reference, whose windows have more than ten lengths."""
    generator = random.Random(2)
    words = ["import", "os", "from", "pathlib", "def", "run", "return", "self", "sheep"]
    documents = [" ".join(generator.choices(words, k=count)) for count in range(1, 60)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    # The checkpoint is shared between tests.
    model = str(shutil.copytree(model, tmp_path / "model"))
    settings = Path(model, "generation_config.json")
    settings.write_text(json.dumps({"eos_token_id": [7, 5]}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = count = 0
    for text in documents:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, 7]
        ids = ([tokenizer.bos_token_id] * bos + ids)[:64]
        if len(ids) > 1:
            with torch.inference_mode():
                loss = hf(torch.tensor([ids]), labels=torch.tensor([ids])).loss
            total, count = total + float(loss) * (len(ids) - 1), count + len(ids) - 1
    saved = tmp_path / "reference.safetensors"
    found = perplexity(model, path, protocol="documents", window=64, bos=bos, save_reference=saved)
    assert found["value"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["tokens"] == count and found["protocol"] == "documents"
    kept = StoredLogProbs(saved).windows
    sizes = [ids_SL.shape[1] for ids_SL in kept.groups]
    assert len(sizes) > 10 and sizes == sorted(sizes, reverse=True)
    with pytest.raises(UsageError, match="has no --stride"):
        perplexity(model, path, protocol="documents", stride=4)
    with pytest.raises(TextError, match="--limit 1: the first document has"):
        perplexity(model, path, protocol="documents", limit=1)
    some = perplexity(model, path, protocol="documents", window=64, bos=bos, limit=200)
    assert 0 < some["tokens"] < count
    with pytest.raises(UsageError, match="documents needs its text"):
        perplexity(model, protocol="documents")


@pytest.mark.parametrize(("length", "stride"), [(64, 16), (64, 23), (50, 49)])
def test_strided_windows_score_what_the_documentation_does(length: int, stride: int) -> None:
    ids = list(range(10, 441))
    expected, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        # Labels before these are -100, and the loss shifts them: the first token has no label.
        scored = ids[previous:end] if begin else ids[1:end]
        expected.append((ids[begin:end], scored))
        previous = end
        if end == len(ids):
            break
    windows = cut(ids, length=length, bos=None, stride=stride)
    batches = list(windows.batches(500, batch_size=3))
    found = [(row, row[-batch.scored :]) for batch in batches for row in batch.ids_BL.tolist()]
    assert found == expected
    assert torch.cat([batch.next_ids for batch in batches]).tolist() == ids[1:]
    assert windows.tokens().tolist() == ids[1:] and windows.num_tokens == len(ids) - 1
    assert windows.counts().tolist() == [len(scored) for _, scored in expected]
    places = [place for row, scored in expected for place in range(len(row))[-len(scored) :]]
    assert windows.positions().tolist() == places


def test_strided_windows_may_begin_with_bos() -> None:
    ids = list(range(10, 80))
    windows = cut(ids, length=17, bos=1, stride=5)
    rows = [row for group in windows.groups for row in group.tolist()]
    assert [row[:2] for row in rows] == [[1, 10 + 5 * index] for index in range(len(rows))]
    assert windows.tokens().tolist() == ids
    with pytest.raises(UsageError, match="--stride 17: at most 16 tokens of a window"):
        cut(ids, length=17, bos=1, stride=17)


def test_strided_perplexity_is_the_documentations(model: str, tmp_path: Path) -> None:
    """The mean over tokens: the documentation weighs a window by its tokens less one."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids_1N = AutoTokenizer.from_pretrained(model)(
        "".join(LINES), add_special_tokens=False, return_tensors="pt"
    ).input_ids
    size, total, count, previous = ids_1N.shape[1], 0.0, 0, 0
    for begin in range(0, size, 24):
        end = min(begin + 64, size)
        target_1L = ids_1N[:, begin:end].clone()
        target_1L[:, : previous - begin] = -100
        with torch.inference_mode():
            loss = hf(ids_1N[:, begin:end], labels=target_1L).loss
        labels = int((target_1L[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * labels, count + labels, end
        if end == size:
            break
    found = perplexity(model, path, window=64, stride=24)
    assert found["value"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["tokens"] == count == size - 1 and found["stride"] == 24
    # What a token is read after is longer, so that the model knows more of it.
    assert found["by_position"][-1]["last"] == 63 and found["by_position"][0]["last"] <= 31


def test_batches_change_nothing_beyond_rounding_and_runs_nothing_at_all(
    model: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    alone, again = (perplexity(model, path, window=32, batch_size=1) for _ in range(2))
    assert alone == again
    for size in (2, 7, None):
        together = perplexity(model, path, window=32, batch_size=size)
        assert together["value"] == pytest.approx(alone["value"], rel=1e-6)
        assert together["lower"] == pytest.approx(alone["lower"], rel=1e-6)


def test_published_protocols_take_no_other_options(model: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    for given in ({"bos": True}, {"stride": 8}, {"limit": 100}):
        with pytest.raises(UsageError, match=f"--protocol c4 has no --{next(iter(given))}"):
            perplexity(model, path, protocol="c4", window=32, **given)
    with pytest.raises(UsageError, match="needs its text"):
        perplexity(model, protocol="wikitext2", window=32)
    with pytest.raises(UsageError, match="--window 512: the model's context is 256"):
        perplexity(model, path, protocol="wikitext2", window=512)
    with pytest.raises(UsageError, match="--save-reference keeps windows that do not overlap"):
        perplexity(model, path, window=32, stride=8, save_reference=tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 4096])
def test_windows_of_published_tables(
    checkpoint: Callable[..., Path], tmp_path: Path, length: int
) -> None:
    model = str(checkpoint("llama", max_position_embeddings=4096))
    path = tmp_path / "wiki.test.raw"
    path.write_text("".join(LINES * 25))
    rows = [line if line.strip() else "" for line in LINES * 25]
    ids_1N = AutoTokenizer.from_pretrained(model)("\n\n".join(rows), return_tensors="pt").input_ids
    assert ids_1N.numel() > 2 * length
    found = perplexity(model, path, protocol="wikitext2", window=length)
    assert found["value"] == pytest.approx(script(model, ids_1N, length), rel=1e-4)
    assert found["by_position"][-1]["last"] == length - 1
    strided = perplexity(model, path, window=length, stride=length // 2)
    ids = AutoTokenizer.from_pretrained(model)(path.read_text()).input_ids
    assert strided["tokens"] == len(ids) - 1
