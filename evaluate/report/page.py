"""The page: sections of results in one HTML file that loads nothing and runs without a script.

A script of a few lines makes tables sortable. The page's own policy forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spectool.errors import wrap_errors
from spectool.evaluate.report.content import Picture, Section, interval_of, number_of, text_of
from spectool.evaluate.report.runs import Run
from spectool.evaluate.report.sections.speed import measured_in
from spectool.files import disk_errors, replacing
from spectool.picture import SUFFIXES, inline_svg, load_matplotlib, render, style

# In the order of the page; each is a module of `sections`.
SECTIONS = (
    "gates", "checkpoints", "tasks", "trust", "decoder_layers", "layers", "speed", "depth",
    "losslessness", "training", "figures", "commands",
)  # fmt: skip
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure at the top of the page."""

    name: str
    value: str
    note: str = ""
    good: bool | None = None


def write_report(runs: Sequence[Run], out: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page, and with `pictures` each picture as PNG and SVG; return what was written.

    All is made before the first file is written.

    Raises:
        InputError: a result is not as this version writes it, or a path cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    load_matplotlib("spectool report")
    for run in runs:
        with wrap_errors(run.path, "not a result as this version of spectool prints it"):
            _make_sections([run])
            list(_tiles([run]))
    sections = _make_sections(runs)
    files: dict[Path, bytes] = {}
    drawn: dict[str, Markup] = {}
    with style():
        for picture in (picture for section in sections for picture in section.pictures):
            name = _unused(picture.name, drawn)
            drawn[name], written = _draw(picture, name, files_wanted=pictures is not None)
            if pictures is not None:
                files |= {pictures / f"{name}{kind}": data for kind, data in written.items()}
    page = _render(runs, sections, list(drawn.values()))
    if pictures is not None:
        with disk_errors(pictures):
            pictures.mkdir(parents=True, exist_ok=True)
    for path, data in {**files, out: page.encode()}.items():
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    return [*files, out]


def _make_sections(runs: Sequence[Run]) -> list[Section]:
    modules = (importlib.import_module(f"{__package__}.sections.{name}") for name in SECTIONS)
    return [section for module in modules if (section := module.make(runs)) is not None]


def _unused(name: str, used: dict[str, Any]) -> str:
    """Return a name that no other picture of the page has."""
    number, found = 2, name
    while found in used:
        number, found = number + 1, f"{name}-{number}"
    return found


def _draw(picture: Picture, name: str, *, files_wanted: bool) -> tuple[Markup, dict[str, bytes]]:
    """Return a picture as an element of the page, and as files, which have its title."""
    hints: dict[str, str] = {}
    figure = picture.draw(hints)
    # Everything in the element was escaped when it was written as XML.
    inline = Markup(inline_svg(figure, name, picture.title, hints=hints))
    if not files_wanted:
        return inline, {}
    figure.suptitle(picture.title, fontsize=9, x=0.02, ha="left", wrap=True)
    return inline, {kind: render(figure, kind) for kind in SUFFIXES}


def _render(runs: Sequence[Run], sections: Sequence[Section], drawn: Sequence[Markup]) -> str:
    loader = FileSystemLoader(_HERE)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = (_HERE / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    elements = iter(drawn)
    return environment.get_template("page.html").render(
        title=_title(runs),
        tiles=list(_tiles(runs)),
        sections=[
            (section, [(picture, next(elements)) for picture in section.pictures])
            for section in sections
        ],
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        version=_version(runs),
    )


def _title(runs: Sequence[Run]) -> str:
    """Return the names of the models that were compressed, or else measured, where they are few."""
    originals, models = [], []
    for run in runs:
        words = run.words
        originals += [words[words.index("--reference") + 1]] if "--reference" in words[:-1] else []
        models += [run.stage.get("model") or run.data.get("model")]
    for given in (originals, models):
        names = list(dict.fromkeys(PurePath(name).name for name in given if name))
        if 0 < len(names) <= 3:
            return ", ".join(names)
    return "Results"


def _version(runs: Sequence[Run]) -> str:
    machines = (run.data.get("machine") or {} for run in runs if not run.is_peers)
    found = {machine.get("versions", {}).get("spectool") for machine in machines} - {None}
    return ", ".join(sorted(found))


def _tiles(runs: Sequence[Run]) -> Iterator[Tile]:
    """Yield the few figures that users ask for first."""
    gates = [gate["holds"] for run in runs for gate in run.data.get("gates", ())]
    if gates:
        value = "all hold" if all(gates) else f"{gates.count(False)} of {len(gates)} fail"
        yield Tile("Gates", value, f"{len(gates)} checked", good=all(gates))
    scored = [run for run in runs if number_of(run.data.get("perplexity_ratio")) is not None]
    if scored:
        best = min(scored, key=lambda run: number_of(run.data["perplexity_ratio"]) or 0.0)
        smallest = min(scored, key=_bits)
        for name, run in {"Least loss": best, "Fewest bits": smallest}.items():
            ratio = run.data["perplexity_ratio"]
            ends = interval_of(ratio)
            between = f" [{text_of(ends[0])}, {text_of(ends[1])}]" if ends else ""
            bits = _bits(run)
            yield Tile(
                name,
                f"{text_of(bits)} bits" if bits < 1e9 else "dense",
                f"perplexity ratio {text_of(number_of(ratio) or 0.0)}{between}",
            )
            if best is smallest:
                break
    rows = [row for measured in measured_in(runs) for row in measured["drafters"]]
    if rows:
        fastest = max(rows, key=lambda row: row["speedup"])
        yield Tile("Fastest drafter", f"{text_of(fastest['speedup'])} times plain", fastest["name"])
        most = max(rows, key=lambda row: row["tokens_per_forward"])
        yield Tile("Tokens per forward", text_of(most["tokens_per_forward"]), most["name"])
    for run in runs:
        if "dimensions" in run.data:
            verdict = run.data["verdict"]
            good = {"pass": True, "fail": False}.get(verdict)
            yield Tile("Trust", verdict, run.name, good=good)
        if "promises" in run.data:
            kept = not run.data["broken"]
            yield Tile("Losslessness", "kept" if kept else "not kept", run.name, good=kept)


def _bits(run: Run) -> float:
    bits = run.data.get("bits_per_weight", {}).get("linears")
    return bits if bits is not None else float("inf")
