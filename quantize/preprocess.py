"""Quantization preprocessing: fine-tune a model so that packing it loses less.

The model is packed and dequantized; LoRA updates of the result (Hu et al. 2021, arXiv:2106.09685,
by peft) are trained on next-token prediction and merged. The merged model is then packed: its
weights lie near values that the method can represent, and its activations are the targets. Its
perplexity is a lower bound for that of the packed model.

Source: Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179), "quantization preprocessing". Deviation:
updates of all packed linears; the authors leave out the output projection of attention.
Shapes: S sequences, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import TRAINING, read_json
from spectool.checkpoint.tensors import open_checkpoint
from spectool.distill.data.samples import Sample
from spectool.distill.data.texts import chunk
from spectool.distill.objective import train
from spectool.distill.objectives.base import TextBatches, WeightTask, check_writable, training_bytes
from spectool.distill.objectives.lora import LoRA
from spectool.errors import UnsupportedError, UsageError, require
from spectool.files import disk_errors
from spectool.machine import available_memory
from spectool.model.loading import load_model
from spectool.model.matrices import Matrix
from spectool.quantize.plan import QuantizePlan
from spectool.report import Reporter

# Share of the text, at its end, that is held out, and the most sequences of it.
HELD_OUT = 0.1
MOST_HELD_OUT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Options of preprocessing.

    `text`: files, as for calibration; `rank` and learning `rate` of LoRA; `batch_size` sequences
    per step.
    """

    text: Sequence[str]
    steps: int = 1000
    rank: int = 64
    rate: float = 1e-4
    batch_size: int = 2


@dataclass(frozen=True, slots=True)
class TrainingWindows:
    """Sequences [S, L] to train on, and held-out ones to measure on."""

    train_SL: Tensor
    held_out_SL: Tensor

    @property
    def record(self) -> dict[str, str]:
        """Fingerprint of the sequences for the artifact's metadata; contains no paths."""
        data = torch.cat([self.train_SL, self.held_out_SL]).numpy().tobytes()
        return {"text": f"sha256:{hashlib.sha256(data).hexdigest()}"}

    def batches(self, options: Preprocess) -> TextBatches:
        """Return the sequences of each step, from the first again after the last."""
        train_samples, held_out = (
            [Sample(ids, [True] * len(ids)) for ids in ids_SL.tolist()]
            for ids_SL in (self.train_SL, self.held_out_SL)
        )
        size, count = options.batch_size, len(train_samples)
        steps = [
            [row % count for row in range(step * size, (step + 1) * size)]
            for step in range(options.steps)
        ]
        length = self.train_SL.shape[1]
        return TextBatches(train_samples, lambda _: steps, list(chunk(held_out, size)), length)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessRun:
    """One run of preprocessing; resumes from `scratch` if `identity` matches the record there."""

    options: Preprocess
    windows: TrainingWindows
    scratch: Path
    identity: Mapping[str, Any]
    plan: QuantizePlan
    device: torch.device
    seed: int
    reporter: Reporter

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices to update."""
        # peft adds LoRA to modules; experts of a fused tensor are none.
        return [matrix for matrix in self.plan.inside if matrix.expert is None]

    def check(self, *, overwrite: bool) -> None:
        """Raise an InputError if preprocessing cannot run.

        `overwrite` removes the scratch of another run.
        """
        require("peft", extra="lora", reason="--preprocess")
        identity, record = json.dumps(self.identity, sort_keys=True), self.scratch / "run.json"
        if self.scratch.exists() and not (record.exists() and record.read_text() == identity):
            if not (overwrite and record.exists()):
                raise UsageError(
                    f"{self.scratch}: holds something other than an unfinished run of this",
                    hint="move it away, or start anew with --overwrite",
                )
            shutil.rmtree(self.scratch)
        check_writable(self.plan.architecture, (matrix.parameter for matrix in self.matrices))
        tokens = self.options.batch_size * self.windows.train_SL.shape[1]
        needed, free = training_bytes(self.plan.architecture, tokens), available_memory(self.device)
        if needed > free:
            raise UnsupportedError(
                f"--preprocess trains the whole model in float32, which takes about "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
                hint="a smaller --seq-len, or pack without it",
            )

    def run(self, pack: Callable[[Path], object]) -> tuple[Path, dict[str, float]]:
        """Return the directory of the merged model, and perplexities `packed` and `merged`.

        `pack(path)` packs the original model into that directory.
        """
        first, merged = self.scratch / "first", self.scratch / "merged"
        with disk_errors(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            (self.scratch / "run.json").write_text(json.dumps(self.identity, sort_keys=True))
        if not merged.exists():
            if not first.exists():
                pack(first)
            self._train(first, merged)
        record = read_json(merged / TRAINING)
        before, best = record["evaluations"][0], record["best"]
        return merged, {"packed": before["perplexity"], "merged": best["perplexity"]}

    def _train(self, packed: Path, merged: Path) -> None:
        """Train updates of the packed model and write the original with them merged."""
        architecture = self.plan.architecture
        trusted = architecture.checkpoint.trust_remote_code
        source = open_checkpoint(packed, trust_remote_code=trusted)
        task = WeightTask(
            name="preprocessing",
            model=load_model(source, dtype=torch.float32, device=str(self.device), runtime="dense"),
            source=architecture.checkpoint,
            architecture=architecture,
            texts=self.windows.batches(self.options),
            learning_rate=self.options.rate,
            device=self.device,
            seed=self.seed,
            record={},
        )
        names = {matrix.name for matrix in self.matrices}
        objective = LoRA(task, LoRA.Config(rank=self.options.rank), names)
        with ArtifactWriter(merged, identity=dict(self.identity)) as writer:
            train(objective, writer, reporter=self.reporter)
