"""`spectool push`: what goes, what is refused, with the hub's client faked at its boundary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from ..conftest import contents, flip

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]


@pytest.fixture
def packed(spectool: Spectool, checkpoint: Checkpoint, tmp_path: Path) -> Path:
    assert spectool("quantize", "rtn", checkpoint("llama"), tmp_path / "packed").code == 0
    return tmp_path / "packed"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls that reach the hub's client."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def record(name: str) -> Callable[..., Any]:
        def call(self: Any, *given: Any, **options: Any) -> str:
            calls.append((name, {**options, "given": given}))
            return "https://hub/owner/name"

        return call

    for name in ("create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, record(name))
    return calls


def test_a_dry_run_shows_files_and_card(
    spectool: Spectool, packed: Path, hub: list[tuple[str, dict[str, Any]]]
) -> None:
    before = contents(packed)
    done = spectool("push", packed, "owner/name", "--dry-run", "--base-model", "owner/base")
    assert done.code == 0 and not hub and contents(packed) == before
    assert "packed.safetensors.index.json  " in done.out and "base_model: owner/base" in done.out
    found = spectool("push", packed, "owner/name", "--dry-run", "--json").json
    assert found["files"] == {name: len(data) for name, data in before.items()}
    assert found["card"].encode() == before["README.md"]


def test_what_the_artifact_lists_is_uploaded_with_its_card(
    spectool: Spectool, packed: Path, hub: list[tuple[str, dict[str, Any]]]
) -> None:
    (packed / "secret.txt").write_text("mine")
    done = spectool("push", packed, "owner/name", "--private", "--base-model", "a/b", "--json")
    assert done.code == 0 and done.json["url"] == "https://hub/owner/name", done.err
    (created, made), (folder, sent), (file, card) = hub
    assert (created, folder, file) == ("create_repo", "upload_folder", "upload_file")
    assert made["given"] == ("owner/name",) and made["private"] and made["exist_ok"]
    assert sent["folder_path"] == packed
    assert set(sent["allow_patterns"]) == set(contents(packed)) - {"README.md", "secret.txt"}
    data = ModelCard(card["path_or_fileobj"].decode()).data.to_dict()
    assert data["base_model"] == "a/b" and card["path_in_repo"] == "README.md"
    assert data["base_model_relation"] == "quantized"


def test_draft_heads_get_a_card_of_their_record(
    spectool: Spectool, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    heads, quick = tmp_path / "heads", ("--steps", 0, "--seq-len", 64)
    text.write_text(text.read_text()[:1500])
    source = checkpoint("llama")
    assert spectool("train-heads", "medusa", source, heads, "--data", text, *quick).code == 0
    found = spectool("push", heads, "owner/name", "--dry-run", "--json").json
    assert {"heads.safetensors", "spectool_heads.json", "README.md"} == found["files"].keys()
    assert ModelCard(found["card"]).data.to_dict()["tags"][1] == "medusa"
    assert not (heads / "README.md").exists()
    named = ("push", heads, "owner/name", "--dry-run", "--base-model", "a/b", "--json")
    data = ModelCard(spectool(*named).json["card"]).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("a/b", "adapter")


def test_refusals_are_one_line(
    spectool: Spectool,
    packed: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
    hub: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: Any, *given: Any, **options: Any) -> str:
        raise OSError("401 Client Error\nInvalid credentials")

    for words, message in (
        ((packed, "name"), "expected OWNER/NAME"),
        ((checkpoint("llama"), "owner/name"), "holds nothing that spectool wrote"),
        ((tmp_path / "gone", "owner/name"), "holds nothing that spectool wrote"),
    ):
        done = spectool("push", *words)
        assert done.code == 2 and message in done.err, done.err
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    done = spectool("push", packed, "owner/name")
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and "401 Client Error" in line and "HF_TOKEN" in done.err
    flip(next(packed.glob("packed-00001*")))
    done = spectool("push", packed, "owner/name", "--dry-run")
    assert done.code == 2 and "SHA-256" in done.err
    (packed / "tokenizer.json").unlink()
    done = spectool("push", packed, "owner/name")
    assert done.code == 2 and "tokenizer.json: listed" in done.err and not hub


def test_without_a_network_the_real_client_fails_in_one_line(
    spectool: Spectool, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    done = spectool("push", packed, "owner/name")
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and "owner/name: the hub did not take it" in line
