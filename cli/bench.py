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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: BatchSize = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
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
        runner, tokenizer = open_runner(
            output,
            model,
            draft=None,
            dtype=dtype,
            device=device,
            runtime=runtime,
            context=context,
            threads=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_other_target=allow_other_target,
        )
        from spectool.evaluate import bench as room
        from spectool.machine import describe

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
            law=room.Law(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            verify=verify,
            lossy=lossy,
            say=output.say,
        )
        result = {"machine": describe(), **result}
        output.show(_table(result))
        output.show(
            f"{result['kept_share']:.0%} of the plain output kept: {result['prompts_cut']} of "
            f"{result['prompts']} prompts cut where it began to repeat itself"
        )
        output.result(result)
        broken = room.broken_promises(result)
        if broken:
            output.say(f"error: output differs from plain decoding in float32: {', '.join(broken)}")
            raise typer.Exit(1)


def _table(result: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("drafter", "tok/s", "speed-up", "tokens/forward", "accepted", "identical"):
        table.add_column(heading, justify="left" if heading == "drafter" else "right")
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
