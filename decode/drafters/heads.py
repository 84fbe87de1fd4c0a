"""What all trained drafters share: their directory, their fit to a target, and losses in chunks.

A heads directory holds `heads.safetensors` and `spectool_heads.json`: method, options, the target
with its lineage, accuracies, tree, training record. Neither times nor paths are in it, so equal
inputs give equal bytes.

Shapes: R rows, D width, V tokens that can be guessed, K heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import loading, methods
from spectool.checkpoint import Checkpoint, read_tensor
from spectool.decode.protocol import Drafter
from spectool.decode.target import Target
from spectool.errors import CheckpointError, UnsupportedError
from spectool.headers import HEADS, HEADS_FILE, read_header, read_json

FORMAT_VERSION = 1

# Guesses of a head that a tree may hold, and nodes that are kept of the best tree.
TOP = 10
MOST_NODES = 64
# The rank of a token that a head cannot guess at all.
NEVER = 1 << 30

# Logits of one chunk take at most about this much.
_CHUNK_BYTES = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsRecord:
    """What `spectool_heads.json` says.

    `target`: `lineage` (the fingerprint of the dense checkpoint), `fingerprint` (of the one trained
    on), `hidden_size`, `vocab_size`, `tokenizer`. `tree`: paths of ranks, best first, with the
    share of held-out text that follows each.
    """

    method: str
    options: dict[str, Any]
    target: dict[str, Any]
    accuracy: list[float]
    tree: list[list[int]]
    shares: list[float]
    training: dict[str, Any]
    files: list[str] = field(default_factory=lambda: sorted([HEADS, HEADS_FILE]))
    format_version: int = FORMAT_VERSION

    def as_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode()

    def expected(self, nodes: int) -> float:
        """Tokens a forward that the best tree of so many nodes brings on held-out text."""
        return 1 + sum(self.shares[:nodes])


def read_record(path: Path) -> HeadsRecord:
    """The record of a heads directory.

    Raises:
        CheckpointError: damaged, or of a newer format.
    """
    found = read_json(path / HEADS)
    version = found.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: the heads have format {version}, this spectool reads up to {FORMAT_VERSION}",
            hint="install a newer spectool",
        )
    try:
        record = HeadsRecord(**found)
        sound = (
            isinstance(record.method, str)
            and all(isinstance(part, dict) for part in (record.options, record.target))
            and len(record.tree) == len(record.shares)
            and _is_tree(record.tree)
        )
    except TypeError:
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: {HEADS} is not the record of draft heads")
    return record


def _is_tree(paths: list[list[int]]) -> bool:
    """Whether these are distinct paths of ranks that can be guessed, parents first."""
    seen: set[tuple[int, ...]] = {()}
    for path in paths:
        node = tuple(path)
        if not node or node in seen or node[:-1] not in seen or not 0 <= node[-1] < TOP:
            return False
        seen.add(node)
    return True


def open_heads(
    path: Path,
    config: Any,
    *,
    target: Target,
    tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool,
) -> Drafter:
    """The drafter in a heads directory, on the target's device and in its dtype.

    Raises:
        CheckpointError: damaged, or trained for another width, tokenizer or lineage.
    """
    record = read_record(path)
    check_fit(path, record, target, tokenizer, allow_other_target=allow_other_target)
    drafter: Any = methods.resolve(record.method, "drafter")
    entries = {entry.name: entry for entry in read_header(path / HEADS_FILE)[1]}
    tensors = {name: read_tensor(entry) for name, entry in entries.items()}
    token_map = tensors.get("token_map")
    heads: nn.Module = drafter.Heads(
        drafter.Heads.Config.from_dict(record.options),
        target.model.get_output_embeddings(),
        None if token_map is None else token_map.to(target.device),
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != stored:
        name = sorted(wanted.items() ^ stored.items())[0][0]
        raise CheckpointError(
            f"{path / HEADS_FILE}: {name} is {stored.get(name, 'absent')}, expected "
            f"{wanted.get(name, 'no such tensor')}"
        )
    heads.load_state_dict(tensors)
    heads.to(target.device, target.dtype)
    built: Drafter = drafter(heads, record.tree, config)
    return built


def check_fit(
    path: Path,
    record: HeadsRecord,
    target: Target,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    allow_other_target: bool,
) -> None:
    """Raises: CheckpointError: the heads were not trained for this model or an ancestor of it."""
    said = record.target
    for key, have in (("hidden_size", target.width), ("vocab_size", target.vocab_size)):
        if said.get(key) != have:
            raise CheckpointError(
                f"{path}: its heads are for a target with {key} {said.get(key)}, this one has "
                f"{have}"
            )
    if tokenizer is not None and said.get("tokenizer") != loading.tokenizer_digest(tokenizer):
        raise CheckpointError(f"{path}: its heads were trained with another tokenizer")
    if allow_other_target:
        return
    checkpoint = target.checkpoint
    if checkpoint is not None and said.get("lineage") != lineage(checkpoint):
        raise CheckpointError(
            f"{path}: its heads were trained for another checkpoint than {checkpoint.path} or "
            "what that was made from",
            hint="--allow-other-target runs them all the same; the output stays the target's",
        )


def lineage(checkpoint: Checkpoint) -> str:
    """The fingerprint of the dense checkpoint that this one is, or was packed from."""
    if checkpoint.layout.is_packed:
        source = (checkpoint.layout.quantization or {}).get("source") or {}
        return str(source.get("fingerprint"))
    return checkpoint.fingerprint()


def vocabulary_of(output: nn.Linear, token_map: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows [V, D] of the target's output matrix that heads guess with, and its bias.

    Raises:
        UnsupportedError: the output layer is no matrix that can be read.
    """
    if not isinstance(output, nn.Linear):
        raise UnsupportedError(f"heads need a dense output layer, this one is {type(output)}")
    weight_VD = output.weight.detach()
    bias_V = None if output.bias is None else output.bias.detach()
    if token_map is None:
        return weight_VD, bias_V
    return weight_VD[token_map], None if bias_V is None else bias_V[token_map]


@dataclass(slots=True)
class HeadLoss:
    """Sums by head: losses, right guesses, places. Sums add up exactly over batches and ranks."""

    num_heads: int
    loss: list[float] = field(init=False)
    right: list[int] = field(init=False)
    places: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.loss = [0.0] * self.num_heads
        self.right = [0] * self.num_heads
        self.places = [0] * self.num_heads

    def add(self, head: int, loss: float, right: int, places: int) -> None:
        self.loss[head] += loss
        self.right[head] += right
        self.places[head] += places

    @property
    def means(self) -> list[float]:
        return [loss / max(1, n) for loss, n in zip(self.loss, self.places, strict=True)]


def _chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * vocab))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def cross_entropy(
    out_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_R: Tensor, *, scale: float
) -> tuple[Tensor, float, int]:
    """Slope [R, D] of `scale` times the summed cross entropy at `out_RD`; the sum; right guesses.

    Logits exist for a chunk of rows at a time: all of them would outweigh everything else. Slopes
    of the output matrix are added to it where it learns.
    """
    leaf_RD = out_RD.detach().requires_grad_()
    total, right = 0.0, 0
    for rows in _chunks(len(labels_R), len(weight_VD)):
        with torch.enable_grad():
            logits = F.linear(leaf_RD[rows], weight_VD, bias_V).float()
            loss = F.cross_entropy(logits, labels_R[rows], reduction="sum")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        right += int((logits.detach().argmax(-1) == labels_R[rows]).sum())
    slope_RD = leaf_RD.grad if leaf_RD.grad is not None else torch.zeros_like(out_RD)
    return slope_RD, total, right


def ranks_of(out_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_R: Tensor) -> Tensor:
    """Ranks [R] of the labels among all guesses, 0 for the best; NEVER for a label of -1."""
    ranks = []
    for rows in _chunks(len(labels_R), len(weight_VD)):
        logits = F.linear(out_RD[rows], weight_VD, bias_V)
        labels = labels_R[rows]
        own = logits.gather(1, labels.clamp(min=0)[:, None])
        rank = (logits > own).sum(-1)
        ranks.append(torch.where(labels >= 0, rank, NEVER))
    return torch.cat(ranks) if ranks else labels_R.new_zeros(0)


def frequent(tokens: Sequence[int], *, count: int, vocab: int) -> Tensor:
    """The `count` ids that occur most often, ascending; of equals the lower ones."""
    times_V = torch.bincount(torch.tensor(tokens), minlength=vocab)
    order = torch.sort(times_V, descending=True, stable=True).indices
    return order[:count].sort().values
