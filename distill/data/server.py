"""Texts written anew by a server that speaks OpenAI's protocol, in place of the target in here.

A conversation goes to `chat/completions` as messages, so that the server applies its own template;
plain text goes to `completions`. What comes back is text: it takes the place of what the sample had
and is turned into tokens by the target's tokenizer and template. Nothing but the standard library
is needed, and the key, where there is one, comes from the environment alone.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from spectool.data.rows import Message, Row
from spectool.data.template import encode, render
from spectool.distill.data.samples import SHORTEST, Sample, conversation, marked
from spectool.errors import InputError, SpectoolError

# Requests that are under way together: servers batch them.
_TOGETHER = 8
# Tries of a request, and seconds before the second; they double then.
_TRIES = 5
_FIRST_WAIT = 0.5
# Seconds that one answer may take.
_PATIENCE = 600.0

KEY = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class Answer:
    """`whole`: it ended by itself, and not where there was no more room."""

    text: str
    whole: bool


class Server:
    """A server at `url`, up to and with its `/v1`. Without a `model`, the only one that it has.

    Raises:
        InputError: it refuses what it is asked, or has more than one model.
        SpectoolError: it does not answer, or not as the protocol says.
    """

    def __init__(
        self, url: str, model: str | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.url = url.rstrip("/")
        self._sleep = sleep
        self._key = os.environ.get(KEY)
        self.model = self._only_model() if model is None else model

    def chat(self, messages: Sequence[Message], **how: Any) -> Answer:
        """The next turn of a conversation; `how` as in `_ask`."""
        said = self._ask("/chat/completions", {"messages": list(messages)}, **how)
        return self._answer(said, lambda choice: choice["message"]["content"])

    def complete(self, prompt: str, **how: Any) -> Answer:
        """What follows a text; `how` as in `_ask`."""
        said = self._ask("/completions", {"prompt": prompt}, **how)
        return self._answer(said, lambda choice: choice["text"])

    def _ask(
        self,
        place: str,
        asked: dict[str, Any],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        template: Mapping[str, Any] | None = None,
    ) -> Any:
        body = {
            "model": self.model,
            **asked,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        if template:
            # Not OpenAI's, but what vLLM and SGLang call it; never sent unasked.
            body["chat_template_kwargs"] = dict(template)
        return self._send(place, json.dumps(body).encode())

    def _answer(self, said: Any, text_of: Callable[[Any], Any]) -> Answer:
        try:
            (choice,) = said["choices"]
            text = text_of(choice)
            whole = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError):
            text, whole = None, False
        if not isinstance(text, str):
            raise SpectoolError(f"{self.url}: answers with no text: {_brief(json.dumps(said))}")
        return Answer(text, whole)

    def _only_model(self) -> str:
        said = self._send("/models", None)
        try:
            names = [str(each["id"]) for each in said["data"]]
        except (KeyError, TypeError) as error:
            raise SpectoolError(
                f"{self.url}: lists no models: {_brief(json.dumps(said))}",
                hint="name one with --regenerate-model",
            ) from error
        if len(names) != 1:
            raise InputError(
                f"{self.url}: has {len(names)} models{': ' * bool(names)}{', '.join(names[:5])}",
                hint="name one with --regenerate-model",
            )
        return names[0]

    def _send(self, place: str, body: bytes | None) -> Any:
        """The parsed answer to a request, which is tried again where it may help."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + place, data=body, headers=headers)
        reason = ""
        for tried in range(_TRIES):
            if tried:
                self._sleep(_FIRST_WAIT * 2 ** (tried - 1))
            try:
                with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
                    raw = response.read()
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}{_complaint(error)}"
                if error.code != 429 and error.code < 500:
                    raise InputError(
                        f"{self.url}{place}: {reason}",
                        hint=f"its key is read from {KEY}" if error.code in (401, 403) else None,
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            else:
                try:
                    return json.loads(raw)
                except ValueError as error:
                    text = raw.decode("utf-8", errors="replace")
                    raise SpectoolError(
                        f"{self.url}{place}: answers with no JSON: {_brief(text)}"
                    ) from error
        raise SpectoolError(
            f"{self.url}{place}: {reason}, {_TRIES} times",
            hint="what was written is kept; the same command goes on from there",
        )


def rewrite(
    server: Server,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    seq_len: int,
    temperature: float,
    seed: str,
    template: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """The samples with their taught stretches written by the server, at most `seq_len` tokens each.

    As in `regenerate`, a conversation ends with an answer that does not end by itself.
    """

    def write(index: int) -> Sample | None:
        sample = samples[index]
        how = {"temperature": temperature, "template": template}
        own = f"{seed}/{index}"
        if sample.messages:
            return _talk(server, sample, tokenizer, seq_len, own, how)
        return _text(server, sample, tokenizer, seq_len, own, how)

    pool = ThreadPoolExecutor(_TOGETHER)
    try:
        made = list(pool.map(write, range(len(samples))))
    finally:
        # After a failure those that have not begun are not asked for.
        pool.shutdown(cancel_futures=True)
    return [sample for sample in made if sample and sum(sample.loss_mask) >= SHORTEST]


def _talk(
    server: Server, sample: Sample, tokenizer: Any, seq_len: int, seed: str, how: dict[str, Any]
) -> Sample:
    template = how["template"]
    messages: list[Message] = []
    ended = True
    for turn, message in enumerate(sample.messages):
        if message.get("role") != "assistant" or turn == 0:
            messages.append(message)
            continue
        asked = render(Row(messages=tuple(messages)), tokenizer, template=template, prompt=True)
        room = seq_len - len(encode(tokenizer, asked))
        if room < 1:
            break
        answer = server.chat(messages, max_tokens=room, seed=_seed(seed, turn), **how)
        messages.append({"role": "assistant", "content": answer.text})
        ended = answer.whole
        if not ended:
            break
    row = Row(messages=tuple(messages))
    return conversation(row, tokenizer, seq_len, template, ended=ended)


def _text(
    server: Server, sample: Sample, tokenizer: Any, seq_len: int, seed: str, how: dict[str, Any]
) -> Sample | None:
    opening = [tokenizer.bos_token_id] if sample.tokens[0] == tokenizer.bos_token_id else []
    room = seq_len - sample.given
    if room < 1:
        return None
    # The server opens it with its start token itself.
    prompt = tokenizer.decode(
        sample.tokens[len(opening) : sample.given], clean_up_tokenization_spaces=False
    )
    asked = {**how, "template": None}
    answer = server.complete(prompt, max_tokens=room, seed=_seed(seed, 0), **asked)
    whole = prompt + answer.text
    found = marked(tokenizer, whole, [(len(prompt), len(whole))])
    tokens = [*opening, *found.tokens]
    loss_mask = [False] * len(opening) + found.loss_mask
    if answer.whole and tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        loss_mask.append(True)
    return Sample(tokens[:seq_len], loss_mask[:seq_len])


def _seed(seed: str, turn: int) -> int:
    return random.Random(f"{seed}/{turn}").getrandbits(31)


def _complaint(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, if it does."""
    try:
        said = json.loads(error.read())
        found = said.get("error", said)
        message = found.get("message", "") if isinstance(found, dict) else found
    except (ValueError, AttributeError, OSError, http.client.HTTPException):
        return ""
    return f": {_brief(str(message))}" if message else ""


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
