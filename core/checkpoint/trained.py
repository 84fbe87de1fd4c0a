"""Writing of trained checkpoints: a source's files with some tensors replaced, or a new model.

Files keep the source's names and contents: shards, index, configuration and companions. So the
result is loaded as the source is. A new model has the companions alone, such as the tokenizer. A
record of the training is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter, Content
from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.headers import (
    DENSE_FILE,
    INDEX_SUFFIX,
    PACKED_INDEX,
    TRAINING,
    find_weights,
    read_json,
)
from spectool.checkpoint.tensors import Checkpoint, torch_dtype
from spectool.errors import UnsupportedError
from spectool.files import json_bytes

# Files copied with the weights; Python files only if remote code is trusted.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip

# What `quantize` writes beside the shards, and what is added to the README of a trained result.
_BESIDE_PACKED = ("README.md", "rules.yaml")
TRAINED_NOTE = (
    f"Its scales, zero points, codebooks, norms and biases were trained afterwards: `{TRAINING}`."
)


def check_dense(checkpoint: Checkpoint) -> None:
    """Raise an UnsupportedError if a checkpoint is quantized already."""
    quantization = checkpoint.layout.quantization
    if quantization is not None:
        by = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedError(
            f"{checkpoint.path}: is quantized already ({by}); take the dense original instead"
        )


def read_companions(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Read the files that accompany the weights; Python files too if they are trusted."""
    return {
        str(path.relative_to(checkpoint.path)): path.read_bytes()
        for pattern in ((*COMPANIONS, "*.py") if checkpoint.trust_remote_code else COMPANIONS)
        for path in checkpoint.path.glob(pattern)
        if path.is_file()
    }


def write_new(
    writer: ArtifactWriter,
    source: Checkpoint,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    training: Mapping[str, Any],
) -> None:
    """Write a new model's tensors and files, the companions of `source` and the record `training`.

    Finishes the writer; other shards than the weights go.
    """
    writer.write_shard(DENSE_FILE, tensors, {}, {})
    writer.keep_only([DENSE_FILE])
    named = {**read_companions(source), **files}
    record = {
        "format_version": FORMAT_VERSION,
        **training,
        "checksums": writer.checksums(),
        "files": sorted({*named, TRAINING, DENSE_FILE}),
    }
    writer.finish({**named, TRAINING: json_bytes(record)})


def write_trained(
    writer: ArtifactWriter,
    source: Checkpoint,
    replaced: Mapping[str, Tensor],
    training: Mapping[str, Any],
) -> None:
    """Write a source again with some tensors replaced, by stored name, and the record `training`.

    Tensors keep their stored dtypes. Of a source that is a part of its files, that part is written.
    Finishes the writer; other shards than the weights go.
    """
    layout, files = source.layout, read_companions(source)
    if layout.is_packed:
        for name in _BESIDE_PACKED:
            if (source.path / name).is_file():
                files[name] = (source.path / name).read_bytes()
        readme = files.get("README.md")
        if readme is not None and TRAINED_NOTE.encode() not in readme:
            files["README.md"] = readme + f"\n{TRAINED_NOTE}\n".encode()
    for path in layout.files:
        contents: dict[str, Content] = {}
        for name, entry in layout.tensors.items():
            if entry.path == path:
                contents[name] = entry
                if name in replaced:
                    contents[name] = replaced[name].to(torch_dtype(entry)).contiguous()
        writer.write_shard(path.name, contents, {}, {})
    writer.keep_only([path.name for path in layout.files])
    weights = find_weights(source.path, layout.config)
    for name in ("config.json", *([weights.name] if weights.name.endswith(INDEX_SUFFIX) else ())):
        files[name] = (source.path / name).read_bytes()
    if layout.is_part:
        files["config.json"] = json_bytes(layout.config)
        if weights.name in files:
            names = {name: entry.path.name for name, entry in layout.tensors.items()}
            metadata = {"total_size": layout.num_bytes}
            files[weights.name] = json_bytes({"metadata": metadata, "weight_map": names})
    trained_before = (source.path / TRAINING).is_file()
    record = {
        "format_version": FORMAT_VERSION,
        **training,
        # A packed checkpoint may be trained again.
        **({"before": read_json(source.path / TRAINING)} if trained_before else {}),
        "checksums": writer.checksums(),
        "files": sorted({*files, TRAINING, *writer.manifest["shards"]}),
    }
    files[TRAINING] = json_bytes(record)
    if layout.is_packed:
        index = read_json(weights)
        index["metadata"] |= {"checksums": record["checksums"], "files": record["files"]}
        files[PACKED_INDEX] = json_bytes(index)
    writer.finish(files)
