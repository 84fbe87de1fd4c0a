"""What a training of heads is asked to do, and what it will take: known before weights are read."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
import transformers

from spectool.checkpoint.tensors import Checkpoint, text_fingerprint
from spectool.data.text import check_ids
from spectool.decode.heads.artifact import check_weights
from spectool.decode.heads.base import Heads
from spectool.decode.heads.convert import PretrainedHeads
from spectool.decode.protocol import Needs
from spectool.decode.target import Target
from spectool.distill.data.features import FEATURES, store_bytes
from spectool.distill.data.samples import Sample, batches, pack_sequences
from spectool.distill.processes import Processes
from spectool.errors import UnsupportedError, UsageError
from spectool.machine import available_memory
from spectool.methods import resolve
from spectool.model.architecture import build_meta, find_blocks, read_config
from spectool.model.loading import own_dtype
from spectool.options import Config
from spectool.training import OPTIMIZERS, check_optimizer
from spectool.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a training is asked to do, apart from where it runs.

    `init_from`: heads to go on from, a directory or a hub id; their options stand before the
    defaults.
    `steps` None: `epochs` over the data. `learning_rate` None: the method's own. `held_out`:
    samples to measure on, at most. `autocast`: the dtype in which the heads compute; their weights
    are float32 while they learn. `regenerate`: by the server at `regenerate_url` where there is
    one (its only model, unless `regenerate_model` names one). `features`: see `training_data.py`.
    `sequence_packing`: several texts a row.

    Raises:
        UsageError: an optimizer, a dtype or a kind of features that is not known.
    """

    method: str
    config: Config
    data: Sequence[str]
    init_from: str | None = None
    steps: int | None = None
    epochs: int = 1
    seq_len: int = 1024
    batch_tokens: int = 4096
    learning_rate: float | None = None
    warmup: float = 0.05
    held_out: int = 32
    regenerate: bool = False
    regenerate_url: str | None = None
    regenerate_model: str | None = None
    temperature: float = 0.8
    text_field: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    autocast: str | None = None
    features: str = "online"
    sequence_packing: bool = False
    seed: int = 0

    @property
    def store(self) -> Path | None:
        """The directory of an offline store."""
        kind, _, place = self.features.partition(":")
        return Path(place) if kind == "offline" else None

    def __post_init__(self) -> None:
        if self.regenerate_url is not None:
            parts = urllib.parse.urlsplit(self.regenerate_url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise UsageError(
                    f"--regenerate-url {self.regenerate_url}: expected http://HOST:PORT/v1 or https"
                )
        elif self.regenerate_model is not None:
            raise UsageError("--regenerate-model is of the server at --regenerate-url")
        kind, colon, place = self.features.partition(":")
        if (kind, colon, bool(place)) not in (
            ("online", "", False), ("hybrid", "", False), ("offline", ":", True),
        ):  # fmt: skip
            raise UsageError(
                f"--features {self.features}: expected online, hybrid or offline:DIRECTORY"
            )
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"--optimizer {self.optimizer}: expected one of {', '.join(OPTIMIZERS)}"
            )
        if self.autocast not in (None, "bfloat16"):
            raise UsageError(f"--autocast {self.autocast}: expected bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a job runs on: the target's checkpoint, as which it is known, and how it computes."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Any
    tokenizer_digest: str
    dtype: torch.dtype
    device: torch.device
    runtime: str
    seq_len: int
    trust_remote_code: bool = False
    checksums: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a training will do and take, known before the weights are read.

    `disk_bytes` are of stored features, `needs` the features that these heads read, `seq_len` the
    most tokens of a text, which the model's context bounds.
    """

    parameters: int
    file_bytes: int
    memory_bytes: int
    disk_bytes: int
    samples: int
    loss_tokens: int
    held_out: int
    steps: int
    seq_len: int
    needs: Needs


def plan_of(
    setup: Setup,
    job: Job,
    own: Sequence[Sample],
    unseen: Sequence[Sample],
    *,
    place: Path,
    processes: Processes,
    init_from: PretrainedHeads | None = None,
) -> Plan:
    """What the training will take. `place` is where features would be stored. Memory is that of
    all processes that share it.

    Raises:
        UnsupportedError: it does not fit, or cannot be done for this model or on this device.
        CheckpointError: the tokenizer is another model's, or the weights to begin with are of other
            heads.
        UsageError: more draft tokens than tokens.
    """
    check_optimizer(job.optimizer, setup.device)
    path, trust = setup.checkpoint.path, setup.trust_remote_code
    config = read_config(path, trust_remote_code=trust)
    architecture: Any = build_meta(config, trust_remote_code=trust)
    # Refuses architectures that cannot be drafted for, before anything is written.
    Target(architecture)
    kind: type[Heads] = resolve(job.method, "drafter").Heads
    if job.sequence_packing and not kind.supports_packing:
        raise UsageError(f"--sequence-packing: {job.method} heads learn from rows of one text only")
    output = architecture.get_output_embeddings()
    vocab, width = output.out_features, output.in_features
    for sample in (*own, *unseen):
        check_ids(sample.tokens, vocab, f"{path}: its tokenizer")
    size = kind.num_guessed(job.config, vocab)
    if size > vocab:
        raise UsageError(f"--draft-vocab {size}: the target has {vocab} tokens")
    with torch.device("meta"):
        token_map = torch.empty(size, dtype=torch.long) if size else None
        heads = kind(job.config, architecture, token_map)
    if init_from is not None:
        check_weights(heads, init_from.tensors, init_from.place)
    if heads.needs.inject and job.features != "online":
        raise UsageError(
            f"--features {job.features}: {job.method} passes rows of its own through the target's "
            "layers at every step",
            hint="--features online",
        )
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    stored = (place / FEATURES).is_file() and not kind.begins_as_layers
    # A packed target counts as what it is when unpacked; of one whose features are there, nothing
    # inside its layers is loaded.
    left_out = tuple(f"{block}." for block in find_blocks(architecture)[1]) if stored else ()
    memory_bytes = setup.dtype.itemsize * sum(
        p.numel() for name, p in architecture.named_parameters() if not name.startswith(left_out)
    )
    # Weights, two copies of the best and the gradient in float32; what the optimizer keeps.
    memory_bytes += (16 + OPTIMIZERS[job.optimizer]) * parameters
    # Autocast computes with copies of the weights.
    memory_bytes += 0 if job.autocast is None else 2 * parameters
    if heads.own_output(0) is None:
        memory_bytes += 4 * width * (size or vocab)
    if setup.device.type == "cpu":
        memory_bytes *= processes.local_size
    _check_memory(memory_bytes, parameters, setup.device)
    disk_bytes = 0
    if job.features == "hybrid" or (job.store is not None and not job.store.exists()):
        # What the target writes is as long as it may be.
        written = [*own, *unseen] if job.regenerate else unseen
        kept = [] if job.regenerate else own
        num_tokens = setup.seq_len * len(written) + sum(len(s.tokens) for s in kept)
        disk_bytes = store_bytes(heads.needs, width, setup.dtype, num_tokens)
        _check_disk(disk_bytes, place)
    return Plan(
        parameters=parameters,
        file_bytes=parameters * own_dtype(setup.checkpoint.layout).itemsize,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        samples=len(own),
        loss_tokens=sum(sum(sample.loss_mask) for sample in own),
        held_out=len(unseen),
        steps=len(steps_of(own, job, setup.seq_len)),
        seq_len=setup.seq_len,
        needs=heads.needs,
    )


def _check_memory(wanted: int, parameters: int, device: torch.device) -> None:
    """Raises: UnsupportedError: there is less."""
    free = available_memory(device)
    if wanted > free:
        raise UnsupportedError(
            f"training {parameters / 1e6:.0f} M parameters beside the target takes "
            f"{wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="--draft-vocab or --shared-head make the heads smaller, --optimizer adamw8bit "
            "what is kept of them",
        )


def _check_disk(wanted: int, place: Path) -> None:
    """Raises: UnsupportedError: there is less, what is there already counted in."""
    there = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    partial = place.with_name(place.name + ".partial")
    present = sum(file.stat().st_size for file in partial.glob("features-*"))
    free = disk_usage(there).free
    if wanted - present > free:
        raise UnsupportedError(
            f"{place}: the features take {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            "there",
            hint="--features online stores none",
        )


def steps_of(samples: Sequence[Sample], job: Job, seq_len: int) -> list[list[list[int]]]:
    """The samples of each row of each step."""
    how: dict[str, Any] = {
        "batch_tokens": job.batch_tokens,
        "steps": job.steps,
        "epochs": job.epochs,
        "seed": job.seed,
    }
    if job.sequence_packing:
        return pack_sequences(samples, width=seq_len, **how)
    return [[[index] for index in batch] for batch in batches(samples, **how)]


def identity_of(
    setup: Setup,
    job: Job,
    samples: Sequence[Sample],
    processes: Processes,
    init_from: PretrainedHeads | None,
) -> dict[str, Any]:
    """All that decides the bytes: what is asked, what it is asked of, and how it is computed.

    No places: of `features` the kind alone, of a server its model's name.
    """
    asked = {
        key: value
        for key, value in asdict(job).items()
        if key not in ("config", "data", "text_field", "template", "regenerate_url")
    }
    checkpoint = setup.checkpoint
    return {
        **asked,
        "seq_len": setup.seq_len,
        "features": job.features.partition(":")[0],
        "options": job.config.as_dict(),
        "init_from": None if init_from is None else init_from.digest,
        "data": text_fingerprint([[sample.tokens, sample.loss_mask] for sample in samples]),
        "source": {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision},
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": setup.device.type,
        "runtime": setup.runtime,
        "processes": processes.size,
        # Sums are split among threads, and training carries their last bits on.
        "threads": torch.get_num_threads(),
        "versions": {
            "spectool": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
