"""Weight matrices inside a module: which can be packed, and why others stay dense.

A packed matrix replaces a module that only computes `y = x W^T + b`. Three kinds of linear layers
stay dense: subclasses with another forward, layers whose weight other modules compute with, and
routers of experts, where a small error sends a token to another expert.

Shapes: n outputs, m inputs; B, L, M, N of a trial input and weight.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import linecache
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Last part of the name of a router or of a shared expert's gate; other gates match as well.
_GATE = re.compile(r"(.*_)?(gate|gating|wg)")

# Attributes of a weight that can be read without computing with it.
_METADATA = frozenset({"dtype", "device", "is_cuda"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight matrix that a quantizer may pack.

    `name`: the module's, or `<parameter>.<expert>` for a slice of a fused expert tensor.
    `parameter`: the name of the tensor that holds the matrix. `shape`: (outputs, inputs), also if
    it is stored `transposed`. `tied`: the name of the lm_head that shares an embedding's weight.
    """

    name: str
    parameter: str
    kind: Literal["linear", "conv1d", "expert", "embedding", "lm_head"]
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    tied: str | None = None

    @property
    def num_weights(self) -> int:
        """Number of the matrix's elements."""
        return self.shape[0] * self.shape[1]

    def weight_nm(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the matrix [n, m] from the block's tensors, as a view."""
        weight = tensors[self.parameter]
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self.transposed else weight


def find_matrices(
    block: nn.Module, prefix: str, around: tuple[nn.Module, ...] = ()
) -> Iterator[Matrix]:
    """Yield the packable matrices inside the module of name `prefix`.

    `around`: the modules that contain it.
    """
    dense = explain_dense(block, prefix, around)
    for path, module in block.named_modules(prefix=prefix):
        if path in dense:
            continue
        if isinstance(module, nn.Linear):
            n, m = module.weight.shape
            yield Matrix(name=path, parameter=f"{path}.weight", kind="linear", shape=(n, m))
        elif isinstance(module, Conv1D):
            m, n = module.weight.shape
            yield Matrix(
                name=path, parameter=f"{path}.weight", kind="conv1d", shape=(n, m), transposed=True
            )
        elif hasattr(module, "is_transposed"):
            # The attribute is set by transformers' decorator of fused experts.
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim != 3:
                    continue
                num_experts, n, m = weight.shape
                if module.is_transposed:
                    n, m = m, n
                for expert in range(num_experts):
                    yield Matrix(
                        name=f"{path}.{key}.{expert}",
                        parameter=f"{path}.{key}",
                        kind="expert",
                        shape=(n, m),
                        transposed=bool(module.is_transposed),
                        expert=expert,
                    )


def explain_dense(
    block: nn.Module, prefix: str, around: tuple[nn.Module, ...] = ()
) -> dict[str, str]:
    """Return the reason for each linear layer, and each router of any class, that is not packed.

    Names are full names, `prefix` that of `block`; `around`: the modules that contain it.
    """
    read = {
        f"{path}.{name}"
        for path, module in block.named_modules(prefix=prefix)
        for of_self, name in _weights_read_by(module)
        if of_self
    }
    # Modules around the block refer to blocks by a loop variable: only the name's end is known.
    ends = tuple(f".{name}" for part in around for _, name in _weights_read_by(part))
    experts = _find_experts(block)
    reasons = {}
    for path, module in block.named_modules(prefix=prefix):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        outputs = module.nf if isinstance(module, Conv1D) else len(weight)
        # First, so that a router of any class is named as a router.
        if _is_router(path.removeprefix(prefix).strip("."), outputs, experts):
            reasons[path] = "chooses or weighs experts"
        elif not isinstance(module, (nn.Linear, Conv1D)):
            continue
        elif not computes_product(_kind(module)):
            reasons[path] = f"{type(module).__name__} is no plain linear layer"
        elif path in read or path.endswith(ends):
            reasons[path] = "its weight is used outside its forward"
    return reasons


def _kind(module: nn.Module) -> Any:
    """Return the module's class, as Any: type checkers consider it unhashable."""
    return type(module)


def _is_router(path: str, outputs: int, experts: Mapping[str, int]) -> bool:
    """Whether a layer routes tokens to experts, weighs a shared expert, or is part of a router.

    `path` is the layer's name in the block; `experts` is the result of `_find_experts`.
    """
    if "router" in path:
        return True
    if not experts or any(path.startswith(f"{name}.") for name in experts):
        return False
    most = max(experts.values())
    # A gate with about as many outputs as experts: some more are for experts that do nothing.
    if _GATE.fullmatch(path.rpartition(".")[2]) and outputs <= 2 * most:
        return True
    # Next to the experts: in a gate, or with one output for each expert (1 for a shared expert).
    # The number of outputs alone does not suffice: keys and values may have as many.
    for name, num_experts in experts.items():
        around = name.rpartition(".")[0]
        if around and not path.startswith(f"{around}."):
            continue
        sibling, _, inner = path.removeprefix(f"{around}.").partition(".")
        if _GATE.fullmatch(sibling) if inner else outputs in (1, num_experts):
            return True
    return False


def _find_experts(block: nn.Module) -> dict[str, int]:
    """Return the number of experts by the name of the module in the block that holds them."""
    numbers: dict[str, int] = {}
    for path, module in block.named_modules():
        if hasattr(module, "is_transposed"):
            fused = [len(w) for w in module.parameters(recurse=False) if w.ndim == 3]
            numbers |= {path: max(fused)} if fused else {}
        elif isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2]:
            numbers[path] = len(module)
    return numbers


@functools.cache
def computes_product(kind: type[nn.Module]) -> bool:
    """Whether layers of this class compute only `y = x W^T + b`, decided by a trial run."""
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    generator = torch.Generator().manual_seed(0)
    x_BLM = 50 * torch.randn(2, 3, 5, generator=generator)
    weight_NM = torch.randn(7, 5, generator=generator)
    bias_N = torch.randn(7, generator=generator)
    layer: Any = nn.Linear(5, 7) if issubclass(kind, nn.Linear) else Conv1D(7, 5)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(weight_NM if issubclass(kind, nn.Linear) else weight_NM.T)
        layer.bias.copy_(bias_N)
        tried = copy.copy(layer)
        # Only the class changes: the arguments of its constructor are unknown.
        tried.__class__ = kind
        try:
            y_BLN = tried.eval()(x_BLM)
            expected_BLN = F.linear(x_BLM, weight_NM, bias_N)
            return isinstance(y_BLN, Tensor) and torch.allclose(y_BLN, expected_BLN, atol=1e-3)
        except Exception:
            # The forward needs more than a weight and a bias, so it computes more than a product.
            return False


def _weights_read_by(module: nn.Module) -> set[tuple[bool, str]]:
    """Return the paths of modules whose weight this module's methods compute with.

    Each with whether the path starts at the module itself. Read from the source code, since a plan
    cannot run a module of any size.
    """
    # Without branches that this module never takes: state-space models pass the whole mixer to
    # fused kernels in training, Bloom slices its weights to imitate tensor-parallel training.
    return {
        (of_self, path)
        for of_self, path, branches in _find_reads(_kind(module))
        if not any(_is_constant(branch, module, not branch.taken) for branch in branches)
    }


@dataclass(frozen=True, slots=True)
class Branch:
    """A condition around a read in the source of a Python module.

    `source`: the Python module's name. `taken`: whether the read is in the branch where the
    condition holds.
    """

    condition: CodeType
    source: str
    taken: bool


def _is_constant(branch: Branch, module: nn.Module, value: bool) -> bool:
    """Whether a condition has this value in every call of the module."""
    try:
        result = eval(branch.condition, vars(sys.modules[branch.source]), {"self": module})
        return bool(result) is value
    except Exception:
        # The condition depends on arguments of the call.
        return False


@functools.cache
def _find_reads(kind: type[nn.Module]) -> frozenset[tuple[bool, str, tuple[Branch, ...]]]:
    """Collect the reads of weights in a class and its bases; see `_WeightReads`."""
    reads: set[tuple[bool, str, tuple[Branch, ...]]] = set()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch" or base in (object, PreTrainedModel):
            continue
        reader = _WeightReads(base.__module__)
        try:
            reader.visit(_parse_classes(inspect.getfile(base))[base.__qualname__])
        except (OSError, TypeError, SyntaxError, KeyError):
            # A class without a source, as one made at run time.
            continue
        reads |= reader.reads
    return frozenset(reads)


@functools.cache
def _parse_classes(file: str) -> dict[str, ast.ClassDef]:
    """Parse the classes of a Python file by qualified name.

    `inspect.getsource` parses the whole file for each class, a second for a family of models.
    """
    found: dict[str, ast.ClassDef] = {}

    def collect(parent: ast.AST, prefix: str) -> None:
        for node in ast.iter_child_nodes(parent):
            inside = prefix
            if isinstance(node, ast.ClassDef):
                found.setdefault(prefix + node.name, node)
                inside = f"{prefix}{node.name}."
            elif isinstance(node, ast.FunctionDef):
                inside = f"{prefix}{node.name}.<locals>."
            collect(node, inside)

    collect(ast.parse("".join(linecache.getlines(file))), "")
    return found


class _WeightReads(ast.NodeVisitor):
    """Collector of `x.a.b.weight` in computations: (whether x is self, `a.b`, the branches)."""

    def __init__(self, source: str) -> None:
        self.reads: set[tuple[bool, str, tuple[Branch, ...]]] = set()
        self._source, self._branches = source, list[Branch]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not node.name.startswith(("__init__", "_init_", "reset_")):
            self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        condition = compile(ast.Expression(node.test), "<condition>", "eval")
        for branch, taken in ((node.body, True), (node.orelse, False)):
            self._branches.append(Branch(condition, self._source, taken))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
            self._branches.pop()

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _METADATA:
            return
        parts: list[str] = []
        inner: ast.expr = node.value
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if node.attr == "weight" and parts and isinstance(inner, ast.Name):
            self.reads.add((inner.id == "self", ".".join(parts), tuple(self._branches)))
        self.generic_visit(node)


def saved_bytes(model: PreTrainedModel, matrices: Iterable[Matrix], tokens: int) -> int:
    """Estimate the bytes that a block's forward pass over `tokens` saves for the backward pass.

    Per product about three tensors of its input's and its output's size, one of them a gradient
    (measured with Llama: 1.9 without it), and the attention scores where they are materialised.
    """
    text: Any = model.config.get_text_config()
    rows = 0
    for matrix in matrices:
        share = 1.0
        if matrix.expert is not None:
            total = model.get_parameter(matrix.parameter).shape[0]
            share = min(1.0, getattr(text, "num_experts_per_tok", total) / total)
        rows += int(share * sum(matrix.shape))
    heads = getattr(text, "num_attention_heads", 0)
    return 4 * tokens * 3 * (rows + heads * tokens)
