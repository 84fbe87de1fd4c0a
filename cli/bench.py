"""`spectool bench MODEL`: compare drafters on this machine and check that outputs are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectool.cli.bench_tables import chain_table, comparison_table, drafter_table
from spectool.cli.common import (
    AllowOtherTarget,
    Context,
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    Lossy,
    MaxNewTokens,
    MinP,
    Model,
    NoChecksums,
    NoRepeatNgramSize,
    RepetitionPenalty,
    Revision,
    Runtime,
    Seed,
    Temperature,
    TemplateArg,
    Threads,
    TopK,
    TopP,
    TrustRemoteCode,
    Verify,
    open_runner,
    prepare_torch,
    session,
    template_arguments,
)
from spectool.errors import UsageError

if TYPE_CHECKING:
    from spectool.evaluate.bench import Run


def bench(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            help="File of prompts: .txt (one per line) or .jsonl (prompt, turns or messages)"
        ),
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Drafter, directory of draft heads or smaller checkpoint: "
            "NAME[:key=value,...]; repeatable"
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Second checkpoint to compare with, such as the original of a quantized MODEL, "
            "which then runs both packed and dense"
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also run generate() of transformers: plain, with prompt lookup, and assisted by "
            "the draft checkpoints",
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts")] = None,
    per_category: Annotated[
        int | None,
        typer.Option(min=1, help="Use only the first N prompts of each category, after --limit"),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[
        str,
        typer.Option(help="Number of prompts decoded together; a list such as 1,4,16 runs each"),
    ] = "1",
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    verify: Verify = None,
    lossy: Lossy = False,
    chain_lengths: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Also measure drafts cut to chains of 1 to N tokens, as most servers verify",
        ),
    ] = 0,
    context: Context = None,
    allow_other_target: AllowOtherTarget = False,
    field: Field = None,
    template_arg: TemplateArg = None,
    dtype: Dtype = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    plot: Annotated[
        Path | None, typer.Option(help="Chart of the speed-ups to write: a .png or .svg file")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure drafters against plain decoding and check that the output stays the same."""
    with session(json_wanted=json_output, debug=debug) as output:
        sizes = _parse_batch_sizes(batch_size)
        prepare_torch(threads)
        from spectool.data import text
        from spectool.decode.sampling import SamplingOptions
        from spectool.evaluate import bench as bench_module
        from spectool.evaluate import picture
        from spectool.evaluate.measures.losslessness import list_mismatches
        from spectool.evaluate.results import as_json
        from spectool.machine import describe

        if plot is not None:
            picture.check_picture(plot)

        sampling = SamplingOptions(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
        runs = []
        for path, path_runtime in _targets(model, reference, runtime):
            runner, tokenizer = open_runner(
                output,
                path,
                draft=None,
                dtype=dtype,
                device=device,
                runtime=path_runtime,
                context=context,
                threads=threads,
                revision=revision if path == model else None,
                trust_remote_code=trust_remote_code,
                checksums=not no_checksums,
                allow_other_target=allow_other_target,
            )
            inputs = text.read_prompts(
                prompts,
                tokenizer,
                field=field,
                template=template_arguments(template_arg) or None,
                limit=limit,
                per_category=per_category,
                reporter=output,
            )
            for size in sizes:
                if len(sizes) > 1:
                    output.say(f"batch size {size}")
                options = bench_module.Options(
                    drafts=draft or (),
                    max_new_tokens=max_new_tokens,
                    batch_size=size,
                    baselines=baselines,
                    sampling=sampling,
                    seed=seed,
                    verify=verify,
                    lossy=lossy,
                    chain_lengths=chain_lengths,
                )
                result = bench_module.bench(runner, inputs, options, reporter=output)
                runs.append(replace(result, model=path))
            # Free this model before the next one is loaded: both may not fit in memory.
            del runner
        for start in range(0, len(runs), len(sizes)):
            same_model = runs[start : start + len(sizes)]
            if len(runs) > len(sizes):
                output.show(f"{same_model[0].model}: {same_model[0].runtime}")
            output.show(drafter_table(same_model))
            for run in same_model:
                output.show(_describe_cuts(run))
                if chain_lengths:
                    output.show(chain_table(run, chain_lengths))
        if len(runs) > len(sizes):
            output.show(comparison_table(runs))
        machine = describe()
        if plot is not None:
            picture.draw(runs, machine, plot)
            output.say(f"picture: {plot}")
        output.result({"machine": machine, **as_json(runs[0]), "other_runs": as_json(runs[1:])})
        broken = [f"{name} on {run.model}" for run in runs for name in list_mismatches(run)]
        if broken:
            output.say(f"error: output differs from plain decoding in float32: {', '.join(broken)}")
            raise typer.Exit(1)


def _parse_batch_sizes(text: str) -> list[int]:
    """Parse a comma-separated list of batch sizes and drop duplicates.

    Raises:
        UsageError: a part is not a positive number.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch-size {text}: expected positive numbers, as 4 or 1,4,16")
    return list(dict.fromkeys(map(int, parts)))


def _describe_cuts(run: Run) -> str:
    line = (
        f"{run.kept_share:.0%} of the plain output kept: {run.prompts_cut} of "
        f"{run.prompts} prompts cut where it began to repeat itself"
    )
    if run.prompts_left_out:
        line += f"; left out as too long for the context: {run.prompts_left_out}"
    return line


def _targets(model: str, reference: str | None, runtime: str) -> list[tuple[str, str]]:
    """Return the checkpoints to run, each with its runtime, in order.

    A quantized MODEL with a reference runs both packed and dense.

    Raises:
        UsageError: --runtime with a quantized MODEL and a reference.
    """
    from spectool.checkpoint.tensors import open_checkpoint

    if reference is None:
        return [(model, runtime)]
    if not open_checkpoint(model).layout.is_packed:
        return [(model, runtime), (reference, "auto")]
    if runtime != "auto":
        raise UsageError(
            "--reference runs a quantized MODEL both packed and dense; leave --runtime out"
        )
    return [(model, "packed"), (model, "dense"), (reference, "auto")]
