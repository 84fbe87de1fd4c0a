"""Write a benchmark's result as JSON that stays small in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def to_text(value: Any, indent: int = 0) -> str:
    """Return JSON with eight significant digits a figure; a line holds 100 columns or one innermost
    object.
    """
    value = _rounded(value)
    line = json.dumps(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    nested = any(isinstance(part, (dict, list)) for part in parts)
    if not nested or len(line) + indent <= 100:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {to_text(each, indent + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(pad + item for item in items) + "\n" + " " * indent + "}"
    items = [to_text(each, indent + 1) for each in value]
    return "[\n" + ",\n".join(pad + item for item in items) + "\n" + " " * indent + "]"


def write(path: Path, result: Any) -> None:
    """Write `result` to `path` in the form of `to_text`."""
    path.write_text(to_text(result) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
