"""Convert draft heads to the formats that servers read, and back.

A directory in such a format holds a `config.json` and a `model.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint.artifact import ArtifactWriter, check_target
from spectool.checkpoint.foreign import check_directory
from spectool.checkpoint.headers import HEADS, HEADS_FILE, read_json
from spectool.checkpoint.tensors import Checkpoint
from spectool.decode.heads.artifact import (
    check_fit,
    fill,
    read_finite_tensors,
    read_record,
    read_weights,
)
from spectool.decode.heads.base import Heads
from spectool.decode.heads.formats import eagle3, medusa
from spectool.decode.heads.formats.base import WEIGHTS, Format, PretrainedHeads
from spectool.decode.heads.formats.eagle3 import EAGLE3, SPECULATORS
from spectool.decode.heads.formats.medusa import VLLM_MEDUSA
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import CheckpointError, SpectoolError, UnsupportedError, UsageError
from spectool.methods import import_method
from spectool.model.loading import checkpoint_dtype, load_tokenizer, load_without_blocks

FORMATS: dict[str, Format] = {
    "vllm-medusa": VLLM_MEDUSA,
    "eagle3": EAGLE3,
    "speculators": SPECULATORS,
}


def export(path: Path, checkpoint: Checkpoint, out: Path, name: str) -> list[str]:
    """Convert the heads in `path`, trained for the target `checkpoint`, to a format in `out`.

    Returns command lines that serve them.

    Raises:
        UsageError: the format is unknown, or OUT exists.
        UnsupportedError: the format cannot hold these heads.
        CheckpointError: the heads were not trained for this target.
    """
    if name not in FORMATS:
        raise UsageError(f"--format {name}: expected one of {', '.join(FORMATS)}")
    form = FORMATS[name]
    record = read_record(path)
    if record.method != form.method:
        raise UnsupportedError(
            f"{path}: {name} holds {form.method} heads, these are {record.method}",
            hint=_where_served(record.method),
        )
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="choose another OUT, or remove it")
    check_target(out, overwrite=False)
    dtype = checkpoint_dtype(checkpoint.layout)
    target = AttentionTarget(
        load_without_blocks(checkpoint, dtype=dtype, device=torch.device("cpu"))
    )
    tokenizer = load_tokenizer(checkpoint)
    check_fit(path, record, target, tokenizer, allow_other_target=False)
    tensors = read_weights(path, record, check=checkpoint.checksums)
    drafter: Any = import_method(record.method, "drafter")
    heads: Heads = drafter.Heads(
        drafter.Heads.Config.from_dict(record.options), target.model, tensors.get("token_map")
    )
    fill(heads, tensors, path / HEADS_FILE)
    config, written = form.write(heads, tensors, target.model, checkpoint.name)
    identity = {"export": name, "heads": record.target, "tensors": sorted(written)}
    with ArtifactWriter(out, identity=identity) as writer:
        metadata = {"method": record.method, "options": record.options, "target": record.target}
        contents = {key: value.contiguous() for key, value in written.items()}
        writer.write_shard(WEIGHTS, contents, metadata, {})
        writer.finish({"config.json": (json.dumps(config, indent=2) + "\n").encode()})
    return form.serve(checkpoint.name, str(out), heads.num_heads)


def _where_served(method: str) -> str:
    """Return the hint that says in which format, if any, heads of this method can be served."""
    suitable = [name for name, form in FORMATS.items() if form.method == method]
    if suitable:
        return f"--format {' or '.join(suitable)}"
    served = ", ".join(dict.fromkeys(form.method for form in FORMATS.values()))
    return (
        f"no server reads {method} heads: `spectool generate --draft` does; servers read {served}"
    )


def read(path: Path, target: Any, *, checksums: bool = True) -> PretrainedHeads:
    """Read heads from a directory of spectool's or in one of the formats.

    `target` is the target's config. With `checksums`, weights in a directory of spectool's are
    compared with their checksums.

    Raises:
        CheckpointError: the directory is in no known format, or damaged.
        UnsupportedError: no method here computes these heads.
    """
    if (path / HEADS).exists():
        record = read_record(path)
        return PretrainedHeads(
            path=path,
            method=record.method,
            options=record.options,
            tensors=read_weights(path, record, check=checksums),
            tokenizer=record.target.get("tokenizer"),
        )
    check_directory(path)
    config = read_json(path / "config.json")
    if not (path / WEIGHTS).exists() and list(path.glob("*.bin")):
        raise UnsupportedError(
            f"{path}: its weights are pickled, and pickles are never read",
            hint=f"save them as {WEIGHTS} with safetensors first",
        )
    try:
        return _read_converted(path, config, target)
    except SpectoolError:
        raise
    except Exception as error:
        # Other programs' files may contradict themselves in any way.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: its files do not fit together: {reason}") from error


def _read_converted(path: Path, config: dict[str, Any], target: Any) -> PretrainedHeads:
    """Read heads in one of the formats, recognised by their config."""
    kind = config.get("speculators_model_type") or config.get("model_type")
    architectures = " ".join(map(str, config.get("architectures") or ()))
    tensors = read_finite_tensors(path / WEIGHTS)
    if kind == "medusa":
        return medusa.read(path, config, tensors, target)
    if kind == "eagle3" or ("speculators_model_type" not in config and "agle3" in architectures):
        return eagle3.read(path, config, tensors, target)
    raise UnsupportedError(
        f"{path}: holds {kind or architectures or 'something else'}, no heads that are read here",
        hint=f"expected heads of `train-heads`, or in a format of {', '.join(FORMATS)}",
    )
