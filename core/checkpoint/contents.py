"""Comparison of the tensors in a checkpoint's files with those its configuration describes.

The model is on the meta device or real; nothing here reads a tensor. Checked before anything is
allocated, since a damaged configuration may ask for any size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from spectool.checkpoint.headers import Layout
from spectool.errors import CheckpointError

# Bytes of computed buffers (tables of positions, masks) allowed to any model, however small.
_FREE_TABLES = 1 << 28

# Buffers that older versions of transformers stored and newer ones compute.
_COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|position_ids|masked_bias|(attn|attention)\.bias|rope\.freqs)$"
)


@contextlib.contextmanager
def limit_parameters(layout: Layout) -> Iterator[None]:
    """Raise a CheckpointError if modules register more parameters than the files may hold.

    The configuration is another model's then, or damaged.
    """
    # 10 per tensor: experts may be stored fused and built one by one. 500: for models of few.
    limit, registered = 500 + 10 * len(layout.tensors), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        registered += parameter is not None
        if registered > limit:
            raise CheckpointError(
                f"{layout.path}: config.json describes more than {limit} parameters, but the files "
                f"hold {len(layout.tensors)} tensors"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_missing(model: PreTrainedModel, layout: Layout, missing: Sequence[str]) -> None:
    """Raise a CheckpointError if tensors of the architecture are in no file."""
    if not missing:
        return
    other = [
        name
        for name in layout.config.get("architectures") or ()
        if isinstance(name, str) and name != type(model).__name__
    ]
    raise CheckpointError(
        f"{layout.path}: tensors of {type(model).__name__} are in no file: {len(missing)}, the "
        f"first {missing[0]}",
        hint=f"config.json calls it a {other[0]}, which is no causal language model"
        if other and not other[0].endswith(("ForCausalLM", "LMHeadModel"))
        else None,
    )


def check_shape(layout: Layout, name: str, stored: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise a CheckpointError if a tensor is not stored in the architecture's shape."""
    if tuple(stored) != tuple(wanted):
        raise CheckpointError(
            f"{layout.path}: {name} is {list(stored)}, but the configuration says {list(wanted)}"
        )


def check_kind(layout: Layout, name: str, stored: Sequence[str], wanted: Tensor) -> None:
    """Raise a CheckpointError if floating-point weights are stored in integer dtypes."""
    if not isinstance(wanted, nn.Parameter) or not wanted.is_floating_point():
        return
    integer = next((dtype for dtype in stored if not dtype.startswith(("F", "BF"))), None)
    if integer is not None:
        # transformers would load them as weights, without the scales that belong to them.
        raise CheckpointError(
            f"{layout.path}: {name} is stored as {integer}, expected floating-point weights",
            hint="give the checkpoint that it was quantized from",
        )


def check_tables(model: PreTrainedModel, layout: Layout) -> None:
    """Raise a CheckpointError if the model computes buffers far larger than its weights."""
    sizes = {name: tensor.nbytes for name, tensor in model.named_buffers()}
    computed = {name: size for name, size in sizes.items() if name not in layout.tensors}
    if sum(computed.values()) > _FREE_TABLES + layout.num_bytes:
        name = max(computed, key=lambda buffer: computed[buffer])
        raise CheckpointError(
            f"{layout.path}: config.json asks for tables of {sum(computed.values()) / 1e9:.1f} GB "
            f"({name}), the weights are {layout.num_bytes / 1e9:.1f} GB"
        )


def find_unused(model: Any, stored: Iterable[str], taken: Iterable[str]) -> list[str]:
    """List the stored tensors that no module takes.

    Tensors that the architecture says to ignore, and buffers that it computes, are left out.
    """
    patterns = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    computed = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    computed -= {name.rpartition(".")[2] for name in model.state_dict()}
    return [
        name
        for name in sorted(set(stored) - set(taken))
        if not (
            _COMPUTED.search(name)
            or name.rpartition(".")[2] in computed
            or any(pattern.search(name) for pattern in patterns)
        )
    ]
