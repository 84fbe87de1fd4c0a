"""Stored bits of checkpoints against what they lost, beside peers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from spectool.evaluate.report.content import (
    Cell,
    Picture,
    Section,
    Table,
    bytes_of,
    figure,
    filled,
    interval_of,
    number_of,
    slug,
    text_of,
)
from spectool.evaluate.report.curves import Curves, Spot, draw_curves
from spectool.evaluate.report.peers import curves_of
from spectool.evaluate.report.runs import Run

_TEXT = (
    "Bits are counted from the written files: of the packed matrices in the blocks, or of all "
    "files over all parameters. The perplexity ratio is the perplexity over that of the reference "
    "on the same tokens; KL is the mean of KL(reference || model) in nats per token."
)
# Figures that are drawn, with the label of their axis.
_RATIO = "ratio", "perplexity over the reference's"
_PERPLEXITY = "perplexity", "perplexity"
_KL = "kl", "KL, nats per token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A checkpoint, and what it loses on a text. Figures are as in JSON; None if not measured."""

    name: str
    model: str
    method: str
    bits: Any
    file_bits: Any
    num_bytes: Any
    seconds: Any
    text: str = ""
    perplexity: Any = None
    reference: Any = None
    ratio: Any = None
    kl: Any = None
    top1: Any = None
    words: Sequence[str] = ()


def make(runs: Sequence[Run]) -> Section | None:
    """Make the section from what `quantize` and `eval` printed, and files with peers."""
    points = list(_points(runs))
    peers = [run for run in runs if run.is_peers]
    if not points and not peers:
        return None
    return Section(
        name="checkpoints",
        title="Size and loss",
        text=[_TEXT],
        pictures=list(_pictures(points, peers)),
        tables=[_table(points)] if points else [],
    )


def _points(runs: Sequence[Run]) -> Iterator[Point]:
    """Yield each checkpoint on each text, and those that were packed and not measured."""
    packed = {
        os.path.normpath(run.data["out"]): run.data
        for run in runs
        if "bits_per_weight" in run.data and "out" in run.data
    }
    measured = set()
    for run in runs:
        data = run.data
        if number_of(data.get("perplexity")) is None:
            continue
        model = os.path.normpath(data.get("model", run.name))
        measured.add(model)
        made = packed.get(model, {})
        bits = data.get("bits_per_weight", made.get("bits_per_weight", {}))
        yield Point(
            name=run.name,
            model=model,
            method=made.get("method") or ", ".join(data.get("methods", ())),
            bits=bits.get("linears"),
            file_bits=bits.get("file"),
            num_bytes=data.get("bytes", made.get("bytes")),
            seconds=made.get("seconds"),
            text=_text_of(data),
            perplexity=data["perplexity"],
            reference=data.get("reference", {}).get("perplexity"),
            ratio=data.get("perplexity_ratio"),
            kl=data.get("kl"),
            top1=data.get("top1_agreement"),
            words=run.words,
        )
    for model, data in packed.items():
        if model not in measured:
            bits = data["bits_per_weight"]
            yield Point(
                name=PurePath(model).name,
                model=model,
                method=data["method"],
                bits=bits["linears"],
                file_bits=bits["file"],
                num_bytes=data.get("bytes"),
                seconds=data.get("seconds"),
            )


def _text_of(data: Mapping[str, Any]) -> str:
    """Return the name of the text that was scored, which is read first."""
    read = data.get("read") or [{"source": "the text"}]
    return PurePath(read[0]["source"]).name.partition(".")[0]


def _table(points: Sequence[Point]) -> Table:
    rows = [
        [
            Cell(point.model),
            Cell(point.method or "-"),
            figure(point.bits),
            figure(point.file_bits),
            bytes_of(point.num_bytes),
            Cell(point.text or "-"),
            figure(point.perplexity),
            figure(point.ratio),
            figure(point.kl),
            figure(point.top1, percent=True),
            figure(point.seconds),
        ]
        for point in sorted(points, key=lambda each: (each.text, number_of(each.bits) or math.inf))
    ]
    headings = [
        "Checkpoint", "Method", "Bits, linears", "Bits, file", "Size", "Text", "Perplexity",
        "Ratio", "KL", "Same top token", "Seconds to pack",
    ]  # fmt: skip
    return filled(Table(caption="Checkpoints, by stored bits", headings=headings, rows=rows))


def _pictures(points: Sequence[Point], peers: Sequence[Run]) -> Iterator[Picture]:
    """Yield two pictures for each text: perplexity and KL over stored bits."""
    by_text: dict[str, list[Point]] = {}
    for point in points:
        if point.text and number_of(point.bits) is not None:
            by_text.setdefault(point.text, []).append(point)
    if not by_text:
        yield from _peers_alone(peers)
    for text, own in by_text.items():
        names = {PurePath(word).name for point in own for word in point.words}
        beside = [
            run for run in peers if text in run.data["window_tokens"] and run.data["model"] in names
        ]
        loss = _RATIO if all(number_of(each.ratio) is not None for each in own) else _PERPLEXITY
        for field, label in (loss, _KL):
            if curves := _curves(own, field):
                theirs = _peer_curves(beside, text, field)
                yield _picture(curves, theirs, field, label, text)


def _peers_alone(peers: Sequence[Run]) -> Iterator[Picture]:
    """Yield the pictures of files with peers, where nothing else was measured."""
    for run in peers:
        for text in run.data["window_tokens"]:
            for field, label in (_RATIO, _KL):
                curves = _peer_curves([run], text, field)
                yield _picture(curves, {}, field, label, f"{run.data['model']}, {text}")


def _picture(curves: Curves, beside: Curves, field: str, label: str, what: str) -> Picture:
    return Picture(
        name=slug(f"{field}-{what}"),
        title=f"{label[0].upper()}{label[1:]} against stored bits per weight: {what}",
        draw=partial(
            draw_curves,
            curves,
            beside=beside,
            labels=("stored bits per weight of the linears", label),
        ),
    )


def _peer_curves(peers: Sequence[Run], text: str, field: str) -> Curves:
    return {
        method: [
            Spot(bits, value, f"{method}: {text_of(bits)} bits, {text_of(value)}")
            for bits, value in curve
        ]
        for method, curve in curves_of(peers, text, field).items()
    }


def _curves(points: Sequence[Point], field: str) -> dict[str, list[Spot]]:
    """Return a figure over bits for each method, by bits."""
    curves: dict[str, list[Spot]] = {}
    for point in points:
        bits, value = number_of(point.bits), number_of(getattr(point, field))
        if bits is not None and value is not None:
            hint = f"{point.model}: {text_of(bits)} bits, {figure(getattr(point, field)).text}"
            spot = Spot(bits, value, hint, interval_of(getattr(point, field)))
            curves.setdefault(point.method or "dense", []).append(spot)
    return {method: sorted(spots, key=lambda spot: spot.x) for method, spots in curves.items()}
