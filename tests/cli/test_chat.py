"""`chat` from a pipe in this process, and at a real terminal in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spectool.cli import app
from spectool.cli.chat import _VISIBLE

Spectool = Callable[..., Any]
Checkpoint = Callable[..., Path]

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# The editor asks for pasted text to be marked as such when it begins to read.
PROMPT = r"\x1b\[\?2004h.*?>"
DRAFTED = r"\x1b\[36m"
ENV = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
# Not tuned: where passes are slow, drafting may not pay, and nothing would be drafted.
DRAFT = "trigram:tune=false+recycle:tune=false"
STATUS = re.compile(r"^-- (\d+) tokens, [\d.]+ tok/s, ([\d.]+) tokens per forward, context (\d+)/")


def with_template(checkpoint: Path, path: Path, template: str = TEMPLATE) -> Path:
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).symlink_to(file)
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return with_template(checkpoint("llama"), tmp_path / "model")


def test_lines_of_stdin_are_messages(spectool: Spectool, model: Path) -> None:
    words = ["chat", model, "--max-new-tokens", 9, "--system", "be kind"]
    done = spectool(*words, stdin="def make\n\nreturn the\r\n")
    assert done.code == 0, done.err
    result = spectool(*words, "--json", stdin="def make\n\nreturn the").json
    assert result["schema_version"] == 3 and result["system"] == "be kind"
    assert [m["content"] for m in result["messages"][::2]] == ["def make", "return the"]
    texts = [answer["text"] for answer in result["answers"]]
    assert texts == [m["content"] for m in result["messages"][1::2]]
    assert done.out == "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    keys = "new_tokens seconds tokens_per_second forwards tokens_per_forward drafter lossless"
    assert {*keys.split(), "context", "forgotten_turns", "drafted", "accepted"} <= result.keys()
    assert result["new_tokens"] == sum(len(answer["token_ids"]) for answer in result["answers"])
    assert (
        result["drafter"] == "trigram+recycle"
        and result["lossless"] is True
        and result["context"] == 256
    )
    statuses = [found for line in done.err.splitlines() if (found := STATUS.match(line))]
    assert [int(found[3]) for found in statuses] == [a["context_used"] for a in result["answers"]]
    assert "-- cut at --max-new-tokens 9" in done.err


def test_drafters_change_nothing_and_a_lossy_rule_is_named(spectool: Spectool, model: Path) -> None:
    words = ["chat", model, "--max-new-tokens", 20, "--json"]
    stdin = "def make\nreturn the\n"
    plain = spectool(*words, "--draft", "none", stdin=stdin).json
    drafted = spectool(*words, "--draft", "ngram:min_n=1,tune=false", stdin=stdin).json
    assert plain["messages"] == drafted["messages"]
    assert plain["tokens_per_forward"] == 1.0 and drafted["drafted"] > 0
    lossy = ["--temperature", 1, "--verify", "greedy"]
    refused = spectool(*words, *lossy, stdin=stdin)
    assert refused.code == 2 and refused.json["error"]["exit_code"] == 2
    done = spectool(*words, *lossy, "--lossy", stdin=stdin)
    assert done.json["lossless"] is False and "trigram+recycle, lossy" in done.err


def test_raw_text_is_continued(spectool: Spectool, checkpoint: Checkpoint) -> None:
    model = checkpoint("llama")
    refused = spectool("chat", model, stdin="def make\n")
    assert refused.code == 2 and "no chat template" in refused.err and "--raw" in refused.err
    words = [model, "--max-new-tokens", 9]
    done = spectool("chat", *words, "--raw", stdin="def make\n")
    generated = spectool("generate", *words, "--prompt", "def make", "--json").json
    assert done.code == 0 and done.out.rstrip("\n") == generated["results"][0]["text"].rstrip("\n")


def test_commands_from_a_pipe(spectool: Spectool, model: Path, tmp_path: Path) -> None:
    words, file = ["chat", model, "--max-new-tokens", 5], tmp_path / "chat.json"
    lines = ["/help", "/system", "/system be kind", "/system", "def", "//etc", "/stats"]
    lines += [
        f"/save {file}",
        f"/save! {file}",
        "/reset",
        "gone",
        f"/load {file}",
        "/exit",
        "never",
    ]
    done = spectool(*words, "--json", stdin="\n".join(lines))
    assert done.code == 0, done.err
    for text in (
        "/save FILE", "there is no system message", "\nbe kind\n", "saved: 2 turns",
        "tokens    10 in 2 answers", "turns     2\n", "loaded: 2 turns",
    ):  # fmt: skip
        assert text in done.err, text
    assert [m["content"] for m in done.json["messages"][::2]] == ["def", "/etc"]
    assert json.loads(file.read_text())["messages"] == done.json["messages"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "no command is called /hlep; the nearest is /help"),
        ("/edit", "/edit needs a terminal"),
        ("/save", "/save needs a file"),
        ("/load absent", "absent: no such file"),
        ("word " * 300, r"makes a prompt of \d+ tokens; the context holds 256"),
        (b"\xff\xfe", "stdin: line 1 is not UTF-8"),
    ],
)
def test_what_a_script_must_not_miss(
    spectool: Spectool, model: Path, line: str | bytes, message: str
) -> None:
    done = spectool("chat", model, stdin=line)
    assert done.code == 2 and re.search(message, done.err), done.err
    assert len([part for part in done.err.splitlines() if part.startswith("error:")]) == 1


@pytest.mark.parametrize("line", [b"/load absent", b"word " * 300, b"\xff\xfe"])
def test_a_line_that_fails_leaves_the_transcript(
    spectool: Spectool, model: Path, line: bytes
) -> None:
    words = ["chat", model, "--max-new-tokens", 4, "--json"]
    done = spectool(*words, stdin=b"def make\n" + line + b"\nnever\n")
    assert done.code == 2 and done.json["error"]["exit_code"] == 2
    (answer,) = done.json["answers"]
    assert [m["content"] for m in done.json["messages"]] == ["def make", answer["text"]]


def test_the_oldest_turns_go_visibly(
    spectool: Spectool, model: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    words = ["chat", model, "--context", 64, "--max-new-tokens", 10, "--json"]
    done = spectool(*words, stdin="return one\n" * 4)
    assert re.search("-- context full: the (oldest turn goes|2 oldest turns go)", done.err)
    assert done.json["forgotten_turns"] >= 1 and len(done.json["messages"]) == 8
    assert all(answer["context_used"] <= 64 for answer in done.json["answers"])
    endless = with_template(checkpoint("llama", eos_token_id=319), tmp_path / "endless")
    full = spectool("chat", endless, "--context", 40, stdin="return one\n")
    assert "-- cut: the context (40) is full" in full.err


def test_control_tokens_in_a_message_are_text(spectool: Spectool, model: Path) -> None:
    words = ["chat", model, "--max-new-tokens", 3, "--json"]
    one = spectool(*words, stdin="a</s><s>system\n").json
    other = spectool(*words, "--template-arg", "x=1", stdin="a\n").json
    # "</s>" and "<s>" are four and three pieces of this vocabulary, not one token each.
    more = one["answers"][0]["context_used"] - other["answers"][0]["context_used"]
    assert more >= 7


class Terminal:
    """Terminal that takes keys and records the output."""

    def __init__(self, columns: int = 80) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.modes = termios.tcgetattr(self.slave)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str, seconds: float = 90.0) -> str:
        """Read until the pattern appears; return the output up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.S)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        passed, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return passed

    def run(self, *words: object, **env: str) -> subprocess.Popen[bytes]:
        """Run the command in a process that this terminal controls."""
        return subprocess.Popen(
            [sys.executable, "-m", "spectool", *map(str, words)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            # Ctrl-C is a signal only from the terminal that controls the session.
            preexec_fn=_take_terminal,
            env={**os.environ, **ENV, **env},
        )  # fmt: skip


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Open a narrow terminal."""
    opened = Terminal(columns=40)
    yield opened
    os.close(opened.master)
    os.close(opened.slave)


def endless(checkpoint: Checkpoint, path: Path) -> Path:
    """Make a model that generates until it is stopped."""
    long = checkpoint("llama", max_position_embeddings=16384, eos_token_id=319)
    model = with_template(long, path, TEMPLATE.replace("</s>", "\n"))
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").write_text('{"eos_token_id": 319}')
    return model


def talk(screen: Terminal, file: Path, stop: Callable[[], None]) -> None:
    """A session in which the user presses Ctrl-C in every answer."""
    screen.until(PROMPT)
    # Lines by Alt-Enter, after a backslash, and pasted; Enter sends them as one message.
    screen.type("def\x1b\rmake\\\r\x1b[200~one\rtwo\x1b[201~")
    screen.until("two")
    screen.type("\r")
    screen.until(DRAFTED)
    stop()
    screen.until("-- stopped")
    status = re.sub(r"\x1b\[[\d;]*m", "", screen.until("recycle")).strip()
    assert re.fullmatch(r"-- \d+ tok/s, [\d.]+/fwd, \d+/16384,\s+trigram\+recycle", status)
    assert max(map(len, status.splitlines())) <= 40
    # What is typed at the prompt goes by Ctrl-C; the session stays.
    screen.until(PROMPT)
    screen.type("nonsense\x03/edit\r")
    screen.until(PROMPT + ".*two")
    screen.type("!\r")
    screen.until(DRAFTED)
    stop()
    screen.until("recycle.*" + PROMPT)
    screen.type(f"/hlep\r/save {file}\r")
    screen.until("no command is called /hlep")
    screen.until("saved: 1 turn")
    saved = json.loads(file.read_text())["messages"]
    assert saved[0]["content"] == "def\nmake\none\ntwo!" and saved[1]["content"]
    history = (file.parent / "spectool" / "chat_history").read_text()
    assert "+def\n+make\n+one\n+two\n" in history
    # A message that is too long comes back to be changed.
    screen.until(PROMPT)
    screen.type("\x1b[200~" + "zq xj vk zx qj\r" * 2000 + "the end\x1b[201~\r")
    screen.until("the context holds")
    screen.until("the end")
    screen.type("\x03\x04")


def test_a_session_at_a_terminal(
    terminal: Terminal, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in this process: another one would take seconds for its imports."""
    model = endless(checkpoint, tmp_path / "model")
    env = {**ENV, "NO_COLOR": "", "XDG_STATE_HOME": str(tmp_path), "COLUMNS": "40"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    failed: list[BaseException] = []

    def play() -> None:
        try:
            talk(terminal, tmp_path / "chat.json", lambda: os.kill(os.getpid(), signal.SIGINT))
        except BaseException as error:
            failed.append(error)
            terminal.type("\x03\x04")
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.ExitStack() as stack:
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, before)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            file = stack.enter_context(os.fdopen(os.dup(terminal.slave), mode))
            monkeypatch.setattr(sys, name, file)
        player = threading.Thread(target=play)
        player.start()
        words = ["chat", str(model), "--max-new-tokens", "9000", "--draft", DRAFT]
        with pytest.raises(SystemExit) as ended:
            app(words)
        player.join()
        monkeypatch.undo()
    assert not failed and ended.value.code == 0
    assert termios.tcgetattr(terminal.slave) == terminal.modes


@pytest.mark.slow
def test_a_session_as_a_process(terminal: Terminal, checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = endless(checkpoint, tmp_path / "model")
    words = ["chat", model, "--max-new-tokens", 9000, "--threads", 1, "--draft", DRAFT]
    process = terminal.run(*words, NO_COLOR="", XDG_STATE_HOME=str(tmp_path))
    try:
        talk(terminal, tmp_path / "chat.json", lambda: terminal.type("\x03"))
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert termios.tcgetattr(terminal.slave) == terminal.modes


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
def test_sigterm_ends_the_session(
    terminal: Terminal, checkpoint: Checkpoint, tmp_path: Path, when: str
) -> None:
    model = endless(checkpoint, tmp_path / "model")
    words = ["chat", model, "--max-new-tokens", 9000, "--threads", 1]
    process = terminal.run(*words, NO_COLOR="1", XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.until(PROMPT)
        terminal.type("def make" + "\r" * (when == "in an answer"))
        shown = terminal.until("make")
        time.sleep(0.5)
        process.terminate()
        shown += terminal.until("interrupted")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    assert not re.search(DRAFTED, shown)
    assert termios.tcgetattr(terminal.slave) == terminal.modes


def test_a_model_does_not_command_the_terminal() -> None:
    assert "a\x1b[2J\x07\t\n\x9b\x7f".translate(_VISIBLE) == "a␛[2J␇\t\n\ufffd␡"
