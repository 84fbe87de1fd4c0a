"""A conversation with a model: its turns, the prompt that they make, what no longer fits, files.

Knows no terminal. A turn's tokens are kept as they were generated, so that the next prompt begins
with what the cache holds: encoding an answer's text again may cut it differently. They are used
as far as the template writes the history that way; what it rewrites or drops is encoded anew.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool.checkpoint.headers import read_json
from spectool.data.rows import Row
from spectool.data.template import ANSWER, encode, end_of_turn, render
from spectool.decode.generate import Result, Runner
from spectool.decode.sampling import SamplingOptions
from spectool.errors import TextError, UsageError
from spectool.files import disk_errors, replacing

FORMAT, FORMAT_VERSION = "spectool-chat", 1
# The oldest turns go when less than this share of the context is left for the answer.
ROOM = 0.25
# A noncharacter: it marks where a control token in somebody's text is broken in two.
_BREAK = "\ufdd0"
_UNSAFE = re.compile("[\ufdd0\ud800-\udfff]")

# Text as it is released, and how many of its first characters came from accepted drafts.
OnText = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How answers are generated; `Runner.generate` describes each. Turn n draws from seed + n."""

    max_new_tokens: int = 512
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    verify: str | None = None
    lossy: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its answer. `known` are texts that a prompt may begin with, and their ids."""

    message: str
    answer: str
    known: tuple[tuple[str, list[int]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A message ready to be answered; `forgotten` of the oldest turns are not in its tokens."""

    message: str
    rendered: str
    tokens: list[int]
    forgotten: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer and what it cost; `used` tokens of the context are taken now."""

    result: Result
    seconds: float
    used: int


@dataclass(slots=True)
class Chat:
    """A conversation. With `raw` it is plain text that the model continues, a message a line.

    `template` are arguments of the chat template. `forgotten` counts the oldest turns that no
    longer fit; they stay in `turns`, so `save` loses nothing. An error leaves all as it was.

    Raises:
        UsageError: the tokenizer has no chat template.
        TextError: the template fails.
    """

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    options: Options = field(default_factory=Options)
    system: str | None = None
    raw: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    forgotten: int = 0
    _specials: re.Pattern[str] = field(init=False)
    _controls: re.Pattern[str] = field(init=False)
    _ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special}
        specials.update(self.tokenizer.all_special_tokens)
        self._specials = _first_characters(specials)
        self._controls = _first_characters({*specials, *(token.content for token in added)})
        if not all(self.options.stop):
            raise UsageError("a stop string must not be empty")
        if not self.raw and not self.tokenizer.chat_template:
            raise UsageError(
                "the model has no chat template", hint="--raw continues plain text instead"
            )
        self._ends = frozenset()
        if not self.raw:
            opening = [{"role": "user", "content": "a"}]
            if self.system is not None:
                opening.insert(0, {"role": "system", "content": self.system})
            self._ends = end_of_turn(self.tokenizer, opening, self.template)

    @property
    def context(self) -> int:
        return self.runner.target.context

    @property
    def messages(self) -> list[dict[str, str]]:
        """All turns in the common form, without the system message."""
        return [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.message), ("assistant", turn.answer))
        ]

    def prompt(self, message: str) -> Prompt:
        """The tokens that ask for an answer to `message`, without the turns that must go for it.

        Raises:
            UsageError: the message alone is longer than the context.
            TextError: the template refuses the conversation.
        """
        most = self.context - min(self.options.max_new_tokens, int(ROOM * self.context))

        @functools.cache
        def asked(forgotten: int) -> tuple[str, list[int]]:
            rendered = self._render(self.turns[forgotten:], message)
            return rendered, self._encode(rendered)

        forgotten = self.forgotten
        if len(asked(forgotten)[1]) > most:
            # Not one by one: a long conversation may have been loaded.
            forgotten = bisect.bisect_left(
                range(len(self.turns)), True, forgotten, key=lambda n: len(asked(n)[1]) <= most
            )
        rendered, tokens = asked(forgotten)
        if len(tokens) >= self.context:
            raise UsageError(
                f"the message makes a prompt of {len(tokens)} tokens; the context holds "
                f"{self.context}",
                hint="shorten it, or start with a larger --context",
            )
        return Prompt(message=message, rendered=rendered, tokens=tokens, forgotten=forgotten)

    def answer(
        self, prompt: Prompt, *, on_text: OnText | None = None, keep_interrupted: bool = False
    ) -> Reply:
        """Generate the answer and take both into the conversation.

        With `keep_interrupted`, Ctrl-C ends the answer, and what is there of it stays.

        Raises:
            KeyboardInterrupt: Ctrl-C otherwise, or before there is anything to keep.
        """
        options = self.options
        began = time.perf_counter()
        (result,) = self.runner.generate(
            [prompt.tokens],
            eos=self._ends,
            on_tokens=on_text and (lambda row, tokens, text, drafted: on_text(text, drafted)),
            reuse_cache=True,
            keep_interrupted=keep_interrupted,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed + len(self.replies),
            stop=options.stop,
            verify=options.verify,
            lossy=options.lossy,
            **options.sampling,
        )
        if not result.token_ids:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - began
        known = [(prompt.rendered, prompt.tokens)]
        if result.finish_reason != "stop":
            # The end token is the template's to write; a stop string is not in the text.
            ids = result.token_ids[: -1 if result.finish_reason == "eos" else None]
            answer = _broken(result.text, self._specials)
            known.insert(0, (prompt.rendered + answer, prompt.tokens + ids))
        self.forgotten = prompt.forgotten
        self.turns.append(Turn(prompt.message, result.text, tuple(known)))
        used = len(prompt.tokens) + len(result.token_ids)
        self.replies.append(Reply(result=result, seconds=seconds, used=used))
        return self.replies[-1]

    def instruct(self, system: str) -> None:
        """Replace the system message.

        Raises:
            TextError: the template knows none.
        """
        before, self.system = self.system, system
        try:
            self._render(self.turns, ANSWER)
        except TextError:
            self.system = before
            raise

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()
        self.forgotten = 0

    def undo(self) -> str:
        """Drop the last turn; returns its message.

        Raises:
            UsageError: there is none.
        """
        if not self.turns:
            raise UsageError("there is no message yet")
        turn = self.turns.pop()
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn.message

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the conversation as JSON, at once or not at all.

        Raises:
            InputError: the file exists, or its place cannot be written.
        """
        with disk_errors(path):
            if path.is_dir():
                raise UsageError(f"{path}: is a directory", hint="name a file in it")
            if path.exists() and not overwrite:
                raise UsageError(f"{path}: exists already", hint=f"/save! {path} replaces it")
        said = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "system": self.system,
            "messages": self.messages,
        }
        with replacing(path) as partial:
            partial.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in place of this one.

        Raises:
            InputError: no such file, or it is something else.
        """
        said = read_json(path)
        if said.get("format") != FORMAT or said.get("version") != FORMAT_VERSION:
            raise UsageError(f"{path}: not a saved chat (format {FORMAT} {FORMAT_VERSION})")
        system, turns = said.get("system"), _turns(said.get("messages"))
        if not isinstance(system, str | None) or turns is None:
            raise UsageError(f"{path}: damaged: expected pairs of a user's message and an answer")
        if system is not None:
            self.instruct(system)
        self.system = system
        self.turns, self.forgotten = turns, 0

    def _render(self, turns: Sequence[Turn], message: str) -> str:
        """The conversation up to where the answer begins, control tokens in people's text broken.

        What the tokenizer calls special is broken in answers too. Its other added tokens are not:
        templates look for the model's own `</think>`.
        """
        system = None if self.system is None else _broken(self.system, self._controls)
        if self.raw:
            written = system or ""
            for turn in (*turns, Turn(message, "")):
                line = "\n" if written and not written.endswith("\n") else ""
                written += line + _broken(turn.message, self._controls)
                written += _broken(turn.answer, self._specials)
            return written
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            messages += [
                {"role": "user", "content": _broken(turn.message, self._controls)},
                {"role": "assistant", "content": _broken(turn.answer, self._specials)},
            ]
        messages.append({"role": "user", "content": _broken(message, self._controls)})
        row = Row(messages=tuple(messages))
        return render(row, self.tokenizer, template=self.template, prompt=True)

    def _encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered conversation; of a part that is known, those it had."""
        pairs = (pair for turn in reversed(self.turns) for pair in turn.known)
        known = next((pair for pair in pairs if rendered.startswith(pair[0])), None)
        if known is not None:
            ids, rest = list(known[1]), rendered[len(known[0]) :].split(_BREAK)
        else:
            first, *rest = rendered.split(_BREAK)
            # A template writes the start token itself; plain text is opened as `generate` does.
            ids = self.tokenizer.encode("") if self.raw else []
            ids += encode(self.tokenizer, first)
        for piece in rest:
            ids += self._continued(piece)
        return ids

    def _continued(self, piece: str) -> list[int]:
        """Token ids of text in the middle: some tokenizers put a space before all that begins."""
        before = encode(self.tokenizer, "\n")
        ids = encode(self.tokenizer, "\n" + piece)
        # Where the newline melts into what follows, there is no such space either.
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return encode(self.tokenizer, piece)


def _first_characters(tokens: set[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence of these tokens, overlapping ones too.

    Whitespace is text, also where a vocabulary adds it. A token of one character has no inside.
    """
    longer = sorted(token for token in tokens if len(token) > 1 and not token.isspace())
    return re.compile(f"(?:(?={'|'.join(map(re.escape, longer))}).)" if longer else "(?!)", re.S)


def _broken(written: str, controls: re.Pattern[str]) -> str:
    """The text with a mark inside each control token: parted there, it is encoded as plain text.

    `apply_chat_template(sanitize_control_tokens=True)` does the same from transformers 5.20 on;
    before, the flag goes to the template as a variable of its own, and nothing is broken.
    """
    return controls.sub(lambda match: match[0] + _BREAK, _UNSAFE.sub("", written))


def _turns(messages: Any) -> list[Turn] | None:
    """Pairs of a user's message and an answer as turns; None if these are something else."""
    if not isinstance(messages, list) or len(messages) % 2:
        return None
    contents: list[str] = []
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message.get("role") != role:
            return None
        contents.append(content)
    return [Turn(*pair) for pair in zip(contents[::2], contents[1::2], strict=True)]
