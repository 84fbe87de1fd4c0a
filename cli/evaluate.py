"""`spectool eval MODEL`: run measures, and check gates on their metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.decode.options import CacheOptions
from spectool.evaluate.options import EvalOptions

if TYPE_CHECKING:
    from spectool.data.windows import Windows
    from spectool.evaluate.context import Plan


def evaluate(output: Output, options: EvalOptions, load: CacheOptions) -> None:
    """Measure MODEL: perplexity, distance from a reference, speed and losslessness of drafting."""
    prepare_torch(load.threads)
    from spectool.evaluate.context import Context
    from spectool.evaluate.suite import evaluate as run_measures
    from spectool.quantize.ledger import measure

    output.show_plan = lambda plan: _show_plan(output, options, plan)
    if options.task_log is not None:
        output.resume = f"the same command goes on with the answers in {options.task_log}"
    context = Context(load, options, reporter=output)
    evaluation = run_measures(context)
    for result in evaluation.measures:
        for line in result.lines():
            output.show(line)
    for change in evaluation.changes or ():
        output.show(change.line())
    for checked in evaluation.gates:
        word = "holds" if checked.holds else "does not hold"
        output.show(f"gate {checked.expression}: {word} ({checked.value:.4g})")
    ledger = measure(context.checkpoint.layout)
    output.result(
        {
            "model": load.model,
            "methods": sorted({entry.method for entry in ledger.entries}),
            "bits_per_weight": {"linears": ledger.linears, "file": ledger.file},
            "bytes": ledger.file_bytes,
            **evaluation.as_json(),
        },
        measured=True,
    )
    if not all(checked.holds for checked in evaluation.gates):
        raise typer.Exit(3)


def _describe_windows(windows: Windows) -> str:
    """Describe how a text was cut, and what is scored of it."""
    begins = "no BOS token" if windows.bos is None else "each starts with the BOS token"
    if windows.stride is not None:
        return (
            f"windows of {windows.length} tokens, {windows.stride} tokens apart, {begins}, each "
            "token scored in the first window that holds it"
        )
    if windows.protocol == "documents":
        first = "; the first token of each not scored" if windows.bos is None else ""
        return f"each document by itself, at most {windows.length} tokens, {begins}{first}"
    if windows.protocol == "c4":
        return (
            f"windows of {windows.length} tokens at random places of long documents, the first "
            "token of each not scored"
        )
    scored = "all text tokens scored"
    if windows.bos is None:
        scored = "the first token of each window not scored, the text's rest dropped"
    return f"windows of {windows.length} tokens without overlap, {begins}, {scored}"


def _show_plan(output: Output, options: EvalOptions, plan: Plan) -> None:
    """Print what is scored, and what is kept of it."""
    windows = plan.windows
    output.say(f"text: {plan.text}")
    name = "" if windows.protocol == "text" else f" {windows.protocol}"
    output.say(f"protocol{name}: {_describe_windows(windows)}; {windows.num_tokens} tokens scored")
    if plan.saved_bytes is not None:
        kept = f"the {options.save_top_k} largest" if options.save_top_k else "all (lossless)"
        output.say(
            f"{options.save_reference}: log-probabilities kept: {kept}; "
            f"{plan.saved_bytes / 1e6:.1f} MB, twice that while the file is assembled"
        )
