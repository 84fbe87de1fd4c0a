"""The parts of a decoder layer of the standard shape, and its steps in C (`kernels/steps.py`).

A layer of the standard shape has norms, matrices of attention and of an MLP, gated or not, and an
activation. They are found by the names that families give them. What they compute is found by
trying them, not by their classes.

Suffixes: n outputs, m inputs, D hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectool import families
from spectool.kernels.steps import (
    ACTIVATIONS,
    Activate,
    Add,
    Attend,
    Gate,
    Layer,
    Matrix,
    Norm,
    Products,
    Rotate,
    Step,
    Store,
    View,
    activate,
)
from spectool.model.kernels import KernelLinear, ProductLinear

# Names that families give to the parts of a layer; of matrices that are joined in some of them, all
# on one line.
_INPUTS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
_OUT = ("o_proj", "out_proj", "dense", "c_proj")
_GATED = (("gate_proj", "up_proj"), ("gate_up_proj",))
_PLAIN = (("fc1",), ("c_fc",), ("dense_h_to_4h",), ("up_proj",))
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_ACTIVATION = ("act_fn", "activation_fn", "act")
# Norms in the order of a layer. The third is after attention where the fourth is there, else before
# the MLP.
_FIRST = ("input_layernorm", "self_attn_layer_norm", "ln_1")
_SECOND = ("post_attention_layernorm", "final_layer_norm", "ln_2")
_THIRD, _FOURTH = ("pre_feedforward_layernorm",), ("post_feedforward_layernorm",)
# Words in keys of configurations that bound numbers inside of a layer, which random states may not
# reach (seen in transformers 5.23: OLMo, GPT-OSS). The lm_head's cap does not matter, and there is
# a step for that of scores (Gemma 2).
_BOUNDS, _LM_HEAD = ("softcap", "clip", "clamp", "limit"), "final_logit"
_CAP = "attn_logit_softcapping"
_EPSILON = ("variance_epsilon", "eps", "epsilon")


class UnknownLayerError(Exception):
    """A layer is not of the standard shape; the message says why."""


@dataclass(frozen=True, slots=True)
class Norms:
    """The norms of a layer by their place; None where there is none."""

    before_attention: nn.Module | None
    after_attention: nn.Module | None
    before_mlp: nn.Module | None
    after_mlp: nn.Module | None


@dataclass(frozen=True, slots=True)
class Mlp:
    """An MLP: its first matrices, one of them if they are joined, the last one, the activation."""

    inputs: Sequence[nn.Module]
    out: nn.Module
    activation: str
    is_gated: bool


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a layer. `inputs`: the matrices of queries, keys and values, or a joined one.

    `head_norms` are those of queries and of keys. Without `mlp` the layer's MLP, `mlp_module`,
    keeps its modules, for example those of experts.
    """

    attention: nn.Module
    inputs: Sequence[nn.Module]
    out: nn.Module
    num_heads: int
    num_key_heads: int
    head_width: int
    scaling: float
    cap: float | None
    head_norms: tuple[nn.Module, nn.Module] | None
    norms: Norms
    mlp: Mlp | None
    mlp_module: nn.Module


@dataclass(frozen=True, slots=True)
class Guess:
    """Facts about a layer that its parts do not tell.

    `parallel`: attention and the MLP read the same hidden states. `norms_last`: norms come after
    residuals. `rotary`: positions turn queries and keys; `in_pairs`: they turn neighbours.
    `by_head`: a joined matrix holds the query, key and value of a head side by side.
    """

    parallel: bool
    norms_last: bool
    rotary: bool
    in_pairs: bool
    by_head: bool


def find_parts(layer: nn.Module) -> Parts:
    """Find the parts of a layer.

    Raises:
        UnknownLayerError: it has other parts.
    """
    attention: Any = _child(layer, families.ATTENTION)
    if attention is None:
        raise UnknownLayerError("no attention under a known name")
    for key, value in _settings(attention).items():
        if key == _CAP and hasattr(attention, _CAP):
            continue
        if any(word in key for word in _BOUNDS) and _LM_HEAD not in key and value is not None:
            raise UnknownLayerError(f"{key} bounds numbers inside")
    inputs, out = _children(attention, _INPUTS), _child(attention, _OUT)
    if inputs is None or out is None:
        raise UnknownLayerError("no matrices of attention under known names")
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    sizes = [_size(each) for each in inputs]
    if not isinstance(width, int) or any(size % width for size in sizes):
        raise UnknownLayerError("heads of unknown width")
    num_heads = _size(out, of_inputs=True) // width
    num_key_heads = sizes[1] // width if len(sizes) > 1 else (sizes[0] // width - num_heads) // 2
    if num_key_heads < 1 or num_heads % num_key_heads:
        raise UnknownLayerError("heads of unknown number")
    head_norms = [_child(attention, (name,)) for name in ("q_norm", "k_norm")]
    scaling = getattr(attention, "scaling", None)
    norms = _find_norms(layer)
    holder = _child(layer, families.MLP) or layer
    mlp = _find_mlp(holder)
    if mlp is None and (holder is layer or norms.before_mlp is None or norms.after_mlp is not None):
        raise UnknownLayerError("no MLP under a known name")
    parts = Parts(
        attention=attention,
        inputs=inputs,
        out=out,
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        head_width=width,
        scaling=float(scaling) if isinstance(scaling, float) else width**-0.5,
        cap=getattr(attention, _CAP, None),
        head_norms=None if None in head_norms else tuple(head_norms),  # type: ignore[arg-type]
        norms=norms,
        mlp=mlp,
        mlp_module=holder,
    )
    known = {id(each) for module in _modules(parts) for each in module.parameters()}
    if any(id(each) not in known for each in layer.parameters()):
        raise UnknownLayerError("parameters besides those of a standard layer")
    return parts


def _settings(module: Any) -> dict[str, Any]:
    config = getattr(module, "config", None)
    return {} if config is None else vars(config)


def _modules(parts: Parts) -> Iterator[nn.Module]:
    norms = parts.norms
    mlp = [*parts.mlp.inputs, parts.mlp.out] if parts.mlp else [parts.mlp_module]
    found = [*parts.inputs, parts.out, *(parts.head_norms or ()), *mlp]
    found += [norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp]
    return (each for each in found if each is not None)


def _child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((module._modules[name] for name in names if module._modules.get(name)), None)


def _children(module: nn.Module, names: Sequence[Sequence[str]]) -> list[nn.Module] | None:
    """Return the children of the first list of names that are all there."""
    for each in names:
        found = [child for name in each if (child := module._modules.get(name)) is not None]
        if len(found) == len(each):
            return found
    return None


def _find_norms(layer: nn.Module) -> Norms:
    first, second, third, fourth = (
        _child(layer, names) for names in (_FIRST, _SECOND, _THIRD, _FOURTH)
    )
    if fourth is None:
        return Norms(first, None, second, None)
    return Norms(first, second, third, fourth)


def _find_mlp(holder: Any) -> Mlp | None:
    gated = _children(holder, _GATED)
    inputs = gated or _children(holder, _PLAIN)
    out = _child(holder, _DOWN)
    functions = [getattr(holder, name) for name in _ACTIVATION if hasattr(holder, name)]
    if inputs is None or out is None or not functions:
        return None
    activation = _name_activation(functions[0])
    if activation is None:
        raise UnknownLayerError("an activation that there is no step for")
    return Mlp(inputs, out, activation, gated is not None)


@torch.no_grad()
def _name_activation(function: Any) -> str | None:
    """Name what an activation computes; None if there is no step for it."""
    far = torch.tensor([10.5, 30.0, 1e2, 1e3, 1e4])
    x = torch.cat([torch.linspace(-9, 9, 1001), far, -far])
    for name in ACTIVATIONS:
        if torch.allclose(function(x), activate(name, x), rtol=1e-6, atol=1e-6):
            return name
    return None


def _size(matrix: Any, *, of_inputs: bool = False) -> int:
    """Return the number of outputs of a matrix, or of its inputs."""
    if isinstance(matrix, Conv1D):
        return int(matrix.nx if of_inputs else matrix.nf)
    size = getattr(matrix, "in_features" if of_inputs else "out_features", None)
    if not isinstance(size, int):
        raise UnknownLayerError(f"a matrix of class {type(matrix).__name__}")
    return size


def make_guesses(parts: Parts, *, rotary: bool) -> list[Guess]:
    """Return what may be true of a layer, the most frequent first; `rotary`: it is given positions.

    A layer may ignore the positions that it is given.
    """
    norms = parts.norms
    # Norms of both sides of attention and of the MLP leave one order.
    is_free = norms.after_attention is None and parts.mlp is not None
    orders = [(False, False), (True, False), (False, True)] if is_free else [(False, False)]
    is_joined = len(parts.inputs) == 1 and parts.num_heads == parts.num_key_heads
    layouts = (False, True) if is_joined else (False,)
    turns = [(True, False), (True, True), (False, False)] if rotary else [(False, False)]
    return [
        Guess(parallel, last, *turn, by_head)
        for by_head, turn, (parallel, last) in itertools.product(layouts, turns, orders)
    ]


class _Program:
    """The steps of a layer, as they are added."""

    def __init__(self, parts: Parts, guess: Guess, dtype: torch.dtype) -> None:
        self.parts, self.guess, self.dtype = parts, guess, dtype
        self.steps: list[Step] = []
        self.widths = [_size(parts.out)]

    def buffer(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def all_of(self, buffer: int) -> View:
        return View(buffer, self.widths[buffer])

    def norm(self, module: nn.Module | None, source: View, target: View) -> None:
        if module is not None:
            self.steps.append(_make_norm(module, source, target))

    def multiply(self, source: int, modules: Sequence[nn.Module]) -> list[int]:
        targets = [self.buffer(_size(module)) for module in modules]
        pairs = zip(targets, modules, strict=True)
        matrices = [_make_matrix(module, target, self.dtype) for target, module in pairs]
        self.steps.append(Products(source, matrices))
        return targets

    def add(self, buffer: int) -> None:
        hidden = self.all_of(0)
        self.steps.append(Add(hidden, self.all_of(buffer), hidden))


def make_layer(parts: Parts, guess: Guess, dtype: torch.dtype) -> Layer:
    """Make the steps of a layer; up to the MLP, if that keeps its modules.

    Raises:
        UnknownLayerError: a part that there is no step for.
    """
    program, norms = _Program(parts, guess, dtype), parts.norms
    hidden = program.all_of(0)
    states = hidden
    if norms.before_attention is not None and not guess.norms_last:
        states = program.all_of(program.buffer(hidden.width))
        program.norm(norms.before_attention, hidden, states)
    attended = _add_attention(program, states.buffer)
    program.norm(norms.after_attention, program.all_of(attended), program.all_of(attended))
    if not guess.parallel:
        program.add(attended)
    if guess.norms_last:
        program.norm(norms.before_attention, hidden, hidden)
    if parts.mlp is not None:
        if norms.before_mlp is not None and not guess.norms_last:
            states = states if states.buffer else program.all_of(program.buffer(hidden.width))
            program.norm(norms.before_mlp, hidden, states)
        elif not guess.parallel:
            states = hidden
        mixed = _add_mlp(program, states.buffer, parts.mlp)
        program.norm(norms.after_mlp, program.all_of(mixed), program.all_of(mixed))
        if guess.parallel:
            program.add(attended)
        program.add(mixed)
        if guess.norms_last:
            program.norm(norms.before_mlp, hidden, hidden)
    return Layer(program.steps, program.widths, dtype)


def _add_attention(program: _Program, source: int) -> int:
    """Add the steps of attention; return the buffer of their result."""
    parts, guess = program.parts, program.guess
    width, heads, key_heads = parts.head_width, parts.num_heads, parts.num_key_heads
    buffers = program.multiply(source, parts.inputs)
    if len(buffers) > 1:
        queries = View(buffers[0], width, heads, width)
        keys, values = (View(buffer, width, key_heads, width) for buffer in buffers[1:])
    elif guess.by_head:
        queries, keys, values = (
            View(buffers[0], width, heads, 3 * width, column) for column in (0, width, 2 * width)
        )
    else:
        queries, keys, values = (
            View(buffers[0], width, count, width, column * width)
            for count, column in ((heads, 0), (key_heads, heads), (key_heads, heads + key_heads))
        )
    for module, view in zip(parts.head_norms or (), (queries, keys), strict=False):
        program.norm(module, view, view)
    if guess.rotary:
        program.steps += [Rotate(view, guess.in_pairs) for view in (queries, keys)]
    seen = program.buffer(heads * width)
    program.steps += [Store(keys, values), Attend(queries, keys, seen, parts.scaling, parts.cap)]
    return program.multiply(seen, [parts.out])[0]


def _add_mlp(program: _Program, source: int, mlp: Mlp) -> int:
    """Add the steps of an MLP; return the buffer of their result."""
    buffers = program.multiply(source, mlp.inputs)
    first = program.all_of(buffers[0])
    if mlp.is_gated:
        if len(buffers) > 1:
            gate, up = first, program.all_of(buffers[1])
        else:
            half = first.width // 2
            gate, up = View(first.buffer, half), View(first.buffer, half, column=half)
        inner = program.all_of(program.buffer(gate.width))
        program.steps.append(Gate(gate, up, inner, mlp.activation))
    else:
        inner = first
        program.steps.append(Activate(first, inner, mlp.activation))
    return program.multiply(inner.buffer, [mlp.out])[0]


def _make_matrix(module: Any, target: int, dtype: torch.dtype) -> Matrix:
    held = getattr(module, "bias", None)
    bias = None if held is None else held.detach().float().contiguous()
    if isinstance(module, ProductLinear):
        return Matrix(target, module.product, bias)
    if type(module) in (nn.Linear, KernelLinear):
        weight_nm: Tensor = module.weight.detach()
    elif type(module) is Conv1D:
        # In memory by outputs from now on; its shape, and what it computes, stay.
        if not module.weight.t().is_contiguous():
            # So that it can be trained later.
            with torch.inference_mode(False):
                module.weight.data = module.weight.data.t().contiguous().t()
        weight_nm = module.weight.detach().t()
    else:
        raise UnknownLayerError(f"a matrix of class {type(module).__name__}")
    # A parameter that several processes share has no memory of its own.
    if type(module.weight) is not nn.Parameter:
        raise UnknownLayerError("a matrix in parts")
    if weight_nm.dtype is not dtype or not weight_nm.is_contiguous():
        raise UnknownLayerError("a matrix of another dtype or layout")
    return Matrix(target, weight_nm, bias)


@torch.no_grad()
def _make_norm(module: Any, source: View, target: View) -> Norm:
    """Make the step of a norm, by what it computes of random numbers.

    Raises:
        UnknownLayerError: neither of the two norms.
    """
    epsilon = next((found for name in _EPSILON if (found := getattr(module, name, None))), None)
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    shape = () if weight is None else weight.shape
    if shape and shape[0] == source.heads * source.width and source.stride in (0, source.width):
        # One norm over all heads.
        source, target = (
            View(view.buffer, shape[0], column=view.column) for view in (source, target)
        )
    if epsilon is None or shape not in ((), (source.width,)):
        raise UnknownLayerError(f"a norm of class {type(module).__name__}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, source.width, generator=generator) + 0.5
    bias = None if bias is None else bias.detach().float()
    plain = None if weight is None else weight.detach().float()
    for kind in ("rms", "layer"):
        for factor in (plain,) if plain is None else (plain, 1 + plain):
            centered = x - x.mean(-1, keepdim=True) if kind == "layer" else x
            expected = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + epsilon)
            expected = expected if factor is None else expected * factor
            expected = expected if bias is None else expected + bias
            if torch.allclose(_call_float(module, x), expected, rtol=1e-4, atol=1e-5):
                held = None if factor is None else factor.contiguous()
                return Norm(kind, source, target, held, bias, float(epsilon))
    raise UnknownLayerError(f"a norm of class {type(module).__name__}")


def _call_float(module: Any, x: Tensor) -> Tensor:
    """Call a norm with its parameters in float32."""
    values = {name: value.detach().float() for name, value in module.named_parameters()}
    found: Tensor = torch.func.functional_call(module, values, (x,))
    return found
