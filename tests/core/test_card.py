"""Model cards: the hub reads their metadata, and the licence is that of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from spectool.checkpoint.card import Card, Figure, read_origin, with_base
from spectool.errors import UsageError

FIGURES = [
    Figure(stage="eval", metric="kl", name="KL", value=0.25, text="2.5e-01"),
    Figure(stage="bench", metric="tokens_per_second", name="speed", value=9.0, text="9.0"),
]


def make(**changed: object) -> str:
    given = {
        "title": "A checkpoint",
        "name": "llama-rtn",
        "tags": ["rtn"],
        "relation": "quantized",
        "lines": ["Method `rtn`."],
        "loading": "Load it.\n",
        "origin": {"license": "mit", "base_model": "owner/base"},
        "fingerprint": "sha256:12",
        "dataset": "held-out.txt",
    }
    return str(Card(**{**given, **changed}))  # type: ignore[arg-type]


def test_the_hub_reads_licence_base_and_results() -> None:
    data = ModelCard(make(figures=FIGURES, measured_by=["`spectool eval PATH`"])).data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "owner/base")
    assert data["base_model_relation"] == "quantized" and data["tags"] == ["spectool", "rtn"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert model["name"] == "llama-rtn" and result["dataset"]["name"] == "held-out.txt"
    assert result["metrics"] == [{"type": "kl", "value": 0.25, "name": "KL"}]


def test_what_was_not_measured_is_not_claimed() -> None:
    text = make(origin={})
    data = ModelCard(text).data.to_dict()
    assert not {"model-index", "license", "base_model", "base_model_relation"} & data.keys()
    assert "Measured" not in text and "Licence of the base: not stated there" in text
    text = make(figures=FIGURES, measured_by=["`spectool eval PATH`"])
    assert "| KL | 2.5e-01 |" in text and "- `spectool eval PATH`" in text


def test_another_base_changes_nothing_else() -> None:
    before, after = make(), with_base(make(), "owner/other", "merge")
    data = ModelCard(after).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/other", "merge")
    assert before.partition("\n---")[2] == after.partition("\n---")[2]
    with pytest.raises(UsageError, match="metadata cannot be read"):
        with_base("---\n[1, 2]\n---\n", "owner/other", "merge")


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({}, {}),
        ({"LICENSE": "   Apache License\n   Version 2.0, January 2004"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE.md": "be nice"}, {"license": "other", "license_link": "LICENSE.md"}),
        (
            {"README.md": "---\nlicense: llama3\nlanguage: en\n---\n# X", "LICENSE": "MIT License"},
            {"license": "llama3", "language": "en"},
        ),
        ({"README.md": "---\n{[: no yaml\n---\n"}, {}),
        # The base of the base is not the base, unless spectool wrote what lies between.
        ({"README.md": "---\nlicense: mit\nbase_model: a/b\n---\n"}, {"license": "mit"}),
        (
            {"README.md": "---\nbase_model: a/b\ntags: [spectool]\n---\n"},
            {"base_model": "a/b"},
        ),
    ],
)
def test_the_origin_of_a_checkpoint(
    files: dict[str, str], origin: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_origin(tmp_path) == origin
    assert read_origin(tmp_path, base="c/d") == {**origin, "base_model": "c/d"}
