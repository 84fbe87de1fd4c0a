"""A target and its draft model as checkpoints, for trainings of heads that read both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.data.text import check_ids
from spectool.decode.heads.artifact import lineage
from spectool.errors import CheckpointError, UnsupportedError
from spectool.machine import available_memory, software_versions
from spectool.model.loading import default_dtype, hash_vocabulary, load_model, load_tokenizer
from spectool.model.meta import build_meta, read_config
from spectool.report import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOfCheckpoints:
    """Both checkpoints, and how they compute."""

    target: Checkpoint
    draft: Checkpoint
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    runtime: str
    activations: str

    @property
    def context(self) -> int | None:
        """Return the shorter of the contexts that are known."""
        contexts = [each.layout.context for each in (self.target, self.draft)]
        return min(filter(None, contexts), default=None)

    def load(self, checkpoint: Checkpoint, reporter: Reporter) -> Any:
        """Load one of them, frozen."""
        model = load_model(
            checkpoint,
            dtype=self.dtype,
            device=str(self.device),
            runtime=self.runtime,
            activations=self.activations,
            reporter=reporter,
        )
        return model.requires_grad_(False)

    def build_meta(self, texts: Sequence[Sequence[int]]) -> list[Any]:
        """Build both models without weights, the target first.

        Raises:
            CheckpointError: one has no embedding for a token of the texts.
        """
        models: list[Any] = []
        for each in (self.target, self.draft):
            config, trusted = read_config(each), each.trust_remote_code
            models.append(build_meta(config, trust_remote_code=trusted))
            rows = models[-1].get_input_embeddings().num_embeddings
            for tokens in texts:
                check_ids(tokens, rows, f"{each.name}: its tokenizer")
        return models

    def weight_bytes(self, models: Sequence[Any]) -> int:
        """Return the bytes of the weights of both models."""
        count: int = sum(p.numel() for model in models for p in model.parameters())
        return self.dtype.itemsize * count

    def check_memory(self, needed: int, *, hint: str | None = None) -> None:
        """Check that so many bytes are free.

        Raises:
            UnsupportedError: they are not.
        """
        if needed > (free := available_memory(self.device)):
            raise UnsupportedError(
                f"the training takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                hint=hint,
            )

    def describe(self, width: int, vocab_size: int, draft_width: int) -> dict[str, Any]:
        """Return what the record of a head says of the pair that it is for."""
        return {
            "fingerprint": self.target.fingerprint(),
            "lineage": lineage(self.target),
            "hidden_size": width,
            "vocab_size": vocab_size,
            "tokenizer": hash_vocabulary(self.tokenizer),
            "draft_model": {
                "fingerprint": self.draft.fingerprint(),
                "lineage": lineage(self.draft),
                "hidden_size": draft_width,
            },
        }

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of a head besides its data and options."""
        return {
            "source": {
                "fingerprint": self.target.fingerprint(),
                "revision": self.target.revision,
                "draft_model": self.draft.fingerprint(),
            },
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "runtime": self.runtime,
            "activations": self.activations,
            # The number of threads changes the last bits of sums, and training amplifies them.
            "threads": torch.get_num_threads(),
            "versions": software_versions(),
        }


def open_pair(
    checkpoint: Checkpoint,
    draft_model: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    runtime: str,
    activations: str,
) -> PairOfCheckpoints:
    """Open the draft model beside its target.

    Raises:
        InputError: there is none, or it has another tokenizer.
    """
    draft = open_checkpoint(
        draft_model,
        trust_remote_code=checkpoint.trust_remote_code,
        checksums=checkpoint.checksums,
    )
    tokenizer = load_tokenizer(checkpoint)
    if hash_vocabulary(load_tokenizer(draft)) != hash_vocabulary(tokenizer):
        raise CheckpointError(
            f"--draft-model {draft_model}: its tokenizer is not that of {checkpoint.name}"
        )
    return PairOfCheckpoints(
        target=checkpoint,
        draft=draft,
        tokenizer=tokenizer,
        dtype=dtype or default_dtype(checkpoint.layout, device),
        device=device,
        runtime=runtime,
        activations=activations,
    )
