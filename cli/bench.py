"""`spectool bench MODEL`: drafters side by side on this machine, with the equality check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectool.cli.bench_tables import chains, comparison, table
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


def bench(
    model: Model,
    prompts: Annotated[
        str, typer.Option(help="Prompts: .txt (one a line) or .jsonl (prompt, turns, messages).")
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(help="Drafter, heads or smaller checkpoint, then :key=value; repeatable."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to run beside MODEL, its original say; a packed MODEL then runs both "
            "packed and dense."
        ),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also transformers' own generate: plain, with prompt lookup, and assisted by the "
            "draft checkpoints.",
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    per_category: Annotated[
        int | None, typer.Option(min=1, help="Of these, only the first N of each category.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[
        str, typer.Option(help="Prompts decoded together; 1,4,16 runs with each.")
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
            min=0, max=16, help="Also chains of 1 to N tokens, which is what most servers verify."
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
        Path | None, typer.Option(help="Draw the speed-ups: a .png or .svg file to write.")
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Speed of each drafter against plain decoding, and whether the output stayed the same."""
    with session(json_wanted=json_output, debug=debug) as output:
        sizes = _batch_sizes(batch_size)
        prepare_torch(threads)
        from spectool.data import text
        from spectool.decode.sampling import SamplingOptions
        from spectool.evaluate import bench as room
        from spectool.evaluate import picture
        from spectool.machine import describe
        from spectool.model.loading import describe_runtime

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
        for path, how in _targets(model, reference, runtime):
            runner, tokenizer = open_runner(
                output,
                path,
                draft=None,
                dtype=dtype,
                device=device,
                runtime=how,
                context=context,
                threads=threads,
                revision=revision if path == model else None,
                trust_remote_code=trust_remote_code,
                checksums=not no_checksums,
                allow_other_target=allow_other_target,
            )
            found = text.read_prompts(
                prompts,
                tokenizer,
                field=field,
                template=template_arguments(template_arg) or None,
                limit=limit,
                per_category=per_category,
                on_read=output.note,
            )
            how = describe_runtime(runner.target.model)
            for size in sizes:
                if len(sizes) > 1:
                    output.say(f"batch size {size}")
                result = room.bench(
                    runner,
                    [prompt.given for prompt in found],
                    draft or (),
                    categories=[prompt.category for prompt in found],
                    ends=[prompt.ends for prompt in found],
                    max_new_tokens=max_new_tokens,
                    batch_size=size,
                    with_baselines=baselines,
                    sampling=sampling,
                    seed=seed,
                    verify=verify,
                    lossy=lossy,
                    chain_lengths=chain_lengths,
                    say=output.say,
                )
                runs.append({"model": path, "runtime": how, **result})
            # Before the next model is read: two would not fit everywhere.
            del runner
        for start in range(0, len(runs), len(sizes)):
            one = runs[start : start + len(sizes)]
            if len(runs) > len(sizes):
                output.show(f"{one[0]['model']}: {one[0]['runtime']}")
            output.show(table(one))
            for run in one:
                output.show(_kept(run))
                if chain_lengths:
                    output.show(chains(run, chain_lengths))
        if len(runs) > len(sizes):
            output.show(comparison(runs))
        machine = describe()
        if plot is not None:
            picture.draw(runs, machine, plot)
            output.say(f"picture: {plot}")
        output.result({"machine": machine, **runs[0], "other_runs": runs[1:]})
        broken = [f"{name} on {run['model']}" for run in runs for name in room.broken_promises(run)]
        if broken:
            output.say(f"error: output differs from plain decoding in float32: {', '.join(broken)}")
            raise typer.Exit(1)


def _batch_sizes(said: str) -> list[int]:
    """The sizes in a comma list, each once.

    Raises:
        UsageError: a part that is no positive number.
    """
    parts = [part.strip() for part in said.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch-size {said}: expected positive numbers, as 4 or 1,4,16")
    return list(dict.fromkeys(map(int, parts)))


def _kept(run: dict[str, Any]) -> str:
    line = (
        f"{run['kept_share']:.0%} of the plain output kept: {run['prompts_cut']} of "
        f"{run['prompts']} prompts cut where it began to repeat itself"
    )
    if run["prompts_left_out"]:
        line += f"; left out as too long for the context: {run['prompts_left_out']}"
    return line


def _targets(model: str, reference: str | None, runtime: str) -> list[tuple[str, str]]:
    """What to run, and how: MODEL alone, or a packed one in both ways and then its reference."""
    from spectool.checkpoint.tensors import open_checkpoint

    if reference is None:
        return [(model, runtime)]
    if not open_checkpoint(model).layout.is_packed:
        return [(model, runtime), (reference, "auto")]
    if runtime != "auto":
        raise UsageError("--reference runs a packed MODEL both packed and dense; no --runtime")
    return [(model, "packed"), (model, "dense"), (reference, "auto")]
