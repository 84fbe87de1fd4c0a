"""The draft options that `tune` found fastest, kept in the cache folder.

They hold for one machine, so they are no part of the draft heads: their key is the fingerprint of
the heads, which names the model that they were trained for, with `curve.machine_key`: size and
dtype of the model that runs, processor and threads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spectool.decode.policy.curve import machine_key
from spectool.decode.target.base import Target
from spectool.files import TUNED, read_cache, write_cache


@dataclass(frozen=True, slots=True)
class Fastest:
    """Draft options, and their speed-up over plain decoding."""

    options: dict[str, int]
    speedup: float

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.options.items())


def store_fastest(heads: str, target: Target[Any], found: Fastest) -> None:
    """Keep the options for heads with this fingerprint.

    Raises:
        InputError: the cache folder cannot be written.
    """
    write_cache(TUNED, {**read_cache(TUNED), _key(heads, target): asdict(found)})


def read_fastest(heads: str, target: Target[Any]) -> Fastest | None:
    """Return the options for heads with this fingerprint, if `tune` found some here."""
    found = read_cache(TUNED).get(_key(heads, target))
    try:
        return Fastest(**found) if found else None
    except TypeError:
        return None


def _key(heads: str, target: Target[Any]) -> str:
    return f"{heads}; {machine_key(target)}"
