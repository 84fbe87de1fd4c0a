"""The one grammar of `--draft`: a drafter's name or a path, then `:key=value,key=value`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import loading, methods
from spectool.decode.protocol import Drafter
from spectool.decode.target import Target
from spectool.errors import UnsupportedError, UsageError

# Until heads are found in checkpoints, `auto` is the drafter that needs nothing.
_AUTO = "ngram"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A parsed `--draft`. `path` is the checkpoint's directory or hub id where one is needed."""

    text: str
    name: str
    path: str | None
    config: Any


def parse_spec(text: str) -> DraftSpec:
    """Read `ngram:nodes=12`, `./small:depth=4`, `auto`, ...

    Raises:
        UsageError: an unknown name, a path that does not exist, an unknown or wrong option.
    """
    head, colon, pairs = text.rpartition(":")
    if not colon or ("=" not in pairs and pairs):
        head, pairs = text, ""
    name, path = _AUTO if head == "auto" else head, None
    if name not in methods.names("drafter"):
        if not (head and Path(head).expanduser().is_dir()) and not _HUB_ID.fullmatch(head):
            methods.row(head, "drafter")
        name, path = "draft_model", head
        if (Path(head).expanduser() / "spectool_heads.json").exists():
            raise UnsupportedError(f"{head} holds draft heads, which cannot be run yet")
    elif name == "draft_model":
        raise UsageError(
            "draft_model needs a checkpoint",
            hint="give its directory itself: --draft PATH:depth=4",
        )
    config = methods.resolve(name, "drafter").Config.from_text(pairs)
    return DraftSpec(text=text, name=name, path=path, config=config)


def open_drafter(
    spec: DraftSpec, *, target: Target, target_tokenizer: PreTrainedTokenizerBase | None
) -> Drafter:
    """The drafter of a specification, ready for this target; loads a draft model where one is due.

    Raises:
        InputError: the draft's checkpoint is damaged, or does not fit the target.
    """
    drafter: Callable[..., Drafter] = methods.resolve(spec.name, "drafter")
    if spec.path is None:
        return drafter(spec.config)
    return drafter(
        loading.load_model(spec.path, dtype=target.dtype, device=str(target.device)),
        spec.config,
        target=target,
        tokenizer=loading.load_tokenizer(spec.path),
        target_tokenizer=target_tokenizer,
    )
