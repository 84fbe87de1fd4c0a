"""`spectool list`: all methods by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from spectool import methods
from spectool.cli.common import Output
from spectool.errors import UsageError
from spectool.kernels.precision import precisions_of
from spectool.options import Config, option

_PLURALS = {"kv": "KV stores", "strategy": "strategies"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions(Config):
    """Options of `list`: the methods to list."""

    kind: str | None = option(
        None, f"Kind to list: {', '.join(get_args(methods.Kind))}; default: all", argument=True
    )
    all: bool = option(False, "List research methods too", switch=True)


def list_methods(output: Output, options: ListOptions) -> None:
    """List the methods by kind, each with a one-line summary."""
    kind = options.kind
    kinds = get_args(methods.Kind)
    if kind is not None and kind.rstrip("s") not in kinds:
        raise UsageError(f"no kind is called {kind!r}; known: {', '.join(kinds)}")
    wanted = [
        (key.rpartition(":")[2], row)
        for key, row in methods.METHODS.items()
        if (kind is None or row.kind == kind.rstrip("s"))
        and (options.all or row.status == "stable")
    ]
    width = max((len(name) for name, _ in wanted), default=0)
    if not wanted:
        output.show("none is stable; --all lists research methods too")
    shown = None
    for name, row in wanted:
        if row.kind != shown:
            output.show(_PLURALS.get(row.kind, f"{row.kind}s"))
            shown = row.kind
        others = ", ".join(tool for tool in row.runs_in if tool != "spectool")
        remarks = [f"also in {others}"] if others else []
        for device, precisions in _kernels(name, row).items():
            *before, last = precisions
            named = f"{', '.join(before)} or {last}" if before else last
            remarks.append(f"kernel on {device}: {named} activations")
        output.show(
            f"  {name:<{width}}  {row.summary}" + "".join(f" [{remark}]" for remark in remarks)
        )
    keys = ("kind", "summary", "source", "status", "runs_in")
    rows = [
        {
            "name": name,
            **{key: getattr(row, key) for key in keys},
            "kernels": _kernels(name, row),
        }
        for name, row in wanted
    ]
    output.result({"methods": rows})


def _kernels(name: str, row: methods.Method) -> dict[str, tuple[str, ...]]:
    """Return how a quantizer's products may take activations, by the device they run on."""
    found = precisions_of(name) if row.serves_as("quantizer") else ()
    return {"cpu": found} if found else {}
