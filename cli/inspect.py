"""`spectool inspect PATH`: contents, stored bits and origin of a directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool.checkpoint.headers import HEADS, HEADS_FILE, TRAINING, Layout, read_json
from spectool.cli.common import Output, size
from spectool.distill.options import HeadsOptions, WeightsOptions
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
    if (options.path / HEADS).is_file():
        _inspect_heads(output, options)
    else:
        _inspect_checkpoint(output, options)


def _inspect_checkpoint(output: Output, options: InspectOptions) -> None:
    from spectool.checkpoint import checksums
    from spectool.checkpoint.headers import find_extra_blocks, read_layout, summarize_names
    from spectool.quantize.ledger import measure

    path, layout = options.path, read_layout(options.path)
    training = _read_training(layout)
    stored = layout.checksums
    if training is not None:
        stored = checksums.parse(training.get("checksums"), path / TRAINING)
    if options.checksums:
        checksums.verify(path, stored)
    ledger = measure(layout)
    quantization = layout.quantization or {}
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
        **_origin(layout, training),
        "checksums": _sums(stored, options.checksums),
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
    if training is not None:
        output.show(_training_line(path, training))
    if source := result["source"]:
        output.show(f"source: {source.get('fingerprint', 'without a fingerprint')}")
    _show_origin(output, result["command"], options, stored)
    if options.layers:
        for entry in ledger.entries:
            shape = "x".join(map(str, entry.shape))
            output.show(f"{entry.name}  {entry.method}  {shape}  {entry.bits:.4f} bits")
    output.result(result)


def _read_training(layout: Layout) -> dict[str, Any] | None:
    """Read the record of the training that wrote a dense checkpoint, if there is one.

    Raises:
        CheckpointError: the record cannot be read.
    """
    path = layout.path / TRAINING
    return read_json(path) if path.is_file() and not layout.quantization else None


def _origin(layout: Layout, training: dict[str, Any] | None) -> dict[str, Any]:
    """Return from what and how a checkpoint was made, as far as its files tell."""
    if training is not None:
        others = ("source", "checksums", "files", "format_version")
        return {
            "source": training.get("source"),
            "made_by": {key: value for key, value in training.items() if key not in others},
            "command": distill_command(training),
        }
    record = (layout.is_packed and layout.quantization) or {}
    made_by = record.get("made_by")
    command = quantize_command(made_by) if made_by else None
    return {"source": record.get("source") or None, "made_by": made_by, "command": command}


def _training_line(path: Path, record: dict[str, Any]) -> str:
    """Say what a training changed a checkpoint with, and what it gained.

    Raises:
        CheckpointError: the record is incomplete.
    """
    try:
        first, *_, last = record["evaluations"]
        best, key = record["best"], "kl" if record["teacher"] else "perplexity"
        taught = f" from the teacher {record['teacher']}" if record["teacher"] else ""
        options = ", ".join(f"{name}={value}" for name, value in record["options"].items())
        return (
            f"trained with {record['method']} ({options}){taught} on text {record['data']}: best "
            f"after {best['step']} of {last['step']} steps, held-out {key} {first[key]:.4f} to "
            f"{best[key]:.4f}"
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / TRAINING} is not the record of a training") from error


def _show_origin(
    output: Output, command: str | None, options: InspectOptions, stored: Mapping[str, Any]
) -> None:
    """Print the command that makes a directory again, and that its files were verified."""
    if command:
        output.show(f"made by: {command}")
    if options.checksums:
        files = "1 file" if len(stored) == 1 else f"{len(stored)} files"
        output.show(f"checksums: {files} verified")


def _sums(stored: Mapping[str, Any], checked: bool) -> dict[str, Any] | None:
    """Return the SHA-256 of each file for programs, and whether it was compared just now."""
    if not stored:
        return None
    return {"checked": checked, "sha256": {name: each.sha256 for name, each in stored.items()}}


def _inspect_heads(output: Output, options: InspectOptions) -> None:
    from spectool.checkpoint import checksums
    from spectool.checkpoint.headers import read_header

    path = options.path
    record = read_json(path / HEADS)
    entries = read_header(path / HEADS_FILE)[1]
    stored = checksums.parse(record.get("checksums"), path / HEADS)
    if options.checksums:
        checksums.verify(path, stored)
    result = {
        **record,
        "kind": "heads",
        "parameters": sum(entry.num_elements for entry in entries if entry.name != "token_map"),
        "bytes": sum(entry.num_bytes for entry in entries),
        "command": heads_command(record),
        "checksums": _sums(stored, options.checksums),
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
    _show_origin(output, result["command"], options, stored)
    output.result(result)


def _if_complete(make: Callable[[dict[str, Any]], list[str]]) -> Callable[..., str | None]:
    """Return a function that joins the words made of a record; None if it is incomplete."""

    def command(record: dict[str, Any]) -> str | None:
        try:
            return shlex.join(make(record))
        except (KeyError, TypeError, AttributeError, UsageError):
            return None

    return command


@_if_complete
def heads_command(record: dict[str, Any]) -> list[str]:
    """Return the command that trains the heads again, from the same target and data."""
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
    return words + _own_words(record["options"])


@_if_complete
def distill_command(record: dict[str, Any]) -> list[str]:
    """Return the command that trains the weights again, from the same source and data."""
    training = {**record, "data": ("DATA",), "teacher": record["teacher"] and "TEACHER"}
    given = [
        PlaceOptions(model="MODEL", **_recorded(PlaceOptions, training)),
        WriteOptions(out=Path("OUT")),
        WeightsOptions(**_recorded(WeightsOptions, training)),
    ]
    words = ["spectool", "distill", record["method"], *command_words(*given)]
    return words + _own_words(record["options"])


@_if_complete
def quantize_command(made_by: dict[str, Any]) -> list[str]:
    """Return the command that packs it again, from a source with the same fingerprint."""
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
        **{f"preprocess_{key}": preprocess[key] for key in ("steps", "rank", "rate") if preprocess},
    )
    threads = calibration.get("threads")
    given = [
        PlaceOptions(model="MODEL", device=made_by["device"], threads=threads),
        WriteOptions(out=Path("OUT")),
        options,
    ]
    words = ["spectool", "quantize", made_by["method"], *command_words(*given)]
    return words + _own_words(made_by["options"])


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
