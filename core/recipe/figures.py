"""The figures that people ask of a run first, picked from the results of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from spectool.checkpoint.card import Figure

# By stage: the place of a figure in the result, its name, and how it is written.
_PICKED: dict[str, list[tuple[str, str, str]]] = {
    "quantize": [
        ("bits_per_weight.linears", "bits per weight of the linears", ".3f"),
        ("bits_per_weight.file", "bits per parameter of the file", ".3f"),
        ("bytes", "bytes", ",d"),
    ],
    "train-heads": [
        ("untrained_estimate", "estimated tokens per forward before training", ".2f"),
        ("tokens_per_forward_estimate", "estimated tokens per forward", ".2f"),
    ],
    "tune": [("speedup", "speed-up of the tuned draft heads", ".2f")],
    "eval": [
        ("perplexity", "perplexity", ".4f"),
        ("reference.perplexity", "perplexity of the reference", ".4f"),
        ("perplexity_ratio", "perplexity ratio", ".4f"),
        ("kl", "KL divergence from the reference, nats per token", ".3e"),
        ("kl.p99_9", "KL divergence, 99.9% of the tokens below", ".3e"),
        ("rms_delta_p", "RMS change of the token's probability", ".3%"),
        ("top1_agreement", "same top token as the reference", ".2%"),
    ],
}


def figures_of(stage: str, result: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of a stage's result that are there."""
    picked = []
    for path, name, form in _PICKED.get(stage, ()):
        found = reduce(_get, path.split("."), result)
        # With an interval, or with what it was measured on.
        about = found if isinstance(found, Mapping) else {"value": found}
        value = about.get("value")
        if isinstance(value, (int, float)):
            text = f"{value:{form}}"
            # A text of one window has no interval.
            if about.get("lower") is not None and about.get("upper") is not None:
                text += f" ({about['lower']:{form}} to {about['upper']:{form}})"
            picked.append(Figure(stage=stage, metric=path, name=name, value=value, text=text))
    if stage == "bench":
        picked += _speeds(result)
    return picked


def _get(found: Any, key: str) -> Any:
    return found.get(key) if isinstance(found, Mapping) else None


def _speeds(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield tokens per second of plain decoding and of each drafter, with tokens per forward."""
    if "baseline" not in result:
        return
    for row in (result["baseline"], *result["drafters"]):
        # A directory of draft heads goes by its last name.
        name = row["name"] if row is not result["baseline"] else "plain"
        kind, colon, options = name.partition(":")
        name = f"{Path(kind).name}{colon}{options}"
        speed, per_forward = row["tokens_per_second"], row["tokens_per_forward"]
        yield Figure(
            stage="bench",
            metric="tokens_per_second",
            name=f"tokens per second, {name}",
            value=speed,
            text=f"{speed:.1f} ({per_forward:.2f} per forward)",
        )
