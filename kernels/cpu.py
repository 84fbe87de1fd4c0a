"""Instruction sets of this machine's processor. Imports no torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path


@functools.cache
def flags() -> frozenset[str] | None:
    """Read the processor's feature flags; None if unknown."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return None
    return None if found is None else frozenset(found[1].split())


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products (True if unknown)."""
    known = flags()
    return known is None or bool({"avx512_bf16", "amx_bf16", "bf16"} & known)


def has_bfloat16_tiles() -> bool:
    """Whether the processor has instructions for tiles of bfloat16 (False if unknown)."""
    return "amx_bf16" in (flags() or ())
