"""`spectool eval MODEL`: perplexity, and the distance from a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.options import Config, option
from spectool.shared_options import LoadOptions, TextOptions


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
    """Measure the perplexity of MODEL and its distance from a reference on the same tokens."""
    prepare_torch(load.threads)
    from spectool.evaluate import evaluate as evaluate_module
    from spectool.evaluate.gates import parse_gates

    request = evaluate_module.Request(
        texts=options.text,
        text_field=reading.field,
        template=reading.template,
        window=options.window,
        bos=options.bos,
        limit=options.limit,
        reference=options.reference,
        save_reference=options.save_reference,
        top_k=options.save_top_k,
        dtype=load.dtype,
        device=load.resolve_device(),
        runtime=load.runtime,
        batch_size=options.batch_size,
        blockwise=options.blockwise,
    )
    gates = parse_gates(options.gate, evaluate_module.metric_names(request))
    output.start()
    result = evaluate_module.evaluate(
        load.open(),
        request,
        say=output.say,
        progress=lambda done, total: output.progress(done, total, "tokens scored"),
        on_read=output.note,
    )
    result["gates"] = [gate.check(result) for gate in gates]
    perplexity = result["perplexity"]
    output.show(f"perplexity: {perplexity['value']:.4f}")
    if "kl" in result:
        output.show(f"reference perplexity: {result['reference']['perplexity']:.4f}")
        output.show(f"perplexity ratio: {result['perplexity_ratio']:.4f}")
        least = "at least " if result["kl_is_lower_bound"] else ""
        output.show(f"KL from the reference: {least}{result['kl']:.3e} nats per token")
        output.show(f"top-1 agreement: {result['top1_agreement']:.2%}")
    if result.get("layers"):
        worst = max(result["layers"], key=lambda layer: float(layer["error"]))
        output.show(f"largest layer error: {worst['error']:.2e} ({worst['name']})")
    for checked in result["gates"]:
        word = "holds" if checked["holds"] else "does not hold"
        output.show(f"gate {checked['expression']}: {word} ({checked['value']:.4g})")
    output.result(result)
    if not all(checked["holds"] for checked in result["gates"]):
        raise typer.Exit(3)
