"""What a training of heads is asked to do, and what it will take: known before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from spectool.checkpoint import Checkpoint, text_fingerprint
from spectool.decode.drafters.trained import Heads
from spectool.decode.target import Target
from spectool.errors import CheckpointError, UnsupportedError, UsageError
from spectool.loading import own_dtype
from spectool.machine import available_memory
from spectool.methods import resolve
from spectool.options import Config
from spectool.skeleton import build_meta, read_config
from spectool.training import OPTIMIZERS, check_optimizer
from spectool.version import __version__

from .samples import Sample, batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a training is asked to do, apart from where it runs.

    `steps` None: `epochs` over the data. `learning_rate` None: the method's own. `held_out`:
    samples to measure on, at most. `autocast`: the dtype in which the heads compute; their weights
    are float32 while they learn.

    Raises:
        UsageError: an optimizer or dtype that is not known.
    """

    method: str
    config: Config
    data: Sequence[str]
    steps: int | None = None
    epochs: int = 1
    seq_len: int = 1024
    batch_tokens: int = 4096
    learning_rate: float | None = None
    warmup: float = 0.05
    held_out: int = 32
    regenerate: bool = False
    temperature: float = 0.8
    text_field: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    autocast: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"--optimizer {self.optimizer}: expected one of {', '.join(OPTIMIZERS)}"
            )
        if self.autocast not in (None, "bfloat16"):
            raise UsageError(f"--autocast {self.autocast}: expected bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a training will do and take, known before the weights are read."""

    parameters: int
    file_bytes: int
    memory_bytes: int
    samples: int
    taught_tokens: int
    held_out: int
    steps: int


def plan_of(
    checkpoint: Checkpoint,
    job: Job,
    own: Sequence[Sample],
    held_out: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust: bool,
) -> Plan:
    """What the training will take.

    Raises:
        UnsupportedError: it does not fit, or cannot be done for this model or on this device.
        CheckpointError: the tokenizer is another model's.
        UsageError: more draft tokens than tokens.
    """
    layout = checkpoint.layout
    config = read_config(checkpoint.path, trust_remote_code=trust)
    check_optimizer(job.optimizer, device)
    skeleton: Any = build_meta(config, trust_remote_code=trust)
    # Refuses architectures that cannot be drafted for, before anything is written.
    Target(skeleton)
    kind: type[Heads] = resolve(job.method, "drafter").Heads
    output = skeleton.get_output_embeddings()
    highest = max(max(sample.tokens) for sample in own)
    if highest >= len(output.weight):
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer gives id {highest}, but the model has only "
            f"{len(output.weight)} tokens",
            hint="the tokenizer's files are another model's",
        )
    size = kind.num_guessed(job.config, len(output.weight))
    if size > len(output.weight):
        raise UsageError(f"--draft-vocab {size}: the target has {len(output.weight)} tokens")
    with torch.device("meta"):
        token_map = torch.empty(size, dtype=torch.long) if size else None
        heads = kind(job.config, skeleton, token_map)
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    # A packed target counts as what it is when unpacked.
    memory_bytes = dtype.itemsize * sum(p.numel() for p in skeleton.parameters())
    # Weights, two copies of the best and the gradient in float32; what the optimizer keeps.
    memory_bytes += (16 + OPTIMIZERS[job.optimizer]) * parameters
    # Autocast computes with copies of the weights.
    memory_bytes += 0 if job.autocast is None else 2 * parameters
    if heads.own_output(0) is None:
        memory_bytes += 4 * output.weight.shape[1] * (size or len(output.weight))
    free = available_memory(device)
    if memory_bytes > free:
        raise UnsupportedError(
            f"training {parameters / 1e6:.0f} M parameters beside the target takes "
            f"{memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="--draft-vocab or --shared-head make the heads smaller",
        )
    return Plan(
        parameters=parameters,
        file_bytes=parameters * own_dtype(layout).itemsize,
        memory_bytes=memory_bytes,
        samples=len(own),
        taught_tokens=sum(sum(sample.taught) for sample in own),
        held_out=held_out,
        steps=len(steps_of(own, job)),
    )


def steps_of(samples: Sequence[Sample], job: Job) -> list[list[int]]:
    return batches(
        samples,
        batch_tokens=job.batch_tokens,
        steps=job.steps,
        epochs=job.epochs,
        seed=job.seed,
    )


def identity_of(
    job: Job,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    device: torch.device,
    runtime: str,
) -> dict[str, Any]:
    """All that decides the bytes: what is asked, what it is asked of, and how it is computed."""
    asked = {
        key: value
        for key, value in asdict(job).items()
        if key not in ("config", "data", "text_field", "template")
    }
    return {
        **asked,
        "options": job.config.as_dict(),
        "data": text_fingerprint([[sample.tokens, sample.taught] for sample in samples]),
        "source": {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "runtime": runtime,
        # Sums are split among threads, and training carries their last bits on.
        "threads": torch.get_num_threads(),
        "versions": {
            "spectool": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
