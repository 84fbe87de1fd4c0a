"""Rules that choose a method for each matrix, from a YAML file (`--rules`).

    layers:
    - {match: "*.down_proj", method: rtn, bits: 4, group_size: 64}
    - {match: model.layers.0, method: dense}
    - {match: lm_head, method: int8}

The first rule that matches a matrix's name decides; `match` is a glob, or consecutive dotted parts
of the name. Matrices without a rule are packed by the method of the command line, except that the
embedding and the lm_head stay dense.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spectool.errors import UsageError
from spectool.methods import import_method
from spectool.quantize.base import Quantizer

DENSE = "dense"
SKIP = "--skip"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: pack matrices whose names `match`, or leave them dense if `quantizer` is None.

    `origin` says where the rule was given; error messages name it.
    """

    match: str
    quantizer: Quantizer | None
    origin: str

    @property
    def is_skip(self) -> bool:
        """Whether the rule is a `--skip` of the command line, not from a file."""
        return self.origin.startswith(SKIP)

    def matches(self, name: str) -> bool:
        """Whether `match` is a glob of the name, or consecutive dotted parts of it."""
        if any(sign in self.match for sign in "*?["):
            return fnmatch.fnmatchcase(name, self.match)
        return f".{self.match}." in f".{name}."

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as an entry of a rules file."""
        if self.quantizer is None:
            return {"match": self.match, "method": DENSE}
        options = self.quantizer.config.as_dict()
        return {"match": self.match, "method": self.quantizer.name, **options}


def make_skip_rules(patterns: Iterable[str]) -> list[Rule]:
    """Make a rule of each `--skip` pattern."""
    return [Rule(pattern, None, f"{SKIP} {pattern}") for pattern in patterns]


def read_rules(path: Path) -> list[Rule]:
    """Read a rules file.

    Raises:
        UsageError: the file cannot be read, or it is not a list of rules.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"--rules {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--rules {path}: is not YAML: {reason}") from error
    layers = content.get("layers") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(layers, list) or not layers:
        raise UsageError(
            f"--rules {path}: expected one list `layers` with an entry "
            "{match: NAME, method: METHOD, ...} for each rule"
        )
    return [_parse_rule(path, number, entry) for number, entry in enumerate(layers, start=1)]


def _parse_rule(path: Path, number: int, entry: Any) -> Rule:
    """Parse the entry `number` of a rules file."""
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
        kind: type[Quantizer] = import_method(entry["method"], "quantizer")
        config = kind.Config.from_dict({str(key): value for key, value in options.items()})
    except UsageError as error:
        raise UsageError(f"{origin}: {error}", hint=error.hint) from error
    return Rule(entry["match"], kind(config), origin)


def format_rules(rules: Sequence[Rule]) -> str:
    """Return the text of a rules file with these rules."""
    layers = [rule.as_dict() for rule in rules]
    text: str = yaml.safe_dump({"layers": layers}, sort_keys=False, width=1000)
    return text
