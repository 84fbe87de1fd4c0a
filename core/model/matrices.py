"""The weight matrices inside a module: which of them can be packed, and why others stay dense.

A packed matrix takes the place of a module that does one thing, `y = x W^T + b`. Three kinds of
linear layers look like that and are not: subclasses with another forward, layers whose weight
somebody else multiplies with, and routers of experts, where a small error sends a token elsewhere.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# How the name of a router or of a shared expert's gate ends; gates of other kinds have it too.
_GATE = re.compile(r"(.*_)?(gate|gating|wg)")

# Asking for these of a weight is not computing with it.
_METADATA = frozenset({"dtype", "device", "is_cuda"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One weight matrix that a quantizer may pack.

    `name` is the module's, or `<parameter>.<expert>` for a slice of a fused expert tensor;
    `parameter` the tensor that holds it. `shape` is (outputs, inputs) however it is stored. An
    embedding may be `tied` to the output matrix of this name.
    """

    name: str
    parameter: str
    kind: Literal["linear", "conv1d", "expert", "embedding", "lm_head"]
    shape: tuple[int, int]
    transposed: bool
    expert: int | None = None
    tied: str | None = None

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def weight_nm(self, tensors: dict[str, Tensor]) -> Tensor:
        """The matrix [outputs, inputs] out of the block's tensors; a view where possible."""
        weight = tensors[self.parameter]
        if self.expert is not None:
            weight = weight[self.expert]
        return weight.T if self.transposed else weight


def find_matrices(
    block: nn.Module, prefix: str, around: tuple[nn.Module, ...] = ()
) -> Iterator[Matrix]:
    """The packable matrices inside a module whose full name is `prefix`.

    `around` are the modules that it lies in.
    """
    dense = explain_dense(block, prefix, around)
    for path, module in block.named_modules(prefix=prefix):
        if path in dense:
            continue
        if isinstance(module, nn.Linear):
            n, m = module.weight.shape
            yield Matrix(
                name=path, parameter=f"{path}.weight", kind="linear", shape=(n, m), transposed=False
            )
        elif isinstance(module, Conv1D):
            m, n = module.weight.shape
            yield Matrix(
                name=path, parameter=f"{path}.weight", kind="conv1d", shape=(n, m), transposed=True
            )
        elif hasattr(module, "is_transposed"):
            # transformers marks fused experts with its experts decorator.
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
    """Linear layers of a module, and routers of any class, that are not packed, by full name, with
    the reason."""
    read = {
        f"{path}.{name}"
        for path, module in block.named_modules(prefix=prefix)
        for own, name in _weights_read_by(module)
        if own
    }
    # Models around reach their blocks by a loop's variable: the end of the name tells.
    ends = tuple(f".{name}" for part in around for _, name in _weights_read_by(part))
    experts = _experts_in(block)
    found = {}
    for path, module in block.named_modules(prefix=prefix):
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        outputs = module.nf if isinstance(module, Conv1D) else len(weight)
        # A router of any class: its weight is named by what it does, not as something unknown.
        if _routes(path.removeprefix(prefix).strip("."), outputs, experts):
            found[path] = "chooses or weighs experts"
        elif not isinstance(module, (nn.Linear, Conv1D)):
            continue
        elif not computes_product(_kind(module)):
            found[path] = f"{type(module).__name__} is no plain linear layer"
        elif path in read or path.endswith(ends):
            found[path] = "its weight is used outside its forward"
    return found


def _kind(module: nn.Module) -> Any:
    """The module's class, which type checkers take to have no hash: that of its objects is none."""
    return type(module)


def _routes(path: str, outputs: int, experts: Mapping[str, int]) -> bool:
    """Whether a layer chooses experts or weighs a shared one, or is part of what does.

    It is named a router; or it is a gate of about as many outputs as there are experts; or it lies
    beside the experts, in a gate or with an output for each of them (one, for a shared expert).
    The number alone tells nothing: keys and values may be as wide as there are experts.
    """
    if "router" in path:
        return True
    if not experts or any(path.startswith(f"{each}.") for each in experts):
        return False
    most = max(experts.values())
    # A router may have some outputs more, for experts that do nothing.
    if _GATE.fullmatch(path.rpartition(".")[2]) and outputs <= 2 * most:
        return True
    for place, number in experts.items():
        around = place.rpartition(".")[0]
        if around and not path.startswith(f"{around}."):
            continue
        beside, _, inner = path.removeprefix(f"{around}.").partition(".")
        if _GATE.fullmatch(beside) if inner else outputs in (1, number):
            return True
    return False


def _experts_in(block: nn.Module) -> dict[str, int]:
    """Where in a module its experts lie, and how many they are."""
    found: dict[str, int] = {}
    for path, module in block.named_modules():
        if hasattr(module, "is_transposed"):
            fused = [len(w) for w in module.parameters(recurse=False) if w.ndim == 3]
            found |= {path: max(fused)} if fused else {}
        elif isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2]:
            found[path] = len(module)
    return found


@functools.cache
def computes_product(kind: type[nn.Module]) -> bool:
    """Whether layers of this class compute `y = x W^T + b` and nothing else, tried on numbers."""
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
        # The class alone: what its own initialisation would add is not known here.
        tried.__class__ = kind
        try:
            found = tried.eval()(x_BLM)
            wanted = F.linear(x_BLM, weight_NM, bias_N)
            return isinstance(found, Tensor) and torch.allclose(found, wanted, atol=1e-3)
        except Exception:
            # It needs more than a weight and a bias, so it does more than a product.
            return False


def _weights_read_by(module: nn.Module) -> set[tuple[bool, str]]:
    """Paths of modules whose weight this module's methods compute with, and whether below itself.

    Read from the source, as running a module of any size is not to be had for a plan. Branches that
    the module as it is does not take are left out: fused kernels of state-space models take the
    whole mixer in training, Bloom slices its weights to imitate a way of training.
    """
    return {
        (own, path)
        for own, path, guards in _reads_of(_kind(module))
        if not any(_is_settled(guard, module, not guard.taken) for guard in guards)
    }


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition in the source of a Python module, and whether what is read is where it holds."""

    condition: CodeType
    source: str
    taken: bool


def _is_settled(guard: Guard, module: nn.Module, value: bool) -> bool:
    """Whether a condition has this value whatever the module is called with."""
    try:
        found = eval(guard.condition, vars(sys.modules[guard.source]), {"self": module})
        return bool(found) is value
    except Exception:
        # It needs what only a call knows.
        return False


@functools.cache
def _reads_of(kind: type[nn.Module]) -> frozenset[tuple[bool, str, tuple[Guard, ...]]]:
    found: set[tuple[bool, str, tuple[Guard, ...]]] = set()
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] == "torch" or each in (object, PreTrainedModel):
            continue
        reader = _Reader(each.__module__)
        try:
            reader.visit(ast.parse(textwrap.dedent(inspect.getsource(each))))
        except (OSError, TypeError, SyntaxError):
            # A class without a source, made at run time say.
            continue
        found |= reader.found
    return frozenset(found)


class _Reader(ast.NodeVisitor):
    """Collects `a.b` of every `x.a.b.weight` that is computed with; x may be self."""

    def __init__(self, source: str) -> None:
        self.found: set[tuple[bool, str, tuple[Guard, ...]]] = set()
        self._source, self._guards = source, list[Guard]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not node.name.startswith(("__init__", "_init_", "reset_")):
            self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        condition = compile(ast.Expression(node.test), "<condition>", "eval")
        for branch, taken in ((node.body, True), (node.orelse, False)):
            self._guards.append(Guard(condition, self._source, taken))
            for part in branch if isinstance(branch, list) else [branch]:
                self.visit(part)
            self._guards.pop()

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
            self.found.add((inner.id == "self", ".".join(parts), tuple(self._guards)))
        self.generic_visit(node)
