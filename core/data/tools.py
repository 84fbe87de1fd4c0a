"""Tools and calls of them in the form that chat templates expect, from the forms in use.

A description or a call is an object with a name, at its top or in `function`; it may be JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def read_calls(value: Any) -> list[Any] | None:
    """Return one call or a list of calls as a list; None if the value holds something else."""
    parsed = parse_json(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    return calls if all(map(_is_call, calls)) else None


def _is_call(value: Any) -> bool:
    """Whether a value is an object with a name, at its top or in `function`."""
    function = (value.get("function") or value) if isinstance(value, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def convert_call(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a call to the form that templates expect, with its arguments as an object."""
    call = _nest_function(_drop_none(value))
    function = dict(call["function"])
    arguments = parse_json(function.get("arguments", {}))
    if arguments is not None:
        function["arguments"] = arguments
    return {**call, "function": function}


def read_tools(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Convert the descriptions of tools; None unless they are a list of objects, or JSON of one."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except ValueError:
        return None
    if not all(isinstance(tool, Mapping) for tool in tools):
        return None
    return tuple(map(_nest_function, map(_drop_none, tools)))


def _nest_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move the fields of a description or of a call into `function`."""
    if "function" in tool or "name" not in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}


def _drop_none(value: Any) -> Any:
    """Drop the None fields that parquet adds to objects of different keys, nested ones too."""
    if isinstance(value, Mapping):
        return {key: _drop_none(part) for key, part in value.items() if part is not None}
    return [_drop_none(part) for part in value] if isinstance(value, list) else value


def parse_json(value: Any) -> Any:
    """Parse a string of JSON, None unless it is an object or a list; return other values as is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, (dict, list)) else None
