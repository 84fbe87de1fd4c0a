"""`spectool eval MODEL`: run measures, and check gates on their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectool.cli.common import (
    Debug,
    Device,
    Dtype,
    Field,
    Json,
    MaxNewTokens,
    Model,
    NoChecksums,
    Output,
    Revision,
    Runtime,
    TemplateArg,
    Threads,
    TrustRemoteCode,
    prepare_torch,
    session,
    template_arguments,
)

if TYPE_CHECKING:
    from spectool.evaluate.context import Plan, Request


def evaluate(
    model: Model,
    reference: Annotated[
        str | None,
        typer.Option(help="Checkpoint to compare with, or a file written by --save-reference"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; "
            "repeatable"
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window; default: the model's context, at most 2048"),
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="Start each window with the BOS token")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N characters of the text")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Condition on a metric, such as 'perplexity_ratio<=1.1': exit code 3 if it does "
            "not hold; repeatable"
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure (`spectool list measures`); repeatable; default: everything "
            "that the other options allow"
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="File of prompts for speed and losslessness: .txt or .jsonl"),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Drafter, directory of draft heads or smaller checkpoint: "
            "NAME[:key=value,...]; repeatable; default: auto"
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    save_reference: Annotated[
        Path | None, typer.Option(help="File to write the model's log-probabilities to")
    ] = None,
    save_top_k: Annotated[
        int,
        typer.Option(
            min=0,
            help="Log-probabilities per position that --save-reference keeps; 0: all (lossless)",
        ),
    ] = 0,
    field: Field = None,
    template_arg: TemplateArg = None,
    dtype: Dtype = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Number of windows run together; default: as many as fit"),
    ] = None,
    blockwise: Annotated[
        bool,
        typer.Option("--blockwise", help="Load and run one block at a time even if all would fit"),
    ] = False,
    threads: Threads = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    no_checksums: NoChecksums = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure MODEL: perplexity, distance from a reference, speed and losslessness of drafting."""
    with session(json_wanted=json_output, debug=debug) as output:
        prepare_torch(threads)
        from spectool.checkpoint.tensors import open_checkpoint
        from spectool.evaluate.context import Context, Request
        from spectool.evaluate.suite import evaluate as run_measures

        request = Request(
            measures=measure or (),
            texts=text or (),
            text_field=field,
            template=template_arguments(template_arg),
            window=window,
            bos=bos,
            limit=limit,
            reference=reference,
            save_reference=save_reference,
            top_k=save_top_k,
            prompts=prompts,
            drafts=draft or ("auto",),
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            device=device,
            runtime=runtime,
            batch_size=batch_size,
            blockwise=blockwise,
        )
        output.show_plan = lambda plan: _show_plan(output, request, plan)
        checkpoint = open_checkpoint(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            checksums=not no_checksums,
        )
        context = Context(checkpoint, request, reporter=output)
        evaluation = run_measures(context, gates=gate or ())
        for result in evaluation.measures:
            for line in result.lines():
                output.show(line)
        for checked in evaluation.gates:
            word = "holds" if checked.holds else "does not hold"
            output.show(f"gate {checked.expression}: {word} ({checked.value:.4g})")
        output.result(evaluation.as_json())
        if not all(checked.holds for checked in evaluation.gates):
            raise typer.Exit(3)


def _show_plan(output: Output, request: Request, plan: Plan) -> None:
    """Print what is scored, and what is kept of it."""
    windows = plan.windows
    output.say(f"text: {plan.text}")
    scored = "no BOS token, the first token of each window not scored, the text's rest dropped"
    if windows.bos is not None:
        scored = "each starts with the BOS token, all text tokens scored"
    output.say(
        f"protocol: windows of {windows.length} tokens without overlap, {scored}; "
        f"{windows.num_tokens} tokens scored"
    )
    if plan.saved_bytes is not None:
        kept = f"the {request.top_k} largest" if request.top_k else "all (lossless)"
        output.say(
            f"{request.save_reference}: log-probabilities kept: {kept}; "
            f"{plan.saved_bytes / 1e6:.1f} MB, twice that while the file is assembled"
        )
