"""Wrong headers, truncated files and indices of absent files: one line each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectool.checkpoint.headers import (
    DENSE_FILE,
    DENSE_INDEX,
    PACKED_INDEX,
    Layout,
    read_header,
    read_json,
    read_layout,
)
from spectool.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write(path: Path, header: Any, num_bytes: int, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(raw) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + raw + bytes(num_bytes))
    return path


def refusal(path: Path) -> str:
    """Return the one line of the error that reading this file's header raises."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_header_equals_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.zeros(0, 4, dtype=torch.bfloat16),
        "c": torch.tensor(7, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"key": "value"})
    metadata, entries = read_header(tmp_path / "x.safetensors")
    assert metadata == {"key": "value"}
    found = {entry.name: entry for entry in entries}
    assert {n: (e.dtype, e.shape, e.num_elements) for n, e in found.items()} == {
        "a": ("F32", (2, 3), 6),
        "b": ("BF16", (0, 4), 0),
        "c": ("I64", (), 1),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    entry = found["a"]
    assert data[entry.start : entry.start + entry.num_bytes] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    assert f"{size} bytes, too short" in refusal(path)


def test_absent_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "x.safetensors")


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("length", [17, 10**12, 2**64 - 1])
def test_length_field_beyond_the_file(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", {}, 0, length=length)
    assert "claims" in refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe\xfd",
        [],
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {**F32, "dtype": "F33"}},
        {"a": {**F32, "shape": None}},
        {"a": {**F32, "data_offsets": ["0", "16"]}},
        {"a": {**F32, "data_offsets": [0]}},
        {"a": F32, "__metadata__": 3},
    ],
)
def test_not_a_safetensors_header(tmp_path: Path, header: Any) -> None:
    assert "not a safetensors header" in refusal(write(tmp_path / "x.safetensors", header, 16))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": [2, 3]}, "which is not 16 bytes"),
        ({"dtype": "F16"}, "which is not 16 bytes"),
        ({"shape": [-2, -2]}, "which is not 16 bytes"),
        ({"data_offsets": [16, 0]}, "which is not -16 bytes"),
        ({"data_offsets": [-16, 0]}, "which is not 16 bytes"),
        ({"data_offsets": [4, 20]}, "leaves a gap"),
    ],
)
def test_header_that_lies_about_one_tensor(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    assert message in refusal(write(tmp_path / "x.safetensors", {"a": {**F32, **changed}}, 16))


def test_overlap(tmp_path: Path) -> None:
    header = {"a": F32, "b": {**F32, "data_offsets": [8, 24]}}
    assert "b overlaps" in refusal(write(tmp_path / "x.safetensors", header, 24))


def test_gap_between_tensors(tmp_path: Path) -> None:
    header = {"a": F32, "b": {**F32, "data_offsets": [24, 40]}}
    assert "b leaves a gap" in refusal(write(tmp_path / "x.safetensors", header, 40))


@pytest.mark.parametrize(
    ("num_bytes", "message"), [(15, "truncated"), (0, "truncated"), (17, "longer")]
)
def test_size_that_the_header_does_not_explain(
    tmp_path: Path, num_bytes: int, message: str
) -> None:
    assert message in refusal(write(tmp_path / "x.safetensors", {"a": F32}, num_bytes))


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\udcff"])
def test_json_that_is_no_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)


Broken = Callable[[Path], None]
SHARD = "model-00001-of-00001.safetensors"


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _no_weights(path: Path) -> None:
    (path / DENSE_FILE).unlink()


def _pickled_only(path: Path) -> None:
    (path / DENSE_FILE).rename(path / "pytorch_model.bin")


def _empty_weights(path: Path) -> None:
    write(path / DENSE_FILE, {}, 0)


def _index(path: Path, content: Any) -> None:
    # A single file would come before an index.
    (path / DENSE_FILE).rename(path / SHARD)
    (path / DENSE_INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "no config.json"),
        (_no_weights, "no safetensors weights"),
        (_pickled_only, "no safetensors weights"),
        (_empty_weights, "hold no tensors"),
        (lambda path: _index(path, {}), "has no weight_map"),
        (lambda path: _index(path, {"weight_map": ["a"]}), "has no weight_map"),
        (lambda path: _index(path, {"weight_map": {"a": 3}}), "does not map tensors"),
        (lambda path: _index(path, {"weight_map": {"a": "b.safetensors"}}), "no such file"),
        (lambda path: _index(path, {"weight_map": {"zz": SHARD}}), "says that zz is in"),
        (
            lambda path: _index(path, {"weight_map": {"a": "../x.safetensors"}}),
            "not a file in its directory",
        ),
        (
            lambda path: _index(path, {"weight_map": {"a": "x\0.safetensors"}}),
            "not a file in its directory",
        ),
    ],
)
def test_damaged_directory(tmp_path: Path, damage: Broken, message: str) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / DENSE_FILE)
    (tmp_path / "config.json").write_text("{}")
    assert read_layout(tmp_path).num_bytes == 12
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_layout(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if damage is _pickled_only:
        assert caught.value.hint is not None and "never read" in caught.value.hint


def test_tensors_without_values(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(0, 4)}, tmp_path / DENSE_FILE)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="hold no tensors with values"):
        read_layout(tmp_path)


ENTRY = {"method": "rtn", "options": {"bits": 4}, "shape": [3, 8]}
PACKED = {"quant_method": "spectool", "format_version": 2, "modules": {"a.0": ENTRY}}


def layout_of(tmp_path: Path, config: dict[str, Any]) -> Layout:
    save_file({"a": torch.zeros(3)}, tmp_path / DENSE_FILE)
    (tmp_path / PACKED_INDEX).write_text(json.dumps({"weight_map": {"a": DENSE_FILE}}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_layout(tmp_path)


@pytest.mark.parametrize("source", [None, {}, {"fingerprint": "x"}])
def test_packed_entries_are_found_wherever_they_stand(tmp_path: Path, source: Any) -> None:
    quantization = {**PACKED, "source": source}
    for config in (
        {"quantization_config": quantization},
        {"text_config": {"quantization_config": quantization}},
        {"quantization_config": None, "text_config": {"quantization_config": quantization}},
    ):
        layout = layout_of(tmp_path, config)
        assert layout.is_packed and layout.modules == {"a.0": ENTRY}
    for foreign in ({}, {"quantization_config": {"quant_method": "gptq", "modules": "all"}}):
        layout = layout_of(tmp_path, foreign)
        assert not layout.is_packed and layout.modules == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 3}, "has format 3, this spectool reads up to 2"),
        ({"format_version": None}, "format_version is absent"),
        ({"format_version": "1"}, 'format_version is "1", expected a number'),
        ({"format_version": True}, "format_version is true"),
        ({"format_version": 0}, "format_version is 0"),
        ({"modules": None}, "modules is absent"),
        ({"modules": ["a"]}, r'modules is \["a"\], expected an object'),
        ({"modules": {"a": "rtn"}}, 'the entry of a is "rtn", expected an object'),
        ({"modules": {"a": {**ENTRY, "method": None}}}, "expected a method"),
        ({"modules": {"a": {"method": "rtn", "shape": [3, 8]}}}, "expected a method and its op"),
        ({"modules": {"a": {"method": "rtn", "options": {}}}}, "expected a shape of two"),
        *(
            ({"modules": {"a": {**ENTRY, "shape": shape}}}, "expected a shape of two numbers")
            for shape in (8, [8], [3, 8, 1], [3, 0], [3, -8], [3, 8.0], ["3", "8"], [True, 8])
        ),
        ({"modules": {"a.b": {**ENTRY, "expert": True}}}, "ends with the expert's number"),
        ({"source": "here"}, 'source is "here"'),
        ({"made_by": ["me"]}, r'made_by is \["me"\]'),
    ],
)
def test_packed_configuration_that_says_too_little(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        layout_of(tmp_path, {"quantization_config": {**PACKED, **changed}})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: config.json: ") and "\n" not in message
    if changed == {"format_version": 3}:
        assert caught.value.hint == "install a newer spectool"


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": "spectool"},
        {"quantization_config": ["spectool"]},
        {"text_config": "llama"},
        {"text_config": {"quantization_config": 4}},
    ],
)
def test_configuration_of_the_wrong_kind(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: \w+ is .*, expected an object$"):
        layout_of(tmp_path, config)


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path / "file", "a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_layout(path)


def test_heads_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "spectool_heads.json").write_text("{}")
    with pytest.raises(CheckpointError, match="draft heads"):
        read_layout(tmp_path)


def test_truncated_shard_of_a_sharded_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("llama", max_shard_size="20KB")
    names = sorted(path.name for path in source.glob("model-*.safetensors"))
    assert len(names) > 2
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = tmp_path / names[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_layout(tmp_path)
    last.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        read_layout(tmp_path)
