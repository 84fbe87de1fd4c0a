"""Errors of packed matrices: the squared error relative to the source's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from spectool.checkpoint.tensors import Checkpoint
from spectool.evaluate.context import Context, Need
from spectool.evaluate.measures.base import Measure
from spectool.model.architecture import Architecture
from spectool.model.exchange import field_specs
from spectool.model.packed import build_packed, relative_error


@dataclass(frozen=True, slots=True)
class LayerError:
    name: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers(Measure):
    needs: ClassVar[tuple[Need, ...]] = ("source",)

    layers: list[LayerError]

    @classmethod
    def run(cls, context: Context) -> Self:
        assert context.source is not None
        return cls(layers=list(layer_errors(context.checkpoint, context.source)))

    def lines(self) -> Iterator[str]:
        worst = max(self.layers, key=lambda layer: layer.error)
        yield f"largest layer error: {worst.error:.2e} ({worst.name})"


def layer_errors(packed: Checkpoint, source: Checkpoint) -> Iterator[LayerError]:
    """Yield the error of each packed matrix; a block of both checkpoints is in memory at a time."""
    quantized, original = Architecture(packed), Architecture(source)
    for part in (original.outer_matrices(), *map(original.block_matrices, original.blocks)):
        matrices = [matrix for matrix in part if matrix.name in quantized.modules]
        tensors = original.read(dict.fromkeys(matrix.parameter for matrix in matrices))
        prefixes = tuple(f"{matrix.name}.q." for matrix in matrices)
        codes = quantized.read(key for key in quantized.origins if key.startswith(prefixes))
        specs = field_specs({key: (t.dtype, tuple(t.shape)) for key, t in codes.items()})
        for matrix in matrices:
            module = build_packed(quantized.modules[matrix.name], specs[matrix.name])
            module.q.load_state_dict(
                {field: codes[f"{matrix.name}.q.{field}"] for field in specs[matrix.name]}
            )
            yield LayerError(matrix.name, relative_error(matrix.weight_nm(tensors), module))
