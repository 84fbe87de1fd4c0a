"""The format is registered once, whichever of transformers and spectool is imported first."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

from spectool.errors import CheckpointError
from spectool.model import hook
from spectool.model.registration import SpectoolConfig, SpectoolQuantizer


def test_registered_under_its_name() -> None:
    assert AUTO_QUANTIZER_MAPPING["spectool"] is SpectoolQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["spectool"] is SpectoolConfig


def test_installing_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    hook.install()
    assert sys.meta_path == finders
    assert AUTO_QUANTIZER_MAPPING["spectool"] is SpectoolQuantizer


def test_configuration_keeps_what_it_does_not_know() -> None:
    stored = {
        "quant_method": "spectool",
        "format_version": 2,
        "source": {"fingerprint": "sha256:0"},
        "modules": {"a": {"method": "rtn", "options": {}, "shape": [3, 8]}},
        "made_by": {"seed": 3},
    }
    assert SpectoolConfig.from_dict(stored).to_dict() == stored


@pytest.mark.parametrize(
    ("stored", "refusal"),
    [
        ({"format_version": 3}, "has format 3, this spectool reads up to 2"),
        ({}, "modules is absent"),
        ({"modules": {"a": {"method": "rtn", "options": {}}}}, "the entry of a is"),
    ],
)
def test_configuration_that_cannot_be_read(stored: dict[str, Any], refusal: str) -> None:
    with pytest.raises(CheckpointError, match=refusal):
        SpectoolConfig(**stored)


def test_registration_follows_the_registry_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in_registry.py").write_text("made = [1]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hook, "REGISTRY", "stand_in_registry")
    seen: list[list[int]] = []
    monkeypatch.setattr(
        hook, "_register", lambda: seen.append(sys.modules["stand_in_registry"].made)
    )
    finders = list(sys.meta_path)
    hook.install()
    hook.install()
    assert len(sys.meta_path) == len(finders) + 1 and not seen
    module = importlib.import_module("stand_in_registry")
    monkeypatch.delitem(sys.modules, "stand_in_registry")
    assert seen == [[1]] and sys.meta_path == finders
    assert module.__spec__ is not None
    assert module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__module__ != "spectool.model.hook"


def test_importing_spectool_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, spectool; print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
