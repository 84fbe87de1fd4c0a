"""Configuration and tensor headers of a checkpoint directory, read without tensors and torch.

A safetensors file is an 8-byte little-endian length, a header of that many bytes of JSON and the
tensors' bytes. Every claim of a header is checked here, so that a damaged file ends a run with one
line before it starts, and not with a crash after hours.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectool.checkpoint import checksums, foreign
from spectool.checkpoint.checksums import Checksums, Guard
from spectool.checkpoint.formats import packed_entries, shorten, upgrade_config
from spectool.errors import CheckpointError
from spectool.files import read_errors

# Bits of one element; sub-byte types pack several elements into a byte.
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "BOOL": 8, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

DENSE_INDEX = "model.safetensors.index.json"
DENSE_FILE = "model.safetensors"
PACKED_INDEX = "packed.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
HEADS = foreign.HEADS
HEADS_FILE = "heads.safetensors"
# Record of a training that wrote a dense checkpoint.
TRAINING = "spectool_training.json"
# What `bench --certify FILE --attach` adds to an artifact.
CERTIFICATE = "certificate.json"

# Keys of a configuration that may hold the number of decoder layers.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")

# A tensor of a numbered block: the list's name and the number.
_NUMBERED = re.compile(r"(.*?)\.(\d{1,9})\.")

# Most groups of names in one line.
_MAX_GROUPS = 4

# The format's limit on the header's bytes; a greater length is damaged.
MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor in a file; `start` is the offset of its first byte from the file's beginning.

    `guard` compares the file with its checksum before the first read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int
    guard: Guard | None = field(default=None, repr=False, compare=False)

    def open(self) -> io.BufferedReader:
        """Open the file at the tensor's first byte.

        Raises:
            CheckpointError: the file does not match its checksum.
        """
        if self.guard is not None:
            self.guard.check()
        file = self.path.open("rb")
        file.seek(self.start)
        return file

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint's configuration and the headers of all its tensors, by name.

    `checksums`: of an artifact's files by name; empty for artifacts of older versions. `is_part`:
    the files hold more layers, and another configuration.

    Raises:
        CheckpointError: the configuration's entries about quantization are invalid.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    checksums: dict[str, Checksums] = field(default_factory=dict)
    is_part: bool = False

    def __post_init__(self) -> None:
        _check_objects(self.path, self.config)
        try:
            _ = self.modules
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: config.json: {error}", hint=error.hint) from error

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of any quantizer, an artifact's in the names of this version.

        None for a dense checkpoint.
        """
        return _quantization(self.config)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """The packed matrices' entries by name; see `packed_entries`. Empty but for artifacts."""
        return packed_entries(self.quantization) if self.is_packed and self.quantization else {}

    @property
    def context(self) -> int | None:
        """The model's context length in tokens; None if the configuration has none."""
        text_config = self.config.get("text_config") or self.config
        for key in ("max_position_embeddings", "n_positions"):
            length = text_config.get(key)
            if isinstance(length, int):
                if length < 1:
                    raise CheckpointError(
                        f"{self.path}: config.json: {key} is {shorten(length)}, expected at least 1"
                    )
                return length
        return None

    @property
    def is_packed(self) -> bool:
        """Whether the checkpoint is an artifact of `quantize`."""
        return (self.quantization or {}).get("quant_method") == "spectool"

    @property
    def guards(self) -> list[Guard]:
        """The guards of the files that are compared with their checksums."""
        return guards_of(self.tensors.values())

    @property
    def notes(self) -> list[str]:
        """Lines that a run shows about the checkpoint."""
        if self.is_packed and not self.checksums:
            return [f"{self.path}: {checksums.NO_CHECKSUMS}"]
        return []

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """Paths of the weight files, sorted."""
        return sorted({entry.path for entry in self.tensors.values()})


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find `quantization_config` in a configuration or in that of its text model."""
    text_config = config.get("text_config") or {}
    found = config.get("quantization_config") or text_config.get("quantization_config") or None
    return upgrade_config(found) if found and found.get("quant_method") == "spectool" else found


def _check_objects(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if a nested configuration is not a JSON object."""
    for key, parent in (
        ("text_config", config),
        ("quantization_config", config),
        ("quantization_config", config.get("text_config") or {}),
    ):
        if not isinstance(parent.get(key) or {}, dict):
            raise CheckpointError(
                f"{path}: config.json: {key} is {shorten(parent[key])}, expected an object"
            )


def guards_of(entries: Iterable[TensorEntry]) -> list[Guard]:
    """List the guards of the files that hold these tensors, each once."""
    return list(dict.fromkeys(entry.guard for entry in entries if entry.guard is not None))


def find_extra_blocks(layout: Layout) -> list[str]:
    """List stored tensors of blocks beyond the configured number, and of MTP modules.

    Decided by names alone; other tensors without a module are known only once the model is built
    (`contents.find_unused`).
    """
    text_config = layout.config.get("text_config") or layout.config
    counts = (text_config.get(key) for key in COUNTS)
    count = next((each for each in counts if isinstance(each, int)), None)
    by_list: dict[str, dict[str, int]] = {}
    for name in layout.tensors:
        if match := _NUMBERED.match(name):
            by_list.setdefault(match[1], {})[name] = int(match[2])
    # The decoder's list has the most weights; a vision tower may have more blocks.
    blocks = max(
        by_list.values(),
        key=lambda names: sum(layout.tensors[name].num_bytes for name in names),
        default={},
    )
    return sorted(
        name
        for name in layout.tensors
        if name.startswith("mtp.") or (count is not None and blocks.get(name, -1) >= count)
    )


def summarize_names(names: Sequence[str]) -> str:
    """Summarize tensor names in one line, as the first blocks or modules with their counts."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(block[1] if block else name.partition(".")[0], []).append(name)
    parts = [
        members[0] if len(members) == 1 else f"{group}.* ({len(members)})"
        for group, members in groups.items()
    ]
    more = ", ..." if len(parts) > _MAX_GROUPS else ""
    return f"{', '.join(parts[:_MAX_GROUPS])}{more}"


def read_header(
    path: Path, *, guard: Guard | None = None
) -> tuple[dict[str, str], list[TensorEntry]]:
    """Read metadata and tensor entries of one safetensors file, in the order of their bytes.

    `guard` becomes that of every entry.

    Raises:
        CheckpointError: the file is absent, empty or truncated, or its header contradicts it.
    """
    with read_errors(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, but the file has {size}; "
                "it is damaged or not safetensors"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = [_entry(path, 8 + length, name, raw, guard) for name, raw in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise CheckpointError(f"{path}: its header is not a safetensors header") from e
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            word = "overlaps the tensor before it" if entry.start < end else "leaves a gap before"
            raise CheckpointError(f"{path}: {entry.name} {word}; the header is damaged")
        end += entry.num_bytes
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {state}: {size} bytes, expected {end}")
    return metadata, entries


def _entry(
    path: Path, base: int, name: str, raw: dict[str, Any], guard: Guard | None
) -> TensorEntry:
    """Check one tensor's entry of a header; offsets count from `base`."""
    shape = tuple(int(length) for length in raw["shape"])
    first, last = raw["data_offsets"]
    bits = math.prod(shape) * DTYPE_BITS[raw["dtype"]]
    if min(shape, default=0) < 0 or first < 0 or 8 * (last - first) != bits:
        raise CheckpointError(
            f"{path}: {name} is {raw['dtype']} {list(shape)}, which is not {last - first} bytes; "
            "the header is damaged"
        )
    return TensorEntry(
        name=name,
        dtype=raw["dtype"],
        shape=shape,
        path=path,
        start=base + first,
        num_bytes=last - first,
        guard=guard,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is absent, unreadable, or not one JSON object.
    """
    try:
        with read_errors(path):
            value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_layout(path: Path, *, check: bool = True, seq2seq: bool = False) -> Layout:
    """Read configuration and headers of the checkpoint in directory `path`.

    With `check`, an artifact's files are compared with their checksums when tensors are read. With
    `seq2seq`, encoder-decoders that can be decoded are read too.

    Raises:
        CheckpointError: not a checkpoint directory, no configuration, no safetensors weights, a
            damaged file, or an index that names absent files or tensors.
        UnsupportedError: a drafter, an encoder-decoder or a diffusion pipeline.
    """
    foreign.check_directory(path)
    config = read_json(path / "config.json")
    foreign.check_config(path, config, seq2seq=seq2seq)
    _check_objects(path, config)
    weights = find_weights(path, config)
    stored = read_checksums(weights) if weights.name == PACKED_INDEX else {}
    if weights.suffix == ".safetensors":
        tensors = {entry.name: entry for entry in read_header(weights)[1]}
    else:
        tensors = read_shards(weights, stored if check else {})
    if not any(entry.num_elements for entry in tensors.values()):
        raise CheckpointError(f"{path}: its weight files hold no tensors with values")
    return Layout(path=path, config=config, tensors=tensors, checksums=stored)


def find_weights(path: Path, config: Mapping[str, Any]) -> Path:
    """Find the weight file, or the index of its shards, as transformers does.

    Raises:
        CheckpointError: there is none.
    """
    named = config.get("transformers_weights")
    if (_quantization(config) or {}).get("quant_method") == "spectool":
        names = [PACKED_INDEX]
    elif isinstance(named, str):
        if Path(named).name != named or not named.endswith((".safetensors", INDEX_SUFFIX)):
            raise CheckpointError(
                f"{path}: config.json: transformers_weights is {shorten(named)}, expected a "
                "safetensors file or index in that directory"
            )
        names = [named]
    else:
        # The single file first: an index may be left over from an earlier save.
        names = [DENSE_FILE, DENSE_INDEX]
    weights = next((path / name for name in names if (path / name).is_file()), None)
    if weights is None:
        raise foreign.make_missing_weights_error(path, " or ".join(names))
    return weights


def read_checksums(index: Path) -> dict[str, Checksums]:
    """Read the checksums of an artifact's files by name from its index; empty without any."""
    metadata = read_json(index).get("metadata")
    stored = metadata.get("checksums") if isinstance(metadata, dict) else None
    return checksums.parse(stored, index)


def read_shards(index: Path, stored: Mapping[str, Checksums]) -> dict[str, TensorEntry]:
    """Read the tensors, by name, of all files that an index names.

    As in transformers, tensors of these files count even if the index does not list them. `stored`
    are the checksums that guard the files; empty: none is compared.

    Raises:
        CheckpointError: a damaged index or file, or a file that is missing in `stored`.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map does not map tensors to file names")
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if path.name != file or "\0" in file:
            raise CheckpointError(f"{index}: names {file!r}, which is not a file in its directory")
        entries = read_header(path, guard=checksums.make_guard(path, stored))[1]
        tensors.update((entry.name, entry) for entry in entries)
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: says that {name} is in {file}, but it is not")
    return tensors
