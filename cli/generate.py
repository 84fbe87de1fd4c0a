"""`spectool generate MODEL`: continue prompts, with any drafter."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectool.cli.common import (
    Output,
    describe_kv,
    describe_threads,
    open_runner,
    read_prompts,
    record,
    standard_input,
    target_record,
    totals,
    turn_totals,
)
from spectool.decode.options import (
    DrafterOptions,
    RequestOptions,
    SamplingParams,
    StrategyOptions,
)
from spectool.errors import Interrupted, UsageError
from spectool.options import Config, option
from spectool.shared_options import TextOptions

if TYPE_CHECKING:
    from spectool.data.text import Prompt
    from spectool.decode.result import OnTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(Config):
    """Prompts, and how many of them are continued how far."""

    prompt: tuple[str, ...] = option((), "Prompt to continue; repeatable")
    prompts: str | None = option(None, "File of prompts: .txt (one per line) or .jsonl")
    max_new_tokens: int = option(128, "Maximum number of new tokens per prompt", minimum=1)
    batch_size: int = option(1, "Number of prompts decoded together", minimum=1)

    def validate(self) -> None:
        """Check that prompts are given in one way."""
        if self.prompt and self.prompts:
            raise UsageError("--prompt and --prompts exclude each other")


def generate(
    output: Output,
    options: GenerateOptions,
    text: TextOptions,
    request: RequestOptions,
    sampling: SamplingParams,
    load: DrafterOptions,
    strategy: StrategyOptions,
) -> None:
    """Generate text from prompts given as options, in a file or on stdin."""
    draft = load.draft
    if strategy.strategy is not None:
        if draft not in ("auto", "none"):
            raise UsageError(f"--strategy takes no drafter: leave out --draft {draft}")
        draft = "none"
    runner, tokenizer = open_runner(
        output, load, draft=draft, tune=True, strategy=strategy, seq2seq=True
    )
    from spectool.data.text import Prompt

    if options.prompts:
        inputs = read_prompts(output, options.prompts, tokenizer, text)
    else:
        inputs = [Prompt(given) for given in options.prompt or [standard_input()]]
    controls = runner.make_controls(request)
    streams = not output.json_wanted and options.batch_size == 1
    # An encoder-decoder answers its prompt with a text of its own.
    write = _stream(inputs, tokenizer, shows_prompts=not runner.target.start_ids)
    began = time.perf_counter()
    results = runner.generate(
        [one.given for one in inputs],
        eos=[one.ends for one in inputs],
        max_new_tokens=options.max_new_tokens,
        seed=request.seed,
        stop=request.stop,
        verify=request.verify,
        lossy=request.lossy,
        batch_size=options.batch_size,
        controls=[controls] * len(inputs),
        on_tokens=write if streams else None,
        keep_interrupted=True,
        **sampling.as_dict(),
    )
    found = totals(results, time.perf_counter() - began)
    runner.close()
    if not (streams or output.json_wanted):
        for index, result in enumerate(results):
            write(index, [], result.text, 0)
    if not output.json_wanted:
        sys.stdout.write("\n")
    lossless = all(result.lossless for result in results)
    output.say(
        f"{found['new_tokens']} tokens, {found['tokens_per_second']:.1f} tok/s, "
        f"{found['tokens_per_forward']:.2f} tokens per forward, drafter {runner.drafter_name}"
        f"{'' if lossless else ', lossy'}"
    )
    for note in filter(None, (describe_kv(runner), describe_threads(runner))):
        output.say(note)
    turns = turn_totals(results)
    if turns:
        output.say(
            f"{turns['small_share']:.0%} of the tokens by the small model, "
            f"{turns['switches']} switches, {turns['catch_up_tokens']} tokens read to catch up"
        )
    ends = {"drafter": runner.drafter_name, "lossless": lossless, **target_record(runner)}
    if runner.target.why_lossy:
        ends["why_lossy"] = runner.target.why_lossy
    output.result({"results": list(map(record, results)), **found, **ends, **turns})
    if any(result.finish_reason == "interrupted" for result in results):
        raise Interrupted("interrupted; the text generated so far is above")


def _stream(inputs: Sequence[Prompt], tokenizer: Any, *, shows_prompts: bool) -> OnTokens:
    """Return a function that writes text to stdout, the first time with its prompt before it.

    Without `shows_prompts` each text has a line to begin with.
    """
    shown = -1

    def write(index: int, tokens: list[int], text: str, drafted: int) -> None:
        nonlocal shown
        if index != shown:
            given = inputs[index].given if shows_prompts else ""
            opening = given if isinstance(given, str) else tokenizer.decode(given)
            sys.stdout.write(opening if shown < 0 else f"\n{opening}")
            shown = index
        sys.stdout.write(text)
        sys.stdout.flush()

    return write
