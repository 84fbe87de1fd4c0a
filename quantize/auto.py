"""`quantize auto`: a method and its options for a size, and why.

The steps below go from the most to the fewest bits, in the order that `benchmarks/fidelity.py`
found them in: the first one that fits is taken. It chooses from headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectool import options
from spectool.errors import UsageError
from spectool.model.architecture import Architecture
from spectool.options import option
from spectool.quantize.budget import Budget, widths
from spectool.quantize.choice import Choice, Rule
from spectool.quantize.plan import Plan, make_plan

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40
}  # fmt: skip

# Below so many bits the embedding and the output matrix would be much of the file.
SMALL = 3.0


@dataclass(frozen=True, slots=True)
class Step:
    """Something to pack by, the whole bits that users know it by, and what speaks for it."""

    choice: str
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
    """No method of its own: it picks one."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        bits: float | None = option(
            None, "bits of a code; a fraction is a --bits-budget", minimum=1.6, maximum=8
        )
        fit: str | None = option(None, "memory that weights and cache may take, as in 24GiB")
        context: int = option(4096, "tokens of a cache that fits beside the weights", minimum=0)

        def validate(self) -> None:
            if self.bits is not None and self.fit is not None:
                raise UsageError("--bits and --fit: one of them decides")
            if self.fit is not None:
                parse_size(self.fit)


@dataclass(frozen=True, slots=True)
class Picked:
    """What to pack by: the blocks' matrices, the rest, a budget; and why."""

    choice: Choice
    embeddings: Choice | None
    budget: Budget | None
    why: str


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `500 MB`, `1e9`.

    Raises:
        UsageError: it is no size.
    """
    lower = text.strip().lower()
    unit = next(unit for unit in sorted(UNITS, key=len, reverse=True) if lower.endswith(unit))
    try:
        found = int(float(lower.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise UsageError(f"--fit {text}: expected a size such as 24GiB or 500MB")
    return found


def pick(
    architecture: Architecture,
    config: Auto.Config,
    *,
    rules: Sequence[Rule] = (),
    embeddings: Choice | None = None,
    lm_head: Choice | None = None,
    allow_dense: bool = False,
) -> Picked:
    """The step to take. `rules`, `embeddings` and `lm_head` are what the user asked for.

    Raises:
        UsageError: neither a size nor bits are given, nothing fits, or matrices are too small for
            less than two bits.
    """
    if config.bits is not None:
        picked = _by_bits(config.bits, embeddings)
        if config.bits < 2:
            own = make_plan(
                architecture,
                picked.choice,
                rules=rules,
                embeddings=picked.embeddings,
                lm_head=lm_head,
                allow_dense=allow_dense,
            )
            _check_below_two(own, picked.choice, config.bits)
        return picked
    if config.fit is None:
        raise UsageError(
            "auto wants to know how small", hint="--bits 4, or --fit 24GiB for a size in memory"
        )
    room, cache = parse_size(config.fit), cache_bytes(architecture, config.context)
    beside = f"and a cache of {config.context} tokens {_size(cache)}"
    stored = {key for origin in architecture.origins.values() for key, _ in origin.stored}
    dense = sum(architecture.layout.tensors[key].num_bytes for key in stored)
    if dense + cache <= room:
        raise UsageError(
            f"it fits as it is: weights take {_size(dense)} {beside}, of {config.fit}",
            hint="--bits makes it smaller still",
        )
    plan = None
    for step in STEPS:
        choice = Choice.from_text(step.choice)
        beside_blocks = embeddings or _embeddings(step.bits)
        plan = make_plan(
            architecture,
            choice,
            rules=rules,
            embeddings=beside_blocks,
            lm_head=lm_head,
            allow_dense=allow_dense,
        )
        if plan.file_bytes + cache <= room:
            why = f"{step.why}; weights will take {_size(plan.file_bytes)} {beside}"
            return Picked(choice, beside_blocks, None, why)
    assert plan is not None
    raise UsageError(
        f"--fit {config.fit}: the smallest there is takes {_size(plan.file_bytes)} {beside}",
        hint="a smaller --context, or a smaller model",
    )


def _by_bits(bits: float, embeddings: Choice | None) -> Picked:
    beside = embeddings or _embeddings(bits)
    # Of steps with the same bits the last is what these bits are known by.
    known = {step.bits: step for step in STEPS}
    if bits in known or bits < 2:
        step = known.get(bits, STEPS[-1])
        return Picked(Choice.from_text(step.choice), beside, None, step.why)
    choice = Choice.from_text("gptq")
    budget = Budget(bits, widths(choice, bits))
    return Picked(choice, beside, budget, "between two widths: each matrix gets bits by its error")


def _check_below_two(plan: Plan, choice: Choice, bits: float) -> None:
    """Raises: UsageError: what is stored a row takes it above, as in matrices with short rows."""
    matrices = [
        matrix
        for block in plan.matrices.values()
        for matrix in block.values()
        if plan.choices[matrix.name] == choice
    ]
    taken = 8 * sum(choice.stored_bytes(matrix.shape) for matrix in matrices)
    found = taken / max(1, sum(matrix.num_weights for matrix in matrices))
    # 1.6 is what it is known by, whatever the matrices.
    if found > (2 if bits == STEPS[-1].bits else bits):
        raise UsageError(
            f"--bits {bits:g}: {choice} takes {found:.3f} bits a weight of these matrices",
            hint=f"--bits {min(2, math.ceil(100 * found) / 100):g}",
        )


def _embeddings(bits: float) -> Choice | None:
    return Choice.from_text("int8") if bits < SMALL else None


def cache_bytes(architecture: Architecture, tokens: int) -> int:
    """Keys and values of so many tokens in a dtype of two bytes, of every layer."""
    text: Any = architecture.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    kept = getattr(text, "num_key_value_heads", None) or heads
    return 4 * len(architecture.blocks) * int(kept) * int(width) * tokens


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
