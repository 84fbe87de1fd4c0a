"""`spectool push DIR REPO`: upload an artifact to the hub, with its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spectool.checkpoint.card import README
from spectool.checkpoint.checksums import Checksums, parse
from spectool.checkpoint.headers import HEADS, TRAINING, read_json, read_layout
from spectool.cli.common import Output
from spectool.errors import InputError, UsageError
from spectool.files import size
from spectool.options import Config, option


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions(Config):
    """The directory to upload, and the repository that takes it."""

    path: Path = option(..., "Directory that spectool wrote", argument=True)
    repo: str = option(..., "Repository on the hub: OWNER/NAME", argument=True)
    private: bool = option(False, "Make a new repository private", switch=True)
    base_model: str | None = option(
        None, "Hub id of the base checkpoint, for the card; default: the one the card has"
    )
    dry_run: bool = option(
        False, "Show the files that would go, and the card; upload and write nothing", switch=True
    )


def push(output: Output, options: PushOptions) -> None:
    """Upload a checkpoint or draft heads to the Hugging Face hub, with a model card."""
    from spectool.checkpoint import checksums
    from spectool.checkpoint.artifact import listed_files
    from spectool.checkpoint.hub import is_repository, upload

    path, repo = options.path, options.repo
    if not is_repository(repo):
        raise UsageError(f"{repo}: expected OWNER/NAME, a repository on the hub")
    listed = sorted(listed_files(path))
    if not listed:
        raise UsageError(f"{path}: holds nothing that spectool wrote")
    absent = [name for name in listed if not (path / name).is_file()]
    if absent:
        raise InputError(f"{path}: {absent[0]}: listed as a file of it, but absent")
    checksums.verify(path, _stored(path))
    card = _card(path, options.base_model)
    sizes = {name: (path / name).stat().st_size for name in listed}
    sizes[README] = len(card.encode())
    for name, count in sorted(sizes.items()):
        output.show(f"{name}  {size(count)}")
    output.show(f"{len(sizes)} files, {size(sum(sizes.values()))}")
    result = {"repo": repo, "files": sizes, "card": card}
    if options.dry_run:
        output.show(f"\n{card}")
        output.result({"dry_run": True, **result})
        return
    output.resume = "run the same command to continue: what is there is not sent again"
    address = upload(path, repo, files=listed, card=card, private=options.private)
    output.show(f"{path}: uploaded to {address}")
    output.result({"url": address, **result})


def _card(path: Path, base: str | None) -> str:
    """Return the card that goes: the artifact's README, or one made of its records."""
    from spectool.checkpoint.card import with_base
    from spectool.cli.cards import card_of

    readme = path / README
    if base is None and readme.is_file():
        return readme.read_text(encoding="utf-8")
    made = card_of(path)
    text = readme.read_text(encoding="utf-8") if readme.is_file() else str(made)
    return text if base is None else with_base(text, base, made.relation)


def _stored(path: Path) -> Mapping[str, Checksums]:
    """Return the checksums of the files of an artifact."""
    for name in (HEADS, TRAINING):
        if (path / name).is_file():
            return parse(read_json(path / name).get("checksums"), path / name)
    return read_layout(path).checksums
