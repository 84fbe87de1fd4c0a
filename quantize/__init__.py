"""Weight quantization: the stages of a run, and one file per method in `methods` and `lm_head`.

The package can be called: `spectool.quantize(...)` is its function `quantize`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectool.quantize.report import QuantizeReport


def quantize(
    model: str | Path,
    out: str | Path,
    method: str,
    *,
    calibration: Sequence[str] | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    device: str = "cpu",
    overwrite: bool = False,
    **options: Any,
) -> QuantizeReport:
    """Quantize the checkpoint `model` by a method into the directory `out`.

    `calibration`: texts as for `spectool quantize --calibration`, of which `samples` sequences of
    `seq_len` tokens are used; None: the built-in text. `options`: those of the method, as `bits=3`.

    Raises:
        InputError: the checkpoint, a text, an option or `out` cannot be used.
        SpectoolError: the disk is full; the same call resumes.
    """
    from spectool import methods
    from spectool.checkpoint.tensors import open_checkpoint
    from spectool.quantize import run
    from spectool.quantize.job import QuantizeJob

    job = QuantizeJob(
        method=method,
        config=methods.import_method(method, "quantizer").Config.from_dict(options),
        calibration=tuple(calibration or ()),
        samples=samples,
        seq_len=seq_len,
    )
    return run.quantize(open_checkpoint(model), Path(out), job, device=device, overwrite=overwrite)


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return quantize(*args, **options)


# An import of anything inside sets `spectool.quantize` to this module: a function of that name in
# `spectool` would be lost.
sys.modules[__name__].__class__ = _Package
