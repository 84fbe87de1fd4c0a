"""Quantization preprocessing: fine-tune a model so that packing it loses less.

The model is packed and dequantized; LoRA updates of the result (Hu et al. 2021, arXiv:2106.09685,
by peft) are trained on next-token prediction and merged. The merged model is then packed: its
weights lie near values that the method can represent, and its activations are the targets. Its
perplexity is a lower bound for that of the packed model.

Source: Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179), "quantization preprocessing". Deviation:
updates of all packed linears; the authors leave out the output projection of attention.
Shapes: S sequences, B of a step, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.checkpoint.artifact import write_whole
from spectool.checkpoint.dense import read_small_files, replace_tensors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint, read_tensor
from spectool.errors import UnsupportedError, UsageError, hushed, require
from spectool.files import disk_errors
from spectool.machine import available_memory
from spectool.model.architecture import Architecture
from spectool.model.loading import load_model
from spectool.model.matrices import Matrix
from spectool.quantize.footprint import saved_bytes
from spectool.quantize.plan import QuantizePlan
from spectool.report import Reporter
from spectool.training import Metrics, Recipe, Training, make_optimizer

# Share of the text, at its end, that is held out, and the most sequences of it.
HELD_OUT = 0.1
MOST_HELD_OUT = 32
NUM_EVALUATIONS = 10


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


def bytes_needed(architecture: Architecture, plan: QuantizePlan, tokens: int) -> int:
    """Estimate the bytes of training: weights and merged weights in float32, saved activations.

    `tokens` are those of one step.
    """
    saved = sum(
        saved_bytes(architecture, block.values(), tokens) for block in plan.matrices.values()
    )
    return 8 * plan.num_parameters + saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshaping:
    """One run of preprocessing; resumes from `scratch` if `identity` matches the record there."""

    options: Preprocess
    windows: TrainingWindows
    scratch: Path
    identity: Mapping[str, Any]
    checkpoint: Checkpoint
    architecture: Architecture
    plan: QuantizePlan
    device: torch.device
    seed: int
    reporter: Reporter

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices to update, by name."""
        packed = (matrix for block in self.plan.matrices.values() for matrix in block.values())
        # peft adds LoRA to modules; experts of a fused tensor are none.
        return {matrix.name: matrix for matrix in packed if matrix.expert is None}

    def check(self, *, overwrite: bool) -> None:
        """Check that preprocessing can run; `overwrite` removes the scratch of another run.

        Raises:
            UsageError: the scratch directory belongs to something else.
            UnsupportedError: too little memory, or weights stored in a way that cannot be written.
            MissingExtra: peft is not installed.
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
        for matrix in self.matrices.values():
            if self.architecture.origins[matrix.parameter].converter is not None:
                raise UnsupportedError(
                    f"--preprocess: {matrix.name} is stored in parts that cannot be written back"
                )
        tokens = self.options.batch_size * self.windows.train_SL.shape[1]
        needed = bytes_needed(self.architecture, self.plan, tokens)
        free = available_memory(self.device)
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
        scratch, record = self.scratch, self.scratch / "run.json"
        first, merged, metrics = scratch / "first", scratch / "merged", scratch / "figures.json"
        with disk_errors(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(self.identity, sort_keys=True))
            if not metrics.exists():
                if not first.exists():
                    pack(first)
                source = open_checkpoint(first, trust_remote_code=self.checkpoint.trust_remote_code)
                measured, weights = train(
                    source, self.options, self.windows, list(self.matrices),
                    state=scratch / "state.safetensors", device=self.device, seed=self.seed,
                    reporter=self.reporter,
                )  # fmt: skip
                self._write(merged, weights)
                metrics.write_text(json.dumps(measured))
            perplexities: dict[str, float] = json.loads(metrics.read_text())
        return merged, perplexities

    def _write(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the original checkpoint with some matrices [n, m] replaced, by name."""
        replaced = {}
        for name, weight_nm in weights.items():
            matrix = self.matrices[name]
            ((key, _),) = self.architecture.origins[matrix.parameter].stored
            replaced[key] = weight_nm.T if matrix.transposed else weight_nm
        path.mkdir(exist_ok=True)
        for file, contents in replace_tensors(self.checkpoint.layout, replaced):
            write_whole(path / file, contents, {})
        for file, data in read_small_files(self.checkpoint).items():
            (path / file).parent.mkdir(exist_ok=True)
            (path / file).write_bytes(data)


def train(
    packed: Checkpoint,
    options: Preprocess,
    windows: TrainingWindows,
    modules: Sequence[str],
    *,
    state: Path,
    device: torch.device,
    seed: int,
    reporter: Reporter,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train LoRA updates of `modules` of the checkpoint `packed`.

    Returns the held-out perplexities `packed` and `merged`, and the merged matrices [n, m] by name.
    """
    peft = require("peft", extra="lora", reason="--preprocess")
    train_SL, held_out_SL = windows.train_SL, windows.held_out_SL
    dense = load_model(packed, dtype=torch.float32, device=str(device), runtime="dense")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank / 4, lora_dropout=0.1, target_modules=list(modules)
    )
    with warnings.catch_warnings(), hushed("bitsandbytes"):
        # peft imports bitsandbytes, which complains of a missing package, and reads a deprecated
        # attribute of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = peft.get_peft_model(dense, config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(ids_BL: Tensor) -> Tensor:
        ids_BL = ids_BL.to(device)
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())

    def accumulate(step: int) -> Metrics:
        model.train()
        first = step * options.batch_size
        rows = [row % len(train_SL) for row in range(first, first + options.batch_size)]
        # Dropout depends on seed and step only, so that a resumed run gives the same result.
        torch.manual_seed(random.Random(f"{seed}/{step}").getrandbits(63))
        value = loss(train_SL[rows])
        torch.autograd.backward(value)
        return {"loss": float(value.detach())}

    @torch.no_grad()
    def evaluate() -> Metrics:
        model.eval()
        parts = torch.split(held_out_SL, options.batch_size)
        total = sum(float(loss(ids_BL)) * len(ids_BL) for ids_BL in parts)
        mean = total / len(held_out_SL)
        return {"score": -mean, "perplexity": math.exp(mean)}

    training = Training(
        name="preprocessing",
        module=model,
        optimizers=[
            make_optimizer(
                "adamw", trained, rate=options.rate, betas=(0.9, 0.999), weight_decay=0.0
            )
        ],
        recipe=Recipe(
            steps=options.steps,
            warmup=0.1,
            every=max(1, math.ceil(options.steps / NUM_EVALUATIONS)),
        ),
        accumulate=accumulate,
        evaluate=evaluate,
        reporter=reporter,
        store=_State(state),
    )
    history = training.run()
    merged: nn.Module = model.merge_and_unload()
    weights = {name: merged.get_parameter(f"{name}.weight").detach().cpu() for name in modules}
    assert history.best is not None
    metrics = {"packed": history.evaluations[0]["perplexity"], "merged": history.best["perplexity"]}
    return metrics, weights


class _State:
    """Store of the training state, in one file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read tensors and metadata; None if nothing was saved."""
        if not self.file.exists():
            return None
        metadata, entries = read_header(self.file)
        return {entry.name: read_tensor(entry) for entry in entries}, json.loads(
            metadata["spectool"]
        )

    def save(self, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write tensors and metadata, replacing what was saved before."""
        write_whole(self.file, {name: t.cpu() for name, t in tensors.items()}, metadata)
