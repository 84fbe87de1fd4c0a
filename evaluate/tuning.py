"""`tune`: measure which draft options are fastest on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectool.data.text import Prompt
from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import read_record
from spectool.decode.policy.fastest import Fastest, store_fastest
from spectool.evaluate.bench import Options, bench
from spectool.methods import import_method
from spectool.options import options_of
from spectool.report import SILENT, OptionTuned, Reporter

# Values tried for each option that decides how much is drafted; options are tuned in this order.
TRIED = {"nodes": (2, 4, 8, 16, 32, 64), "depth": (1, 2, 3, 4, 6, 8), "width": (2, 4, 8, 16)}


def tune(
    runner: Runner,
    heads: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    reporter: Reporter = SILENT,
) -> Fastest:
    """Find the fastest options for these prompts and keep them for this machine.

    Options are tuned one after the other; all values of an option run in one process on the same
    prompts, next to plain decoding.

    Raises:
        InputError: the heads do not fit the model, or the cache folder cannot be written.
    """
    record = read_record(heads)
    known = {
        option.name: option for option in options_of(import_method(record.method, "drafter").Config)
    }
    best: dict[str, int] = {}
    speedup = 0.0
    for name, values in TRIED.items():
        if name not in known:
            continue
        tried = [{**best, name: value} for value in values if value <= _largest(known[name])]
        drafts = [f"{heads}:{','.join(f'{k}={v}' for k, v in each.items())}" for each in tried]
        result = bench(runner, prompts, Options(drafts=drafts, max_new_tokens=max_new_tokens))
        speeds = [row.speedup for row in result.drafters]
        speedup = max(speeds)
        best = tried[speeds.index(speedup)]
        by_value = {each[name]: speed for each, speed in zip(tried, speeds, strict=True)}
        reporter.event(OptionTuned(name, by_value))
    found = Fastest(best, round(speedup, 3))
    store_fastest(record.fingerprint, runner.target, found)
    return found


def _largest(option: Any) -> float:
    return float("inf") if option.maximum is None else option.maximum
