"""Teacher whose log-probabilities are in a file, with the texts that they are of.

The file is one of `eval --save-reference`. Where it keeps only the K likeliest tokens of each
position, the student learns these K probabilities and the sum of all others.

Suffixes: B texts of a batch, L tokens, R tokens in the loss, K log-probabilities kept of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectool.checkpoint.tensors import Checkpoint
from spectool.data.stored_log_probs import StoredLogProbs
from spectool.distill.data.samples import Sample
from spectool.errors import CheckpointError
from spectool.model.loading import hash_vocabulary, load_tokenizer


class StoredTeacher:
    """Teacher read from a file. `vocabulary`: number of the student's logits.

    Raises:
        CheckpointError: it is no such file, or of another tokenizer or vocabulary.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, vocabulary: int) -> None:
        self.stored, self.path = StoredLogProbs(path), path
        record = self.stored.record
        if record.tokenizer != hash_vocabulary(load_tokenizer(checkpoint)):
            raise CheckpointError(f"--teacher {path}: was made with another tokenizer")
        if record.vocabulary != vocabulary:
            raise CheckpointError(
                f"--teacher {path}: has probabilities of {record.vocabulary} tokens, and "
                f"{checkpoint.name} of {vocabulary}"
            )
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}

    @property
    def top_k(self) -> int:
        """Return the number of tokens kept of each position; 0: all."""
        return self.stored.record.top_k

    def fingerprint(self) -> str:
        """Return the fingerprint of the checkpoint whose log-probabilities they are."""
        return self.stored.record.source

    def samples(self, seq_len: int) -> list[Sample]:
        """Return the texts, cut to `seq_len` tokens; all tokens after the first are in the loss."""
        samples = []
        for group, ids_SL in enumerate(self.stored.windows.groups):
            for row, tokens in enumerate(ids_SL[:, :seq_len].tolist()):
                # Equal texts have equal probabilities.
                self._places[tuple(tokens)] = group, row
                samples.append(Sample(tokens, [False] + [True] * (len(tokens) - 1)))
        return samples

    def read(self, samples: Sequence[Sample], mask_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities [R, K] of the tokens after the first that the mask has.

        Also the tokens [R, K] that they belong to, if they are not those of the whole vocabulary.

        Raises:
            CheckpointError: they are not finite.
        """
        names = ("logp",) if self.stored.is_complete else ("logp", "top")
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for mask_L, sample in zip(mask_BL.cpu(), samples, strict=True):
            group, row = self._places[tuple(sample.tokens)]
            for name in names:
                stored_LK = self.stored.read(name, group, slice(row, row + 1))
                parts[name].append(stored_LK[: len(mask_L)][mask_L[: len(stored_LK)]])
        logp_RK, *top_RK = (torch.cat(part).to(mask_BL.device) for part in parts.values())
        return logp_RK, top_RK[0].long() if top_RK else None
