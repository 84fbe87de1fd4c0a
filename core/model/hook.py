"""Import hook that registers spectool's format with transformers once transformers is imported.

`import spectool` must suffice for `AutoModelForCausalLM.from_pretrained`, but `spectool --help`
must not spend seconds on importing transformers. transformers has no entry points for quantizers,
so a finder on `sys.meta_path` registers the format right after the registry module was executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register the format now if transformers' registry is imported, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("spectool.model.registration")


class _Finder(importlib.abc.MetaPathFinder):
    """Finder that makes the loader of the registry module register the format once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader

            def exec_module(module: ModuleType) -> None:
                # The loader's own method again.
                del loader.exec_module
                loader.exec_module(module)
                _register()

            loader.exec_module = exec_module
        return spec
