"""`eval`: perplexity, distance from a reference, layer errors, as one result.

The reference is a checkpoint, computed in the same run, or a file that `--save-reference` wrote.
A checkpoint that does not fit in memory is run block by block.
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

# A model is opened whole if it takes at most this share of the memory that is free.
MEMORY_SHARE = 0.7

# Said once before something long: a line for people.
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to evaluate. `window` None means the model's context, at most 2048."""

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
    revision: str | None = None
    trust_remote_code: bool = False
    checksums: bool = True


def metric_names(request: Request) -> list[str]:
    """The figures that a gate may name."""
    known = ["perplexity.value", "perplexity.tokens", "perplexity.window"]
    if request.reference is not None:
        known += ["reference.perplexity", "perplexity_ratio", "kl", "top1_agreement"]
    return known


def evaluate(
    model: str,
    request: Request,
    *,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_read: OnRead = lambda reading: None,
) -> dict[str, Any]:
    """The result of `spectool eval` without its gates. `on_read` hears of each source of text.

    Raises:
        InputError: checkpoint, text, reference or options will not do.
    """
    trust = request.trust_remote_code
    checkpoint = open_checkpoint(
        model, revision=request.revision, trust_remote_code=trust, checksums=request.checksums
    )
    model_class(read_config(checkpoint.path, trust_remote_code=trust))
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust)
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
                request.reference, trust_remote_code=trust, checksums=request.checksums
            )
    windows = _windows(checkpoint, tokenizer, request, saved, on_read)
    giver = f"{checkpoint.path}: its tokenizer" if saved is None else f"{request.reference}"
    for ids_SL in windows.groups:
        check_ids([int(ids_SL.min()), int(ids_SL.max())], vocabulary, giver)
    say(f"text: {', '.join(request.texts) or (request.reference if saved else BUILTIN)}")
    say(_protocol(windows))
    if saved is not None:
        _check_saved(saved, tokenizer, vocabulary, request)
    if other is not None:
        theirs = load_tokenizer(other.path, trust_remote_code=trust)
        if tokenizer_digest(theirs) != tokenizer_digest(tokenizer):
            raise UsageError(f"{request.reference}: its tokenizer is another one than {model}'s")
        if _vocabulary(other.layout) != vocabulary:
            raise UsageError(f"{request.reference}: its output has another size than {model}'s")
    with contextlib.ExitStack() as stack:
        writer = None
        if request.save_reference is not None:
            size = expected_bytes(windows, vocabulary, request.top_k)
            kind = f"the {request.top_k} largest" if request.top_k else "all (lossless)"
            say(
                f"{request.save_reference}: log-probabilities kept: {kind}; {size / 1e6:.1f} MB, "
                "twice that while it is put together"
            )
            writer = stack.enter_context(
                ReferenceWriter(request.save_reference, windows, vocabulary, top_k=request.top_k)
            )
        if other is not None:
            reference = LogProbsReference(_log_probs(other, windows, request, say))
        log_probs = _log_probs(checkpoint, windows, request, say)
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
                    f"{model}: {name} is {value}: its logits are finite, but give the tokens that "
                    "follow hardly any probability"
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
            result["layers"] = list(layer_errors(checkpoint, other, trust_remote_code=trust))
        else:
            say(f"{request.reference}: is not what {model} was made from; no layer errors")
    return result


def _windows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    saved: SavedReference | None,
    on_read: OnRead,
) -> Windows:
    context = checkpoint.layout.context or 2048
    if saved is not None:
        given = {"text": request.texts, "window": request.window, "bos": request.bos}
        for name, value in {**given, "limit": request.limit}.items():
            if value:
                raise UsageError(f"--reference FILE brings its own tokens; leave --{name} out")
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
        raise UsageError("--bos: the tokenizer has no start token")
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


def _protocol(windows: Windows) -> str:
    opened = "each opened with the start token, all text tokens scored"
    plain = "no start token, each window's first token not scored, the text's rest dropped"
    return (
        f"protocol: windows of {windows.length} tokens without overlap, "
        f"{plain if windows.bos is None else opened}; {windows.num_tokens} tokens scored"
    )


def _log_probs(checkpoint: Checkpoint, windows: Windows, request: Request, say: Say) -> LogProbs:
    device = check_device(request.device)
    dtype = parse_dtype(request.dtype) or default_dtype(checkpoint.layout, device)
    for note in checkpoint.layout.notes:
        say(note)
    wanted = resident_bytes(checkpoint.layout, dtype)
    if request.blockwise or wanted > MEMORY_SHARE * available_memory(device):
        say(f"{checkpoint.path}: run block by block ({wanted / 1e9:.2f} GB as a whole)")
        return BlockwiseLogProbs(
            checkpoint,
            windows,
            dtype=dtype,
            device=device,
            trust_remote_code=request.trust_remote_code,
            say=say,
        )
    model = load_model(
        checkpoint.path,
        dtype=dtype,
        device=request.device,
        runtime=request.runtime,
        trust_remote_code=request.trust_remote_code,
        checksums=request.checksums,
    )
    say(f"{checkpoint.path}: {describe_runtime(model)} on {device}")
    if unused := unused_of(model, checkpoint.layout):
        say(f"{checkpoint.path}: {unused}")
    return ResidentLogProbs(model)


def resident_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint opened whole: codes as they are, other weights in `dtype`."""
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
        raise CheckpointError(f"{layout.path}: its configuration names no vocab_size")
    return size


def _check_saved(
    saved: SavedReference,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    request: Request,
) -> None:
    if saved.said["tokenizer"] != tokenizer_digest(tokenizer):
        raise UsageError(f"{request.reference}: was made with another tokenizer")
    if saved.said["vocabulary"] != vocabulary:
        raise UsageError(f"{request.reference}: has another vocabulary size")
