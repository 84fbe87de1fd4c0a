"""Log-probabilities of a model in a file, so that it need not be loaded again.

The file holds the windows' tokens and, for every scored position, either all log-probabilities
(float32: lossless), or a state of as many numbers as the model is wide, from which the lm_head, in
the file too, makes all of them again (`states.py`), or the K largest and that of the next token.
With K, the rest of the vocabulary counts as one event, so a KL from them is a lower bound;
perplexity and top-1 agreement stay exact. A file serves as the reference of `eval` and as the
teacher of `distill`.

Shapes: S windows, B of a batch, L tokens, V vocabulary, K kept, R positions.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import TensorEntry, read_header
from spectool.checkpoint.tensors import all_finite, read_tensor
from spectool.data.states import StateCodec
from spectool.data.windows import Batch, Windows
from spectool.errors import CheckpointError, InputError, SpectoolError, UsageError
from spectool.files import disk_errors

FORMAT_VERSION = 2

# States are refused where a log-probability that they give is off by more than this: the logits
# are no product with the lm_head then, as where they are capped. In bfloat16 it is 0.1 at most.
MAX_ERROR = 0.5

# Names of the lm_head that makes log-probabilities of states.
LM_HEAD, BIAS = "lm_head.weight", "lm_head.bias"

# Replaces a log-probability of -inf, so that the file has finite values only.
LOWEST = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Metadata of a reference file.

    `length`, `bos`, `protocol`: of the windows. `source`: fingerprint of the checkpoint;
    `tokenizer`: digest.
    `width`: numbers of a state, 0 where log-probabilities are kept; `error`: the largest difference
    of a log-probability that states give back.
    """

    length: int
    bos: int | None
    vocabulary: int
    top_k: int
    source: str
    tokenizer: str
    protocol: str = "text"
    width: int = 0
    error: float = 0.0
    kind: str = "reference"
    format_version: int = FORMAT_VERSION


def expected_bytes(windows: Windows, vocabulary: int, top_k: int) -> int:
    """Return the size of the file for these windows; `top_k` 0 keeps the whole vocabulary."""
    each = 4 * vocabulary if top_k == 0 else 8 * min(top_k, vocabulary) + 4
    return windows.num_tokens * each + 4 * sum(ids.numel() for ids in windows.groups)


class LogProbsWriter:
    """Writer of a reference file, batch by batch; the file appears when it is finished.

    `error`: of the states so far, if `keep_states` was called; see `Record`.

    Raises:
        InputError: the file exists, or cannot be written.
        SpectoolError: the disk is full, or states do not give the log-probabilities back.
    """

    def __init__(self, path: Path, windows: Windows, vocabulary: int, *, top_k: int) -> None:
        if path.exists():
            raise UsageError(f"{path}: exists already", hint="remove it, or name another file")
        self.path, self.windows = path, windows
        self.kept = min(top_k, vocabulary) or vocabulary
        self.fields: dict[str, tuple[str, tuple[int, ...]]] = {"logp": ("F32", (self.kept,))}
        if top_k:
            self.fields |= {"top": ("I32", (self.kept,)), "chosen": ("F32", ())}
        self.vocabulary, self.top_k = vocabulary, top_k
        self.codec: StateCodec | None = None
        self.num_rows, self.error = 0, 0.0
        try:
            self.scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        self.parts = {name: Path(self.scratch.name) / name for name in self.fields}
        self.files = {name: part.open("wb") for name, part in self.parts.items()}

    def keep_states(self, codec: StateCodec) -> None:
        """Keep states in place of all log-probabilities; call it before anything is added."""
        assert self.num_rows == 0 and self.top_k == 0
        self.codec = codec
        self.fields = {"logp": ("F32", (codec.width,))}

    def add(self, batch: Batch, logp_BLV: Tensor) -> None:
        """Write the log-probabilities [B, L, V] of a batch's scored tokens."""
        flat = logp_BLV.cpu().clamp(min=LOWEST).reshape(-1, logp_BLV.shape[-1])
        self.num_rows += len(flat)
        if self.codec is not None:
            logp_RV, flat = flat, self.codec.encode(flat)
            self.error = max(self.error, float((self.codec.decode(flat) - logp_RV).abs().max()))
            if self.error > MAX_ERROR:
                raise SpectoolError(
                    f"{self.path}: states give log-probabilities back with an error of "
                    f"{self.error:.2g}: this model's logits are no product with its lm_head",
                    hint="leave out --save-states",
                )
        with disk_errors(self.path):
            if "top" not in self.fields:
                _write(self.files["logp"], flat)
                return
            values, tokens = flat.topk(self.kept, dim=-1)
            _write(self.files["logp"], values)
            _write(self.files["top"], tokens.to(torch.int32))
            _write(self.files["chosen"], flat.gather(-1, batch.next_ids[:, None])[:, 0])

    def finish(self, *, source: str, tokenizer: str) -> None:
        """Assemble the parts into the file; see `Record`."""
        record = Record(
            length=self.windows.length,
            bos=self.windows.bos,
            vocabulary=self.vocabulary,
            top_k=self.top_k,
            source=source,
            tokenizer=tokenizer,
            protocol=self.windows.protocol,
            width=0 if self.codec is None else self.codec.width,
            error=self.error,
        )
        lm_head: dict[str, Tensor] = {}
        if self.codec is not None:
            lm_head = {LM_HEAD: self.codec.weight_VD, BIAS: self.codec.bias_V}
        with disk_errors(self.path):
            for file in self.files.values():
                file.close()
            entries = {
                name: TensorEntry(
                    name=name,
                    dtype=dtype,
                    shape=(self.num_rows, *shape),
                    path=self.parts[name],
                    start=0,
                    num_bytes=self.parts[name].stat().st_size,
                )
                for name, (dtype, shape) in self.fields.items()
            }
            ids = {f"ids.{i}": g.to(torch.int32) for i, g in enumerate(self.windows.groups)}
            whole = Path(self.scratch.name) / "whole"
            write_safetensors(whole, {**ids, **lm_head, **entries}, asdict(record))
            whole.rename(self.path)

    def __enter__(self) -> LogProbsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self.files.values():
            file.close()
        self.scratch.cleanup()


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().numpy().tobytes())


class StoredLogProbs:
    """Reference file, read by rows of its windows.

    Raises:
        CheckpointError: the file is not a reference file, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        header, entries = read_header(path)
        try:
            found = json.loads(header["spectool"])
            if found["format_version"] > FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: has format {found['format_version']}",
                    hint="install a newer spectool",
                )
            self.record = Record(**found)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a reference file (--save-reference)") from error
        self.entries = {entry.name: entry for entry in entries}
        count = sum(name.startswith("ids.") for name in self.entries)
        groups = [read_tensor(self.entries[f"ids.{i}"]).long() for i in range(count)]
        of = self.record
        self.windows = Windows(tuple(groups), of.length, of.bos, protocol=of.protocol)

    @property
    def is_complete(self) -> bool:
        """Whether the file has log-probabilities of the whole vocabulary; those made of states are
        off by `error` at most."""
        return self.record.top_k == 0

    @functools.cached_property
    def _codec(self) -> StateCodec | None:
        """The codec of stored states; None where the file holds log-probabilities."""
        if not self.record.width:
            return None
        weight_VD, bias_V = (read_tensor(self.entries[name]) for name in (LM_HEAD, BIAS))
        return StateCodec(weight_VD, bias_V)

    def read(self, name: str, group: int, windows: slice) -> Tensor:
        """Read `logp` [R, K], `top` [R, K] or `chosen` [R] of all scored tokens of some windows.

        `top` are the tokens that `logp` belongs to; a complete file has neither it nor `chosen`.

        Raises:
            CheckpointError: they are not finite.
        """
        entry = self.entries[name]
        before = sum(g.shape[0] * (g.shape[1] - 1) for g in self.windows.groups[:group])
        each = self.windows.groups[group].shape[1] - 1
        span = slice(before + windows.start * each, before + windows.stop * each)
        rows = read_tensor(entry, rows=span)
        if not all_finite(rows):
            raise CheckpointError(f"{entry.path}: {name} holds values that are NaN or infinite")
        return rows if self._codec is None else self._codec.decode(rows)


def kept_kl(ref_RK: Tensor, logp_RV: Tensor, kept_RK: Tensor) -> Tensor:
    """Return KL(reference || model) [R] of the K tokens kept, and of all others as one event.

    `kept_RK` are the tokens of the reference's log-probabilities, `logp_RV` those of the model.
    """
    kept_R = (ref_RK.exp() * (ref_RK - logp_RV.gather(-1, kept_RK))).sum(-1)
    if kept_RK.shape[-1] == logp_RV.shape[-1]:
        return kept_R
    p_R = (1 - ref_RK.double().exp().sum(-1)).clamp(min=0)
    # As a sum of the others: 1 minus the sum of the kept ones would be mostly rounding.
    others_RV = logp_RV.scatter(-1, kept_RK, -torch.inf)
    log_q_R = others_RV.logsumexp(-1).double().clamp(min=math.log(1e-30))
    rest_R = torch.where(p_R > 0, p_R * (p_R.clamp(min=1e-30).log() - log_q_R), 0.0)
    return kept_R + rest_R
