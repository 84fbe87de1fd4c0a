"""transformers learns the format when it is loaded, whichever comes first, and once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

from spectool import hook
from spectool.errors import CheckpointError
from spectool.registration import SpectoolConfig, SpectoolQuantizer


def test_registered_under_its_name() -> None:
    assert AUTO_QUANTIZER_MAPPING["spectool"] is SpectoolQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["spectool"] is SpectoolConfig


def test_installing_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    hook.install()
    assert sys.meta_path == finders
    assert AUTO_QUANTIZER_MAPPING["spectool"] is SpectoolQuantizer


def test_configuration_keeps_what_it_does_not_know() -> None:
    said = {
        "quant_method": "spectool",
        "format_version": 1,
        "source": {"fingerprint": "sha256:0"},
        "modules": {"a": {"method": "rtn"}},
        "made_by": {"seed": 3},
    }
    assert SpectoolConfig.from_dict(said).to_dict() == said


def test_newer_format() -> None:
    with pytest.raises(CheckpointError, match="has format 2, this spectool reads up to 1"):
        SpectoolConfig(format_version=2)


LATE = """
import sys
import spectool
assert "torch" not in sys.modules and "transformers" not in sys.modules
import transformers
assert "spectool.registration" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "spectool" in AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__module__ == "spectool.hook"]
assert type(sys.modules["transformers.quantizers.auto"].__loader__).__module__ != "spectool.hook"
"""


def test_spectool_first_costs_nothing_until_transformers_needs_it() -> None:
    run = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
