"""Rows of data on the command line: the report of what was read, and the ends of turns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ..conftest import tokenizer as tiny_tokenizer

Spectool = Callable[..., Any]

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def talkative(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return `talkative(end)`, a checkpoint whose template ends a turn with that token."""

    def make(end: str) -> Path:
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoint("llama"), path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if end:
            tokenizer.add_special_tokens({"additional_special_tokens": [end]})
        tokenizer.chat_template = TEMPLATE.replace("END", end)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Write a list of answered conversations with ids."""
    path = tmp_path / "rows.json"
    talk = [{"from": "human", "value": "def add"}, {"from": "gpt", "value": "return a + b\n" * 9}]
    path.write_text(json.dumps([{"id": f"QWJh_{n}", "conversations": talk} for n in range(3)]))
    return path


def test_the_templates_end_of_turn_ends_generate_and_bench(
    spectool: Spectool, talkative: Callable[[str], Path], rows: Path
) -> None:
    words = ("--prompts", rows, "--max-new-tokens", 12, "--dtype", "float32", "--json")
    free = spectool("generate", talkative(""), *words, "--draft", "none").json["results"][0]
    assert free["finish_reason"] == "length"
    ids = free["token_ids"]
    length = max(n for n in range(12) if ids[n] not in ids[:n])
    model = talkative(tiny_tokenizer().convert_ids_to_tokens(ids[length]))

    done = spectool("generate", model, *words, "--draft", "none")
    ended = done.json["results"][0]
    assert ended["finish_reason"] == "eos" and ended["token_ids"] == ids[: length + 1]
    begins = "<user>def add"
    assert done.json["read"][0]["begins"].startswith(begins)
    assert done.json["read"][0]["fields"] == {"conversations up to the answer as a conversation": 3}
    line = f"{rows}: 3 prompts, conversations up to the answer as a conversation; the first begins"
    assert done.err.count(line) == 1 and f'"{begins}' in done.err and "QWJh" not in done.err

    done = spectool("bench", model, *words, "--limit", 1, "--draft", "ngram")
    assert done.json["baseline"]["new_tokens"] <= length + 1
    assert done.err.count(line.replace("3 prompts", "1 prompt")) == 1
    # The same text as it stands is no turn.
    rows.write_text(json.dumps([{"prompt": tiny_tokenizer().decode([5])}]))
    plain = spectool("generate", model, *words, "--draft", "none").json["results"][0]
    assert plain["finish_reason"] == "length"


def test_texts_are_told_where_they_are_scored_and_calibrate(
    spectool: Spectool, talkative: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    model = talkative("</s>")
    line = f'{rows}: 3 rows, conversations as a conversation; the first begins "<user>def add'
    done = spectool("eval", model, "--text", rows, "--window", 32, "--json")
    assert done.code == 0 and line in done.err
    assert done.json["read"][0]["rows"] == 3
    words = ("--calibration", rows, "--samples", 2, "--seq-len", 16)
    done = spectool("quantize", "gptq", model, tmp_path / "out", *words, "--json")
    assert done.code == 0 and line in done.err and done.json["read"][0]["rows"] == 3
    rows.write_text(json.dumps([{"id": "a text it seems"}]))
    done = spectool("eval", model, "--text", rows, "--window", 32)
    assert done.code == 2
    assert f"{rows}:1: no field that is surely the text among id" in done.err
