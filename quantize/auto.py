"""Automatic choice of a method (`quantize auto`) for a number of bits or a size in memory.

`STEPS` go from the most to the fewest bits, in the order measured by `benchmarks/fidelity.py`; the
first one that fits is taken. Only headers are read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectool import options
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.options import option
from spectool.quantize.base import Quantizer, parse_quantizer
from spectool.quantize.budget import list_widths
from spectool.quantize.job import Budget
from spectool.quantize.plan import QuantizePlan, make_plan
from spectool.quantize.rules import Rule

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40
}  # fmt: skip

# Below this many bits dense embeddings would be a large part of the file: they are packed too.
SMALL = 3.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a quantizer as written on a command line, its nominal bits, and why to take it."""

    method: str
    bits: float
    why: str


STEPS = (
    Step("int8", 8, "8 bits lose nothing that was measured"),
    Step("gptq:bits=6", 6, "6 bits lose next to nothing"),
    Step("gptq:bits=5", 5, "5 bits lose next to nothing"),
    Step("gptq:bits=4,group_size=32", 4, "gptq at 4 bits loses next to nothing, without a fit"),
    Step("gptq:bits=4", 4, "gptq at 4 bits loses next to nothing, without a fit"),
    Step("gptq:bits=3,group_size=32", 3, "gptq at 3 bits loses little, without a fit"),
    Step("gptq:bits=3", 3, "gptq at 3 bits loses little, without a fit"),
    Step("jlcm:bits=2", 2, "codebooks that are fitted lost the least of what has 2 bits"),
    Step("ptq161", 1.6, "nothing that was measured below two bits lost less"),
)


class Auto:
    """Options of `auto`, which picks one of the other methods."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: float | None = option(
            None, "bits of a code; a fraction is a --bits-budget", minimum=1.6, maximum=8
        )
        fit: str | None = option(None, "memory that weights and cache may take, as in 24GiB")
        context: int = option(4096, "tokens of the cache that --fit counts", minimum=0)

        def validate(self) -> None:
            if self.bits is not None and self.fit is not None:
                raise UsageError("--bits and --fit: give only one of them")
            if self.fit is not None:
                parse_size(self.fit)


@dataclass(frozen=True, slots=True)
class Picked:
    """Result of `pick`: the quantizer for blocks and for embeddings, a budget if any, and why."""

    quantizer: Quantizer
    embeddings: Quantizer | None
    budget: Budget | None
    why: str


def parse_size(text: str) -> int:
    """Parse a size such as `24GiB`, `500 MB` or `1e9` into bytes.

    Raises:
        UsageError: not a positive size.
    """
    lower = text.strip().lower()
    unit = next(unit for unit in sorted(UNITS, key=len, reverse=True) if lower.endswith(unit))
    try:
        num_bytes = int(float(lower.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0:
        raise UsageError(f"--fit {text}: expected a size such as 24GiB or 500MB")
    return num_bytes


def pick(
    architecture: Architecture,
    config: Auto.Config,
    *,
    rules: Sequence[Rule] = (),
    embeddings: Quantizer | None = None,
    lm_head: Quantizer | None = None,
    allow_dense: bool = False,
) -> Picked:
    """Pick a method for `config`; `rules`, `embeddings` and `lm_head` are the user's.

    Raises:
        UsageError: neither bits nor a size are given, no step fits, or the matrices are too small
            for fewer than two bits.
    """
    make = functools.partial(
        make_plan, architecture, rules=rules, lm_head=lm_head, allow_dense=allow_dense
    )
    if config.bits is not None:
        picked = _pick_by_bits(config.bits, embeddings)
        if config.bits < 2:
            plan = make(picked.quantizer, embeddings=picked.embeddings)
            _check_below_two(plan, picked.quantizer, config.bits)
        return picked
    if config.fit is None:
        raise UsageError(
            "auto needs bits or a size", hint="--bits 4, or --fit 24GiB for a size in memory"
        )
    limit, cache = parse_size(config.fit), cache_bytes(architecture, config.context)
    and_cache = f"and a cache of {config.context} tokens {_format_size(cache)}"
    stored = {key for origin in architecture.origins.values() for key, _ in origin.stored}
    dense = sum(architecture.layout.tensors[key].num_bytes for key in stored)
    if dense + cache <= limit:
        raise UsageError(
            f"it fits as it is: weights take {_format_size(dense)} {and_cache}, of {config.fit}",
            hint="--bits makes it smaller still",
        )
    smallest = None
    for step in STEPS:
        quantizer = parse_quantizer(step.method)
        for_embeddings = embeddings or _choose_embeddings(step.bits)
        smallest = make(quantizer, embeddings=for_embeddings)
        if smallest.file_bytes + cache <= limit:
            why = f"{step.why}; weights will take {_format_size(smallest.file_bytes)} {and_cache}"
            return Picked(quantizer, for_embeddings, None, why)
    assert smallest is not None
    raise UsageError(
        f"--fit {config.fit}: the smallest method takes {_format_size(smallest.file_bytes)} "
        f"{and_cache}",
        hint="a smaller --context, or a smaller model",
    )


def _pick_by_bits(bits: float, embeddings: Quantizer | None) -> Picked:
    """Pick the step of these bits, or a budget between two widths of gptq."""
    for_embeddings = embeddings or _choose_embeddings(bits)
    # The last of several steps with the same bits wins: it has no extra cost for small groups.
    by_bits = {step.bits: step for step in STEPS}
    if bits in by_bits or bits < 2:
        step = by_bits.get(bits, STEPS[-1])
        return Picked(parse_quantizer(step.method), for_embeddings, None, step.why)
    quantizer = parse_quantizer("gptq")
    budget = Budget(bits, list_widths(quantizer, bits))
    why = "between two widths: each matrix gets bits by its error"
    return Picked(quantizer, for_embeddings, budget, why)


def _check_below_two(plan: QuantizePlan, quantizer: Quantizer, bits: float) -> None:
    """Raise a UsageError if the matrices packed by `quantizer` take more than `bits` a weight.

    All stored fields count: in short rows scales weigh more.
    """
    matrices = [each for each in plan.inside if plan.quantizers[each.name] == quantizer]
    stored_bits = 8 * sum(quantizer.stored_bytes(matrix.shape) for matrix in matrices)
    taken = stored_bits / max(1, sum(matrix.num_weights for matrix in matrices))
    # 1.6 is nominal: the actual bits depend on the shapes, and up to 2 are accepted.
    if taken > (2 if bits == STEPS[-1].bits else bits):
        raise UsageError(
            f"--bits {bits:g}: {quantizer} takes {taken:.3f} bits a weight of these matrices",
            hint=f"--bits {min(2, math.ceil(100 * taken) / 100):g}",
        )


def _choose_embeddings(bits: float) -> Quantizer | None:
    """Choose int8 for the embeddings below `SMALL` bits, else leave them dense."""
    return parse_quantizer("int8") if bits < SMALL else None


def cache_bytes(architecture: Architecture, tokens: int) -> int:
    """Return the bytes of the KV cache for `tokens` tokens, in a dtype of two bytes."""
    text: Any = architecture.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return 4 * len(architecture.blocks) * int(kv_heads) * int(width) * tokens


def _format_size(num_bytes: int) -> str:
    """Format bytes as GB or MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
