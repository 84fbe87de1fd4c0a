"""Refusal of what is not a checkpoint, recognized from file names and configuration alone.

Everything that opens a MODEL checks here first, so that a LoRA adapter or a GGUF file is refused
with one line that says what it is and what to do. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectool.errors import CheckpointError, UnsupportedError
from spectool.families import encoder_decoders

HEADS = "spectool_heads.json"
ADAPTER = "adapter_config.json"
PIPELINE = "model_index.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Formats of other programs, by suffix.
FOREIGN = {
    ".onnx": "an ONNX model", ".tflite": "a TensorFlow Lite model", ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights", ".distcp": "the shards of a distributed training",
    ".ggml": "a GGML file", ".engine": "a TensorRT engine",
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

# Architecture names of drafters. Eagle is also a family of vision-language models.
_SPECULATOR = re.compile(r"medusa|speculator|eagle(?!\w*(vl|conditional))|draftmodel", re.I)
_SPECULATOR_KEYS = ("speculators_model_type", "speculators_config", "medusa_num_heads",
                    "eagle_config", "draft_vocab_size")  # fmt: skip

# Keys of counts, as of layers: a list of so many modules is built, so a damaged huge count must be
# refused. Numbers of parameters or of training tokens are large, and nothing is built from them.
_COUNT = re.compile(
    r"(?!.*(param(eter)?s|tokens|samples|examples|steps|flops)$)"
    r"(num_|.*_num_|n_(layer|head)|.*(layers?|depth)$)"
)
MAX_COUNT = 100_000


def check_directory(path: Path) -> None:
    """Raise an InputError if a path is not a checkpoint directory."""
    if path.is_file():
        raise _refuse_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / PIPELINE).is_file():
        kind = _read_object(path / PIPELINE).get("_class_name")
        raise UnsupportedError(
            f"{path}: is a diffusion pipeline{f' ({kind})' if isinstance(kind, str) else ''}, not "
            "a language model",
            hint="spectool handles causal language models",
        )
    refuse_adapter(path)
    if not (path / "config.json").exists():
        raise _refuse_without_config(path)


def check_config(path: Path, config: Mapping[str, Any], *, seq2seq: bool = False) -> None:
    """Raise an InputError if a configuration is not that of a decoder-only model.

    With `seq2seq`, encoder-decoders that can be decoded pass too.
    """
    if is_speculator(config):
        base = _find_base(config)
        name = " ".join(map(str, config.get("architectures") or ())) or config.get("model_type")
        raise UnsupportedError(
            f"{path}: is a drafter{f' ({name})' if name else ''}"
            f"{f' for {base}' if base else ''}, not a model by itself",
            hint="give the model that it drafts for; `spectool train-heads METHOD MODEL OUT "
            f"--init-from {path} --steps 0` reads drafters of the formats that servers use",
        )
    check_encoder_decoder(config, config.get("model_type"), f"{path}: ", seq2seq=seq2seq)
    for key, value in _iterate_numbers(config):
        if _COUNT.match(key) and abs(value) > MAX_COUNT:
            raise CheckpointError(f"{path}: config.json: {key} is {value}, more than any model has")


def check_encoder_decoder(config: Any, kind: Any, where: str, *, seq2seq: bool) -> None:
    """Raise an UnsupportedError for an encoder-decoder, but with `seq2seq` for unknown ones only.

    `config` is as in `is_encoder_decoder`; `where` begins the message.
    """
    if is_encoder_decoder(config) and not (seq2seq and kind in encoder_decoders()):
        known = ", ".join(encoder_decoders())
        raise UnsupportedError(
            f"{where}{kind} is an encoder-decoder; generate and bench decode those of {known}, and "
            "all else is for decoder-only models"
        )


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration (JSON, or of transformers) is of an encoder-decoder."""
    if isinstance(config, Mapping):
        return config.get("is_encoder_decoder") is True
    return bool(getattr(config, "is_encoder_decoder", False))


def is_speculator(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a drafter, in any format."""
    architectures = config.get("architectures")
    names = [config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    return any(key in config for key in _SPECULATOR_KEYS) or any(
        _SPECULATOR.search(name) for name in names if isinstance(name, str)
    )


def refuse_adapter(path: Path) -> None:
    """Raise a CheckpointError if a directory holds a parameter-efficient adapter."""
    if not (path / ADAPTER).is_file():
        return
    adapter_config = _read_object(path / ADAPTER)
    kind, base = adapter_config.get("peft_type"), adapter_config.get("base_model_name_or_path")
    adapter = "a LoRA adapter" if kind == "LORA" else f"a {kind} adapter"
    adapter += f" of {base}" if isinstance(base, str) and base else ""
    if (path / "config.json").is_file():
        # transformers would apply it, other readers would not.
        raise CheckpointError(
            f"{path}: holds {adapter} next to a checkpoint, which some readers would apply",
            hint=f"merge it, or move {ADAPTER} away",
        )
    raise CheckpointError(
        f"{path}: is {adapter}, not a checkpoint",
        hint="merge it into its base with peft first: AutoPeftModelForCausalLM.from_pretrained("
        f"{str(path)!r}).merge_and_unload().save_pretrained(DIRECTORY)",
    )


def check_heads(path: Path) -> None:
    """Raise a CheckpointError if a directory holds no draft heads in spectool's format."""
    if (path / HEADS).is_file():
        return
    if not path.is_dir():
        what = "is a file, not a directory of draft heads" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {what}")
    refuse_adapter(path)
    if is_speculator(_read_object(path / "config.json")):
        raise CheckpointError(
            f"{path}: holds draft heads in another format",
            hint=f"`spectool train-heads METHOD MODEL OUT --init-from {path} --steps 0` reads them",
        )
    kind = "is a checkpoint, not" if (path / "config.json").is_file() else "holds no"
    raise CheckpointError(f"{path}: {kind} draft heads ({HEADS})")


def make_missing_weights_error(path: Path, expected: str) -> CheckpointError:
    """Make the error of a directory with a configuration, but without the weights `expected`."""
    refusal = _refuse_format(path)
    if refusal is not None:
        return refusal
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if files:
        return CheckpointError(
            f"{path}: no {expected}, only {files[0]}",
            hint="files of a checkpoint in several parts come with their index",
        )
    return CheckpointError(f"{path}: no safetensors weights ({expected})")


def _refuse_file(path: Path) -> CheckpointError:
    """Make the error of a file in place of a checkpoint directory."""
    parent_hint = f"give the directory that it lies in: {path.parent}"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        return CheckpointError(f"{path}: cannot be read: {error.strerror}")
    suffix = path.suffix.lower()
    if magic == b"GGUF" or suffix == ".gguf":
        return _refuse_gguf(path)
    if suffix == ".safetensors":
        return CheckpointError(f"{path}: is a file of weights, not a checkpoint", hint=parent_hint)
    if suffix in PICKLES or magic == b"PK\x03\x04" or magic[:1] == b"\x80":
        return _refuse_pickle(path, "is a pickle")
    if suffix in FOREIGN:
        return CheckpointError(f"{path}: is {FOREIGN[suffix]}, not a checkpoint")
    known = path.name == "config.json" or path.name in TOKENIZERS
    return CheckpointError(
        f"{path}: is a file, not a checkpoint directory", hint=parent_hint if known else None
    )


def _refuse_without_config(path: Path) -> CheckpointError:
    """Make the error of a directory without config.json, by what it holds instead."""
    if (path / HEADS).exists():
        return CheckpointError(
            f"{path}: draft heads, not a checkpoint",
            hint=f"give the model that they draft for, and them as --draft {path}",
        )
    if path.name.endswith(".partial"):
        return CheckpointError(
            f"{path}: is what an unfinished run wrote, not a checkpoint",
            hint="the command that was stopped goes on from there when it is given again",
        )
    below = list(_find_checkpoints_below(path))
    if below:
        others = f" and {len(below) - 1} more" if len(below) > 1 else ""
        return CheckpointError(
            f"{path}: has no config.json, but there is a checkpoint below it",
            hint=f"give {below[0]}{others}",
        )
    refusal = _refuse_format(path)
    if refusal is not None:
        return refusal
    if any(path.glob("*.safetensors")):
        return CheckpointError(
            f"{path}: holds weights, but no config.json",
            hint="copy the configuration and the tokenizer of the model into the same directory",
        )
    if any((path / name).is_file() for name in TOKENIZERS):
        return CheckpointError(
            f"{path}: holds a tokenizer, but no model: no config.json and no weights"
        )
    return CheckpointError(f"{path}: no checkpoint: {path / 'config.json'}: no such file")


def _refuse_format(path: Path) -> CheckpointError | None:
    """Make the error of weights in another program's format; None without such weights."""
    if any(path.glob("*.gguf")):
        return _refuse_gguf(path)
    pickles = sorted(file for suffix in PICKLES for file in path.glob(f"*{suffix}"))
    weights = [file for file in pickles if file.name not in ("training_args.bin", "optimizer.pt")]
    if weights:
        return _refuse_pickle(path, f"no safetensors weights, only the pickle {weights[0].name}")
    if (path / "params.json").is_file() and any(path.glob("consolidated*")):
        return CheckpointError(
            f"{path}: holds the publisher's own format (params.json)",
            hint="give the checkpoint in transformers' format, which the publisher offers too",
        )
    for suffix, what in FOREIGN.items():
        if any(path.glob(f"*{suffix}")):
            return CheckpointError(f"{path}: holds {what}, not safetensors weights")
    return None


def _refuse_gguf(path: Path) -> CheckpointError:
    """Make the error of a GGUF file."""
    return CheckpointError(
        f"{path}: is GGUF, a format of llama.cpp, which is not read",
        hint="give the safetensors checkpoint that it was converted from",
    )


def _refuse_pickle(path: Path, what: str) -> CheckpointError:
    """Make the error of pickled weights; `what` describes them."""
    return CheckpointError(
        f"{path}: {what}",
        hint="pickled weights are never read; save the model with safetensors first: "
        "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(DIRECTORY)",
    )


def _find_checkpoints_below(path: Path) -> Iterator[Path]:
    """Yield the directories one level down, or snapshots of a hub cache, with a config.json.

    Numbered ones come first, the highest number (the latest step) at the start.
    """
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    folders += [snap for snap in path.glob("snapshots/*") if snap.is_dir()]
    checkpoints = [folder for folder in folders if (folder / "config.json").is_file()]
    yield from sorted(checkpoints, key=lambda folder: (-_parse_step(folder.name), folder.name))


def _parse_step(name: str) -> int:
    """Return the number at the end of a directory's name; -1 without one."""
    digits = re.search(r"-(\d{1,12})$", name)
    return int(digits[1]) if digits else -1


def _find_base(config: Mapping[str, Any]) -> str | None:
    """Return the name of the model that a drafter's configuration drafts for; None without it."""
    nested = config.get("speculators_config")
    verifier = nested.get("verifier") if isinstance(nested, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    base = name or config.get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def _iterate_numbers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield all numbers of a configuration, nested ones too, as integers with their keys."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _iterate_numbers(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _iterate_numbers(value, key)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, int(config) if abs(config) < float("inf") else MAX_COUNT + 1


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
