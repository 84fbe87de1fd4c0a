"""What a checkpoint's files hold, compared with what its configuration describes.

The model is on the meta device or real; nothing here reads a tensor. Both sides must fit before
anything is allocated: a configuration may ask for any size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from spectool.checkpoint.headers import Layout, grouped
from spectool.errors import CheckpointError

# Bytes of tables that a model computes for itself, whatever its weights are.
_FREE_TABLES = 1 << 28

# Buffers that older versions of transformers stored and newer ones compute.
_COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|position_ids|masked_bias|(attn|attention)\.bias|rope\.freqs)$"
)


@contextlib.contextmanager
def bounded(layout: Layout) -> Iterator[None]:
    """While open, modules may register so many parameters as the files have room for.

    Raises:
        CheckpointError: there are more: the configuration is another model's, or damaged.
    """
    # Experts may be stored together and built one by one; small models have few tensors.
    most, found = 500 + 10 * len(layout.tensors), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal found
        found += parameter is not None
        if found > most:
            raise CheckpointError(
                f"{layout.path}: config.json describes more than {most} parameters, but the files "
                f"hold {len(layout.tensors)} tensors"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_missing(model: PreTrainedModel, layout: Layout, missing: Sequence[str]) -> None:
    """Raises: CheckpointError: tensors of the architecture are in no file."""
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
    """Raises: CheckpointError: a tensor has another shape than the architecture's."""
    if tuple(stored) != tuple(wanted):
        raise CheckpointError(
            f"{layout.path}: {name} is {list(stored)}, but the configuration says {list(wanted)}"
        )


def check_kind(layout: Layout, name: str, stored: Sequence[str], wanted: Tensor) -> None:
    """Raises: CheckpointError: whole numbers are stored where the architecture has weights.

    transformers takes them for weights as they are, without the scales that they need.
    """
    if not isinstance(wanted, nn.Parameter) or not wanted.is_floating_point():
        return
    whole = next((each for each in stored if not each.startswith(("F", "BF"))), None)
    if whole is not None:
        raise CheckpointError(
            f"{layout.path}: {name} is stored as {whole}, expected floating-point weights",
            hint="give the checkpoint that it was quantized from",
        )


def check_tables(model: PreTrainedModel, layout: Layout) -> None:
    """Raises: CheckpointError: the model would compute tables far larger than its weights."""
    own = {name: _size(tensor) for name, tensor in model.named_buffers()}
    computed = {name: size for name, size in own.items() if name not in layout.tensors}
    if sum(computed.values()) > _FREE_TABLES + layout.num_bytes:
        name = max(computed, key=lambda each: computed[each])
        raise CheckpointError(
            f"{layout.path}: config.json asks for tables of {sum(computed.values()) / 1e9:.1f} GB "
            f"({name}), the weights are {layout.num_bytes / 1e9:.1f} GB"
        )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def left_over(model: Any, stored: Iterable[str], taken: Iterable[str]) -> list[str]:
    """The stored tensors that no module takes, but those that every reader drops.

    These are what the architecture itself says to ignore, and buffers that it computes.
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


def unused_line(names: Sequence[str], model: str) -> str:
    """What a run says of stored tensors that it does not use."""
    one = len(names) == 1
    return (
        f"{len(names)} stored tensor{' has' if one else 's have'} no place in {model} and "
        f"{'is' if one else 'are'} not used: {grouped(names)}"
    )
