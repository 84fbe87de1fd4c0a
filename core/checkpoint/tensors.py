"""Reading of a checkpoint's tensors, one at a time, and its fingerprint.

Tensors are read into fresh memory. A memory map would keep every page that was read resident, but
a block-wise run must hold one block at a time.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spectool.checkpoint import hub
from spectool.checkpoint.checksums import Guard
from spectool.checkpoint.headers import Layout, TensorEntry, read_header, read_layout
from spectool.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

# Bytes read at once. Larger pieces are no faster, and memory that a thread frees stays allocated.
CHUNK = 1 << 22

# Keys of config.json that do not change what the weights compute, or that spectool writes.
UNHASHED = {"quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint directory, with the conditions under which it was opened.

    `name`: as the user gave it. `revision`: the hub's commit, None for a local directory.
    `trust_remote_code`: Python code that comes with it may run. `checksums`: files of spectool's
    own, its draft heads' too, are compared with their checksums. `seq2seq`: it may be an
    encoder-decoder.
    """

    layout: Layout
    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    checksums: bool = True
    seq2seq: bool = False
    # Cache of `fingerprint`, which reads every byte; a list since the class is frozen.
    _fingerprints: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.layout.path

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor in its stored dtype.

        Raises:
            CheckpointError: the dtype is not supported, or the file shrank meanwhile.
        """
        return read_tensor(self.layout.tensors[name])

    def fingerprint(self) -> str:
        """Return `sha256:...` of configuration, tensor names, dtypes, shapes and all bytes.

        The distribution of tensors over files does not matter.
        """
        if not self._fingerprints:
            entries = sorted(self.layout.tensors.values(), key=lambda entry: entry.name)
            # Threads: hashing releases the interpreter lock and takes about 1.4 GB/s per core.
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(_hash_tensor, entries))
            config = {key: self.layout.config[key] for key in self.layout.config.keys() - UNHASHED}
            tensors = [
                (entry.name, entry.dtype, entry.shape, digest)
                for entry, digest in zip(entries, digests, strict=True)
            ]
            self._fingerprints.append(hash_json([config, tensors]))
        return self._fingerprints[0]


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
    headers_only: bool = False,
    seq2seq: bool = False,
) -> Checkpoint:
    """Open the checkpoint in a local directory, or of a hub id, downloaded if necessary.

    `checksums`: compare each file of an artifact with its checksum before the first read.
    `headers_only`: download no weights. `seq2seq`: accept encoder-decoders that can be decoded.

    Raises:
        CheckpointError: see `read_layout`, `hub.fetch` and `hub.remote_layout`.
        UnsupportedError: see `read_layout`.
    """
    is_local = hub.is_local(model)
    if headers_only and not is_local:
        layout = hub.remote_layout(str(model), revision)
    else:
        path = Path(model) if is_local else hub.fetch(str(model), revision, code=trust_remote_code)
        layout = read_layout(path, check=checksums, seq2seq=seq2seq)
    return Checkpoint(
        layout,
        str(model),
        revision=None if is_local else layout.path.name,
        trust_remote_code=trust_remote_code,
        checksums=checksums,
        seq2seq=seq2seq,
    )


def read_tensors(path: Path, *, guard: Guard | None = None) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file; `guard` compares the file with its checksum first.

    Raises:
        CheckpointError: the file is damaged.
    """
    return {entry.name: read_tensor(entry) for entry in read_header(path, guard=guard)[1]}


def read_tensor(entry: TensorEntry, *, rows: slice | None = None) -> torch.Tensor:
    """Read a tensor from its file, or a slice of its rows. Raises as `Checkpoint.read`."""
    start, num_bytes, shape = entry.start, entry.num_bytes, entry.shape
    if rows is not None:
        row_bytes = entry.num_bytes // entry.shape[0]
        shape = (rows.stop - rows.start, *entry.shape[1:])
        start, num_bytes = start + rows.start * row_bytes, shape[0] * row_bytes
    data = torch.empty(num_bytes, dtype=torch.uint8)
    with entry.open() as file:
        file.seek(start)
        if num_bytes and file.readinto(data.numpy().data) != num_bytes:
            raise CheckpointError(f"{entry.path}: ended inside {entry.name}")
    return data.view(torch_dtype(entry)).view(shape)


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """Return torch's dtype of a stored tensor.

    Raises:
        CheckpointError: spectool does not read this dtype.
    """
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.path}: {entry.name} has the unknown dtype {entry.dtype}")
    return DTYPES[entry.dtype]


def read_rows(entry: TensorEntry, rows: Sequence[int]) -> torch.Tensor:
    """Read the rows of these numbers of a stored matrix, [rows, columns].

    Raises:
        CheckpointError: the matrix has no such row.
    """
    for row in rows:
        if not 0 <= row < entry.shape[0]:
            raise CheckpointError(
                f"{entry.path}: {entry.name} has {entry.shape[0]} rows, and row {row} was asked for"
            )
    return torch.cat([read_tensor(entry, rows=slice(row, row + 1)) for row in rows])


def same_values(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors hold the same values; True if only headers were downloaded."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if not (first.path.is_file() and second.path.is_file()):
        return True
    # Cached: a run opens a checkpoint several times. The stamps make the cache notice a write.
    return _compare(first, second, _stamp(first.path), _stamp(second.path))


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return inode, size and modification time of a file."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _compare(first: TensorEntry, second: TensorEntry, *stamps: tuple[int, int, int]) -> bool:
    """Compare the values of two stored tensors of one shape and dtype."""
    if not first.shape:
        return torch.equal(read_tensor(first), read_tensor(second))
    step = max(1, CHUNK * first.shape[0] // max(1, first.num_bytes))
    for start in range(0, first.shape[0], step):
        rows = slice(start, min(start + step, first.shape[0]))
        if not torch.equal(read_tensor(first, rows=rows), read_tensor(second, rows=rows)):
            return False
    return True


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    # torch has neither `sum` nor `isfinite` for 8-bit floats.
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    # The sum is not finite if any element is not; since it may also overflow, the elements are then
    # tested one by one. Half types are summed in float32 without a temporary of the tensor's size.
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(tensor.sum(dtype=wide))) or bool(torch.isfinite(tensor).all())


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise a CheckpointError if weights are NaN or infinite."""
    if not all_finite(tensor):
        tensor = tensor.float() if tensor.element_size() == 1 else tensor
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite")


def _hash_tensor(entry: TensorEntry) -> str:
    """Return the SHA-256 of a stored tensor's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in read_pieces(entry):
        digest.update(piece.numpy().data)
    return digest.hexdigest()


def read_pieces(entry: TensorEntry) -> Iterator[torch.Tensor]:
    """Yield a stored tensor's bytes, `CHUNK` at a time, in a buffer that the next ones replace."""
    buffer = torch.empty(min(CHUNK, entry.num_bytes), dtype=torch.uint8)
    with entry.open() as file:
        for start in range(0, entry.num_bytes, CHUNK):
            piece = buffer[: entry.num_bytes - start]
            if file.readinto(piece.numpy().data) != len(piece):
                raise CheckpointError(f"{entry.path}: ended inside {entry.name}")
            yield piece


def hash_json(value: Any) -> str:
    """Return `sha256:...` of a JSON value, such as lists of token ids."""
    text = json.dumps(value, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
