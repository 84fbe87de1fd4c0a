"""What a quantizer is, and what it may know: a block, its inputs, and statistics of them.

A method sees one decoder block at a time. `Streams` are the block's inputs as the original and as
the already packed blocks produce them; statistics are collected at the input of each matrix while
the block runs, and only those that the method asks for.

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

# Tokens of a sample at most.
SAMPLED = 512

# An expert that saw fewer calibration tokens has no statistics worth using.
MIN_EXPERT_TOKENS = 128


@dataclass(slots=True)
class LinearStats:
    """Statistics of the input x [T, m] of one matrix; those not asked for stay None.

    absmax [m] = max_t |x|, mean_abs [m] = mean_t |x|, second_moment [m] = mean_t x^2,
    hessian [m, m] = mean_t x x^T; sample [., m] the first tokens' inputs. All float32.
    """

    wanted: tuple[Statistic, ...]
    num_tokens: int = 0
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    second_moment: Tensor | None = None
    hessian: Tensor | None = None
    sample: Tensor | None = None

    def add(self, x_Tm: Tensor) -> None:
        """Take in further tokens. Means are kept running, so that long texts do not overflow."""
        x_Tm = x_Tm.float()
        count = len(x_Tm)
        if count == 0:
            return
        self.num_tokens += count
        share = count / self.num_tokens
        for name in self.wanted:
            before = getattr(self, name)
            if name == "sample":
                room = SAMPLED - (0 if before is None else len(before))
                new = x_Tm[: max(0, room)].clone()
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
            setattr(self, name, new if before is None else before.lerp_(new, share))


@dataclass(frozen=True, slots=True)
class Streams:
    """A block's inputs [S, L, D] through the original blocks and through the packed ones."""

    original: Activations
    packed: Activations


@dataclass(slots=True)
class Block:
    """One decoder block as a quantizer sees it.

    `module` is its dense copy, None where no calibration runs; `weights` its packable matrices
    [n, m] by name, in the stored dtype; `call` how the module is called, by number of sequences.
    """

    name: str
    matrices: Mapping[str, Matrix]
    weights: Mapping[str, Tensor]
    module: nn.Module | None = None
    calls: Mapping[int, Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a method made of a block: each matrix's fields on the host, and figures of the fit.

    `report` goes into the record of the block and is shown with the result; JSON-safe.
    """

    fields: dict[str, PackedFields]
    report: dict[str, Any] = field(default_factory=dict)


# Told the share of the present block that is done.
Tick = Callable[[float], None]


class Quantizer(Protocol):
    """A method's class: its options, what it needs, how it packs and what runs.

    It implements `fit(block, streams, stats, config, generator, tick) -> Fitted` for a whole block
    (and `fit_bytes(config)`, what that takes of memory a weight of the block), or `pack` for one
    matrix; `fit_each` makes one of the other. `fit` uses its `stats` up. `statistics` says which
    statistics it asks for, and of which stream.
    """

    Config: ClassVar[type[Config]]
    statistics: ClassVar[Mapping[Statistic, Stream]]

    @classmethod
    def layout(cls, shape: tuple[int, int], config: Any) -> FieldSpec:
        """The fields that packing a matrix of this shape makes: the formula of its stored bits."""
        ...

    @classmethod
    def pack(
        cls,
        weight_nm: Tensor,
        stats: LinearStats | None,
        config: Any,
        generator: torch.Generator,
    ) -> PackedFields: ...

    @classmethod
    def build(cls, spec: FieldSpec, shape: tuple[int, int], config: Any) -> PackedLinear: ...


def overflow(name: str, what: str) -> NotFinite:
    """The error of a block, or of a part of one, that computes no numbers."""
    return NotFinite(
        f"{name}: {what}",
        hint="try --dtype float32; if it is so there too, the checkpoint is broken",
    )


def fit_each(
    method: type[Quantizer],
    block: Block,
    stats: dict[str, LinearStats],
    config: Config,
    generator: torch.Generator,
    device: torch.device,
) -> Fitted:
    """`fit` for methods that see one matrix at a time: packed on `device`, kept on the host.

    `stats` are used up: those of a block can be larger than the block.

    Raises:
        UnsupportedError: the method cannot hold a matrix, which is named.
    """
    found = {}
    for name, weight in block.weights.items():
        try:
            fields = method.pack(weight.to(device), stats.pop(name, None), config, generator)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}", hint=error.hint) from error
        found[name] = {field: value.cpu() for field, value in fields.items()}
    return Fitted(found)


class Products(TorchFunctionMode):
    """While open, sees every matrix product of a block with a weight that it knows.

    Products are recognised by their weight's address, so linears, transposed Conv1D and single
    experts of a fused tensor are all seen alike. What becomes of one, `product` decides.
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
        """The result of x [..., m] times the matrix `name`, plus the bias where there is one."""
        raise AssertionError("both kinds define this")

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
    """Collects statistics at the input of every matrix product with a known weight.

    Matrices fed with the same tensor (q, k and v; gate and up) share one set of statistics, which
    is computed once. `opened` is the length of the sequences if they open with a start token, whose
    inputs are then left out (absmax would often be its alone); 0 if they do not.
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
        self._gathered: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Experts are fed with the rows that were routed to them, taken out just before.
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].ndim == 1:
            self._gathered = args[1]
        return super().__torch_function__(func, types, args, kwargs)

    def product(
        self, name: str, x: Tensor, bias: Tensor | None, original: Callable[[], Tensor]
    ) -> Tensor:
        if x is self._last and self._shared is not None:
            self.stats.setdefault(name, self._shared)
            return original()
        stats = self.stats.setdefault(name, LinearStats(self.wanted))
        stats.add(self._counted(name, x.reshape(-1, x.shape[-1])))
        self._last, self._shared = x, stats
        return original()

    def _counted(self, name: str, x_Tm: Tensor) -> Tensor:
        """Without the start tokens."""
        if not self.opened:
            return x_Tm
        if self.matrices[name].expert is None:
            return x_Tm.view(-1, self.opened, x_Tm.shape[1])[:, 1:].flatten(0, 1)
        # An architecture may arrange its experts' rows in another way: then all of them count.
        if self._gathered is None or len(self._gathered) != len(x_Tm):
            return x_Tm
        return x_Tm[self._gathered % self.opened != 0]


def windows(
    ids: list[int],
    *,
    samples: int,
    length: int,
    bos: int | None,
    generator: torch.Generator,
    option: str = "--calibration",
) -> Tensor:
    """Calibration sequences [S, L] of token ids, one from a random place of each S-th of a text.

    So all kinds of a text that holds several come in proportion, and no token comes twice; there
    are no more sequences than the text holds. Each opens with the start token where the tokenizer
    has one: models expect it there, and its absence shows in the statistics. Their order is random,
    as some methods look at the first of them more closely.

    Raises:
        TextError: the text is shorter than one sequence.
    """
    inside = length - (bos is not None)
    if len(ids) < inside:
        raise TextError(
            f"the text of {option} has {len(ids)} tokens, fewer than one sequence of {length}",
            hint="more text, or a smaller --seq-len",
        )
    samples = max(1, min(samples, len(ids) // inside))
    edges = [part * len(ids) // samples for part in range(samples + 1)]
    shares = torch.rand(samples, generator=generator).tolist()
    places = [
        start + int(share * (end - start - inside + 1))
        for share, start, end in zip(shares, edges[:-1], edges[1:], strict=True)
    ]
    order = torch.randperm(samples, generator=generator).tolist()
    text = torch.tensor(ids)
    rows = torch.stack([text[places[part] : places[part] + inside] for part in order])
    if bos is None:
        return rows
    return torch.cat([torch.full((samples, 1), bos), rows], 1)
