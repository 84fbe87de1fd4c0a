"""The quantizer interface and its calibration data: a block, its inputs and their statistics.

A method sees one decoder block at a time. `Streams` are the block's inputs as produced by the
original blocks and by the blocks packed so far. Statistics are collected at the input of each
matrix while the block runs, and only those that the method asks for.

Shapes: n outputs, m inputs, T tokens, S sequences, L tokens of each, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectool.errors import NotFinite, TextError, UnsupportedError
from spectool.model.blocks import Activations, Call
from spectool.model.matrices import Matrix
from spectool.model.packed import FieldSpec, PackedLinear
from spectool.options import Config

Statistic = Literal["absmax", "mean_abs", "second_moment", "hessian", "sample"]
Stream = Literal["original", "packed"]
PackedFields = dict[str, Tensor]

# Most tokens that the `sample` statistic keeps.
SAMPLED = 512

# An expert with fewer calibration tokens is packed without data: its statistics are too noisy.
MIN_EXPERT_TOKENS = 128


@dataclass(slots=True)
class LinearStats:
    """Statistics of the input x [T, m] of one matrix, in float32; those not wanted stay None.

    absmax [m] = max_t |x|, mean_abs [m] = mean_t |x|, second_moment [m] = mean_t x^2,
    hessian [m, m] = mean_t x x^T, sample [., m] = inputs of the first `SAMPLED` tokens.
    """

    wanted: tuple[Statistic, ...]
    num_tokens: int = 0
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    second_moment: Tensor | None = None
    hessian: Tensor | None = None
    sample: Tensor | None = None

    def add(self, x_Tm: Tensor) -> None:
        """Update the statistics with further tokens x [T, m]."""
        x_Tm = x_Tm.float()
        count = len(x_Tm)
        if count == 0:
            return
        self.num_tokens += count
        share = count / self.num_tokens
        for name in self.wanted:
            before = getattr(self, name)
            if name == "sample":
                missing = SAMPLED - (0 if before is None else len(before))
                new = x_Tm[: max(0, missing)].clone()
                setattr(self, name, new if before is None else torch.cat([before, new]))
                continue
            if name == "absmax":
                new = x_Tm.abs().amax(0)
                setattr(self, name, new if before is None else torch.maximum(before, new))
                continue
            if name == "mean_abs":
                new = x_Tm.abs().mean(0)
            elif name == "second_moment":
                new = x_Tm.square().mean(0)
            else:
                new = (x_Tm.T @ x_Tm).div_(count)
            # A running mean: a sum over a long text would lose digits or overflow.
            setattr(self, name, new if before is None else before.lerp_(new, share))


@dataclass(frozen=True, slots=True)
class Streams:
    """Inputs [S, L, D] of a block: outputs of the original blocks, and of the packed ones."""

    original: Activations
    packed: Activations


@dataclass(slots=True)
class Block:
    """One decoder block as a quantizer sees it.

    `weights`: its packable matrices [n, m] by name, in the stored dtype. `module`: its dense copy,
    None if no calibration runs. `calls`: how to call the module, by number of sequences.
    """

    name: str
    matrices: Mapping[str, Matrix]
    weights: Mapping[str, Tensor]
    module: nn.Module | None = None
    calls: Mapping[int, Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A packed block: each matrix's fields on the host, and the metrics of the fit.

    `report` is JSON-safe; it is stored with the block and shown with the result.
    """

    fields: dict[str, PackedFields]
    report: dict[str, Any] = field(default_factory=dict)


# Callback for progress within the current block: called with the share done, from 0 to 1.
Tick = Callable[[float], None]


class Quantizer(Protocol):
    """Interface of a quantization method.

    A method implements `pack` for one matrix. One that trains on a whole block also implements
    `fit(block, streams, stats, config, generator, tick) -> Fitted`, which consumes `stats`, and
    `fit_bytes(config)`, the memory of a fit in bytes per weight of the block. `statistics` maps
    each statistic that the method needs to the stream it is collected from.
    """

    Config: ClassVar[type[Config]]
    statistics: ClassVar[Mapping[Statistic, Stream]]

    @classmethod
    def layout(cls, shape: tuple[int, int], config: Any) -> FieldSpec:
        """Return dtype and shape of every stored field of a matrix of this shape [n, m]."""
        ...

    @classmethod
    def pack(
        cls,
        weight_nm: Tensor,
        stats: LinearStats | None,
        config: Any,
        generator: torch.Generator,
    ) -> PackedFields:
        """Pack one matrix [n, m] into the fields of `layout`; without `stats` from weights alone.

        Raises:
            UnsupportedError: the method cannot represent the matrix.
        """
        ...

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: Any) -> PackedLinear:
        """Create the module that runs with such fields."""
        ...


def not_finite(name: str, what: str) -> NotFinite:
    """Create the error for a block or matrix whose activations are NaN or infinite."""
    return NotFinite(
        f"{name}: {what}",
        hint="try --dtype float32; if that fails too, the checkpoint is damaged",
    )


def fit_each(
    method: type[Quantizer],
    block: Block,
    stats: dict[str, LinearStats],
    config: Config,
    generator: torch.Generator,
    device: torch.device,
) -> Fitted:
    """Pack the matrices of a block one by one on `device`; the fields are returned on the host.

    Consumes `stats`, which can be larger than the block itself.

    Raises:
        UnsupportedError: the method cannot represent a matrix; the message names it.
    """
    packed = {}
    for name, weight in block.weights.items():
        try:
            fields = method.pack(weight.to(device), stats.pop(name, None), config, generator)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}", hint=error.hint) from error
        packed[name] = {field: value.cpu() for field, value in fields.items()}
    return Fitted(packed)


class Products(TorchFunctionMode):
    """Context that intercepts the products with a block's matrices; subclasses define `product`.

    A product is recognised by the address of its weight. This covers linears, transposed Conv1D
    and single experts of a fused tensor alike.
    """

    def __init__(self, module: nn.Module, block: str, matrices: Mapping[str, Matrix]) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        for name, matrix in matrices.items():
            weight: Tensor = module.get_parameter(matrix.parameter.removeprefix(block + "."))
            if matrix.expert is not None:
                weight = weight[matrix.expert]
            self._names[weight.data_ptr()] = name

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        """Return x [..., m] times the matrix `name`, plus its bias; `original()` computes it."""
        raise AssertionError("subclasses define product")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        x = weight = bias = None
        if func is F.linear:
            x, weight, *more = args
            bias = more[0] if more else kwargs.get("bias")
        elif func is torch.addmm:
            bias, x, weight = args
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            x, weight = args
        name = self._names.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
        if name is None:
            return func(*args, **kwargs)
        assert isinstance(x, Tensor)
        return self.product(name, x, bias, lambda: func(*args, **kwargs))


class Observer(Products):
    """Context that collects statistics of the inputs of a block's matrices.

    Matrices with the same input tensor (q, k and v; gate and up) share one set of statistics.
    `opened` is the length of the sequences if each opens with a start token, else 0. Inputs of
    start tokens are left out: their outliers would often decide absmax alone.
    """

    def __init__(
        self,
        module: nn.Module,
        block: str,
        matrices: Mapping[str, Matrix],
        wanted: tuple[Statistic, ...],
        *,
        opened: int = 0,
    ) -> None:
        super().__init__(module, block, matrices)
        self.matrices, self.wanted, self.opened = matrices, wanted, opened
        self.stats: dict[str, LinearStats] = {}
        self._last: Tensor | None = None
        self._shared: LinearStats | None = None
        self._routed: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # An expert's input is indexed from the batch just before: keep the token indices.
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].ndim == 1:
            self._routed = args[1]
        return super().__torch_function__(func, types, args, kwargs)

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        if x is self._last and self._shared is not None:
            self.stats.setdefault(name, self._shared)
            return original()
        stats = self.stats.setdefault(name, LinearStats(self.wanted))
        stats.add(self._without_bos(name, x.reshape(-1, x.shape[-1])))
        self._last, self._shared = x, stats
        return original()

    def _without_bos(self, name: str, x_Tm: Tensor) -> Tensor:
        """Return the inputs x [T, m] of the matrix `name` without those of start tokens."""
        if not self.opened:
            return x_Tm
        if self.matrices[name].expert is None:
            return x_Tm.view(-1, self.opened, x_Tm.shape[1])[:, 1:].flatten(0, 1)
        # Some architectures route tokens to experts in another way; then all tokens count.
        if self._routed is None or len(self._routed) != len(x_Tm):
            return x_Tm
        return x_Tm[self._routed % self.opened != 0]


def sample_sequences(
    ids: list[int],
    *,
    samples: int,
    length: int,
    bos: int | None,
    generator: torch.Generator,
    option: str = "--calibration",
) -> Tensor:
    """Draw sequences [S, L] of token ids from a text, each from a random position of its S-th.

    Every part of a mixed text is thus sampled in proportion, and no token is drawn twice. S is
    `samples`, or as many as the text holds. `option` is what the error message names.

    Raises:
        TextError: the text is shorter than one sequence.
    """
    # Models expect a start token where the tokenizer has one; statistics without it differ.
    inside = length - (bos is not None)
    if len(ids) < inside:
        raise TextError(
            f"the text of {option} has {len(ids)} tokens, fewer than one sequence of {length}",
            hint="more text, or a smaller --seq-len",
        )
    samples = max(1, min(samples, len(ids) // inside))
    edges = [part * len(ids) // samples for part in range(samples + 1)]
    shares = torch.rand(samples, generator=generator).tolist()
    starts = [
        start + int(share * (end - start - inside + 1))
        for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True)
    ]
    # In random order: some methods use only the first sequences for a statistic.
    order = torch.randperm(samples, generator=generator).tolist()
    text = torch.tensor(ids)
    ids_SL = torch.stack([text[starts[part] : starts[part] + inside] for part in order])
    if bos is None:
        return ids_SL
    return torch.cat([torch.full((samples, 1), bos), ids_SL], 1)
