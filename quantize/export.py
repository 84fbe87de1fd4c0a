"""Export of packed checkpoints for other tools: dense, or in the format of compressed-tensors.

`compressed-tensors` (`pack-quantized`; vLLM reads it at 4 and 8 bits) stores integer codes on
uniform grids of 1 to 8 bits. It bit-packs rows as spectool does, lowest bits first into 32-bit
words, so codes are copied and nothing is rounded again; zero points are bit-packed along the
outputs. Methods without a uniform grid are refused.

Shapes: n outputs, m inputs, g groups.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.artifact import ArtifactWriter, Content, check_paths, num_bytes
from spectool.checkpoint.headers import TensorEntry
from spectool.checkpoint.tensors import Checkpoint
from spectool.checkpoint.trained import read_companions
from spectool.errors import UnsupportedError, UsageError
from spectool.files import json_bytes
from spectool.kernels.pack import pack_bits
from spectool.model.architecture import Architecture
from spectool.model.loading import checkpoint_dtype
from spectool.model.matrices import Matrix
from spectool.model.packed import load_packed, make_packer

# Methods that store integers on uniform grids.
UNIFORM = ("rtn", "gptq", "int8")
# Bits for which vLLM has kernels of `compressed-tensors` both with and without zero points.
SERVED_BITS = (4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Matrix on a uniform grid, w = scale (code - zero), with codes bit-packed by `pack_bits`.

    `zero_ng` None means a zero point of 2^(bits - 1) everywhere.
    """

    bits: int
    codes: Tensor
    scale_ng: Tensor
    zero_ng: Tensor | None


def export(checkpoint: Checkpoint, out: Path, name: str) -> list[str]:
    """Write a packed checkpoint to the directory `out` in the format `name`.

    Returns command lines that serve the result; none if no known server reads it.

    Raises:
        UsageError: unknown format, the checkpoint is not packed, or `out` exists.
        UnsupportedError: the format cannot represent the checkpoint.
    """
    if name not in FORMATS:
        raise UsageError(f"--format {name}: expected one of {', '.join(FORMATS)} for a checkpoint")
    if out.exists():
        raise UsageError(f"{out}: exists already", hint="choose another OUT, or remove it")
    check_paths(checkpoint.path, out)
    if not checkpoint.layout.is_packed:
        raise UsageError(
            f"{checkpoint.name}: is not packed by spectool; there is nothing to export"
        )
    architecture = Architecture(checkpoint)
    left_out = _find_unexported(architecture)
    convert, configure = FORMATS[name]
    matrices = _find_matrices(architecture)
    config = configure(architecture, matrices)
    shards = _list_shards(checkpoint, left_out)
    quantization = checkpoint.layout.quantization or {}
    metadata = {key: quantization.get(key) for key in ("source", "made_by")}
    tensors: dict[str, str] = {}
    total = 0
    with ArtifactWriter(out, identity={"export": name, "of": checkpoint.fingerprint()}) as writer:
        for index, (entries, packed) in enumerate(shards, start=1):
            shard = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            contents: dict[str, Content] = dict(entries)
            contents.update(convert(packed, matrices, checkpoint))
            writer.write_shard(shard, contents, metadata, {})
            tensors.update(dict.fromkeys(contents, shard))
            total += sum(num_bytes(content) for content in contents.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": tensors}
        writer.finish(
            {
                **read_companions(checkpoint),
                "config.json": json_bytes(config),
                "model.safetensors.index.json": json_bytes(index_file),
            }
        )
    if name != "dense":
        groups = config["quantization_config"]["config_groups"]
        # vLLM fuses q, k and v, which then need one scheme.
        if len(groups) > 1 or groups["group_0"]["weights"]["num_bits"] not in SERVED_BITS:
            return []
    return [shlex.join(["vllm", "serve", str(out)])]


def _find_unexported(architecture: Architecture) -> set[str]:
    """List the tensors that no other tool has: biases of zero.

    Raises an UnsupportedError for matrices that another tool would compute otherwise.
    """
    left_out: set[str] = set()
    for key, entry in architecture.modules.items():
        packer = make_packer(entry)
        if not packer.build(entry["shape"]).is_matrix:
            raise UnsupportedError(
                f"{key}: {packer} computes more than a product with one matrix, which no "
                "other tool would do",
                hint="pack with a method that does not, as olive for olive-activations, or without "
                "shortlist",
            )
        if entry.get("bias") and architecture.model.get_submodule(key).bias is None:
            left_out.add(_check_zero_bias(architecture, key))
    return left_out


def _check_zero_bias(architecture: Architecture, key: str) -> str:
    """Raise an UnsupportedError if a fitted lm_head has a bias other than 0; return its name."""
    name = f"{key}.bias"
    if architecture.checkpoint.read(name).any():
        raise UnsupportedError(
            f"{key}: was fitted with a bias, and the lm_head of "
            f"{architecture.config.model_type} has none in any other tool",
            hint="spectool runs the packed checkpoint itself; to export, pack without --lm-head",
        )
    return name


def _find_matrices(architecture: Architecture) -> dict[str, Matrix]:
    """Find all packable matrices by name; a packed lm_head counts as untied."""
    own_lm_head = any(entry.get("outside") == "lm_head" for entry in architecture.modules.values())
    parts = (
        architecture.outer_matrices(own_lm_head=own_lm_head),
        *map(architecture.block_matrices, architecture.blocks),
    )
    matrices = {matrix.name: matrix for part in parts for matrix in part}
    for name, matrix in matrices.items():
        if matrix.kind == "lm_head":
            matrices[name] = replace(matrix, parameter=f"{name}.weight")
    return matrices


# The dense tensors of a shard, and the names of its packed matrices.
Shard = tuple[dict[str, TensorEntry], list[str]]


def _list_shards(checkpoint: Checkpoint, left_out: Collection[str]) -> list[Shard]:
    """List the checkpoint's shards, without the tensors `left_out`."""
    shards: dict[Path, Shard] = {}
    for key, entry in checkpoint.layout.tensors.items():
        if key in left_out:
            continue
        plain, packed = shards.setdefault(entry.path, ({}, []))
        name, infix, _ = key.rpartition(".q.")
        if infix and name in checkpoint.layout.modules:
            if name not in packed:
                packed.append(name)
        else:
            plain[key] = entry
    return [shards[path] for path in sorted(shards)]


def _read_fields(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Read the fields of one packed matrix."""
    entry = checkpoint.layout.modules[name]
    n, m = entry["shape"]
    return {key: checkpoint.read(f"{name}.q.{key}") for key in make_packer(entry).layout((n, m))}


def _convert_dense(
    packed: list[str], matrices: Mapping[str, Matrix], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Dequantize matrices, with the names and shapes of the architecture."""
    dtype = checkpoint_dtype(checkpoint.layout)
    weights: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name in packed:
        linear = load_packed(checkpoint.layout.modules[name], _read_fields(checkpoint, name))
        weight_nm = linear.dequantize().to(dtype)
        matrix = matrices[name]
        weight = (weight_nm.T if matrix.transposed else weight_nm).contiguous()
        if matrix.expert is None:
            weights[matrix.parameter] = weight
        else:
            experts.setdefault(matrix.parameter, {})[matrix.expert] = weight
    for parameter, each in experts.items():
        weights[parameter] = torch.stack([each[index] for index in range(len(each))])
    return weights


def _make_dense_config(
    architecture: Architecture, matrices: Mapping[str, Matrix]
) -> dict[str, Any]:
    """Return the model's configuration without quantization."""
    config = dict(architecture.layout.config)
    config.pop("quantization_config")
    tied = architecture.model.all_tied_weights_keys
    if any(matrix.parameter in tied for matrix in matrices.values() if matrix.kind == "lm_head"):
        # The exported lm_head is untied from the embedding.
        config["tie_word_embeddings"] = False
        if "text_config" in config:
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config


def _convert_compressed(
    packed: list[str], matrices: Mapping[str, Matrix], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Convert matrices to the tensors of `compressed-tensors`."""
    tensors: dict[str, Tensor] = {}
    for name in packed:
        entry = checkpoint.layout.modules[name]
        grid = read_grid(entry, _read_fields(checkpoint, name))
        tensors[f"{name}.weight_packed"] = grid.codes.view(torch.int32)
        tensors[f"{name}.weight_scale"] = grid.scale_ng
        tensors[f"{name}.weight_shape"] = torch.tensor(entry["shape"])
        if grid.zero_ng is not None:
            zero_gn = pack_bits(grid.zero_ng.T.contiguous(), grid.bits).view(torch.int32)
            tensors[f"{name}.weight_zero_point"] = zero_gn.T.contiguous()
    return tensors


def read_grid(entry: Mapping[str, Any], fields: Mapping[str, Tensor]) -> Grid:
    """Return the grid of a packed matrix, of its entry and its fields; for methods in `UNIFORM`."""
    if entry["method"] == "int8":
        codes_nm = (fields["codes"].int() + 128).to(torch.uint8)
        scale_ng = fields["scale"][:, None] / 127
        return Grid(bits=8, codes=pack_bits(codes_nm, 8), scale_ng=scale_ng, zero_ng=None)
    return Grid(
        bits=entry["options"]["bits"],
        codes=fields["codes"],
        scale_ng=fields["scale"],
        zero_ng=fields.get("zero"),
    )


def _make_compressed_config(
    architecture: Architecture, matrices: Mapping[str, Matrix]
) -> dict[str, Any]:
    """Return the model's configuration for `compressed-tensors`, one config group per scheme."""
    modules = architecture.layout.modules
    groups: dict[str, list[str]] = {}
    for name, entry in modules.items():
        _check_grid(name, entry, matrices[name])
        groups.setdefault(json.dumps(_make_scheme(entry)), []).append(name)
    linears = {
        name
        for name, module in architecture.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return {
        **architecture.layout.config,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {
                    "targets": names if len(groups) > 1 else ["Linear"],
                    "weights": json.loads(scheme),
                }
                for index, (scheme, names) in enumerate(groups.items())
            },
            "ignore": sorted(linears - modules.keys()),
        },
    }


def _check_grid(name: str, entry: Mapping[str, Any], matrix: Matrix) -> None:
    """Raise an UnsupportedError if `compressed-tensors` cannot represent a matrix."""
    if entry["method"] not in UNIFORM:
        raise UnsupportedError(
            f"{name}: compressed-tensors holds whole numbers on uniform grids; {entry['method']} "
            "has none",
            hint="--format dense",
        )
    if matrix.kind not in ("linear", "lm_head"):
        raise UnsupportedError(
            f"{name}: compressed-tensors holds linear layers, and this is none ({matrix.kind})",
            hint="--format dense",
        )
    m, group_size = entry["shape"][1], entry["options"].get("group_size", 0)
    if 0 < group_size < m and m % group_size:
        raise UnsupportedError(
            f"{name}: its {m} inputs are no whole number of groups of {group_size}, which "
            "compressed-tensors requires",
            hint="pack with a --group-size that divides them, or --format dense",
        )


def _make_scheme(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization arguments of `compressed-tensors` for a packed matrix."""
    options = entry["options"]
    group_size = options.get("group_size", 0)
    grouped = 0 < group_size < entry["shape"][1]
    return {
        "num_bits": options.get("bits", 8),
        "type": "int",
        "symmetric": options.get("symmetric", True),
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "dynamic": False,
    }


Convert = Callable[[list[str], Mapping[str, Matrix], Checkpoint], dict[str, Tensor]]
Configure = Callable[[Architecture, Mapping[str, Matrix]], dict[str, Any]]

FORMATS: dict[str, tuple[Convert, Configure]] = {
    "dense": (_convert_dense, _make_dense_config),
    "compressed-tensors": (_convert_compressed, _make_compressed_config),
}
