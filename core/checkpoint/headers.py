"""What a checkpoint directory says about itself, read without loading a tensor or torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON and the tensors'
bytes. Everything a header may claim wrongly is checked here, so that a damaged file costs the user
one line and not a crash hours into a run.
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
from spectool.checkpoint.formats import FORMAT_VERSION, upgrade_config
from spectool.errors import CheckpointError

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

# The newest layout of artifacts that is read here, and the one that is written.

# A tensor of a numbered block: the list's name and the number.
_NUMBERED = re.compile(r"(.*?)\.(\d{1,9})\.")

# Groups of names that a line lists.
_LISTED = 4

# A longer header than this is a damaged length field: the format's own limit.
MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor in a file: `start` is the offset of its first byte from the file's beginning.

    `guard` compares the file with its checksum before anything is read from it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int
    guard: Guard | None = field(default=None, repr=False, compare=False)

    def open(self) -> io.BufferedReader:
        """The file at the tensor's first byte.

        Raises:
            CheckpointError: the file's bytes are not those that its checksum was made of.
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

    `checksums` are those of an artifact's files; older ones have none.

    Raises:
        CheckpointError: what the configuration says about quantization cannot be read.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    checksums: dict[str, Checksums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_objects(self.path, self.config)
        try:
            _ = self.modules
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: config.json: {error}", hint=error.hint) from error

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` as stored, whoever wrote it; None for a dense checkpoint."""
        return _quantization(self.config)

    @property
    def modules(self) -> dict[str, dict[str, Any]]:
        """The packed matrices' entries by name; see `packed_entries`. None but in artifacts."""
        return packed_entries(self.quantization) if self.is_packed and self.quantization else {}

    @property
    def context(self) -> int | None:
        """Most tokens the model was made for; None where the configuration does not say."""
        text_config = self.config.get("text_config") or self.config
        for key in ("max_position_embeddings", "n_positions"):
            length = text_config.get(key)
            if isinstance(length, int):
                if length < 1:
                    raise CheckpointError(
                        f"{self.path}: config.json: {key} is {_brief(length)}, expected at least 1"
                    )
                return length
        return None

    @property
    def is_packed(self) -> bool:
        return (self.quantization or {}).get("quant_method") == "spectool"

    @property
    def guards(self) -> list[Guard]:
        """One for each file that is to be compared with its checksum."""
        return guards_of(self.tensors.values())

    @property
    def notes(self) -> list[str]:
        """What a run that reads the checkpoint says about it."""
        if self.is_packed and not self.checksums:
            return [f"{self.path}: {checksums.NONE}"]
        return []

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({entry.path for entry in self.tensors.values()})


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    text_config = config.get("text_config") or {}
    found = config.get("quantization_config") or text_config.get("quantization_config") or None
    return upgrade_config(found) if found and found.get("quant_method") == "spectool" else found


def _check_objects(path: Path, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError: what ought to be objects of the configuration are none."""
    for key, parent in (
        ("text_config", config),
        ("quantization_config", config),
        ("quantization_config", config.get("text_config") or {}),
    ):
        if not isinstance(parent.get(key) or {}, dict):
            raise CheckpointError(
                f"{path}: config.json: {key} is {_brief(parent[key])}, expected an object"
            )


def guards_of(entries: Iterable[TensorEntry]) -> list[Guard]:
    """The guards of the files that these tensors lie in, one for each."""
    return list(dict.fromkeys(entry.guard for entry in entries if entry.guard is not None))


def past_the_last_block(layout: Layout) -> list[str]:
    """Stored tensors of blocks that the configuration does not count, and of further heads.

    Known from names alone: what else an architecture has no place for, only the model tells.
    """
    text_config = layout.config.get("text_config") or layout.config
    counts = (text_config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers"))
    count = next((each for each in counts if isinstance(each, int)), None)
    by_list: dict[str, dict[str, int]] = {}
    for name in layout.tensors:
        if found := _NUMBERED.match(name):
            by_list.setdefault(found[1], {})[name] = int(found[2])
    # A tower for images may have more blocks, but not more weights.
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


def grouped(names: Sequence[str]) -> str:
    """Names in one line: how many, and the first parts that they belong to."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(block[1] if block else name.partition(".")[0], []).append(name)
    said = [
        found[0] if len(found) == 1 else f"{part}.* ({len(found)})"
        for part, found in groups.items()
    ]
    more = ", …" if len(said) > _LISTED else ""
    return f"{', '.join(said[:_LISTED])}{more}"


def packed_entries(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries `{method, options, shape, …}` of an artifact's `quantization_config`.

    Raises:
        CheckpointError: a newer format, or entries that say too little.
    """
    version = quantization.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"format_version is {_brief(version)}, expected a number up to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the artifact has format {version}, this spectool reads up to {FORMAT_VERSION}",
            hint="install a newer spectool",
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict):
        raise CheckpointError(f"modules is {_brief(modules)}, expected an object")
    for key in ("source", "made_by"):
        if not isinstance(quantization.get(key) or {}, dict):
            raise CheckpointError(f"{key} is {_brief(quantization[key])}, expected an object")
    for name, said in modules.items():
        wanted = _wanting(name, said)
        if wanted is not None:
            raise CheckpointError(f"the entry of {name} is {_brief(said)}, expected {wanted}")
    return modules


def _wanting(name: str, said: Any) -> str | None:
    """What a packed matrix's entry fails to be; None if it is one."""
    if not isinstance(said, dict):
        return "an object"
    if not isinstance(said.get("method"), str) or not isinstance(said.get("options"), dict):
        return "a method and its options"
    shape = said.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        return "a shape of two numbers"
    if not all(type(length) is int and length > 0 for length in shape):
        return "a shape of two numbers"
    if "tied" in said and not isinstance(said["tied"], str):
        return "the name of the matrix that it is tied to"
    if said.get("expert") and not name.rpartition(".")[2].isdecimal():
        return "a name that ends with the expert's number"
    return None


def _brief(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_header(
    path: Path, *, guard: Guard | None = None
) -> tuple[dict[str, str], list[TensorEntry]]:
    """The metadata and the tensors of one safetensors file, in the order of their bytes.

    `guard` goes with all of them.

    Raises:
        CheckpointError: the file is absent, empty or cut, or its header contradicts it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
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
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = [_entry(path, 8 + length, name, said, guard) for name, said in header.items()]
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
    path: Path, base: int, name: str, said: dict[str, Any], guard: Guard | None
) -> TensorEntry:
    shape = tuple(int(length) for length in said["shape"])
    first, last = said["data_offsets"]
    bits = math.prod(shape) * DTYPE_BITS[said["dtype"]]
    if min(shape, default=0) < 0 or first < 0 or 8 * (last - first) != bits:
        raise CheckpointError(
            f"{path}: {name} is {said['dtype']} {list(shape)}, which is not {last - first} bytes; "
            "the header is damaged"
        )
    return TensorEntry(
        name=name,
        dtype=said["dtype"],
        shape=shape,
        path=path,
        start=base + first,
        num_bytes=last - first,
        guard=guard,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: absent, unreadable, or not one JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return found


def read_layout(path: Path, *, check: bool = True) -> Layout:
    """Configuration and headers of the checkpoint in directory `path`.

    With `check`, an artifact's files are compared with their checksums when tensors are read.

    Raises:
        CheckpointError: no directory, no configuration, no safetensors weights, a damaged file, or
            an index that names absent files or tensors; or something else than a checkpoint.
        UnsupportedError: a drafter, an encoder-decoder or a diffusion pipeline.
    """
    foreign.check_place(path)
    config = read_json(path / "config.json")
    foreign.check_config(path, config)
    _check_objects(path, config)
    weights = _weights(path, config)
    stored = read_checksums(weights) if weights.name == PACKED_INDEX else {}
    if weights.suffix == ".safetensors":
        metadata, entries = read_header(weights)
        tensors = {entry.name: entry for entry in entries}
    else:
        metadata, tensors = read_shards(weights, stored if check else {})
    if not any(entry.num_elements for entry in tensors.values()):
        raise CheckpointError(f"{path}: its weight files hold no tensors with values")
    return Layout(path=path, config=config, tensors=tensors, metadata=metadata, checksums=stored)


def _weights(path: Path, config: Mapping[str, Any]) -> Path:
    """The file of weights or the index of its shards, where transformers looks for it too.

    A single file comes before an index, which may be left over from an earlier save.

    Raises:
        CheckpointError: there is none.
    """
    named = config.get("transformers_weights")
    if (_quantization(config) or {}).get("quant_method") == "spectool":
        names = [PACKED_INDEX]
    elif isinstance(named, str):
        if Path(named).name != named or not named.endswith((".safetensors", INDEX_SUFFIX)):
            raise CheckpointError(
                f"{path}: config.json: transformers_weights is {_brief(named)}, expected a "
                "safetensors file or index beside it"
            )
        names = [named]
    else:
        names = [DENSE_FILE, DENSE_INDEX]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise foreign.without_weights(path, " or ".join(names))
    return found


def read_checksums(index: Path) -> dict[str, Checksums]:
    """The checksums of an artifact's files by name, out of its index; none where it has none.

    Raises:
        CheckpointError: they cannot be read.
    """
    metadata = read_json(index).get("metadata")
    said = metadata.get("checksums") if isinstance(metadata, dict) else None
    return checksums.parse(said, index)


def read_shards(
    index: Path, stored: Mapping[str, Checksums]
) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """The metadata of all files that an index names, and their tensors by name.

    Like transformers, which reads all tensors of these files, whichever of them the index names.
    Files are guarded by the checksums in `stored`, if there are any.

    Raises:
        CheckpointError: a damaged index or file, or one without a checksum among others with one.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map does not map tensors to file names")
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if path.name != file or "\0" in file:
            raise CheckpointError(f"{index}: names {file!r}, which is not a file beside it")
        own, entries = read_header(path, guard=checksums.guard(path, stored))
        metadata.update(own)
        tensors.update((entry.name, entry) for entry in entries)
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: says that {name} is in {file}, but it is not")
    return metadata, tensors
