"""The commands that take an encoder-decoder, and those that refuse one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import spectool as package

from ..conftest import VOCAB, tokenizer
from ..decode.encoder_decoders import generated, make

Spectool = Callable[..., Any]


@pytest.fixture(scope="module", params=["t5-unscaled-untied", "bart-forced"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / request.param
    make(request.param, vocab=VOCAB).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_generate_answers_with_a_text_of_its_own(spectool: Spectool, model: Path) -> None:
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
    source = "def run(path): return path"
    expected = generated(plain, tokenizer()(source)["input_ids"], 12)
    words = ["generate", model, "--prompt", source, "--max-new-tokens", 12, "--dtype", "float32"]
    for draft in ("auto", "copy", "none"):
        (result,) = spectool(*words, "--draft", draft, "--json").json["results"]
        assert result["token_ids"] == expected
    done = spectool(*words, "--draft", "copy")
    text = tokenizer().decode(expected, skip_special_tokens=True)
    assert done.out == f"{text}\n" and "drafter copy" in done.err
    (by_path,) = package.generate(model, [source], draft="copy", max_new_tokens=12)
    assert by_path.token_ids == expected
    assert type(package.load(model)) is type(plain)


def test_bench_compares_with_transformers(
    spectool: Spectool, model: Path, tmp_path: Path, prompts: Path
) -> None:
    words = ["bench", model, "--prompts", prompts, "--max-new-tokens", 6, "--dtype", "float32"]
    done = spectool(*words, "--draft", "copy", "--draft", "ngram", "--baselines", "--json")
    assert done.code == 0, done.err
    rows = [*done.json["drafters"], *done.json["baselines"]]
    assert [row["name"] for row in rows[:3]] == ["copy", "ngram", "transformers plain"]
    assert {row["identical"] for row in rows} == {2}


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "rtn", "MODEL", "OUT"],
        ["distill", "lora", "MODEL", "OUT", "--data", "TEXT"],
        ["train-heads", "medusa", "MODEL", "OUT", "--data", "TEXT"],
        ["eval", "MODEL", "--text", "TEXT"],
        ["chat", "MODEL"],
        ["generate", "MODEL", "--prompt", "x", "--draft", "skip"],
        ["generate", "MODEL", "--prompt", "x", "--small", "MODEL", "--strategy", "entropy"],
    ],
)
def test_others_refuse_it_in_one_line(
    spectool: Spectool, model: Path, tmp_path: Path, text: Path, command: list[str]
) -> None:
    places = {"MODEL": model, "OUT": tmp_path / "out", "TEXT": text}
    done = spectool(*(places.get(word, word) for word in command), "--debug")
    error = [line for line in done.err.splitlines() if line.startswith("error")]
    assert done.code == 2 and len(error) == 1 and "encoder-decoder" in error[0], done.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_one_is_refused(spectool: Spectool, tmp_path: Path) -> None:
    config = {"model_type": "whisper", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = spectool("generate", tmp_path, "--prompt", "x")
    assert done.code == 2 and "whisper is an encoder-decoder; generate and bench" in done.err
