"""The one grammar of `--draft`: drafters joined by +, each with options as `:key=value,key=value`.

A drafter is a name or a path, that of a heads directory or of a smaller checkpoint. `tune` among
the options sizes trees by what pays on this machine (`decode/policy/tuned.py`). `auto` is the
heads beside the target, in its directory's folder `heads`, or else what needs nothing, tuned
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
from spectool.checkpoint.headers import HEADS, read_layout
from spectool.decode.drafters.combined import Combined
from spectool.decode.heads import artifact
from spectool.decode.protocol import Drafter
from spectool.decode.target import Target
from spectool.errors import CheckpointError, UsageError
from spectool.model import loading

_AUTO = "trigram+recycle"
# Closer than this to a name is a misspelling, farther away a hub id ("nope" is not "none").
_MISSPELT = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One drafter of a `--draft`. `path`: of the heads, or the checkpoint's, or its hub id.

    `config` is what `options` say.
    """

    name: str
    path: str | None
    config: Any
    options: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A parsed `--draft`. `tune` is None where it does not say."""

    text: str
    parts: tuple[Part, ...]
    tune: bool | None


def parse_spec(text: str, *, beside: Path | None = None) -> DraftSpec:
    """Read `ngram:nodes=12`, `ngram+recycle:tune`, `./small:depth=4`, `./heads`, `auto`, ...

    `beside` is the target's directory, where `auto` looks for heads.

    Raises:
        UsageError: an unknown name, a path that does not exist, an unknown or wrong option.
        CheckpointError: a damaged heads directory.
    """
    tune: bool | None = None
    is_auto = text.partition(":")[0] == "auto"
    if is_auto:
        own = beside / "heads" if beside is not None else None
        found = str(own) if own is not None and (own / HEADS).is_file() else _AUTO
        text = found + text[len("auto") :]
    parts = []
    whole = Path(_split(text)[0]).expanduser().is_dir()
    for word in [text] if whole else text.split("+"):
        head, items = _split(word)
        said = [item for item in items if _key(item) == "tune"]
        if said:
            tune = said[-1].strip() == "tune" or _truth(said[-1])
        elif tune is None and any(_key(item) == "nodes" for item in items):
            # Who says how large a tree is to be wants that size.
            tune = False
        pairs = ",".join(item for item in items if _key(item) != "tune")
        parts.append(_part(head, pairs))
    return DraftSpec(text=text, parts=tuple(parts), tune=True if is_auto and tune is None else tune)


def open_drafter(
    spec: DraftSpec,
    *,
    target: Target,
    target_tokenizer: PreTrainedTokenizerBase | None,
    allow_other_target: bool = False,
    checksums: bool = True,
) -> Drafter:
    """The drafter of a specification, ready for this target; loads heads or a draft model.

    `allow_other_target` takes heads that were trained for another checkpoint of the same shape.
    `checksums`: compare what is read with its own.

    Raises:
        InputError: what the specification names is damaged, or does not fit the target.
    """
    return _joined(
        spec,
        [
            _open(
                part,
                target,
                target_tokenizer,
                allow_other_target=allow_other_target,
                checksums=checksums,
            )
            for part in spec.parts
        ],
    )


def open_plain(text: str) -> Drafter:
    """The drafter of a specification that names neither heads nor a checkpoint.

    Raises:
        UsageError: one that does, or a wrong specification.
    """
    spec = parse_spec(text)
    if any(part.path is not None for part in spec.parts):
        raise UsageError(f"{text!r} needs the model that it drafts for")
    return _joined(spec, [_named(part) for part in spec.parts])


def _joined(spec: DraftSpec, opened: list[Drafter]) -> Drafter:
    if len(opened) == 1:
        return opened[0]
    return Combined(opened, max(getattr(part.config, "nodes", 1) for part in spec.parts))


def _named(part: Part) -> Drafter:
    drafter: Drafter = methods.resolve(part.name, "drafter")(part.config)
    return drafter


def _open(
    part: Part,
    target: Target,
    target_tokenizer: PreTrainedTokenizerBase | None,
    *,
    allow_other_target: bool,
    checksums: bool,
) -> Drafter:
    if part.path is None:
        return _named(part)
    drafter: Callable[..., Drafter] = methods.resolve(part.name, "drafter")
    if methods.METHODS[part.name].trained:
        return artifact.open_heads(
            Path(part.path),
            part.options,
            target=target,
            tokenizer=target_tokenizer,
            allow_other_target=allow_other_target,
            checksums=checksums,
        )
    path = _local(part.path)
    target.notes += read_layout(path).notes
    return drafter(
        loading.load_model(
            path, dtype=target.dtype, device=str(target.device), checksums=checksums
        ),
        part.config,
        target=target,
        tokenizer=loading.load_tokenizer(path),
        target_tokenizer=target_tokenizer,
    )


def _key(item: str) -> str:
    return item.partition("=")[0].strip()


def _truth(item: str) -> bool:
    value = item.partition("=")[2].strip().lower()
    if value not in ("true", "yes", "1", "false", "no", "0"):
        raise UsageError(f"{item}: expected true or false")
    return value in ("true", "yes", "1")


def _split(word: str) -> tuple[str, list[str]]:
    """What stands before the options, and the options one by one."""
    head, colon, pairs = word.rpartition(":")
    items = [item for item in pairs.split(",") if item]
    if not colon or not all("=" in item or _key(item) == "tune" for item in items):
        return word, []
    return head, items


def _part(head: str, pairs: str) -> Part:
    name, path = head, None
    if name not in methods.names("drafter"):
        name, path = "draft_model", _checkpoint(head)
        if (Path(path) / HEADS).is_file():
            name = artifact.read_record(Path(path)).method
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
    return Part(name=name, path=path, config=config, options=pairs)


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
