"""Model cards: the README of an artifact, with the metadata that the hub reads at its top.

The metadata are huggingface_hub's `ModelCardData`: licence and base of the checkpoint, tags, and
measured figures as evaluation results. The licence is that of the base: of its own card, else as
its LICENSE file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectool.errors import UsageError

README = "README.md"

# What a card takes over from that of the base.
_INHERITED = ("license", "license_name", "license_link", "language")
# Beginnings of the texts of licences, with the hub's names of them.
_LICENCES = {
    r"\s*Apache License\s+Version 2\.0": "apache-2.0",
    r"\s*(The )?MIT License": "mit",
    r"\s*BSD 3-Clause": "bsd-3-clause",
}
# Metrics that the hub's evaluation results have names for, of those that figures have.
_RESULTS = ("perplexity", "perplexity_ratio", "kl", "top1_agreement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured figure: `metric` of the result of a stage; `text` is the value as it is shown."""

    stage: str
    metric: str
    name: str
    value: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The content of a model card.

    `lines`: how the artifact was made. `origin`: `license`, `base_model` and the like; see
    `read_origin`. `relation`: to the base, in the hub's words. `measured_by`: the commands of the
    figures, and the machine. `loading`: code and commands that load it.
    """

    title: str
    name: str
    tags: Sequence[str]
    relation: str
    lines: Sequence[str]
    loading: str
    origin: Mapping[str, Any]
    fingerprint: str | None
    dataset: str = "text"
    figures: Sequence[Figure] = ()
    measured_by: Sequence[str] = field(default=())

    def __str__(self) -> str:
        from huggingface_hub.repocard_data import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=self.dataset,
                metric_type=figure.metric,
                metric_name=figure.name,
                metric_value=round(figure.value, 6),
            )
            for figure in self.figures
            if figure.metric in _RESULTS
        ]
        data = ModelCardData(
            **self.origin,
            base_model_relation=self.relation if "base_model" in self.origin else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["spectool", *self.tags],
            model_name=self.name if results else None,
            eval_results=results or None,
        )
        parts = ["---", data.to_yaml(), "---", "", f"# {self.title}", "", *self.lines, ""]
        parts += [*self._lineage(), "", *self._measured(), self.loading]
        return "\n".join(parts)

    def _lineage(self) -> Iterable[str]:
        yield from ("## Lineage", "")
        if self.fingerprint:
            yield f"- Fingerprint of the base: `{self.fingerprint}`"
        licence = self.origin.get("license_name") or self.origin.get("license")
        yield f"- Licence of the base: {licence or 'not stated there'}"

    def _measured(self) -> Iterable[str]:
        if self.figures:
            yield from ("## Measured", "", "| | |", "|---|---:|")
            yield from (f"| {figure.name} | {figure.text} |" for figure in self.figures)
            yield ""
        if self.measured_by:
            yield from (*(f"- {line}" for line in self.measured_by), "")


def with_base(text: str, base: str, relation: str) -> str:
    """Return a card's text with another base in its metadata, and the relation to it.

    Raises:
        UsageError: the metadata are no YAML.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except ValueError as error:
        raise UsageError(f"{README}: its metadata cannot be read: {error}") from error
    card.data["base_model"], card.data["base_model_relation"] = base, relation
    return str(card.content)


def describe_options(options: Mapping[str, Any]) -> str:
    """Return options as a card has them."""
    return json.dumps(options, sort_keys=True)


def read_origin(path: Path, *, base: str | None = None) -> dict[str, Any]:
    """Return what a card says of the licence and the base, from a directory's card and LICENSE.

    `base`: the hub id of the base, if the directory is that; else the one of its card is kept.
    """
    data = _read_metadata(path / README)
    origin = {key: data[key] for key in _INHERITED if data.get(key)}
    if "license" not in origin and (found := _read_licence(path)) is not None:
        origin |= found
    known = base or (data.get("base_model") if "spectool" in (data.get("tags") or ()) else None)
    return {**origin, "base_model": known} if known else origin


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a card; empty without any."""
    from huggingface_hub.repocard import metadata_load

    try:
        found: Any = metadata_load(path) if path.is_file() else None
    except Exception:
        # A card is text by anybody, and its YAML may be none.
        found = None
    return found if isinstance(found, dict) else {}


def _read_licence(path: Path) -> dict[str, str] | None:
    """Return the licence that a LICENSE file says; one that is not known is called `other`."""
    for file in sorted([*path.glob("LICENSE*"), *path.glob("LICENCE*")]):
        text = file.read_text(encoding="utf-8", errors="replace")
        for beginning, name in _LICENCES.items():
            if re.match(beginning, text):
                return {"license": name}
        return {"license": "other", "license_link": file.name}
    return None
