"""The grammar of `--draft`: drafters joined by +, each with options as `:key=value,key=value`.

A drafter is a name or a path, that of a heads directory or of a smaller checkpoint. The option
`tune` sizes trees by the cost of passes on this machine (`decode/policy/tuned.py`). `auto` is the
heads in the folder `heads` of the target's directory, or else drafters without weights; tuned
either way.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import methods
from spectool.checkpoint import hub
from spectool.checkpoint.headers import HEADS
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.decode.drafters.combined import Combined
from spectool.decode.heads import artifact
from spectool.decode.heads.acceptance import open_acceptance
from spectool.decode.heads.judge import open_judge
from spectool.decode.protocol import Drafter
from spectool.decode.target.base import Target
from spectool.errors import CheckpointError, UsageError
from spectool.model import loading

_AUTO = "trigram+recycle"
# A word at least this similar to a name is a misspelling, else a hub id ("nope" is not "none").
_MISSPELT = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One drafter of a `--draft`.

    `path`: the heads directory, or the checkpoint's directory or hub id. `config` is parsed from
    `options`.
    """

    name: str
    path: str | None
    config: Any
    options: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A parsed `--draft`. `tune` is None where the text does not set it."""

    text: str
    parts: tuple[Part, ...]
    tune: bool | None


def parse_spec(text: str, *, target_dir: Path | None = None) -> DraftSpec:
    """Parse `ngram:nodes=12`, `ngram+recycle:tune`, `./small:depth=4`, `./heads`, `auto`, ...

    `target_dir` is the target's directory, where `auto` looks for heads.

    Raises:
        UsageError: an unknown name, a path that does not exist, an unknown or wrong option.
        CheckpointError: a damaged heads directory.
    """
    tune: bool | None = None
    is_auto = text.partition(":")[0] == "auto"
    if is_auto:
        heads_dir = target_dir / "heads" if target_dir is not None else None
        found = str(heads_dir) if heads_dir is not None and (heads_dir / HEADS).is_file() else _AUTO
        text = found + text[len("auto") :]
    parts = []
    is_path = Path(_split_options(text)[0]).expanduser().is_dir()
    for word in [text] if is_path else text.split("+"):
        name, items = _split_options(word)
        tune_items = [item for item in items if _option_key(item) == "tune"]
        if tune_items:
            tune = tune_items[-1].strip() == "tune" or _parse_bool(tune_items[-1])
        elif tune is None and any(_option_key(item) == "nodes" for item in items):
            # A size set by the user is kept.
            tune = False
        pairs = ",".join(item for item in items if _option_key(item) != "tune")
        parts.append(_parse_part(name, pairs))
    return DraftSpec(text=text, parts=tuple(parts), tune=True if is_auto and tune is None else tune)


def open_drafter(
    spec: DraftSpec,
    *,
    target: Target[Any],
    target_tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool = False,
    checksums: bool = True,
) -> Drafter:
    """Open the drafter of a specification for a target; loads heads or a draft model.

    `allow_other_target` accepts heads that were trained for another checkpoint of the same shape.
    `checksums`: compare files with their checksums.

    Raises:
        InputError: the heads or the checkpoint are damaged, or do not fit the target.
    """
    opened = [
        _open_part(part, target, target_tokenizer, allow_other_target, checksums)
        for part in spec.parts
    ]
    return _combine(spec, opened)


def open_standalone(text: str) -> Drafter:
    """Open the drafter of a specification that names neither heads nor a checkpoint.

    Raises:
        UsageError: it names some, or it is wrong.
    """
    spec = parse_spec(text)
    if any(part.path is not None for part in spec.parts):
        raise UsageError(f"{text!r} needs the model that it drafts for")
    opened = [methods.import_method(part.name, "drafter")(part.config) for part in spec.parts]
    return _combine(spec, opened)


def _combine(spec: DraftSpec, opened: list[Drafter]) -> Drafter:
    """Combine several drafters into one."""
    if len(opened) == 1:
        return opened[0]
    return Combined(opened, max(getattr(part.config, "nodes", 1) for part in spec.parts))


def _open_part(
    part: Part,
    target: Target[Any],
    target_tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool,
    checksums: bool,
) -> Drafter:
    """Open one drafter, loading its heads or its checkpoint."""
    drafter: Callable[..., Drafter] = methods.import_method(part.name, "drafter")
    if part.path is None:
        return drafter(part.config)
    if methods.METHODS[part.name].trainable:
        return artifact.open_heads(
            Path(part.path),
            part.options,
            target=target,
            tokenizer=target_tokenizer,
            allow_other_target=allow_other_target,
            checksums=checksums,
        )
    checkpoint = _open_checkpoint(part.path, checksums)
    target.notes += checkpoint.layout.notes
    opened: Any = drafter(
        loading.load_model(checkpoint, dtype=target.dtype, device=str(target.device)),
        part.config,
        target=target,
        tokenizer=loading.load_tokenizer(checkpoint),
        target_tokenizer=target_tokenizer,
    )
    pair: Any = {
        "draft": opened.draft_model,
        "target": target,
        "tokenizer": target_tokenizer,
        "allow_other_target": allow_other_target,
        "checksums": checksums,
    }
    if part.config.acceptance is not None:
        opened.acceptance_head = open_acceptance(part.config.acceptance, **pair)
    if part.config.judge is not None:
        opened.set_judge(open_judge(part.config.judge, **pair))
    built: Drafter = opened
    return built


def _option_key(item: str) -> str:
    """Return the key of a `key=value` option."""
    return item.partition("=")[0].strip()


def _parse_bool(item: str) -> bool:
    """Parse the value of a boolean option."""
    value = item.partition("=")[2].strip().lower()
    if value not in ("true", "yes", "1", "false", "no", "0"):
        raise UsageError(f"{item}: expected true or false")
    return value in ("true", "yes", "1")


def _split_options(word: str) -> tuple[str, list[str]]:
    """Split a word into its name or path and its options."""
    name, colon, pairs = word.rpartition(":")
    items = [item for item in pairs.split(",") if item]
    if not colon or not all("=" in item or _option_key(item) == "tune" for item in items):
        return word, []
    return name, items


def _parse_part(word: str, pairs: str) -> Part:
    """Resolve a name or path and parse its options."""
    name, path = word, None
    if name not in methods.list_methods("drafter"):
        name, path = "draft_model", _resolve_checkpoint(word)
        if (Path(path) / HEADS).is_file():
            name = artifact.read_record(Path(path)).method
            if name in methods.list_methods("head"):
                raise UsageError(
                    f"{path}: its {name} head drafts nothing itself",
                    hint=f"give the draft model that it was trained for: DRAFT:{name}={path}",
                )
    elif name == "draft_model":
        raise UsageError(
            "draft_model needs a checkpoint",
            hint="give its directory itself: --draft PATH:depth=4",
        )
    elif methods.METHODS[name].trainable:
        raise UsageError(
            f"{name} needs trained heads",
            hint=f"spectool train-heads {name} MODEL HEADS --data FILE, then --draft HEADS",
        )
    config = methods.import_method(name, "drafter").Config.from_text(pairs)
    return Part(name=name, path=path, config=config, options=pairs)


def _resolve_checkpoint(word: str) -> str:
    """Return the directory or hub id that `word` means, as it is no drafter's name."""
    if word and Path(word).expanduser().is_dir():
        return str(Path(word).expanduser()) if word.startswith("~") else word
    names = methods.list_methods("drafter")
    close = difflib.get_close_matches(word, [*names, "auto"], n=1, cutoff=_MISSPELT)
    if not word or close or hub.is_local(word):
        hint = "a draft model is given by its directory or hub id: --draft PATH:depth=4"
        if close:
            hint = f"did you mean {close[0]}?"
        elif word.partition(":")[0] in names:
            hint = f"options are written {word.partition(':')[0]}:key=value,key=value"
        raise UsageError(
            f"no drafter is called {word!r}, nor a directory; known: {', '.join(names)}", hint=hint
        )
    return word


def _open_checkpoint(name: str, checksums: bool) -> Checkpoint:
    """Open a draft checkpoint, downloading it if need be."""
    try:
        return open_checkpoint(name, checksums=checksums)
    except CheckpointError as error:
        if hub.is_local(name):
            raise
        known = ", ".join(methods.list_methods("drafter"))
        raise CheckpointError(
            f"--draft {error}", hint=f"drafters are {known}, or a checkpoint by its path or hub id"
        ) from error
