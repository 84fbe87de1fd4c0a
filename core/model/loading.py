"""Loading of a checkpoint, dense or packed, as a transformers model, and of its tokenizer."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import machine
from spectool.checkpoint.dtypes import configured, parse_dtype
from spectool.checkpoint.headers import Layout, read_json
from spectool.checkpoint.tensors import Checkpoint, check_finite, hash_json, open_checkpoint
from spectool.errors import CheckpointError, UsageError, require, silence_logger, wrap_errors
from spectool.kernels import cpu
from spectool.kernels.precision import ACTIVATIONS
from spectool.model import registration
from spectool.model.architecture import Architecture
from spectool.model.causal import check_causal
from spectool.model.exchange import unpack_in_place
from spectool.model.kernels import attach_products, describe_packed
from spectool.model.meta import model_class, read_config
from spectool.model.origins import resolve_tensors, unused_tensors
from spectool.model.packed import packed_modules
from spectool.report import SILENT, Loaded, Reporter

# `auto` unpacks what has no kernel if that takes at most this share of the free memory.
DENSE_SHARE = 0.5

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
RUNTIMES = ("auto", "packed", "dense")


def check_device(name: str) -> torch.device:
    """Parse the name of a device.

    Raises:
        UsageError: an unknown name, or a device that is not available.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name}: this machine has no CUDA device that torch can use")
    return device


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    runtime: str = "packed",
    activations: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
) -> PreTrainedModel:
    """Load the checkpoint at `path`, dense or packed, as a transformers model in eval mode.

    Encoder-decoders that `spectool.generate` decodes (BART, T5) are loaded too.

    `dtype`: of the activations and of the weights that are not packed; None: as the checkpoint
    states. `runtime`: `packed` (weights stay in their codes), `dense` (weights are unpacked once,
    at loading) or `auto` (`packed` where a kernel computes with the codes on this machine, else
    `dense` if memory suffices). `activations`, as products with codes take them: `exact`, `int16`
    or `int8` (rounded by row and block) or `auto` (in bfloat16 rounded where that changes almost
    nothing).
    `checksums`: compare the files of a packed checkpoint with the checksums in its index.

    Raises:
        InputError: the checkpoint is missing, damaged or incomplete.
    """
    checkpoint = open_checkpoint(
        path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        checksums=checksums,
        seq2seq=True,
    )
    return load_model(
        checkpoint, dtype=dtype, device=device, runtime=runtime, activations=activations
    )


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    runtime: str = "packed",
    activations: str = "auto",
    keep_fields: bool = False,
    reporter: Reporter = SILENT,
) -> PreTrainedModel:
    """Load a checkpoint as a transformers model; see `spectool.load`.

    With `keep_fields`, packed matrices keep the tensors that are stored of them, as training needs,
    and compute with what is unpacked from these.

    Raises:
        InputError: as `spectool.load`, or an invalid `runtime`, `activations`, `dtype` or `device`.
    """
    for name, given, known in (
        ("runtime", runtime, RUNTIMES),
        ("activations", activations, ACTIVATIONS),
    ):
        if given not in known:
            raise UsageError(f"{name} {given}: expected one of {', '.join(known)}")
    target = check_device(device)
    model = _open(checkpoint, parse_dtype(dtype))
    moved: nn.Module = model
    moved.to(target).eval()
    if runtime != "dense" and not keep_fields:
        _release_files(model, checkpoint.layout)
        attach_products(model, model.dtype, activations)
    if runtime == "dense" or (runtime == "auto" and _fits_dense(model)):
        unpack_in_place(model, dtype=model.dtype, keep_kernels=runtime == "auto")
    reporter.event(
        Loaded(
            name=checkpoint.name,
            kind=type(model).__name__,
            device=device,
            runtime=describe_runtime(model),
            unused=unused_tensors(model, checkpoint.layout),
            notes=checkpoint.layout.notes,
        )
    )
    return model


def load_without_blocks(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load the model's embeddings, lm_head and norms only; its blocks stay on the meta device."""
    architecture = Architecture(checkpoint)
    tensors = architecture.read(architecture.outer_tensors())
    module: Any = architecture.build_module("", tensors, dtype=dtype, device=device)
    model: PreTrainedModel = module
    return model


def config_dtype(layout: Layout) -> torch.dtype | None:
    """Return the dtype that a checkpoint's configuration states; None without one.

    Raises:
        CheckpointError: not a dtype that models run in.
    """
    text_config = layout.config.get("text_config") or {}
    return configured(layout.config, layout.path) or configured(text_config, layout.path)


def checkpoint_dtype(layout: Layout) -> torch.dtype:
    """Return the dtype that a checkpoint states, else float32."""
    return config_dtype(layout) or torch.float32


def default_dtype(layout: Layout, device: torch.device) -> torch.dtype:
    """Return the dtype that commands run in: the checkpoint's, or float32 on a CPU slow in it."""
    # A CPU without instructions for bfloat16 emulates it, and float16 is slow on all CPUs; float32
    # represents the values of both exactly.
    stated = checkpoint_dtype(layout)
    slow = stated == torch.float16 or (stated == torch.bfloat16 and not cpu.has_bfloat16())
    return torch.float32 if device.type == "cpu" and slow else stated


def _release_files(model: PreTrainedModel, layout: Layout) -> None:
    """Copy the dense tensors that are mapped from a file of codes: one of them keeps all mapped."""
    files = {entry.path for name, entry in layout.tensors.items() if ".q." in name}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".q." not in name and name in layout.tensors and layout.tensors[name].path in files:
            tensor.data = tensor.data.clone()


def _fits_dense(model: PreTrainedModel) -> bool:
    """Whether memory suffices to unpack the matrices that have no kernel."""
    packed = [part for part in packed_modules(model).values() if not part.has_kernel()]
    weights = sum(part.in_features * part.out_features for part in packed)
    return weights * model.dtype.itemsize < DENSE_SHARE * machine.available_memory(model.device)


def _open(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the model with transformers, and check that every tensor was loaded."""
    config = read_config(checkpoint)
    model: PreTrainedModel
    info: dict[str, Any]
    quantized = getattr(config, "quantization_config", None) or {}
    if quantized.get("quant_method") == "compressed-tensors":
        require("compressed_tensors", extra="compressed", reason=f"{checkpoint.path}")
        # Without it, the modules have no weights before their first forward.
        quantized["dequantize"] = True
    if checkpoint.layout.is_packed:
        quantized[registration.CHECKSUMS] = bool(checkpoint.layout.guards)
    resolved = checkpoint.layout.is_packed or checkpoint.layout.quantization is None
    if resolved:
        # Checks the tensors before anything is allocated.
        resolve_tensors(checkpoint, config)
    if (checkpoint.path / GENERATION).exists():
        # Checked here: transformers ignores a damaged file, and the ids of the end of text with it.
        read_json(checkpoint.path / GENERATION)
    # It would warn of the tensors of a cut checkpoint's later layers.
    logger = "transformers.modeling_utils"
    quiet = silence_logger(logger) if checkpoint.layout.is_part else contextlib.nullcontext()
    with wrap_errors(checkpoint.path, "transformers cannot load it"), quiet:
        model, info = model_class(config, seq2seq=checkpoint.seq2seq).from_pretrained(
            checkpoint.path,
            config=config,
            # With None, transformers would ignore the dtype in the configuration.
            dtype=dtype or "auto",
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # Unexpected tensors only in artifacts: dense checkpoints often hold outdated buffers.
        names = sorted(map(str, info[kind]))
        if names and (kind != "unexpected_keys" or checkpoint.layout.is_packed):
            word = kind.removesuffix("_keys")
            raise CheckpointError(
                f"{checkpoint.path}: {len(names)} {word} tensors, among them {names[0]}"
            )
    if not resolved:
        check_causal(model, checkpoint.path)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_finite(name, tensor)
    return model


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    config = read_config(checkpoint)
    _check_merges(checkpoint.path)
    with wrap_errors(checkpoint.path, "no tokenizer that transformers can load"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            checkpoint.path, config=config, trust_remote_code=checkpoint.trust_remote_code
        )
    return tokenizer


def _check_merges(path: Path) -> None:
    """Check the merges of a byte-pair tokenizer whose later pieces carry a prefix.

    The tokenizers package aborts the whole process where it removes the prefix from a piece that
    does not have it.

    Raises:
        CheckpointError: a merge whose second piece lacks the prefix.
    """
    file = path / TOKENIZER
    if not file.is_file() or not _PREFIX.search(file.read_bytes()):
        return
    model = read_json(file).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not (isinstance(merges, list) and isinstance(prefix, str)):
        return
    for merge in merges:
        pieces = merge.split(" ") if isinstance(merge, str) else merge
        # transformers refuses what is no pair.
        is_pair = isinstance(pieces, list) and len(pieces) == 2
        if is_pair and not str(pieces[1]).startswith(prefix):
            raise CheckpointError(
                f"{file}: its merge {merge!r} ends without the continuing_subword_prefix {prefix!r}"
            )


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `sha256:...` of the vocabulary, equal for tokenizers with the same ids."""
    return hash_json(tokenizer.get_vocab())


def describe_runtime(model: PreTrainedModel) -> str:
    """Describe how the model computes with its weights, for the header of a run."""
    dtype = str(model.dtype).removeprefix("torch.")
    if packed := describe_packed(model):
        return f"{packed}, {dtype}"
    unpacked = getattr(model.config, "quantization_config", None) is not None
    return f"{'unpacked to dense once' if unpacked else 'dense'}, {dtype}"
