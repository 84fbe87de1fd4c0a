"""spectool: compress language-model checkpoints, decode them faster, prove what was lost.

The public face is `__all__`; everything else may change. Importing this package imports neither
torch nor transformers; it arranges that transformers learns spectool's format when it is loaded.
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
    """The checkpoint at `path`, dense or packed by spectool, as a transformers model in eval mode.

    `dtype` is the type of activations and of weights that are not packed; None means the
    checkpoint's own. `runtime` is `packed` (codes stay codes), `dense` (unpacked once, in place of
    the codes) or `auto` (dense where no kernel works on the codes here and memory allows).
    `checksums`: compare the files of a packed checkpoint with the checksums in its index.

    Raises:
        InputError: the checkpoint is missing, damaged or incomplete.
    """
    model: PreTrainedModel = door("load")(
        path,
        dtype=dtype,
        device=device,
        runtime=runtime,
        revision=revision,
        trust_remote_code=trust_remote_code,
        checksums=checksums,
    )
    return model


def generate(model: PreTrainedModel | str | Path, *, prompts: Sequence[str], **options: Any) -> Any:
    """Continue each prompt; see `spectool.decode.generate.generate` for the options."""
    return door("generate")(model, prompts=prompts, **options)


hook.install()
