"""Options of a training of draft heads, and an estimate of its cost before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint.artifact import free_for
from spectool.checkpoint.tensors import Checkpoint, hash_json
from spectool.data.text import check_ids
from spectool.decode.heads.artifact import check_weights
from spectool.decode.heads.base import Heads
from spectool.decode.heads.formats.base import PretrainedHeads
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.features import FEATURES, token_bytes
from spectool.distill.data.samples import Sample, batches, pack_sequences
from spectool.distill.options import HeadsOptions
from spectool.distill.processes import Processes
from spectool.errors import UnsupportedError, UsageError
from spectool.machine import available_memory, software_versions
from spectool.methods import import_method
from spectool.model.decoder import find_blocks
from spectool.model.loading import checkpoint_dtype
from spectool.model.meta import build_meta, read_config
from spectool.options import Config
from spectool.training import OPTIMIZERS, check_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsJob(HeadsOptions):
    """A training of draft heads: its options, the method and the method's own.

    With `init_from`, the options of those heads replace the defaults of `config`.
    """

    method: str
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Target of a job: its checkpoint and tokenizer, and how it computes."""

    checkpoint: Checkpoint
    tokenizer: Any
    tokenizer_digest: str
    dtype: torch.dtype
    device: torch.device
    runtime: str
    activations: str
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsPlan:
    """Estimate of a training, made before the weights are read.

    `disk_bytes`: stored features. `needs`: features that the heads read. `seq_len`: maximum tokens
    of a text, bounded by the model's context. `loss_tokens`: training tokens that are in the loss.
    `tokens`: those that all steps read, of the texts as given.
    """

    parameters: int
    file_bytes: int
    memory_bytes: int
    disk_bytes: int
    samples: int
    loss_tokens: int
    held_out: int
    steps: int
    tokens: int
    seq_len: int
    needs: Needs


def make_plan(
    setup: Setup,
    job: HeadsJob,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    path: Path,
    processes: Processes,
    init_from: PretrainedHeads | None = None,
) -> HeadsPlan:
    """Estimate what the training takes, and check that it can run.

    `path`: directory that features would be stored in. Memory is summed over the processes that
    share it.

    Raises:
        UnsupportedError: memory or disk is too small, or the model or device is not supported.
        CheckpointError: the tokenizer does not fit the model, or `init_from` other heads.
        UsageError: --draft-vocab exceeds the vocabulary, or sequence packing is not supported.
    """
    check_optimizer(job.optimizer, setup.device)
    config, trusted = read_config(setup.checkpoint), setup.checkpoint.trust_remote_code
    architecture: Any = build_meta(config, trust_remote_code=trusted)
    # Raises for an unsupported architecture before anything is written.
    AttentionTarget(architecture)
    kind: type[Heads] = import_method(job.method, "drafter").Heads
    if job.sequence_packing and not kind.supports_packing:
        raise UsageError(
            f"--sequence-packing: {job.method} heads support only one text per sequence"
        )
    lm_head = architecture.get_output_embeddings()
    vocab, width = lm_head.out_features, lm_head.in_features
    for sample in (*train, *held_out):
        check_ids(sample.tokens, vocab, f"{setup.checkpoint.path}: its tokenizer")
    size = kind.draft_vocab_size(job.config, vocab)
    if size > vocab:
        raise UsageError(f"--draft-vocab {size}: the target has {vocab} tokens")
    with torch.device("meta"):
        token_map = torch.empty(size, dtype=torch.long) if size else None
        heads = kind(job.config, architecture, token_map)
    if init_from is not None:
        check_weights(heads, init_from.tensors, init_from.path)
    if heads.needs.inject and job.features != "online":
        raise UsageError(
            f"--features {job.features}: {job.method} passes extra rows through the target's "
            "layers at every step",
            hint="--features online",
        )
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    stored = (path / FEATURES).is_file() and not kind.begins_as_layers
    # A quantized target counts with its unpacked size. With stored features the layers of the
    # target are not loaded.
    left_out = tuple(f"{block}." for block in find_blocks(architecture)[1]) if stored else ()
    memory_bytes = setup.dtype.itemsize * sum(
        p.numel() for name, p in architecture.named_parameters() if not name.startswith(left_out)
    )
    # Float32 weights, two copies of the best weights and the gradient: 16 bytes per parameter;
    # then the optimizer's state.
    memory_bytes += (16 + OPTIMIZERS[job.optimizer]) * parameters
    # Autocast makes 2-byte copies of the weights.
    memory_bytes += 0 if job.autocast is None else 2 * parameters
    if heads.own_lm_head(0) is None:
        memory_bytes += 4 * width * (size or vocab)
    if setup.device.type == "cpu":
        memory_bytes *= processes.local_size
    _check_memory(memory_bytes, parameters, setup.device)
    disk_bytes = 0
    if job.features == "hybrid" or (job.store is not None and not job.store.exists()):
        # Generated texts count with the maximum length.
        generated = [*train, *held_out] if job.regenerate else held_out
        kept = [] if job.regenerate else train
        num_tokens = setup.seq_len * len(generated) + sum(len(s.tokens) for s in kept)
        disk_bytes = num_tokens * token_bytes(heads.needs, width, setup.dtype)
        _check_disk(disk_bytes, path)
    batches = make_batches(train, job, setup.seq_len)
    return HeadsPlan(
        parameters=parameters,
        file_bytes=parameters * checkpoint_dtype(setup.checkpoint.layout).itemsize,
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        samples=len(train),
        loss_tokens=sum(sum(sample.loss_mask) for sample in train),
        held_out=len(held_out),
        steps=len(batches),
        tokens=count_tokens(train, batches),
        seq_len=setup.seq_len,
        needs=heads.needs,
    )


def _check_memory(wanted: int, parameters: int, device: torch.device) -> None:
    """Check that `wanted` bytes of memory are free.

    Raises:
        UnsupportedError: fewer are free.
    """
    free = available_memory(device)
    if wanted > free:
        raise UnsupportedError(
            f"training {parameters / 1e6:.0f} M parameters with the target in memory takes "
            f"{wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="--draft-vocab or --shared-head make the heads smaller, --optimizer adamw8bit "
            "the optimizer's state",
        )


def _check_disk(wanted: int, path: Path) -> None:
    """Check that `wanted` bytes fit on the disk of `path`, files of an earlier run included.

    Raises:
        UnsupportedError: they do not fit.
    """
    free = free_for(path)
    if wanted > free:
        raise UnsupportedError(
            f"{path}: the features take {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            "there",
            hint="--features online stores none",
        )


def make_batches(samples: Sequence[Sample], job: HeadsJob, seq_len: int) -> list[list[list[int]]]:
    """Return, for each step, the sample indices of each row of its batch."""
    options: dict[str, Any] = {
        "batch_tokens": job.batch_tokens,
        "steps": job.steps,
        "epochs": job.epochs,
        "seed": job.seed,
    }
    if job.sequence_packing:
        return pack_sequences(samples, width=seq_len, **options)
    return [[[index] for index in batch] for batch in batches(samples, **options)]


def count_tokens(samples: Sequence[Sample], batches: Sequence[Sequence[Sequence[int]]]) -> int:
    """Count the tokens of the texts that the steps of a training read, without padding."""
    return sum(len(samples[index].tokens) for rows in batches for row in rows for index in row)


def make_identity(
    setup: Setup,
    job: HeadsJob,
    samples: Sequence[Sample],
    processes: Processes,
    init_from: PretrainedHeads | None,
) -> dict[str, Any]:
    """Return everything that decides the bytes of OUT: options, target, data and environment.

    Paths and addresses are left out: `features` keeps its kind only, a server its model's name.
    """
    options = {
        key: value
        for key, value in job.as_dict().items()
        if key not in ("data", "field", "template_arg", "regenerate_url")
    }
    checkpoint = setup.checkpoint
    return {
        **options,
        "method": job.method,
        "seq_len": setup.seq_len,
        "features": job.features.partition(":")[0],
        "options": job.config.as_dict(),
        "init_from": None if init_from is None else init_from.digest,
        "data": hash_json([[sample.tokens, sample.loss_mask] for sample in samples]),
        "source": {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision},
        "dtype": str(setup.dtype).removeprefix("torch."),
        "device": setup.device.type,
        "runtime": setup.runtime,
        "activations": setup.activations,
        "processes": processes.size,
        # The number of threads changes the last bits of sums, and training amplifies them.
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }
