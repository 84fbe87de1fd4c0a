"""Shared parts of the subcommands: options, output as text or JSON, exit codes of errors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from spectool.cli.events import describe, describe_metrics
from spectool.data.text import Reading
from spectool.errors import Interrupted, SpectoolError, UsageError
from spectool.report import Reporter, TrainingStep

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from spectool.data.text import Prompt
    from spectool.decode.generate import Runner

SCHEMA_VERSION = 2

# Where stderr is no terminal, seconds between two lines of progress.
QUIET_SECONDS = 60.0

Model = Annotated[str, typer.Argument(help="Checkpoint: local directory or Hugging Face hub id")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Dtype to compute in: float32, bfloat16, float16 or float64; default: the "
        "checkpoint's dtype, or float32 on a CPU that is slow in it"
    ),
]


def _resolve_device(context: typer.Context, device: str) -> str:
    if device != "auto" or context.resilient_parsing:
        return device
    import torch

    # torchrun starts one process per GPU: with fewer GPUs than processes, all compute on the CPU.
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "cuda" if torch.cuda.device_count() >= wanted else "cpu"


Device = Annotated[
    str,
    typer.Option(
        help="Device: cpu, cuda, cuda:N, or auto (cuda if available)", callback=_resolve_device
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="CPU threads; default: as many as the system runs at the same time"
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a checkpoint from the hub")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint"),
]
Runtime = Annotated[
    str,
    typer.Option(
        help="How to hold quantized weights: packed (as codes), dense (unpacked), or auto "
        "(packed where a kernel computes with the codes)"
    ),
]
NoChecksums = Annotated[
    bool,
    typer.Option(
        "--no-checksums", help="Load quantized weights and draft heads without verifying checksums"
    ),
]
Field = Annotated[
    str | None, typer.Option(help="Field to read from the rows of .jsonl and .parquet files")
]
TemplateArg = Annotated[
    list[str] | None,
    typer.Option(help="Argument for the chat template, as key=value; repeatable"),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of new tokens per prompt")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of prompts decoded together")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy decoding")
]
TopK = Annotated[
    int, typer.Option(min=0, help="Sample from the K most likely tokens only; 0: from all")
]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Sample from the most likely tokens up to this total probability; 1: from all",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Drop tokens below this share of the most likely token's probability; 0: none",
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Factor that makes tokens of the prompt and the output less likely; 1: off"),
]
NoRepeatNgramSize = Annotated[
    int, typer.Option(min=0, help="Let no n-gram of this size occur twice; 0: off")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        help="TOKEN=VALUE: add a number to the logit of a token id, -inf to exclude it; repeatable",
    ),
]
Ban = Annotated[
    list[str] | None,
    typer.Option("--ban", help="Text that the output never completes; repeatable"),
]
Verify = Annotated[
    str | None,
    typer.Option(help="Rule that accepts drafted tokens; default: the exact one for the drafter"),
]
Lossy = Annotated[
    bool,
    typer.Option("--lossy", help="Allow a verification rule that changes the output distribution"),
]
AllowOtherTarget = Annotated[
    bool,
    typer.Option(
        "--allow-other-target", help="Run draft heads that were trained for another model"
    ),
]
Context = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of tokens of prompt and output together")
]


class Output(Reporter):
    """Output of a command, and reporter of its run: results to stdout, all other lines to stderr.

    With --json the only output on stdout is one JSON object. `quiet`: print nothing, since another
    process of the same run prints. `so_far` returns the partial result of a run that fails, which
    the JSON object then holds next to the error. `show_plan` prints the command's plan.
    """

    def __init__(self, *, json_wanted: bool) -> None:
        self.json_wanted = json_wanted
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.work_began = self.began
        self.finished = self.quiet = False
        self.readings: list[dict[str, Any]] = []
        self.so_far: Callable[[], Mapping[str, Any]] = dict
        self.show_plan: Callable[[Any], None] = lambda plan: None
        self._held_out = ""
        self._last_line = 0.0

    def say(self, line: str) -> None:
        """Print a line to stderr."""
        if self.quiet:
            return
        self.err.print(escape(line))

    def plan(self, plan: Any) -> None:
        self.show_plan(plan)
        self._start()

    def event(self, event: Any) -> None:
        """Print what happened; of texts once, even if several models read them."""
        if isinstance(event, TrainingStep):
            self._show_step(event)
            return
        if isinstance(event, Reading):
            found = event.as_dict()
            if found in self.readings:
                return
            self.readings.append(found)
        for line in describe(event):
            self.say(line)
        self._start()

    def _show_step(self, step: TrainingStep) -> None:
        if step.evaluation is not None:
            self._held_out = f", held out {describe_metrics(step.evaluation)}"
        if step.step:
            what = f"{step.name}: loss {step.metrics['loss']:.3f}{self._held_out}, steps"
            self.progress(step.step, step.steps, what)

    def complain(self, error: SpectoolError) -> None:
        """Print an error and its hint, each as one line."""
        if self.quiet:
            return
        self.err.print(f"[red]error[/red]: {escape(' '.join(str(error).split()))}")
        if error.hint:
            self.err.print(f"\nhint: {escape(error.hint)}")

    def show(self, line: Any = "") -> None:
        """Print a line or table of the result to stdout, or to stderr with --json."""
        if self.quiet:
            return
        (self.err if self.json_wanted else self.out).print(
            escape(line) if isinstance(line, str) else line
        )

    def result(self, value: Mapping[str, Any]) -> None:
        """Write the JSON object with --json. Called once: programs expect a single object."""
        assert not self.finished
        self.finished = True
        if self.json_wanted and not self.quiet:
            read = {"read": self.readings} if self.readings else {}
            safe = _finite({"schema_version": SCHEMA_VERSION, **value, **read})
            sys.stdout.write(json.dumps(safe, allow_nan=False) + "\n")
            sys.stdout.flush()

    def _start(self) -> None:
        """Start the clock of `progress`, so that its estimate leaves out what came before."""
        self.work_began = self._last_line = time.monotonic()

    def progress(self, done: float, total: int, what: str) -> None:
        """Print the steps done, fractions included, and estimate the time left.

        On a terminal one line is rewritten; elsewhere lines are at least QUIET_SECONDS apart,
        apart from the first and the last.
        """
        if self.quiet:
            return
        now = time.monotonic()
        left = (now - self.work_began) / done * (total - done)
        count = f"{done:.2f}" if done % 1 else f"{done:.0f}"
        line = f"{what}: {count}/{total}, {_duration(left)} left"
        if self.err.is_terminal:
            self.err.print(escape(line), end="\n" if done == total else "\r")
        elif done in (1, total) or now - self._last_line > QUIET_SECONDS:
            self._last_line = now
            self.say(line)
        if done == total:
            self._start()


def is_other_process() -> bool:
    """Return whether this is a torchrun process other than rank 0, the only one that prints."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK") != "0"


@contextlib.contextmanager
def session(*, json_wanted: bool = False, debug: bool = False) -> Iterator[Output]:
    """Run a command's body and turn errors and signals into one line and an exit code."""
    output = Output(json_wanted=json_wanted)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        _quiet_libraries()
        yield output
    except KeyboardInterrupt:
        _fail(output, Interrupted("interrupted"), debug)
    except SpectoolError as error:
        _fail(output, error, debug)
    except typer.Exit:
        raise
    except BrokenPipeError:
        # The reader of our output left, as `head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        # Other processes may not see this error, so a quiet one prints it too, but not as JSON:
        # only rank 0 writes the JSON object.
        output.quiet, output.json_wanted = False, json_wanted and not output.quiet
        reason = "out of memory" if "memory" in str(error).lower() else type(error).__name__
        line = f"{reason}: {error}" if str(error) else reason
        _fail(output, SpectoolError(line, hint="--debug shows where"), debug)
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(output: Output, error: SpectoolError, debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)
    output.complain(error)
    if not output.finished:
        message = " ".join(str(error).split())
        with contextlib.suppress(OSError):
            record = {"message": message, "exit_code": error.exit_code}
            output.result({**output.so_far(), "error": record})
    raise typer.Exit(error.exit_code)


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Turn off the progress bars and advice of transformers and the hub client.

    By environment variables, so that neither is imported for this.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def prepare_torch(threads: int | None) -> None:
    """Import torch and transformers, set the number of threads, turn off progress bars."""
    import transformers

    from spectool import machine

    machine.set_threads(threads)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def template_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """Return `--template-arg` pairs as a dictionary."""
    from spectool.data import template

    return template.template_arguments(pairs or [])


def open_runner(
    output: Output,
    model: str,
    *,
    draft: str | None,
    dtype: str | None,
    device: str,
    runtime: str,
    context: int | None,
    threads: int | None,
    revision: str | None,
    trust_remote_code: bool,
    allow_other_target: bool = False,
    tune: bool = False,
    checksums: bool = True,
) -> tuple[Runner, PreTrainedTokenizerBase]:
    """Load a model, its tokenizer and its drafter, and print what runs."""
    prepare_torch(threads)
    from spectool.checkpoint.tensors import open_checkpoint
    from spectool.decode.generate import Runner
    from spectool.decode.policy.tuned import Tuned
    from spectool.model import loading

    checkpoint = open_checkpoint(
        model, revision=revision, trust_remote_code=trust_remote_code, checksums=checksums
    )
    layout = checkpoint.layout
    dtype_or_default = dtype or loading.default_dtype(layout, loading.check_device(device))
    opened = loading.load_model(
        checkpoint,
        dtype=dtype_or_default,
        device=device,
        runtime=runtime,
        for_decoding=True,
        reporter=output,
    )
    tokenizer = loading.load_tokenizer(checkpoint)
    runner = Runner(
        opened,
        draft=draft,
        tokenizer=tokenizer,
        context=context,
        allow_other_target=allow_other_target,
        tune=tune,
        checksums=checksums,
    )
    for format, choice in runner.target.kernels.items():
        output.say(f"few rows times {format} matrices: {choice}")
    for note in runner.target.notes:
        output.say(note)
    if isinstance(runner.drafter, Tuned):
        output.say(f"drafting with {runner.drafter_name} while that is faster: {runner.curve}")
    return runner, tokenizer


def read_prompts(
    output: Output,
    tokenizer: Any,
    *,
    prompt: list[str] | None,
    prompts: str | None,
    field: str | None,
    template: list[str] | None,
) -> list[Prompt]:
    """Return the prompts given as options, in a file, or on stdin.

    Raises:
        UsageError: prompts given in two ways, or none given.
    """
    from spectool.data import text

    if prompt and prompts:
        raise UsageError("--prompt and --prompts exclude each other")
    if prompts:
        return text.read_prompts(
            prompts,
            tokenizer,
            field=field,
            template=template_arguments(template) or None,
            reporter=output,
        )
    return [text.Prompt(given) for given in prompt or [_standard_input()]]


def _standard_input() -> str:
    """Read the text on stdin.

    Raises:
        UsageError: stdin is a terminal, empty, or not UTF-8.
    """
    text = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: not UTF-8 text (byte {error.start})") from error
    if not text:
        raise UsageError("no prompt", hint="--prompt TEXT, --prompts FILE, or text on stdin")
    return text


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
