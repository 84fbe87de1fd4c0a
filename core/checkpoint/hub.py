"""Download of checkpoints by hub id: safetensors, configuration, tokenizer and licence.

All traffic goes through huggingface_hub, transformers' own client. Local directories need nothing
of this module but `is_local`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from spectool.checkpoint import foreign
from spectool.checkpoint.headers import Layout, TensorEntry, read_json
from spectool.errors import CheckpointError, InputError

PATTERNS = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*",
    "README.md",
]  # fmt: skip
# Some repositories also hold the same weights in other layouts.
DUPLICATES = ["consolidated*", "original/*", "onnx/*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_local(model: str | Path) -> bool:
    """Whether `model` is a local path and not a hub id."""
    text = str(model)
    return (
        isinstance(model, Path)
        or Path(text).exists()
        or not HUB_ID.fullmatch(text)
        or text.startswith((".", "/", "~"))
    )


def fetch(model: str, revision: str | None, *, code: bool = False) -> Path:
    """Download a hub id; returns the local snapshot, a folder named by the commit.

    `code`: download Python files too.

    Raises:
        CheckpointError: no such id or revision, or the hub cannot be reached.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*PATTERNS, "*.py"] if code else PATTERNS,
                ignore_patterns=DUPLICATES,
            )
        )
    except Exception as error:
        # The client's versions use different HTTP libraries, whose errors have no common base.
        raise _unreachable(model, error) from error


def remote_layout(model: str, revision: str | None) -> Layout:
    """Read configuration and tensor headers of a hub id without downloading weights.

    Raises:
        InputError: as `fetch` and `foreign.check_config`, or there are no safetensors.
    """
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        config_path = huggingface_hub.hf_hub_download(model, "config.json", revision=revision)
        repository = huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{model}: holds no safetensors weights") from error
    except Exception as error:
        raise _unreachable(model, error) from error
    tensors: dict[str, TensorEntry] = {}
    for file, header in repository.files_metadata.items():
        for name, tensor in header.tensors.items():
            first, last = tensor.data_offsets
            tensors[name] = TensorEntry(
                name=name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                path=Path(file),
                start=first,
                num_bytes=last - first,
            )
    config = read_json(Path(config_path))
    foreign.check_config(Path(model), config)
    return Layout(path=Path(config_path).parent, config=config, tensors=tensors)


def is_repository(name: str) -> bool:
    """Whether `name` is that of a repository, OWNER/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def upload(path: Path, repo: str, *, files: Sequence[str], card: str, private: bool = False) -> str:
    """Upload files of a directory, with a card, to a repository that is made if there is none.

    huggingface_hub commits as it uploads: a call after one that was interrupted continues. Returns
    the repository's address.

    Raises:
        InputError: no token, no right to write, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=[name for name in files if name != "README.md"],
            commit_message="Upload by spectool",
        )
        api.upload_file(
            repo_id=repo,
            path_or_fileobj=card.encode(),
            path_in_repo="README.md",
            commit_message="Model card",
        )
    except Exception as error:
        # As in `fetch`; without a token the hub answers 401.
        raise InputError(
            f"{repo}: the hub did not take it: {_first_line(error)}",
            hint="`hf auth login` or HF_TOKEN gives the token; it needs the right to write",
        ) from error
    return str(address)


def _unreachable(model: str, error: Exception) -> CheckpointError:
    """Make the error of a failed download."""
    return CheckpointError(
        f"{model}: no directory here, and the hub did not provide it: {_first_line(error)}",
        hint="give a local checkpoint by its path",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
