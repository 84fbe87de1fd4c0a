"""`spectool bench MODEL`: drafters side by side on this machine, with the equality check."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectool.cli.common import (
    AllowOtherTarget,
    BatchSize,
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
    read_prompts,
    session,
)


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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    verify: Verify = None,
    lossy: Lossy = False,
    context: Context = None,
    allow_other_target: AllowOtherTarget = False,
    field: Field = None,
    template_arg: TemplateArg = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    runtime: Runtime = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Speed of each drafter against plain decoding, and whether the output stayed the same."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(threads)
        from spectool.decode.sampling import Law
        from spectool.evaluate import bench as room
        from spectool.loading import describe_runtime
        from spectool.machine import describe

        law = Law(
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
                allow_other_target=allow_other_target,
            )
            found = read_prompts(
                tokenizer,
                prompt=None,
                prompts=prompts,
                field=field,
                template=template_arg,
                limit=limit,
            )
            result = room.bench(
                runner,
                found,
                draft or (),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                law=law,
                seed=seed,
                verify=verify,
                lossy=lossy,
                say=output.say,
            )
            how = describe_runtime(runner.target.model)
            # Before the next model is read: two would not fit everywhere.
            del runner
            runs.append({"model": path, "runtime": how, **result})
        for run in runs:
            if len(runs) > 1:
                output.show(f"{run['model']}: {run['runtime']}")
            output.show(_table(run))
            output.show(
                f"{run['kept_share']:.0%} of the plain output kept: {run['prompts_cut']} of "
                f"{run['prompts']} prompts cut where it began to repeat itself"
            )
        if len(runs) > 1:
            output.show(_comparison(runs))
        output.result({"machine": describe(), **runs[0], "beside": runs[1:]})
        broken = [f"{name} on {run['model']}" for run in runs for name in room.broken_promises(run)]
        if broken:
            output.say(f"error: output differs from plain decoding in float32: {', '.join(broken)}")
            raise typer.Exit(1)


def _targets(model: str, reference: str | None, runtime: str) -> list[tuple[str, str]]:
    """What to run, and how: MODEL alone, or a packed one in both ways and then its reference."""
    from spectool.checkpoint import open_checkpoint
    from spectool.errors import UsageError

    if reference is None:
        return [(model, runtime)]
    if not open_checkpoint(model).layout.is_packed:
        return [(model, runtime), (reference, "auto")]
    if runtime != "auto":
        raise UsageError("--reference runs a packed MODEL both packed and dense; no --runtime")
    return [(model, "packed"), (model, "dense"), (reference, "auto")]


def _table(result: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("drafter", "tok/s", "speed-up", "tokens/forward", "accepted", "identical"):
        left = heading == "drafter"
        # A path that is cut short could be any of several.
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in (result["baseline"], *result["drafters"]):
        identical = row.get("identical")
        table.add_row(
            row["name"] + ("" if row["lossless"] else " (lossy)"),
            f"{row['tokens_per_second']:.1f}",
            f"{row.get('speedup', 1):.2f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "-",
            "-" if identical is None else f"{identical}/{row['prompts']}",
        )
    return table


def _comparison(runs: list[dict[str, Any]]) -> Any:
    """The best of every run beside plain decoding of the last one, the reference."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("runs", "plain tok/s", "best tok/s", "drafter", "of the reference"):
        left = heading in ("runs", "drafter")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    plain = runs[-1]["baseline"]["tokens_per_second"]
    for run in runs:
        rows = [run["baseline"], *run["drafters"]]
        best = max(rows, key=lambda row: float(row["tokens_per_second"]))
        table.add_row(
            f"{run['model']}: {run['runtime']}",
            f"{run['baseline']['tokens_per_second']:.1f}",
            f"{best['tokens_per_second']:.1f}",
            best["name"],
            f"{best['tokens_per_second'] / plain:.2f}",
        )
    return table
