"""`generate --strategy entropy`: streamed text, chat templates, JSON, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ..conftest import tokenizer as tiny_tokenizer

WORDS = ["--max-new-tokens", 16, "--dtype", "float32", "--temperature", 1]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_ends_of_the_threshold_are_the_models_alone(
    spectool: Callable[..., Any], checkpoint: Callable[..., Path], prompts: Path
) -> None:
    """The streamed text too; JSON tells who wrote what."""
    large, small = checkpoint("llama"), checkpoint("gpt2")
    pair = [large, "--small", small, "--prompts", prompts, *WORDS]
    for threshold, alone, share in (("0", large, 0.0), ("inf", small, 1.0)):
        found = spectool("generate", *pair, "--strategy", f"entropy:threshold={threshold}")
        plain = spectool("generate", alone, "--draft", "none", "--prompts", prompts, *WORDS)
        assert found.code == 0 and found.out == plain.out
        words = ["--strategy", f"entropy:threshold={threshold}", "--batch-size", 2, "--json"]
        record = spectool("generate", *pair, *words).json
        assert record["small_share"] == share and record["switches"] == 0
        assert record["catch_up_tokens"] == 0 and record["lossless"] is False
        assert "neither model's own" in record["why_lossy"]


def test_json_counts_turns_and_stop_strings_and_templates_end_them(
    spectool: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "import os"}]}) + "\n")
    options = ["--small", checkpoint("gpt2"), "--prompts", file, *WORDS]
    options += ["--strategy", "entropy:threshold=7.4,window=1,dwell=2"]
    large = copy_with_template(checkpoint("llama"), tmp_path / "large", end="")
    record = spectool("generate", large, *options, "--json").json
    (result,) = record["results"]
    turns, ids = result["turns"], result["token_ids"]
    assert record["switches"] == len(turns["switches"]) > 1
    assert record["small_share"] == turns["small_tokens"] / 16 and 0 < turns["small_tokens"] < 16
    assert record["catch_up_tokens"] == turns["caught_up"] > turns["switches"][-1]

    stop = result["text"][3:6]
    ended = spectool("generate", large, *options, "--stop", stop)
    assert "lossy" in ended.err and "tokens read to catch up" in ended.err
    begin = result["text"][: result["text"].index(stop)]
    assert ended.out == f"<user>import os<assistant>{begin}\n"

    length = max(n for n in range(turns["switches"][0], 16) if ids[n] not in ids[:n])
    end = tiny_tokenizer().convert_ids_to_tokens(ids[length])
    talkative = copy_with_template(checkpoint("llama"), tmp_path / "talkative", end=end)
    (result,) = spectool("generate", talkative, *options, "--json").json["results"]
    assert result["finish_reason"] == "eos" and result["token_ids"] == ids[: length + 1]


def copy_with_template(path: Path, folder: Path, *, end: str) -> Path:
    """Copy a checkpoint; its chat template ends turns with the token `end`."""
    shutil.copytree(path, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if end:
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = TEMPLATE.replace("END", end)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "entropy"], "--strategy needs --small"),
        (["--small", "SMALL"], "--small needs --strategy"),
        (["--strategy", "entropi", "--small", "SMALL"], "no strategy is called 'entropi'"),
        (["--strategy", "entropy:threshold=nan", "--small", "SMALL"], "must be finite"),
        (["--strategy", "entropy:threshold=-1", "--small", "SMALL"], "must be at least 0"),
        (["--strategy", "entropy:dwell=0", "--small", "SMALL"], "must be at least 1"),
        (["--strategy", "entropy:depth=2", "--small", "SMALL"], "unknown option 'depth'"),
        (["--strategy", "entropy", "--small", "OTHER"], "its tokenizer is not the large model's"),
        (
            ["--strategy", "entropy", "--small", "SMALL", "--draft", "ngram"],
            "--strategy takes no drafter: leave out --draft ngram",
        ),
        (
            ["--strategy", "entropy", "--small", "SMALL", "--context", 300],
            "--context 300: llama holds at most 256 tokens",
        ),
        (["--strategy", "entropy", "--small", "nowhere/at/all"], "nowhere/at/all"),
        (
            ["--strategy", "entropy", "--small", "RECURRENT", "--kv", "int8"],
            "--kv int8 is not for mamba2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    spectool: Callable[..., Any],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    words: list[Any],
    message: str,
) -> None:
    def place(word: Any) -> Any:
        if word == "OTHER":
            return write_other(checkpoint("gpt2"), tmp_path)
        return {"SMALL": lambda: checkpoint("gpt2"), "RECURRENT": lambda: checkpoint("mamba2")}.get(
            word, lambda: word
        )()

    done = spectool("generate", checkpoint("llama"), "--prompt", "def", *map(place, words))
    assert done.code == 2 and message in done.err and not done.out
    assert done.err.count("error") == 1


def write_other(path: Path, folder: Path) -> Path:
    """Copy a checkpoint with two tokens of its vocabulary exchanged."""
    for file in path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
