"""Shared parts of the subcommands: options, output as text or JSON, exit codes of errors."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from spectool.errors import Interrupted, SpectoolError, UsageError
from spectool.files import replace_nonfinite
from spectool.report import Loaded, Reporter, TrainingStep

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from spectool.data.text import Prompt
    from spectool.decode.generate import Runner
    from spectool.decode.options import RunnerOptions, StrategyOptions
    from spectool.decode.result import Result
    from spectool.decode.target.base import Target
    from spectool.options import Config
    from spectool.shared_options import TextOptions

SCHEMA_VERSION = 3

# Where stderr is no terminal, seconds between two lines of progress.
QUIET_SECONDS = 60.0


class Output(Reporter):
    """Output of a command, and reporter of its run: results to stdout, all other lines to stderr.

    With --json the only output on stdout is one JSON object. `quiet`: print nothing, since another
    process of the same run prints. `so_far` returns the partial result of a run that fails, which
    the JSON object then holds next to the error. `command`: the command line that says all options,
    once they are read. `show_plan` prints the command's plan. `resume`: the hint of an interrupted
    run that can be continued.
    """

    def __init__(self, *, json_wanted: bool) -> None:
        self.json_wanted = json_wanted
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.work_began = self.began
        self.finished = False
        self.command: str | None = None
        self.quiet = is_other_process()
        self.readings: list[dict[str, Any]] = []
        self.so_far: Callable[[], Mapping[str, Any]] = dict
        self.show_plan: Callable[[Any], None] = lambda plan: None
        self.resume: str | None = None
        self._loaded: set[str] = set()
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
        """Print what happened; of texts and loaded models once, even if several read them."""
        if isinstance(event, TrainingStep):
            self._show_step(event)
            return
        # Imported here, as `--help` describes no events.
        from spectool.cli.events import describe
        from spectool.data.text import Reading

        if isinstance(event, Reading):
            found = event.as_dict()
            if found in self.readings:
                return
            self.readings.append(found)
        lines = list(describe(event))
        if isinstance(event, Loaded):
            lines = [line for line in lines if line not in self._loaded]
            self._loaded.update(lines)
        for line in lines:
            self.say(line)
        self._start()

    def _show_step(self, step: TrainingStep) -> None:
        if step.evaluation is not None:
            from spectool.cli.events import describe_metrics

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

    def result(self, value: Mapping[str, Any], *, measured: bool = False) -> None:
        """Write the JSON object with --json. Called once: programs expect a single object.

        `measured`: add the machine, which times and, in the last digits, figures depend on.
        """
        assert not self.finished
        self.finished = True
        if self.json_wanted and not self.quiet:
            made: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
            if self.command is not None:
                made["command"] = self.command
            if measured:
                from spectool.machine import describe

                made["machine"] = describe()
            read = {"read": self.readings} if self.readings else {}
            safe = replace_nonfinite({**made, **value, **read})
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
        _fail(output, Interrupted("interrupted", hint=output.resume), debug)
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
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Collect no garbage while torch is imported, and leave what was imported out of collections.

    Python would look through all objects dozens of times: 0.9 of 7.1 s of `generate`. What is not
    collected takes 8 MB.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_torch(threads: int | None) -> None:
    """Import torch, transformers and what loads models; set threads, turn off progress bars."""
    with _importing():
        import transformers

        from spectool import machine
        from spectool.model import loading  # noqa: F401

    machine.set_threads(threads)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def open_runner(
    output: Output,
    options: RunnerOptions,
    *,
    draft: str | None = None,
    tune: bool = False,
    strategy: StrategyOptions | None = None,
    seq2seq: bool = False,
) -> tuple[Runner, PreTrainedTokenizerBase]:
    """Load a model, its tokenizer and its drafter or second model, and print what runs.

    `seq2seq`: the model may be an encoder-decoder.
    """
    prepare_torch(options.threads)
    from spectool import machine
    from spectool.decode.generate import Runner
    from spectool.decode.target.open import open_strategy, open_target
    from spectool.model import loading

    checkpoint, device = options.open(seq2seq=seq2seq), options.resolve_device()
    own = loading.default_dtype(checkpoint.layout, loading.check_device(device))
    opened = loading.load_model(
        checkpoint,
        dtype=options.dtype or own,
        device=device,
        runtime=options.runtime,
        activations=options.activations,
        reporter=output,
    )
    tokenizer = loading.load_tokenizer(checkpoint)
    target = open_target(opened, context=options.context, kv=options.kv, forward=options.forward)
    if strategy is not None and strategy.strategy is not None and strategy.small is not None:
        target = open_strategy(
            strategy.strategy,
            target,
            strategy.small,
            tokenizer=tokenizer,
            context=options.context,
            activations=options.activations,
            checksums=options.checksums,
        )
    runner = Runner(
        target,
        draft=draft,
        tokenizer=tokenizer,
        allow_other_target=options.allow_other_target,
        tune=tune,
        choose_threads=tune and machine.may_choose_threads(options.threads),
        checksums=options.checksums,
    )
    for format, choice in runner.target.kernels.items():
        output.say(f"few rows times {format} matrices: {choice}")
    output.say(describe_forward(runner.target))
    if options.kv != "dense":
        output.say(f"kv {options.kv}")
    for note in runner.target.notes:
        output.say(note)
    if runner.is_tuned:
        output.say(f"drafting with {runner.drafter_name} while that is faster: {runner.costs}")
    return runner, tokenizer


def describe_forward(target: Target[Any]) -> str:
    """Return how many decoder layers run fused, and why the others do not."""
    if not target.num_fused and not target.unfused:
        return "layers run by their modules"
    kept = [f"{count} by modules ({reason})" for reason, count in target.unfused.items()]
    return ", ".join([f"{target.num_fused} of {target.num_layers} layers fused", *kept])


def describe_kv(runner: Runner) -> str:
    """Return what the cache of a run kept, or nothing if that is what the model computes."""
    target = runner.target
    if target.kv == "dense":
        return ""
    return f"kv {target.kv}: {target.kv_bytes_per_token} bytes per token"


def describe_threads(runner: Runner) -> str:
    """Return that one thread was chosen, or nothing where torch's number was."""
    if not (runner.choose_threads and runner.costs.chooses and runner.costs.threads == 1):
        return ""
    return "one thread was faster than many"


def target_record(runner: Runner) -> dict[str, Any]:
    """Return what the model computed with, for --json: activations, and keys and values."""
    from spectool.model.kernels import precision_of

    target = runner.target
    return {
        "activations": precision_of(target.model),
        "fused_layers": target.num_fused,
        "kv": target.kv,
        "kv_bytes_per_token": target.kv_bytes_per_token,
    }


def read_prompts(
    output: Output,
    path: str,
    tokenizer: Any,
    text: TextOptions,
    *,
    in_turns: bool = False,
    **limits: int | None,
) -> list[Prompt]:
    """Read the prompts of a file, or its questions in turns, and report what was read."""
    from spectool.data.questions import read_questions
    from spectool.data.text import read_prompts

    return (read_questions if in_turns else read_prompts)(
        path,
        tokenizer,
        field=text.field,
        template=text.template or None,
        reporter=output,
        **limits,
    )


def record(result: Result) -> dict[str, Any]:
    """Return the JSON object of one continuation."""
    keys = ("text", "token_ids", "forwards", "drafted", "accepted", "finish_reason")
    turns = {} if result.turns is None else {"turns": asdict(result.turns)}
    return {**{key: getattr(result, key) for key in keys}, **turns}


def totals(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return the number of tokens and forwards of several continuations, and the speed."""
    new_tokens = sum(len(result.token_ids) for result in results)
    forwards = sum(result.forwards for result in results)
    return {
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds if seconds else 0.0,
        "forwards": forwards,
        "tokens_per_forward": new_tokens / max(1, forwards),
    }


def turn_totals(results: Sequence[Result]) -> dict[str, Any]:
    """Return how two models took turns, of all continuations; nothing where one model wrote.

    `catch_up_tokens` were read by a model because the other one had them before.
    """
    turns = [result.turns for result in results if result.turns is not None]
    if not turns:
        return {}
    written = sum(len(result.token_ids) for result in results)
    return {
        "switches": sum(len(each.switches) for each in turns),
        "small_share": sum(each.small_tokens for each in turns) / max(1, written),
        "catch_up_tokens": sum(each.caught_up for each in turns),
    }


def standard_input() -> str:
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


def describe_method(name: str, config: Config) -> str:
    """Return a method's name, with the values of its options."""
    options = ", ".join(f"{key}={value}" for key, value in config.as_dict().items())
    return f"{name} ({options})" if options else name


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
