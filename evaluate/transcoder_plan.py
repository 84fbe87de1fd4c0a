"""Plan of a transcoder's training and comparison, made before any measure runs, and its file.

Shapes: S windows, L tokens of each.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import read_header
from spectool.checkpoint.tensors import Checkpoint, read_tensors
from spectool.data.windows import Windows
from spectool.errors import CheckpointError, TextError, UsageError
from spectool.evaluate.mlp import MlpNames, choose_mlp
from spectool.evaluate.options import LEAST_TRANSCODER_TOKENS, EvalOptions
from spectool.evaluate.transcoder import Trained, Transcoder
from spectool.files import disk_errors, replacing

HELD_OUT_WINDOWS = 16
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscoderPlan:
    """The reference and its MLP, the windows [S, L] to train on, and those that are held out.

    `path`: the file that keeps the transcoder. `made_of`: all that its numbers depend on, but for
    the seed.
    """

    reference: Checkpoint
    mlp: MlpNames
    train_SL: Tensor
    held_SL: Tensor
    path: Path | None
    made_of: Mapping[str, Any]


def plan_transcoder(
    reference: Checkpoint, windows: Windows, options: EvalOptions, how: Mapping[str, str]
) -> TranscoderPlan:
    """Choose the MLP and the windows, and check the file; `how` the reference computes.

    Raises:
        InputError: there is no such MLP, the text does not do, or the file cannot be written or
            holds something else.
    """
    mlp, path = choose_mlp(reference, options.transcoder_layer), options.transcoder_file
    train_SL, held_SL = split(windows, options.transcoder_tokens)
    made_of = {
        "reference": reference.fingerprint(),
        "layer": mlp.layer,
        "text": Windows((train_SL,), train_SL.shape[1], None).digest(),
        "width": options.transcoder_width,
        "tokens": options.transcoder_tokens,
        **how,
    }
    if path is not None and path.exists():
        read_record(path, made_of)
    elif path is not None:
        if not path.parent.is_dir():
            raise UsageError(f"--transcoder-file {path}: there is no folder {path.parent}")
        with disk_errors(path):
            tempfile.TemporaryFile(dir=path.parent).close()
    return TranscoderPlan(
        reference=reference,
        mlp=mlp,
        train_SL=train_SL,
        held_SL=held_SL,
        path=path,
        made_of=made_of,
    )


def split(windows: Windows, tokens: int) -> tuple[Tensor, Tensor]:
    """Return windows to train on, no more than give `tokens` tokens, and held-out ones [S, L].

    Both are from all over the text, so that they are of the same kinds.

    Raises:
        UsageError: windows may share tokens, or are of many lengths.
        TextError: the text is too short.
    """
    if windows.stride is not None or windows.protocol in ("c4", "documents"):
        name = "--stride" if windows.stride is not None else f"--protocol {windows.protocol}"
        raise UsageError(
            f"--measure transcoder holds out windows of one length that do not overlap: no {name}"
        )
    ids_SL = max(windows.groups, key=len)
    count, usable = len(ids_SL), ids_SL.shape[1] - 1
    held = min(HELD_OUT_WINDOWS, count // 4)
    if held < 2 or (count - held) * usable < LEAST_TRANSCODER_TOKENS:
        raise TextError(
            f"the text has {count} windows of {ids_SL.shape[1]} tokens; a transcoder needs 8 or "
            f"more, and {LEAST_TRANSCODER_TOKENS} tokens to learn from",
            hint="give a longer text with --text, or a smaller --window",
        )
    held_S = torch.linspace(0, count - 1, held).round().long()
    is_free = torch.ones(count, dtype=torch.bool)
    is_free[held_S] = False
    free_S = is_free.nonzero()[:, 0]
    wanted = min(len(free_S), math.ceil(tokens / usable))
    train_S = free_S[torch.linspace(0, len(free_S) - 1, wanted).round().long()]
    return ids_SL[train_S], ids_SL[held_S]


def write_transcoder(path: Path, trained: Trained, made_of: Mapping[str, Any]) -> None:
    """Write a transcoder, and what it was made of, to a file that appears when it is complete."""
    record = {
        "kind": "transcoder",
        "format_version": FORMAT_VERSION,
        "made_of": dict(made_of),
        "tokens": trained.tokens,
        "dead": trained.dead,
        "seconds": trained.seconds,
    }
    tensors = {name: part.cpu() for name, part in trained.transcoder.state_dict().items()}
    with disk_errors(path), replacing(path) as temporary:
        write_safetensors(temporary, tensors, record)


def read_record(path: Path, made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a transcoder's file.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
        UsageError: the transcoder was made of something else.
    """
    try:
        record: dict[str, Any] = json.loads(read_header(path)[0]["spectool"])
        if record["kind"] != "transcoder" or record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: no transcoder that this version reads")
        found = {name: record["made_of"][name] for name in made_of}
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a transcoder's file (--transcoder-file)") from error
    for name, value in made_of.items():
        if found[name] != value:
            raise UsageError(
                f"{path}: its {name} is {found[name]}, and this run's is {value}",
                hint="name another file, in which this run's transcoder is kept",
            )
    return record


def read_transcoder(path: Path, made_of: Mapping[str, Any], device: torch.device) -> Trained:
    """Read a transcoder that `write_transcoder` wrote.

    Raises:
        InputError: see `read_record`.
    """
    record, tensors = read_record(path, made_of), read_tensors(path)
    try:
        transcoder = Transcoder(*tensors["W_enc"].shape)
        transcoder.load_state_dict(tensors)
        return Trained(
            transcoder=transcoder.to(device),
            tokens=record["tokens"],
            dead=record["dead"],
            seconds=record["seconds"],
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a transcoder's file (--transcoder-file)") from error
