"""`spectool inspect PATH`: contents, stored bits and origin of a directory."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectool import methods
from spectool.checkpoint.checksums import Checksums, parse
from spectool.checkpoint.headers import (
    CERTIFICATE,
    HEADS,
    HEADS_FILE,
    TRAINING,
    Layout,
    read_json,
)
from spectool.cli.common import Output
from spectool.cli.train_heads import calibration_lines, judge_lines
from spectool.distill.options import (
    AcceptanceOptions,
    HeadsOptions,
    JudgeOptions,
    WeightsOptions,
)
from spectool.errors import CheckpointError, UsageError
from spectool.files import size
from spectool.options import Config, command_words, option, options_of
from spectool.quantize.options import ComputeOptions, QuantizeOptions
from spectool.shared_options import LoadOptions, PlaceOptions, WriteOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(Config):
    """Options of `inspect`: the directory, and the parts of it to show."""

    path: Path = option(..., "Directory of a checkpoint or of draft heads", argument=True)
    layers: bool = option(False, "List every quantized matrix", switch=True)
    checksums: bool = option(
        False, "Read all files and verify their SHA-256 checksums", switch=True
    )


def inspect(output: Output, options: InspectOptions) -> None:
    """Show contents, stored bits and origin of a checkpoint or draft heads, from headers only."""
    from spectool.checkpoint import checksums

    path = options.path
    described = _describe_heads if (path / HEADS).is_file() else _describe_checkpoint
    result, stored, lines = described(path)
    if options.checksums:
        checksums.verify(path, stored)
    sums = {name: each.sha256 for name, each in stored.items()}
    result["checksums"] = {"checked": options.checksums, "sha256": sums} if stored else None
    for line in lines:
        output.show(line)
    if result["command"]:
        output.show(f"made by: {result['command']}")
    if options.checksums:
        files = "1 file" if len(stored) == 1 else f"{len(stored)} files"
        output.show(f"checksums: {files} verified")
    for module in result.get("modules", ()) if options.layers else ():
        shape = "x".join(map(str, module["shape"]))
        output.show(f"{module['name']}  {module['method']}  {shape}  {module['bits']:.4f} bits")
    output.result(result)


# A result for --json, the checksums of the files, and lines about the result.
Description = tuple[dict[str, Any], Mapping[str, Checksums], Iterator[str]]


def _describe_checkpoint(path: Path) -> Description:
    from spectool.checkpoint.headers import find_extra_blocks, read_layout
    from spectool.quantize.ledger import measure

    layout = read_layout(path, seq2seq=True)
    training, stored = _read_training(layout), layout.checksums
    if training is not None:
        stored = parse(training.get("checksums"), path / TRAINING)
    ledger = measure(layout)
    quantization = layout.quantization or {}
    kind = "packed" if layout.is_packed else "quantized elsewhere" if quantization else "dense"
    methods = sorted({entry.method for entry in ledger.entries})
    # Formats of other tools may store several weights in one element, so that counting elements
    # would not count parameters.
    counted = bool(layout.is_packed or not quantization)
    result: dict[str, Any] = {
        "kind": kind,
        "method": ", ".join(methods) or quantization.get("quant_method"),
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
        "certificate": _read_certificate(path),
    }
    of_blocks = any(entry.outside for entry in ledger.entries)
    return result, stored, _checkpoint_lines(path, result, training, of_blocks)


def _checkpoint_lines(
    path: Path, result: dict[str, Any], training: dict[str, Any] | None, of_blocks: bool
) -> Iterator[str]:
    """Yield the lines about a checkpoint; `of_blocks`: matrices outside them are packed too."""
    from spectool.checkpoint.headers import summarize_names

    method, bits = result["method"], result["bits_per_weight"]
    holds = f" ({method or 'unnamed'}),"
    if result["parameters"] is not None:
        holds = f", {result['parameters'] / 1e6:.2f} M parameters in"
    yield f"{path}: {result['kind']} {result['model_type']}{holds} {size(result['bytes'])}"
    if bits["linears"] is not None:
        yield (
            f"{len(result['modules'])} quantized matrices ({method}): {bits['linears']:.4f} bits "
            f"per weight{' of the blocks' if of_blocks else ''}"
        )
    if bits["file"] is not None:
        yield f"the whole file: {bits['file']:.4f} bits per parameter"
    if unused := result["unused"]:
        yield (
            f"{len(unused)} tensors beyond the blocks that config.json counts, which a run "
            f"leaves out: {summarize_names(unused)}"
        )
    if training is not None:
        yield _training_line(path, training)
    if source := result["source"]:
        yield f"source: {source.get('fingerprint', 'without a fingerprint')}"
    if certificate := result["certificate"]:
        yield _certificate_line(path, certificate)


def _read_certificate(path: Path) -> dict[str, Any] | None:
    """Read what `bench --certify FILE --attach` added, without its measurements of single passes.

    Raises:
        CheckpointError: the certificate cannot be read.
    """
    if not (path / CERTIFICATE).is_file():
        return None
    found = read_json(path / CERTIFICATE)
    return {key: value for key, value in found.items() if key not in ("rows", "texts", "laws")}


def _certificate_line(path: Path, found: dict[str, Any]) -> str:
    """Say what a certificate promises and whether it was kept.

    Raises:
        CheckpointError: the certificate is incomplete.
    """
    try:
        kept = "kept" if not found["broken"] else f"not kept ({'; '.join(found['broken'])})"
        widths, batches = found["widths"], found["batch_sizes"]
        promises = "; ".join(
            f"{', '.join(kinds)} with layers by {forward}"
            for forward, kinds in found["promises"].items()
        )
        return (
            f"certificate: {promises} of {', '.join(found['drafters'])} promised to be plain "
            f"decoding's, and {kept}: {found['dtype']}, {found['runtime']}, "
            f"passes of up to {max(widths)} nodes and "
            f"{max(batches)} texts, {found['tokens']} tokens of {found['prompts']} prompts compared"
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CERTIFICATE} is not a certificate") from error


def _read_training(layout: Layout) -> dict[str, Any] | None:
    """Read the record of the training that wrote a checkpoint of ours, if there is one.

    Raises:
        CheckpointError: the record cannot be read.
    """
    path = layout.path / TRAINING
    ours = layout.is_packed or not layout.quantization
    return read_json(path) if ours and path.is_file() else None


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
        source = f" from the teacher {record['teacher']}" if record["teacher"] else ""
        options = ", ".join(f"{name}={value}" for name, value in record["options"].items())
        method = f"{record['method']} ({options})" if options else record["method"]
        return (
            f"trained with {method}{source} on text {record['data']}: best "
            f"after {best['step']} of {last['step']} steps, held-out {key} {first[key]:.4f} to "
            f"{best[key]:.4f}"
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / TRAINING} is not the record of a training") from error


def _describe_heads(path: Path) -> Description:
    from spectool.checkpoint.headers import read_header

    record = read_json(path / HEADS)
    entries = read_header(path / HEADS_FILE)[1]
    result = {
        **record,
        "kind": "heads",
        "parameters": sum(entry.num_elements for entry in entries if entry.name != "token_map"),
        "bytes": sum(entry.num_bytes for entry in entries),
        "command": heads_command(record),
    }
    return result, parse(record.get("checksums"), path / HEADS), _heads_lines(path, result)


def _heads_lines(path: Path, record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines about draft heads.

    Raises:
        CheckpointError: the record is incomplete.
    """
    yield (
        f"{path}: {record.get('method')} heads, {record['parameters'] / 1e6:.2f} M parameters in "
        f"{size(record['bytes'])}"
    )
    try:
        if record["method"] in methods.list_methods("head"):
            training = record["training"]
            is_judge = record["method"] == "judge"
            yield from (
                judge_lines(training) if is_judge else calibration_lines(training["calibration"])
            )
            yield f"trained for: {record['target']['lineage']} and its quantized versions"
            yield f"with the draft model: {record['target']['draft_model']['lineage']}"
            return
        accuracy = " ".join(f"{share:.1%}" for share in record["accuracy"])
        yield f"held-out accuracy by head: {accuracy}"
        if conditional := " ".join(f"{share:.1%}" for share in record.get("conditional") or ()):
            yield f"held-out accuracy given that earlier heads were right: {conditional}"
        yield f"trained for: {record['target']['lineage']} and its quantized versions"
        for nodes in (8, 16, 32, 64):
            if nodes <= len(record["tree"]):
                speed = 1 + sum(record["shares"][:nodes])
                yield f"best tree of {nodes} nodes: about {speed:.2f} tokens per forward"
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {HEADS} is not the record of draft heads") from error


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
    options: type[Config] = HeadsOptions
    if record["method"] in methods.list_methods("head"):
        options, training["draft_model"] = AcceptanceOptions, "DRAFT"
        if record["method"] == "judge":
            options = JudgeOptions
    given = [
        LoadOptions(model="MODEL", **_recorded(LoadOptions, training)),
        WriteOptions(out=Path("OUT")),
        options(**_recorded(options, training)),
    ]
    words = [*_spectool(training), "train-heads", record["method"], *command_words(*given)]
    return words + _own_words(record["options"])


def _spectool(training: dict[str, Any]) -> list[str]:
    """Return the words that start spectool in as many processes as a training ran in."""
    if (processes := training.get("processes", 1)) == 1:
        return ["spectool"]
    return ["torchrun", "--nproc-per-node", str(processes), "-m", "spectool"]


@_if_complete
def distill_command(record: dict[str, Any]) -> list[str]:
    """Return the command that trains the weights again, from the same source and data."""
    # A stored teacher's file has the texts too.
    data = ("DATA",) if record.get("stored_top_k") is None else ()
    training = {**record, "data": data, "teacher": record["teacher"] and "TEACHER"}
    given = [
        PlaceOptions(model="MODEL", **_recorded(PlaceOptions, training)),
        WriteOptions(out=Path("OUT")),
        WeightsOptions(**_recorded(WeightsOptions, training)),
    ]
    words = [*_spectool(training), "distill", record["method"], *command_words(*given)]
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
