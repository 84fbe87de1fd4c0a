"""Records of a quantization: kept with each shard in the manifest, and shown at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spectool.quantize.base import FitReport
from spectool.quantize.lm_head.base import LmHeadReport


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Stored bits per weight of a packed matrix, and the relative squared error of its weights."""

    name: str
    bits: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideReport:
    """Packed matrices outside the blocks, and the fit of the lm_head, if any."""

    layers: tuple[LayerReport, ...]
    lm_head: LmHeadReport | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON-safe form."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> OutsideReport:
        """Read what `as_json` returned."""
        lm_head = record["lm_head"] and LmHeadReport(**record["lm_head"])
        return cls(layers=tuple(LayerReport(**each) for each in record["layers"]), lm_head=lm_head)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """A packed block.

    `data_free`: matrices packed without data for want of tokens. `fits`: one for each method with
    a fit. `output_error`: relative squared error of its output; None without calibration.
    """

    layers: tuple[LayerReport, ...]
    data_free: tuple[str, ...]
    fits: tuple[FitReport, ...]
    output_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the JSON-safe form."""
        return {**asdict(self), "fits": [fit.as_dict() for fit in self.fits]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BlockReport:
        """Read what `as_json` returned."""
        return cls(
            layers=tuple(LayerReport(**each) for each in record["layers"]),
            data_free=tuple(record["data_free"]),
            fits=tuple(FitReport(**each) for each in record["fits"]),
            output_error=record["output_error"],
        )


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """Records of a whole quantization; `preprocess`: held-out perplexities `packed`, `merged`."""

    outside: OutsideReport
    blocks: tuple[BlockReport, ...]
    preprocess: dict[str, float] | None = None

    @property
    def layers(self) -> list[LayerReport]:
        """All packed matrices, outside the blocks first."""
        inside = (layer for block in self.blocks for layer in block.layers)
        return [*self.outside.layers, *inside]
