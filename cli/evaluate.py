"""`spectool eval MODEL`: run measures, and check gates on their metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.options import Config, option
from spectool.shared_options import LoadOptions, TextOptions

if TYPE_CHECKING:
    from spectool.evaluate.context import Plan, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions(Config):
    """What is measured, and on which text."""

    reference: str | None = option(
        None, "Checkpoint to compare with, or a file written by --save-reference"
    )
    text: tuple[str, ...] = option(
        (),
        "Evaluation text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; repeatable",
    )
    window: int | None = option(
        None, "Tokens per window; default: the model's context, at most 2048", minimum=2
    )
    bos: bool = option(False, "Start each window with the BOS token", switch=True)
    limit: int | None = option(None, "Use only the first N characters of the text", minimum=1)
    gate: tuple[str, ...] = option(
        (),
        "Condition on a metric, such as 'perplexity_ratio<=1.1': exit code 3 if it does not hold; "
        "repeatable",
    )
    measure: tuple[str, ...] = option(
        (),
        "What to measure (`spectool list measures`); repeatable; default: everything that the "
        "other options allow",
    )
    prompts: str | None = option(None, "File of prompts for speed and losslessness: .txt or .jsonl")
    draft: tuple[str, ...] = option(
        (),
        "Drafter, directory of draft heads or smaller checkpoint: NAME[:key=value,...]; "
        "repeatable; default: auto",
    )
    max_new_tokens: int = option(128, "Maximum number of new tokens per prompt", minimum=1)
    save_reference: Path | None = option(None, "File to write the model's log-probabilities to")
    save_top_k: int = option(
        0,
        "Log-probabilities per position that --save-reference keeps; 0: all (lossless)",
        minimum=0,
    )
    batch_size: int | None = option(
        None, "Number of windows run together; default: as many as fit", minimum=1
    )
    blockwise: bool = option(
        False, "Load and run one block at a time even if all would fit", switch=True
    )


def evaluate(output: Output, options: EvalOptions, reading: TextOptions, load: LoadOptions) -> None:
    """Measure MODEL: perplexity, distance from a reference, speed and losslessness of drafting."""
    prepare_torch(load.threads)
    from spectool.evaluate.context import Context, Request
    from spectool.evaluate.suite import evaluate as run_measures

    request = Request(
        measures=options.measure,
        texts=options.text,
        text_field=reading.field,
        template=reading.template,
        window=options.window,
        bos=options.bos,
        limit=options.limit,
        reference=options.reference,
        save_reference=options.save_reference,
        top_k=options.save_top_k,
        prompts=options.prompts,
        drafts=options.draft or ("auto",),
        max_new_tokens=options.max_new_tokens,
        dtype=load.dtype,
        device=load.resolve_device(),
        runtime=load.runtime,
        batch_size=options.batch_size,
        blockwise=options.blockwise,
    )
    output.show_plan = lambda plan: _show_plan(output, request, plan)
    context = Context(load.open(), request, reporter=output)
    evaluation = run_measures(context, gates=options.gate)
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
