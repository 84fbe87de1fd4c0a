"""`eval`: perplexity, distance from a reference, and layer errors in one result.

The reference is a checkpoint, run at the same time, or a file written by `--save-reference`. A
checkpoint that does not fit in memory is run block by block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.checkpoint.dtypes import parse_dtype
from spectool.checkpoint.headers import DTYPE_BITS, Layout
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.data.template import encode
from spectool.data.text import BUILTIN, MIXED, OnRead, builtin_text, check_ids, read_text
from spectool.errors import CheckpointError, NotFinite, UsageError
from spectool.evaluate.fidelity import LogProbsReference, Reference, layer_errors, score
from spectool.evaluate.reference import ReferenceWriter, SavedReference, expected_bytes
from spectool.evaluate.windows import BlockwiseLogProbs, LogProbs, ResidentLogProbs, Windows, cut
from spectool.machine import available_memory
from spectool.model.architecture import model_class, read_config
from spectool.model.loading import (
    check_device,
    default_dtype,
    describe_runtime,
    load_model,
    load_tokenizer,
    tokenizer_digest,
    unused_of,
)

# A model is loaded whole if it takes at most this share of the free memory.
MEMORY_SHARE = 0.7

# Prints a line about the run.
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of an evaluation. `window` None: the model's context, at most 2048."""

    texts: Sequence[str] = ()
    text_field: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    bos: bool = False
    limit: int | None = None
    reference: str | None = None
    save_reference: Path | None = None
    top_k: int = 0
    dtype: str | None = None
    device: str = "cpu"
    runtime: str = "auto"
    batch_size: int | None = None
    blockwise: bool = False


def metric_names(request: Request) -> list[str]:
    """List the metrics that a gate may name."""
    known = ["perplexity.value", "perplexity.tokens", "perplexity.window"]
    if request.reference is not None:
        known += ["reference.perplexity", "perplexity_ratio", "kl", "top1_agreement"]
    return known


def evaluate(
    checkpoint: Checkpoint,
    request: Request,
    *,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_read: OnRead = lambda reading: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint; return the result of `spectool eval` without its gates.

    `on_read` is called after each source of text.

    Raises:
        InputError: checkpoint, text, reference or options are unusable.
    """
    model_class(read_config(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = _vocabulary(checkpoint.layout)
    reference: Reference | None = None
    other: Checkpoint | None = None
    saved = None
    if request.reference is not None:
        if Path(request.reference).is_file():
            saved = SavedReference(Path(request.reference))
            reference = saved
        else:
            other = open_checkpoint(
                request.reference,
                trust_remote_code=checkpoint.trust_remote_code,
                checksums=checkpoint.checksums,
            )
    windows = _cut_windows(checkpoint, tokenizer, request, saved, on_read)
    origin = f"{checkpoint.path}: its tokenizer" if saved is None else f"{request.reference}"
    for ids_SL in windows.groups:
        check_ids([int(ids_SL.min()), int(ids_SL.max())], vocabulary, origin)
    say(f"text: {', '.join(request.texts) or (request.reference if saved else BUILTIN)}")
    say(_describe_protocol(windows))
    if saved is not None:
        _check_saved(saved, tokenizer, vocabulary, request)
    if other is not None:
        if tokenizer_digest(load_tokenizer(other)) != tokenizer_digest(tokenizer):
            raise UsageError(f"{request.reference}: its tokenizer differs from {checkpoint.name}'s")
        if _vocabulary(other.layout) != vocabulary:
            raise UsageError(
                f"{request.reference}: its vocabulary size differs from {checkpoint.name}'s"
            )
    with contextlib.ExitStack() as stack:
        writer = None
        if request.save_reference is not None:
            size = expected_bytes(windows, vocabulary, request.top_k)
            kind = f"the {request.top_k} largest" if request.top_k else "all (lossless)"
            say(
                f"{request.save_reference}: log-probabilities kept: {kind}; {size / 1e6:.1f} MB, "
                "twice that while the file is assembled"
            )
            writer = stack.enter_context(
                ReferenceWriter(request.save_reference, windows, vocabulary, top_k=request.top_k)
            )
        if other is not None:
            reference = LogProbsReference(_open_log_probs(other, windows, request, say))
        log_probs = _open_log_probs(checkpoint, windows, request, say)
        scores = score(
            windows,
            log_probs,
            vocabulary,
            reference=reference,
            batch_size=request.batch_size,
            sink=writer.add if writer else lambda batch, logp_BLV: None,
            progress=progress,
        )
        metrics = {"perplexity": scores.perplexity, "KL": scores.kl}
        for name, value in metrics.items():
            if value is not None and not math.isfinite(value):
                raise NotFinite(
                    f"{checkpoint.name}: {name} is {value}: the logits are finite, but the tokens "
                    "of the text have almost no probability"
                )
        if writer is not None:
            writer.finish(
                {
                    "source": checkpoint.fingerprint(),
                    "tokenizer": tokenizer_digest(tokenizer),
                }
            )
    result: dict[str, Any] = {
        "perplexity": {
            "value": scores.perplexity,
            "tokens": scores.num_tokens,
            "window": windows.length,
            "bos": windows.bos is not None,
        }
    }
    if reference is not None:
        assert scores.reference_perplexity is not None
        assert scores.kl is not None and scores.same_top is not None
        result["reference"] = {"perplexity": scores.reference_perplexity}
        result["perplexity_ratio"] = scores.perplexity / scores.reference_perplexity
        result["kl"] = scores.kl / scores.num_tokens
        result["kl_is_lower_bound"] = saved is not None and not saved.is_lossless
        result["top1_agreement"] = scores.same_top / scores.num_tokens
    if other is not None and checkpoint.layout.is_packed:
        source = (checkpoint.layout.quantization or {}).get("source") or {}
        if source.get("fingerprint") == other.fingerprint():
            result["layers"] = list(layer_errors(checkpoint, other))
        else:
            say(
                f"{request.reference}: {checkpoint.name} was not quantized from it; no layer errors"
            )
    return result


def _cut_windows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    saved: SavedReference | None,
    on_read: OnRead,
) -> Windows:
    """Return the windows of the texts, or those of a saved reference.

    Raises:
        InputError: an option does not fit the model or the reference, or the text is too short.
    """
    context = checkpoint.layout.context or 2048
    if saved is not None:
        given = {"text": request.texts, "window": request.window, "bos": request.bos}
        for name, value in {**given, "limit": request.limit}.items():
            if value:
                raise UsageError(f"--reference FILE contains the tokens; leave --{name} out")
        if saved.windows.length > context:
            raise UsageError(
                f"{request.reference}: has windows of {saved.windows.length} tokens; the model's "
                f"context is {context}"
            )
        return saved.windows
    length = request.window or min(context, 2048)
    if length > context:
        raise UsageError(f"--window {length}: the model's context is {context}")
    if request.bos and tokenizer.bos_token_id is None:
        raise UsageError("--bos: the tokenizer has no BOS token")
    if request.texts:
        text = read_text(
            request.texts,
            tokenizer,
            field=request.text_field,
            template=request.template or None,
            max_characters=request.limit,
            on_read=on_read,
        )
    else:
        text = builtin_text(MIXED)
    ids = encode(tokenizer, text[: request.limit])
    return cut(ids, length=length, bos=tokenizer.bos_token_id if request.bos else None)


def _describe_protocol(windows: Windows) -> str:
    with_bos = "each starts with the BOS token, all text tokens scored"
    plain = "no BOS token, the first token of each window not scored, the text's rest dropped"
    return (
        f"protocol: windows of {windows.length} tokens without overlap, "
        f"{plain if windows.bos is None else with_bos}; {windows.num_tokens} tokens scored"
    )


def _open_log_probs(
    checkpoint: Checkpoint, windows: Windows, request: Request, say: Say
) -> LogProbs:
    """Load a checkpoint whole, or open it to run block by block."""
    device = check_device(request.device)
    dtype = parse_dtype(request.dtype) or default_dtype(checkpoint.layout, device)
    for note in checkpoint.layout.notes:
        say(note)
    wanted = resident_bytes(checkpoint.layout, dtype)
    if request.blockwise or wanted > MEMORY_SHARE * available_memory(device):
        say(f"{checkpoint.path}: run block by block ({wanted / 1e9:.2f} GB as a whole)")
        return BlockwiseLogProbs(checkpoint, windows, dtype=dtype, device=device, say=say)
    model = load_model(checkpoint, dtype=dtype, device=request.device, runtime=request.runtime)
    say(f"{checkpoint.path}: {describe_runtime(model)} on {device}")
    if unused := unused_of(model, checkpoint.layout):
        say(f"{checkpoint.path}: {unused}")
    return ResidentLogProbs(model)


def resident_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint in memory, with codes as stored and the rest in `dtype`."""
    total = 0
    for name, entry in layout.tensors.items():
        packed = ".q." in name and layout.is_packed
        bits = DTYPE_BITS[entry.dtype] if packed else 8 * dtype.itemsize
        total += entry.num_elements * bits // 8
    return total


def _vocabulary(layout: Layout) -> int:
    text_config = layout.config.get("text_config") or {}
    size = layout.config.get("vocab_size") or text_config.get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{layout.path}: its configuration has no vocab_size")
    return size


def _check_saved(
    saved: SavedReference,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    request: Request,
) -> None:
    """Check that a saved reference fits the model.

    Raises:
        UsageError: it is of another tokenizer or vocabulary size.
    """
    if saved.metadata["tokenizer"] != tokenizer_digest(tokenizer):
        raise UsageError(f"{request.reference}: was made with another tokenizer")
    if saved.metadata["vocabulary"] != vocabulary:
        raise UsageError(f"{request.reference}: has another vocabulary size")
