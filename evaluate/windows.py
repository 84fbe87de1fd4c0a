"""A text cut into windows, and a model's laws on them.

Protocol: windows do not overlap. Without a start token (the common one, which published tables
use) each window holds L tokens of the text and L - 1 of them are scored; what remains of the text
is dropped. With it, each window opens with the start token, which is not scored, and holds L - 1
tokens of the text, all scored; the last window may be shorter.

Shapes: S windows, B of a batch, L tokens of each, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.checkpoint.contents import unused_line
from spectool.checkpoint.tensors import Checkpoint, all_finite
from spectool.errors import NotFinite, TextError
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, ModelShell, run_block
from spectool.model.finite import first_not_finite, not_finite

# Logits of one batch take at most about this much.
LOGITS_BYTES = 1 << 28

# Hidden states of all windows larger than this lie in a temporary file.
HIDDEN_IN_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class Batch:
    """Some windows of one length: which group, which rows of it, and their ids [B, L]."""

    group: int
    rows: slice
    ids_BL: Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a text, grouped by length (one group, or two with a shorter last window)."""

    groups: tuple[Tensor, ...]
    length: int
    bos: int | None

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return sum(len(ids_SL) * (ids_SL.shape[1] - 1) for ids_SL in self.groups)

    def batches(self, vocabulary: int, *, batch_size: int | None = None) -> Iterator[Batch]:
        """All windows in order, as many at a time as keep the logits small."""
        for group, ids_SL in enumerate(self.groups):
            size = batch_size or max(1, LOGITS_BYTES // (4 * vocabulary * ids_SL.shape[1]))
            for start in range(0, len(ids_SL), size):
                rows = slice(start, min(start + size, len(ids_SL)))
                yield Batch(group, rows, ids_SL[rows])


def cut(ids: list[int], *, length: int, bos: int | None) -> Windows:
    """Windows of `length` tokens; `bos` is the start token's id, None for the common protocol.

    Raises:
        TextError: the text does not fill one window.
    """
    inside = length - (bos is not None)
    if len(ids) < inside or inside < 1:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}",
            hint="give a longer text, or a smaller --window",
        )
    whole = len(ids) // inside
    rows_SL = torch.tensor(ids[: whole * inside]).view(whole, inside)
    if bos is None:
        return Windows((rows_SL,), length, None)
    groups = [torch.cat([torch.full((whole, 1), bos), rows_SL], 1)]
    if len(ids) % inside:
        groups.append(torch.tensor([[bos, *ids[whole * inside :]]]))
    return Windows(tuple(groups), length, bos)


class LogProbs(Protocol):
    """Something that gives log-probabilities [B, L - 1, V] of each next token of a batch."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def not_finite(self, batch: Batch, what: str) -> NotFinite:
        """The error of figures that are NaN or infinite: where in the model that begins."""
        ...


class ResidentLogProbs:
    """The laws of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        ids_BL = batch.ids_BL.to(self.model.device)
        logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        return log_probs(logits_BLV)

    def not_finite(self, batch: Batch, what: str) -> NotFinite:
        where = first_not_finite(self.model, batch.ids_BL)
        name = self.model.config._name_or_path
        return _unlikely(name, what) if where is None else not_finite(name, what, where)


class BlockwiseLogProbs:
    """The laws of a checkpoint of any size: all windows go through one block after another.

    One block and the hidden states of all windows are resident, the latter in a file if large.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        batch_size: int = 4,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        architecture = Architecture(checkpoint.layout, trust_remote_code=trust_remote_code)
        self.name = str(checkpoint.path)
        if architecture.unused:
            kind = type(architecture.model).__name__
            say(f"{self.name}: {unused_line(architecture.unused, kind)}")
        self.around = ModelShell(
            architecture, checkpoint, dtype=dtype, device=device, with_lm_head=True
        )
        self.device = device
        self.hidden = [self._embed(ids_SL, dtype, batch_size) for ids_SL in windows.groups]
        for index, name in enumerate(architecture.blocks):
            block = architecture.materialise(
                name,
                architecture.read(checkpoint, architecture.tensors_of(name)),
                dtype=dtype,
                device=device,
            )
            for ids_SL, hidden in zip(windows.groups, self.hidden, strict=True):
                for rows in hidden.batches(batch_size):
                    call = self.around.calls(rows.stop - rows.start, ids_SL.shape[1])[index]
                    out_BLD = run_block(block, call, hidden.hidden_SLD[rows].to(device))
                    if not all_finite(out_BLD):
                        raise not_finite(self.name, "cannot be evaluated", name)
                    hidden.hidden_SLD[rows] = out_BLD.cpu()

    def _embed(self, ids_SL: Tensor, dtype: torch.dtype, batch_size: int) -> Activations:
        shape = (len(ids_SL), ids_SL.shape[1], self.around.embed(ids_SL[:1]).shape[-1])
        large = math.prod(shape) * dtype.itemsize > HIDDEN_IN_MEMORY
        with tempfile.TemporaryDirectory(prefix="spectool-") as scratch:
            hidden = Activations(shape, dtype, file=Path(scratch) / "hidden" if large else None)
        for rows in hidden.batches(batch_size):
            hidden.hidden_SLD[rows] = self.around.embed(ids_SL[rows]).cpu()
            if not all_finite(hidden.hidden_SLD[rows]):
                raise not_finite(self.name, "cannot be evaluated", "the embedding")
        return hidden

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        hidden_BLD = self.hidden[batch.group].hidden_SLD[batch.rows].to(self.device)
        return log_probs(self.around.logits(batch.ids_BL, hidden_BLD))

    def not_finite(self, batch: Batch, what: str) -> NotFinite:
        hidden_BLD = self.hidden[batch.group].hidden_SLD[batch.rows].to(self.device)
        if all_finite(self.around.logits(batch.ids_BL, hidden_BLD)):
            return _unlikely(self.name, what)
        return not_finite(self.name, what, "the output matrix")


def _unlikely(name: str, what: str) -> NotFinite:
    return NotFinite(f"{name}: {what}: the model gives some of its tokens no probability at all")


def log_probs(logits_BLV: Tensor) -> Tensor:
    """Log-probabilities [B, L - 1, V] in float32; the last position predicts nothing scored."""
    return torch.log_softmax(logits_BLV[:, :-1].float(), -1)
