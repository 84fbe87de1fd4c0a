"""Names of the dtypes that models run in, as options and configurations write them."""

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
# Older files have the second.
KEYS = ("dtype", "torch_dtype")


def named(value: Any) -> torch.dtype | None:
    """The dtype of a name, however it is written; None for what names none."""
    if not isinstance(value, str):
        return None
    return NAMES.get(value.strip().lower().removeprefix("torch."))


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that an option asks for.

    Raises:
        UsageError: not a dtype that models run in.
    """
    found = named(name) if isinstance(name, str) else name
    if name is not None and found not in NAMES.values():
        raise UsageError(f"dtype {name}: {EXPECTED}")
    return found


def configured(config: Mapping[str, Any], path: Path) -> torch.dtype | None:
    """The dtype that a configuration in JSON states; None where it states none, or `auto`.

    Raises:
        CheckpointError: it states something else.
    """
    for key in KEYS:
        value = config.get(key)
        if value is None or value == "auto":
            continue
        found = named(value)
        if found is None:
            raise CheckpointError(
                f"{path}: its config.json is not valid: {key} is {json.dumps(value)[:60]}, "
                f"{EXPECTED}"
            )
        return found
    return None


def with_plain_dtypes(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same configuration with dtypes, nested ones too, written as transformers reads them.

    Raises:
        CheckpointError: see `configured`.
    """
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
