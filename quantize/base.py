"""The interface of a quantization method, and what it sees of a block.

A quantizer is an instance that holds its options; two with the same options are equal. It sees one
decoder block at a time. `Streams` are the block's inputs as produced by the original blocks and by
the blocks packed so far.

Shapes: n outputs, m inputs, S sequences, B of a batch, L tokens of each, D width.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spectool import options
from spectool.errors import NotFinite, UnsupportedError
from spectool.methods import import_method
from spectool.model.blocks import Activations, run_block
from spectool.model.matrices import Matrix
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.model.shell import Call
from spectool.quantize.statistics import LinearStats, Statistic

Stream = Literal["original", "packed"]
PackedFields = dict[str, Tensor]
Statistics = Mapping[Statistic, Stream]

# Callback for progress within the current block: called with the share done, from 0 to 1.
Tick = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs [S, L, D] of a block: outputs of the original blocks, and of the packed ones."""

    original: Activations
    packed: Activations


@dataclass(slots=True, kw_only=True)
class Block:
    """One decoder block as a quantizer sees it.

    `weights`: its packable matrices [n, m] by name, in the stored dtype. `device`: where to
    compute. `module`: its dense copy there, None if no calibration runs. `calls`: how to call the
    module, by number of sequences.
    """

    name: str
    matrices: Mapping[str, Matrix]
    weights: Mapping[str, Tensor]
    device: torch.device
    module: nn.Module | None = None
    calls: Mapping[int, Call] = field(default_factory=dict)

    def run(self, hidden_BLD: Tensor) -> Tensor:
        """Compute the output [B, L, D] of the original block, in inference mode."""
        assert self.module is not None
        return run_block(self.module, self.calls[len(hidden_BLD)], hidden_BLD.to(self.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Metrics of a block's fit; `loss_after` is that of the best epoch, which is kept.

    `codes_moved`: share of codes that the fit changed, and of those by more than one level.
    """

    loss_start: float
    loss_after: float
    least_cosine: float
    best_epoch: int
    steps_skipped: int
    rows_flipped: int | None = None
    codes_moved: float | None = None
    codes_moved_further: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the metrics that the method has."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A packed block: each matrix's fields on the host, and the metrics of the fit, if any."""

    fields: dict[str, PackedFields]
    report: FitReport | None = None


class Quantizer(ABC):
    """A quantization method with its options.

    `statistics` maps each statistic that `pack` needs to the stream it is collected from.
    `rounds_inputs`: the packed module also rounds its inputs, so that it equals no dense matrix.
    """

    name: ClassVar[str]
    Config: ClassVar[type[options.Config]] = options.Config
    statistics: ClassVar[Statistics] = {}
    rounds_inputs: ClassVar[bool] = False
    config: Any

    def __init__(self, config: options.Config | None = None) -> None:
        self.config = config or self.Config()

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> FieldSpec:
        """Return dtype and shape of every stored field of a matrix of this shape [n, m]."""

    @abstractmethod
    def pack(
        self, weight_nm: Tensor, stats: LinearStats | None, generator: torch.Generator
    ) -> PackedFields:
        """Pack one matrix [n, m] into the fields of `layout`; without `stats` from weights alone.

        Raises:
            UnsupportedError: the method cannot represent the matrix.
        """

    @abstractmethod
    def build(self, shape: tuple[int, int]) -> PackedLinear:
        """Create the module that runs a matrix of this shape, on the current default device."""

    def find_misfit(self, shape: tuple[int, int]) -> str:
        """Return why matrices of this shape cannot be packed; empty if they can."""
        return ""

    @property
    def needs_calibration(self) -> bool:
        """Whether the method needs calibration data."""
        return bool(self.statistics)

    def fit(
        self,
        block: Block,
        streams: Streams | None,
        stats: dict[str, LinearStats],
        generator: torch.Generator,
        tick: Tick,
    ) -> Fitted:
        """Pack the matrices of a block, here one by one; the fields are returned on the host.

        Consumes `stats`, which can be larger than the block itself.

        Raises:
            UnsupportedError: the method cannot represent a matrix; the message names it.
        """
        return Fitted(self.pack_each(block, stats, generator))

    def pack_each(
        self, block: Block, stats: dict[str, LinearStats], generator: torch.Generator
    ) -> dict[str, PackedFields]:
        """Pack matrices one by one; see `fit`."""
        packed = {}
        for name, weight in block.weights.items():
            try:
                found = self.pack(weight.to(block.device), stats.pop(name, None), generator)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name}: {error}", hint=error.hint) from error
            packed[name] = {key: value.cpu() for key, value in found.items()}
        return packed

    @functools.cache  # noqa: B019  Layers repeat each other, and quantizers are few.
    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of the fields of a matrix of this shape."""
        return sum(dtype.itemsize * math.prod(size) for dtype, size in self.layout(shape).values())

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-safe form stored in artifacts."""
        return {"method": self.name, "options": self.config.as_dict()}

    def __str__(self) -> str:
        """Return the form written on a command line, without options at their defaults."""
        defaults = {option.name: option.default for option in fields(self.config)}
        changed = [f"{k}={v}" for k, v in self.config.as_dict().items() if v != defaults[k]]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config == getattr(other, "config", None)

    def __hash__(self) -> int:
        return hash((self.name, self.config))


def parse_quantizer(text: str) -> Quantizer:
    """Parse `METHOD` or `METHOD:key=value,key=value`.

    Raises:
        UsageError: unknown method, or options that the method does not have.
    """
    method, _, pairs = text.partition(":")
    kind: type[Quantizer] = import_method(method, "quantizer")
    return kind(kind.Config.from_text(pairs))


def not_finite(name: str, what: str) -> NotFinite:
    """Create the error for a block or matrix whose activations are NaN or infinite."""
    return NotFinite(
        f"{name}: {what}", hint="try --dtype float32; if that fails too, the checkpoint is damaged"
    )
