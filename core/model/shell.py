"""The model around the blocks, whose own forward runs everything outside them.

First it records the arguments that each block is called with (masks, positions), at the end it
turns hidden states into logits. Nothing is written per architecture.

Shapes: B sequences of a batch, L tokens of each, D width, V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectool.checkpoint.headers import TensorEntry
from spectool.checkpoint.tensors import read_rows
from spectool.errors import UnsupportedError
from spectool.families import LOGITS_CAP, LOGITS_FACTORS, family
from spectool.model.architecture import Architecture
from spectool.model.packed import EmbeddingRows, PackedEmbedding, PackedLinear

# What models raise if their blocks return something else than they expect.
_BUILTIN_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError)


class _NotWalkable(ValueError):
    """A property of a model that block-by-block execution cannot handle, described by the text."""


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of a block's call besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockProbe(nn.Module):
    """Stand-in for a block: records its call and returns its input, or `override` if set.

    `extra_outputs`: values returned in a tuple after the hidden states; None: hidden states alone.
    `used_names`: of the block's tensors and methods that the model uses from outside.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not registered as a child: models ask their blocks for attributes such as attention_type.
        object.__setattr__(self, "block", block)
        self.call: Call | None = None
        self.hidden: Tensor | None = None
        self.override: Tensor | None = None
        self.extra_outputs: tuple[Any, ...] | None = None
        self.num_calls = 0
        self.used_names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            block = object.__getattribute__(self, "block")
            return getattr(_BlockView(block, self.used_names), name)

    def forward(self, hidden_BLD: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if hidden_BLD is None:
            raise _NotWalkable("its blocks are called with something else than hidden states first")
        self.hidden, self.call = hidden_BLD, Call(args, kwargs)
        self.num_calls += 1
        passed = hidden_BLD if self.override is None else self.override
        return passed if self.extra_outputs is None else (passed, *self.extra_outputs)


class _BlockView:
    """View of a module's attributes, and of those of modules inside, for the module's parent.

    Uses of tensors and methods are recorded in `used_names`: the blocks that run are copies, so the
    parent must neither change its blocks nor compute with their weights.
    """

    def __init__(self, module: nn.Module, used_names: set[str]) -> None:
        self._module, self._used_names = module, used_names

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return _BlockView(value, self._used_names)
        if isinstance(value, Tensor) or callable(value):
            self._used_names.add(name)
        return value


class StoredRows(EmbeddingRows):
    """Embedding that reads the rows of a batch from a file: a table may be larger than a block.

    `zeroed`: a row that counts as zeros, or None.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        entry: TensorEntry,
        dtype: torch.dtype,
        device: torch.device,
        zeroed: int | None,
    ) -> None:
        super().__init__(embedding, device)
        self.entry, self.dtype, self.zeroed = entry, dtype, zeroed

    def rows(self, ids_N: Tensor) -> Tensor:
        rows_ND = read_rows(self.entry, ids_N.tolist()).to(ids_N.device, self.dtype)
        if self.zeroed is not None:
            rows_ND[ids_N == self.zeroed] = 0
        return rows_ND


class ModelShell:
    """Embeddings, final norm and optionally lm_head of a checkpoint, with probes as its blocks.

    `table`: a packed embedding that replaces the stored one.

    Raises:
        UnsupportedError: the model does more between its blocks than pass hidden states on.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dtype: torch.dtype,
        device: torch.device,
        with_lm_head: bool,
        table: PackedLinear | None = None,
    ) -> None:
        self.architecture, self.device, self.with_lm_head = architecture, device, with_lm_head
        self._calls: dict[tuple[int, int], list[Call]] = {}
        meta: Any = architecture.model
        rows = f"{_name_of(meta, meta.get_input_embeddings())}.weight"
        lm_head = _name_of(meta, meta.get_output_embeddings())
        origin = architecture.origins.get(rows)
        by_rows = (
            origin is not None
            and origin.converter is None
            and not (with_lm_head and f"{lm_head}.weight" not in architecture.origins)
        )
        tensors: dict[str, Tensor] = {}
        for name in architecture.outer_tensors():
            if name == rows and (by_rows or table is not None):
                continue
            if not (
                _is_inside(name, architecture.decoder_name)
                or (with_lm_head and _is_of_lm_head(name, lm_head, architecture.decoder_name))
            ):
                continue
            # Cast one by one: only one tensor at a time is in memory in both dtypes.
            tensors |= architecture.cast(architecture.read([name]), dtype)
        model: Any = architecture.build_module("", tensors, dtype=dtype, device=device)
        if table is not None:
            packed = PackedEmbedding(model.get_input_embeddings(), table.to(device), dtype)
            model.set_input_embeddings(packed)
        elif by_rows:
            assert origin is not None
            entry = architecture.layout.tensors[origin.stored[0][0]]
            plain, zeroed = model.get_input_embeddings(), architecture.zeroed_rows.get(rows)
            model.set_input_embeddings(StoredRows(plain, entry, dtype, device, zeroed))
        self.probes = [BlockProbe(model.get_submodule(block)) for block in architecture.blocks]
        for block, probe in zip(architecture.blocks, self.probes, strict=True):
            parent, _, leaf = block.rpartition(".")
            setattr(model.get_submodule(parent), leaf, probe)
        self.model = model
        self._probe()

    def _probe(self) -> None:
        """Determine what the model expects its blocks to return; check that it can be walked."""
        name, reason = type(self.model).__name__, ""
        for length in (None, 0, 1, 2, 3):
            try:
                self._try(None if length is None else (None,) * length)
                break
            except _NotWalkable as error:
                reason = reason or str(error)
            except torch.OutOfMemoryError:
                raise
            except _BUILTIN_ERRORS:
                # The model expects another return: a tuple, a longer one, or no tuple.
                continue
        else:
            reason = reason or "its blocks return other things than hidden states, alone or first"
            raise UnsupportedError(f"{name}: cannot be walked block by block: {reason}")
        used = sorted(set().union(*(probe.used_names for probe in self.probes)))
        if used:
            raise UnsupportedError(
                f"{name}: uses {', '.join(used)} of its blocks from outside; it cannot be "
                "walked block by block"
            )
        extra = self.probes[0].extra_outputs
        if extra:
            # Unique objects show whether the model passes the other values on to later blocks.
            marks = tuple(object() for _ in extra)
            try:
                self._try(marks)
                passed = any(mark in _parts(probe.call) for probe in self.probes for mark in marks)
            except _BUILTIN_ERRORS:
                passed = True
            if passed:
                raise UnsupportedError(
                    f"{name}: its blocks pass on more than hidden states; it cannot be walked "
                    "block by block"
                )
            for probe in self.probes:
                probe.extra_outputs = extra

    def _try(self, extra: tuple[Any, ...] | None) -> None:
        """Run two tokens through the probes, which return `extra` after the hidden states.

        Raises _NotWalkable if hidden states are not [B, L, D] or change between blocks, or blocks
        are run more than once.
        """
        for probe in self.probes:
            probe.extra_outputs, probe.hidden, probe.num_calls = extra, None, 0
        ids_BL = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        if self.with_lm_head and self._forward(ids_BL).ndim != 3:
            raise _NotWalkable("logits do not have three dimensions")
        if not self.with_lm_head:
            self.embed(ids_BL)
        first = self.probes[0].hidden
        if first is None or first.ndim != 3 or first.shape[:2] != (1, 2):
            raise _NotWalkable("hidden states have more dimensions than batch, length and width")
        for probe in self.probes:
            if probe.num_calls > 1:
                raise _NotWalkable("blocks are run more than once")
            if probe.hidden is None or not _equal(probe.hidden, first):
                raise _NotWalkable("hidden states are changed between the blocks")

    @torch.inference_mode()
    def _forward(self, ids_BL: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_BL, use_cache=False).logits
        return logits

    # Not inference mode: quantizers differentiate through blocks called with the masks and
    # positions recorded here, and autograd cannot save inference tensors.
    @torch.no_grad()
    def embed(self, ids_BL: Tensor) -> Tensor:
        """Compute the first block's input [B, L, D] for these tokens."""
        decoder = self.model.get_submodule(self.architecture.decoder_name)
        decoder(input_ids=ids_BL.to(self.device), use_cache=False)
        hidden_BLD = self.probes[0].hidden
        assert hidden_BLD is not None
        return hidden_BLD

    def calls(self, batch: int, length: int) -> list[Call]:
        """Record each block's call for `batch` sequences of `length` tokens without padding.

        Raises:
            UnsupportedError: the arguments depend on the tokens.
        """
        if (batch, length) not in self._calls:
            recorded = []
            # Two different texts: their calls must be equal.
            for token in (0, 1):
                ids_BL = torch.full((batch, length), token, device=self.device)
                self.embed(ids_BL)
                recorded.append([probe.call for probe in self.probes if probe.call is not None])
            for first, second in zip(*recorded, strict=True):
                if not _equal((first.args, first.kwargs), (second.args, second.kwargs)):
                    raise UnsupportedError(
                        f"{type(self.model).__name__}: its blocks take inputs that depend on the "
                        "text besides hidden states; it cannot be walked block by block"
                    )
            self._calls[batch, length] = recorded[0]
        return self._calls[batch, length]

    @torch.inference_mode()
    def logits(self, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Compute logits [B, L, V] of the last block's output with the model's norm and lm_head."""
        self.probes[-1].override = hidden_BLD
        try:
            return self._forward(ids_BL.to(self.device))
        finally:
            self.probes[-1].override = None

    def lm_head_inputs(self, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Compute the lm_head's input [B, L, D] of the last block's output."""
        output: nn.Module = self.model.get_output_embeddings()
        handle = output.register_forward_pre_hook(_stop)
        try:
            self.logits(ids_BL, hidden_BLD)
        except _Reached as reached:
            return reached.states_BLD
        finally:
            handle.remove()
        raise AssertionError("the forward does not use the lm_head")


class _Reached(Exception):
    """Ends a forward at the lm_head and carries the lm_head's input."""

    def __init__(self, states_BLD: Tensor) -> None:
        self.states_BLD = states_BLD


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


def final_logits(config: Any) -> Callable[[Tensor], Tensor]:
    """Return the function that turns an lm_head's products into the model's logits, in float32.

    Some families scale the products, or cap them by tanh (`families.py`).
    """
    text = config.get_text_config(decoder=True)
    scale = getattr(text, "logits_scaling", None) or 1
    scale = scale if family(text).logits_scaling == "multiplies" else 1 / scale
    scale *= math.prod(getattr(text, key, None) or 1 for key in LOGITS_FACTORS)
    cap = getattr(text, LOGITS_CAP, None)
    if scale == 1 and cap is None:
        return Tensor.float

    def finish(products: Tensor) -> Tensor:
        scaled = products.float()
        if scale != 1:
            scaled = scaled * scale
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    return finish


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _is_of_lm_head(name: str, lm_head: str, decoder: str) -> bool:
    """Whether a tensor outside the decoder is needed for logits.

    True for the lm_head and for modules outside the decoder's top-level module, which also contains
    the vision towers.
    """
    return bool(lm_head) and (
        _is_inside(name, lm_head) or name.partition(".")[0] != decoder.partition(".")[0]
    )


def _parts(call: Call | None) -> list[Any]:
    """List the arguments of a block's call except tensors, with tuples and lists flattened."""
    parts: list[Any] = []
    waiting: list[Any] = [] if call is None else [*call.args, *call.kwargs.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting += value
        elif not isinstance(value, Tensor):
            parts.append(value)
    return parts


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    """Find a module's name in the model; empty if it is not part of it."""
    return next((name for name, part in model.named_modules() if part is module), "")


def _equal(first: Any, second: Any) -> bool:
    """Compare tensors, nested in tuples, lists and dictionaries; other values count as equal."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    return True
