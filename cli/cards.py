"""The model card of an artifact: made of its own records, with figures that a run measured."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.card import README, Card, Figure, describe_options, read_origin
from spectool.checkpoint.headers import HEADS, TRAINING, read_json, read_layout
from spectool.checkpoint.hub import is_local

if TYPE_CHECKING:
    from spectool.recipe.execute import Outcome

# The stages whose figures stand in a card: what was lost and gained by what is in the directory.
_MEASURING = ("train-heads", "tune", "eval", "bench")


def card_of(path: Path, **measured: Any) -> Card:
    """Return the card of a checkpoint or of draft heads that spectool wrote.

    `measured`: the fields of `Card` about figures.

    Raises:
        CheckpointError: its records cannot be read.
    """
    if (path / HEADS).is_file():
        return _heads_card(path)
    layout = read_layout(path)
    training = read_json(path / TRAINING) if (path / TRAINING).is_file() else None
    if layout.is_packed:
        from spectool.quantize.small_files import packed_card

        return packed_card(layout, read_origin(path), training=training, **measured)
    assert training is not None
    return _trained_card(path, training, str(layout.config.get("model_type")), **measured)


def _trained_card(path: Path, training: Mapping[str, Any], family: str, **measured: Any) -> Card:
    method, options = training.get("method"), training.get("options") or {}
    lines = [f"Method `{method}` with {describe_options(options)}; `{TRAINING}` has the rest."]
    return Card(
        title="A checkpoint trained by spectool",
        name=f"{family}-{method}",
        tags=[str(method)],
        relation="finetune",
        lines=lines,
        loading='It is loaded as its base is: `AutoModelForCausalLM.from_pretrained("PATH")`.\n',
        origin=read_origin(path),
        fingerprint=(training.get("source") or {}).get("fingerprint"),
        **measured,
    )


def _heads_card(path: Path) -> Card:
    record = read_json(path / HEADS)
    method, target = record.get("method"), record.get("target") or {}
    lines = [f"Method `{method}` with {describe_options(record.get('options') or {})}."]
    if accuracy := record.get("accuracy"):
        shares = ", ".join(f"{share:.1%}" for share in accuracy)
        lines += ["", f"Held-out accuracy of each head's first guess: {shares}."]
    return Card(
        title="Draft heads trained by spectool",
        name=f"{method}-heads",
        tags=[str(method), "speculative-decoding"],
        relation="adapter",
        lines=lines,
        loading="```\nspectool generate MODEL --draft PATH\n```\n",
        origin=read_origin(path),
        fingerprint=target.get("lineage"),
    )


def write_cards(found: Mapping[str, Sequence[Outcome]], model: Mapping[str, str]) -> list[Path]:
    """Write the cards of the checkpoints that a run's variants ended with; return their places.

    `model`: the checkpoint that each variant began with.
    """
    from spectool.checkpoint.artifact import attach_file

    written = []
    for variant, outcomes in found.items():
        made = [
            outcome
            for outcome in outcomes
            if outcome.planned.stage in ("distill", "quantize")
            and outcome.state in ("done", "cached")
            and outcome.planned.home == variant
        ]
        if not made:
            continue
        path = Path(str(made[-1].result["out"])) if made[-1].result else None
        if path is None:
            continue
        measured = [each for each in outcomes if each.planned.stage in _MEASURING and each.result]
        card = card_of(
            path,
            dataset=_dataset(measured),
            figures=list(_figures(measured)),
            measured_by=list(_sources(measured, path, model[variant])),
        )
        data = str(card).encode()
        if not (path / README).is_file() or (path / README).read_bytes() != data:
            attach_file(path, README, data)
            written.append(path)
    return written


def _figures(measured: Sequence[Outcome]) -> Iterator[Figure]:
    from spectool.recipe.figures import figures_of

    for outcome in measured:
        yield from figures_of(outcome.planned.stage, outcome.result or {})


def _dataset(measured: Sequence[Outcome]) -> str:
    """Name the texts of the evaluation, without their folders."""
    for outcome in measured:
        if outcome.planned.stage == "eval" and outcome.result is not None:
            read = outcome.result.get("read") or ()
            if names := [Path(str(each.get("source"))).name for each in read]:
                return ", ".join(names)
    return "spectool's bundled text"


def _sources(measured: Sequence[Outcome], path: Path, model: str) -> Iterator[str]:
    """Yield the commands and machines of figures; files of this machine by their last names."""
    for outcome in measured:
        words = [_word(word, path, model) for word in outcome.command]
        machine = (outcome.result or {}).get("machine") or {}
        on = f", on {machine['processor']}" if machine.get("processor") else ""
        yield f"`spectool {shlex.join(words)}`{on}"


def _word(word: str, path: Path, model: str) -> str:
    if word == str(path):
        return "PATH"
    if word == model:
        return "BASE" if is_local(model) else model
    place = Path(word)
    return place.name if place.is_absolute() or place.exists() else word
