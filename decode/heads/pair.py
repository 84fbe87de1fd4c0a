"""Reading of heads that were trained for a draft model and its target together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.checkpoint.headers import HEADS_FILE
from spectool.decode.heads.artifact import (
    HeadsRecord,
    check_fit,
    lineage,
    read_record,
    read_weights,
)
from spectool.decode.target.base import Target
from spectool.errors import CheckpointError, UsageError


def read_pair_record(
    path: Path,
    method: str,
    draft: Target[Any],
    target: Target[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    allow_other_target: bool,
) -> HeadsRecord:
    """Read the record of a head directory of this method, and check that it is for the pair.

    `allow_other_target` accepts a head that was trained for other checkpoints of the same shape.

    Raises:
        CheckpointError: it is damaged, or was trained for another draft model or target.
        UsageError: the directory holds heads of another method.
    """
    record = read_record(path)
    if record.method != method:
        raise UsageError(
            f"{path}: holds {record.method} heads, no {method} head", hint=f"--draft {path}"
        )
    check_fit(path, record, target, tokenizer, allow_other_target=allow_other_target)
    wanted: Any = record.target.get("draft_model")
    wanted = wanted if isinstance(wanted, dict) else {}
    if wanted.get("hidden_size") != draft.width:
        raise CheckpointError(
            f"{path}: its head is for a draft model of width {wanted.get('hidden_size')}, this one "
            f"has {draft.width}"
        )
    checkpoint = draft.checkpoint
    if (
        not allow_other_target
        and checkpoint is not None
        and wanted.get("lineage") != lineage(checkpoint)
    ):
        raise CheckpointError(
            f"{path}: its head was trained for another draft model than {checkpoint.path}",
            hint="--allow-other-target uses it anyway",
        )
    return record


def load_pair_head(
    head: nn.Module, path: Path, record: HeadsRecord, device: torch.device, *, checksums: bool
) -> None:
    """Load the weights of a head directory into a head, in float32 on a device.

    Raises:
        CheckpointError: the weights are damaged, hold NaN, or do not fit the head.
    """
    tensors = read_weights(path, record, check=checksums)
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise CheckpointError(f"{path / HEADS_FILE}: its tensors are not those of its options")
    head.load_state_dict(tensors)
    head.to(device, torch.float32).eval()
