"""The bundled checkpoint is what its record says, and good enough to show things with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.result import Result
from spectool.model.loading import load_tokenizer

CHECKPOINT = Path(__file__).parent.parent.parent / "examples/tiny-python"
CODE = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n"


def test_it_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000
    record = json.loads((CHECKPOINT / "training_record.json").read_text())
    entries = open_checkpoint(CHECKPOINT).layout.tensors.values()
    assert record["parameters"] == sum(entry.num_elements for entry in entries)
    assert {entry.dtype for entry in entries} == {"BF16"}
    assert record["seconds"] * record["machine"]["threads"] <= 2 * 40 * 60
    assert record["held_out_perplexity"] < 20 and record["text"]["held_out"]


def test_it_knows_python_and_turns() -> None:
    runner = Runner(CHECKPOINT, dtype=torch.float32)
    tokenizer = load_tokenizer(open_checkpoint(CHECKPOINT))
    ids = tokenizer(CODE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = runner.target.model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert loss < 3.0
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does copy in shutil do?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    (result,) = runner.generate([prompt], max_new_tokens=100)
    assert result.finish_reason == "eos" and len(result.text) > 10


@cache
def _written(draft: str) -> Result:
    runner = Runner(CHECKPOINT, draft=draft, dtype=torch.float32)
    (result,) = runner.generate([CODE], max_new_tokens=48)
    return result


@pytest.mark.parametrize("draft", ["ngram", "ngram:nodes=24,min_n=1"])
def test_drafted_text_is_plain_text(draft: str) -> None:
    result = _written(draft)
    assert result.token_ids == _written("none").token_ids
    assert 0 < result.accepted < result.drafted
