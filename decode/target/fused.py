"""Decoder layers that run as one call in C instead of module by module (`kernels/steps.py`).

A layer's parts are found by name (`layer_parts.py`). Its steps are used only if they compute what
the layer's own forward computes, of random states, with the masks, positions and cache of a pass of
the model. Other layers keep their modules, and so do passes that a hook inside of a layer listens
to.

Suffixes: B batch, N nodes, D hidden width.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.decode.cache import StoreLayer
from spectool.decode.kv.base import Columns
from spectool.decode.kv.dense import DenseStore
from spectool.decode.target.layer_parts import (
    Guess,
    Parts,
    UnknownLayerError,
    find_parts,
    make_guesses,
    make_layer,
)
from spectool.kernels import build, registry
from spectool.kernels.products import TYPES, PackedProduct
from spectool.kernels.steps import MOST_ROTARY, Layer, Products, Rows
from spectool.model.experts import RowProducts, are_chosen

# Arguments of a layer's forward: names of the cache, and the others that may be given.
_CACHES = ("past_key_values", "layer_past", "cache", "past_key_value")
_READ = frozenset(
    (
        *("hidden_states", "attention_mask", "position_embeddings"),
        # Of these steps need to know nothing.
        *("position_ids", "use_cache", "cache_position"),
    )
)
# Largest difference of an output from the modules', by its size: of sums in float32 in another
# order; of values that round to the next of 16 bits, to the next bfloat16 (0.006 to 0.012 in
# codestory-10M), or to the next of 8 bits as well (to 0.02).
_TOLERANCE, _INT16_TOLERANCE, _BFLOAT16_TOLERANCE, _INT8_TOLERANCE = 1e-5, 1e-4, 1.5e-2, 2.5e-2
# What angles of positions are multiplied by in the comparison, and what is added to positions.
_FAR, _LATER = 37.7, 1 << 17
# Rows of a pass that is compared with one of a single row.
_MANY = 64

# The arguments of a layer's call in a pass.
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Inside:
    """The modules inside of a layer, as they were: their parameters, without hooks, not skipped."""

    def __init__(self, layer: nn.Module) -> None:
        modules = [module for module in layer.modules() if module is not layer]
        self._hooks = [
            hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._attributes = [each.__dict__ for each in modules]
        self._holders = [each._modules for each in layer.modules() if each._modules]
        self._children = self._list_children()
        named = [(module._parameters, name) for module in modules for name in module._parameters]
        self._places, self._names = [place for place, _ in named], [name for _, name in named]
        self._values = self._read()
        self._parameters = [each for each in self._values if each is not None]
        # Tensors made under inference mode cannot be changed outside of it, and count nothing.
        self._counting = [each for each in self._parameters if not each.is_inference()]
        self._versions = [each._version for each in self._counting]
        self._addresses = [each.data_ptr() for each in self._parameters]

    def _read(self) -> list[Any]:
        return list(map(dict.get, self._places, self._names))

    def _list_children(self) -> list[tuple[Any, ...]]:
        return [tuple(each.values()) for each in self._holders]

    def is_changed(self) -> bool:
        """Whether anything is not as it was. It is asked for at each layer of each pass."""
        if any(self._hooks) or any("forward" in each for each in self._attributes):
            return True
        return (
            not all(map(operator.is_, self._read(), self._values))
            or [each._version for each in self._counting] != self._versions
            or [each.data_ptr() for each in self._parameters] != self._addresses
            or self._list_children() != self._children
        )


@dataclass(frozen=True, slots=True)
class Rest:
    """The norm and the MLP of a layer that keeps them as modules, for example experts.

    `rows_are_independent`: a token's sum does not depend on the other tokens, as far as was seen.
    """

    norm: nn.Module
    mlp: nn.Module
    rows_are_independent: bool = False

    def add(self, residual_BND: Tensor) -> Tensor:
        """Return the states before the norm plus what the MLP makes of them, row by row."""
        with RowProducts():
            return self.add_by_modules(residual_BND)

    def add_by_modules(self, residual_BND: Tensor) -> Tensor:
        """Return the same with torch's products, as the layer's own forward computes it."""
        added: Any = self.mlp(self.norm(residual_BND))
        return residual_BND + (added if isinstance(added, Tensor) else added[0])


@dataclass(frozen=True, slots=True)
class Fused:
    """A layer that runs in C. `names` are the positional arguments of its forward.

    `rest`: the norm and the MLP that follow by modules.
    """

    program: Layer
    index: int
    num_key_heads: int
    head_width: int
    names: Sequence[str]
    inside: _Inside
    rest: Rest | None
    returns_tuple: bool

    def run(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run the layer; return None where only its modules can."""
        given = dict(zip(self.names, args, strict=False)) | options
        cache = None
        for name, value in given.items():
            if name in _CACHES:
                cache = value if cache is None else cache
            elif value is not None and value is not False and name not in _READ:
                return None
        states_BND, mask = given["hidden_states"], given.get("attention_mask")
        if (
            cache is None
            or mask is None
            or mask.ndim != 4
            or mask.shape[1] != 1
            or not mask.is_floating_point()
            or states_BND.dtype is not self.program.dtype
            or self.inside.is_changed()
        ):
            return None
        stored = cache.layers[self.index]
        if not isinstance(stored, StoreLayer) or not isinstance(stored.store, DenseStore):
            return None
        rows = _share(mask, given.get("position_embeddings"), stored.columns)
        if rows.shape != states_BND.shape[:2]:
            return None
        shape = len(states_BND), self.num_key_heads, self.head_width
        keys, values = stored.make_room(shape, states_BND.dtype)
        found_BND = self.program(states_BND, rows, keys, values)
        if self.rest is not None:
            found_BND = self.rest.add(found_BND)
        return (found_BND,) if self.returns_tuple else found_BND


class _Pass(threading.local):
    """Inputs that layers of a pass share, by mask and positions. The columns tell passes apart."""

    columns: Columns | None = None
    shared: list[tuple[Tensor, Any, Rows]]


_pass = _Pass()


def _share(mask_B1NS: Tensor, turns: Any, columns: Columns) -> Rows:
    """Return what C reads of a mask and of rotary positions."""
    if _pass.columns is not columns:
        _pass.columns, _pass.shared = columns, []
    for known_mask, known_turns, rows in _pass.shared:
        if known_mask is mask_B1NS and known_turns is turns:
            return rows
    cosine = sine = None
    if turns is not None:
        cosine, sine = (part.float().expand(len(mask_B1NS), -1, -1) for part in turns)
    hidden = torch.finfo(mask_B1NS.dtype).min
    starts_B = torch.tensor(columns.starts)
    rows = Rows(mask_B1NS[:, 0].float(), hidden, starts_B, cosine, sine)
    _pass.shared.append((mask_B1NS, turns, rows))
    return rows


@functools.cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Make a class of layers that run in C where kernels are in force."""

    class FusedLayer(kind):  # type: ignore[misc, valid-type]
        fused: Fused | None = None

        def forward(self, *args: Any, **options: Any) -> Any:
            is_open = registry.in_force() and not (torch.is_grad_enabled() or self.training)
            if self.fused is not None and is_open:
                found = self.fused.run(args, options)
                if found is not None:
                    return found
            return super().forward(*args, **options)

        def __reduce_ex__(self, protocol: Any) -> Any:
            # A copy is a layer of the own class, which opening it fuses again.
            state = {key: value for key, value in self.__dict__.items() if key != "fused"}
            return object.__new__, (kind,), state

    # Messages, and what transformers looks up by name, keep the layer's own.
    FusedLayer.__name__, FusedLayer.__qualname__ = kind.__name__, kind.__qualname__
    FusedLayer.__module__ = kind.__module__
    return FusedLayer


def release_layers(layers: Sequence[nn.Module]) -> None:
    """Let layers run by their modules again."""
    for layer in layers:
        if "fused" in layer.__dict__:
            del layer.fused
            layer.__class__ = type(layer).__mro__[1]


def fuse_layers(
    layers: Sequence[nn.Module], model: PreTrainedModel, probe: Callable[[], Any]
) -> dict[str, int]:
    """Let layers of a model run in C, those that can; return how many cannot, by reason.

    `probe` runs a pass of the whole model.
    """
    release_layers(layers)
    dtype, devices = model.dtype, {model.device.type}
    # Of a model that is loaded block by block, some parameters are elsewhere.
    devices |= {each.device.type for layer in layers for each in layer.parameters()}
    if devices != {"cpu"} or dtype not in TYPES:
        where = " and ".join(sorted(devices))
        return {f"no kernel in {str(dtype)[6:]} on {where}": len(layers)}
    if (missing := build.missing()) is not None:
        return {missing: len(layers)}
    reasons: Counter[str] = Counter()
    found: dict[nn.Module, Parts] = {}
    for layer in layers:
        try:
            found[layer] = find_parts(layer)
        except UnknownLayerError as error:
            reasons[str(error)] += 1
    if found:
        calls = _record_calls(list(found), probe)
        right: Guess | None = None
        for layer, parts in found.items():
            try:
                if layer not in calls:
                    raise UnknownLayerError("a pass does not reach it")
                right = _fuse(layer, parts, calls[layer], dtype, right)
            except UnknownLayerError as error:
                reasons[str(error)] += 1
    return dict(reasons)


class _EndedError(Exception):
    """A pass was ended on purpose."""


@contextmanager
def end_after(layer: nn.Module) -> Iterator[None]:
    """End the pass within the context after this layer; what follows, the lm_head, does not run."""

    def end(*given: Any) -> None:
        raise _EndedError

    with suppress(_EndedError), layer.register_forward_hook(end):
        yield


def _record_calls(layers: Sequence[nn.Module], probe: Callable[[], Any]) -> dict[nn.Module, _Call]:
    """Return the arguments that layers are called with in a pass."""
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls[module] = args, options

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        probe()
    return calls


@torch.inference_mode()
def _fuse(
    layer: nn.Module, parts: Parts, call: _Call, dtype: torch.dtype, right: Guess | None
) -> Guess:
    """Let a layer run in C if some steps compute what it computes; return the right guess.

    `right` was right for the layer before: where sums are rounded, others might pass too.

    Raises:
        UnknownLayerError: none of the guesses is right, or a part has no step.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    args, options = call
    given = dict(zip(names, args, strict=False)) | options
    states_BND: Tensor | None = given.get("hidden_states")
    if states_BND is None:
        raise UnknownLayerError("a forward with other arguments")
    turns = given.get("position_embeddings")
    if turns is not None and not all(isinstance(each, Tensor) and each.ndim == 3 for each in turns):
        raise UnknownLayerError("positions of another form")
    if turns is not None and (turns[0].shape[-1] > MOST_ROTARY or turns[0].shape[-1] % 2):
        raise UnknownLayerError(f"{turns[0].shape[-1]} elements of a head are turned")
    attention: Any = parts.attention
    index = getattr(attention, "layer_idx", None)
    if not isinstance(index, int):
        raise UnknownLayerError("attention that does not know its layer")
    generator = torch.Generator().manual_seed(0)
    # Small, so that what attention and the MLP add is most of the output.
    small_BND = torch.randn(states_BND.shape, generator=generator) / 64
    given["hidden_states"] = small_BND.to(dtype)
    if turns is not None:
        # Angles of far positions, so that all elements turn.
        angles = torch.atan2(turns[1].float(), turns[0].float()) * _FAR
        given["position_embeddings"] = angles.cos().to(turns[0]), angles.sin().to(turns[1])
    expected_BND, residual_BND, returns_tuple = _call_modules(layer, parts, given)
    rest = _check_rest(layer, parts, given, expected_BND, residual_BND, dtype)
    compared_BND = expected_BND if residual_BND is None else residual_BND
    best: tuple[float, Guess, Fused] | None = None
    guesses = make_guesses(parts, rotary=turns is not None)
    # Stable: the right one of the layer before comes first.
    for guess in sorted(guesses, key=lambda each: each != right):
        program = make_layer(parts, guess, dtype)
        fused = Fused(
            program=program,
            index=index,
            num_key_heads=parts.num_key_heads,
            head_width=parts.head_width,
            names=names,
            inside=_Inside(layer),
            rest=None,
            returns_tuple=returns_tuple,
        )
        found = fused.run((), given)
        if found is None:
            raise UnknownLayerError("arguments that steps do not know")
        difference = _compare(found[0] if returns_tuple else found, compared_BND)
        if difference <= _tolerance(program) and (best is None or difference < best[0]):
            best = difference, guess, fused
            if guess == right and dtype is torch.float32:
                break
    if best is None:
        raise UnknownLayerError("its steps do not compute what its modules do")
    layer.fused = replace(best[2], rest=rest)  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = _fused_class(kind)
    return best[1]


def _call_modules(
    layer: nn.Module, parts: Parts, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None, bool]:
    """Return a layer's output, the states before its MLP if that keeps its modules, and whether the
    output is the first of a tuple."""
    passed: list[Tensor] = []
    with ExitStack() as hooks:
        if parts.mlp is None:
            norm: Any = parts.norms.before_mlp
            hook = norm.register_forward_pre_hook(lambda module, given: passed.append(given[0]))
            hooks.enter_context(hook)
        output: Any = type(layer).forward(layer, **given)
    is_tensor = isinstance(output, Tensor)
    return output if is_tensor else output[0], passed[0] if passed else None, not is_tensor


def _check_rest(
    layer: nn.Module,
    parts: Parts,
    given: dict[str, Any],
    expected_BND: Tensor,
    residual_BND: Tensor | None,
    dtype: torch.dtype,
) -> Rest | None:
    """Check what steps do not compute: that positions matter only as they turn, and the sum with an
    MLP that keeps its modules, which is returned.

    Raises:
        UnknownLayerError: the layer computes something else.
    """
    positions = given.get("position_ids")
    if positions is not None:
        later = given | {"position_ids": positions + _LATER}
        if _compare(_call_modules(layer, parts, later)[0], expected_BND) > 0:
            raise UnknownLayerError("positions that do more than turn")
    if residual_BND is None:
        return None
    assert parts.norms.before_mlp is not None
    rest = Rest(parts.norms.before_mlp, parts.mlp_module)
    tolerance = _TOLERANCE if dtype is torch.float32 else _INT8_TOLERANCE
    if _compare(rest.add_by_modules(residual_BND), expected_BND) > tolerance:
        raise UnknownLayerError("more than a sum with its MLP")
    # Compared by rows only: sums in another order may let a router choose other experts where two
    # are almost equal, as after upcycling.
    total_BND = rest.add(residual_BND)
    rows = residual_BND.flatten(0, 1)[:, None, None]
    alone = torch.cat([rest.add(row_11D) for row_11D in rows])
    # So many rows choose the same experts.
    many = rest.add(rows[0].expand(1, _MANY, -1))
    same = torch.equal(alone.view_as(total_BND), total_BND)
    same = same and torch.equal(many, alone[:1].expand_as(many))
    return replace(rest, rows_are_independent=same and are_chosen(parts.mlp_module))


def _compare(found_BND: Tensor, expected_BND: Tensor) -> float:
    """Return the size of the difference, by that of what is expected."""
    expected = expected_BND.float()
    return float((found_BND.float() - expected).norm() / expected.norm())


def _tolerance(program: Layer) -> float:
    matrices = (
        matrix for step in program.steps if isinstance(step, Products) for matrix in step.matrices
    )
    weights = (matrix.weight for matrix in matrices)
    precisions = {each.precision for each in weights if isinstance(each, PackedProduct)}
    if "int8" in precisions:
        return _INT8_TOLERANCE
    if program.dtype is torch.float32:
        return _INT16_TOLERANCE if "int16" in precisions else _TOLERANCE
    return _BFLOAT16_TOLERANCE
