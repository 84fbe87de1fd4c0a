"""Base of the formats of draft heads: a description, and weights under our names."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.decode.heads.artifact import check_map, fill
from spectool.decode.heads.base import Heads
from spectool.errors import CheckpointError

WEIGHTS = "model.safetensors"
# Ends the hints about heads that a format cannot hold.
UNSERVED = "`spectool generate --draft` runs them as they are"

# `config.json` and the tensors of a directory in one of the formats.
Written = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of one head method.

    `write(heads, tensors, model, target)` returns config and tensors, where `target` is the
    target's name or path. `serve(model, out, num_heads)` returns the servers' command lines.
    """

    method: str
    write: Callable[[Heads, Mapping[str, Tensor], PreTrainedModel, str], Written]
    serve: Callable[[str, str, int], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedHeads:
    """Weights to start training from, under our names.

    `embedding` and `lm_head` are the target's embedding and lm_head if they were stored with the
    heads; `tokenizer` is the digest of its tokenizer.
    """

    path: Path
    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    embedding: Tensor | None = None
    lm_head: Tensor | None = None
    tokenizer: str | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the weights file."""
        name = HEADS_FILE if (self.path / HEADS).exists() else WEIGHTS
        with (self.path / name).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def token_map(self) -> Tensor | None:
        return self.tensors.get("token_map")

    def fill(self, heads: Heads) -> None:
        """Load these weights into new heads.

        Raises:
            CheckpointError: shapes differ, or the heads were made for another embedding or lm_head
                than the target's.
        """
        fill(heads, self.tensors, self.path)
        if self.embedding is not None:
            device, vocab = heads.frozen.weight_VD.device, heads.frozen.output.out_features
            every_V = torch.arange(vocab, device=device)
            self._compare("embedding", self.embedding, heads.frozen.embed(every_V))
        if self.lm_head is not None:
            self._compare("lm_head", self.lm_head, heads.frozen.weight_VD)

    def _compare(self, what: str, stored: Tensor, actual: Tensor) -> None:
        """Check that a stored matrix is the target's, up to rounding of its dtype."""
        rounding = 2 * torch.finfo(stored.dtype).eps
        if stored.shape != actual.shape or not torch.allclose(
            stored.to(actual).float(), actual.float(), rtol=rounding, atol=0
        ):
            raise CheckpointError(f"{self.path}: its {what} is not the target's")


def sort_token_map(
    path: Path, tensors: dict[str, Tensor], lm_heads: list[str], vocab: int
) -> Tensor:
    """Sort `token_map`, and the rows of these lm_heads with it, by token id; return the order.

    Raises:
        CheckpointError: it does not hold distinct ids of the target's vocabulary, one per row.
    """
    ids = tensors["token_map"]
    check_map(path, ids, vocab)
    for name in lm_heads:
        if len(tensors[name]) != len(ids):
            raise CheckpointError(
                f"{path}: {name} has {len(tensors[name])} rows, and {len(ids)} tokens are guessed"
            )
    tensors["token_map"], order = ids.sort()
    for name in lm_heads:
        tensors[name] = tensors[name][order]
    return order


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the floating-point tensors' one dtype."""
    dtypes = {str(t.dtype) for t in tensors.values() if t.is_floating_point()}
    return dtypes.pop().removeprefix("torch.")


def vllm_command(method: str, model: str, out: str, num_tokens: int) -> str:
    """Return the command line by which vLLM serves `model` with the heads in `out`."""
    config = {"method": method, "model": out, "num_speculative_tokens": num_tokens}
    return shlex.join(["vllm", "serve", model, "--speculative-config", json.dumps(config)])
