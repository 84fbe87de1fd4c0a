"""All options of a quantization, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.tensors import hash_json
from spectool.machine import software_versions
from spectool.methods import import_method
from spectool.model.architecture import Architecture
from spectool.model.blocks import Compute
from spectool.options import Config
from spectool.quantize.base import Quantizer
from spectool.quantize.fitting import BlockQuantizer
from spectool.quantize.options import JobOptions
from spectool.quantize.preprocess import Preprocess
from spectool.quantize.rules import Rule


@dataclass(frozen=True, slots=True)
class Budget:
    """Most stored bits per weight of the blocks' packed matrices, and the candidate methods."""

    bits: float
    candidates: tuple[Quantizer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-safe form stored in artifacts."""
        candidates = [quantizer.as_dict() for quantizer in self.candidates]
        return {"bits": self.bits, "candidates": candidates}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob(JobOptions):
    """All options of a quantization except where it runs.

    `method` and `config` pack the blocks' matrices that neither `skip` nor a rule names; with a
    `budget` its candidates do, chosen by measured errors. `embeddings` packs the embedding and the
    lm_head, which otherwise stay dense; `lm_head` is the method of a fitted lm_head.
    """

    method: str
    config: Config
    rules: Sequence[Rule] = ()
    embeddings: Quantizer | None = None
    lm_head: Quantizer | None = None
    budget: Budget | None = None
    preprocess: Preprocess | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The default method with its options; with a budget its first candidate."""
        if self.budget is not None:
            return self.budget.candidates[0]
        kind: type[Quantizer] = import_method(self.method, "quantizer")
        return kind(self.config)

    def list_quantizers(self) -> list[Quantizer]:
        """List every quantizer that may pack a matrix."""
        budgeted = self.budget.candidates if self.budget else (self.quantizer,)
        ruled = [rule.quantizer for rule in self.rules]
        return [each for each in (*budgeted, self.embeddings, *ruled) if each is not None]

    @property
    def needs_text(self) -> bool:
        """Whether calibration text runs through the model.

        Methods without statistics and without a fit need none; given text is used all the same,
        for the output errors.
        """
        needing = (self.calibration or None, self.budget, self.lm_head)
        return any(each is not None for each in needing) or any(
            each.needs_calibration for each in self.list_quantizers()
        )

    def sequence_length(self, architecture: Architecture) -> int:
        """Return the tokens of a sequence: `seq_len`, at most the model's context."""
        return min(self.seq_len, architecture.layout.context or self.seq_len)

    def record_compute(self, compute: Compute) -> dict[str, Any]:
        """Record how activations are computed, which decides stored bytes where they matter."""
        record: dict[str, Any] = {
            "dtype": str(compute.dtype).removeprefix("torch."),
            "batch_size": compute.batch_size,
        }
        trained = (self.preprocess, self.budget, self.lm_head)
        if any(each is not None for each in trained) or any(
            isinstance(each, BlockQuantizer) or "hessian" in each.statistics
            for each in self.list_quantizers()
        ):
            # Sums are split among threads, and their last bits can change codes.
            record["threads"] = torch.get_num_threads()
        return record

    def record(self, ids_SL: Tensor | None, compute: Compute) -> dict[str, Any]:
        """Return JSON-safe metadata, with the calibration sequences and the versions used."""
        text = None
        if ids_SL is not None:
            text = {
                "fingerprint": hash_json(ids_SL.tolist()),
                "builtin": not self.calibration,
                "samples": len(ids_SL),
                "seq_len": ids_SL.shape[1],
                **self.record_compute(compute),
            }
        return {
            "method": self.method,
            "options": self.config.as_dict(),
            "rules": [rule.as_dict() for rule in self.rules],
            "embeddings": self.embeddings and self.embeddings.as_dict(),
            "lm_head": self.lm_head and self.lm_head.as_dict(),
            "budget": self.budget and self.budget.as_dict(),
            "skip": sorted(self.skip),
            "allow_dense": self.allow_dense,
            "seed": self.seed,
            "calibration": text,
            "format_version": FORMAT_VERSION,
            "versions": software_versions(),
            "device": compute.device.type,
        }
