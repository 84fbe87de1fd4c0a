"""A reference's laws in a file, so that the big original need not fit beside the small model.

The file holds the windows' tokens and, for every scored position, either all log-probabilities
(float32: lossless) or the K largest with the log-probability of the token that follows. With K, the
rest of the vocabulary counts as one event, so the KL is a lower bound; perplexity and top-1
agreement stay exact.

Shapes: S windows, B of a batch, L tokens, V vocabulary, K kept.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectool.artifact import write_safetensors
from spectool.checkpoint import read_tensor
from spectool.errors import CheckpointError, SpectoolError, UsageError
from spectool.headers import TensorEntry, read_header

from .windows import Batch, Laws, Windows

FORMAT_VERSION = 1

# A law may give a token no probability at all; a finite stand-in keeps the file free of infinities.
LOWEST = -1e30


def expected_bytes(windows: Windows, vocabulary: int, top_k: int) -> int:
    """Size of the file for these windows; `top_k` 0 keeps everything."""
    each = 4 * vocabulary if top_k == 0 else 8 * min(top_k, vocabulary) + 4
    return windows.num_tokens * each + 4 * sum(ids.numel() for ids in windows.groups)


def save_reference(
    path: Path,
    windows: Windows,
    laws: Laws,
    vocabulary: int,
    *,
    top_k: int,
    metadata: dict[str, Any],
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        UsageError: it exists already.
        SpectoolError: it cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path}: exists already", hint="remove it, or give another name")
    kept = min(top_k, vocabulary) or vocabulary
    fields: dict[str, tuple[str, tuple[int, ...]]] = {"logp": ("F32", (kept,))}
    if top_k:
        fields |= {"top": ("I32", (kept,)), "chosen": ("F32", ())}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            files = {name: (Path(scratch) / name).open("wb") for name in fields}
            done = 0
            for batch in windows.batches(vocabulary, batch_size=batch_size):
                logp_BLV = laws(batch).cpu().clamp(min=LOWEST)
                done += _append(files, batch, logp_BLV, kept, top_k)
                progress(done, windows.num_tokens)
            for file in files.values():
                file.close()
            entries = {
                name: TensorEntry(
                    name=name,
                    dtype=dtype,
                    shape=(done, *shape),
                    path=Path(scratch) / name,
                    start=0,
                    num_bytes=(Path(scratch) / name).stat().st_size,
                )
                for name, (dtype, shape) in fields.items()
            }
            ids = {f"ids.{i}": g.to(torch.int32) for i, g in enumerate(windows.groups)}
            said = {
                **metadata,
                "format_version": FORMAT_VERSION,
                "kind": "reference",
                "length": windows.length,
                "bos": windows.bos,
                "vocabulary": vocabulary,
                "top_k": top_k,
            }
            whole = Path(scratch) / "whole"
            write_safetensors(whole, {**ids, **entries}, said)
            whole.rename(path)
    except OSError as error:
        raise SpectoolError(f"{path}: cannot be written: {error.strerror}") from error


def _append(
    files: Mapping[str, BinaryIO], batch: Batch, logp_BLV: Tensor, kept: int, top_k: int
) -> int:
    flat = logp_BLV.reshape(-1, logp_BLV.shape[-1])
    if top_k == 0:
        _write(files["logp"], flat)
        return len(flat)
    values, places = flat.topk(kept, dim=-1)
    _write(files["logp"], values)
    _write(files["top"], places.to(torch.int32))
    _write(files["chosen"], flat.gather(-1, batch.ids_BL[:, 1:].reshape(-1, 1))[:, 0])
    return len(flat)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().numpy().tobytes())


class SavedReference:
    """A reference file, read a batch at a time.

    Raises:
        CheckpointError: no reference file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        metadata, entries = read_header(path)
        try:
            self.said: dict[str, Any] = json.loads(metadata["spectool"])
            assert self.said["kind"] == "reference"
        except (KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{path}: not a reference file (--save-reference)") from error
        if self.said["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: has format {self.said['format_version']}", hint="install a newer spectool"
            )
        self.entries = {entry.name: entry for entry in entries}
        groups = [
            read_tensor(self.entries[name]).long()
            for name in sorted(self.entries)
            if name.startswith("ids.")
        ]
        self.windows = Windows(tuple(groups), self.said["length"], self.said["bos"])

    @property
    def is_lossless(self) -> bool:
        return bool(self.said["top_k"] == 0)

    def _rows(self, name: str, batch: Batch) -> Tensor:
        before = sum(g.shape[0] * (g.shape[1] - 1) for g in self.windows.groups[: batch.group])
        per_window = batch.ids_BL.shape[1] - 1
        start = before + batch.rows.start * per_window
        return read_tensor(
            self.entries[name], rows=slice(start, before + batch.rows.stop * per_window)
        )

    def compare(self, batch: Batch, logp_BLV: Tensor) -> tuple[float, float, int]:
        """See `fidelity.Reference`."""
        model = logp_BLV.reshape(-1, logp_BLV.shape[-1]).cpu()
        ref = self._rows("logp", batch)
        following = batch.ids_BL[:, 1:].reshape(-1, 1)
        if self.is_lossless:
            kl = torch.nn.functional.kl_div(model, ref, reduction="sum", log_target=True)
            same = int((ref.argmax(-1) == model.argmax(-1)).sum())
            return -float(ref.gather(-1, following).sum(dtype=torch.float64)), float(kl), same
        top = self._rows("top", batch).long()
        ours = model.gather(-1, top)
        kl = (ref.exp() * (ref - ours)).sum() + _rest(ref, ours)
        same = int((top[:, 0] == model.argmax(-1)).sum())
        return -float(self._rows("chosen", batch).sum(dtype=torch.float64)), float(kl), same


def _rest(ref: Tensor, ours: Tensor) -> Tensor:
    """The KL's share of all tokens that were not kept, taken as one event."""
    p = (1 - ref.double().exp().sum(-1)).clamp(min=0)
    q = (1 - ours.double().exp().sum(-1)).clamp(min=1e-30)
    return torch.where(p > 0, p * (p.clamp(min=1e-30).log() - q.log()), 0.0).sum()
