"""Options that several commands share: which checkpoint, where it computes, how texts are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from spectool.data.template import template_arguments
from spectool.options import Config, option

if TYPE_CHECKING:
    from spectool.checkpoint.tensors import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions(Config):
    """The checkpoint that a command reads."""

    PANEL: ClassVar = "Model"

    model: str = option(..., "Checkpoint: local directory or Hugging Face hub id", argument=True)
    revision: str | None = option(None, "Branch, tag or commit of a checkpoint from the hub")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the checkpoint", switch=True
    )

    def open(self, *, headers_only: bool = False, seq2seq: bool = False) -> Checkpoint:
        """Open the checkpoint. `headers_only`, `seq2seq`: see `open_checkpoint`."""
        from spectool.checkpoint.tensors import open_checkpoint

        return open_checkpoint(
            self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            # Quantizing has no such option: it reads no checkpoint of ours.
            checksums=getattr(self, "checksums", True),
            headers_only=headers_only,
            seq2seq=seq2seq,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions(CheckpointOptions):
    """A checkpoint, and where it computes."""

    PANEL: ClassVar = "Resources"

    device: str = option("auto", "Device: cpu, cuda, cuda:N, or auto (cuda if available)")
    threads: int | None = option(
        None,
        "CPU threads; default: as many as the system runs at the same time; generate and chat take "
        "one where that is faster",
        minimum=1,
        maximum=1024,
    )

    def resolve_device(self) -> str:
        """Return the name of the device, with `auto` resolved."""
        if self.device != "auto":
            return self.device
        import torch

        # torchrun starts one process per GPU: with fewer GPUs than processes, all compute on the
        # CPU.
        wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return "cuda" if torch.cuda.device_count() >= wanted else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(PlaceOptions):
    """A checkpoint, where it computes, and how its weights are held."""

    PANEL: ClassVar = "Model"

    dtype: str | None = option(
        None,
        "Dtype to compute in: float32, bfloat16, float16 or float64; default: the checkpoint's "
        "dtype, or float32 on a CPU that is slow in it",
    )
    runtime: str = option(
        "auto",
        "How to hold quantized weights: packed (as codes), dense (unpacked), or auto (packed where "
        "a kernel computes with the codes)",
    )
    activations: str = option(
        "auto",
        "Activations in products with quantized weights: exact, int16 or int8 (rounded by row and "
        "block of 128 inputs, where the method has integers), or auto (in bfloat16 the fewest bits "
        "that add less than 2% to the method's own loss)",
    )
    checksums: bool = option(
        True, "Load quantized weights and draft heads without verifying checksums", switch=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions(Config):
    """Options to read the rows of a text."""

    PANEL: ClassVar = "Text"

    field: str | None = option(None, "Field to read from the rows of .jsonl and .parquet files")
    template_arg: tuple[str, ...] = option(
        (), "Argument for the chat template, as key=value; repeatable"
    )

    @property
    def template(self) -> dict[str, Any]:
        """The arguments of the chat template by name."""
        return template_arguments(self.template_arg)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions(Config):
    """The directory that a command writes."""

    PANEL: ClassVar = "Output"

    out: Path = option(..., "Directory to write; must not exist", argument=True, written=True)
    overwrite: bool = option(False, "Replace OUT once the new one is complete", switch=True)
