"""Precisions of products: `exact` takes activations as they are, `int8` and `int16` round them.

`auto` takes a method's row of the table: the fewest bits with which rounding the activations adds
less than `SHARE` of the divergence that the method itself causes, or less than `LEAST` nat. The
figures are those of `benchmarks/activations.py`. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

Precision = Literal["exact", "int16", "int8"]
ACTIVATIONS = ("auto", *get_args(Precision))

# Divergence that `auto` lets rounded activations add: this share of the method's own, or this many
# nats per token.
SHARE, LEAST = 0.02, 1e-4


@dataclass(frozen=True, slots=True)
class Row:
    """Divergence from the dense model in nats per token: the method's own, and what each adds.

    `int16` is measured where `int8` adds too much.
    """

    own: float
    int8: float
    int16: float | None = None

    @property
    def auto(self) -> Precision:
        """The precision of `--activations auto`."""
        most = max(SHARE * self.own, LEAST)
        if self.int8 < most:
            return "int8"
        return "int16" if self.int16 is not None and self.int16 < most else "exact"


# Rows of a method by the bits of its codes, the most bits where it has codes of several widths. The
# more bits, the less a method loses itself, and the less may be added. Where nothing was measured,
# activations are exact.
PRECISIONS: dict[str, dict[int, Row]] = {
    "rtn": {
        2: Row(0.16, int8=-1.49e-04),
        3: Row(0.0248, int8=2.34e-04),
        4: Row(0.00664, int8=4.67e-04, int16=-1.27e-07),
        8: Row(3.12e-05, int8=6.45e-04, int16=9.12e-09),
    },
    "nf4": {
        4: Row(0.00643, int8=2.33e-04, int16=9.99e-05),
    },
    "int8": {
        8: Row(4.63e-05, int8=6.17e-04, int16=-1.56e-08),
    },
    "ptq161": {
        4: Row(0.0651, int8=3.01e-05),
    },
    "gptq": {
        2: Row(0.03, int8=1.29e-04),
        3: Row(0.00598, int8=4.03e-04),
        4: Row(0.00131, int8=5.44e-04, int16=-7.56e-08),
        8: Row(4.88e-06, int8=6.30e-04),
    },
    "hqq": {
        2: Row(0.0897, int8=2.44e-04),
        4: Row(0.00547, int8=1.97e-04),
    },
    "jlcm": {
        2: Row(0.0205, int8=2.77e-04),
    },
}

# Methods whose products have no integers: levels of pairs of columns, or of a column's own, and
# tables of shared vectors.
EXACT_ONLY = ("olive", "scalar", "vq")


def precisions_of(method: str) -> tuple[Precision, ...]:
    """Return the precisions that there are products in, none for a method without a kernel."""
    if method in EXACT_ONLY:
        return ("exact",)
    return get_args(Precision) if method in PRECISIONS else ()


def choose(method: str, bits: float | None, activations: str) -> Precision:
    """Choose how a method's products take activations, as far as there is a choice.

    `bits`: of its codes; None for a method with one width. With `auto`, bits between two rows are
    those of the next row, and more than were measured are `exact`.
    """
    if activations == "exact" or method not in PRECISIONS:
        return "exact"
    if activations != "auto":
        return cast(Precision, activations)
    rows = PRECISIONS[method]
    width = min((each for each in rows if each >= (bits or 0)), default=None)
    return "exact" if width is None else rows[width].auto
