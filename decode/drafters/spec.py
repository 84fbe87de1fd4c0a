"""The one grammar of `--draft`: a drafter's name or a path, then `:key=value,key=value`.

A path is a heads directory or a smaller checkpoint. `auto` is the heads beside the target, in its
directory's folder `heads`, or else the drafter that needs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import hub, loading, methods
from spectool.decode.drafters import heads
from spectool.decode.protocol import Drafter
from spectool.decode.target import Target
from spectool.errors import CheckpointError, UsageError
from spectool.headers import HEADS

_AUTO = "ngram"
# Closer than this to a name is a misspelling, farther away a hub id ("nope" is not "none").
_MISSPELT = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A parsed `--draft`. `path` is that of the heads, or the checkpoint's or its hub id."""

    text: str
    name: str
    path: str | None
    config: Any


def parse_spec(text: str, *, beside: Path | None = None) -> DraftSpec:
    """Read `ngram:nodes=12`, `./small:depth=4`, `./heads`, `auto`, ...

    `beside` is the target's directory, where `auto` looks for heads.

    Raises:
        UsageError: an unknown name, a path that does not exist, an unknown or wrong option.
        CheckpointError: a damaged heads directory.
    """
    head, colon, pairs = text.rpartition(":")
    if not colon or ("=" not in pairs and pairs):
        head, pairs = text, ""
    if head == "auto":
        own = beside / "heads" if beside is not None else None
        head = str(own) if own is not None and (own / HEADS).is_file() else _AUTO
    name, path = head, None
    if name not in methods.names("drafter"):
        name, path = "draft_model", _checkpoint(head)
        if (Path(path) / HEADS).is_file():
            name = heads.read_record(Path(path)).method
    elif name == "draft_model":
        raise UsageError(
            "draft_model needs a checkpoint",
            hint="give its directory itself: --draft PATH:depth=4",
        )
    elif methods.METHODS[name].trained:
        raise UsageError(
            f"{name} needs trained heads",
            hint=f"spectool train-heads {name} MODEL HEADS --data FILE, then --draft HEADS",
        )
    config = methods.resolve(name, "drafter").Config.from_text(pairs)
    return DraftSpec(text=text, name=name, path=path, config=config)


def open_drafter(
    spec: DraftSpec,
    *,
    target: Target,
    target_tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool = False,
) -> Drafter:
    """The drafter of a specification, ready for this target; loads heads or a draft model.

    `allow_other_target` takes heads that were trained for another checkpoint of the same shape.

    Raises:
        InputError: what the specification names is damaged, or does not fit the target.
    """
    drafter: Callable[..., Drafter] = methods.resolve(spec.name, "drafter")
    if spec.path is None:
        return drafter(spec.config)
    if methods.METHODS[spec.name].trained:
        return heads.open_heads(
            Path(spec.path),
            spec.config,
            target=target,
            tokenizer=target_tokenizer,
            allow_other_target=allow_other_target,
        )
    path = _local(spec.path)
    return drafter(
        loading.load_model(path, dtype=target.dtype, device=str(target.device)),
        spec.config,
        target=target,
        tokenizer=loading.load_tokenizer(path),
        target_tokenizer=target_tokenizer,
    )


def _checkpoint(head: str) -> str:
    """The directory or hub id that `head` means, as no drafter has this name.

    Raises:
        UsageError: neither, or nearly a drafter's name.
    """
    if head and Path(head).expanduser().is_dir():
        return str(Path(head).expanduser()) if head.startswith("~") else head
    names = methods.names("drafter")
    close = difflib.get_close_matches(head, [*names, "auto"], n=1, cutoff=_MISSPELT)
    if not head or close or hub.is_local(head):
        hint = "a draft model is given by its directory or hub id: --draft PATH:depth=4"
        if close:
            hint = f"did you mean {close[0]}?"
        elif head.partition(":")[0] in names:
            hint = f"options are written {head.partition(':')[0]}:key=value,key=value"
        raise UsageError(
            f"no drafter is called {head!r}, and no directory; known: {', '.join(names)}", hint=hint
        )
    return head


def _local(path: str) -> Path:
    """The directory of a draft checkpoint, fetched if need be."""
    if hub.is_local(path):
        return Path(path)
    try:
        return hub.fetch(path, None)
    except CheckpointError as error:
        known = ", ".join(methods.names("drafter"))
        raise CheckpointError(
            f"--draft {error}", hint=f"drafters are {known}, or a checkpoint by its path or hub id"
        ) from error
