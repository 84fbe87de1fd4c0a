"""`spectool chat MODEL`: a conversation at a terminal, or line by line from stdin."""

from __future__ import annotations

import difflib
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.text import Text

from spectool.cli.common import Output, open_runner, record, target_record, totals
from spectool.data.template import template_arguments
from spectool.decode.options import DrafterOptions, RequestOptions, SamplingParams
from spectool.errors import Interrupted, SpectoolError, UsageError
from spectool.options import Config, option, same_option
from spectool.shared_options import TextOptions

if TYPE_CHECKING:
    from spectool.cli.editor import LineEditor
    from spectool.decode.chat import Chat, Reply

COMMANDS = {
    "/help": "this list",
    "/reset": "forget all turns, keep the system message",
    "/system [TEXT]": "show or set the system message",
    "/edit": "take the last message back to change it",
    "/stats": "show tokens, speed and context of this session",
    "/save FILE": "write the conversation as JSON; /save! FILE replaces a file",
    "/load FILE": "continue a saved conversation",
    "/exit": "leave, as Ctrl-D does",
}
KEYS = {
    "Enter": "send",
    "Alt-Enter, \\ Enter": "begin a new line",
    "Ctrl-C": "stop the answer, or clear the line",
    "//": "at the beginning of a message: a plain /",
}
# Control characters in a model's text are shown as symbols, since a terminal would obey them.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
_DRAFTED, _PLAIN = "\x1b[36m", "\x1b[39m"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(Config):
    """Options of a conversation."""

    system: str | None = option(None, "System message")
    raw: bool = option(False, "Continue plain text without a chat template", switch=True)
    max_new_tokens: int = option(512, "Maximum tokens per answer", minimum=1)
    template_arg: tuple[str, ...] = same_option(TextOptions, "template_arg")


def chat(
    output: Output,
    options: ChatOptions,
    request: RequestOptions,
    sampling: SamplingParams,
    load: DrafterOptions,
) -> None:
    """Chat with a model at a terminal, or answer each line of stdin as a message."""
    template = template_arguments(options.template_arg)
    runner, tokenizer = open_runner(output, load, draft=load.draft, tune=True)
    from spectool.decode.chat import Chat

    verification = runner.verification(
        runner.drafter, sampling, verify=request.verify, lossy=request.lossy
    )
    conversation = Chat(
        runner,
        tokenizer,
        request,
        sampling,
        options.max_new_tokens,
        system=options.system,
        raw=options.raw,
        template=template,
    )
    talk = _Talk(conversation, output, lossless=verification.lossless)
    output.so_far = talk.metrics
    before = signal.signal(signal.SIGTERM, talk.terminate)
    try:
        talk.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    output.result(talk.metrics())


class _Talk:
    """A conversation at a terminal or over pipes."""

    def __init__(self, chat: Chat, output: Output, *, lossless: bool) -> None:
        self.chat = chat
        self.output = output
        self.drafter = chat.runner.drafter_name + ("" if lossless else ", lossy")
        self.lossless = lossless
        # Answers and the editor never go to stdout with --json.
        streams = [output.err] if output.json_wanted else [output.out, output.err]
        self.screen = next((stream for stream in streams if stream.file.isatty()), streams[0])
        self.stdin = sys.stdin
        self.interactive = bool(self.stdin and self.stdin.isatty() and self.screen.file.isatty())
        self.coloured = self.screen.color_system is not None and not self.screen.no_color
        self.over = self.terminated = False
        self.editor: LineEditor | None = None

    def terminate(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, which ends the session, while Ctrl-C stops only an answer."""
        self.terminated = True
        raise KeyboardInterrupt

    def run(self) -> None:
        """Read and answer messages until the input ends."""
        if not self.interactive:
            for line in _lines(self.stdin.buffer if self.stdin else ()):
                self.take(line)
                if self.over:
                    return
            return
        from spectool.cli.editor import LineEditor, quiet_keys

        self.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        stream = sys.stderr if self.screen.stderr else sys.stdout
        self.editor = LineEditor(stream, self.say)
        draft = ""
        with quiet_keys():
            while not self.over:
                self.say("")
                try:
                    line = self.editor.read(draft)
                except EOFError:
                    return
                draft = self.attempt(line)

    def attempt(self, line: str) -> str:
        """Run `take` at a terminal, print errors, and return the line if it failed."""
        num_turns = len(self.chat.turns)
        try:
            return self.take(line)
        except Interrupted:
            raise
        except SpectoolError as error:
            self.output.complain(error)
        except KeyboardInterrupt:
            if self.terminated:
                raise
            self.note("stopped")
        return "" if _is_command(line) or len(self.chat.turns) > num_turns else line

    def take(self, line: str) -> str:
        """Run a command or answer a message; return the text that the editor starts with next."""
        if _is_command(line):
            name, *rest = line.split(maxsplit=1)
            return self.obey(name, "".join(rest).strip())
        if line.strip():
            self.answer(line.removeprefix("/") if line.startswith("//") else line)
        return ""

    def obey(self, name: str, rest: str) -> str:
        """Run a command; return the text that the editor starts with next."""
        match name:
            case "/help":
                for what, text in (*COMMANDS.items(), *KEYS.items()):
                    self.say(f"{what:<19} {text}", indent=20)
            case "/reset":
                self.chat.reset()
                self.say("all turns are forgotten")
            case "/system" if rest:
                self.chat.instruct(rest)
                self.say("the system message is set")
            case "/system":
                self.say(self.chat.system or "there is no system message")
            case "/edit" if self.editor is not None:
                message = self.chat.undo()
                return f"/{message}" if message.startswith("/") else message
            case "/edit":
                raise UsageError("/edit needs a terminal")
            case "/stats":
                for what, text in self.stats().items():
                    self.say(f"{what:<9} {text}", indent=10)
            case "/save" | "/save!" | "/load" if not rest:
                raise UsageError(f"{name} needs a file")
            case "/save" | "/save!":
                self.chat.save(_path(rest), overwrite=name == "/save!")
                self.say(f"saved: {_turns(len(self.chat.turns))}")
            case "/load":
                self.chat.load(_path(rest))
                self.say(f"loaded: {_turns(len(self.chat.turns))}")
            case "/exit":
                self.over = True
            case _:
                names = [what.partition(" ")[0] for what in COMMANDS]
                close = difflib.get_close_matches(name, names, n=1)
                raise UsageError(
                    f"no command is called {name}; "
                    + (f"the nearest is {close[0]}" if close else "/help lists them"),
                    hint="a message that begins with / is written with //",
                )
        return ""

    def answer(self, message: str) -> None:
        """Answer a message: print the text as it is generated, then its statistics."""
        prompt = self.chat.prompt(message)
        dropped, limit = prompt.forgotten - self.chat.forgotten, self.chat.context
        if dropped:
            oldest = "the oldest turn goes" if dropped == 1 else f"the {dropped} oldest turns go"
            self.note(f"context full: {oldest}")
        shown = ""

        def on_text(text: str, drafted: int) -> None:
            nonlocal shown
            shown = text or shown
            self.write(text[:drafted], _DRAFTED)
            self.write(text[drafted:])

        shows = self.interactive or not self.output.json_wanted
        try:
            reply = self.chat.answer(
                prompt,
                on_text=on_text if shows else None,
                keep_interrupted=self.interactive,
            )
        finally:
            if shows and not shown.endswith("\n"):
                self.write("\n")
        if self.terminated:
            raise KeyboardInterrupt
        ends = {
            "interrupted": "stopped",
            "length": f"cut at --max-new-tokens {self.chat.max_new_tokens}",
            "context": f"cut: the context ({limit}) is full",
        }
        if reply.result.finish_reason in ends:
            self.note(ends[reply.result.finish_reason])
        self.say(self.status(reply), indent=3, style="dim")

    def write(self, text: str, colour: str | None = None) -> None:
        """Write text to the screen, with control characters replaced on a terminal."""
        if self.screen.is_terminal:
            text = text.translate(_VISIBLE)
        if colour and text and self.coloured:
            text = f"{colour}{text}{_PLAIN}"
        self.screen.file.write(text)
        self.screen.file.flush()

    def say(self, line: str, *, indent: int = 0, style: str = "") -> None:
        """Print a line to stderr that is not part of an answer, wrapped on a terminal."""
        err = self.output.err
        if err.is_terminal:
            width = max(err.width, 30)
            lines = line.translate(_VISIBLE).split("\n")
            line = "\n".join(
                textwrap.fill(part, width, subsequent_indent=" " * indent) for part in lines
            )
        err.print(Text(line, style=style))

    def note(self, line: str) -> None:
        """Print a remark about an answer, marked with -- so that it stands out without colour."""
        self.say(f"-- {line}", indent=3, style="yellow")

    def status(self, reply: Reply) -> str:
        """Return the statistics of an answer, in short form on a narrow terminal."""
        result, used, limit = reply.result, reply.used, self.chat.context
        tokens, speed = len(result.token_ids), len(result.token_ids) / reply.seconds
        long = (
            f"-- {tokens} tokens, {speed:.1f} tok/s, {result.tokens_per_forward:.2f} tokens per "
            f"forward, context {used}/{limit}, {self.drafter}"
        )
        if not self.output.err.is_terminal or len(long) <= self.output.err.width:
            return long
        forward = f"{result.tokens_per_forward:.2f}/fwd"
        return f"-- {speed:.0f} tok/s, {forward}, {used}/{limit}, {self.drafter}"

    def stats(self) -> dict[str, str]:
        """Return the session's statistics as text for /stats."""
        metrics, forgotten = self.metrics(), self.chat.forgotten
        return {
            "turns": f"{len(self.chat.turns)}" + (f", {forgotten} forgotten" if forgotten else ""),
            "context": f"{self.chat.context} tokens",
            "tokens": f"{metrics['new_tokens']} in {len(self.chat.replies)} answers",
            "speed": f"{metrics['tokens_per_second']:.1f} tok/s",
            "forwards": f"{metrics['forwards']}, {metrics['tokens_per_forward']:.2f} tokens each",
            "drafter": self.drafter,
            "drafted": f"{metrics['drafted']} tokens, {metrics['accepted']} accepted",
        }

    def metrics(self) -> dict[str, Any]:
        """Return the transcript and the session's statistics for --json."""
        replies = self.chat.replies
        results = [reply.result for reply in replies]
        return {
            "system": self.chat.system,
            "messages": self.chat.messages,
            "answers": [
                {
                    **record(reply.result),
                    "context_used": reply.used,
                    "seconds": reply.seconds,
                }
                for reply in replies
            ],
            "forgotten_turns": self.chat.forgotten,
            "context": self.chat.context,
            **totals(results, sum(reply.seconds for reply in replies)),
            "drafted": sum(result.drafted for result in results),
            "accepted": sum(result.accepted for result in results),
            "drafter": self.chat.runner.drafter_name,
            "lossless": self.lossless,
            **target_record(self.chat.runner),
        }


def _path(text: str) -> Path:
    """Return the path that the user gave.

    Raises:
        UsageError: it is not a valid file name.
    """
    try:
        path = Path(text).expanduser()
        path.resolve()
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"{text[:60]}: not a file's name: {error}") from error
    return path


def _is_command(line: str) -> bool:
    return line.startswith("/") and not line.startswith("//")


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"


def _lines(stream: Any) -> Iterator[str]:
    """Yield the lines of piped text.

    Raises:
        UsageError: a line is not UTF-8.
    """
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: line {number} is not UTF-8 text") from error
