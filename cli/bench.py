"""`spectool bench MODEL`: compare drafters on this machine and check that outputs are equal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from spectool.cli.bench_tables import (
    chain_table,
    comparison_table,
    depth_table,
    drafter_table,
    protocol_table,
    replay_table,
)
from spectool.cli.certify import certify
from spectool.cli.common import Output, describe_kv, open_runner, prepare_torch, read_prompts
from spectool.decode.options import RunnerOptions, SamplingParams, VerifyOptions
from spectool.errors import UsageError
from spectool.options import Config, option
from spectool.shared_options import TextOptions

if TYPE_CHECKING:
    from spectool.evaluate.bench import Run


# Options of measuring speed.
_MEASURES = ("reference", "baselines", "protocol", "by_depth", "chain_lengths", "plot")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(Config):
    """Options of the comparison: the drafters, their baselines, and the prompts."""

    prompts: str | None = option(
        None,
        "File of prompts, .txt (one per line) or .jsonl (prompt, turns or messages), or "
        "hub:DATASET",
    )
    protocol: Literal["spec-bench", "speed-bench"] | None = option(
        None,
        "Measure as a published benchmark does, on its data as --prompts: every turn of a "
        "question, nothing cut, its own averages",
    )
    draft: tuple[str, ...] = option(
        (),
        "Drafter, directory of draft heads or smaller checkpoint: NAME[:key=value,...]; repeatable",
    )
    reference: str | None = option(
        None,
        "Second checkpoint to compare with, such as the original of a quantized MODEL, which then "
        "runs both packed and dense",
    )
    baselines: bool = option(
        False,
        "Also run generate() of transformers: plain, with prompt lookup, and assisted by the draft "
        "checkpoints",
        switch=True,
    )
    limit: int | None = option(None, "Use only the first N prompts", minimum=1)
    per_category: int | None = option(
        None, "Use only the first N prompts of each category, after --limit", minimum=1
    )
    max_new_tokens: int | None = option(
        None,
        "Maximum number of new tokens per prompt, or per turn of a protocol; default: 128, of "
        "spec-bench 1024, of speed-bench 4096",
        minimum=1,
    )
    batch_size: tuple[int, ...] = option(
        (1,), "Number of prompts decoded together; a list such as 1,4,16 runs each", minimum=1
    )
    by_depth: bool = option(
        False, "Also print the share of drafts accepted at each depth", switch=True
    )
    chain_lengths: int = option(
        0,
        "Also measure drafts cut to chains of 1 to N tokens, as most servers verify",
        minimum=0,
        maximum=16,
    )
    replay: tuple[str, ...] = option(
        (),
        "Run no model: predict the acceptance of this drafter on MODEL, here a file of eval "
        "--save-reference, along its text; repeatable",
    )
    prompt_tokens: int = option(
        32, "Tokens at the beginning of each window of --replay that are its prompt", minimum=1
    )
    plot: Path | None = option(
        None, "Chart of the speed-ups to write: a .png or .svg file", written=True
    )
    certify: Path | None = option(
        None,
        "Measure no speed; check that logits, texts and sampled texts are plain decoding's, and "
        "write what was found to this JSON file; exit code 3 if a promise does not hold. Without "
        "--draft all drafters that need no training are checked",
        written=True,
    )
    attach: bool = option(
        False, "Also add the certificate to MODEL's directory, among its files", switch=True
    )

    def validate(self) -> None:
        if not self.batch_size:
            raise UsageError("--batch-size : expected positive numbers, as 4 or 1,4,16")
        if self.replay:
            for name in ("prompts", "draft", "certify", *_MEASURES):
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise UsageError(f"--replay runs no model; leave --{flag} out")
        elif self.prompts is None:
            raise UsageError("no prompts", hint="--prompts FILE, with texts like those to continue")
        if self.certify is None and self.attach:
            raise UsageError("--attach needs --certify FILE")
        if self.certify is not None:
            for name in _MEASURES:
                if getattr(self, name):
                    flag = name.replace("_", "-")
                    raise UsageError(f"--certify measures no speed; leave --{flag} out")
        if self.protocol is not None and self.chain_lengths:
            raise UsageError("--chain-lengths measures first turns alone; leave --protocol out")


def bench(
    output: Output,
    options: BenchOptions,
    text: TextOptions,
    verification: VerifyOptions,
    sampling: SamplingParams,
    load: RunnerOptions,
) -> None:
    """Measure drafters against plain decoding and check that the output stays the same."""
    prepare_torch(load.threads)
    if options.replay:
        _replay(output, options, sampling, load)
        return
    if options.certify is not None:
        certify(output, options, text, verification, sampling, load)
        return
    from spectool.evaluate.measures.losslessness import list_mismatches
    from spectool.evaluate.picture import draw
    from spectool.evaluate.results import as_json
    from spectool.machine import describe
    from spectool.picture import check_picture

    if options.plot is not None:
        check_picture(options.plot)
    runs = []
    for target in _targets(load, options.reference):
        runs += _run(output, options, text, verification, sampling, target)
    num_sizes = len(set(options.batch_size))
    for start in range(0, len(runs), num_sizes):
        same_model = runs[start : start + num_sizes]
        if len(runs) > num_sizes:
            output.show(f"{same_model[0].model}: {same_model[0].runtime}")
        output.show(drafter_table(same_model))
        output.show(same_model[0].definitions["tokens_per_forward"])
        if options.protocol is not None:
            output.show(protocol_table(same_model))
            output.show(same_model[0].definitions["scores"])
        for run in same_model:
            if options.chain_lengths:
                output.show(chain_table(run, options.chain_lengths))
            if options.by_depth:
                output.show(depth_table(run))
            output.show(_describe_cuts(run))
    if len(runs) > num_sizes:
        output.show(comparison_table(runs))
    if options.plot is not None:
        draw(runs, describe(), options.plot)
        output.say(f"picture: {options.plot}")
    output.result({**as_json(runs[0]), "other_runs": as_json(runs[1:])}, measured=True)
    broken = [f"{name} on {run.model}" for run in runs for name in list_mismatches(run)]
    if broken:
        output.say(f"error: output differs from plain decoding in float32: {', '.join(broken)}")
        raise typer.Exit(1)


def _replay(
    output: Output, options: BenchOptions, sampling: SamplingParams, load: RunnerOptions
) -> None:
    """Predict the acceptance of drafters from a stored reference."""
    from spectool.evaluate.replay import replay
    from spectool.evaluate.results import as_json

    found = replay(
        Path(load.model), options.replay, sampling=sampling, prompt_tokens=options.prompt_tokens
    )
    output.show(replay_table(found))
    output.show(found.definitions["tokens_per_forward"])
    output.show(
        f"{found.tokens} tokens after {found.windows} prompts of {found.prompt_tokens}; the model "
        f"prefers {found.greedy_share:.1%} of them"
    )
    for each in found.predictions:
        if each.note is not None:
            output.show(f"{each.drafter}: approximate; {each.note}")
    output.result(as_json(found))


def _run(
    output: Output,
    options: BenchOptions,
    text: TextOptions,
    verification: VerifyOptions,
    sampling: SamplingParams,
    target: RunnerOptions,
) -> list[Run]:
    """Measure one model at each batch size. It is free again before the next one is loaded."""
    from spectool.evaluate import bench as bench_module
    from spectool.evaluate.speed_protocols import most_new_tokens

    runner, tokenizer = open_runner(output, target, seq2seq=True)
    assert options.prompts is not None
    inputs = read_prompts(
        output,
        options.prompts,
        tokenizer,
        text,
        in_turns=options.protocol is not None,
        limit=options.limit,
        per_category=options.per_category,
    )
    runs = []
    how = bench_module.Options(
        drafts=options.draft,
        max_new_tokens=options.max_new_tokens or most_new_tokens(options.protocol),
        protocol=options.protocol,
        baselines=options.baselines,
        sampling=sampling,
        verification=verification,
        chain_lengths=options.chain_lengths,
    )
    sizes = dict.fromkeys(options.batch_size)
    for size in sizes:
        if len(sizes) > 1:
            output.say(f"batch size {size}")
        result = bench_module.bench(runner, inputs, replace(how, batch_size=size), reporter=output)
        runs.append(replace(result, model=target.model))
    if kept := describe_kv(runner):
        output.say(kept)
    return runs


def _describe_cuts(run: Run) -> str:
    line = (
        f"{run.kept_share:.0%} of the plain output kept: {run.prompts_cut} of "
        f"{run.prompts} prompts cut where it began to repeat itself"
    )
    if run.protocol is not None:
        line = f"{run.turns} turns of {run.prompts} questions, nothing cut"
        if run.turns_left_out:
            line += f"; turns left out as too long for the context: {run.turns_left_out}"
    if run.prompts_left_out:
        line += f"; left out as too long for the context: {run.prompts_left_out}"
    return line


def _targets(load: RunnerOptions, reference: str | None) -> list[RunnerOptions]:
    """Return the checkpoints to run, each with its runtime, in order.

    A quantized MODEL with a reference runs both packed and dense.

    Raises:
        UsageError: --runtime with a quantized MODEL and a reference.
    """
    from spectool.checkpoint.tensors import open_checkpoint

    if reference is None:
        return [load]
    other = replace(load, model=reference, runtime="auto", revision=None)
    if not open_checkpoint(load.model, seq2seq=True).layout.is_packed:
        return [load, other]
    if load.runtime != "auto":
        raise UsageError(
            "--reference runs a quantized MODEL both packed and dense; leave --runtime out"
        )
    return [replace(load, runtime="packed"), replace(load, runtime="dense"), other]
