"""spectool: quantize language-model checkpoints, decode them faster, measure what was lost.

The public names are in `__all__`; everything else may change. Importing this package imports
neither torch nor transformers; spectool's format is registered when transformers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectool.errors import SpectoolError
from spectool.methods import door
from spectool.model import hook
from spectool.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

__all__ = ["SpectoolError", "__version__", "generate", "load"]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str = "cpu",
    runtime: str = "packed",
    revision: str | None = None,
    trust_remote_code: bool = False,
    checksums: bool = True,
) -> PreTrainedModel:
    """Load the checkpoint at `path`, dense or packed, as a transformers model in eval mode.

    `dtype`: of the activations and of the weights that are not packed; None: as the checkpoint
    states. `runtime`: `packed` (weights stay in their codes), `dense` (weights are unpacked once,
    at loading) or `auto` (`dense` where no kernel computes with the codes on this machine and
    memory suffices). `checksums`: compare the files of a packed checkpoint with the checksums in
    its index.

    Raises:
        InputError: the checkpoint is missing, damaged or incomplete.
    """
    from spectool.checkpoint.tensors import open_checkpoint
    from spectool.model.loading import load_model

    checkpoint = open_checkpoint(
        path, revision=revision, trust_remote_code=trust_remote_code, checksums=checksums
    )
    return load_model(checkpoint, dtype=dtype, device=device, runtime=runtime)


def generate(model: PreTrainedModel | str | Path, *, prompts: Sequence[str], **options: Any) -> Any:
    """Generate a continuation of each prompt; options: `spectool.decode.generate.generate`."""
    return door("generate")(model, prompts=prompts, **options)


hook.install()
