"""Options of a quantization that every method has. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spectool.errors import UsageError
from spectool.options import option
from spectool.shared_options import TextOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions(TextOptions):
    """The text that is run through the model."""

    PANEL: ClassVar = "Calibration"

    calibration: tuple[str, ...] = option(
        (),
        "Calibration text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; repeatable; "
        "data-free methods use it to measure output errors",
    )
    samples: int = option(128, "Number of calibration sequences", minimum=1)
    seq_len: int = option(2048, "Maximum tokens per calibration sequence", minimum=2)
    seed: int = option(0, "Random seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions(CalibrationOptions):
    """Options that a quantization's job takes as they are given."""

    PANEL: ClassVar = "What to quantize"

    skip: tuple[str, ...] = option((), "Leave linears with this name or glob dense; repeatable")
    allow_dense: bool = option(
        False, "Quantize even if over 10% of the block weights stay dense", switch=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeOptions(JobOptions):
    """Options of the pass over the calibration text."""

    PANEL: ClassVar = "Calibration"

    batch_size: int = option(4, "Number of calibration sequences run together", minimum=1)
    dtype: str = option("float32", "Dtype of the calibration passes: float32, bfloat16 or float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessOptions(ComputeOptions):
    """A training before the quantization."""

    PANEL: ClassVar = "Training before quantization"

    preprocess: tuple[str, ...] = option(
        (),
        "Text to train low-rank updates of the quantized model on, which are merged into the "
        "weights before the final quantization; repeatable; needs memory for the whole model",
    )
    preprocess_steps: int = option(1000, "Training steps for --preprocess", minimum=1)
    preprocess_rank: int = option(64, "Rank of the low-rank updates for --preprocess", minimum=1)
    preprocess_rate: float = option(1e-4, "Peak learning rate for --preprocess", minimum=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions(PreprocessOptions):
    """Options of a quantization besides the method's own and where it runs.

    Raises:
        UsageError: an option whose condition is not given.
    """

    PANEL: ClassVar = "What to quantize"

    rules: Path | None = option(
        None, "YAML file that sets another method, or dense, for some linears"
    )
    embeddings: str | None = option(
        None,
        "Quantize the embedding and lm_head too, with a data-free method such as int8: "
        "METHOD[:key=value,...]",
    )
    lm_head: str | None = option(
        None, "Fit a quantized lm_head on the calibration text (research): vq[:key=value,...]"
    )
    bits_budget: float | None = option(
        None,
        "Choose each linear's bits by measured errors, with this average of stored bits per weight "
        "as the maximum",
        minimum=0,
    )
    candidate: tuple[str, ...] = option(
        (),
        "Candidate for --bits-budget: METHOD[:key=value,...]; repeatable; default: the method at "
        "each of its --bits",
    )

    def validate(self) -> None:
        """Check that no option is given whose condition is not."""
        if self.candidate and self.bits_budget is None:
            raise UsageError("--candidate: only with --bits-budget, which is not given")
        if not self.preprocess:
            for field in self.changed():
                if field.name.startswith("preprocess_"):
                    raise UsageError(f"{field.flag}: only with --preprocess, which is not given")
