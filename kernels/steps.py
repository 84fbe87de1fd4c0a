"""A decoder layer as one call in C: steps over buffers with a row for each node (`steps.c`).

A step computes a row from that row alone, and attention from the keys that the row's mask shows, so
a row's result does not depend on the other rows. What a step stores has the dtype of the hidden
states; it computes in float32.

Shapes: B texts, N nodes of each, S keys, D width of the hidden states, R rotary width; H heads of
queries, G of keys and values, W width of a head.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.kernels import build, threads
from spectool.kernels.dense import PADDED
from spectool.kernels.products import TYPES, PackedProduct

# Most bytes of buffers that are kept for the next call: those of the few rows of a step.
_KEPT_BYTES = 1 << 24
# Elements of a head that are turned at most; as in steps.c.
MOST_ROTARY = 1024
# As in product.h.
_MOST_JOINED = 4
_LINE = 64
# Positions of `enum op` and `enum activation` in steps.c.
_OPS = (
    *("rms", "layer", "products", "rotate halves", "rotate pairs"),
    *("store", "attend", "activate", "gate", "add"),
)
ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True, slots=True)
class View:
    """Heads of `width` elements in each row of a buffer, `stride` apart, from `column` on."""

    buffer: int
    width: int
    heads: int = 1
    stride: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalise each head of `source`: by its root mean square, or by mean and variance.

    `weight` and `bias` [width] in float32.
    """

    kind: str  # "rms" or "layer"
    source: View
    target: View
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class Matrix:
    """A product whose outputs are a buffer: packed, or with a dense weight [n, m]; bias [n] in
    float32."""

    target: int
    weight: PackedProduct | Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Products:
    """Multiply the rows of a buffer with matrices."""

    source: int
    matrices: Sequence[Matrix]


@dataclass(frozen=True, slots=True)
class Rotate:
    """Turn the first R elements of each head: element i with i + R / 2, or with its neighbour."""

    heads: View
    in_pairs: bool


@dataclass(frozen=True, slots=True)
class Store:
    """Write keys and values to the cache."""

    keys: View
    values: View


@dataclass(frozen=True, slots=True)
class Attend:
    """Attend with queries to the cached keys; the result [H W] is a buffer.

    With a `cap`, scores s are cap tanh(s / cap) before the mask is added.
    """

    queries: View
    keys: View
    target: int
    scaling: float
    cap: float | None = None


@dataclass(frozen=True, slots=True)
class Activate:
    """Apply an activation."""

    source: View
    target: View
    activation: str


@dataclass(frozen=True, slots=True)
class Gate:
    """Multiply the activation of a gate with `other`."""

    source: View
    other: View
    target: View
    activation: str


@dataclass(frozen=True, slots=True)
class Add:
    """Add two buffers."""

    source: View
    other: View
    target: View


Step = Norm | Products | Rotate | Store | Attend | Activate | Gate | Add


class _View(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("buffer", "column", "heads", "stride")]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "weight", "bias")),
        *((name, ctypes.c_ssize_t) for name in ("num_inputs", "num_outputs")),
        *((name, ctypes.c_int32) for name in ("to", "is_joined")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "linears")),
        *((name, _View) for name in ("source", "other", "target")),
        ("width", ctypes.c_ssize_t),
        *((name, ctypes.c_float) for name in ("number", "cap")),
        *((name, ctypes.c_int32) for name in ("op", "activation", "num_linears")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("steps", "widths")),
        *((name, ctypes.c_int32) for name in ("num_steps", "num_buffers", "type")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layer", "x", "y", "arena", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("mask", "keys", "values", "starts")),
        ("strides", ctypes.c_ssize_t * 3),
        *((name, ctypes.c_ssize_t) for name in ("texts", "num_nodes", "num_keys", "rotary")),
        ("hidden", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


class Rows:
    """Inputs that the layers of a pass share.

    `mask_BNS` [B, N, S], in float32, hides keys at its minimum `hidden`. `starts_B`, int64: the
    columns at which the first nodes stand. Cosines and sines of the positions [B, N, R], in
    float32, if there are any. A pass, and so this, belongs to one thread.
    """

    def __init__(
        self,
        mask_BNS: Tensor,
        hidden: float,
        starts_B: Tensor,
        cosine_BNR: Tensor | None = None,
        sine_BNR: Tensor | None = None,
    ) -> None:
        self.mask_BNS, self.hidden, self.starts_B = mask_BNS.contiguous(), hidden, starts_B
        self.cosine_BNR = None if cosine_BNR is None else cosine_BNR.contiguous()
        self.sine_BNR = None if sine_BNR is None else sine_BNR.contiguous()
        batch, num_nodes, num_keys = mask_BNS.shape
        assert mask_BNS.dtype is torch.float32 and starts_B.dtype is torch.int64
        self.shape = batch, num_nodes
        self.num_rows, self.num_keys = batch * num_nodes, num_keys
        self.given = _Pass(
            mask=self.mask_BNS.data_ptr(),
            starts=starts_B.data_ptr(),
            texts=batch,
            num_nodes=num_nodes,
            num_keys=num_keys,
            hidden=hidden,
            threads=threads.count(),
        )
        if self.cosine_BNR is not None and self.sine_BNR is not None:
            assert self.cosine_BNR.dtype is self.sine_BNR.dtype is torch.float32
            assert self.cosine_BNR.shape == self.sine_BNR.shape
            assert self.cosine_BNR.shape[:2] == self.shape
            self.given.cosine = self.cosine_BNR.data_ptr()
            self.given.sine = self.sine_BNR.data_ptr()
            self.given.rotary = self.cosine_BNR.shape[2]


class Layer:
    """The steps of a layer for hidden states of one dtype; `widths` are those of the buffers.

    Buffer 0 holds the hidden states, and receives the layer's output.
    """

    def __init__(self, steps: Sequence[Step], widths: Sequence[int], dtype: torch.dtype) -> None:
        self.steps, self.widths, self.dtype = list(steps), list(widths), dtype
        # What C reads by address.
        self._held: list[Any] = []
        self._scratch_bytes = 0
        structures = (_Step * len(self.steps))(*map(self._describe, self.steps))
        sizes = (ctypes.c_ssize_t * len(self.widths))(*self.widths)
        self._layer = _Layer(
            steps=ctypes.addressof(structures),
            widths=ctypes.addressof(sizes),
            num_steps=len(self.steps),
            num_buffers=len(self.widths),
            type=TYPES[dtype],
        )
        self._held += [structures, sizes]
        self._address = ctypes.addressof(self._layer)
        # Buffers begin with a cache line.
        self._row_bytes = sum(self.widths[1:]) * dtype.itemsize + self._scratch_bytes
        self._rest_bytes = _LINE * len(self.widths)

    def __deepcopy__(self, memo: Any) -> Layer:
        # Nothing changes it, and C reads it by its addresses.
        return self

    def __call__(self, x_BND: Tensor, rows: Rows, keys_BGSW: Tensor, values_BGSW: Tensor) -> Tensor:
        """Compute the layer's output [B, N, D]; inference only.

        The keys and values of the pass are written to the cached ones, which are of the same dtype
        and strides and may be those of more texts.
        """
        x_BND = x_BND.contiguous()
        y_BND = torch.empty_like(x_BND)
        strides = keys_BGSW.stride()
        assert x_BND.dtype is keys_BGSW.dtype is self.dtype and strides[3] == 1
        assert x_BND.shape == (*rows.shape, self.widths[0])
        assert strides == values_BGSW.stride() and rows.num_keys <= keys_BGSW.shape[2]
        arena = _arena(rows.num_rows * self._row_bytes + self._rest_bytes)
        given = rows.given
        given.layer, given.arena = self._address, arena.data_ptr()
        given.x, given.y = x_BND.data_ptr(), y_BND.data_ptr()
        given.keys, given.values = keys_BGSW.data_ptr(), values_BGSW.data_ptr()
        given.strides[:] = strides[:3]
        _load()(ctypes.byref(given))
        return y_BND

    def twin(self, x_BND: Tensor, rows: Rows, keys_BGSW: Tensor, values_BGSW: Tensor) -> Tensor:
        """Compute the same in torch: the specification, except for the rounding of sums."""
        buffers = {0: x_BND.clone()}
        for step in self.steps:
            _compute(step, buffers, rows, (keys_BGSW, values_BGSW))
        return buffers[0]

    def _describe(self, step: Step) -> _Step:
        """Return a step as C reads it."""
        match step:
            case Norm():
                self._held += [step.weight, step.bias]
                return _Step(
                    op=_OPS.index(step.kind),
                    source=_view(step.source),
                    target=_view(step.target),
                    width=step.source.width,
                    weight=None if step.weight is None else step.weight.data_ptr(),
                    bias=None if step.bias is None else step.bias.data_ptr(),
                    number=step.epsilon,
                )
            case Products():
                linears = self._linears(step.matrices)
                self._held.append(linears)
                return _Step(
                    op=_OPS.index("products"),
                    source=_View(buffer=step.source),
                    linears=ctypes.addressof(linears),
                    num_linears=len(linears),
                )
            case Rotate():
                name = "rotate pairs" if step.in_pairs else "rotate halves"
                heads = _view(step.heads)
                return _Step(
                    op=_OPS.index(name), source=heads, target=heads, width=step.heads.width
                )
            case Store():
                return _Step(
                    op=_OPS.index("store"),
                    source=_view(step.keys),
                    other=_view(step.values),
                    width=step.keys.width,
                )
            case Attend():
                return _Step(
                    op=_OPS.index("attend"),
                    source=_view(step.queries),
                    other=_view(step.keys),
                    target=_View(buffer=step.target),
                    width=step.queries.width,
                    number=step.scaling,
                    cap=step.cap or 0.0,
                )
            case Activate():
                return _Step(
                    op=_OPS.index("activate"),
                    source=_view(step.source),
                    target=_view(step.target),
                    width=step.source.width,
                    activation=ACTIVATIONS.index(step.activation),
                )
            case Gate() | Add():
                is_gate = isinstance(step, Gate)
                return _Step(
                    op=_OPS.index("gate" if is_gate else "add"),
                    source=_view(step.source),
                    other=_view(step.other),
                    target=_view(step.target),
                    width=step.source.width,
                    activation=ACTIVATIONS.index(step.activation) if isinstance(step, Gate) else 0,
                )

    def _linears(self, matrices: Sequence[Matrix]) -> ctypes.Array[_Linear]:
        linears = (_Linear * len(matrices))()
        first: PackedProduct | None = None
        count = 0
        for linear, matrix in zip(linears, matrices, strict=True):
            weight, bias = matrix.weight, matrix.bias
            self._held += [weight, bias]
            linear.to = matrix.target
            if isinstance(weight, PackedProduct):
                packed = weight.describe(bias)
                self._held.append(packed)
                linear.packed = ctypes.addressof(packed)
                linear.num_outputs, linear.num_inputs = weight.shape
                count = count + 1 if first is not None and weight.reads_like(first) else 1
                linear.is_joined = int(1 < count <= _MOST_JOINED)
                if not linear.is_joined:
                    first, count = weight, 1
                self._scratch_bytes = max(self._scratch_bytes, weight.row_bytes)
            else:
                assert weight.is_contiguous() and weight.dtype is self.dtype
                linear.num_outputs, linear.num_inputs = weight.shape
                linear.weight = weight.data_ptr()
                linear.bias = None if bias is None else bias.data_ptr()
                first = None
                padded = -(-linear.num_inputs // PADDED) * PADDED
                self._scratch_bytes = max(self._scratch_bytes, 4 * padded)
        return linears


def _view(view: View) -> _View:
    return _View(view.buffer, view.column, view.heads, view.stride)


class _Kept(threading.local):
    def __init__(self) -> None:
        self.arena = torch.empty(0, dtype=torch.uint8)


_kept = _Kept()


def _arena(size: int) -> Tensor:
    """Return memory for buffers; that of few rows is used again, since new memory costs faults."""
    if size > _KEPT_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    if len(_kept.arena) < size:
        _kept.arena = torch.empty(size, dtype=torch.uint8)
    return _kept.arena


@functools.cache
def _load() -> Any:
    """Load the function of the library."""
    library = build.load_library()
    assert not isinstance(library, str), "layers are fused where there is a library"
    run = library.functions.spectool_layer
    run.argtypes, run.restype = [ctypes.c_void_p], None
    return run


def _compute(
    step: Step, buffers: dict[int, Tensor], rows: Rows, cached: tuple[Tensor, Tensor]
) -> None:
    """Compute a step in torch."""

    def read(view: View) -> Tensor:
        heads = [view.column + head * view.stride for head in range(view.heads)]
        buffer = buffers[view.buffer].float()
        return torch.stack([buffer[..., at : at + view.width] for at in heads], 2)

    def write(view: View, values_BNHW: Tensor) -> None:
        like = next(iter(buffers.values()))
        if view.buffer not in buffers:
            size = view.column + (view.heads - 1) * view.stride + view.width
            buffers[view.buffer] = like.new_zeros(*like.shape[:2], size)
        for head in range(view.heads):
            at = view.column + head * view.stride
            buffers[view.buffer][..., at : at + view.width] = values_BNHW[:, :, head].to(like.dtype)

    match step:
        case Norm():
            x = read(step.source)
            if step.kind == "layer":
                x = x - x.mean(-1, keepdim=True)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + step.epsilon)
            x = x if step.weight is None else x * step.weight
            write(step.target, x if step.bias is None else x + step.bias)
        case Products():
            x = buffers[step.source]
            for matrix in step.matrices:
                if isinstance(matrix.weight, PackedProduct):
                    y = matrix.weight(x, matrix.bias)
                else:
                    y = F.linear(x.float(), matrix.weight.float(), matrix.bias).to(x.dtype)
                buffers[matrix.target] = y
        case Rotate():
            assert rows.cosine_BNR is not None and rows.sine_BNR is not None
            x, width = read(step.heads), rows.cosine_BNR.shape[-1]
            turned = x[..., :width]
            if step.in_pairs:
                other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
            else:
                first, second = turned.chunk(2, -1)
                other = torch.cat([-second, first], -1)
            turned = turned * rows.cosine_BNR[:, :, None] + other * rows.sine_BNR[:, :, None]
            write(step.heads, torch.cat([turned, x[..., width:]], -1))
        case Store():
            for view, into_BGSW in zip((step.keys, step.values), cached, strict=True):
                for text, start in enumerate(rows.starts_B.tolist()):
                    new_GNW = read(view)[text].transpose(0, 1).to(into_BGSW.dtype)
                    into_BGSW[text, :, start : start + new_GNW.shape[1]] = new_GNW
        case Attend():
            num_keys, share = rows.mask_BNS.shape[2], step.queries.heads // step.keys.heads
            k, v = (part[:, :, :num_keys].float().repeat_interleave(share, 1) for part in cached)
            mask = rows.mask_BNS[:, None].masked_fill(
                rows.mask_BNS[:, None] <= rows.hidden, -torch.inf
            )
            scores = read(step.queries).transpose(1, 2) @ k.transpose(2, 3) * step.scaling
            if step.cap is not None:
                scores = step.cap * (scores / step.cap).tanh()
            out = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
            buffers[step.target] = out.to(buffers[step.queries.buffer].dtype)
        case Activate():
            write(step.target, activate(step.activation, read(step.source)))
        case Gate():
            write(step.target, activate(step.activation, read(step.source)) * read(step.other))
        case Add():
            write(step.target, read(step.source) + read(step.other))


def activate(name: str, x: Tensor) -> Tensor:
    """Compute an activation in torch."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return x
