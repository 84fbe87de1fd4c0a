"""spectool: quantize language-model checkpoints, decode them faster, measure what was lost.

The public names are in `__all__`; everything else may change. Importing this package imports
neither torch nor transformers: a name is imported where it is first used. spectool's format is
registered when transformers is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spectool.errors import SpectoolError
from spectool.model import hook
from spectool.version import __version__

if TYPE_CHECKING:
    # For editors and type checkers; `__getattr__` does the same at run time.
    from spectool.decode.adapter import drafting
    from spectool.decode.generate import Runner, generate
    from spectool.decode.options import SamplingParams
    from spectool.decode.result import Result
    from spectool.model.loading import load
    from spectool.quantize import quantize

__all__ = [
    "Result",
    "Runner",
    "SamplingParams",
    "SpectoolError",
    "__version__",
    "drafting",
    "generate",
    "load",
    "quantize",
]

_PLACES = {
    "Result": "spectool.decode.result",
    "Runner": "spectool.decode.generate",
    "SamplingParams": "spectool.decode.options",
    "drafting": "spectool.decode.adapter",
    "generate": "spectool.decode.generate",
    "load": "spectool.model.loading",
}


def __getattr__(name: str) -> Any:
    if name == "quantize":
        # The package, which can be called: as an attribute it would replace a function.
        return importlib.import_module("spectool.quantize")
    if name not in _PLACES:
        raise AttributeError(f"module 'spectool' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hook.install()
