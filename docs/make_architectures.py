"""Write docs/architectures.md from what tests/architectures.py found, version by version.

    python docs/make_architectures.py

A test compares the page with what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
TARGET = Path(__file__).with_name("architectures.md")

COLUMNS = {
    "block by block": ("resident", "blockwise"),
    "quantize": ("int8", "gptq"),
    "batch": ("batch",),
    "drafters": ("ngram", "recycle", "trigram", "jacobi", "skip", "draft_model"),
    "heads": ("medusa",),
}

INTRODUCTION = """# Architectures

Made by `docs/make_architectures.py` from what `tests/architectures.py` found; do not edit.

Every model type that transformers' causal mapping knows, as a tiny random model, went through:

- **block by block**: logits of `spectool.load` and of `eval --blockwise` are transformers' own.
- **quantize**: logits of `int8` are close to the dense ones, and the same unpacked, loaded again
  and block by block; every matrix of `gptq --bits 4` with text is close to its source.
- **batch**: three prompts of unequal lengths decoded together give what each gives alone, and that
  is transformers' greedy text, in float32.
- **drafters**: with each of {drafters} (the model itself
  as its draft model) the text is that of plain decoding, token for token.
- **heads**: `medusa` heads learn for a few steps and draft; the text is that of plain decoding.

`no` with a number is a refusal in words, before work begins; what the numbers mean stands below.
`plain` means that the drafters are accepted and every token is decoded plainly; a percentage, that
only so much of the blocks' weights is packed (with `--allow-dense`), for the rest is not linear.

What these models leave out: they have no end token, and a padding token only where the default
configuration has one; layers that choose keys choose 32 of 40. Close means, of logits: those of
half of the tokens are at most 15% off (found: {int8:.0%}; a single matrix of noise makes more than
60%); of a matrix: its squared error is at most half of its square (found: {matrix:.1%}). Logits
after `gptq` are only asked to be nearer to the dense ones than an unrelated model's (found:
{gptq:.0%} off, of 140%): random weights magnify what 4 bits do, and say nothing about the quality
of real ones.
"""


def page() -> str:
    """The whole page."""
    results = [json.loads(file.read_text("utf-8")) for file in _files()]
    newest = results[0]
    reasons: dict[str, list[str]] = {}
    drafters = ", ".join(f"`{name}`" for name in COLUMNS["drafters"])
    largest = {name: _largest(results, name, "error") for name in ("int8", "gptq")}
    largest["matrix"] = _largest(results, "gptq", "matrix")
    lines = [INTRODUCTION.format(drafters=drafters, **largest)]
    lines += ["| transformers | torch | date | command |", "|---|---|---|---|"]
    for result in results:
        cells = (result[key] for key in ("transformers", "torch", "date"))
        lines.append(f"| {' | '.join(cells)} | `{result['command']}` |")
    lines += ["", f"## With transformers {newest['transformers']}", ""]
    lines += [
        _summary(newest),
        "",
        _accepted(newest),
        "",
        "| model type | " + " | ".join(COLUMNS) + " |",
    ]
    lines.append("|---|" + "---|" * len(COLUMNS))
    built = [row for row in newest["entries"] if "checks" in row]
    for row in built:
        lines.append(f"| {' | '.join([row['entry'], *_cells(row, reasons)])} |")
    lines += ["", "The same classes as another type's:", ""]
    twins = [row for row in newest["entries"] if "same as" in row]
    lines += [", ".join(f"{row['entry']} ({row['same as']})" for row in twins) or "none"]
    lines += ["", "## Why it is refused", ""]
    for number, (reason, names) in enumerate(reasons.items(), start=1):
        lines.append(f"{number}. {reason}: {', '.join(dict.fromkeys(names))}")
    lines += ["", "## Not built", ""]
    missing = [row for row in newest["entries"] if "not built" in row]
    lines += [f"- {row['entry']}: {row['not built']}" for row in missing] or ["none"]
    lines += ["", "## Noted", ""]
    lines += [
        f"- {row['entry']}: {note}"
        for row in built
        for note in row.get("notes", [])
        if "decoding plainly" not in note
    ] or ["none"]
    faults = [
        f"- {row['entry']}, {name}: {check['why']}"
        for row in built
        for name, check in row["checks"].items()
        if check["result"] == "FAULT"
    ]
    if faults:
        lines += ["", "## Faults", "", *faults]
    for result in results[1:]:
        lines += ["", f"## With transformers {result['transformers']}", "", _summary(result), ""]
        lines += _differing(result, newest)
    return "\n".join(lines) + "\n"


def _largest(results: Any, method: str, figure: str) -> float:
    rows = (row for result in results for row in result["entries"])
    checks = (row.get("checks", {}).get(method, {}) for row in rows)
    return max(check.get(figure, 0.0) for check in checks)


def _files() -> list[Path]:
    """The results, the newest transformers first."""
    return sorted(RESULTS.glob("architectures-transformers-*.json"), key=_version, reverse=True)


def _version(file: Path) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", file.stem)]


def _summary(result: Any) -> str:
    entries = result["entries"]
    built = [row for row in entries if "checks" in row]
    ends = [{check["result"] for check in row["checks"].values()} for row in built]
    return (
        f"{len(entries)} entries, {len(built)} built: in {sum(e == {'works'} for e in ends)} "
        f"everything works, in {sum('works' in e and 'refused' in e for e in ends)} a part is "
        f"refused, in {sum(e == {'refused'} for e in ends)} everything; "
        f"{sum('FAULT' in e for e in ends)} have faults."
    )


def _accepted(result: Any) -> str:
    """In how many of the models that a drafter works with a draft was accepted."""
    found = []
    for name in (*COLUMNS["drafters"], *COLUMNS["heads"]):
        checks = [row["checks"][name] for row in result["entries"] if name in row.get("checks", {})]
        works = [check for check in checks if check["result"] == "works"]
        found.append(f"{name} {sum(c.get('accepted', 0) > 0 for c in works)} of {len(works)}")
    return f"A draft was accepted with {', '.join(found)}; others show rejections at most."


def _cells(row: Any, reasons: dict[str, list[str]]) -> list[str]:
    """A row's cells; what is refused is added to the reasons."""
    plain = any("decoding plainly" in note for note in row.get("notes", []))
    return [
        _cell(row, names, reasons, plain=plain and column == "drafters")
        for column, names in COLUMNS.items()
    ]


def _cell(row: Any, names: Iterable[str], reasons: dict[str, list[str]], *, plain: bool) -> str:
    checks = {name: row["checks"][name] for name in names if name in row["checks"]}
    ends = {check["result"] for check in checks.values()}
    numbers = [
        (name, _number(check["why"], row, reasons))
        for name, check in checks.items()
        if check["result"] == "refused"
    ]
    if "FAULT" in ends:
        return "FAULT"
    if ends == {"works"}:
        return "plain" if plain else f"yes{_packed(checks)}"
    if ends == {"refused"}:
        return f"no ({', '.join(dict.fromkeys(str(number) for _, number in numbers))})"
    less = ", ".join(f"{name} ({number})" for name, number in numbers)
    return f"{'plain' if plain else 'yes'}{_packed(checks)}, not {less}"


def _packed(checks: Any) -> str:
    """The share of the blocks' weights that is packed, where more than a tenth is not."""
    share = min((check["packed"] for check in checks.values() if "packed" in check), default=1)
    return f" ({share:.0%})" if share < 0.9 else ""


def _number(why: str, row: Any, reasons: dict[str, list[str]]) -> int:
    """The number of a reason, whatever model it names."""
    reason = why.replace("MODEL: ", "").removeprefix(row["class"]).lstrip(": ")
    reason = re.sub(r"^\S+ cannot be decoded by spectool: ", "", reason)
    reason = re.sub(r"^(it |\S+ here )?is no causal model", "is no causal model", reason)
    for name in (row["class"], row["entry"].partition(",")[0], row.get("type")):
        reason = reason.replace(f"{name}", "the model") if name else reason
    # A model with other parts is refused by its text's type.
    reason = reason.replace("the model_text", "the model")
    reasons.setdefault(reason, []).append(row["entry"])
    return list(reasons).index(reason) + 1


def _differing(result: Any, newest: Any) -> list[str]:
    """Return the rows that an older version has otherwise."""
    now = {row["entry"]: row for row in newest["entries"]}
    lines = []
    for row in result["entries"]:
        other = now.get(row["entry"])
        if other is None:
            lines.append(f"- {row['entry']}: known to this version only")
        elif "checks" not in row or "checks" not in other:
            before, now_built = (each.get("not built", "built") for each in (row, other))
            if ("checks" in row) != ("checks" in other):
                lines.append(f"- {row['entry']}: {before} (newer: {now_built})")
        else:
            changed = [
                f"{name}: {check['result']}" + (f" ({check['why']})" if "why" in check else "")
                for name, check in row["checks"].items()
                if name in other["checks"] and check["result"] != other["checks"][name]["result"]
            ]
            lines += [f"- {row['entry']}: {'; '.join(changed)}"] if changed else []
    new = sorted(now.keys() - {row["entry"] for row in result["entries"]})
    lines = lines or ["No entry that both know differs."]
    sets = [
        {name for row in each["entries"] for name in row.get("checks", {})}
        for each in (result, newest)
    ]
    if more := sorted(sets[0] - sets[1]):
        rows = [row["checks"] for row in result["entries"] if "checks" in row]
        works = [f"{name} {sum(r[name]['result'] == 'works' for r in rows)}" for name in more]
        lines += ["", f"Checked with this version only, works: {', '.join(works)}."]
    return [*lines, "", f"Not known to this version: {', '.join(new) or 'none'}."]


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
