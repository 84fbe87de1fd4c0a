"""`--kv`: every command that decodes keeps keys and values as it says, and tells their bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Keys and values of 2 layers and 2 heads: 8 codes and a scale of 2 bytes; in float32 8 numbers.
INT8, DENSE = 2 * 2 * 2 * (8 + 2), 2 * 2 * 2 * 8 * 4


def test_generate_and_bench_keep_codes(
    spectool: Callable[..., Any], checkpoint: Callable[..., Path], prompts: Path
) -> None:
    """Drafted text is plain text with the same store."""
    words = [checkpoint("llama"), "--prompts", prompts, "--max-new-tokens", 12, "--json"]
    words += ["--dtype", "float32"]
    made = [
        spectool("generate", *words, "--draft", draft, "--kv", "int8") for draft in ("none", "auto")
    ]
    assert all("kv int8" in done.err for done in made)
    plain, drafted = (done.json for done in made)
    assert (plain["kv"], plain["kv_bytes_per_token"]) == ("int8", INT8)
    for one, other in zip(plain["results"], drafted["results"], strict=True):
        assert one["token_ids"] == other["token_ids"]
    dense = spectool("generate", *words).json
    assert (dense["kv"], dense["kv_bytes_per_token"]) == ("dense", DENSE)
    bench = spectool("bench", *words, "--draft", "ngram", "--kv", "int8:group=4").json
    # Two groups of a key: one scale more.
    assert bench["kv_bytes_per_token"] == INT8 + 2 * 2 * 2
    (row,) = bench["drafters"]
    assert row["identical"] == row["prompts"] == 2


def test_eval_measures_what_the_store_loses(
    spectool: Callable[..., Any], checkpoint: Callable[..., Path], text: Path
) -> None:
    """The reference keeps keys and values as they are."""
    model = checkpoint("llama")
    text.write_text(text.read_text()[:1000])
    words = ["eval", model, "--text", text, "--window", 32, "--reference", model, "--json"]
    exact, rounded = spectool(*words).json, spectool(*words, "--kv", "int8").json
    assert exact["kl"]["value"] == 0 and exact["perplexity"]["kv"] == "dense"
    assert 0 < rounded["kl"]["value"] < 1e-3 and rounded["perplexity"]["kv"] == "int8"
    refused = spectool(*words, "--kv", "int8", "--blockwise")
    assert refused.code == 2 and "--kv int8 needs the whole model" in refused.err


@pytest.mark.parametrize(
    ("family", "kv", "message"),
    [
        ("mamba2", "int8", "--kv int8 is not for mamba2: its state is recurrent"),
        ("llama", "int4", "no kv is called 'int4'; known: dense, int8"),
        ("llama", "int8:bits=4", "unknown option 'bits'; known: group"),
    ],
)
def test_a_store_that_cannot_be_is_refused_in_one_line(
    spectool: Callable[..., Any],
    checkpoint: Callable[..., Path],
    family: str,
    kv: str,
    message: str,
) -> None:
    done = spectool("generate", checkpoint(family), "--prompt", "a", "--kv", kv)
    assert done.code == 2 and done.out == ""
    assert sum(message in line for line in done.err.splitlines()) == 1
