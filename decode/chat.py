"""A conversation with a model: its turns, the prompts made of them, dropping old turns, files.

Knows no terminal. The tokens of a turn are kept as they were generated, so that the next prompt
begins with what the cache holds: encoding an answer's text again may split it differently. They are
used as far as the template writes the history unchanged; text that it rewrites or drops is encoded
again.
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
from spectool.data.template import ANSWER, encode, find_end_of_turn, render
from spectool.decode.control.base import Control
from spectool.decode.generate import Runner
from spectool.decode.options import RequestOptions, SamplingParams
from spectool.decode.result import Result
from spectool.errors import TextError, UsageError
from spectool.files import disk_errors, replacing

FORMAT, FORMAT_VERSION = "spectool-chat", 1
# The oldest turns are dropped if less than this share of the context is left for the answer.
_ANSWER_SHARE = 0.25
# A noncharacter that marks where a control token in a user's or model's text is split in two.
_BREAK = "\ufdd0"
_UNSAFE = re.compile("[\ufdd0\ud800-\udfff]")

# Text as it is released, and how many of its first characters came from accepted drafts.
OnText = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its answer, with texts that a prompt may begin with and their ids."""

    message: str
    answer: str
    encodings: tuple[tuple[str, list[int]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A message ready to be answered; the `forgotten` oldest turns are not in its tokens."""

    message: str
    rendered: str
    tokens: list[int]
    forgotten: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer and its cost; `used` tokens of the context are now taken."""

    result: Result
    seconds: float
    used: int


@dataclass(slots=True)
class Chat:
    """A conversation. With `raw` it is plain text that the model continues, one message a line.

    Turn n draws from seed + n. `template` are arguments of the chat template. `forgotten` counts
    the oldest turns that no longer fit; they stay in `turns`, so `save` loses nothing. An error
    changes nothing.

    Raises:
        UsageError: the tokenizer has no chat template.
        TextError: the template fails.
    """

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    request: RequestOptions = field(default_factory=RequestOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = 512
    system: str | None = None
    raw: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    forgotten: int = 0
    _specials: re.Pattern[str] = field(init=False)
    _controls: re.Pattern[str] = field(init=False)
    _ends: frozenset[int] = field(init=False)
    _logit_controls: list[Control[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._logit_controls = self.runner.make_controls(self.request)
        added = self.tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special}
        specials.update(self.tokenizer.all_special_tokens)
        self._specials = _control_pattern(specials)
        self._controls = _control_pattern({*specials, *(token.content for token in added)})
        if not all(self.request.stop):
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
            self._ends = find_end_of_turn(self.tokenizer, opening, self.template)

    @property
    def context(self) -> int:
        """Return the context of the target."""
        return self.runner.target.context

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return all turns as messages with role and content, without the system message."""
        return [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.message), ("assistant", turn.answer))
        ]

    def prompt(self, message: str) -> Prompt:
        """Make the prompt for an answer to `message`, dropping as many old turns as needed.

        Raises:
            UsageError: the message alone is longer than the context.
            TextError: the template refuses the conversation.
        """
        most = self.context - min(self.max_new_tokens, int(_ANSWER_SHARE * self.context))

        @functools.cache
        def render_from(forgotten: int) -> tuple[str, list[int]]:
            rendered = self._render(self.turns[forgotten:], message)
            return rendered, self._encode(rendered)

        forgotten = self.forgotten
        if len(render_from(forgotten)[1]) > most:
            # Bisection, as a long conversation may have been loaded.
            forgotten = bisect.bisect_left(
                range(len(self.turns)),
                True,
                forgotten,
                key=lambda n: len(render_from(n)[1]) <= most,
            )
        rendered, tokens = render_from(forgotten)
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
        """Generate the answer and add message and answer to the conversation.

        With `keep_interrupted`, Ctrl-C ends the answer and its beginning is kept.

        Raises:
            KeyboardInterrupt: Ctrl-C otherwise, or before the first token.
        """
        request = self.request
        began = time.perf_counter()
        (result,) = self.runner.generate(
            [prompt.tokens],
            eos=self._ends,
            on_tokens=on_text and (lambda index, tokens, text, drafted: on_text(text, drafted)),
            reuse_cache=True,
            keep_interrupted=keep_interrupted,
            max_new_tokens=self.max_new_tokens,
            seed=request.seed + len(self.replies),
            stop=request.stop,
            verify=request.verify,
            lossy=request.lossy,
            controls=[self._logit_controls],
            **self.sampling.as_dict(),
        )
        if not result.token_ids:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - began
        encodings = [(prompt.rendered, prompt.tokens)]
        if result.finish_reason != "stop":
            # The template writes the end token; a stop string is not in the text, but in the ids.
            ids = result.token_ids[: -1 if result.finish_reason == "eos" else None]
            answer = _mark_controls(result.text, self._specials)
            encodings.insert(0, (prompt.rendered + answer, prompt.tokens + ids))
        self.forgotten = prompt.forgotten
        self.turns.append(Turn(prompt.message, result.text, tuple(encodings)))
        used = len(prompt.tokens) + len(result.token_ids)
        self.replies.append(Reply(result=result, seconds=seconds, used=used))
        return self.replies[-1]

    def instruct(self, system: str) -> None:
        """Replace the system message.

        Raises:
            TextError: the template takes no system message.
        """
        before, self.system = self.system, system
        try:
            self._render(self.turns, ANSWER)
        except TextError:
            self.system = before
            raise

    def reset(self) -> None:
        """Forget all turns but keep the system message."""
        self.turns.clear()
        self.forgotten = 0

    def undo(self) -> str:
        """Drop the last turn; return its message.

        Raises:
            UsageError: there is no turn.
        """
        if not self.turns:
            raise UsageError("there is no message yet")
        turn = self.turns.pop()
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn.message

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the conversation as JSON, atomically.

        Raises:
            InputError: the file exists, or cannot be written.
        """
        with disk_errors(path):
            if path.is_dir():
                raise UsageError(f"{path}: is a directory", hint="name a file in it")
            if path.exists() and not overwrite:
                raise UsageError(f"{path}: exists already", hint=f"/save! {path} replaces it")
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "system": self.system,
            "messages": self.messages,
        }
        with replacing(path) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one.

        Raises:
            InputError: the file does not exist, or is something else.
        """
        record = read_json(path)
        if record.get("format") != FORMAT or record.get("version") != FORMAT_VERSION:
            raise UsageError(f"{path}: not a saved chat (format {FORMAT} {FORMAT_VERSION})")
        system, turns = record.get("system"), _parse_turns(record.get("messages"))
        if not isinstance(system, str | None) or turns is None:
            raise UsageError(f"{path}: damaged: expected pairs of a user's message and an answer")
        if system is not None:
            self.instruct(system)
        self.system = system
        self.turns, self.forgotten = turns, 0

    def _render(self, turns: Sequence[Turn], message: str) -> str:
        """Render the conversation up to where the answer begins, with its control tokens marked.

        Special tokens are marked in answers too. Other added tokens are not: templates look for the
        model's own `</think>`.
        """
        system = None if self.system is None else _mark_controls(self.system, self._controls)
        if self.raw:
            written = system or ""
            for turn in (*turns, Turn(message, "")):
                line = "\n" if written and not written.endswith("\n") else ""
                written += line + _mark_controls(turn.message, self._controls)
                written += _mark_controls(turn.answer, self._specials)
            return written
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            messages += [
                {"role": "user", "content": _mark_controls(turn.message, self._controls)},
                {"role": "assistant", "content": _mark_controls(turn.answer, self._specials)},
            ]
        messages.append({"role": "user", "content": _mark_controls(message, self._controls)})
        row = Row(messages=tuple(messages))
        return render(row, self.tokenizer, template=self.template, prompt=True)

    def _encode(self, rendered: str) -> list[int]:
        """Encode a rendered conversation, reusing the ids of its longest stored beginning."""
        pairs = (pair for turn in reversed(self.turns) for pair in turn.encodings)
        encoding = next((pair for pair in pairs if rendered.startswith(pair[0])), None)
        if encoding is not None:
            ids, rest = list(encoding[1]), rendered[len(encoding[0]) :].split(_BREAK)
        else:
            first, *rest = rendered.split(_BREAK)
            # A template writes the start token itself; plain text starts as in `generate`.
            ids = self.tokenizer.encode("") if self.raw else []
            ids += encode(self.tokenizer, first)
        for piece in rest:
            ids += self._encode_continuation(piece)
        return ids

    def _encode_continuation(self, piece: str) -> list[int]:
        """Encode text in the middle, without the space that some tokenizers add at the start."""
        before = encode(self.tokenizer, "\n")
        ids = encode(self.tokenizer, "\n" + piece)
        # If the newline merges with the text, the tokenizer adds no space.
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return encode(self.tokenizer, piece)


def _control_pattern(tokens: set[str]) -> re.Pattern[str]:
    """Make a pattern for the first character of every occurrence of these tokens, also overlapping.

    Whitespace counts as text, even as an added token. A token of one character cannot be split.
    """
    longer = sorted(token for token in tokens if len(token) > 1 and not token.isspace())
    return re.compile(f"(?:(?={'|'.join(map(re.escape, longer))}).)" if longer else "(?!)", re.S)


def _mark_controls(written: str, controls: re.Pattern[str]) -> str:
    """Put a mark inside each control token: split there, it is encoded as plain text.

    `apply_chat_template(sanitize_control_tokens=True)` does the same from transformers 5.20 on;
    before, the flag goes to the template as a variable of its own, and nothing is split.
    """
    return controls.sub(lambda match: match[0] + _BREAK, _UNSAFE.sub("", written))


def _parse_turns(messages: Any) -> list[Turn] | None:
    """Convert pairs of a user's message and an answer to turns; None if malformed."""
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
