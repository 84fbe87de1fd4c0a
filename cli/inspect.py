"""`spectool inspect PATH`: contents, stored bits and origin of a directory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.cli.common import Output, size
from spectool.distill.options import HeadsOptions
from spectool.errors import CheckpointError, UsageError
from spectool.options import Config, command_words, option, options_of
from spectool.quantize.options import ComputeOptions, QuantizeOptions
from spectool.shared_options import LoadOptions, PlaceOptions, WriteOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(Config):
    """What is shown of which directory."""

    path: Path = option(..., "Directory of a checkpoint or of draft heads", argument=True)
    layers: bool = option(False, "List every quantized matrix", switch=True)
    checksums: bool = option(
        False, "Read all files and verify their SHA-256 checksums", switch=True
    )


def inspect(output: Output, options: InspectOptions) -> None:
    """Show contents, stored bits and origin of a checkpoint or draft heads, from headers only."""
    path = options.path
    from spectool.checkpoint import checksums

    if (path / HEADS).is_file():
        _inspect_heads(output, path, options.checksums)
        return
    from spectool.checkpoint.headers import find_extra_blocks, read_layout, summarize_names
    from spectool.quantize.ledger import measure

    layout = read_layout(path)
    if options.checksums:
        checksums.verify(path, layout.checksums)
    ledger = measure(layout)
    quantization = layout.quantization or {}
    made_by = quantization.get("made_by") if layout.is_packed else None
    again = command(made_by) if made_by else None
    source = (quantization.get("source") or None) if layout.is_packed else None
    kind = "packed" if layout.is_packed else "quantized elsewhere" if quantization else "dense"
    methods = sorted({entry.method for entry in ledger.entries})
    method = ", ".join(methods) or quantization.get("quant_method")
    # Formats of other tools may store several weights in one element, so that counting elements
    # would not count parameters.
    counted = bool(layout.is_packed or not quantization)
    result: dict[str, Any] = {
        "kind": kind,
        "method": method,
        "model_type": layout.config.get("model_type"),
        "parameters": ledger.num_parameters if counted else None,
        "bytes": ledger.file_bytes,
        "bits_per_weight": {
            "linears": ledger.linears,
            "file": ledger.file if counted else None,
        },
        "modules": [
            {
                "name": entry.name,
                "method": entry.method,
                "shape": list(entry.shape),
                "bytes": entry.num_bytes,
                "bits": entry.bits,
            }
            for entry in ledger.entries
        ],
        "unused": find_extra_blocks(layout),
        "source": source,
        "made_by": made_by,
        "command": again,
        "checksums": _sums(layout.checksums, options.checksums),
    }
    holds = (
        f", {ledger.num_parameters / 1e6:.2f} M parameters in"
        if counted
        else f" ({method or 'unnamed'}),"
    )
    output.show(f"{path}: {kind} {result['model_type']}{holds} {size(ledger.file_bytes)}")
    if ledger.linears is not None:
        output.show(
            f"{len(ledger.entries)} quantized matrices ({method}): {ledger.linears:.4f} bits "
            f"per weight{' of the blocks' if any(e.outside for e in ledger.entries) else ''}"
        )
    if counted:
        output.show(f"the whole file: {ledger.file:.4f} bits per parameter")
    if unused := result["unused"]:
        output.show(
            f"{len(unused)} tensors beyond the blocks that config.json counts, which a run "
            f"leaves out: {summarize_names(unused)}"
        )
    if source:
        output.show(f"source: {source.get('fingerprint', 'without a fingerprint')}")
    if again:
        output.show(f"made by: {again}")
    if options.checksums:
        output.show(f"checksums: {_count_files(layout.checksums)} verified")
    if options.layers:
        for entry in ledger.entries:
            shape = "x".join(map(str, entry.shape))
            output.show(f"{entry.name}  {entry.method}  {shape}  {entry.bits:.4f} bits")
    output.result(result)


def _sums(stored: Mapping[str, Any], checked: bool) -> dict[str, Any] | None:
    """Return the SHA-256 of each file for programs, and whether it was compared just now."""
    if not stored:
        return None
    return {"checked": checked, "sha256": {name: each.sha256 for name, each in stored.items()}}


def _count_files(stored: Mapping[str, Any]) -> str:
    return "1 file" if len(stored) == 1 else f"{len(stored)} files"


def _inspect_heads(output: Output, path: Path, check: bool) -> None:
    from spectool.checkpoint import checksums
    from spectool.checkpoint.headers import read_header, read_json

    record = read_json(path / HEADS)
    entries = read_header(path / HEADS_FILE)[1]
    stored = checksums.parse(record.get("checksums"), path / HEADS)
    if check:
        checksums.verify(path, stored)
    result = {
        **record,
        "kind": "heads",
        "parameters": sum(entry.num_elements for entry in entries if entry.name != "token_map"),
        "bytes": sum(entry.num_bytes for entry in entries),
        "command": heads_command(record),
        "checksums": _sums(stored, check),
    }
    output.show(
        f"{path}: {record.get('method')} heads, {result['parameters'] / 1e6:.2f} M parameters in "
        f"{size(result['bytes'])}"
    )
    try:
        accuracy = " ".join(f"{share:.1%}" for share in record["accuracy"])
        output.show(f"held-out accuracy by head: {accuracy}")
        if conditional := " ".join(f"{share:.1%}" for share in record.get("conditional") or ()):
            output.show(f"held-out accuracy given that earlier heads were right: {conditional}")
        output.show(f"trained for: {record['target']['lineage']} and its quantized versions")
        for nodes in (8, 16, 32, 64):
            if nodes <= len(record["tree"]):
                output.show(
                    f"best tree of {nodes} nodes: about {1 + sum(record['shares'][:nodes]):.2f} "
                    "tokens per forward"
                )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {HEADS} is not the record of draft heads") from error
    if result["command"]:
        output.show(f"made by: {result['command']}")
    if check:
        output.show(f"checksums: {_count_files(stored)} verified")
    output.result(result)


def heads_command(record: dict[str, Any]) -> str | None:
    """Return the command that trains the heads again, from the same target and data.

    None if the record is incomplete.
    """
    try:
        # Paths and addresses are not recorded.
        training = {**record["training"], "data": ("DATA",)}
        if training.get("init_from"):
            training["init_from"] = "HEADS"
        if training.get("features") == "offline":
            training["features"] = "offline:FEATURES"
        if training.get("regenerate_model"):
            training["regenerate_url"] = "http://HOST:PORT/v1"
        given = [
            LoadOptions(model="MODEL", **_recorded(LoadOptions, training)),
            WriteOptions(out=Path("OUT")),
            HeadsOptions(**_recorded(HeadsOptions, training)),
        ]
        words = ["spectool"]
        if (processes := training.get("processes", 1)) > 1:
            words = ["torchrun", "--nproc-per-node", str(processes), "-m", "spectool"]
        words += ["train-heads", record["method"], *command_words(*given)]
        return shlex.join(words + _own_words(record["options"]))
    except (KeyError, TypeError, AttributeError, UsageError):
        return None


def command(made_by: dict[str, Any]) -> str | None:
    """Return the command that makes the artifact again, from a source with the same fingerprint.

    None if the record is incomplete.
    """
    try:
        calibration, budget = made_by["calibration"] or {}, made_by["budget"] or {}
        preprocess = made_by.get("preprocess") or {}
        options = QuantizeOptions(
            # Texts and the rules' file are not recorded by name.
            calibration=("TEXT",) if calibration and not calibration["builtin"] else (),
            preprocess=("TEXT",) if preprocess else (),
            rules=Path("RULES") if made_by["rules"] else None,
            embeddings=made_by["embeddings"] and _quantizer(made_by["embeddings"]),
            lm_head=made_by["lm_head"] and _quantizer(made_by["lm_head"]),
            bits_budget=budget.get("bits"),
            candidate=tuple(map(_quantizer, budget.get("candidates", ()))),
            skip=made_by["skip"],
            allow_dense=made_by["allow_dense"],
            seed=made_by["seed"],
            **_recorded(ComputeOptions, calibration),
            **{
                f"preprocess_{key}": preprocess[key]
                for key in ("steps", "rank", "rate")
                if preprocess
            },
        )
        given = [
            PlaceOptions(
                model="MODEL", device=made_by["device"], threads=calibration.get("threads")
            ),
            WriteOptions(out=Path("OUT")),
            options,
        ]
        words = ["spectool", "quantize", made_by["method"], *command_words(*given)]
        return shlex.join(words + _own_words(made_by["options"]))
    except (KeyError, TypeError, AttributeError, UsageError):
        return None


def _recorded(config: type[Config], record: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a class that a record holds."""
    return {each.name: record[each.name] for each in options_of(config) if each.name in record}


def _own_words(options: dict[str, Any]) -> list[str]:
    """Return a method's own options as words, all of them, since its defaults may change."""
    words: list[str] = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def _quantizer(entry: dict[str, Any]) -> str:
    pairs = [f"{key}={value}" for key, value in entry["options"].items() if value is not None]
    return f"{entry['method']}:{','.join(pairs)}" if pairs else str(entry["method"])
