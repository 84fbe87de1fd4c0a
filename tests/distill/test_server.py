"""Answers by a server: a stub with the protocol runs in a thread of this process."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spectool.data.text import encode
from spectool.decode.heads.artifact import read_record
from spectool.distill.data import server as room
from spectool.distill.data import texts
from spectool.distill.data.samples import Sample, read_samples
from spectool.distill.data.server import Answer, Server, rewrite
from spectool.errors import InputError, SpectoolError, UsageError

from ..conftest import contents, tokenizer
from .conftest import Train
from .test_samples import TALK, chatty, taught_text

REPLY = "It gives back what it was given, and raises nothing on the way there"


@dataclass
class Stub:
    """Stub server: it records requests, and answers with its failures in order, then `reply`."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["tiny"])
    reply: Callable[[dict[str, Any]], tuple[str, str]] = lambda body: (REPLY, "stop")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        with self.lock:
            self.asked.append({"path": path, **body})
            self.headers.append(headers)
            if self.failures:
                return self.failures.pop(0)
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": name} for name in self.models]})
        text, reason = self.reply(body)
        shape = {"message": {"role": "assistant", "content": text}} if "chat" in path else {
            "text": text
        }  # fmt: skip
        return 200, json.dumps({"choices": [{**shape, "index": 0, "finish_reason": reason}]})


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in (room.KEY, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Stub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any]) -> None:
            status, text = found.answer(self.path, body, dict(self.headers))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        found.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
        yield found
        listening.shutdown()
        thread.join()


@pytest.fixture
def talk(tmp_path: Path) -> str:
    path = tmp_path / "talk.jsonl"
    path.write_text((json.dumps({"messages": TALK}) + "\n") * 6)
    return str(path)


HOW = {"max_tokens": 9, "temperature": 0.5, "seed": 3}


def test_the_shape_of_what_is_asked(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.KEY, "secret")
    server = Server(stub.url + "/")
    assert server.model == "tiny"
    assert server.chat(TALK[:2], **HOW) == Answer(REPLY, True)
    assert server.complete("def f(", **HOW, template={"thoughts": False}) == Answer(REPLY, True)
    models, chat, text = stub.asked
    assert models == {"path": "/v1/models"}
    assert chat == {
        "path": "/v1/chat/completions", "model": "tiny", "messages": TALK[:2], **HOW,
    }  # fmt: skip
    assert text == {
        "path": "/v1/completions", "model": "tiny", "prompt": "def f(", **HOW,
        "chat_template_kwargs": {"thoughts": False},
    }  # fmt: skip
    assert {headers["Authorization"] for headers in stub.headers} == {"Bearer secret"}
    assert stub.headers[1]["Content-Type"] == "application/json"


def test_without_a_key_none_is_sent(stub: Stub) -> None:
    Server(stub.url, "any").complete("x", **HOW)
    assert "Authorization" not in stub.headers[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_and_later(stub: Stub, status: int) -> None:
    stub.failures = [(status, "busy")] * 3
    waits: list[float] = []
    server = Server(stub.url, "tiny", sleep=waits.append)
    assert server.complete("x", **HOW).text == REPLY
    assert waits == [0.5, 1.0, 2.0] and len(stub.asked) == 4
    stub.failures = [(status, '{"error": {"message": "out of\\n memory"}}')] * 9
    with pytest.raises(SpectoolError, match=rf"completions: {status} .*: out of memory, 5 times"):
        server.complete("x", **HOW)
    assert len(stub.asked) == 9


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, '{"error": {"message": "no model tiny"}}', InputError, "404 Not Found: no model"),
        (401, "{}", InputError, "401 Unauthorized"),
        (400, "[]", InputError, "400 Bad Request"),
        (200, "<html>\nwelcome", SpectoolError, "answers with no JSON: <html> welcome"),
        (200, '{"choices": []}', SpectoolError, "answers with no text: {"),
        (200, '{"choices": [{"text": null, "finish_reason": "stop"}]}', SpectoolError, "no text"),
        (200, "[1]", SpectoolError, "answers with no text"),
    ],
)
def test_what_cannot_be_helped_is_one_line(
    stub: Stub, status: int, body: str, error: type[SpectoolError], message: str
) -> None:
    stub.failures = [(status, body)]
    with pytest.raises(error, match=message) as caught:
        Server(stub.url, "tiny").complete("x", **HOW)
    assert "\n" not in str(caught.value) and len(stub.asked) == 1
    assert (caught.value.hint == "its key is read from OPENAI_API_KEY") == (status == 401)


def test_nobody_answers() -> None:
    waits: list[float] = []
    with pytest.raises(SpectoolError, match="refused, 5 times"):
        Server("http://127.0.0.1:9/v1", sleep=waits.append)
    assert len(waits) == 4


@pytest.mark.parametrize("models", [[], ["one", "two"]])
def test_several_models_must_be_named(stub: Stub, models: list[str]) -> None:
    stub.models = models
    with pytest.raises(InputError, match=f"has {len(models)} models") as caught:
        Server(stub.url)
    assert caught.value.hint == "name one with --regenerate-model"
    assert Server(stub.url, "two").model == "two"


def test_answers_follow_the_answers_that_were_written(stub: Stub, talk: str) -> None:
    """Messages are sent unchanged: the server applies its template."""
    stub.reply = lambda body: (f"{REPLY}: {len(body['messages'])}", "stop")
    samples = read_samples([talk], chatty(), seq_len=1000)[:1]
    (made,) = rewrite(
        Server(stub.url, "tiny"), samples, chatty(), seq_len=1000, temperature=0.0, seed="0/0"
    )
    first, second = ({"role": "assistant", "content": f"{REPLY}: {n}"} for n in (2, 4))
    assert [each["messages"] for each in stub.asked] == [
        TALK[:2], [*TALK[:2], first, TALK[3]],
    ]  # fmt: skip
    assert stub.asked[0]["seed"] != stub.asked[1]["seed"]
    before = "".join(f"[{m['role']}]{m['content']}</s>\n" for m in TALK[:2])
    room_left = 1000 - len(encode(tokenizer(), before + "[assistant]"))
    assert stub.asked[0]["max_tokens"] == room_left > stub.asked[1]["max_tokens"]
    assert taught_text(made) == "".join(f"{m['content']}</s>\n" for m in (first, second))
    assert tokenizer().decode(made.tokens) == before + (
        f"[assistant]{first['content']}</s>\n[user]{TALK[3]['content']}</s>\n"
        f"[assistant]{second['content']}</s>\n"
    )


def test_an_answer_that_was_cut_has_no_end(stub: Stub, talk: str) -> None:
    stub.reply = lambda body: (REPLY, "length")
    samples = read_samples([talk], chatty(), seq_len=1000)[:2]
    made = rewrite(
        Server(stub.url, "tiny"), samples, chatty(), seq_len=1000, temperature=0.0, seed="0/0"
    )
    assert len(stub.asked) == len(made) == 2
    assert taught_text(made[0]) == REPLY
    assert tokenizer().decode(made[0].tokens).endswith("[assistant]" + REPLY)


def test_plain_text_goes_on_after_what_is_given(stub: Stub) -> None:
    known = tokenizer()
    text = "def f(x):\n    return x\n" * 9
    tokens = [0, *encode(known, text)]
    sample = Sample(tokens, [False] + [True] * (len(tokens) - 1), given=20)
    stub.reply = lambda body: ("    return a value\n\ndef g(y, z):\n    return y", "stop")
    server = Server(stub.url, "tiny")
    how = {"temperature": 0.8, "seed": "0/0", "template": {"thoughts": False}}
    (made,) = rewrite(server, [sample], known, seq_len=70, **how)
    prompt = known.decode(tokens[1:20])
    (asked,) = stub.asked
    assert asked["prompt"] == prompt and text.startswith(prompt)
    assert asked["max_tokens"] == 50 and "chat_template_kwargs" not in asked
    assert made.tokens[0] == 0 and made.tokens[-1] == known.eos_token_id
    assert known.decode(made.tokens[1:-1]) == prompt + stub.reply({})[0]
    assert taught_text(made) == stub.reply({})[0] + "</s>"
    (cut,) = rewrite(server, [sample], known, seq_len=40, **how)
    assert cut.tokens == made.tokens[:40]
    stub.reply = lambda body: ("too short", "length")
    assert rewrite(server, [sample], known, seq_len=70, **how) == []


def test_a_training_on_a_servers_words(
    stub: Stub,
    train: Train,
    checkpoint: Callable[..., Path],
    talk: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Groups generated before a stop are not requested again; the record holds no address."""
    monkeypatch.setattr(texts, "_GROUP", 8)
    monkeypatch.setattr(room, "_FIRST_WAIT", 0.0)
    # The stub drops connections below, and says so to stderr.
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "handle_error", lambda *_: None)
    source = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), source)
    chatty().save_pretrained(source)
    asked = {"data": [talk, data], "seq_len": 100, "steps": 3, "regenerate_url": stub.url}
    train(source, "whole", **asked)
    paths = {each["path"] for each in stub.asked}
    assert paths == {"/v1/models", "/v1/chat/completions", "/v1/completions"}
    in_all = len(stub.asked)

    def dropping(body: dict[str, Any]) -> tuple[str, str]:
        if len(stub.asked) > 10:
            raise ConnectionError
        return REPLY, "stop"

    with monkeypatch.context() as patch:
        stub.asked.clear()
        patch.setattr(stub, "reply", dropping)
        with pytest.raises(SpectoolError, match="5 times"):
            train(source, **asked)
    stub.asked.clear()
    train(source, **asked)
    assert len(stub.asked) < in_all
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    record = read_record(tmp_path / "out")
    assert record.training["regenerate"] and record.training["regenerate_model"] == "tiny"
    assert "127.0.0.1" not in (tmp_path / "out" / "spectool_heads.json").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"regenerate_url": "localhost:8000"}, "expected http://HOST:PORT/v1"),
        ({"regenerate_url": "file:///etc"}, "expected http://HOST:PORT/v1"),
        ({"regenerate_model": "x"}, "--regenerate-model: only with --regenerate-url"),
    ],
)
def test_wrong_places_are_one_line(
    train: Train, checkpoint: Callable[..., Path], asked: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(checkpoint("llama"), **asked)
