"""Log-probabilities of a model on the windows of a text.

Shapes: S windows, B of a batch, L tokens of each, V vocabulary.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.checkpoint.headers import DTYPE_BITS, Layout
from spectool.checkpoint.tensors import Checkpoint, all_finite
from spectool.data.windows import Batch, Windows
from spectool.decode import tree
from spectool.decode.target.open import open_target
from spectool.errors import NotFinite
from spectool.model.architecture import Architecture
from spectool.model.blocks import Activations, BlockStream, Compute
from spectool.model.finite import first_not_finite, not_finite
from spectool.model.kernels import attach_products, plan_precision, precision_of
from spectool.report import SILENT, Loaded, Reporter

# Hidden states of all windows that take more bytes than this are kept in a temporary file.
HIDDEN_IN_MEMORY = 4 << 30


class ResidentLogProbs:
    """Log-probabilities [B, L, V] of a batch's scored tokens, by a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.activations = model, precision_of(model)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        ids_BL = batch.ids_BL.to(self.model.device)
        logits_BLV = self.model(input_ids=ids_BL, use_cache=False).logits
        return log_probs(logits_BLV, batch)

    def not_finite(self, batch: Batch, what: str) -> NotFinite:
        """Make the error for NaN or infinite scores, which names the first module that has them."""
        where = first_not_finite(self.model, batch.ids_BL)
        name = self.model.config._name_or_path
        return _zero_probability(name, what) if where is None else not_finite(name, what, where)


class CachedLogProbs(ResidentLogProbs):
    """Log-probabilities of a model as it decodes: with its KV store and its fused layers."""

    def __init__(self, model: PreTrainedModel, kv: str, forward: str) -> None:
        super().__init__(model)
        self._target = open_target(model, kv=kv, forward=forward)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        drafts = [tree.chain(row, kind="deterministic") for row in batch.ids_BL.tolist()]
        step = self._target.verify(self._target.cache(len(drafts)), drafts)
        return log_probs(step.logits_BNV, batch)


class BlockwiseLogProbs:
    """Log-probabilities of a checkpoint of any size: all windows pass one block after another.

    One block is in memory at a time, and the hidden states of all windows, in a file if large.
    `activations`: as `spectool.load` has them; None: packed matrices are unpacked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        *,
        dtype: torch.dtype,
        device: torch.device,
        activations: str | None = None,
        batch_size: int = 4,
        reporter: Reporter = SILENT,
    ) -> None:
        architecture = Architecture(checkpoint)
        self.name, self.activations = str(checkpoint.path), "exact"
        if activations is not None:
            entries = checkpoint.layout.modules.values()
            self.activations = plan_precision(entries, device, dtype, activations)
        reporter.event(
            Loaded(
                name=checkpoint.name,
                kind=type(architecture.model).__name__,
                device=str(device),
                runtime=f"block by block, {self.activations} activations",
                unused=architecture.unused,
                notes=checkpoint.layout.notes,
                streamed_bytes=resident_bytes(checkpoint.layout, dtype),
            )
        )
        compute = Compute(dtype=dtype, device=device, batch_size=batch_size)
        self.stream = BlockStream(architecture, compute, self._refuse, with_lm_head=True)
        self.shell, self.device = self.stream.shell, device
        # Without its blocks.
        self.model: PreTrainedModel = self.shell.model
        if activations is not None:
            attach_products(self.shell.model, dtype, activations)
        self.hidden = [self._embed(ids_SL) for ids_SL in windows.groups]
        for index in range(len(architecture.blocks)):
            block = self.stream.build(index, self.stream.read(index))
            if activations is not None:
                attach_products(block, dtype, activations)
            for states in self.hidden:
                self.stream.advance(index, block, states)

    def _refuse(self, place: str) -> NotFinite:
        return not_finite(self.name, "cannot be evaluated", place)

    def _embed(self, ids_SL: Tensor) -> Activations:
        width = self.shell.embed(ids_SL[:1]).shape[-1]
        large = ids_SL.numel() * width * self.stream.compute.dtype.itemsize > HIDDEN_IN_MEMORY
        with tempfile.TemporaryDirectory(prefix="spectool-") as scratch:
            return self.stream.embed(ids_SL, file=Path(scratch) / "hidden" if large else None)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        hidden_BLD = self.hidden[batch.group].hidden_SLD[batch.rows].to(self.device)
        return log_probs(self.shell.logits(batch.ids_BL, hidden_BLD), batch)

    def not_finite(self, batch: Batch, what: str) -> NotFinite:
        """See `ResidentLogProbs.not_finite`."""
        hidden_BLD = self.hidden[batch.group].hidden_SLD[batch.rows].to(self.device)
        if all_finite(self.shell.logits(batch.ids_BL, hidden_BLD)):
            return _zero_probability(self.name, what)
        return not_finite(self.name, what, "the lm_head")


LogProbs = ResidentLogProbs | BlockwiseLogProbs


def _zero_probability(name: str, what: str) -> NotFinite:
    return NotFinite(f"{name}: {what}: the model gives some of its tokens no probability at all")


def log_probs(logits_BLV: Tensor, batch: Batch) -> Tensor:
    """Return the log-probabilities [B, L, V] of the scored tokens in float32."""
    return torch.log_softmax(logits_BLV[:, -1 - batch.scored : -1].float(), -1)


def resident_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint in memory, with codes as stored and the rest in `dtype`."""
    total = 0
    for name, entry in layout.tensors.items():
        packed = ".q." in name and layout.is_packed
        bits = DTYPE_BITS[entry.dtype] if packed else 8 * dtype.itemsize
        total += entry.num_elements * bits // 8
    return total
