"""Stored features give the same heads, and stores of other data are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.distill import plan, training_data
from spectool.distill.data import features as room
from spectool.distill.data.features import OnlineTexts, store
from spectool.distill.data.samples import Sample
from spectool.distill.objectives.heads import HeadsObjective
from spectool.distill.processes import ALONE
from spectool.errors import TextError, UnsupportedError, UsageError
from spectool.methods import import_method
from spectool.report import SILENT

from ..conftest import contents, make_model
from ..heard import Heard
from ..stopping import count, stopped
from .conftest import Losses, Train


@pytest.fixture
def texts() -> list[Sample]:
    rng = random.Random(0)
    lengths = (42, 17, 123, 16, 60)
    return [Sample([rng.randrange(300) for _ in range(n)], [True] * n) for n in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lesson_of_stored_features_is_that_of_read_ones(
    texts: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    # Rows of 2 features of 32 numbers: three texts in the first shard, then one, then one.
    monkeypatch.setattr(room, "_SHARD_BYTES", 190 * (64 * dtype.itemsize + 9))
    target = AttentionTarget(make_model("llama").to(dtype))
    needs = Needs(final=True, layers=(0,))
    with ArtifactWriter(tmp_path / "store", identity={}) as writer:
        stored = store(writer, ALONE, "own", target, needs, texts, pass_tokens=130, reporter=SILENT)
        assert sorted(writer.manifest["shards"]) == [
            f"features-own-0000{number}.safetensors" for number in range(2)
        ]
    assert [sample.tokens for sample in stored.samples] == [sample.tokens for sample in texts]
    chosen = [4, 0, 3]
    read, found = (
        each.batch([[i] for i in chosen]) for each in (OnlineTexts(target, needs, texts), stored)
    )
    assert torch.equal(read.tokens_BL, found.tokens_BL)
    assert torch.equal(read.loss_mask_BL, found.loss_mask_BL)
    assert set(read.features) == set(found.features) == {"final", "layer 0"}
    for name, value_BLD in read.features.items():
        assert found.features[name].dtype == dtype
        for row, i in enumerate(chosen):
            length = len(texts[i].tokens)
            # Sums over keys and inputs are split by how many rows there are.
            torch.testing.assert_close(
                found.features[name][row, :length],
                value_BLD[row, :length],
                atol=1e-5 if dtype == torch.float32 else 0.1,
                rtol=0,
            )


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("medusa", "llama"),
        ("hydra", "gemma3"),
        ("eagle3", "qwen3"),
        ("clover", "llama"),
        ("chimera", "gpt2"),
    ],
)
def test_all_kinds_of_features_make_the_same_heads(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    family: str,
) -> None:
    """Equal to the bit in float32; except for clover, a finished store loads no target layers."""
    source, losses = checkpoint(family), Losses()
    asked = {"method": method, "steps": None, "epochs": 2, "learning_rate": 1e-3}
    store_path = tmp_path / "features"
    for kind in ("online", "hybrid", f"offline:{store_path}"):
        train(source, kind[:6], features=kind, where=losses.watch(kind[:6]), **asked)
        if kind == "hybrid":
            assert not list(tmp_path.glob("*partial*"))
    assert (store_path / room.FEATURES).is_file()
    if not import_method(method, "drafter").Heads.begins_as_layers:
        monkeypatch.setattr(training_data, "load_model", None)
    before = contents(store_path)
    train(source, "again", features=f"offline:{store_path}", where=losses.watch("again"), **asked)
    assert losses["online"] == losses["hybrid"] == losses["offlin"] == losses["again"]
    heads = [
        (tmp_path / out / "heads.safetensors").read_bytes()
        for out in ("online", "hybrid", "offlin", "again")
    ]
    assert heads == heads[:1] * 4
    assert contents(tmp_path / "again") == contents(tmp_path / "offlin")
    assert contents(store_path) == before
    text = (tmp_path / "again" / "spectool_heads.json").read_text()
    assert json.loads(text)["training"]["features"] == "offline" and str(tmp_path) not in text


def test_one_store_serves_other_heads_and_options(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The store contains the regenerated texts as well."""
    source = checkpoint("gpt2")
    asked = {"features": f"offline:{tmp_path / 'features'}", "regenerate": True, "steps": 3}
    train(source, "one", **asked)
    heard = Heard()
    report = train(
        source, "two", method="hydra", options={"num_heads": 2}, learning_rate=1e-4,
        where={"reporter": heard}, **asked,
    )  # fmt: skip
    assert report.steps == 3 and heard.plans[0].disk_bytes == 0
    train(source, "online", **{**asked, "features": "online"})
    one, online = (contents(tmp_path / out)["heads.safetensors"] for out in ("one", "online"))
    assert one == online


def test_packed_texts_are_taken_from_a_store_as_well(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, losses = checkpoint("llama"), Losses()
    asked = {"method": "hydra", "learning_rate": 1e-4, "sequence_packing": True, "steps": 4}
    for kind in ("online", "hybrid"):
        train(source, kind, features=kind, where=losses.watch(kind), **asked)
    assert losses["hybrid"] == pytest.approx(losses["online"], abs=1e-5)
    assert json.loads((tmp_path / "online" / "spectool_heads.json").read_text())["training"][
        "sequence_packing"
    ]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_store_that_was_interrupted_goes_on(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    source = checkpoint("llama")
    monkeypatch.setattr(room, "_SHARD_BYTES", 30_000)
    train(source, "whole", features=f"offline:{tmp_path / 'whole-features'}")
    with stopped(room, "_compute_features", after=stop):
        train(source, features=f"offline:{tmp_path / 'features'}")
    assert not (tmp_path / "features").exists()
    done = count(monkeypatch, room, "_compute_features")
    train(source, features=f"offline:{tmp_path / 'features'}")
    whole = contents(tmp_path / "whole-features")
    assert len(whole) > 4 and done[0] == len(whole) - 1 - stop
    assert contents(tmp_path / "features") == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_training_with_stored_features_that_was_stopped_goes_on(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama")
    train(source, "whole", features="hybrid")
    with stopped(HeadsObjective, "accumulate", after=0):
        train(source, features="hybrid")
    assert list((tmp_path / "out.partial").glob("features-own-*"))
    monkeypatch.setattr(room, "_compute_features", None)
    train(source, features="hybrid")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_targets_texts_and_features_are_refused(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store_path = checkpoint("llama"), tmp_path / "features"
    asked = {"features": f"offline:{store_path}"}
    train(source, **asked)
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, and long enough to be more than one text\n" * 30)
    for change, message in (
        ({"data": [str(other)]}, "made with another data "),
        ({"seed": 1}, r"made with another seed \(0, now 1\)"),
        ({"regenerate": True}, "made with another regenerate"),
        ({"where": {"dtype": torch.bfloat16}}, "made with another dtype"),
    ):
        with pytest.raises(UsageError, match=message):
            train(source, "new", **asked, **change)
    with pytest.raises(UsageError, match="made with another target"):
        train(checkpoint("llama", seed=1), "new", **asked)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty: holds no features"):
        train(source, "new", features=f"offline:{tmp_path / 'empty'}")
    monkeypatch.setattr("spectool.decode.drafters.medusa.MedusaHeads.needs", Needs(layers=(1,)))
    with pytest.raises(UsageError, match="holds the features final, not layer 1"):
        train(source, "new", **asked)
    assert not list(tmp_path.glob("new*"))


def test_too_little_text_leaves_neither_store_nor_heads(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data.DataPreparation, "_regenerate", lambda *arguments: [])
    with pytest.raises(TextError, match="generated too little text to train on"):
        train(checkpoint("llama"), regenerate=True, features=f"offline:{tmp_path / 'features'}")
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_for", lambda path: 1000)
    for kind in ("hybrid", f"offline:{tmp_path / 'features'}"):
        with pytest.raises(UnsupportedError, match=r"features take .* GB, and 0\.0 GB are free"):
            train(checkpoint("llama"), features=kind)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["ppd", "hidden-transfer"])
def test_methods_inside_the_targets_pass_store_no_features(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    with pytest.raises(UsageError, match=f"{method} passes extra rows"):
        train(checkpoint("llama"), method=method, features="hybrid")
    assert not any(tmp_path.iterdir())
