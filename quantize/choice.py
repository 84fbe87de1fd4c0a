"""Which method packs which matrix: rules, as a plan file lists them.

    layers:
    - {match: "*.down_proj", method: rtn, bits: 4, group_size: 64}
    - {match: model.layers.0, method: dense}
    - {match: lm_head, method: int8}

The first rule that matches a matrix's name decides: a glob, or some of the name's dotted parts in
order. What no rule matches is packed as the command line says; the embedding and the output matrix
then stay dense.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from spectool.errors import UsageError
from spectool.methods import resolve
from spectool.model.architecture import matches
from spectool.options import Config
from spectool.quantize.calibration import Quantizer

DENSE = "dense"
SKIP = "--skip"


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its options."""

    method: str
    config: Config

    @property
    def quantizer(self) -> type[Quantizer]:
        found: type[Quantizer] = resolve(self.method, "quantizer")
        return found

    @property
    def calibrates(self) -> bool:
        """Whether it needs to see activations."""
        return bool(self.quantizer.statistics) or hasattr(self.quantizer, "fit")

    @property
    def is_matrix(self) -> bool:
        """Whether a dense matrix does the same."""
        return getattr(self.quantizer, "is_matrix", True)

    @functools.cache  # noqa: B019  Layers repeat each other, and choices are few.
    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the fields of a matrix of this shape."""
        layout = self.quantizer.layout(shape, self.config)
        return sum(dtype.itemsize * math.prod(size) for dtype, size in layout.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe, as artifacts store it."""
        return {"method": self.method, "options": self.config.as_dict()}

    def __str__(self) -> str:
        """As it is written on a command line, without what is the default."""
        defaults = {field.name: field.default for field in fields(self.config)}
        said = [f"{k}={v}" for k, v in self.config.as_dict().items() if v != defaults[k]]
        return f"{self.method}:{','.join(said)}" if said else self.method

    @classmethod
    def from_text(cls, text: str) -> Choice:
        """The choice written as `METHOD` or `METHOD:key=value,key=value`.

        Raises:
            UsageError: an unknown method, or options that it does not have.
        """
        method, _, pairs = text.partition(":")
        packer: type[Quantizer] = resolve(method, "quantizer")
        return cls(method, packer.Config.from_text(pairs))


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of the matrices that `match` means; `choice` None leaves them dense. `origin` is
    what messages call it by."""

    match: str
    choice: Choice | None
    origin: str

    @property
    def is_skip(self) -> bool:
        """Whether it is a `--skip` of the command line, not of a plan."""
        return self.origin.startswith(SKIP)

    def means(self, name: str) -> bool:
        return matches(name, self.match)

    def as_dict(self) -> dict[str, Any]:
        """As a line of a plan."""
        if self.choice is None:
            return {"match": self.match, "method": DENSE}
        options = self.choice.config.as_dict()
        return {"match": self.match, "method": self.choice.method, **options}


def skipping(patterns: Iterable[str]) -> list[Rule]:
    """The rules that `--skip` options are."""
    return [Rule(pattern, None, f"{SKIP} {pattern}") for pattern in patterns]


def read_rules(path: Path) -> list[Rule]:
    """The rules of a plan file.

    Raises:
        UsageError: no such file, or it is not a plan.
    """
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"--rules {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--rules {path}: is not YAML: {reason}") from error
    layers = said.get("layers") if isinstance(said, dict) and len(said) == 1 else None
    if not isinstance(layers, list) or not layers:
        raise UsageError(
            f"--rules {path}: expected one list `layers` with an entry "
            "{match: NAME, method: METHOD, …} a rule"
        )
    return [_rule(path, number, entry) for number, entry in enumerate(layers, start=1)]


def _rule(path: Path, number: int, entry: Any) -> Rule:
    origin = f"--rules {path}: entry {number}"
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("match", "method")
    ):
        raise UsageError(f"{origin}: expected match and method, found {entry!r}")
    options = {key: value for key, value in entry.items() if key not in ("match", "method")}
    origin = f"{origin} ({entry['match']})"
    try:
        if entry["method"] == DENSE:
            if options:
                raise UsageError("dense takes no options")
            return Rule(entry["match"], None, origin)
        packer: type[Quantizer] = resolve(entry["method"], "quantizer")
        config = packer.Config.from_dict({str(key): value for key, value in options.items()})
    except UsageError as error:
        raise UsageError(f"{origin}: {error}", hint=error.hint) from error
    return Rule(entry["match"], Choice(entry["method"], config), origin)


def plan_text(rules: Sequence[Rule]) -> str:
    """The plan file that says these rules."""
    layers = [rule.as_dict() for rule in rules]
    text: str = yaml.safe_dump({"layers": layers}, sort_keys=False, width=1000)
    return text
