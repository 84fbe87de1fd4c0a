"""Dtypes that models run in, by the names that options and configurations use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spectool.errors import CheckpointError, UsageError

NAMES = {
    "float32": torch.float32, "fp32": torch.float32, "f32": torch.float32,
    "float": torch.float32, "single": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "f16": torch.float16, "half": torch.float16,
    "float64": torch.float64, "fp64": torch.float64, "f64": torch.float64,
    "double": torch.float64,
}  # fmt: skip
EXPECTED = "expected float32, bfloat16, float16 or float64"
# Files of older versions of transformers have the second.
KEYS = ("dtype", "torch_dtype")


def look_up(value: Any) -> torch.dtype | None:
    """Return the dtype of a name in any spelling; None for anything else."""
    if not isinstance(value, str):
        return None
    return NAMES.get(value.strip().lower().removeprefix("torch."))


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Parse the dtype of an option.

    Raises:
        UsageError: not a dtype that models run in.
    """
    dtype = look_up(name) if isinstance(name, str) else name
    if name is not None and dtype not in NAMES.values():
        raise UsageError(f"dtype {name}: {EXPECTED}")
    return dtype


def configured(config: Mapping[str, Any], path: Path) -> torch.dtype | None:
    """Return the dtype that a configuration in JSON states; None without one, or for `auto`.

    Raises:
        CheckpointError: the configuration states something else.
    """
    for key in KEYS:
        value = config.get(key)
        if value is None or value == "auto":
            continue
        dtype = look_up(value)
        if dtype is None:
            raise CheckpointError(
                f"{path}: its config.json is not valid: {key} is {json.dumps(value)[:60]}, "
                f"{EXPECTED}"
            )
        return dtype
    return None


def with_plain_dtypes(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the configuration with all dtypes, nested ones too, in transformers' spelling."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            plain[key] = with_plain_dtypes(value, path)
        elif key not in KEYS:
            plain[key] = value
    dtype = configured(config, path)
    if dtype is not None:
        plain[next(key for key in KEYS if key in config)] = str(dtype).removeprefix("torch.")
    return plain
