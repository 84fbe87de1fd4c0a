"""Sentences about the events of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spectool.checkpoint.headers import summarize_names
from spectool.data.text import Reading
from spectool.report import (
    AnswersKept,
    ChainRates,
    FeaturesFound,
    LayersNotCompared,
    Loaded,
    NoAssistant,
    NoBaselines,
    NotItsSource,
    NotMeasured,
    OptionTuned,
    PlainDecoding,
    PromptsLeftOut,
    ShortCalibration,
    StatesKept,
    Timing,
    TrainingStarts,
    TrajectoriesCollected,
    UnitsMined,
)


def describe(event: Any) -> Iterator[str]:
    """Yield the lines that say what happened.

    Raises:
        TypeError: there are no words for this event.
    """
    match event:
        case Reading():
            yield _describe_reading(event)
        case Loaded(name=name):
            whole = f"{event.runtime} on {event.device}"
            size = (event.streamed_bytes or 0) / 1e9
            streamed = f"run {event.runtime} ({size:.2f} GB as a whole)"
            yield f"{name}: {whole if event.streamed_bytes is None else streamed}"
            if event.unused:
                yield f"{name}: {unused_line(event.unused, event.kind)}"
            yield from event.notes
        case ShortCalibration(found, wanted):
            yield f"calibration: {found} of {wanted} sequences, all that the text holds"
        case AnswersKept(count, path, name):
            yield f"{path}: has {count} answers of {name}, which are not asked for again"
        case NotMeasured(measure, reason):
            yield f"{measure} is not measured: {reason}"
        case FeaturesFound(texts, store):
            yield f"features of {texts} texts from {store}"
        case TrajectoriesCollected():
            yield (
                f"{event.texts} trajectories of {event.tokens} tokens from {event.prompts} "
                f"prompts, {event.passes_per_block:.1f} passes a block"
            )
        case UnitsMined(texts, tokens, units, inside):
            yield (
                f"{units} units in {texts} texts: {inside / tokens:.1%} of {tokens} tokens, "
                f"{inside / units:.1f} tokens a unit"
            )
        case TrainingStarts(steps, seconds):
            yield f"{steps} steps, about {seconds / 60:.1f} min, and the evaluations"
        case NotItsSource(name, reference):
            yield f"{reference}: {name} was not quantized from it; no layer errors"
        case LayersNotCompared(name, reference, reason):
            yield f"decoder layers of {name} and {reference} are not compared: {reason}"
        case PromptsLeftOut(left_out, total, room, context):
            yield (
                f"{left_out} of {total} prompts left out: with {room} new tokens they do not fit "
                f"in the context of {context}"
            )
        case StatesKept(path, width, vocabulary, error):
            yield (
                f"{path}: {width} numbers a position in place of {vocabulary}, which they give "
                f"back with an error of at most {error:.1e}"
            )
        case PlainDecoding(prompts):
            yield f"plain decoding of {prompts} prompts, to find loops and to warm up"
        case Timing(name, category, per_second, per_forward):
            first = f"{category}, {name}" if category else name
            yield f"{first}: {per_second:.1f} tok/s, {per_forward:.2f} tokens per forward"
        case NoBaselines(size):
            yield (
                f"no baselines at batch size {size}: transformers' run one prompt at a time here"
            )
        case NoAssistant(baseline, path, target_size, draft_size):
            yield (
                f"no {baseline} by {path}: transformers needs the target's vocabulary size "
                f"{target_size}, and its lm_head has {draft_size} rows"
            )
        case ChainRates(name, None):
            yield f"{name}: no chains, since its drafts cannot be cut to their first path"
        case ChainRates(name, rates):
            yield f"{name}, chains: {' '.join(f'{rate:.2f}' for rate in rates or ())}"
        case OptionTuned(option, speedups):
            tried = (f"{value}: {speedup:.2f}x" for value, speedup in speedups.items())
            yield f"{option} {', '.join(tried)}"
        case _:
            raise TypeError(f"no words for {event}")


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """Say how well a training does on held-out text."""
    if "perplexity" in metrics:
        followed = f", KL {metrics['kl']:.4f}" if "kl" in metrics else ""
        return f"perplexity {metrics['perplexity']:.3f}{followed}"
    if "auc" in metrics:
        return f"area under the ROC curve {metrics['auc']:.3f}"
    if "calibration_error" in metrics:
        return (
            f"loss {-metrics['score']:.4f}, acceptance {metrics['predicted']:.1%} predicted and "
            f"{metrics['seen']:.1%} seen, {metrics['calibration_error']:.1%} apart by bins"
        )
    accuracy = " ".join(f"{share:.0%}" for share in metrics["accuracy"])
    return f"{accuracy} by head and {metrics['score']:.2f} tokens per forward"


def unused_line(names: Sequence[str], model: str) -> str:
    """Say which stored tensors a model, given by the name of its class, does not use."""
    one = len(names) == 1
    return (
        f"{len(names)} stored tensor{' has' if one else 's have'} no place in {model} and "
        f"{'is' if one else 'are'} not used: {summarize_names(names)}"
    )


def _describe_reading(reading: Reading) -> str:
    """Say how many rows of which fields were read, and how the first begins."""
    shapes = [
        shape + (f" ({count})" if len(reading.shapes) > 1 else "")
        for shape, count in reading.shapes.items()
    ]
    what = f"{'prompt' if reading.prompts else 'row'}{'s' * (reading.num_rows != 1)}"
    line = f"{reading.source}: {reading.num_rows} {what}, {', '.join(shapes)}; the first begins "
    line += json.dumps(reading.first, ensure_ascii=False)
    return line + "; tools left out: the chat template takes none" * reading.tools_left_out
