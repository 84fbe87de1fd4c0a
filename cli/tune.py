"""`spectool tune HEADS MODEL`: find the fastest draft options on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectool.cli.common import Output, open_runner, read_prompts
from spectool.decode.options import RunnerOptions
from spectool.options import Config, option
from spectool.shared_options import TextOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions(Config):
    """The draft heads to tune, and the prompts to tune them on."""

    heads: Path = option(..., "Directory of draft heads", argument=True)
    prompts: str = option(
        ..., "File of prompts: .txt (one per line) or .jsonl (prompt, turns or messages)"
    )
    limit: int = option(8, "Use only the first N prompts", minimum=1)
    max_new_tokens: int = option(64, "Maximum number of new tokens per prompt", minimum=1)


def tune(output: Output, options: TuneOptions, text: TextOptions, load: RunnerOptions) -> None:
    """Find the draft options of HEADS that are fastest on this machine, and keep them."""
    from spectool.decode.heads.artifact import read_record
    from spectool.evaluate import tuning

    heads = options.heads
    read_record(heads)
    runner, tokenizer = open_runner(output, load)
    inputs = read_prompts(output, options.prompts, tokenizer, text, limit=options.limit)
    best = tuning.tune(
        runner, heads, inputs, max_new_tokens=options.max_new_tokens, reporter=output
    )
    output.show(f"{heads}: {best} here, {best.speedup:.2f} times plain decoding")
    if best.speedup < 1:
        output.say("plain decoding is faster on this machine; `--draft HEADS:tune` may choose")
    output.result({"heads": str(heads), **best.options, "speedup": best.speedup}, measured=True)
