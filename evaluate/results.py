"""Results as dataclasses: their JSON, and the metrics that gates may name."""

from __future__ import annotations

import dataclasses
from typing import Any


def as_json(result: Any) -> Any:
    """Return a dataclass, list or number as JSON; a field that is None by default is left out."""
    if dataclasses.is_dataclass(result):
        values = [(field, getattr(result, field.name)) for field in dataclasses.fields(result)]
        return {
            field.name: as_json(value)
            for field, value in values
            if value is not None or field.default is not None
        }
    return [as_json(value) for value in result] if isinstance(result, (list, tuple)) else result
