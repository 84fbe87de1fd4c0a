"""Line editor of `chat`, on prompt_toolkit: several lines, history, paste, Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from spectool.files import state_folder

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = "> "
# As wide as PROMPT, so that the lines of a message align.
_CONTINUATION = "  "


class LineEditor:
    """Editor of messages on the terminal that `stream` writes to.

    Enter sends; Alt-Enter, or Enter after a backslash, begins a new line; pasted lines stay one
    message. Ctrl-C clears the text.
    """

    def __init__(self, stream: TextIO, say: Callable[[str], None]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.defaults import create_output

        self._session: PromptSession[str] = PromptSession(
            [("bold", PROMPT)],
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_keys(),
            history=_history(say),
            enable_suspend=True,
            output=create_output(stdout=stream),
        )

    def read(self, default: str = "") -> str:
        """Read the next message, with `default` as the text to edit.

        Raises:
            EOFError: Ctrl-D was pressed.
        """
        return self._session.prompt(default=default)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    # Alt-Enter typed before the editor starts to read arrives as escape, c-j.
    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """Turn off the terminal's echo, so that keys pressed do not appear inside an answer."""
    before = termios.tcgetattr(sys.stdin)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def history_path() -> Path:
    """Return the file that keeps the messages of earlier sessions."""
    return state_folder() / "chat_history"


def _history(say: Callable[[str], None]) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by the user alone: messages may be private.
        path.touch(mode=0o600)
        with path.open("ab"):
            pass
    except OSError as error:
        say(f"this session's messages are not kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)
