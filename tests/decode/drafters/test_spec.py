from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from spectool import methods
from spectool.checkpoint.headers import HEADS
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.heads.artifact import HeadsRecord
from spectool.decode.spec import Part, open_drafter, parse_spec
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import CheckpointError, UsageError


def one(text: str) -> Part:
    (part,) = parse_spec(text).parts
    return part


def test_names_and_options() -> None:
    assert one("none").name == "none"
    spec = one("ngram:nodes=12,max-n=6")
    assert (spec.name, spec.path) == ("ngram", None)
    assert (spec.config.nodes, spec.config.max_n) == (12, 6)
    assert one("ngram:").config == one("ngram").config


def test_drafters_are_joined() -> None:
    spec = parse_spec("ngram:max_n=3+recycle:nodes=9")
    assert [part.name for part in spec.parts] == ["ngram", "recycle"]
    assert (spec.parts[0].config.max_n, spec.parts[1].config.nodes) == (3, 9)
    assert [part.name for part in parse_spec("auto").parts] == ["trigram", "recycle"]
    with pytest.raises(UsageError, match="no drafter is called 'recycl'"):
        parse_spec("ngram+recycl")


@pytest.mark.parametrize(
    ("text", "tune"),
    [
        ("ngram", None),
        ("ngram:depth=3", None),
        ("ngram:nodes=3", False),
        ("ngram:tune", True),
        ("ngram:nodes=3,tune", True),
        ("ngram:tune=false", False),
        ("ngram+recycle:tune", True),
        ("auto", True),
        ("auto:tune=no", False),
    ],
)
def test_what_is_tuned(text: str, tune: bool | None) -> None:
    assert parse_spec(text).tune is tune


def test_paths_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    for text in ("./small:depth=7", "small:depth=7", f"{tmp_path}/small:depth=7"):
        spec = one(text)
        assert (spec.name, spec.config.depth) == ("draft_model", 7)
        assert spec.path == text.removesuffix(":depth=7")
    for hub_id in ("some-org/small-1.5B", "gpt2", "nope"):
        assert one(f"{hub_id}:depth=2").path == hub_id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert one("~/small").path == f"{tmp_path}/small"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngrm", "no drafter is called 'ngrm'"),
        ("./absent", "no drafter is called './absent'"),
        ("ngram:nodes", "no drafter is called 'ngram:nodes'"),
        ("ngram:nods=3", "unknown option 'nods'"),
        ("ngram:nodes=x", "expected int"),
        ("ngram:tune=perhaps", "expected true or false"),
        ("draft_model", "draft_model needs a checkpoint"),
        ("", "no drafter is called ''"),
    ],
)
def test_wrong_specifications(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("ngrm:nodes=3", "did you mean ngram?"),
        ("draft-model", "did you mean draft_model?"),
        ("ngram:nodes", "options are written ngram:key=value"),
        ("./absent", "given by its directory or hub id"),
        ("", "given by its directory or hub id"),
    ],
)
def test_hints(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_spec(text)
    assert hint in str(refusal.value.hint)


def test_an_id_that_the_hub_does_not_give_is_one_line(tiny: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(CheckpointError, match="--draft nope: no directory here") as refusal:
        open_drafter(
            parse_spec("nope"), target=AttentionTarget(tiny("llama")), target_tokenizer=None
        )
    assert "\n" not in str(refusal.value)
    assert "drafters are none, ngram" in str(refusal.value.hint)
    assert "did you mean" not in str(refusal.value.hint)


def test_a_heads_directory_names_its_method(tmp_path: Path) -> None:
    record = HeadsRecord(
        method="medusa", options={}, target={}, accuracy=[], tree=[], shares=[], training={}
    )
    (tmp_path / HEADS).write_bytes(record.as_bytes())
    spec = one(f"{tmp_path}:nodes=5")
    assert (spec.name, spec.path, spec.config.nodes) == ("medusa", str(tmp_path), 5)


def test_a_trained_drafter_needs_its_heads() -> None:
    with pytest.raises(UsageError, match="medusa needs trained heads") as caught:
        parse_spec("medusa:nodes=4")
    assert "train-heads medusa" in str(caught.value.hint)


def test_a_checkpoint_becomes_a_draft_model(
    checkpoint: Callable[..., Path], tiny: Callable[..., PreTrainedModel]
) -> None:
    target = AttentionTarget(tiny("llama"))
    path = checkpoint("llama", seed=1)
    drafter = open_drafter(parse_spec(f"{path}:depth=2"), target=target, target_tokenizer=None)
    assert isinstance(drafter, DraftModelDrafter)
    assert drafter.config.depth == 2


@pytest.mark.parametrize("name", methods.list_methods("drafter"))
def test_a_drafter_knows_its_row_in_the_table(name: str) -> None:
    assert methods.import_method(name, "drafter").name == name
