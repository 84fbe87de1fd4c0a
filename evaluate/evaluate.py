"""`eval`: perplexity, distance from a reference, and layer errors in one result.

The reference is a checkpoint, run at the same time, or a file written by `--save-reference`. A
checkpoint that does not fit in memory is run block by block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.checkpoint.dtypes import parse_dtype
from spectool.checkpoint.headers import Layout
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.data.template import encode
from spectool.data.text import BUILTIN, MIXED, builtin_text, check_ids, read_text
from spectool.errors import CheckpointError, NotFinite, UsageError
from spectool.evaluate.fidelity import LogProbsReference, Reference, layer_errors, score
from spectool.evaluate.reference import ReferenceWriter, SavedReference, expected_bytes
from spectool.evaluate.windows import (
    BlockwiseLogProbs,
    LogProbs,
    ResidentLogProbs,
    Windows,
    cut,
    resident_bytes,
)
from spectool.machine import available_memory
from spectool.model.architecture import model_class, read_config
from spectool.model.loading import (
    check_device,
    default_dtype,
    load_model,
    load_tokenizer,
    tokenizer_digest,
)
from spectool.report import SILENT, NotItsSource, Reporter

# A model is loaded whole if it takes at most this share of the free memory.
MEMORY_SHARE = 0.7


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Estimate of an evaluation: what it scores, and the size of the reference to save, if any.

    `text`: names of its sources.
    """

    text: str
    windows: Windows
    saved_bytes: int | None


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
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Evaluate a checkpoint; return the result of `spectool eval` without its gates.

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
    windows = _cut_windows(checkpoint, tokenizer, request, saved, reporter)
    origin = f"{checkpoint.path}: its tokenizer" if saved is None else f"{request.reference}"
    for ids_SL in windows.groups:
        check_ids([int(ids_SL.min()), int(ids_SL.max())], vocabulary, origin)
    saved_bytes = None
    if request.save_reference is not None:
        saved_bytes = expected_bytes(windows, vocabulary, request.top_k)
    text = ", ".join(request.texts) or (str(request.reference) if saved else BUILTIN)
    reporter.plan(Plan(text=text, windows=windows, saved_bytes=saved_bytes))
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
            writer = stack.enter_context(
                ReferenceWriter(request.save_reference, windows, vocabulary, top_k=request.top_k)
            )
        if other is not None:
            reference = LogProbsReference(_open_log_probs(other, windows, request, reporter))
        log_probs = _open_log_probs(checkpoint, windows, request, reporter)
        scores = score(
            windows,
            log_probs,
            vocabulary,
            reference=reference,
            batch_size=request.batch_size,
            sink=writer.add if writer else lambda batch, logp_BLV: None,
            reporter=reporter,
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
            reporter.event(NotItsSource(checkpoint.name, str(request.reference)))
    return result


def _cut_windows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    saved: SavedReference | None,
    reporter: Reporter,
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
            reporter=reporter,
        )
    else:
        text = builtin_text(MIXED)
    ids = encode(tokenizer, text[: request.limit])
    return cut(ids, length=length, bos=tokenizer.bos_token_id if request.bos else None)


def _open_log_probs(
    checkpoint: Checkpoint, windows: Windows, request: Request, reporter: Reporter
) -> LogProbs:
    """Load a checkpoint whole, or open it to run block by block."""
    device = check_device(request.device)
    dtype = parse_dtype(request.dtype) or default_dtype(checkpoint.layout, device)
    wanted = resident_bytes(checkpoint.layout, dtype)
    if request.blockwise or wanted > MEMORY_SHARE * available_memory(device):
        return BlockwiseLogProbs(checkpoint, windows, dtype=dtype, device=device, reporter=reporter)
    return ResidentLogProbs(
        load_model(
            checkpoint,
            dtype=dtype,
            device=request.device,
            runtime=request.runtime,
            reporter=reporter,
        )
    )


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
