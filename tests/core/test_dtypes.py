"""Dtypes are recognized by the names that files and users write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.checkpoint.dtypes import configured, parse_dtype, with_plain_dtypes
from spectool.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("torch.float32", torch.float32),
        ("FP32", torch.float32),
        ("float", torch.float32),
        ("bf16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (" BFloat16 ", torch.bfloat16),
        ("half", torch.float16),
        ("fp16", torch.float16),
        ("double", torch.float64),
        (torch.float16, torch.float16),
        (None, None),
    ],
)
def test_names(name: Any, dtype: torch.dtype | None) -> None:
    assert parse_dtype(name) == dtype


@pytest.mark.parametrize("name", ["int8", "fp8", "", "torch.", "bfloat", torch.int8])
def test_what_is_none(name: Any) -> None:
    with pytest.raises(UsageError, match="expected float32, bfloat16, float16 or float64"):
        parse_dtype(name)


def test_a_configuration_with_odd_names() -> None:
    config = {
        "torch_dtype": "torch.bfloat16",
        "text_config": {"dtype": "fp16", "hidden_size": 3},
        "vision_config": {"torch_dtype": "auto"},
        "quantization_config": {"dtype": "int4"},
    }
    plain = with_plain_dtypes(config, Path("m"))
    assert plain == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "float16", "hidden_size": 3},
        "vision_config": {},
        "quantization_config": {"dtype": "int4"},
    }
    assert configured(config, Path("m")) == torch.bfloat16
    assert configured({"dtype": "auto", "torch_dtype": "half"}, Path("m")) == torch.float16
    assert json.loads(json.dumps(plain)) == with_plain_dtypes(plain, Path("m"))


@pytest.mark.parametrize("value", ["int8", 3, ["float32"], {"": "float32"}, True])
def test_a_configuration_that_names_no_dtype(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^m: its config.json is not valid: dtype is") as it:
        with_plain_dtypes({"text_config": {"dtype": value}}, Path("m"))
    assert "\n" not in str(it.value)
