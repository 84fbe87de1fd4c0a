"""`spectool demo`: quantize, train heads and measure on the bundled checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.errors import Interrupted, SpectoolError, UsageError
from spectool.files import size
from spectool.options import Config, option, same_option
from spectool.shared_options import PlaceOptions

# Below two bits a small model loses much; a higher ratio would point to a bug.
GATE = "perplexity_ratio<=1.6"
CHECKPOINT = "tiny-python"
MARKER = ".spectool-demo"

# min_n=1 looks up single tokens too: code repeats names more often than phrases.
NGRAM = "ngram:min_n=1,nodes=24"

# Enough text for a run of a few minutes.
TRAIN_CHARACTERS = 1_000_000
HELD_OUT_CHARACTERS = 60_000
NUM_PROMPTS = 8
PROMPT_LINES = 24
# About 400 tokens, which leaves the rest of the context for generated text.
PROMPT_CHARACTERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions(Config):
    """Options of the demo: its directory and its threads."""

    out: Path = option(
        Path("spectool-demo"), "Directory for texts, checkpoint and heads", argument=True
    )
    threads: int | None = same_option(PlaceOptions, "threads")


def demo(output: Output, options: DemoOptions) -> None:
    """Quantize the bundled checkpoint, train draft heads, measure loss and speed-up, and run it."""
    prepare_torch(options.threads)
    out = options.out
    path = Path(str(resources.files("spectool.examples").joinpath(CHECKPOINT)))
    # A relative path keeps the commands short in a clone, where `make demo` runs.
    inside = path.is_relative_to(Path.cwd())
    model = str(path.relative_to(Path.cwd()) if inside else path)
    _prepare_directory(out)
    texts = _write_texts(out)
    output.say(
        f"demo: {CHECKPOINT}, trained and measured on separate files of Python's standard "
        f"library; writes to {out}"
    )
    steps = _steps(out, model, texts)
    results: dict[str, dict[str, Any]] = {}
    for number, (name, words) in enumerate(steps.items(), start=1):
        output.say(f"\n[{number}/{len(steps)}] $ spectool {shlex.join(words)}")
        results[name] = _run(output, words)
    sample = results["generate"]["results"][0]["text"]
    output.show(f"\n{texts['sample']}{sample}\n")
    output.show(_table(results))
    seconds = time.monotonic() - output.began
    holds = results["eval"]["gates"][0]["holds"]
    output.show(
        f"gate {GATE}: {'holds' if holds else 'does not hold'}; greedy output identical with "
        f"every drafter on every model; {seconds:.0f} s"
    )
    # After `make demo` the environment's folder need not be on PATH.
    program = ["spectool"] if shutil.which("spectool") else [sys.executable, "-m", "spectool"]
    more = _next_commands(out, model, texts)
    commands = [shlex.join([*program, *words]) for words in more]
    output.show("\n".join(["\nto try next:", *(f"  {command}" for command in commands)]))
    output.result({"seconds": seconds, "steps": results, "next": commands})
    if not holds:
        raise typer.Exit(3)


def _steps(out: Path, model: str, texts: dict[str, str]) -> dict[str, list[str]]:
    """Return the commands of the demo by name."""
    packed, heads, packed_heads = out / "packed", out / "heads", out / "heads-of-packed"
    train = [
        "--data", texts["train"], "--steps", "80", "--seq-len", "256", "--batch-tokens",
        "1024", "--learning-rate", "3e-3", "--held-out", "12", "--overwrite",
    ]  # fmt: skip
    bench = [
        "--prompts", texts["prompts"], "--limit", "4", "--max-new-tokens", "64",
        "--dtype", "float32",
    ]  # fmt: skip
    return {
        "quantize": [
            "quantize", "ptq161", model, str(packed), "--calibration", texts["train"],
            "--samples", "32", "--seq-len", "256", "--epochs", "2", "--overwrite",
        ],
        "heads": ["train-heads", "medusa", model, str(heads), *train],
        "heads of packed": ["train-heads", "medusa", str(packed), str(packed_heads), *train],
        "eval": [
            "eval", str(packed), "--reference", model, "--text", texts["held-out"], "--bos",
            "--window", "512", "--gate", GATE,
        ],
        "bench": [
            "bench", str(packed), "--reference", model, *bench, "--draft", NGRAM,
            "--draft", str(heads), "--draft", str(packed_heads),
        ],
        "generate": [
            "generate", str(packed), "--prompt", texts["sample"], "--draft", str(packed_heads),
            "--max-new-tokens", "80",
        ],
    }  # fmt: skip


def _prepare_directory(out: Path) -> None:
    """Create the demo's directory, or reuse one from an earlier demo, whose files are overwritten.

    Raises:
        UsageError: `out` is a file, or a directory that no demo made.
        InputError: it cannot be created.
    """
    from spectool.files import disk_errors

    with disk_errors(out):
        reusable = (out / MARKER).is_file() or (out.is_dir() and not any(out.iterdir()))
        if out.exists() and not reusable:
            raise UsageError(
                f"{out}: exists, and no demo made it", hint="name a directory that does not exist"
            )
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()


def _run(output: Output, words: list[str]) -> dict[str, Any]:
    """Run a spectool command, let its stderr through, and return its JSON result.

    Raises:
        Interrupted: the command was interrupted.
        SpectoolError: the command failed; a failed gate (exit code 3) is reported at the end.
    """
    from spectool.cli import app

    captured = io.StringIO()
    command: Any = typer.main.get_command(app)
    with contextlib.redirect_stdout(captured):
        code = command.main([*words, "--json"], prog_name="spectool", standalone_mode=False)
    if code == 130:
        raise Interrupted("interrupted; the same command starts over")
    if code not in (None, 0, 3):
        raise SpectoolError(f"spectool {words[0]} ended with exit code {code}")
    result: dict[str, Any] = json.loads(captured.getvalue())
    return result


def _next_commands(out: Path, model: str, texts: dict[str, str]) -> list[list[str]]:
    """Return commands to try next: chat, bench against transformers, and quantize with 3 bits."""
    packed = str(out / "packed")
    return [
        ["chat", packed, "--draft", str(out / "heads-of-packed")],
        [
            "bench", packed, "--prompts", texts["prompts"], "--limit", "4",
            "--draft", "trigram+recycle:tune", "--baselines",
        ],
        [
            "quantize", "gptq", model, str(out / "packed-3-bit"), "--bits", "3",
            "--calibration", texts["train"], "--samples", "32", "--seq-len", "256",
        ],
    ]  # fmt: skip


def _write_texts(out: Path) -> dict[str, str]:
    """Write training text and, from held-out files, evaluation text and prompts.

    Returns the path of each, and the prompt to generate from as `sample`.
    """
    from spectool.examples.stdlib import make_conversations, read_documents

    library = list(read_documents())
    rows: list[dict[str, Any]] = []
    for number, document in enumerate(library):
        # Every fourth file, so that each part of the library and each kind of row is included.
        if not document.held_out and number % 4 == 0:
            rows.append({"text": document.text[:12_000]})
            rows += [{"messages": talk} for talk in list(make_conversations(document))[:6]]
    train, total = [], 0
    for row in rows:
        line = json.dumps(row)
        total += len(line)
        if total > TRAIN_CHARACTERS:
            break
        train.append(line)
    held_out = [
        document.text for document in library if document.held_out and len(document.text) > 6000
    ]
    prompts = []
    for text in held_out:
        lines = text.splitlines(keepends=True)
        for start in (len(lines) // 3, 2 * len(lines) // 3):
            prompt = "".join(lines[start : start + PROMPT_LINES])
            if len(prompt) <= PROMPT_CHARACTERS:
                prompts.append(prompt)
    chosen = prompts[:: max(1, len(prompts) // NUM_PROMPTS)][:NUM_PROMPTS]
    files = {
        "train": (out / "train.jsonl", "\n".join(train) + "\n"),
        "held-out": (out / "held-out.txt", "\n\n".join(held_out)[:HELD_OUT_CHARACTERS]),
        "prompts": (
            out / "prompts.jsonl",
            "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in chosen),
        ),
    }
    for path, text in files.values():
        path.write_text(text, encoding="utf-8")
    return {"sample": chosen[0], **{name: str(path) for name, (path, _) in files.items()}}


def _table(results: dict[str, dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("")
    for heading in ("original", "packed"):
        table.add_column(heading, justify="right")
    quantized, measured = results["quantize"], results["eval"]
    packed = results["bench"]
    dense, original = packed["other_runs"]
    unpacked = dense["baseline"]["tokens_per_second"]
    table.add_row(
        "bits per weight, linears", "16", f"{quantized['bits_per_weight']['linears']:.3f}"
    )
    table.add_row("bits per weight, file", "16", f"{quantized['bits_per_weight']['file']:.3f}")
    table.add_row("weights", "", size(quantized["bytes"]))
    table.add_row(
        "held-out perplexity",
        f"{measured['reference']['perplexity']:.2f}",
        f"{measured['perplexity']['value']:.2f}",
    )
    table.add_row("same top token", "", f"{measured['top1_agreement']['value']:.1%}")
    for index, name in enumerate(("plain", "ngram", "heads", "heads of packed")):
        cells = []
        for run in (original, packed):
            row = (run["baseline"], *run["drafters"])[index]
            cells.append(f"{row['tokens_per_second']:.0f} ({row['tokens_per_forward']:.2f})")
        table.add_row(f"{name}: tok/s (per forward)", *cells)
    table.add_row("plain, unpacked once", "", f"{unpacked:.0f} (1.00)")
    return table
