"""Download of checkpoints by hub id: safetensors, configuration, tokenizer and licence.

All traffic goes through huggingface_hub, transformers' own client. Local directories need nothing
of this module but `is_local`.
"""

from __future__ import annotations

import re
from pathlib import Path

from spectool.checkpoint import foreign
from spectool.checkpoint.headers import Layout, TensorEntry, read_json
from spectool.errors import CheckpointError

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]
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


def _unreachable(model: str, error: Exception) -> CheckpointError:
    """Make the error of a failed download."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"{model}: no directory here, and the hub did not provide it: {reason}",
        hint="give a local checkpoint by its path",
    )
