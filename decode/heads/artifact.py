"""Directories of trained heads: read them, and check that they fit a target.

A heads directory holds `heads.safetensors` and `spectool_heads.json`: method, options, the target
with its lineage, accuracies, tree, training record. It records neither times nor paths, so equal
inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import methods
from spectool.checkpoint import checksums as sums
from spectool.checkpoint.foreign import check_heads
from spectool.checkpoint.formats import FORMAT_VERSION, upgrade_heads
from spectool.checkpoint.headers import HEADS, HEADS_FILE, read_json
from spectool.checkpoint.tensors import Checkpoint, check_finite, read_tensors
from spectool.decode.heads.base import TOP, Heads
from spectool.decode.policy.fastest import read_fastest
from spectool.decode.protocol import Drafter
from spectool.decode.target.base import Target
from spectool.errors import CheckpointError
from spectool.files import json_bytes
from spectool.model import loading


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsRecord:
    """Content of `spectool_heads.json`.

    `target`: `lineage` (fingerprint of the dense checkpoint), `fingerprint` (of the checkpoint
    trained on), `hidden_size`, `vocab_size`, `tokenizer` (digest). `accuracy`: how often each
    head's first guess is right on held-out text; `conditional`: the same where all earlier heads
    were right. `tree`: paths of ranks, best first; `shares`: the fraction of held-out text that
    follows each. `checksums`: of the weights, by file. Older records have no `conditional` and no
    `checksums`.
    """

    method: str
    options: dict[str, Any]
    target: dict[str, Any]
    accuracy: list[float]
    tree: list[list[int]]
    shares: list[float]
    training: dict[str, Any]
    conditional: list[float] = field(default_factory=list)
    files: list[str] = field(default_factory=lambda: sorted([HEADS, HEADS_FILE]))
    checksums: dict[str, dict[str, str]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def as_bytes(self) -> bytes:
        return json_bytes(asdict(self))

    @property
    def fingerprint(self) -> str:
        """Return `sha256:...` of the record, which has the checksums of the weights."""
        return f"sha256:{hashlib.sha256(self.as_bytes()).hexdigest()}"

    @property
    def paths(self) -> list[tuple[tuple[int, ...], float]]:
        """Return the tree's paths of ranks, best first, each with its share."""
        return [(tuple(path), share) for path, share in zip(self.tree, self.shares, strict=True)]


def read_record(path: Path) -> HeadsRecord:
    """Read the record of a heads directory.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    check_heads(path)
    found = read_json(path / HEADS)
    version = found.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: the heads have format {version}, this spectool reads up to {FORMAT_VERSION}",
            hint="install a newer spectool",
        )
    try:
        record = HeadsRecord(**upgrade_heads(found))
        valid = (
            isinstance(record.method, str)
            and all(isinstance(part, dict) for part in (record.options, record.target))
            and len(record.tree) == len(record.shares)
            and _is_tree(record.tree)
        )
    except TypeError:
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: {HEADS} is not the record of draft heads")
    return record


def _is_tree(paths: list[list[int]]) -> bool:
    """Return whether these are distinct paths of ranks below `TOP`, parents first."""
    seen: set[tuple[int, ...]] = {()}
    for path in paths:
        node = tuple(path)
        if not node or node in seen or node[:-1] not in seen or not 0 <= node[-1] < TOP:
            return False
        seen.add(node)
    return True


def open_heads(
    path: Path,
    options: str,
    *,
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool,
    checksums: bool = True,
) -> Drafter:
    """Load the drafter of a heads directory, on the target's device and in its dtype.

    `options`: drafter options as `key=value,key=value`. Options that are not given come from what
    `tune` found for this model and machine, else from the defaults. With `checksums` the weights
    are compared with their checksums.

    Raises:
        CheckpointError: it is damaged, or its heads were trained for another width, vocabulary,
            tokenizer or lineage.
    """
    record = read_record(path)
    check_fit(path, record, target, tokenizer, allow_other_target=allow_other_target)
    drafter: Any = methods.import_method(record.method, "drafter")
    tensors = read_weights(path, record, check=checksums)
    note = f"{path}: {sums.NO_CHECKSUMS}"
    if not record.checksums and note not in target.notes:
        target.notes.append(note)
    token_map = tensors.get("token_map")
    if token_map is not None:
        check_map(path / HEADS_FILE, token_map, target.vocab_size)
        if not (token_map.diff() > 0).all():
            raise CheckpointError(f"{path / HEADS_FILE}: its token_map does not ascend")
    heads: Heads = drafter.Heads(
        drafter.Heads.Config.from_dict(record.options),
        target.model,
        None if token_map is None else token_map.to(target.device),
    )
    fill(heads, tensors, path / HEADS_FILE)
    heads.to(target.device, target.dtype)
    defaults = read_fastest(record.fingerprint, target) or ""
    # Of a key that stands twice the later value holds, so given options win.
    config = drafter.Config.from_text(f"{defaults},{options}")
    built: Drafter = drafter(heads, record.paths, config)
    return built


def read_weights(path: Path, record: HeadsRecord, *, check: bool = True) -> dict[str, Tensor]:
    """Read all tensors of a heads directory.

    Raises:
        CheckpointError: the file is damaged, or with `check` its checksum differs.
    """
    stored = sums.parse(record.checksums, path / HEADS) if check else {}
    return read_finite_tensors(path / HEADS_FILE, sums.make_guard(path / HEADS_FILE, stored))


def read_finite_tensors(file: Path, guard: sums.Guard | None = None) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is damaged, or values are NaN or infinite.
    """
    tensors = read_tensors(file, guard=guard)
    for name, tensor in tensors.items():
        check_finite(f"{file}: {name}", tensor)
    return tensors


def check_map(path: Path, ids: Tensor, vocab: int) -> None:
    """Raise CheckpointError unless the ids of guessed tokens are distinct and below `vocab`."""
    whole = ids.ndim == 1 and not ids.is_floating_point() and ids.dtype != torch.bool
    if not whole or len(set(ids.tolist())) != len(ids) or not ((ids >= 0) & (ids < vocab)).all():
        raise CheckpointError(f"{path}: what it guesses are not distinct ids of {vocab} tokens")


def fill(heads: Heads, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights that were read from `path` into heads.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    check_weights(heads, tensors, path)
    heads.load_state_dict(tensors)


def check_weights(heads: Heads, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that weights read from `path` fit heads, which may be on the meta device.

    Adds a bias to the heads' lm_head, or removes it, as the weights have it.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    # Heads take the lm_head's bias from the model that they were trained on, and a fitted lm_head
    # may have a bias where the original has none, or the other way round.
    outputs = {heads.own_lm_head(k) for k in range(heads.num_heads)}
    for name, module in heads.named_modules():
        bias = tensors.get(f"{name}.bias")
        if module in outputs and (module.bias is None) != (bias is None):
            module.bias = None if bias is None else nn.Parameter(torch.empty_like(bias))
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != stored:
        name = sorted(wanted.items() ^ stored.items())[0][0]
        raise CheckpointError(
            f"{path}: {name} is {stored.get(name, 'absent')}, expected "
            f"{wanted.get(name, 'no such tensor')}"
        )
    for name, tensor in heads.state_dict().items():
        if tensor.is_floating_point() and not tensors[name].is_floating_point():
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: {name} is {kind}, expected floating-point weights")


def check_fit(
    path: Path,
    record: HeadsRecord,
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    allow_other_target: bool,
) -> None:
    """Check that heads were trained for this target or the checkpoint that it was packed from.

    Raises:
        CheckpointError: width, vocabulary, tokenizer or lineage differ.
    """
    recorded = record.target
    for key, actual in (("hidden_size", target.width), ("vocab_size", target.vocab_size)):
        if recorded.get(key) != actual:
            raise CheckpointError(
                f"{path}: its heads are for a target with {key} {recorded.get(key)}, this one has "
                f"{actual}"
            )
    if tokenizer is not None and recorded.get("tokenizer") != loading.hash_vocabulary(tokenizer):
        raise CheckpointError(f"{path}: its heads were trained with another tokenizer")
    if allow_other_target:
        return
    checkpoint = target.checkpoint
    if checkpoint is not None and recorded.get("lineage") != lineage(checkpoint):
        raise CheckpointError(
            f"{path}: its heads were trained for another checkpoint than {checkpoint.path} or "
            "the one it was made from",
            hint="--allow-other-target uses them anyway",
        )


def lineage(checkpoint: Checkpoint) -> str:
    """Return the fingerprint of the dense checkpoint that this one is, or was packed from."""
    if checkpoint.layout.is_packed:
        source = (checkpoint.layout.quantization or {}).get("source") or {}
        return str(source.get("fingerprint"))
    return checkpoint.fingerprint()
